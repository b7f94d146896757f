"""Which sources of the package decide a result: when one changes, results are made again."""

from pathlib import Path

from .files import folder_hash
from .tasks import TASKS

HERE = Path(__file__).resolve().parent
WITHOUT_EFFECT = set(  # modules that decide no episode and no adapter; a new one is not among them
    """__init__ __main__ artifacts card cli colab conditions config doctor errors evaluate failures
    figures files identity own_trainer pipeline preflight provenance render report source_facts
    sources stats styles train training_log view""".split()
)


def sources_hash(task, engine: str) -> str:
    """Hash of the sources that decide a result of `task`, sampled by `engine`.

    Of the shipped tasks those count of which `task` is one, or inherits. What is outside the
    package is in the facts of the task.
    """
    files = [path for path in HERE.glob("*.py") if path.stem not in WITHOUT_EFFECT]
    files += HERE.glob("verifiers/*.py")
    others = tuple(name for name, shipped in TASKS.items() if not isinstance(task, shipped))
    found = [path for path in HERE.glob("tasks/*.*") if not path.name.startswith(others)]
    files += [path for path in found if path.stem not in WITHOUT_EFFECT]
    unused = () if engine == "vllm" else ("vllm",)
    files += [path for path in HERE.glob("engines/*.py") if not path.name.startswith(unused)]
    return folder_hash(*sorted(files))
