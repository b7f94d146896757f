"""What decides a verdict is in the facts of a task, wherever it stands and however it was typed."""

import functools
import json
import random
import re
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest

from r3lib.errors import R3Error
from r3lib.identity import check_claim, content, task_facts
from r3lib.tasks import Task
from r3lib.tasks.dataset import DatasetTask

CELL = """
import functools, re
from dataclasses import dataclass
from enum import Enum
from r3lib import Task
from r3lib.tasks.dataset import DatasetTask

class Mine(Task):
    name, reflection_prompt = "mine", "Reflect."
    def verify(self, text, problem):
        return text.strip() == "7"

def near(text, row, within=0.1, *, above=0):
    return abs(float(text) - row["gold"]) < within

class Near:
    def __init__(self, within):
        self.within = within
    def __call__(self, text, row):
        return near(text, row, self.within)
"""
EDITS = [  # an end of a cell that makes `task`, and what is edited in it
    ("task = Mine()", 'strip() == "7"', 'strip() == "8"'),
    ("task = DatasetTask([], near)", "within=0.1", "within=0.2"),
    ("task = DatasetTask([], near)", "above=0", "above=1"),
    ("task = DatasetTask([], Near(0.1))", "Near(0.1)", "Near(0.2)"),
    ("task = DatasetTask([], Near(0.1))", ") < within", ") <= within"),
    ("task = DatasetTask([], Near(0.1).__call__)", "Near(0.1)", "Near(0.2)"),
    ("task = DatasetTask([], functools.partial(near, within=0.1))", "near, within=0.1", "near, within=0.2"),
    ("task = DatasetTask([], functools.cache(near))", ") < within", ") <= within"),
    ("task = DatasetTask([], [near][0])", "abs(", "abs(1 + "),
    ("task = DatasetTask([], lambda text, row: near(text, row))", ") < within", ") <= within"),
    ("LIMIT = 3\ntask = DatasetTask([], lambda text, row: len(text) < LIMIT)", "LIMIT = 3", "LIMIT = 4"),
    ("def of(gold): return lambda text, row: text == gold\ntask = DatasetTask([], of('7'))", "'7'", "'8'"),
    ("CHECKS = {'near': near}\ntask = DatasetTask([], lambda text, row: CHECKS['near'](text, row))", "abs(", "+("),
    ("RULES = {near: {near, abs}}\ntask = DatasetTask([], lambda text, row: RULES)", ") < within", ") <= within"),
    ("class A(Enum):\n    B = 1\ntask = DatasetTask([], lambda text, row: A.B.value == text)", "B = 1", "B = 2"),
    ("@dataclass\nclass D:\n    n: int = 1\ntask = DatasetTask([], lambda text, row: D().n)", "int = 1", "int = 2"),
    ("def _one(): return 1\ntask = DatasetTask([], lambda text, row: _one())", "return 1", "return 2"),
    ("class P(Mine):\n    number = re.compile('[0-9]+')\ntask = P()", "[0-9]+", "[1-9]+"),
    ("class P(Mine):\n    words = {'a', 'b'}\ntask = P()", "'b'", "'c'"),
    ("class P(Mine):\n    _within = 0.1\ntask = P()", "_within = 0.1", "_within = 0.2"),
    ("class P(Mine):\n    def __init__(self):\n        self._units = ('s', 'h')\ntask = P()", "'h'", "'m'"),
    ("class P(Mine):\n    def __init__(self):\n        self._near = Near(0.1)\ntask = P()", "Near(0.1)", "Near(0.2)"),
    ("class P(Mine):\n    @functools.cached_property\n    def _a(self): return 7\ntask = P()", "return 7", "return 8"),
    ("class P(Mine):\n    @classmethod\n    def _gold(cls): return 7\ntask = P()", "return 7", "return 8"),
    ("class P(Mine):\n    __slots__ = ('_b',)\n    def __init__(self): self._b = 1\ntask = P()", "b = 1", "b = 2"),
    ("class P(Mine):\n    __slots__ = ('b',)\n    def __init__(self, b): self.b = b\ntask = P(1)", "P(1)", "P(2)"),
    ("_near = functools.cache(near)\ntask = DatasetTask([], lambda text, row: _near(text, row))", "abs(", "+("),
    ("task = DatasetTask([], lambda text, row: text in {'a', 'b', 'c'})", "'c'", "'d'"),
    ("def f(n): return n and g(n)\ndef g(n): return f(n - 1)\ntask = DatasetTask([], f)", "n - 1", "n - 2"),
    ("task = DatasetTask([{'prompt': 'a', 'gold': 7}], near)", "'gold': 7", "'gold': 8"),
    ("class P(Mine):\n    @property\n    def gold(self): return 7\ntask = P()", "return 7", "return 8"),
    ("class P(Mine):\n    @staticmethod\n    def gold(): return 7\ntask = P()", "return 7", "return 8"),
]  # fmt: skip


