"""Learning computes each token once, and nothing for nothing: same loss, gradients and weights as TRL's."""

import logging
from dataclasses import replace
from random import Random

import pytest
import torch
from conftest import CoinTask, ConstantTask, ScriptedEngine, base_model, coin_failures, small_config, small_lora
from transformers import AutoModelForCausalLM, MistralConfig
from trl import GRPOTrainer
from trl.kernels import ChunkedLogProbFunction

from r3lib.shared_prefix import difference, groups_of, pack, whole_groups
from r3lib.trainer import R3Trainer, rollout
from r3lib.verifiers.verdict import Verdict

ARCHITECTURES = ["llama", "qwen2", "qwen3", "phi3"]


class Slow(R3Trainer):
    """The same training with TRL's own learning pass."""

    _prepare_inputs = GRPOTrainer._prepare_inputs
    _compute_loss = GRPOTrainer._compute_loss
    _get_per_token_logps_and_entropies = GRPOTrainer._get_per_token_logps_and_entropies


def make(kind, model, tokenizer, folder, failures=4, task=None, lora=True, **changes):
    task = task or CoinTask(count=3, largest=20)
    return kind(
        model=model, args=small_config(folder, **changes), task=task,
        failures=coin_failures(tokenizer, failures, task), peft_config=small_lora() if lora else None,
        processing_class=tokenizer,
    )  # fmt: skip


def batch_of(groups, prompt_width, width, seed=0):
    """Ids and mask of rows padded as TRL does; `groups`: (prompt length, completion lengths)."""
    random, rows = Random(seed), []
    for length, completions in groups:
        prompt = [random.randrange(5, 800) for _ in range(length)]
        for size in completions:
            text = [random.randrange(5, 800) for _ in range(size)]
            rows.append([0] * (prompt_width - length) + prompt + text + [0] * (width - size))
    ids = torch.tensor(rows)
    return ids, (ids > 0).long()


def test_a_packed_row_holds_the_prompt_once_and_equal_completions_once():
    ids, mask = batch_of([(3, [2, 3]), (2, [1])], prompt_width=4, width=3)
    ids = torch.cat([ids, ids[:1]])
    mask = torch.cat([mask, mask[:1]])
    groups = groups_of(ids, mask, 3, [0, 1, 2, 3], hidden=16)
    assert [(len(g.prompt), [*map(len, g.completions)], g.of_row) for g in groups] == [
        (2, [1], {2: 0}), (3, [2, 3], {0: 0, 1: 1, 3: 0}),
    ]  # fmt: skip
    packed = pack(groups, [2, 0, 1, 3], 3, "cpu")
    assert packed.input_ids.shape == (2, 8)
    assert packed.position_ids[1].tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert packed.place.tolist() == [[0, 6, 6], [1, 2, 6], [3, 4, 5], [1, 2, 6]]
    assert packed.targets.tolist() == [ids[2, 4], *ids[0, 4:6], *ids[1, 4:7]]
    assert packed.source.tolist() == [1, 10, 11, 10, 13, 14], "the token before each, in the flat ids"
    seen = packed.attention_mask(torch.float32)[1, 0] == 0
    assert [row.nonzero()[:, 0].tolist() for row in seen[[2, 4, 6]]] == [
        [0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 5, 6],
    ]  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rows_give_the_values_and_gradients_of_trl(
    tiny, tokenizer, tmp_path, architecture, temperature
):
    trainer = make(R3Trainer, tiny(architecture), tokenizer, tmp_path, temperature=temperature)
    assert trainer._packs
    ids, mask = batch_of([(9, [4, 7, 1, 4]), (30, [12]), (21, [2, 2, 20])], 30, 20)
    ids, mask = (torch.cat([x, x[1:3]]) for x in (ids, mask))  # some reflections are equal
    mask[4, 30:] = 0  # one is masked, as mask_truncated_completions does
    results = []
    for owner in (GRPOTrainer, R3Trainer):
        trainer.model.zero_grad()
        compute = owner._get_per_token_logps_and_entropies
        logps, entropies, _ = compute(trainer, trainer.model, ids, mask, 20, compute_entropy=True)
        kept = mask[:, 30:].bool()
        (logps[kept].square().sum() + entropies[kept].mean()).backward()
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        gradient = torch.cat([p.grad.flatten() for p in trained])
        results.append((logps[kept], entropies[kept], gradient / gradient.norm()))
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bonus", [0.0, 0.01])
def test_the_head_has_a_gradient_of_the_entropy_where_the_loss_has_one(
    tiny, tokenizer, tmp_path, monkeypatch, bonus
):
    backward, seen = ChunkedLogProbFunction.backward, set()

    def watched(ctx, logps, entropy, *others):
        seen.add(entropy is not None)
        return backward(ctx, logps, entropy, *others)

    monkeypatch.setattr(ChunkedLogProbFunction, "backward", watched)
    trainer = make(R3Trainer, tiny(), tokenizer, tmp_path, entropy_coef=bonus)
    assert trainer._packs
    seen.clear()  # of the check at the start
    trainer.train()
    assert seen == {bool(bonus)}


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_twenty_steps_leave_the_adapter_of_the_slow_path(tiny, tokenizer, tmp_path, beta, loss_type):
    weights = []
    for kind in (Slow, R3Trainer):
        trainer = make(
            kind, tiny(), tokenizer, tmp_path / kind.__name__, failures=6, max_steps=20, beta=beta,
            loss_type=loss_type, failures_per_step=3, per_device_train_batch_size=4,
        )  # fmt: skip
        trainer.train()
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        weights.append(torch.cat([p.detach().flatten() for p in trained]))
    slow, ours = weights
    assert (ours - slow).norm() < 1e-4 * slow.norm()


