"""What decides a result, as facts by name: the note that keeps other results out of a folder."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from .errors import R3Error
from .files import write_atomic

UNLIKE = ("_name_or_path", "transformers_version", "base_model_name_or_path")  # decide no weight
SHOWN = 60  # characters of a value that a message shows


def digest(items: Iterable) -> str:
    """Short hash of `items`, each as JSON: the same in every process."""
    total = hashlib.sha256()
    for item in items:
        total.update(json.dumps(item, sort_keys=True, default=_plain).encode() + b"\n")
    return total.hexdigest()[:16]


def task_facts(task) -> dict:
    """What decides the task's problems, prompts and verdicts: its values, and what its code does.

    All that the code calls by name counts, outside Python, installed packages and R3. R3Error: a
    value that cannot be pickled.
    """
    from .source_facts import deciding, hash_of  # half a second, for `datasets`

    facts = {}
    for name, value in sorted(deciding(_values(task), type(task)).items()):
        shown = isinstance(value, (str, int, float)) and len(str(value)) <= SHOWN
        facts[f"task.{name}"] = value if shown else hash_of(value, f"task.{name}")
    kind = type(task)
    return facts | {"task's class": f"{kind.__qualname__} {hash_of(kind, kind.__qualname__)}"}


def _values(task) -> dict:
    """The attributes of an object, those in slots too."""
    slots = {}
    for owner in type(task).__mro__:
        named = vars(owner).get("__slots__", ())
        for name in [named] if isinstance(named, str) else named:
            if hasattr(task, name):
                slots[name] = getattr(task, name)
    return slots | getattr(task, "__dict__", {})


def content(problem) -> dict:
    """The values of a problem, the answers that its verifier knows among them."""
    if dataclasses.is_dataclass(problem):
        values = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    elif hasattr(problem, "_asdict"):
        values = problem._asdict()
    else:
        values = problem.__dict__
    return {name: value for name, value in values.items() if not name.startswith("_")}


def model_facts(model, trained: bool = True) -> dict:
    """Architecture and weights of a transformers model or PeftModel, its adapters included.

    Of every tensor of the state the hash takes name, shape, dtype, the exact sum of its bits and 64
    of its values: a change of any one value changes it, whatever the number of threads. `trained`
    False leaves out what requires a gradient. LoRA's A, which is random, counts once B is not zero.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    facts = {"model": type(base).__name__}
    facts["model's config"] = digest([_known(model.config.to_diff_dict())])
    state = model.state_dict(keep_vars=True).items()
    idle = {name.replace("lora_B", "lora_A") for name, value in state if _idle(name, value)}
    kept = (
        (name, value)
        for name, value in state
        if (trained or not value.requires_grad) and name not in idle
    )
    facts["model's weights"] = digest(_marks(name, value) for name, value in kept)
    if hasattr(model, "peft_config"):
        status = model.get_model_status()
        adapters = {name: _known(c.to_dict()) for name, c in model.peft_config.items()}
        state = [status.enabled, status.active_adapters, status.merged_adapters]
        facts["model's adapters"] = digest([adapters, state])
    return facts


def _idle(name: str, value) -> bool:
    """Whether a tensor is LoRA's B, and as yet zero."""
    return "lora_B" in name and value.device.type != "meta" and not value.any()


def _marks(name: str, value) -> list:
    import torch

    same = [name, list(value.shape), str(value.dtype)]
    if value.device.type == "meta":
        return same
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    flat = value.detach().reshape(-1).contiguous().view(bits)
    some = flat[:: max(1, len(flat) // 64)][:64]
    return [*same, int(flat.sum(dtype=torch.int64)), some.tolist()]


def _known(config: dict) -> dict:
    return {name: value for name, value in config.items() if name not in UNLIKE}


# notes


def claim(note: Path, facts: dict, used: bool, held: str, fix: str) -> None:
    """Write `facts` to `note`: what decides the results in its folder.

    R3Error if the folder is `used` already, for other facts: it says what is `held` there, what
    differs, and the `fix`.
    """
    if used:
        check_claim(note, facts, held, fix)
    write_note(note, facts)


def check_claim(note: Path, facts: dict, held: str, fix: str) -> None:
    """R3Error, naming what differs, unless `note` holds `facts`."""
    differing = f"there is no {note.name} that says of which"
    if note.exists():
        try:
            differing = differences(json.loads(note.read_text()), facts)
        except ValueError:
            differing = f"{note.name}, which says of which, is damaged"
    if differing:
        raise R3Error(f"{note.parent} holds {held}: {differing}: {fix}")


def differences(old: dict, new: dict) -> str:
    """Name each fact in which `old` and `new` differ, with both values; "" when they agree."""
    old, new = [json.loads(json.dumps(facts, default=_plain)) for facts in (old, new)]
    names = [name for name in new | old if old.get(name) != new.get(name)]
    shown = (f"{name} was {_cut(old.get(name))}, is {_cut(new.get(name))}" for name in names)
    return "; ".join(shown)


def write_note(note: Path, facts: dict) -> None:
    """Write `facts` to `note`."""
    write_atomic(note, json.dumps(facts, indent=1, default=_plain) + "\n")


def _cut(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN + 20 else f"{text[:SHOWN]}..."


def _plain(value):
    """What JSON knows in place of `value`; of an object that shows its address, its class."""
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text


# problems and tasks that cannot be used


def check_task(task) -> None:
    """Raise R3Error for a task without a name or one of the texts that a model is told."""
    texts = "name reflection_prompt retry_prompt blind_retry_prompt generic_reflection".split()
    for attribute in texts:
        value = getattr(task, attribute, None)
        if not isinstance(value, str) or not value:
            raise R3Error(
                f"task {type(task).__name__} has no {attribute}: give its class {attribute} = '...'"
            )
    if not re.fullmatch(r"\w[\w.-]*", task.name):
        raise R3Error(f"a task's name={task.name!r} names files: use letters, digits, - and _")
    reasons = getattr(task, "reasons", ())
    if isinstance(reasons, str):
        raise R3Error(f"task {task.name}: reasons is the text {reasons!r}: write ({reasons!r},)")


def check_problems(problems) -> None:
    """R3Error, naming it, for a problem whose id is not a string or is another problem's too."""
    seen = set()
    for place, problem in enumerate(problems):
        name = getattr(problem, "id", None)
        if not isinstance(name, str):
            raise R3Error(f"problem {place} has id {name!r}, which is no string: make it str(...)")
        if name in seen:
            raise R3Error(f"problem id {name!r} occurs twice: drop one, or give each its own id")
        seen.add(name)
