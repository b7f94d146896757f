"""The function-calling task: name the right tools with the right arguments."""

import json
from pathlib import Path
from random import Random

from ..errors import R3Error
from ..verifiers import function_calling as verifier
from ..verifiers.verdict import Verdict
from . import function_calling_records as records
from .base import Task
from .function_calling_records import FunctionCallingProblem
from .function_calling_tools import PARTS, draw
from .sources import GENERATED, check_request, draw_distinct, too_few
from .styles import style_of

HARD = 0.5  # chance that an amount takes several steps
# the paper's Table 4
CATEGORIES = {reason: "parameter choice" for reason in verifier.REASONS if reason != "ok"}
CATEGORIES |= {"no_call": "format", "invalid_json": "format"}
CATEGORIES |= {"wrong_function": "tool choice", "wrong_call_count": "tool choice"}


class FunctionCallingTask(Task):
    """Function calling as the paper has it (its Table 1): generated problems, APIGen or BFCL.

    `source` is "generator", "hub" (the paper's `Salesforce/xlam-function-calling-60k`, gated),
    "bfcl" (from the package bfcl-eval) or a local copy of either. `rule` is the verifier's:
    "strict", or "lenient", which takes every answer that BFCL lists as possible. For the generator,
    `parts` gives the shares of what is new in a test problem, and `hard` is the chance that an
    amount takes several steps.
    """

    name = "function_calling"
    reflection_prompt = (
        "You tried performing the task, but failed in generating the correct tool call. Reflect on "
        "what went wrong and write a short explanation that will help you do better next time."
    )
    reasons = tuple(CATEGORIES)
    categories = CATEGORIES

    def __init__(self, source="generator", rule="strict", parts=PARTS, hard=HARD):
        if rule not in verifier.RULES:
            raise R3Error(f"unknown rule {rule!r}: use {' or '.join(verifier.RULES)}")
        if not 0 <= hard <= 1:
            raise R3Error(f"function_calling option hard={hard!r}: it is a chance, from 0 to 1")
        self.source = str(source)
        self.rule = rule
        self.parts = dict(parts)
        self.hard = hard
        for part in self.parts:
            if part not in PARTS:
                raise R3Error(f"function_calling option parts: unknown {part!r}: use {[*PARTS]}")
        if not min(self.parts.values()) >= 0 < sum(self.parts.values()):
            raise R3Error(f"function_calling option parts={self.parts}: give shares, 0 or more")

    def messages(self, problem: FunctionCallingProblem) -> list[dict]:
        """The plain form, for models whose chat template has no place for tools."""
        return [{"role": "user", "content": self.plain(problem)}]

    def question(self, problem: FunctionCallingProblem) -> str:
        """The query: the tools stand in the conversation already."""
        return problem.query

    def plain(self, problem: FunctionCallingProblem) -> str:
        """Tools (without empty descriptions), query and the form of the answer."""
        shown = json.dumps([_without_blanks(tool) for tool in problem.tools], ensure_ascii=False)
        return f"Tools: {shown}\nQuery: {problem.query}\nAnswer with a JSON list of calls."

    def tools(self, problem: FunctionCallingProblem) -> list[dict]:
        """The tools as JSON Schema functions."""
        return [records.function_tool(tool) for tool in problem.tools]

    def bare_messages(self, problem: FunctionCallingProblem) -> list[dict]:
        """The query alone."""
        return [{"role": "user", "content": problem.query}]

    def verify(self, text: str, problem: FunctionCallingProblem) -> Verdict:
        """See `r3lib.verifiers.function_calling.verify`."""
        answers = problem.answers
        if self.rule == "lenient" and problem.possible:
            answers = problem.possible
        return verifier.verify(text, list(problem.tools), list(answers), self.rule)

    def style(self, reflection: str) -> str:
        """See `r3lib.tasks.styles`."""
        return style_of(reflection, "function_calling")

    def part(self, problem_id: str) -> str:
        """What a generated test problem has new: "combinations" of tools, "phrasings", "tools"."""
        return problem_id.partition("-")[0] if self.source == "generator" else ""

    def files(self) -> list[Path]:
        """BFCL's files, or the local copy that `source` names."""
        if records.is_bfcl(self.source):
            return [path for pair in records.bfcl_files(self.source) for path in pair]
        path = Path(self.source)
        return [path] if path.exists() else []

    def problems(self, split: str, n: int, seed: int) -> list[FunctionCallingProblem]:
        """Return `n` distinct problems; raises R3Error when the source has fewer in that split."""
        is_generated = self.source == "generator"
        check_request(split, n, GENERATED if is_generated else records.SPLITS)
        return self._generate(split, n, seed) if is_generated else self._read(split, n, seed)

    def _generate(self, split: str, n: int, seed: int) -> list[FunctionCallingProblem]:
        shares = self.parts if split == "test" else {"combinations": 1.0}

        def drawn(index: int) -> FunctionCallingProblem:
            random = Random(f"{seed}/{index}")
            part = random.choices(list(shares), shares.values())[0]
            return draw(random, split, part, self.hard).problem

        return draw_distinct(drawn, n, f"function_calling {split}")

    def _read(self, split: str, n: int, seed: int) -> list[FunctionCallingProblem]:
        rows = [p for p in records.read(self.source)[0] if records.split_of(p) == split]
        if len(rows) < n:
            raise too_few(f"{self.source} has {len(rows)} {split} problems", n)
        return Random(f"{seed}").sample(rows, len(rows))[:n]


def _without_blanks(value):
    """Return `value` without the empty strings inside its dicts."""
    if isinstance(value, dict):
        return {key: _without_blanks(inner) for key, inner in value.items() if inner != ""}
    return value