def test_a_fully_trained_model_is_compared_with_itself_as_it_was_given(tokenizer, tmp_path):
    """Its reference is a second model, which TRL reads from the disk."""
    logs = []
    for kind in (Slow, R3Trainer):
        model = base_model()
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)  # in memory alone
        trainer = make(
            kind, model, tokenizer, tmp_path / kind.__name__, lora=False, beta=0.5, max_steps=3, optim="sgd",
            learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        logs.append([(step["kl"], step["grad_norm"]) for step in trainer.state.log_history if "kl" in step])
    slow, ours = torch.tensor(logs)
    torch.testing.assert_close(ours, slow, atol=1e-5, rtol=1e-3)
    assert ours[0, 0].abs() < 1e-6 and ours[-1, 0] > 1e-4


def test_noise_that_goes_by_the_length_of_a_row_is_left_to_trls_pass(tiny, tokenizer, tmp_path, caplog):
    trainer = make(R3Trainer, tiny(), tokenizer, tmp_path, neftune_noise_alpha=5.0)
    assert not trainer._packs and "neftune_noise_alpha" in caplog.text


def calls_of(trainer):
    """Rows of each forward of the backbone from now on."""
    seen = []
    backbone = trainer._backbone(trainer.model)
    backbone.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("beta, forwards", [(0.0, 0), (0.04, 4)])
def test_dead_groups_cost_a_forward_only_where_there_is_a_kl_term(
    tiny, tokenizer, tmp_path, beta, forwards
):
    task = ConstantTask(ok=False)
    trainer = make(
        R3Trainer, tiny(), tokenizer, tmp_path, task=task, beta=beta, max_steps=1,
        failures_per_step=2, per_device_train_batch_size=8,
    )  # fmt: skip
    trainer._engine = ScriptedEngine(tokenizer)
    seen = calls_of(trainer)
    with pytest.warns(UserWarning, match=r"no group has variance \(retry success 0%\)"):
        trainer.train()
    assert len(seen) == forwards, "two groups, of the policy and of the reference"
    [entry] = [e for e in trainer.state.log_history if "frac_reward_zero_std" in e]
    assert entry["grad_norm"] == 0 if beta == 0 else "kl" in entry


def test_only_groups_with_variance_are_computed_and_the_gradient_is_the_same(
    tiny, tokenizer, tmp_path
):
    trainer = make(R3Trainer, tiny(), tokenizer, tmp_path)
    ids, mask = batch_of([(9, [4, 7]), (12, [5, 3])], 12, 8)
    inputs = {
        "prompt_ids": ids[:, :12], "prompt_mask": mask[:, :12], "completion_ids": ids[:, 12:],
        "completion_mask": mask[:, 12:], "advantages": torch.tensor([0.5, -0.5, 0.0, 0.0]),
        "num_items_in_batch": mask[:, 12:].sum(),
    }  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    gradients, seen = [], calls_of(trainer)
    for kind in (Slow, R3Trainer):
        trainer.__class__ = kind
        trainer.model.zero_grad()
        seen.clear()
        trainer._compute_loss(trainer.model, inputs).backward()
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
    assert [shape[0] for shape in seen] == [1], "one packed row: the other group teaches nothing"
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-7, rtol=1e-4)
    assert gradients[0].any()


