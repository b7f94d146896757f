"""The sampling engine against transformers itself: same tokens and log-probabilities in any batch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from scipy.stats import chisquare
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CodeGenConfig,
    FalconConfig,
    Gemma2Config,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from r3lib.chat import Chat
from r3lib.engines import SamplingParams, prefix_tree, tree_attention
from r3lib.engines import transformers as engine
from r3lib.engines.transformers import TransformersEngine
from r3lib.errors import R3Error

BASE_MODEL = Path(__file__).parents[1] / "data" / "base_model"
PAD, END, VOCABULARY = 0, 1, 48
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=160,
    initializer_range=0.25,  # large, so that tokens far back matter
    bos_token_id=None,
    eos_token_id=END,
    pad_token_id=PAD,
)
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "phi3": Phi3Config(**SHAPE, sliding_window=160),
}


def tiny(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.get_output_embeddings().weight.data[END] *= 2  # so that rows end, each at its own time
    return model


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny(CONFIGS[request.param])


@pytest.fixture
def llama():
    return tiny(CONFIGS["llama"])


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<end>", "user", "assistant", "a", "b"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    turn = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '<end>' }}{% endfor %}"
    header = "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<pad>", chat_template=turn + header
    )


def random_prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths
    ]


def retry_prompts(seed=0):
    """Three episodes: a common beginning of 30 tokens, then four reflections of different lengths."""
    episodes = random_prompts([30, 33, 40], seed)
    return [
        episode + tail
        for i, episode in enumerate(episodes)
        for tail in random_prompts([1, 5, 9, 14], i)
    ]


def reference(model, prompts, max_tokens, ends=(END,)):
    """Greedy completions by `model.generate`, one batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=list(ends),
        pad_token_id=PAD,
    )
    rows = [row[width:].tolist() for row in out]
    stops = [next((i for i, token in enumerate(row, 1) if token in ends), None) for row in rows]
    return [row[:stop] for row, stop in zip(rows, stops, strict=True)]


