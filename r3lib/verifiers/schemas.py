r"""The arguments that a tool declares: their types, defaults, and which may be left out.

| form | example of `parameters` |
|---|---|
| xlam | `{"days": {"type": "int, optional", "default": 1}}`, also with the bare type `{"days": "int"}` |
| JSON Schema | `{"type": "object", "properties": {"days": {"type": "integer"}}, "required": []}` |

`parameters` is a JSON Schema if its type is or includes "object" or "dict", or if it has
"properties" or another keyword of JSON Schema. `None`, `True` and `[]` declare no arguments.

One reading of types holds for prompts, verifiers and records:

| written | values | may be left out |
|---|---|---|
| `int`, `integer`, `long` (any case, also `typing.X`, `np.X`) | integer | no |
| `List[int]`, `list of int`, `{"type": "array", "items": ...}` | a list of integers | no |
| `int or str`, `int \| str`, `Union[int, str]`, `["integer", "string"]`, `anyOf`, `oneOf` | either | no |
| `Optional[int]`, `int \| None`, `int or null`, `Union[int, None]` | integer or null | yes |
| `int, optional`, a default, not among `required` | integer | yes |
| no type, `Any`, `Callable[...]`, `true`, an unknown `$ref` | anything | no |

`enum` and `const` give the types of their values where there is no type; nothing else of a schema
is checked.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import R3Error

MAX_DEPTH = 50  # of nested schemas; what is deeper may be anything
JSON_TYPES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
}
_WORDS = {
    str: "str string text char date datetime",
    int: "int integer long",
    float: "float number double decimal complex",
    bool: "bool boolean",
    list: "list array tuple set sequence iterable ndarray",
    dict: "dict object map mapping hashmap json",
    type(None): "none null",
}
KINDS = {word: kind for kind, words in _WORDS.items() for word in words.split()}
ANY = ("any", "union", "callable")
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
    parameters, name = parameters_of(tool), tool.get("name")
    if is_schema(tool):
        specs, required = parameters.get("properties") or {}, parameters.get("required")
        required = () if required is None else required
    else:
        specs, required = parameters, tool.get("required")
    if not isinstance(specs, dict):
        raise R3Error(f"the properties of tool {name!r} must be an object")
    if not isinstance(required, list | tuple | None):
        raise R3Error(f"`required` of tool {name!r} must be a list of names, not {required!r}")
    root = {**tool, **parameters}
    return {name: _argument(name, spec, required, root) for name, spec in specs.items()}


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


def _argument(name: str, spec, required: Iterable | None, root: dict) -> Argument:
    declared = type_of(spec, root)
    optional = is_optional(spec) if required is None else name not in required
    return Argument(declared, optional, _default(spec, declared))


def _default(spec, declared: Type) -> list:
    """Return the declared default; the text "10" is the integer 10 where only an integer is
    allowed."""
    if not isinstance(spec, dict) or "default" not in spec:
        return []
    default = spec["default"]
    if isinstance(default, str) and declared.kinds and str not in declared.kinds:
        try:
            return [json.loads(default)]
        except (ValueError, RecursionError):
            return [default]
    return [default]


def is_optional(spec) -> bool:
    """Whether an argument in xlam's form may be left out: by its default, or by its type."""
    if isinstance(spec, dict) and "default" in spec:
        return True
    written = spec.get("type") if isinstance(spec, dict) else spec
    return isinstance(written, str) and (
        "optional" in written.lower() or type(None) in read_type(written).kinds
    )


def type_of(spec, root: dict) -> Type:
    """Return the type that `spec` declares: the text of a type, or a JSON Schema with its
    definitions in `root`."""
    return _schema_type(spec, root, set(), 0)


def _schema_type(spec, root: dict, followed: set[str], depth: int) -> Type:
    if isinstance(spec, str):
        return read_type(spec)
    if not isinstance(spec, dict) or depth > MAX_DEPTH:
        return Type()

    def inner(part) -> Type:
        return _schema_type(part, root, followed, depth + 1)

    made = Type()
    branches = [
        branch for key in ("type", "anyOf", "oneOf", "allOf") for branch in _list(spec.get(key))
    ]
    reference = spec.get("$ref")
    if isinstance(reference, str) and reference not in followed:
        followed.add(reference)  # only once, as definitions may refer to one another
        branches.append(_definition(reference, root))
    for branch in branches:
        made.add(inner(branch))
    if not made.kinds:
        made.kinds = set(
            map(type, [*_list(spec.get("enum")), *([spec["const"]] if "const" in spec else [])])
        )
    if spec.get("nullable") is True:
        made.kinds.add(type(None))
    for item in (*_list(spec.get("items")), *_list(spec.get("prefixItems"))):
        made.add(Type(items=inner(item)))
    return made


def _definition(reference: str, root: dict):
    place = root
    for key in reference.removeprefix("#/").split("/"):
        place = place.get(key) if isinstance(place, dict) else None
    return place


def _list(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


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


def unknown_word(written) -> bool:
    """Whether the text of a type names no type that is known; other forms of a type are legal as
    they are."""
    if not isinstance(written, str):
        return False
    words = [
        word
        for word in re.findall("[a-z]+", written.lower())
        if word not in ("typing", "optional", "np")
    ]
    return not words or words[0] not in KINDS and words[0] not in ANY


def json_schema(declared: Type) -> dict:
    """Return `declared` in JSON Schema's words; null is left to what may be left out."""
    kinds = [name for kind, name in JSON_TYPES.items() if kind in declared.kinds]
    if not kinds:
        return {}
    made = {"type": kinds[0] if len(kinds) == 1 else kinds}
    items = json_schema(declared.items) if declared.items else {}
    return {**made, "items": items} if items else made
