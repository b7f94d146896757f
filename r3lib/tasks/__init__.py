"""The tasks that ship with the package, by name, and those of your own, by place."""

import importlib.util
import inspect
import os
import sys
from pathlib import Path

from ..errors import R3Error, nearest
from .base import Task
from .countdown import CountdownProblem, CountdownTask
from .function_calling import FunctionCallingTask

ROOT = Path(__file__).resolve().parents[2]  # from which the path of a profile counts
TASKS = {"countdown": CountdownTask, "function_calling": FunctionCallingTask}


def load_task(name: str, options: dict | None = None, **own) -> Task:
    """The task called `name`, or the one of your own at "package.module:Class" or "file.py:Class".

    It is made with the keywords in `own`, or with `options[task's name]` (`task_options`).
    R3Error: no such task, or it does not take an option.
    """
    task = TASKS.get(name) or _class_at(name)
    given = (options or {}).get(getattr(task, "name", name), {}) | own
    known = list(inspect.signature(task).parameters)
    for option in given:
        if option not in known:
            raise R3Error(f"task {name!r}: no option {option!r}: {nearest(option, known)}")
    try:
        return task(**given)
    except (TypeError, ValueError, KeyError, OSError) as error:
        why = f"task {name!r}, options {given}: {type(error).__name__}: {error}"
        raise R3Error(f"{why}: see its class for their types") from error


def drawn(task: Task, split: str, n: int) -> list:
    """`n` problems of a split. R3Error: a task of your own gives fewer, or what is no question."""
    call = f"{task.name}: problems({split!r}, {n}, seed=0)"
    try:
        problems = task.problems(split, n, seed=0)
        messages = task.messages(problems[0]) if problems else []
    except R3Error:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise R3Error(f"{call}, or messages of the first problem, raises {why}") from error
    if len(problems) != n:
        raise R3Error(f"{call} gives {len(problems)}: ask for as many, or make the task give them")
    if not (isinstance(messages, list) and all(isinstance(m, dict) for m in messages)):
        raise R3Error(f"{task.name}: messages gives {messages!r}: return [{{role, content}}, ...]")
    for name, value in (("part", task.part(problems[0].id)), ("style", task.style(""))):
        if not isinstance(value, str):
            raise R3Error(f"{task.name}: {name} gives {value!r}: return text")
    return problems


def check_options(options: dict, own: str) -> None:
    """R3Error unless `options` are {option: value} of shipped tasks or of the task called `own`."""
    known = [*TASKS, own]
    for name, given in options.items():
        if name not in known or not isinstance(given, dict):
            hint = nearest(name, known)
            raise R3Error(f"task_options of {name!r}: write {{option: value}} of a task; {hint}")


def _class_at(place: str) -> type[Task]:
    """The class at "package.module:Class" or "file.py:Class"."""
    module, _, name = place.rpartition(":")
    if not module:
        raise R3Error(
            f"unknown task {place!r}: {nearest(place, TASKS)}, or your own as file.py:Class"
        )
    try:
        found = getattr(_module(module), name)
    except (ImportError, OSError, AttributeError) as error:
        raise R3Error(
            f"no task at {place!r} ({error}): write file.py:Class or package.module:Class"
        ) from error
    except SystemExit as error:
        fix = "put what it runs under `if __name__ == '__main__':`"
        raise R3Error(f"{module} exits when imported: {fix}") from error
    except Exception as error:
        raise R3Error(f"{module} fails when imported: {type(error).__name__}: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, Task)):
        raise R3Error(f"{place!r} is no task: let the class inherit from r3lib.Task")
    return found


def _module(name: str):
    path, ours = Path(name).resolve(), ROOT / name
    path = ours if ours.exists() and not path.exists() else path
    beside = str(path.parent) if name.endswith(".py") else os.getcwd()
    if beside not in sys.path:  # for the modules beside it, as for a script
        sys.path.append(beside)
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(str(path), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


__all__ = ["CountdownProblem", "CountdownTask", "FunctionCallingTask", "Task", "drawn", "load_task"]
