"""Training on the reflection alone equals training on reflection + retry with the retry masked.

Both forms go through the trainer's own step: rollout, reward, advantages, loss, backward. The masked form is
the truncated form's oracle: under a causal mask, tokens after the reflection cannot reach its gradient.
"""

import pytest
import torch
from conftest import CoinTask, ScriptedEngine, base_model, coin_failures, small_config, small_lora
from transformers import TrainerCallback

from r3lib.trainer import R3Trainer, rollout

ARCHITECTURES = ["nano", "llama", "qwen2", "qwen3", "phi3"]


class KeepGradients(TrainerCallback):
    """Copies every gradient just before the optimizer's step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def gradients(model, tokenizer, folder, rollout_func=rollout, lora=None, **changes):
    """The gradient of every trained tensor after one real step; the weights stay as they were."""
    keep = KeepGradients()
    trainer = R3Trainer(
        model=model, args=small_config(folder, max_steps=1, learning_rate=0.0, **changes),
        task=CoinTask(count=3, largest=20), failures=coin_failures(tokenizer, 2), peft_config=lora,
        processing_class=tokenizer, engine=ScriptedEngine(tokenizer), callbacks=[keep],
    )  # fmt: skip
    trainer.rollout_func = rollout_func
    trainer.train()
    return keep.gradients


def long_rollout(prompts, trainer):
    """The rollout with completion = reflection + turn + retry."""
    trainer.args.mask = "reflection+retry"
    return rollout(prompts, trainer)


def masked_rollout(prompts, trainer):
    """The same with `env_mask` 1 on the reflection only."""
    output = long_rollout(prompts, trainer)
    output["env_mask"] = [[1] * m.index(0) + [0] * (len(m) - m.index(0)) for m in output["env_mask"]]
    return output


def other_retries(prompts, trainer):
    """The masked form with every token after the reflection replaced by another one."""
    output = masked_rollout(prompts, trainer)
    output["completion_ids"] = [
        [token if trained else 20 + (token + 7) % 500 for token, trained in zip(ids, mask)]
        for ids, mask in zip(output["completion_ids"], output["env_mask"])
    ]
    return output


def other_reflections(prompts, trainer):
    """The masked form with each reflection's first token replaced."""
    output = masked_rollout(prompts, trainer)
    output["completion_ids"] = [[20 + (ids[0] + 7) % 500, *ids[1:]] for ids in output["completion_ids"]]
    return output


def difference(a, b):
    """(relative difference of the whole gradient, the largest of a single tensor), by Euclidean norm."""
    assert a.keys() == b.keys() and a
    assert all(g.dtype == torch.float32 for g in a.values())
    gaps, sizes = ([torch.linalg.vector_norm(x) for x in xs] for xs in ([a[n] - b[n] for n in a], b.values()))
    assert min(sizes) > 0, "a gradient is zero: the comparison would say nothing"
    return float(torch.stack(gaps).norm() / torch.stack(sizes).norm()), float(max(g / s for g, s in zip(gaps, sizes)))


@pytest.fixture(params=ARCHITECTURES)
def build(request, tiny):
    """Makes a fresh model, with the same weights every time."""
    return base_model if request.param == "nano" else lambda: tiny(request.param)


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo"])
def test_truncated_and_masked_gradients_agree(build, tokenizer, tmp_path, loss_type):
    truncated = gradients(build(), tokenizer, tmp_path, loss_type=loss_type)
    masked = gradients(build(), tokenizer, tmp_path, masked_rollout, loss_type=loss_type)
    overall, worst = difference(truncated, masked)
    print(f"\n{loss_type}: {overall:.1e} overall, {worst:.1e} worst tensor")
    assert overall < 1e-5 and worst < 1e-5


def test_they_agree_with_lora_and_a_kl_term(tokenizer, tmp_path):
    lora = small_lora(init_lora_weights=False)  # away from the reference, so that the KL term has a gradient
    options = dict(beta=0.1, loss_type="dapo", per_device_train_batch_size=4)
    forms = []
    for form in (rollout, masked_rollout):
        torch.manual_seed(0)
        forms.append(gradients(base_model(), tokenizer, tmp_path, form, lora, **options))
    overall, worst = difference(*forms)
    print(f"\nlora, kl, dapo: {overall:.1e} overall, {worst:.1e} worst tensor")
    assert overall < 1e-5 and worst < 1e-4  # random adapters: a gradient norm near 1000


def test_masked_labels_change_no_gradient(build, tokenizer, tmp_path):
    masked = gradients(build(), tokenizer, tmp_path, masked_rollout)
    changed = gradients(build(), tokenizer, tmp_path, other_retries)
    overall, worst = difference(changed, masked)
    print(f"\nother retries: {overall:.1e} overall, {worst:.1e} worst tensor")
    assert overall < 1e-6


def test_the_oracle_can_tell_gradients_apart(tiny, tokenizer, tmp_path):
    masked = gradients(tiny(), tokenizer, tmp_path, masked_rollout)
    for form in (other_reflections, long_rollout):
        assert difference(gradients(tiny(), tokenizer, tmp_path, form), masked)[0] > 0.05
