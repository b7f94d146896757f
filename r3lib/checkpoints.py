"""The checkpoints of a training: the newest complete one, and whether they are of this training."""

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import R3Error
from .identity import check_claim, write_note

logger = logging.getLogger(__name__)

RUN_NOTE = "r3_run.json"  # beside the checkpoints: what decides the training
STATE = "trainer_state.json"  # the last file of a checkpoint to be written
SPREAD = ("pytorch_model_fsdp*", "global_step*")  # of FSDP, of DeepSpeed
PARTS = {  # of a checkpoint: one of the files of each
    "weights": ("*.safetensors", "*model*.bin", *SPREAD),  # training_args.bin is none
    "optimizer": ("optimizer.*", "optimizer_*", *SPREAD),
}
FIX = "give another output_dir, or delete its checkpoints"


def last_checkpoint(folder: str) -> str | None:
    """The newest complete checkpoint; unfinished and damaged ones after it are passed over."""
    named = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit()]
    for path in sorted(named, key=lambda path: int(path.name[11:]), reverse=True):
        try:
            json.loads((path / STATE).read_text())["global_step"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # unfinished, or no training's
            continue
        damage = _damage(path)
        if damage is None:
            return str(path)
        logger.warning(f"{path} is passed over: {damage}")
    return None


def _damage(checkpoint: Path) -> str | None:
    """What of a checkpoint is missing, or cut off; None: nothing."""
    for kind, names in PARTS.items():
        if not any(found for name in names for found in checkpoint.glob(name)):
            return f"it has no {kind}"
    for path in checkpoint.glob("*.safetensors"):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return f"{path.name} is damaged"
    cut = [path.name for path in checkpoint.glob("*.pt*") if not zipfile.is_zipfile(path)]
    return f"{cut[0]} is damaged" if cut else None


def claim_checkpoints(folder: Path, resumed, facts: dict, max_steps: int) -> None:
    """Note in `folder` that its checkpoints are of the training with these `facts`.

    R3Error if it holds checkpoints of another training, or the parent of the checkpoint `resumed`
    (a path, else a boolean or None) does, or if a checkpoint is beyond `max_steps`.
    """
    folders = {folder}
    if isinstance(resumed, (str, Path)):
        folders.add(Path(resumed).parent)
    for other in folders:
        checkpoint = last_checkpoint(str(other))
        if checkpoint is None:
            continue
        if json.loads((Path(checkpoint) / STATE).read_text())["global_step"] > max_steps:
            raise R3Error(f"{checkpoint} is beyond max_steps={max_steps}: {FIX}")
        check_claim(other / RUN_NOTE, facts, "checkpoints of another training", FIX)
    write_note(folder / RUN_NOTE, facts)
