"""Which sources of the package decide a result: when one changes, results are made again."""

from pathlib import Path

from .files import folder_hash
from .tasks import TASKS

HERE = Path(__file__).resolve().parent
WITHOUT_EFFECT = set(  # modules that decide no episode and no adapter; a new one is not among them
    """__init__ __main__ artifacts card cli colab config doctor errors evaluate failures figures files
    pipeline preflight provenance render report sources stats study train training_log view""".split()
)


def sources_hash(task: str, engine: str) -> str:
    """Hash of the sources that decide a result of the task called `task`, sampled by `engine`."""
    files = [path for path in HERE.glob("*.py") if path.stem not in WITHOUT_EFFECT]
    files += HERE.glob("verifiers/*.py")
    others = tuple(name for name in TASKS if name != task)
    files += [path for path in HERE.glob("tasks/*.*") if not path.name.startswith(others)]
    unused = () if engine == "vllm" else ("vllm", "watch")
    files += [path for path in HERE.glob("engines/*.py") if not path.name.startswith(unused)]
    return folder_hash(*sorted(files))


def own_modules(task) -> list[Path]:
    """The files, outside the package, in which the task's methods are written.

    Functions and classes beside the task, which its methods use, stand there too. A task of a
    notebook or a script has none: there only the class itself counts.
    """
    found = set()
    for owner in type(task).__mro__:
        if owner.__module__ == "__main__":
            continue
        for method in vars(owner).values():
            code = getattr(method, "__code__", None)
            if code:
                found.add(Path(code.co_filename))
    return sorted(path for path in found if HERE not in path.parents)