def teacher_forced(model, prompt, ids, temperature=1.0):
    """Log-probabilities of `ids` after `prompt` by one plain forward."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
    return (
        torch.log_softmax(logits / temperature, -1)
        .gather(1, torch.tensor(ids)[:, None])[:, 0]
        .tolist()
    )


def flat(results):
    return [completion for group in results for completion in group]


def assert_same(one, other):
    for a, b in zip(flat(one), flat(other), strict=True):
        assert (a.ids, a.finished) == (b.ids, b.finished)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def inputs_of(model):
    """A list that grows by the number of tokens of every forward of `model`."""
    sizes = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: sizes.append(args[0].numel())
    )
    return sizes


def test_greedy_equals_generate_token_for_token(model, tokenizer):
    prompts = random_prompts([3, 40, 17, 5, 29, 64, 8, 11, 23, 50] * 2) + retry_prompts()
    got = TransformersEngine(model, tokenizer).generate(prompts, 1, SamplingParams(32, 0.0))
    assert [group[0].ids for group in got] == reference(model, prompts, 32)
    assert len({len(group[0].ids) for group in got if group[0].finished}) > 1, (
        "no row finished early"
    )
    assert any(not group[0].finished for group in got)


def test_greedy_equals_generate_on_the_embedded_model():
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    chat = Chat(tokenizer)
    asks = [
        f"Using the numbers [{a}, 7, 12], create an equation that equals {a + 19}."
        for a in range(3, 15)
    ]
    prompts = [chat.prompt([{"role": "user", "content": ask}]) for ask in asks]
    wrong = tokenizer.encode("<answer>7 + 12</answer>", add_special_tokens=False)
    prompts += [
        chat.follow(ids, wrong, "That answer is wrong. Try the problem again.") for ids in prompts
    ]
    got = TransformersEngine(model, tokenizer).generate(prompts, 1, SamplingParams(48, 0.0))
    assert [group[0].ids for group in got] == reference(model, prompts, 48, chat.end_ids)
    assert any(group[0].finished for group in got)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_equals_one_row_at_a_time(model, tokenizer, temperature):
    prompts, sampling = (
        random_prompts([4, 60]) + retry_prompts()[2:6],
        SamplingParams(16, temperature),
    )
    together = TransformersEngine(model, tokenizer).generate(prompts, 2, sampling)
    alone = TransformersEngine(model, tokenizer, batch_size=1)
    assert_same(
        together, [alone.generate([p], 2, sampling, seeds=[i])[0] for i, p in enumerate(prompts)]
    )


def test_results_do_not_depend_on_batch_size_nor_on_the_order_of_prompts(llama, tokenizer):
    prompts, sampling = random_prompts([9, 44, 13, 70, 2]) + retry_prompts(), SamplingParams(16)
    whole = TransformersEngine(llama, tokenizer).generate(prompts, 4, sampling)
    assert_same(
        whole, TransformersEngine(llama, tokenizer, batch_size=11).generate(prompts, 4, sampling)
    )
    seeds = list(range(len(prompts)))[::-1]
    turned = TransformersEngine(llama, tokenizer).generate(prompts[::-1], 4, sampling, seeds)
    assert_same(whole, turned[::-1])


def test_samples_of_one_prompt_differ_and_each_seed_repeats_itself(llama, tokenizer):
    sampler, (prompt,) = TransformersEngine(llama, tokenizer), random_prompts([20])
    first, second, third = sampler.generate([prompt] * 3, 6, SamplingParams(12), seeds=[5, 6, 5])
    assert len({tuple(c.ids) for c in first}) == 6
    assert [c.ids for c in first] == [c.ids for c in third]
    assert not {tuple(c.ids) for c in first} & {tuple(c.ids) for c in second}


def test_fewer_tokens_give_the_beginning_of_the_same_samples(llama, tokenizer):
    prompts, sampler = random_prompts([20, 31]), TransformersEngine(llama, tokenizer)
    long, short = (flat(sampler.generate(prompts, 4, SamplingParams(length))) for length in (30, 7))
    assert [c.ids[:7] for c in long] == [c.ids for c in short]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_a_teacher_forced_forward(model, tokenizer, temperature):
    prompts = random_prompts([6, 51]) + retry_prompts()[:6]
    got = TransformersEngine(model, tokenizer).generate(prompts, 3, SamplingParams(20, temperature))
    for prompt, group in zip(prompts, got, strict=True):
        for completion in group:
            expected = teacher_forced(model, prompt, completion.ids, temperature or 1.0)
            assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_ids_end_with_an_end_token_exactly_when_finished(llama, tokenizer):
    got = flat(
        TransformersEngine(llama, tokenizer).generate(
            random_prompts([10] * 8), 8, SamplingParams(30)
        )
    )
    assert {c.finished for c in got} == {True, False}
    for completion in got:
        assert completion.finished == (completion.ids[-1] == END)
        assert END not in completion.ids[:-1]
        assert len(completion.ids) == len(completion.logprobs) and (
            completion.finished or len(completion.ids) == 30
        )


def test_a_shared_prefix_changes_nothing_but_the_work(llama, tokenizer, monkeypatch):
    prompts, sampler = (
        retry_prompts() + random_prompts([25, 31], seed=7),
        TransformersEngine(llama, tokenizer),
    )
    shared, sizes = sampler.generate(prompts, 3, SamplingParams(16)), inputs_of(llama)
    sampler.generate(prompts, 3, SamplingParams(1))
    work = sum(sizes)
    monkeypatch.setattr(prefix_tree, "MIN_SHARED", 1000)
    assert_same(shared, sampler.generate(prompts, 3, SamplingParams(16)))
    sizes.clear()
    sampler.generate(prompts, 3, SamplingParams(1))
    assert sum(sizes) - work == 3 * (30 + 33 + 40)  # each episode's beginning three times more


def test_a_long_prefill_is_cut_into_several_forwards(llama, tokenizer, monkeypatch):
    prompts, sampler = (
        retry_prompts() + random_prompts([40, 41, 42]),
        TransformersEngine(llama, tokenizer),
    )
    whole = sampler.generate(prompts, 2, SamplingParams(8))
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 45)
    assert_same(whole, sampler.generate(prompts, 2, SamplingParams(8)))


def test_finished_rows_leave_the_batch(llama, tokenizer):
    sizes = inputs_of(llama)
    got = flat(
        TransformersEngine(llama, tokenizer).generate(
            random_prompts([10] * 8), 8, SamplingParams(60)
        )
    )
    steps = sizes[1:]
    assert steps == sorted(steps, reverse=True) and steps[-1] < steps[0] == 64
    assert sum(steps) < 1.6 * sum(len(c.ids) for c in got)


def test_sampled_frequencies_follow_the_softmax(llama, tokenizer):
    (prompt,), n = random_prompts([12]), 4000
    for temperature in (1.0, 2.0):
        got = flat(
            TransformersEngine(llama, tokenizer).generate(
                [prompt], n, SamplingParams(1, temperature)
            )
        )
        with torch.no_grad():
            logits = llama(torch.tensor([prompt])).logits[0, -1].double() / temperature
        expected = n * torch.softmax(logits, -1).numpy()
        counts = torch.bincount(torch.tensor([c.ids[0] for c in got]), minlength=VOCABULARY).numpy()
        bins = np.where(
            expected >= 5, np.arange(VOCABULARY) + 1, 0
        )  # what is rare falls into one bin
        observed, wanted = np.bincount(bins, counts), np.bincount(bins, expected)
        assert (wanted > 0).sum() > 8
        assert chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 0.01


def test_a_token_without_probability_is_never_drawn():
    logits = torch.full((3, 5), float("-inf"))
    logits[:, [1, 3]] = 0.0
    draws = torch.tensor([0.0, 0.5, 1 - 2**-24])
    tokens, logprobs = engine.sample(logits, draws, 1.0)
    assert tokens.tolist() == [1, 3, 3]
    assert logprobs.exp().tolist() == pytest.approx([0.5] * 3)


def test_a_peft_model_is_sampled_with_its_adapter(model, tokenizer):
    prompts, sampling = random_prompts([15, 28]), SamplingParams(16)
    plain = TransformersEngine(model, tokenizer).generate(prompts, 4, sampling)
    torch.manual_seed(1)
    peft = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    adapted = TransformersEngine(peft, tokenizer).generate(prompts, 4, sampling)
    assert [c.ids for c in flat(adapted)] != [c.ids for c in flat(plain)]
    for prompt, group in zip(prompts, adapted, strict=True):
        for c in group:
            assert c.logprobs == pytest.approx(teacher_forced(peft.eval(), prompt, c.ids), abs=1e-4)
    with peft.disable_adapter():
        assert_same(plain, TransformersEngine(peft, tokenizer).generate(prompts, 4, sampling))


@pytest.mark.parametrize(
    "dtype, targets, tied, autocast, joined",
    [
        ("float32", "all-linear", False, False, True),
        ("float32", ["q_proj", "lm_head"], False, False, True),
        ("float32", ["q_proj", "lm_head"], True, False, False),
        ("float32", ["q_proj", "embed_tokens"], False, False, False),
        ("float32", "all-linear", False, True, False),
        ("bfloat16", "all-linear", False, False, False),
    ],
)
def test_fp32_weights_hold_the_adapter_while_sampling_and_are_the_same_after(dtype, targets, tied, autocast, joined):
    llama = CONFIGS["llama"].to_dict() | {"tie_word_embeddings": tied}
    base = tiny(type(CONFIGS["llama"])(**llama)).to(getattr(torch, dtype))
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.0)
    peft = get_peft_model(base, config)
    before = {name: value.clone() for name, value in peft.state_dict().items()}
    ids = torch.arange(5)[None]
    logits = peft.eval()(ids).logits
    layers = [module for module in peft.modules() if isinstance(module, LoraLayer)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with pytest.raises(KeyError), engine.merged(peft):
            assert {layer.merged for layer in layers} == {joined}
            if not autocast:
                torch.testing.assert_close(peft(ids).logits, logits)
            raise KeyError
    assert not any(layer.merged for layer in layers)
    after = peft.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_gets_its_own_settings_back(attention, tokenizer):
    model = tiny(replace_dropout(CONFIGS["llama"]))
    model.set_attn_implementation(attention)
    sampler, prompts = TransformersEngine(model.train(), tokenizer), random_prompts([8, 30])
    got = sampler.generate(prompts, 2, SamplingParams(6))
    assert model.training and model.config._attn_implementation == attention
    model.eval()
    assert got[1][0].logprobs == pytest.approx(
        teacher_forced(model, prompts[1], got[1][0].ids), abs=1e-4
    )
    sampler.generate(prompts, 2, SamplingParams(6))
    assert not model.training
    model.train().register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampler.generate(prompts, 2, SamplingParams(6))
    assert model.training and model.config._attn_implementation == attention


def replace_dropout(config):
    return type(config)(**{**config.to_dict(), "attention_dropout": 0.5})


def test_a_bfloat16_model_is_sampled_in_its_own_precision(llama, tokenizer):
    model, (prompt,) = llama.to(torch.bfloat16), random_prompts([40])
    for completion in flat(
        TransformersEngine(model, tokenizer).generate([prompt], 4, SamplingParams(10, 2.0))
    ):
        expected = teacher_forced(model, prompt, completion.ids, 2.0)
        assert completion.logprobs == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("trained", [False, True])
def test_scores_that_16_bits_cannot_hold_are_computed_in_32(llama, tokenizer, trained):
    """In a model that is fp16 itself, and in one that its trainer runs under autocast."""
    for layer in llama.model.layers:
        layer.self_attn.q_proj.weight.data *= 4000
        layer.self_attn.k_proj.weight.data *= (
            4000  # products pass 65504, the largest number in fp16
        )
    model, prompts = llama if trained else llama.half(), random_prompts([20, 30])
    with torch.autocast("cpu", torch.float16, enabled=trained):
        groups = TransformersEngine(model, tokenizer).generate(prompts, 4, SamplingParams(10))
        assert all(
            map(math.isfinite, (logprob for one in flat(groups) for logprob in one.logprobs))
        )
        for prompt, group in zip(
            prompts, [] if trained else groups
        ):  # autocast rounds the learner's queries
            for completion in group:
                assert completion.logprobs == pytest.approx(
                    teacher_forced(model, prompt, completion.ids), abs=0.05
                )


def test_transformers_hands_our_attention_what_it_relies_on(model, tokenizer, monkeypatch):
    seen, inner = [], tree_attention.attend

    def spy(module, query, key, value, mask, **given):
        assert query.stride(-1) == 1  # as the CPU's kernel needs it
        seen.append(
            (module.layer_idx, query.shape, key.shape, mask, given["scaling"], given["tree"])
        )
        return inner(module, query, key, value, mask, **given)

    monkeypatch.setattr(tree_attention, "attend", spy)
    TransformersEngine(model, tokenizer).generate(random_prompts([9]), 2, SamplingParams(2))
    assert [call[0] for call in seen] == [0, 1, 2, 0, 1, 2]  # every layer, in each of two forwards
    assert seen[0][1:5] == (
        (1, 4, 9, 8),
        (1, 2, 9, 8),
        None,
        8**-0.5,
    )  # keys not repeated, no mask built
    assert seen[-1][1] == (1, 4, 2, 8) and isinstance(seen[-1][-1], tree_attention.TreeCache)


GOOD = dict(prompts=[[2, 3], [4]], n=1, sampling=SamplingParams(4), seeds=[0, 1])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompts": [[2], []]}, r"prompt 1 has 0 tokens, not 1 to 156"),
        (
            {"prompts": [[2], [3] * 157]},
            r"prompt 1 has 157 tokens, not 1 to 156: shorten it or leave it out, or lower max_tokens=4",
        ),
        ({"n": 0}, "n=0"),
        ({"sampling": SamplingParams(0)}, "max_tokens=0"),
        ({"sampling": SamplingParams(4, -1.0)}, "temperature=-1"),
        ({"seeds": [1, 2, 3]}, "3 seeds for 2 prompts"),
        ({"seeds": [1, -2]}, "from 0 up"),
    ],
)
def test_bad_input_is_refused_in_one_line(llama, tokenizer, bad, message):
    with pytest.raises(R3Error, match=message) as caught:
        TransformersEngine(llama, tokenizer).generate(**{**GOOD, **bad})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Phi3Config(**{**SHAPE, "sliding_window": 10}), "windows"),
        (Gemma2Config(**SHAPE, head_dim=8), "soft caps"),
        (Lfm2Config(**SHAPE, full_attn_idxs=[1]), "cannot be replaced"),
    ],
    ids=["short window", "soft cap", "convolutions"],
)
def test_an_attention_that_we_do_not_compute_is_refused(config, message, tokenizer):
    model = tiny(config)
    before = model.config._attn_implementation
    with pytest.raises(R3Error, match=message):
        TransformersEngine(model, tokenizer).generate(random_prompts([12]), 1, SamplingParams(2))
    assert model.config._attn_implementation == before


# families


def llama4(chunk):
    """Chunked attention: beyond `chunk` tokens the first ones are hidden."""
    shape = {**SHAPE, "intermediate_size": 32}
    return Llama4TextConfig(**shape, head_dim=8, intermediate_size_mlp=48, num_local_experts=2,
                            num_experts_per_tok=1, attention_chunk_size=chunk)  # fmt: skip


def longrope(original):
    """Phi-3's: all positions change once the text is longer than `original` tokens."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": original,
    }
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "partial_rotary_factor": 1.0}
    return Phi3Config(**SHAPE, original_max_position_embeddings=original, rope_parameters=rope)


