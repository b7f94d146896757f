"""Which sources of the package decide a result: when one changes, results are made again."""

from pathlib import Path

from .files import folder_hash
from .tasks import TASKS

HERE = Path(__file__).resolve().parent
WITHOUT_EFFECT = set(  # files that decide no episode and no adapter; a new one is not among them
    """__init__ __main__ artifacts card cli colab conditions config doctor errors evaluate failures
    figures files identity own_trainer pipeline preflight provenance render report source_facts
    sources stats train training_log view tasks/__init__ tasks/styles""".split()
)


def sources_hash(task, engine: str) -> str:
    """Hash of the sources that decide a result of `task`, sampled by `engine`.

    Of the shipped tasks those count of which `task` is one, or inherits. What is outside the
    package is in the facts of the task.
    """
    files = [*HERE.glob("*.py"), *HERE.glob("verifiers/*.py")]
    others = tuple(name for name, shipped in TASKS.items() if not isinstance(task, shipped))
    files += [path for path in HERE.glob("tasks/*.*") if not path.name.startswith(others)]
    unused = () if engine == "vllm" else ("vllm",)
    files += [path for path in HERE.glob("engines/*.py") if not path.name.startswith(unused)]
    names = {path: path.relative_to(HERE).with_suffix("").as_posix() for path in files}
    return folder_hash(*sorted(path for path in files if names[path] not in WITHOUT_EFFECT))
