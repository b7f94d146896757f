"""The arguments that a tool declares: their types, defaults, and which may be left out.

The forms of tools and of types that are read are in `docs/verdicts.md`.
"""

import json
import re
from dataclasses import dataclass, field

from ..errors import R3Error

# The words for each type of JSON's values; the first is JSON Schema's.
_WORDS = {
    str: "string str text char date datetime",
    int: "integer int long",
    float: "number float double decimal complex",
    bool: "boolean bool",
    list: "array list tuple set sequence iterable ndarray",
    dict: "object dict map mapping hashmap json",
    type(None): "null none",
}
KINDS = {word: kind for kind, words in _WORDS.items() for word in words.split()}
_KEYWORDS = ("$schema", "$ref", "$defs", "anyOf", "oneOf", "allOf")


@dataclass
class Type:
    """The types of JSON values that are allowed, and those of a list's items; nothing declared,
    nothing known."""

    kinds: set[type] = field(default_factory=set)
    items: "Type | None" = None

    def add(self, other: "Type") -> None:
        """Allow also what `other` allows."""
        self.kinds |= other.kinds
        if other.items:
            self.items = self.items or Type()
            self.items.add(other.items)


@dataclass
class Argument:
    """A declared argument; `default` is a list of at most one value."""

    type: Type
    optional: bool
    default: list


def declared_arguments(tool: dict) -> dict[str, Argument]:
    """Return the declared arguments of a tool in either form, by name.

    Raises R3Error where `parameters` is no object or `required` no list.
    """
    parameters = specs = parameters_of(tool)
    required = tool.get("required")
    if is_schema(tool):
        specs = parameters.get("properties") or {}
        required = parameters.get("required")
        required = () if required is None else required
    if not isinstance(specs, dict):
        raise R3Error(f"the properties of tool {tool.get('name')!r} must be an object")
    if not isinstance(required, list | tuple | None):
        what = f"`required` of tool {tool.get('name')!r}"
        raise R3Error(f"{what} must be a list of names, not {required!r}")
    root = {**tool, **parameters}
    made = {}
    for argument, spec in specs.items():
        declared = type_of(spec, root, set())
        optional = is_optional(spec) if required is None else argument not in required
        made[argument] = Argument(declared, optional, _default(spec, declared))
    return made


def parameters_of(tool: dict) -> dict:
    """Return the parameters of a tool, {} where it declares none; raises R3Error where they are no
    object."""
    parameters = tool.get("parameters")
    if isinstance(parameters, dict):
        return parameters
    if parameters in (None, True, [], ()):
        return {}
    raise R3Error(
        f"the parameters of tool {tool.get('name')!r} must be an object, not {parameters!r:.40}"
    )


def is_schema(tool: dict) -> bool:
    """Whether the parameters of a tool are a JSON Schema; in xlam's form "type" is an argument's
    name like others."""
    parameters = parameters_of(tool)
    if any(isinstance(parameters.get(key), str | list) for key in _KEYWORDS):
        return True
    if {"object", "dict"} & set(map(str, _list(parameters.get("type")))):
        return True
    properties = parameters.get("properties", "")
    is_argument = isinstance(properties, dict) and isinstance(properties.get("type"), str)
    return not isinstance(properties, str) and not is_argument


def _default(spec, declared: Type) -> list:
    """Return the declared default; the text "10" is the integer 10 where no text is allowed."""
    if not isinstance(spec, dict) or "default" not in spec:
        return []
    default = spec["default"]
    if isinstance(default, str) and declared.kinds and str not in declared.kinds:
        try:
            return [json.loads(default)]
        except (ValueError, RecursionError):
            pass  # text all the same
    return [default]


def is_optional(spec) -> bool:
    """Whether an argument in xlam's form may be left out: by its default, or by its type."""
    if isinstance(spec, dict) and "default" in spec:
        return True
    written = spec.get("type") if isinstance(spec, dict) else spec
    if not isinstance(written, str):
        return False
    return "optional" in written.lower() or type(None) in read_type(written).kinds


def type_of(spec, root: dict, followed: set[str]) -> Type:
    """Return the type that `spec` declares: the text of a type, or a JSON Schema with its
    definitions in `root`."""
    if isinstance(spec, str):
        return read_type(spec)
    if not isinstance(spec, dict):
        return Type()
    keys = ("type", "anyOf", "oneOf", "allOf")
    branches = [branch for key in keys for branch in _list(spec.get(key))]
    reference = spec.get("$ref")
    if isinstance(reference, str) and reference not in followed:
        followed.add(reference)  # only once, as definitions may refer to one another
        branches.append(_definition(reference, root))
    made = Type()
    for branch in branches:
        made.add(type_of(branch, root, followed))
    if not made.kinds:
        constant = [spec["const"]] if "const" in spec else []
        made.kinds = set(map(type, [*_list(spec.get("enum")), *constant]))
    if spec.get("nullable") is True:
        made.kinds.add(type(None))
    for item in (*_list(spec.get("items")), *_list(spec.get("prefixItems"))):
        made.add(Type(items=type_of(item, root, followed)))
    return made


def _definition(reference: str, root: dict):
    place = root
    for key in reference.removeprefix("#/").split("/"):
        place = place.get(key) if isinstance(place, dict) else None
    return place


def _list(value) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def read_type(written: str) -> Type:
    """Return the type that `written` names, as `List[int]`, `int or str`, `Optional[float]`."""
    written = written.lower()
    while " of " in written:
        written = "{}[{}]".format(*written.split(" of ", 1))
    stack = [Type()]
    for word, bracket in re.findall(r"(\w+|\])(\[?)", written):
        kind = KINDS.get(word, KINDS.get(word.removesuffix("s")))
        if kind:
            stack[-1].kinds.add(kind)
        if word == "optional" and bracket:
            stack[-1].kinds.add(type(None))
        if bracket:
            inner = stack[-1] if word in ("optional", "union") else Type()
            if kind is list:
                stack[-1].items = inner
            stack.append(inner)
        elif word == "]" and len(stack) > 1:
            stack.pop()
    return Type() if "callable" in written else stack[0]


def json_schema(declared: Type) -> dict:
    """Return `declared` in JSON Schema's words; null is left to what may be left out."""
    known = declared.kinds - {type(None)}
    kinds = [words.split()[0] for kind, words in _WORDS.items() if kind in known]
    if not kinds:
        return {}
    made = {"type": kinds[0] if len(kinds) == 1 else kinds}
    items = json_schema(declared.items) if declared.items else {}
    return {**made, "items": items} if items else made
