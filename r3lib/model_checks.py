"""What a training checks and casts in its model: precision and positions, observed in a forward."""

import torch

from .errors import R3Error


def trained_weights(model) -> dict[str, torch.Tensor]:
    """Copies of the weights that are trained, by name."""
    named = model.named_parameters()
    return {name: value.detach().clone() for name, value in named if value.requires_grad}


def train_in_fp32(model, start: dict[str, torch.Tensor]) -> None:
    """Cast what is trained to fp32: TRL has QLoRA adapters in bf16, where small updates vanish.

    Weights in `start`, by name, are as they were before TRL cast them.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = start.get(name, parameter.data).float()


@torch.no_grad()
def check_dtypes(model, args) -> None:
    """R3Error where fp32 parameters learn beside 16-bit ones that do not go with them."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) < 2 or args.bf16 or args.fp16:
        return
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
    except RuntimeError as error:
        raise R3Error(
            "what is trained is fp32 and its frozen neighbours are 16-bit, which without "
            "autocast do not go together: set bf16=True, or load the model with "
            "dtype=torch.float32"
        ) from error


@torch.no_grad()
def check_positions(model) -> None:
    """R3Error for positions that count the padding before a prompt, as learned ones do.

    TRL's learning forward pads on the left and gives no positions: with learned positions its
    log-probs would not be those of sampling.
    """
    if getattr(model, "is_quantized", False):  # a forward packs NF4 on a CPU
        return
    words = torch.arange(7, device=model.device) + len(model.get_input_embeddings().weight) // 2
    padded = torch.cat([words.new_zeros(4), words])[None]
    seen = (torch.arange(11, device=model.device) > 3).long()[None]
    alone = model(input_ids=padded[:, 4:]).logits[0, -1]
    moved = model(input_ids=padded, attention_mask=seen).logits[0, -1]
    allowed = 0.05 if alone.dtype == torch.float32 else 0.3  # rounding: 1e-5, and up to 0.08
    alone, moved = alone.float(), moved.float()
    if (alone - moved).abs().mean() > allowed * alone.std():
        raise R3Error(
            f"{model.config.model_type} has positions that count the padding before a prompt: R3 "
            "needs relative ones, such as rotary"
        )
