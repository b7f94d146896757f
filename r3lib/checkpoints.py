"""The checkpoints of a training: the newest complete one, and whether they are of this training."""

import json
from pathlib import Path

from .errors import R3Error
from .identity import check_claim, write_note

RUN_NOTE = "r3_run.json"  # beside the checkpoints: what decides the training
STATE = "trainer_state.json"  # the last file of a checkpoint to be written
FIX = "give another output_dir, or delete its checkpoints"


def last_checkpoint(folder: str) -> str | None:
    """The newest complete checkpoint; unfinished ones after it are passed over."""
    named = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit()]
    for path in sorted(named, key=lambda path: int(path.name[11:]), reverse=True):
        try:
            json.loads((path / STATE).read_text())
            return str(path)
        except (FileNotFoundError, ValueError):  # unfinished, being removed, or not a training's
            continue
    return None


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
