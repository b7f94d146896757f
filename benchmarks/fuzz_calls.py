"""Does the verifier of function calls judge generated texts right, and how long does it take?

    python benchmarks/fuzz_calls.py [--n 1000000] [--seed 0]

Each text has the calls of a random problem in one of `call_syntaxes.SYNTAXES`, with at most one
thing changed, among prose, data and reasoning. The right reason follows from what was changed and
not from reading the text. Prints how often each reason was right, the slowest verdict and the
disagreements; the exit status is 1 if there are any, or a verdict takes more than 10 ms each time.
"""

import argparse
import copy
import json
import random
import sys
import time
from collections import Counter

from call_syntaxes import SYNTAXES

from r3lib.verifiers.function_calling import RULES, verify

LIMIT = 0.010  # seconds of CPU time a verdict may take

# ---------------------------------------------------------------- problems and changes

TEXT = "abzé 09,.'\"{}[]()<=>:;\\/\n_-#`"
NAMES = ("get_weather", "search.flights", "f", "send_email", "now", "name", "calc2")
KEYS = ("city", "days", "a", "b", "name", "type", "from_date", "arguments", "unit")


def value_of(kind: str, rng: random.Random):
    if kind == "string":
        known = rng.choice(("Paris", "new york", "2024-01-05", "3", "true", "null", ""))
        return known or some_text(rng)
    if kind == "integer":
        return rng.choice((0, 1, 3, -7, 10**12))
    if kind == "float":
        return rng.choice((0.5, 2.0, -0.25, 1e-7))
    if kind == "boolean":
        return rng.random() < 0.5
    if kind == "array":
        return [rng.randrange(9) for _ in range(rng.randrange(1, 4))]
    return {"k": rng.randrange(9), "l": [some_text(rng)], "m": None}


def some_text(rng: random.Random) -> str:
    return "".join(rng.choices(TEXT, k=rng.randrange(1, 12))).strip() or "x"


