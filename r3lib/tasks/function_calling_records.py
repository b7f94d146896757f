"""Function-calling problems in one form, read from the paper's data set (APIGen, "xlam") or BFCL.

The form is xlam's: a tool is {"name", "description", "parameters": {argument: {"type",
"description", ...}}}, a call {"name", "arguments"}. An argument is optional if it has a default or
its type says so ("int, optional", "Optional[int]").
"""

import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from ..errors import R3Error
from ..verifiers.function_calling import gold, loaded, unwrapped
from ..verifiers.schemas import is_optional, is_schema, json_schema, parameters_of, read_type
from .sources import load_table, split_by_hash

HUB_DATASET = "Salesforce/xlam-function-calling-60k"
HUB_FIX = (
    f"accept the terms at https://huggingface.co/datasets/{HUB_DATASET}, then run `hf auth login`"
)
PATH_FIX = "check the path: a folder or a .json, .jsonl or .parquet file"
BFCL_INSTALL = "pip install --no-deps bfcl-eval==2026.3.23"
# categories of Python functions
BFCL = ("simple_python", "multiple", "parallel", "parallel_multiple")
BFCL += ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
# 80/20 as in the paper; validation is 5% of the 80
SPLITS = {"train": 0.76, "validation": 0.04, "test": 0.20}
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
hundred thousand million""".split()
MASKED = re.compile(
    rf""""[^"]*"|(?<!\w)'[^']*'(?!\w)|\b(?:{"|".join(NUMBERS)})\b|\d+(?:[.,:/-]\d+)*"""
)
QUOTED = re.compile(r"""\s*(["'])([^"]*)\1\s*""")
QUOTES = str.maketrans("“”‘’", "\"\"''")


@dataclass(frozen=True)
class FunctionCallingProblem:
    """A query, the candidate tools and the right calls, in xlam's form; `id` is unique and hashed.

    `possible` holds BFCL's accepted values for the lenient rule; `kind` is the category that
    results are split by.
    """

    id: str
    query: str = field(hash=False)
    tools: tuple[dict, ...] = field(hash=False)
    answers: tuple[dict, ...] = field(hash=False)
    possible: tuple[dict, ...] | None = field(default=None, hash=False)
    kind: str = field(default="", hash=False)


Records = tuple[list[FunctionCallingProblem], list[tuple[str, str]]]  # and the skipped: (id, why)


def skeleton(query: str) -> str:
    """What near-duplicates share: lower case, numbers and quotations masked, only words left."""
    query = query.translate(QUOTES).lower()
    whole = QUOTED.fullmatch(query)
    if whole:
        query = whole[2]
    return " ".join(re.findall(r"[^\W_]+|#", MASKED.sub(" # ", query)))


def split_of(problem: FunctionCallingProblem) -> str:
    """Assign a problem to a split by its query's skeleton, so that no near-duplicate crosses."""
    return split_by_hash(f"function_calling/{skeleton(problem.query)}", SPLITS)


def check(problem: FunctionCallingProblem) -> str | None:
    """Say what is wrong with a record, or None."""
    if not (problem.query.strip() and problem.tools and problem.answers):
        return "no query, no tools or no answers"
    if len({tool["name"] for tool in problem.tools}) < len(problem.tools):
        return "two tools of one name"
    declared = {tool["name"]: set(tool["parameters"]) for tool in problem.tools}
    plain = [(call["name"], call["arguments"]) for call in problem.answers]
    accepted = [call for answer in problem.possible or () for call in answer.items()]
    for name, arguments in accepted or plain:
        if name not in declared:
            return f"the answer calls {name!r}, which is no tool"
        absent = set(arguments) - declared[name]
        if absent:
            return f"the answer gives {name} undeclared {sorted(absent)}"
        for argument, values in arguments.items():
            if accepted and not values:
                return f"no value of {name}'s {argument!r} is acceptable"
    return None


@lru_cache(maxsize=2)
def read(source: str) -> Records:
    """The records of `source`, and those skipped with the reason.

    `source` is "bfcl", "hub" (xlam), or a local copy of either.
    """
    return read_bfcl(source) if is_bfcl(source) else read_xlam(source)


def read_xlam(source: str = "hub") -> Records:
    """The paper's data set from the hub (gated) or a local folder or file.

    Raises R3Error where it cannot be read or lacks one of the columns query, tools, answers.
    """
    fix = HUB_FIX if source == "hub" else PATH_FIX
    data = load_table(source, HUB_DATASET, "function calling", fix)
    if not {"query", "tools", "answers"} <= set(data.column_names):
        columns = f"{source!r} has columns {data.column_names}"
        raise R3Error(f"{columns}: xlam has query, tools and answers")
    rows = ((f"xlam-{row.get('id', index)}", row) for index, row in enumerate(data))
    return _collect(source, rows, _xlam)


def _xlam(id: str, row: dict) -> FunctionCallingProblem:
    tools = tuple(map(_tool, loaded(row["tools"], "tools")))
    answers = tuple(gold(row["answers"]))
    return FunctionCallingProblem(id, row["query"], tools, answers, kind="xlam")


def _tool(written: dict) -> dict:
    """A tool in xlam's form, from xlam's, JSON Schema or OpenAI's."""
    tool = unwrapped(written)
    if is_schema(tool):
        return to_xlam(tool)
    parameters = {name: _spec(spec) for name, spec in parameters_of(tool).items()}
    return {**tool, "parameters": parameters}


def _spec(spec) -> dict:
    """An argument's schema as an object: a bare type is one, and `true` allows anything."""
    if isinstance(spec, str):
        return {"type": spec}
    return spec if isinstance(spec, dict) else {}