def test_a_step_puts_the_rows_of_a_group_together_and_those_that_teach_first():
    prompts = torch.tensor([[1], [2], [3], [2], [1], [3]])
    advantages = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    ids = torch.arange(6)
    batches = [
        {"prompt_ids": prompts[part], "advantages": advantages[part], "row": ids[part], "count": ids.sum()}
        for part in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    whole = whole_groups(batches)
    assert [batch["row"].tolist() for batch in whole] == [[1, 3], [0, 4], [2, 5]]
    assert all(batch["count"] == 15 for batch in whole)


@pytest.mark.parametrize(
    "layer_types, said",
    [
        (["sliding_attention", "full_attention"], "layers of sliding_attention"),
        (None, "it looks back only 256 tokens"),
    ],
)
def test_a_model_whose_layers_look_back_only_a_window_is_computed_row_by_row(
    tokenizer, tmp_path, caplog, layer_types, said
):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        sliding_window=256, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    config.layer_types = layer_types
    with caplog.at_level(logging.WARNING, "r3lib"):
        trainer = make(R3Trainer, AutoModelForCausalLM.from_config(config), tokenizer, tmp_path)
    assert not trainer._packs
    assert said in caplog.text


@pytest.mark.parametrize(
    "packed, said",
    [
        (lambda p: p * 1.0, None),
        (lambda p: p * float("nan"), "log-probs differ by nan"),
        (lambda p: p.detach() + (p - p.detach()) * torch.tensor([[1.0, -1.0]]), "gradients differ"),
        (lambda p: p.view(7), "packed rows raise RuntimeError"),
    ],
)
def test_what_differs_is_said(packed, said):
    parameter = torch.tensor([[1.0, 2.0]], requires_grad=True)
    why = difference(lambda: parameter * 1.0, lambda: packed(parameter), [parameter], exact=True)
    assert why is None if said is None else why.startswith(said)


def test_a_packed_row_has_a_largest_size(monkeypatch):
    monkeypatch.setattr("r3lib.shared_prefix.MOST_TOKENS", 12)
    ids, mask = batch_of([(5, [4, 3, 4, 6])], prompt_width=5, width=6)
    groups = groups_of(ids, mask, 6, [0, 1, 2, 3], hidden=64)
    assert sorted(group.tokens() for group in groups) == [9, 11, 12]
    assert sorted(row for group in groups for row in group.of_row) == [0, 1, 2, 3]


def operations(groups, hidden):
    """Of a layer: products with weights, and attention of every token to its whole row."""
    lengths = [group.tokens() for group in groups]
    return sum(24 * hidden**2 * length + 4 * hidden * length**2 for length in lengths)


@pytest.mark.parametrize("hidden, number", [(128, 3), (1536, 1)])
def test_a_group_has_as_many_packed_rows_as_cost_least(monkeypatch, hidden, number):
    """A group of the embedded model's study when its reflections have grown, and one of a model of 1.5B."""
    ids, mask = batch_of([(60, [90, 70, 110, 80, 90, 100, 60, 120])], 60, 120)
    groups = groups_of(ids, mask, 120, list(range(8)), hidden)
    assert len(groups) == number and max(g.tokens() for g in groups) < 1.25 * min(g.tokens() for g in groups)
    assert sorted(row for group in groups for row in group.of_row) == list(range(8))
    for group in groups:
        for row, index in group.of_row.items():
            assert group.prompt + group.completions[index] == tuple(ids[row][mask[row] > 0].tolist())
    least = operations(groups, hidden)
    for other in range(1, 9):  # of about as many rows as one asks for
        monkeypatch.setattr("r3lib.shared_prefix.isqrt", lambda _, rest=720 // other: rest)
        assert least <= 1.02 * operations(groups_of(ids, mask, 120, list(range(8)), hidden), hidden)


def test_packing_that_changes_the_values_is_found_at_the_start(tiny, tokenizer, tmp_path, caplog, monkeypatch):
    """As an architecture would that does not honour the mask of blocks."""
    import r3lib.shared_prefix as shared

    causal = shared.Packed.attention_mask
    monkeypatch.setattr(
        shared.Packed, "attention_mask", lambda self, dtype: causal(self, dtype).mul(0).triu(1)
    )
    with caplog.at_level(logging.WARNING, "r3lib"):
        trainer = make(R3Trainer, tiny(), tokenizer, tmp_path)
    assert not trainer._packs and "log-probs differ" in caplog.text


def test_dynamic_sampling_replaces_failures_until_their_groups_have_variance(
    tiny, tokenizer, tmp_path, monkeypatch
):
    """A penalty for some that are cut off is no variance: none of these retries succeeds."""
    trainer = make(
        R3Trainer, tiny(), tokenizer, tmp_path, failures=4, failures_per_step=2, dynamic_sampling=5
    )
    import r3lib.rollout as module

    sampled, real = [], module.sample_groups

    def some_dead(places, turn, trainer):
        """The group at place 1 is dead until it is drawn for the third time."""
        sampled.append((turn, list(places)))
        groups = real(places, turn, trainer)
        for place, group in zip(places, groups):
            oks = [place == 0 or turn == 2, False, False, False]
            verdicts = [Verdict(ok, "ok" if ok else "missed_target") for ok in oks]
            group.retries[:] = [replace(r, verdict=v) for r, v in zip(group.retries, verdicts)]
            group.rewards[:] = [float(oks[0]), 0.0, -0.3, 0.0]
        return groups

    monkeypatch.setattr(module, "sample_groups", some_dead)
    prompts = [row["prompt"] for row in trainer.train_dataset.select(range(2)) for _ in range(4)]
    output = rollout(prompts, trainer)
    assert sampled == [(0, [0, 1]), (1, [1]), (2, [1])]
    assert output["reward"] == [1, 0, -0.3, 0, 1, 0, -0.3, 0]
    assert trainer.r3_metrics["groups_drawn"] == 4


def test_a_replaced_failure_depends_on_seed_place_and_turn_alone(tiny, tokenizer, tmp_path):
    trainer = make(R3Trainer, tiny(), tokenizer, tmp_path, task=ConstantTask(ok=False), dynamic_sampling=3,
                   max_steps=1)  # fmt: skip
    prompts = [row["prompt"] for row in trainer.train_dataset.select(range(2)) for _ in range(4)]
    first, again = rollout(prompts, trainer), rollout(prompts, trainer)
    assert first["completion_ids"] == again["completion_ids"]
    assert trainer.r3_metrics["groups_drawn"] == 6, "the cap: three draws a group, all of them dead"
    assert trainer.r3_metrics["retry_success"] == 0
