"""The hash of an object and of what its code does: the same in every process.

The hash of `datasets`, which this builds on, takes a function in a file for its name, and what a
verifier caches for a part of it.
"""

import dis
import functools
import hashlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

from datasets.utils._dill import Pickler

from .errors import R3Error
from .tasks.base import Task

PLAIN = (str, int, float, bytes, tuple, frozenset, Path, re.Pattern)
WRAPPERS = (property, classmethod, staticmethod, functools.cached_property, ModuleType)  # of code
FIRST = ("__init__", "__post_init__")
ANALYSIS = ("reasons", "categories", "style", "part")  # of a task, for tables and figures alone


def hash_of(value, name: str) -> str:
    """The hash of `value`, with all that its code calls by name outside packages and R3.

    R3Error, which calls it `name`: it has a part that cannot be pickled.
    """
    stream = io.BytesIO()
    try:
        CodePickler(stream, recurse=True).dump(value)
    except Exception as error:  # pickle raises errors of any kind
        raise R3Error(
            f"{name} cannot be told apart from another ({error}): pass a plain function or value, "
            "or keep it under a name with _ if it decides nothing"
        ) from error
    return hashlib.sha256(stream.getvalue()).hexdigest()[:16]


class CodePickler(Pickler):
    """Pickles a user's functions, classes and modules by content, wherever they stand."""

    def reducer_override(self, value):
        """What pickle asks first: (a callable, its arguments, the content)."""
        if isinstance(value, (set, frozenset)):
            return list, (sorted(value, key=_label),)
        if isinstance(value, FunctionType) and _is_users(value):
            return str, (value.__name__,), _content(value)
        if isinstance(value, type) and _is_users(value):
            members = deciding(vars(value) | getattr(value, "__members__", {}), value)
            return str, (value.__name__,), [value.__bases__, members]
        if isinstance(value, ModuleType):  # one of a library by its name alone
            inner = (deciding(vars(value)),) if _is_users(value) else ()
            return str, (value.__name__,), *inner
        if not isinstance(value, (FunctionType, type, ModuleType)) and _is_users(type(value)):
            new, given, *state = value.__reduce_ex__(4)
            if state and isinstance(state[0], dict):
                state[0] = deciding(state[0], type(value))
            return new, given, *state
        return NotImplemented

    def memoize(self, obj):
        """Not plain values: whether two equal ones are one object differs between processes."""
        if not isinstance(obj, PLAIN):
            super().memoize(obj)


def deciding(values: dict, owner: type = object) -> dict:
    """Those `values` of a module, a class, or an object of the class `owner` that are no caches.

    A name with _ is a cache where it holds no code and no plain value, or a method assigns it.
    """
    members = {name: member for base in owner.__mro__ for name, member in vars(base).items()}
    caches = {name for name, m in members.items() if isinstance(m, functools.cached_property)}
    for method in members.values():
        if isinstance(method, FunctionType) and method.__name__ not in FIRST:
            caches |= {n for n in _names(method.__code__, "STORE_ATTR") if n.startswith("_")}
    kept = {}
    for name, value in values.items():
        is_code = callable(value) or isinstance(value, WRAPPERS)
        is_plain = isinstance(value, PLAIN) and not name.startswith("__")
        is_cache = name in caches and value is not members.get(name)
        if (is_code or is_plain or not name.startswith("_")) and not is_cache:
            kept[name] = value
    return {n: v for n, v in kept.items() if n not in ANALYSIS or not issubclass(owner, Task)}


def _content(function: FunctionType) -> list:
    """Code, defaults, closure and the globals that the code names."""
    names = set(_names(function.__code__, "LOAD_GLOBAL", "LOAD_NAME"))
    used = {name: value for name, value in function.__globals__.items() if name in names}
    closure = [cell.cell_contents for cell in function.__closure__ or ()]
    given = [function.__defaults__, function.__kwdefaults__, closure]
    return [_unplaced(function.__code__), given, deciding(used)]


def _unplaced(code):
    """`code` without its file and lines, so that a comment changes nothing."""
    inner = tuple(_unplaced(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_consts=inner, co_filename="", co_linetable=b"", co_firstlineno=1)


def _names(code: CodeType, *operations: str) -> Iterator[str]:
    """The names on which the operations of `code`, and of the functions in it, work."""
    for step in dis.get_instructions(code):
        if step.opname in operations:
            yield step.argval
        if isinstance(step.argval, CodeType):
            yield from _names(step.argval, *operations)


def _label(item) -> str:
    """What sorts the items of a set alike in every process."""
    return getattr(item, "__qualname__", repr(item))


def _is_users(thing) -> bool:
    """Whether a function, class or module is neither Python's, nor a package's, nor R3's."""
    name = thing.__name__ if isinstance(thing, ModuleType) else thing.__module__
    module = sys.modules.get(name)
    if module is None or name == "__main__":
        return True
    files = getattr(module, "__file__", None) or getattr(module, "__path__", ())
    if not files:  # compiled into Python, or by Cython
        return False
    path = Path(files if isinstance(files, str) else next(iter(files)))
    folders = {Path(os.__file__).parent, Path(__file__).parent}
    installed = {"site-packages", "dist-packages"}
    return not (installed & set(path.parts) or folders & set(path.parents))
