"""Calls in Python's syntax, `f(a=1, b=["x"])`, as a model writes them: parsed into a tree, never
evaluated."""

import ast
import math
import re
import warnings

# characters of all Python-style calls in a text; the parser takes a microsecond for each
MAX_LENGTH = 4_000

TOKEN = re.compile(r"""'(?:[^'\\]|\\.)*+'?|"(?:[^"\\]|\\.)*+"?|[()\[\]{}]""", re.DOTALL)
_PART = re.compile(
    r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"|(?<![\w.-])[\w.-]++(?=\s*[=(])"""
    r"|\b(?:true|false|null)\b",
    re.DOTALL,
)
_CONSTANTS = {"true": "True", "false": "False", "null": "None"}


def parse(text: str) -> list[dict]:
    """Return the calls of `text`, one call or a list of them, each {"name", "arguments"}.

    Arguments are named and literal. The constants of JSON are read as well as Python's, and a name
    may be one that Python does not allow ("from", "user-id"). Tuples are lists. Raises ValueError
    for all else.
    """
    names: list[str] = []

    def standard(part: re.Match) -> str:
        if part[0][0] in "'\"":
            return part[0].replace("\n", "\\n").replace("\r", "\\r")
        if part[0] in _CONSTANTS:
            return _CONSTANTS[part[0]]
        names.append(part[0])
        return f"_{len(names) - 1}"

    source = _PART.sub(standard, text.strip())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            tree = ast.parse(source, mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
        return [_call(node, names) for node in nodes]
    except (SyntaxError, TypeError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"not a call in Python's syntax: {error}") from None


def _call(node: ast.expr, names: list[str]) -> dict:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError("not a call with named arguments")
    arguments = {}
    for keyword in node.keywords:
        name = _name(keyword.arg, names)
        if name in arguments:
            raise ValueError(f"{name} is given twice")
        arguments[name] = _json(ast.literal_eval(keyword.value))
    return {"name": _name(node.func.id, names), "arguments": arguments}


def _name(placeholder: str | None, names: list[str]) -> str:
    if placeholder is None or not re.fullmatch(r"_\d+", placeholder):
        raise ValueError("an argument without a name")
    return names[int(placeholder[1:])]


def _json(value):
    """Return a literal as JSON's values are read."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("a key that is no string")
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    is_plain = value is None or isinstance(value, str | int | float)
    if not is_plain or isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value!r:.40} is no JSON value")
    return value
