"""Function-calling problems in one form, read from the paper's data set (APIGen, "xlam") or from BFCL.

The form is xlam's: a tool is {"name", "description", "parameters": {argument: {"type", "description", ...}}}, a
call {"name", "arguments"}. An argument is optional if it has a default or its type says so
("int, optional", "Optional[int]").
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

from ..errors import R3Error
from ..verifiers.function_calling import gold, unwrapped
from ..verifiers.schemas import (
    declared_arguments,
    is_optional,
    is_schema,
    json_schema,
    parameters_of,
    read_type,
    unknown_word,
)

HUB_DATASET = "Salesforce/xlam-function-calling-60k"
GATED_MEND = f"accept the terms at https://huggingface.co/datasets/{HUB_DATASET}, then run `hf auth login`"
BFCL_INSTALL = "pip install --no-deps bfcl-eval==2026.3.23"
BFCL = ("simple_python", "multiple", "parallel", "parallel_multiple")  # categories of Python functions
BFCL += ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
SPLITS = {"train": 0.76, "validation": 0.04, "test": 0.20}  # 80/20 as in the paper; validation is 5% of the 80
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
NUMBERS += " seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million"
MASKED = re.compile(r'"[^"]*"|(?<!\w)\'[^\']*\'(?!\w)|\b(?:' + NUMBERS.replace(" ", "|") + r")\b|\d+(?:[.,:/-]\d+)*")
QUOTED = re.compile(r"""\s*(["'])([^"]*)\1\s*""")
QUOTES = str.maketrans("“”‘’", "\"\"''")


@dataclass(frozen=True)
class FunctionCallingProblem:
    """A query, the candidate tools and the right calls, in xlam's form; `id` is unique in its source and hashed.

    `possible` holds BFCL's accepted values for the lenient rule; `kind` is the category that results are split by.
    """

    id: str
    query: str = field(hash=False)
    tools: tuple[dict, ...] = field(hash=False)
    answers: tuple[dict, ...] = field(hash=False)
    possible: tuple[dict, ...] | None = field(default=None, hash=False)
    kind: str = field(default="", hash=False)


Records = tuple[list[FunctionCallingProblem], list[tuple[str, str]]]  # and the skipped: (id, why)


def skeleton(query: str) -> str:
    """What near-duplicates share: lower case, numbers and quoted strings masked, punctuation and spaces folded."""
    query = query.translate(QUOTES).lower()
    if whole := QUOTED.fullmatch(query):
        query = whole[2]
    return " ".join(re.findall(r"[^\W_]+|#", MASKED.sub(" # ", query)))


def split_of(problem: FunctionCallingProblem) -> str:
    """Assign a problem to a split by the hash of its query's skeleton, so that no near-duplicate crosses."""
    digest = hashlib.sha256(f"function_calling/{skeleton(problem.query)}".encode()).digest()
    place = int.from_bytes(digest[:4]) / 2**32
    return next(split for split, end in zip(SPLITS, accumulate(SPLITS.values())) if place < end)


def check(problem: FunctionCallingProblem) -> str | None:
    """Say what is wrong with a record, or None."""
    tools = {tool["name"]: tool["parameters"] for tool in problem.tools}
    if not (problem.query.strip() and problem.tools and problem.answers):
        return "no query, no tools or no answers"
    if len(tools) < len(problem.tools):
        return "two tools of one name"
    for tool in problem.tools:
        declared_arguments(tool)
        if absent := set(tool.get("required") or ()) - set(tool["parameters"]):
            return f"{tool['name']} requires undeclared {sorted(absent)}"
        odd = [spec["type"] for spec in tool["parameters"].values() if unknown_word(spec.get("type", "any"))]
        if odd:
            return f"{tool['name']} has an argument of unknown type {odd[0]!r}"
    accepted = [call for answer in problem.possible or () for call in answer.items()]
    for name, arguments in accepted or [(call["name"], call["arguments"]) for call in problem.answers]:
        if name not in tools:
            return f"the answer calls {name!r}, which is no tool"
        if absent := set(arguments) - set(tools[name]):
            return f"the answer gives {name} undeclared {sorted(absent)}"
        if accepted and (empty := [argument for argument, values in arguments.items() if not values]):
            return f"no value of {name}'s {empty[0]!r} is acceptable"
    return None