def problem(rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Return tools in xlam's form and one call of each of some of them."""
    tools = []
    for name in rng.sample(NAMES, rng.randrange(1, 5)):
        keys = rng.sample(KEYS, rng.randrange(4))
        parameters = {key: {"type": rng.choice(tuple(WRONG))} for key in keys}
        tools.append({"name": name, "parameters": parameters})
    called = rng.sample(tools, rng.randrange(1, min(3, len(tools)) + 1))
    calls = []
    for tool in called:
        arguments = {key: value_of(spec["type"], rng) for key, spec in tool["parameters"].items()}
        calls.append({"name": tool["name"], "arguments": arguments})
    return tools, calls


# a value of another type
WRONG = {"string": 7} | dict.fromkeys(("integer", "float", "boolean", "array", "object"), "x7")


def another(value):
    """Return another value of the same type, told apart even without case and punctuation."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        return value | {"zzz": 1}
    if isinstance(value, list):
        return [*value, 1]
    return value + "x" if isinstance(value, str) else -2 * value - 1


def change(
    kind: str, tools: list, calls: list, rng: random.Random
) -> tuple[list, list, dict] | None:
    """Return the calls with one change, gold, and the right reason under each rule, or None."""
    made, gold = copy.deepcopy(calls), copy.deepcopy(calls)
    index = rng.randrange(len(made))
    call = made[index]
    declared = next(t for t in tools if t["name"] == call["name"])["parameters"]
    key = rng.choice(list(declared)) if declared else None
    if kind == "wrong_function":
        call["name"] += "_2"
    elif kind == "wrong_call_count":
        made.append(copy.deepcopy(call))
    elif kind == "unexpected_argument":
        call["arguments"]["zzz"] = rng.choice([1, "x", None, []])
    elif kind != "ok" and key is None:
        return None
    elif kind in ("missing_argument", "default left out"):
        value = call["arguments"].pop(key)
        declared[key]["default"] = value if kind == "default left out" else another(value)
    elif kind == "default given":
        declared[key]["default"] = gold[index]["arguments"].pop(key)
    elif kind == "wrong_type":
        call["arguments"][key] = WRONG[declared[key]["type"]]
    elif kind == "wrong_value":
        call["arguments"][key] = another(call["arguments"][key])
    special = {"default left out": "missing_argument", "default given": "unexpected_argument"}
    right = {"strict": special.get(kind, kind), "lenient": "ok" if kind in special else kind}
    return made, gold, right


KINDS = ("ok", "wrong_function", "wrong_call_count", "missing_argument", "unexpected_argument")
KINDS += ("wrong_type", "wrong_value", "default left out", "default given")
KINDS += ("invalid_json", "no_call")

# ---------------------------------------------------------------- what stands around the calls

BEFORE = (
    "", "", "Sure, I can help with that.\n", 'The "name": key is set.\n',
    "Use {curly} and [square] brackets (1).\n",
    '{"temperature": 21.5, "unit": "C"}\n', '```json\n{"name": "demo", "version": 2}\n```\n',
    "I put it in <tool_call> tags.\n",
    '<think>I could write {"name": "f", "arguments": {"a": 9}} or\n<tool_call>{"name": ...}</tool_call></think>\n',
    '[{"name": "Ann", "age": 7}, {"name": "Bob", "age": 8}]\n', "f(x) is a function of x.\n",
    "a < b and c > d: {x, y}\n",
)  # fmt: skip
AFTER = (
    "", "", "\nDone.", '\nSample:\n```json\n{"name": "demo", "version": 2}\n```', "\nThe result is in [0, 1).",
    '\nIt returns {"message": "your name is known"}.', '\n{"name": "my-app", "version": "1.0.0"}', "\nf(x) = x + 1 {",
    '<|im_end|>\n<|im_start|>user\n{"name": "f", "arguments": {}}', '<|eot_id|>\n{"name": "f", "arguments": {"a": 9}}',
)  # fmt: skip


def case(rng: random.Random) -> tuple[str, str, list, list, dict] | None:
    """Return the syntax's name, a text, tools, gold and the right reason under each rule."""
    tools, calls = problem(rng)
    name = rng.choice(tuple(SYNTAXES))
    syntax = SYNTAXES[name]
    calls = calls if syntax.many else calls[:1]
    kind = rng.choice(KINDS)
    before, after = rng.choice(BEFORE), rng.choice(AFTER)
    if kind == "no_call":
        return name, before + after, tools, calls, dict.fromkeys(RULES, kind)
    if kind == "invalid_json":
        text = syntax.render(calls)
        text = before + text[: text.rindex(syntax.closing)]
        return name, text, tools, calls, dict.fromkeys(RULES, kind)
    if kind == "wrong_call_count" and not syntax.many:
        return None
    changed = change(kind, tools, calls, rng)
    if changed is None:
        return None
    made, gold, right = changed
    if kind == "wrong_type" and not syntax.typed and made != gold:
        is_text = any(7 in call["arguments"].values() for call in made)  # a text like another
        if is_text and 7 not in gold_values(gold):
            right = dict.fromkeys(RULES, "wrong_value")
    return name, before + syntax.render(made) + after, tools, gold, right


def gold_values(gold: list[dict]) -> list:
    return [value for call in gold for value in call["arguments"].values()]


def main() -> int:
    """Judge the texts, print what was found, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    first = {"name": "f", "arguments": {}}
    verify(json.dumps(first), [], [first])  # which imports a library
    rng = random.Random(options.seed)
    right, wrong = Counter(), []
    slowest, slow = 0.0, 0
    while right.total() + len(wrong) < options.n:
        made = case(rng)
        if made is None:
            continue
        name, text, tools, gold, expected = made
        rule = rng.choice(RULES)
        reason, seconds = judged(text, tools, gold, rule)
        slowest = max(slowest, seconds)
        slow += seconds > LIMIT
        right[reason] += reason == expected[rule]
        if reason != expected[rule]:
            wrong.append((name, rule, expected[rule], reason, text, tools, gold))
    print(f"{options.n} texts, seed {options.seed}, {len(SYNTAXES)} syntaxes")
    print(f"right: {dict(right.most_common())}; disagreements: {len(wrong)}")
    print(f"slowest verdict {1000 * slowest:.2f} ms; over {1000 * LIMIT:.0f} ms: {slow}")
    for one in wrong[:10]:
        print(*map(repr, one), sep="\n  ")
    return int(bool(wrong or slow))


def judged(text: str, tools: list, gold: list, rule: str) -> tuple[str, float]:
    """Return the reason and the seconds; a slow one is timed again, as other work may disturb."""
    seconds = float("inf")
    for _ in range(9):
        start = time.process_time()
        reason = verify(text, tools, gold, rule).reason
        seconds = min(seconds, time.process_time() - start)
        if seconds <= LIMIT:
            break
    return reason, seconds


if __name__ == "__main__":
    sys.exit(main())
