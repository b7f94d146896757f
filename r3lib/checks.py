"""What can be known of a run before anything runs, without torch: its model, tasks, problems."""

from .config import ROOT, Profile
from .doctor import reaches_hub
from .errors import R3Error
from .tasks import Task, load_task
from .weights import missing

VALIDATION = 32  # problems of the tour


def check(profile: Profile, tasks: list[str]) -> None:
    """Raise R3Error, which names the setting and the fix, for what notebooks would find late.

    That is a model that is neither here nor on the hub, an option that a task does not take, and a
    split with fewer problems than are asked for. (`load_profile` refuses settings that exclude
    each other.)
    """
    check_model(profile.model)
    for name in tasks:
        task = load_task(name, **profile.task_options.get(name, {}))
        if getattr(task, "source", "") != "hub" or reaches_hub():
            check_problems(task, profile)


def check_model(model: str) -> None:
    """Raise R3Error unless `model` is on this machine or the hub has it."""
    if why := missing(model):
        raise R3Error(f"model {model!r} has {why}")
    folder = ROOT / model  # where the notebooks' kernels look for a relative one
    if model in ("base_model", "smollm2") or (folder / "config.json").is_file():
        return
    if folder.is_dir():
        raise R3Error(f"model {model!r} has no config.json: name a model's folder, or a hub id")
    _check_hub_id(model)


def _check_hub_id(model: str) -> None:
    """Raise R3Error unless the hub, or while offline its cache, has `model`."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    no_folder = f"model {model!r} is no folder with a model"
    try:
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return
        if not reaches_hub():
            why = "and not in the hub's cache, and the hub does not answer: go online"
            raise R3Error(f"{no_folder} {why}")
        hf_hub_download(model, "config.json")
    except (ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        said = " ".join(str(error).split())[:200]
        raise R3Error(f"{no_folder}, and the hub does not give it: {said}") from error


def check_problems(task: Task, profile: Profile) -> None:
    """Raise R3Error unless `task` has as many problems as the profile asks for, in every split."""
    wanted = {"train": profile.train_problems, "test": profile.test_problems}
    wanted["validation"] = VALIDATION
    for split, count in wanted.items():
        try:
            task.problems(split, count, seed=0)
        except (TypeError, ValueError, KeyError) as error:
            why = f"{type(error).__name__}: {error}"
            raise R3Error(
                f"task {task.name!r} cannot make {split} problems ({why}): see its options"
            ) from error