@lru_cache(maxsize=2)
def read(source: str) -> Records:
    """The records of `source`: "bfcl", "hub" (xlam), or a local copy of either; those skipped with the reason."""
    return read_bfcl(source) if is_bfcl(source) else read_xlam(source)


def read_xlam(source: str = "hub") -> Records:
    """The paper's data set from the hub (gated) or a local folder or file: columns query, tools, answers."""
    from datasets import load_dataset

    path = Path(source)
    try:
        if path.is_file():
            kind = path.suffix.lstrip(".").replace("jsonl", "json")
            data = load_dataset(kind, data_files=str(path), split="train")
        else:
            data = load_dataset(HUB_DATASET if source == "hub" else source, split="train")
    except Exception as error:
        mend = GATED_MEND if source == "hub" else "check the path: a folder or a .json, .jsonl or .parquet file"
        raise R3Error(f"cannot read function calling from {source!r} ({type(error).__name__}): {mend}") from error
    if not {"query", "tools", "answers"} <= set(data.column_names):
        raise R3Error(f"{source!r} has columns {data.column_names}: xlam has query, tools and answers")
    return _collect(source, ((f"xlam-{row.get('id', index)}", row) for index, row in enumerate(data)), _xlam)


def _xlam(id: str, row: dict) -> FunctionCallingProblem:
    tools, answers = (json.loads(x) if isinstance(x, str) else x for x in (row["tools"], row["answers"]))
    return FunctionCallingProblem(id, row["query"], tuple(map(_tool, tools)), tuple(gold(answers)), kind="xlam")


def _tool(written: dict) -> dict:
    """A tool in xlam's form, from xlam's, JSON Schema or OpenAI's {"type": "function", "function": ...}."""
    tool = unwrapped(written)
    if is_schema(tool):
        return to_xlam(tool)
    parameters = {name: _spec(spec) for name, spec in parameters_of(tool).items()}
    return {**tool, "parameters": parameters}


def _spec(spec) -> dict:
    """An argument's schema as an object: a bare type is one, and `true` allows anything."""
    return spec if isinstance(spec, dict) else {"type": spec} if isinstance(spec, str) else {}


def read_bfcl(source: str = "bfcl") -> Records:
    """BFCL's single-turn problems of Python functions, from the installed package or a local folder of its data.

    The query is the question's messages, a system message first, joined by blank lines; the answer that is
    printed is the first of the possible ones.
    """
    rows = []
    for category, (questions, possible) in zip(BFCL, bfcl_files(source), strict=True):
        try:
            answers = {row["id"]: row for row in _lines(possible)}
            rows += [(row["id"], {**row, **answers.get(row["id"], {}), "kind": category}) for row in _lines(questions)]
        except OSError as error:
            raise R3Error(f"{error.filename} is missing: take BFCL's data from `{BFCL_INSTALL}`") from error
    return _collect(source, rows, _bfcl)


def bfcl_files(source: str = "bfcl") -> list[tuple[Path, Path]]:
    """BFCL's files of questions and of possible answers, a pair a category."""
    folder = Path(source)
    if source == "bfcl":
        if not (package := find_spec("bfcl_eval")):
            raise R3Error(f"BFCL's data are not installed: run `{BFCL_INSTALL}`")
        folder = Path(package.origin).parent / "data"
    names = [next(iter(folder.glob(f"BFCL_v?_{c}.json")), Path(f"BFCL_v4_{c}.json")).name for c in BFCL]
    return [(folder / name, folder / "possible_answer" / name) for name in names]