def read_bfcl(source: str = "bfcl") -> Records:
    """BFCL's single-turn problems of Python functions, from its package or a folder of its data.

    The query is the question's messages, a system message first, joined by blank lines; the answer
    that is printed is the first of the possible ones.
    """
    rows = []
    for category, (questions, possible) in zip(BFCL, bfcl_files(source), strict=True):
        try:
            answers = {row["id"]: row for row in _lines(possible)}
            for row in _lines(questions):
                rows.append((row["id"], row | answers.get(row["id"], {}) | {"kind": category}))
        except OSError as error:
            fix = f"take BFCL's data from `{BFCL_INSTALL}`"
            raise R3Error(f"{error.filename} is missing: {fix}") from error
        except ValueError as error:
            fix = f"install it again with `{BFCL_INSTALL}`"
            raise R3Error(f"{questions} or its answers are damaged ({error}): {fix}") from error
    return _collect(source, rows, _bfcl)


def bfcl_files(source: str = "bfcl") -> list[tuple[Path, Path]]:
    """BFCL's files of questions and of possible answers, a pair a category."""
    folder = Path(source)
    if source == "bfcl":
        package = find_spec("bfcl_eval")
        if not package:
            raise R3Error(f"BFCL's data are not installed: run `{BFCL_INSTALL}`")
        folder = Path(package.origin).parent / "data"
    pairs = []
    for category in BFCL:
        found = next(folder.glob(f"BFCL_v?_{category}.json"), Path(f"BFCL_v4_{category}.json"))
        pairs.append((folder / found.name, folder / "possible_answer" / found.name))
    return pairs


def is_bfcl(source: str) -> bool:
    """Whether `source` means BFCL's data: by name, or as a folder of them."""
    return source == "bfcl" or any(Path(source).glob("BFCL_v?_*.json"))


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def _bfcl(id: str, row: dict) -> FunctionCallingProblem:
    messages = [message["content"].strip() for turn in row["question"] for message in turn]
    required = {schema["name"]: schema["parameters"]["required"] for schema in row["function"]}
    possible = [
        {name: _present(arguments, required.get(name, ())) for name, arguments in call.items()}
        for call in row["ground_truth"]
    ]
    tools = tuple(map(to_xlam, row["function"]))
    answers = tuple(gold(possible))
    query = "\n\n".join(messages)
    return FunctionCallingProblem(id, query, tools, answers, tuple(possible), row["kind"])


def _present(arguments: dict, required) -> dict:
    """Accepted values without "", which stands for leaving out, where the argument is required."""
    return {
        name: [value for value in values if value != "" or name not in required]
        for name, values in arguments.items()
    }


def _collect(source: str, rows: Iterable[tuple[str, dict]], make: Callable) -> Records:
    """Make the records; log one line about those that are skipped."""
    problems, skipped = [], []
    for id, row in rows:
        try:
            problem = make(id, row)
            why = check(problem)
        except (R3Error, ValueError, TypeError, KeyError, AttributeError) as error:
            why = f"malformed: {type(error).__name__} {error}"
        if why:
            skipped.append((id, why))
        else:
            problems.append(problem)
    if skipped:
        some = "; ".join(f"{id}: {why}" for id, why in skipped[:3])
        count = f"{len(skipped)} of {len(skipped) + len(problems)} records skipped"
        logging.getLogger(__name__).warning("%s: %s, e.g. %s", source, count, some)
    return problems, skipped


def to_xlam(schema: dict) -> dict:
    """A function's schema as a tool of xlam's form; `to_schema` gives it back."""
    body = dict(schema["parameters"])
    required = body.pop("required", None) or []
    arguments = body.pop("properties", None) or {}
    body.pop("type", None)
    parameters = {name: _spec(spec) for name, spec in arguments.items()}
    for name, spec in parameters.items():
        if name not in required and isinstance(spec.get("type"), str):
            parameters[name] = {**spec, "type": f"{spec['type']}, optional"}
    tool = {**body, **schema, "parameters": parameters}
    return tool if required == _required(tool) else {**tool, "required": required}


def to_schema(tool: dict) -> dict:
    """The inverse of `to_xlam`, in BFCL's words for types ("dict", "float" ...)."""
    arguments = {name: _without_optional(spec) for name, spec in tool["parameters"].items()}
    required = tool.get("required", _required(tool))
    own = ("name", "description", "parameters", "required")
    extra = {key: value for key, value in tool.items() if key not in own}
    body = {"type": "dict", "properties": arguments, "required": required, **extra}
    return {"name": tool["name"], "description": tool.get("description", ""), "parameters": body}


def _without_optional(spec: dict) -> dict:
    written = spec.get("type")
    if not isinstance(written, str):
        return spec
    return {**spec, "type": written.removesuffix(", optional")}


def _required(tool: dict) -> list[str]:
    return [name for name, spec in tool["parameters"].items() if not is_optional(spec)]


def function_tool(tool: dict) -> dict:
    """A tool as chat templates take it, {"type": "function", "function": its JSON Schema}."""
    schema = to_schema(tool)
    schema["parameters"] = _json_types(schema["parameters"])
    return {"type": "function", "function": schema}


def _json_types(schema) -> dict:
    """A schema with its types in JSON Schema's words, throughout."""
    if not isinstance(schema, dict):
        return {}
    made = dict(schema)
    written = made.get("type")
    if isinstance(written, str):
        del made["type"]
        made = json_schema(read_type(written)) | made
    if isinstance(made.get("properties"), dict):
        made["properties"] = {name: _json_types(x) for name, x in made["properties"].items()}
    if isinstance(made.get("items"), dict):
        made["items"] = _json_types(made["items"])
    return made