EXPERTS = dict(num_experts_per_tok=2)
SERVED = {
    "Qwen3-MoE": Qwen3MoeConfig(
        **SHAPE, **EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=16
    ),
    "Mixtral": MixtralConfig(**SHAPE, **EXPERTS, num_local_experts=4),
    "OPT": OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_attention_heads=4, eos_token_id=END,
        word_embed_proj_dim=32, num_hidden_layers=2, max_position_embeddings=160, pad_token_id=PAD,
        init_std=0.25,
    ),
    "Llama 4 inside a chunk": llama4(54),
    "longrope inside its original length": longrope(54),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_a_family_is_served_as_generate_serves_it(tokenizer, name):
    model, prompts = tiny(SERVED[name]), random_prompts([3, 30, 17, 38])  # and 16 tokens more: 54
    got = TransformersEngine(model, tokenizer).generate(prompts, 1, SamplingParams(16, 0.0))
    assert [group[0].ids for group in got] == [
        reference(model, [prompt], 16)[0] for prompt in prompts
    ]


BEYOND = {
    "Llama 4 beyond a chunk": (llama4(53), "llama4_text: 54 tokens reach beyond its first 53.*use vLLM"),
    "longrope across its length": (longrope(53), "phi3: 54 tokens reach beyond its first 53.*use vLLM"),
    "StableLM": (StableLmConfig(**SHAPE), "StableLmAttention keeps what the engine hands it.*use vLLM"),
    "MPT": (MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=VOCABULARY), "mpt names no max_position.*vLLM"),
    "CodeGen": (CodeGenConfig(vocab_size=VOCABULARY, n_embd=32, n_head=4, n_layer=2, n_positions=160,
                              rotary_dim=4), "codegen.*use vLLM"),
    "Falcon": (FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4,
                            num_hidden_layers=2), "falcon.*use vLLM"),
}  # fmt: skip


