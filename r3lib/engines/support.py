"""What R3's own engine can sample: checks of a model, each naming what is wrong and what to do."""

from ..errors import R3Error

CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights
USE_VLLM = "R3's own engine does not sample it, use vLLM"


def check_model(model, adapter=None) -> None:
    """R3Error for a model, also with the PEFT config `adapter`, that cannot be sampled."""
    kind = model.config.model_type
    adapter = adapter or getattr(model, "active_peft_config", None)
    if model.config.is_encoder_decoder:
        raise R3Error(f"{kind} is an encoder-decoder model: R3 needs a decoder-only one")
    if adapter is not None and adapter.is_prompt_learning:
        raise R3Error(f"{adapter.peft_type.value} puts virtual tokens before a prompt: use LoRA")
    start = str(getattr(adapter, "init_lora_weights", ""))
    if start.startswith(CHANGE_BASE):
        raise R3Error(
            f"init_lora_weights={start!r} changes the model's own weights too, so that the adapter "
            "that is saved, and left out for KL, is not all that changed: leave it unset"
        )
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1:
        raise R3Error(
            f"{kind} is spread over {', '.join(sorted(map(str, places)))}: load it on one device, "
            "device_map={'': 0}"
        )
    if getattr(model.config.get_text_config(), "max_position_embeddings", None) is None:
        raise R3Error(f"{kind} names no max_position_embeddings: {USE_VLLM}")


def check_length(model, longest: int) -> None:
    """R3Error if a context of `longest` tokens goes beyond the model's `reach`."""
    limit = reach(model)
    if limit and longest > limit:
        raise R3Error(
            f"{model.config.model_type}: {longest} tokens reach beyond its first {limit}, where "
            f"chunked attention or longrope begins: {USE_VLLM}"
        )


def reach(model) -> int | None:
    """Tokens up to which each sees all before it, with one kind of positions; None: no limit.

    Beyond it `attention_chunk_size` (Llama 4) hides tokens, and longrope (Phi-3) moves positions.
    """
    config = model.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    ropes = [ropes, *(value for value in ropes.values() if isinstance(value, dict))]
    longropes = [rope for rope in ropes if rope.get("rope_type") == "longrope"]
    limits = [rope["original_max_position_embeddings"] for rope in longropes]
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        limits.append(config.attention_chunk_size)
    return min(limits, default=None)
