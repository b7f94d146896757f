"""What an object is and what its code does, as JSON: the same in every process."""

import dataclasses
import dis
import functools
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from .errors import R3Error

FIXED = (str, int, float, bytes, tuple, frozenset, Path, re.Pattern, functools.partial)
PARTIAL = (functools.partial, functools.partialmethod)
HOLDS = {  # where the function is
    property: "fget",
    classmethod: "__func__",
    staticmethod: "__func__",
    functools.cached_property: "func",
    type(functools.cache(len)): "__wrapped__",
}


def told(value, seen: dict, name: str | None):
    """`value` as JSON, the same in every process.

    `name` is its own to the user; None: what code calls by name. `seen`: the number, by id, of what
    was told before, where references go in a circle. R3Error, for what has a name: nothing tells it
    from another.
    """
    bound = getattr(value, "__self__", None) if inspect.isroutine(value) else None
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        pairs = [(told(key, seen, name), told(inner, seen, name)) for key, inner in value.items()]
        return {key if isinstance(key, str) else json.dumps(key): inner for key, inner in pairs}
    if isinstance(value, (list, tuple)):
        return [told(inner, seen, name) for inner in value]
    if isinstance(value, (set, frozenset)):
        # each by itself: a set has another order in every process
        return sorted(json.dumps(told(inner, dict(seen), name)) for inner in value)
    if isinstance(value, re.Pattern):
        return [str(value.pattern), value.flags]
    if isinstance(value, PARTIAL):
        return told([value.func, value.args, value.keywords], seen, name)
    if bound is not None and not inspect.ismodule(bound):  # a method of an object
        return [value.__name__, told(bound, seen, name)]
    if _is_source(value):
        return _told_source(value, seen, name)
    return _told_object(value, seen, name)


def _told_source(value, seen: dict, name: str | None):
    """A function, class or module: what its code does; of a library's the name."""
    if _home(value):
        owner = getattr(value, "__module__", None)
        return f"{owner} {getattr(value, '__qualname__', value.__name__)}"
    if id(value) in seen:
        return f"told before: {seen[id(value)]}"
    seen[id(value)] = len(seen)
    if _function(value):
        return _told_function(_function(value), seen, name)
    if inspect.ismodule(value):
        return told(_deciding(vars(value)), seen, None)
    data = {key: inner for key, inner in vars(value).items() if not _function(inner)}
    data |= getattr(value, "__members__", {})  # of an Enum
    return [code_of(value, seen), told([*value.__bases__, _deciding(data)], seen, None)]


def _told_function(function, seen: dict, name: str | None) -> list:
    code = function.__code__
    names = sorted(_names(code, "LOAD_GLOBAL", "LOAD_NAME") & function.__globals__.keys())
    used = _deciding({key: function.__globals__[key] for key in names})
    closure = [cell.cell_contents for cell in function.__closure__ or ()]
    given = told([function.__defaults__, function.__kwdefaults__, closure], seen, name)
    return [function.__name__, _compiled(code), given, told(used, seen, None)]


def _told_object(value, seen: dict, name: str | None):
    """An object: its class and its values; what the library's own text says of one of Python's."""
    if hasattr(value, "tolist"):  # an array of numpy or torch
        return told(value.tolist(), seen, name)
    if _is_opaque(value) and name is None:
        return type(value).__name__
    if _is_opaque(value):
        raise R3Error(
            f"{name} has a {type(value).__name__}, which cannot be told apart from another: pass a "
            "plain function or value, or keep it under a name with _ if it decides nothing"
        )
    if _home(type(value)) == "python":
        return repr(value)
    if id(value) in seen:
        return f"told before: {seen[id(value)]}"
    seen[id(value)] = len(seen)
    return told([type(value), values_of(value)], seen, name)


def _is_opaque(value) -> bool:
    """Whether `value` is of a library's class and shows nothing that tells it from another."""
    home = _home(type(value))
    if dataclasses.is_dataclass(value):
        return False
    return home == "package" or home == "python" and " at 0x" in repr(value)


def values_of(thing) -> dict:
    """The attributes of an object that decide what it does, those of its class among them."""
    members = {}
    for owner in reversed(type(thing).__mro__):
        members |= vars(owner)
    own = getattr(thing, "__dict__", {})
    values = {}
    assigned = set()
    for name, member in members.items():
        function = _function(member)
        if function and name not in ("__init__", "__post_init__"):
            assigned |= _names(function.__code__, "STORE_ATTR")
        if inspect.ismemberdescriptor(member):  # in __slots__
            values[name] = getattr(thing, name, None)
        elif not function:
            values[name] = member
    for name, value in own.items():
        if not isinstance(members.get(name), functools.cached_property):
            values[name] = value
    return _deciding(values, assigned)


def _deciding(values: dict, assigned=frozenset()) -> dict:
    """Those of `values` that are no caches: a private one that may change during a run is one."""
    kept = {}
    for name, value in values.items():
        is_fixed = (isinstance(value, FIXED) or _is_source(value)) and name not in assigned
        is_noted = name.startswith("__") or isinstance(value, logging.Logger)
        if (is_fixed or not name.startswith("_")) and not is_noted:
            kept[name] = value
    return kept


def _is_source(value) -> bool:
    is_routine = inspect.isroutine(value) or _function(value) is not None
    return is_routine or inspect.isclass(value) or inspect.ismodule(value)


def _home(thing) -> str:
    """Whose a function, class or module is: "python", "package", "r3"; "" is the user's."""
    module = thing.__name__ if inspect.ismodule(thing) else getattr(thing, "__module__", None)
    file = getattr(sys.modules.get(module), "__file__", None)
    if module == "__main__":
        return ""
    if module is None or file is None:
        known = module is None or module.partition(".")[0] in sys.stdlib_module_names
        return "python" if known else ""
    folders = Path(file).parents
    if Path(__file__).parent in folders:
        return "r3"
    if {"site-packages", "dist-packages"} & set(Path(file).parts):
        return "package"
    return "python" if Path(os.__file__).parent in folders else ""


def code_of(owner: type, seen: dict, without=()) -> dict:
    """What the functions of a class do, by name."""
    name = owner.__qualname__
    functions = {key: _function(member) for key, member in vars(owner).items()}
    wanted = {key: f for key, f in functions.items() if f and key not in without}
    return {key: _told_function(f, seen, f"{name}.{key}") for key, f in wanted.items()}


def _function(member):
    """The function in a method, a property or what is cached; None: there is none."""
    inner = HOLDS.get(type(member))
    if inner:
        return _function(getattr(member, inner))
    return member if inspect.isfunction(member) else None


def _names(code, *operations) -> set[str]:
    """The names on which the operations of `code`, and of the functions in it, work."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in operations}
    for constant in code.co_consts:
        if inspect.iscode(constant):
            names |= _names(constant, *operations)
    return names


def _compiled(code) -> list:
    constants = [_compiled(c) if inspect.iscode(c) else told(c, {}, None) for c in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names)]