def facts_of(cell):
    """The facts of the `task` of a cell that was typed in a notebook: it has no file."""
    space = {"__name__": "__main__"}
    exec(cell, space)
    return task_facts(space["task"])


@pytest.mark.parametrize(("end", "old", "new"), EDITS)
def test_what_decides_a_verdict_is_told_apart_and_typed_again_it_is_the_same(end, old, new):
    cell = CELL + end
    assert cell.count(old) == 1
    assert facts_of(cell) == facts_of(cell)
    assert facts_of(cell) != facts_of(cell.replace(old, new))


def test_facts_are_the_same_in_every_process():
    """Sets have another order there, objects another address."""
    ends = [CELL + end for end, _, _ in EDITS] + [Path(__file__).read_text() + "\ntask = Everything()"]
    code = f"import json; from test_identity import facts_of; print(json.dumps([*map(facts_of, {ends!r})]))"
    here = Path(__file__).parent
    run = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(here.parent)},
        ).stdout
        for seed in "12"
    ]  # fmt: skip
    assert run[0] == run[1] == json.dumps([facts_of(end) for end in ends]) + "\n"


class Color(Enum):
    RED = "red"


@dataclass(frozen=True, order=True)
class Example:
    id: str
    words: list = field(default_factory=list)


_seen = []


def near(text):
    return text in {"a", "b"} or RULES


RULES = {near, len, str.upper}


def counted(text):
    _seen.append(text)
    return counted(text[1:]) if text else Example("p") and Color.RED


class Everything(Task):
    """Circles, sets, objects, caches of every kind."""

    name, reflection_prompt = "everything", "Reflect."
    words = frozenset({"a", "b", "c"})

    def __init__(self):
        self.colors = {Color.RED: {"x", "y"}}
        self.example = Example("p", ["w"])
        self.me = self
        self._cache, self._last, self._random = {}, None, random.Random(0)

    def verify(self, text, problem):
        self._cache[text] = self._last = counted(text)
        return self.table[text] or {counted, text, b"a", ...} & RULES

    @functools.cached_property
    def table(self):
        return {"a": 1}


def test_caches_that_a_run_fills_change_no_fact():
    used = Everything()
    used.verify("a", None)
    assert used.table and used._cache and _seen
    assert task_facts(used) == task_facts(Everything())


def test_a_verifiers_cache_and_a_variable_of_the_notebook_change_no_fact():
    """`text` is a name in the notebook, and what the verifier's rows call one of their values."""
    end = """
_seen = []
text = 1
class Caching:
    def __init__(self):
        self._cache, self._rule = {}, None
    def __call__(self, text, row):
        self._rule = self._rule or re.compile("7")
        self._cache[text] = row.text
        _seen.append(text)
task = DatasetTask([], Caching())
"""
    use = """
task.verifier("7", type("Row", (), {"text": ""}))
text = 2
"""
    assert facts_of(CELL + end) == facts_of(CELL + end + use)


def test_what_serves_tables_and_figures_alone_is_no_fact():
    cell = CELL + "class P(Mine):\n    reasons = ('a',)\n    def style(self, text): return 'a'\ntask = P()"
    assert facts_of(cell) == facts_of(cell.replace("'a'", "'b'"))


def test_a_comment_and_what_else_is_imported_change_nothing():
    cell = """import r3lib
from r3lib.tasks.dataset import DatasetTask
def f(text, row):
    return r3lib.Verdict(True)
task = DatasetTask([], f)"""
    before = facts_of(cell)
    import r3lib.stats  # noqa: F401

    assert facts_of("# a comment\n" + cell.replace("    return", "    # why\n    return")) == before


def test_an_object_that_nothing_tells_from_another_is_refused_with_the_fix():
    with pytest.raises(R3Error, match=r"task.verifier cannot be told apart .*plain function"):
        task_facts(DatasetTask([], functools.partial(print, re.finditer("a", "a"))))


@dataclass(frozen=True, slots=True)
class Slotted:
    id: str
    gold: str


@pytest.mark.parametrize("kind", [Slotted, namedtuple("Named", ["id", "gold"])])
def test_a_gold_answer_counts_in_problems_of_any_kind(kind):
    assert content(kind("p", "8")) == {"id": "p", "gold": "8"}


def test_a_damaged_note_is_named_with_its_remedy(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": 0, "mod')
    with pytest.raises(R3Error, match="holds shards: run.json, which says of which, is damaged: delete them"):
        check_claim(tmp_path / "run.json", {"seed": 0}, "shards", "delete them")