@pytest.mark.parametrize("name", BEYOND)
def test_a_family_that_is_not_served_is_refused_by_name(tokenizer, name):
    config, words = BEYOND[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(R3Error, match=words) as error:
        TransformersEngine(model, tokenizer).generate(
            random_prompts([3, 38]), 1, SamplingParams(16, 0.0)
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused_by_name(llama, tokenizer, kind):
    adapted = get_peft_model(llama, kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(
        R3Error, match="(PROMPT|PREFIX)_TUNING puts virtual tokens before a prompt: use LoRA"
    ):
        TransformersEngine(adapted, tokenizer)


def test_an_encoder_decoder_is_refused_by_name(tokenizer):
    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_ff=32, num_layers=2, num_heads=4, d_kv=8)
    with pytest.raises(
        R3Error, match="t5 is an encoder-decoder model: R3 needs a decoder-only one"
    ):
        TransformersEngine(T5ForConditionalGeneration(config), tokenizer)


# memory


@pytest.mark.parametrize("most", [1, 700, 5000])
def test_queries_that_take_turns_give_the_same_tokens_and_log_probs(
    model, tokenizer, monkeypatch, most
):
    prompts, sampler = (
        retry_prompts() + random_prompts([70, 3]),
        TransformersEngine(model, tokenizer),
    )
    for sampling in (SamplingParams(8, 0.0), SamplingParams(8, 1.0)):
        whole = sampler.generate(prompts, 2, sampling)
        with monkeypatch.context() as patch:
            patch.setattr(tree_attention, "MAX_SCORES", most)
            cut = sampler.generate(prompts, 2, sampling)
        assert [c.ids for c in flat(cut)] == [c.ids for c in flat(whole)]
        for a, b in zip(flat(cut), flat(whole), strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_the_scores_of_a_prefill_stay_below_a_bound_however_long_the_prompt(
    llama, tokenizer, monkeypatch
):
    """For prompts of 64 and 128 tokens, whose whole score matrices have 16,384 and 65,536 elements."""
    monkeypatch.setattr(tree_attention, "MAX_SCORES", 4096)
    for length in (64, 128):
        with Largest(length) as seen:
            TransformersEngine(llama, tokenizer).generate(
                random_prompts([length]), 1, SamplingParams(1)
            )
        assert 1024 < seen.scores <= 4096


class Largest(TorchDispatchMode):
    """Elements of the largest tensor with a place for each of `keys` keys, scores or what hides them."""

    def __init__(self, keys):
        super().__init__()
        self.keys, self.scores = keys, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.dim() >= 3
                and tensor.shape[-1] == self.keys
            ):
                self.scores = max(self.scores, tensor.numel())
        return made