def is_bfcl(source: str) -> bool:
    """Whether `source` means BFCL's data: by name, or as a folder of them."""
    return source == "bfcl" or any(Path(source).glob("BFCL_v?_*.json"))


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _bfcl(id: str, row: dict) -> FunctionCallingProblem:
    query = "\n\n".join(message["content"].strip() for turn in row["question"] for message in turn)
    required = {schema["name"]: schema["parameters"]["required"] for schema in row["function"]}
    possible = [{name: _present(a, required.get(name, ())) for name, a in call.items()} for call in row["ground_truth"]]
    tools = tuple(map(to_xlam, row["function"]))
    return FunctionCallingProblem(id, query, tools, tuple(gold(possible)), tuple(possible), row["kind"])


def _present(arguments: dict, required) -> dict:
    """Accepted values without "", which stands for leaving an argument out, where the argument is required."""
    return {a: [v for v in values if v != "" or a not in required] for a, values in arguments.items()}


def _collect(source: str, rows: Iterable[tuple[str, dict]], make: Callable) -> Records:
    """Make the records; log one line about those that are skipped."""
    problems, skipped, known = [], [], set()
    for id, row in rows:
        try:
            problem = make(id, row)
            why = "its id occurs before" if id in known else check(problem)
        except (R3Error, ValueError, TypeError, KeyError, AttributeError) as error:
            why = f"malformed: {type(error).__name__} {error}"
        known.add(id)
        skipped += [(id, why)] if why else []
        problems += [] if why else [problem]
    if skipped:
        some = "; ".join(f"{id}: {why}" for id, why in skipped[:3])
        count = f"{len(skipped)} of {len(skipped) + len(problems)} records skipped"
        logging.getLogger(__name__).warning("%s: %s, e.g. %s", source, count, some)
    return problems, skipped


def to_xlam(schema: dict) -> dict:
    """A function's schema as a tool of xlam's form; `to_schema` gives it back."""
    body = dict(schema["parameters"])
    required = body.pop("required", None) or []
    arguments = {name: _spec(spec) for name, spec in (body.pop("properties", None) or {}).items()}
    body.pop("type", None)
    parameters = {name: spec if name in required else _optional(spec) for name, spec in arguments.items()}
    tool = {**body, **schema, "parameters": parameters}
    return tool if required == _required(tool) else {**tool, "required": required}


def _optional(spec: dict) -> dict:
    written = spec.get("type")
    return {**spec, "type": f"{written}, optional"} if isinstance(written, str) else spec


def to_schema(tool: dict) -> dict:
    """The inverse of `to_xlam`, in BFCL's words for types ("dict", "float" ...)."""
    extra = {key: value for key, value in tool.items() if key not in ("name", "description", "parameters", "required")}
    arguments = {name: _without_optional(spec) for name, spec in tool["parameters"].items()}
    body = {"type": "dict", "properties": arguments, "required": tool.get("required", _required(tool)), **extra}
    return {"name": tool["name"], "description": tool.get("description", ""), "parameters": body}


def _without_optional(spec: dict) -> dict:
    written = spec.get("type")
    return {**spec, "type": written.removesuffix(", optional")} if isinstance(written, str) else spec


def _required(tool: dict) -> list[str]:
    return [name for name, spec in tool["parameters"].items() if not is_optional(spec)]


def function_tool(tool: dict) -> dict:
    """A tool as chat templates take it: {"type": "function", "function": its schema in JSON Schema's types}."""
    schema = to_schema(tool)
    return {"type": "function", "function": {**schema, "parameters": _json_types(schema["parameters"])}}


def _json_types(schema):
    """A schema with its types in JSON Schema's words, throughout."""
    if not isinstance(schema, dict):
        return {}
    written = schema.get("type")
    if isinstance(written, str):
        schema = json_schema(read_type(written)) | {key: part for key, part in schema.items() if key != "type"}
    if isinstance(schema.get("properties"), dict):
        schema = schema | {"properties": {name: _json_types(part) for name, part in schema["properties"].items()}}
    if isinstance(schema.get("items"), dict):
        schema = schema | {"items": _json_types(schema["items"])}
    return schema
