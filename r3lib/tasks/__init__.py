"""The tasks that ship with the package, by name."""

import difflib
import inspect

from ..errors import R3Error
from .base import Task
from .countdown import CountdownProblem, CountdownTask
from .function_calling import FunctionCallingProblem, FunctionCallingTask

TASKS = {"countdown": CountdownTask, "function_calling": FunctionCallingTask}


def load_task(name: str, **options) -> Task:
    """Return the task called `name`, made with `options` (see the task's class)."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TASKS)}"
        raise R3Error(f"unknown task {name!r}: {hint}")
    known = list(inspect.signature(TASKS[name]).parameters)
    if unknown := [option for option in options if option not in known]:
        near = difflib.get_close_matches(str(unknown[0]), known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise R3Error(f"task {name!r}: no option {unknown[0]!r}: {hint}")
    try:
        return TASKS[name](**options)
    except (TypeError, ValueError) as error:
        why = f"task {name!r}, options {options}: {error}"
        raise R3Error(f"{why}: see its class for their types") from error


__all__ = ["CountdownProblem", "CountdownTask", "FunctionCallingProblem", "FunctionCallingTask", "Task", "load_task"]
