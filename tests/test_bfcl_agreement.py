"""BFCL: gold is right in every syntax, and the lenient rule agrees with BFCL's own checker."""

import copy
import random
import runpy
import sys
import types
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from r3lib.tasks import function_calling_records as records
from r3lib.verifiers.function_calling import RULES, verify

SYNTAXES = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "call_syntaxes.py"))[
    "SYNTAXES"
]
SIZES = [50, pytest.param(None, marks=pytest.mark.slow)]  # a sample, and all of BFCL

pytestmark = pytest.mark.skipif(not find_spec("bfcl_eval"), reason=f"run {records.BFCL_INSTALL}")


def sampled(n):
    problems = records.read("bfcl")[0]
    return problems if n is None else random.Random(0).sample(problems, n)


@pytest.mark.parametrize("n", SIZES)
def test_gold_is_right_in_every_syntax_under_both_rules(n):
    assert len(SYNTAXES) >= 24
    wrong = []
    for problem in sampled(n):
        calls = list(problem.answers)
        golds = {"strict": calls, "lenient": list(problem.possible)}
        for name, syntax in SYNTAXES.items():
            text = syntax.render(calls) if syntax.many or len(calls) == 1 else None
            for rule in RULES if text else ():
                verdict = verify(text, list(problem.tools), golds[rule], rule)
                wrong += [] if verdict.ok else [(problem.id, name, rule, verdict.reason)]
    assert wrong == []


@pytest.fixture(scope="module")
def checker():
    """BFCL's own checker; what it imports of the clients of model providers is left out."""
    name = "bfcl_eval.constants.model_config"
    stub = types.ModuleType(name)
    stub.MODEL_CONFIG_MAPPING = defaultdict(lambda: types.SimpleNamespace(underscore_to_dot=False))
    before = sys.modules.get(name)
    sys.modules[name] = stub
    try:
        from bfcl_eval.constants.enums import Language
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
    except ImportError as error:
        pytest.skip(f"BFCL's checker needs more than is installed: {error}")
    finally:
        sys.modules.pop(name) if before is None else sys.modules.update({name: before})

    def check(problem, calls):
        functions = [records.to_schema(tool) for tool in problem.tools]
        made = [{call["name"]: call["arguments"]} for call in calls]
        return ast_checker(
            functions, made, list(problem.possible), Language.PYTHON, problem.kind, "any"
        )["valid"]

    return check


def mutated(problem, rng):
    """The gold calls with one change, often one that the lenient rule allows."""
    calls = copy.deepcopy(list(problem.answers))
    index = rng.randrange(len(calls))
    call, accepted = calls[index], next(iter(problem.possible[index].values()))
    arguments = call["arguments"]
    arg = rng.choice(sorted(accepted)) if accepted else None
    kind = rng.choice(("none", "name", "count", "extra", "drop", "other", "case", "type", "number"))
    if kind == "name":
        call["name"] += "_2"
    elif kind == "count":
        calls.append(copy.deepcopy(call))
    elif kind == "extra":
        arguments["zzz"] = 1
    elif kind == "drop" and arg:
        arguments.pop(arg, None)
    elif kind == "other" and arg:
        plain = [
            value for value in accepted[arg] if value != "" and not isinstance(value, dict | list)
        ]
        arguments.update({arg: rng.choice(plain)} if plain else {})
    elif kind == "case" and isinstance(arguments.get(arg), str):
        arguments[arg] = arguments[arg].upper() + rng.choice(("", ".", " ", "x"))
    elif kind == "type" and arg:
        arguments[arg] = rng.choice((7, "7", 1.5, True, ["7"], {"k": 7}))
    elif kind == "number" and isinstance(arguments.get(arg), int | float):
        arguments[arg] = float(arguments[arg]) + rng.choice((0, 1))
    return calls


@pytest.mark.parametrize("n, times", [(400, 2), pytest.param(None, 10, marks=pytest.mark.slow)])
def test_lenient_agrees_with_bfcls_own_checker(checker, n, times):
    rng, different = random.Random(1), []
    for problem in sampled(n):
        for _ in range(times):
            calls = mutated(problem, rng)
            text = SYNTAXES["JSON list"].render(calls)
            ours = verify(text, list(problem.tools), list(problem.possible), "lenient")
            if ours.ok != checker(problem, calls):
                different.append((problem.id, ours.reason, calls, problem.possible))
    assert different == []
