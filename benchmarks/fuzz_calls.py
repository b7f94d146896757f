"""Does the verifier of function calls judge generated texts right, and how long does it take?

    python benchmarks/fuzz_calls.py [--n 1000000] [--seed 0]

Each text has the calls of a random problem in one of `SYNTAXES`, with at most one thing changed, among prose, data and
reasoning. The right reason follows from what was changed and not from reading the text. Prints how often each reason
was right, the slowest verdict and the disagreements; the exit status is 1 if there are any, or an error, or a verdict
that takes more than 10 ms each time.
"""

import argparse
import copy
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from r3lib.verifiers.function_calling import RULES, verify

LIMIT = 0.010  # seconds of CPU time a verdict may take


@dataclass(frozen=True)
class Syntax:
    """How a family writes calls; without the last `closing` the text is cut short."""

    render: Callable[[list[dict]], str]
    closing: str = "}"
    typed: bool = True  # whether the text tells 1 from "1"
    many: bool = True  # whether it holds several calls


def dumps(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def each(write: Callable[[str, dict], str], between: str = "\n") -> Callable[[list[dict]], str]:
    """Render calls one by one with `write(name, arguments)`."""
    return lambda calls: between.join(write(call["name"], call["arguments"]) for call in calls)


def whole(make: Callable[[str, dict], dict], around: str = "{}") -> Callable[[list[dict]], str]:
    """Render calls as one JSON list of what `make` makes of each."""
    before, after = around.split("{}")
    return lambda calls: before + dumps([make(call["name"], call["arguments"]) for call in calls]) + after


def plain(name, arguments):
    return {"name": name, "arguments": arguments}


def parameters(name, arguments):
    return {"name": name, "parameters": arguments}


def as_text(name, arguments):
    return {"name": name, "arguments": dumps(arguments) if arguments else ""}


def openai(name, arguments):
    return {"id": "call_1", "type": "function", "function": as_text(name, arguments)}


def cohere(name, arguments):
    return {"tool_call_id": "0", "tool_name": name, "parameters": arguments}


def twice(name, arguments):
    return {"name": name, "arguments": dumps(dumps(arguments))}


def xml_text(value) -> str:
    return value if isinstance(value, str) else dumps(value)


def xml(opening: str, argument: str, closing: str) -> Callable[[str, dict], str]:
    """Render a call in XML, its arguments with `argument.format(key, value)`."""
    return lambda name, arguments: (
        opening.format(name) + "".join(argument.format(key, xml_text(v)) for key, v in arguments.items()) + closing
    )


def python(name, arguments, write=repr) -> str:
    return f"{name}({', '.join(f'{key}={write(value)}' for key, value in arguments.items())})"


def mixed(name, arguments) -> str:
    """Python's strings, but lists and objects as JSON, as LFM2's template has it."""
    return python(name, arguments, lambda value: dumps(value) if isinstance(value, list | dict) else repr(value))


def gemma(value, quote='<|"|>', bare=True) -> str:
    if isinstance(value, str):
        return quote + value + quote
    if isinstance(value, dict):
        return "{" + ",".join(f"{k if bare else gemma(k)}:{gemma(v, quote, bare)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(gemma(item, quote, bare) for item in value) + "]"
    return dumps(value)


def tagged(write, before: str, after: str, between: str = ", ") -> Callable[[list[dict]], str]:
    return lambda calls: before + each(write, between)(calls) + after


SYNTAXES = {
    "JSON list": Syntax(whole(plain)),
    "JSON list, indented": Syntax(lambda calls: json.dumps(calls, indent=2)),
    "JSON lines": Syntax(each(lambda *call: dumps(plain(*call)))),
    "JSON, one after another": Syntax(each(lambda *call: dumps(plain(*call)), "")),
    "JSON in a fence": Syntax(whole(plain, "Sure:\n```json\n{}\n```\nDone [1, 2).")),
    "JSON in a plain fence": Syntax(whole(plain, "```\n{}\n```")),
    "arguments as text": Syntax(each(lambda *call: dumps(as_text(*call)))),
    "arguments encoded twice": Syntax(each(lambda *call: dumps(twice(*call)))),
    "Llama": Syntax(each(lambda *call: dumps(parameters(*call)), "; ")),
    "Llama, python tag": Syntax(tagged(lambda *c: dumps(parameters(*c)), "<|python_tag|>", "<|eom_id|>", ";")),
    "Qwen, Hermes": Syntax(each(lambda *call: f"<tool_call>\n{dumps(plain(*call))}\n</tool_call>")),
    "Qwen, a list in the tag": Syntax(whole(plain, "<tool_call>{}</tool_call>")),
    "Qwen, unclosed tag": Syntax(whole(plain, "<tool_call>{}")),
    "xlam": Syntax(lambda calls: dumps({"tool_calls": calls})),
    "xlam, wrapped": Syntax(whole(lambda *call: {"function": plain(*call)})),
    "OpenAI": Syntax(whole(openai)),
    "OpenAI, message": Syntax(
        lambda calls: dumps({"role": "assistant", "content": None, "tool_calls": [openai(**call) for call in calls]})
    ),
    "OpenAI, function_call": Syntax(each(lambda *call: dumps({"function_call": as_text(*call)}))),
    "Cohere": Syntax(whole(cohere, "<|START_ACTION|>{}<|END_ACTION|>")),
    "Cohere, fence": Syntax(whole(cohere, "Action: ```json\n{}\n```")),
    "Nemotron": Syntax(whole(plain, "<TOOLCALL>{}</TOOLCALL>")),
    "Granite": Syntax(whole(plain, "<|tool_call|>{}")),
    "Phi-4": Syntax(whole(plain, "functools{}")),
    "Mistral": Syntax(whole(plain, "[TOOL_CALLS]{}</s>")),
    "Mistral, name first": Syntax(each(lambda name, a: f"[TOOL_CALLS]{name}{dumps(a)}", "")),
    "Mistral, [ARGS]": Syntax(each(lambda name, a: f"[TOOL_CALLS]{name}[ARGS]{dumps(a)}", "")),
    "Mistral, [CALL_ID]": Syntax(each(lambda name, a: f"[TOOL_CALLS]{name}[CALL_ID]a1b2[ARGS]{dumps(a)}", "")),
    "Llama, function tag": Syntax(each(lambda name, a: f"<function={name}>{dumps(a)}</function>")),
    "gpt-oss": Syntax(
        each(lambda name, a: f" to=functions.{name}<|channel|>commentary json<|message|>{dumps(a)}<|call|>"), many=False
    ),
    "gpt-oss, channel first": Syntax(
        each(lambda name, a: f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dumps(a)}"),
        many=False,
    ),
    "DeepSeek V3": Syntax(
        tagged(
            lambda name, a: (
                f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{dumps(a)}\n```<｜tool▁call▁end｜>"
            ),
            "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>", "\n",
        )
    ),
    "DeepSeek V3.1": Syntax(
        each(lambda name, a: f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{dumps(a)}<｜tool▁call▁end｜>")
    ),
    "Kimi": Syntax(
        each(
            lambda name, a: (
                f"<|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>{dumps(a)}<|tool_call_end|>"
            )
        )
    ),
    "Gemma 4": Syntax(each(lambda name, a: f"<|tool_call>call:{name}{gemma(a)}<tool_call|>", "")),
    "FunctionGemma": Syntax(
        each(lambda name, a: f"<start_function_call>call:{name}{gemma(a, '<escape>')}<end_function_call>", "")
    ),
    "Qwen3-Coder": Syntax(
        each(
            xml(
                "<tool_call>\n<function={}>\n", "<parameter={}>\n{}\n</parameter>\n", "</function>\n</tool_call>"
            )
        ),
        "</function>", typed=False,
    ),
    "Qwen3-Coder, in one line": Syntax(
        each(xml("<function={}>", "<parameter={}>{}</parameter>", "</function>")), "</function>", typed=False
    ),
    "MiniMax": Syntax(
        each(xml('<invoke name="{}">\n', '<parameter name="{}">{}</parameter>\n', "</invoke>")),
        "</invoke>", typed=False,
    ),
    "Muse": Syntax(
        each(xml('<atem:invoke name="{}">\n', '<atem:parameter name="{}">{}</atem:parameter>\n', "</atem:invoke>")),
        "</atem:invoke>", typed=False,
    ),
    "GLM": Syntax(
        each(xml("<tool_call>{}\n", "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>\n", "</tool_call>")),
        "</tool_call>", typed=False,
    ),
    "Python list": Syntax(tagged(python, "[", "]"), ")"),
    "Python lines": Syntax(each(python), ")"),
    "Python, semicolons": Syntax(each(python, "; "), ")"),
    "LFM2": Syntax(tagged(python, "<|tool_call_start|>[", "]<|tool_call_end|>"), ")"),
    "LFM2, JSON inside": Syntax(tagged(mixed, "<|tool_call_start|>[", "]<|tool_call_end|>"), ")"),
    "Llama, python tag and list": Syntax(tagged(python, "<|python_tag|>[", "]"), ")"),
    "Gemma 3": Syntax(tagged(python, "```tool_code\n", "\n```", "\n"), ")"),
}  # fmt: skip

# ---------------------------------------------------------------- problems and what is changed in them

TEXT = "abzé 09,.'\"{}[]()<=>:;\\/\n_-#`"
NAMES = ("get_weather", "search.flights", "f", "send_email", "now", "name", "calc2")
KEYS = ("city", "days", "a", "b", "name", "type", "from_date", "arguments", "unit")


def value_of(kind: str, rng: random.Random):
    if kind == "string":
        return rng.choice(("Paris", "new york", "2024-01-05", "3", "true", "null", "")) or some_text(rng)
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
        kinds = {key: rng.choice(tuple(WRONG)) for key in rng.sample(KEYS, rng.randrange(4))}
        tools.append({"name": name, "parameters": {key: {"type": kind} for key, kind in kinds.items()}})
    called = rng.sample(tools, rng.randrange(1, min(3, len(tools)) + 1))
    calls = []
    for tool in called:
        arguments = {key: value_of(spec["type"], rng) for key, spec in tool["parameters"].items()}
        calls.append({"name": tool["name"], "arguments": arguments})
    return tools, calls


WRONG = {"string": 7, "integer": "x7", "float": "x7", "boolean": "x7", "array": "x7", "object": "x7"}


def another(value):
    """Return another value of the same type, told apart even without case and punctuation."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        return value | {"zzz": 1}
    if isinstance(value, list):
        return [*value, 1]
    return value + "x" if isinstance(value, str) else -2 * value - 1


def change(kind: str, tools: list, calls: list, rng: random.Random) -> tuple[list, list, dict] | None:
    """Return the calls with one change, gold, and the right reason under each rule; None where it cannot be made."""
    made, gold = copy.deepcopy(calls), copy.deepcopy(calls)
    index = rng.randrange(len(made))
    call, declared = made[index], next(t for t in tools if t["name"] == calls[index]["name"])["parameters"]
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


KINDS = ("ok", "wrong_function", "wrong_call_count", "missing_argument", "unexpected_argument", "wrong_type")
KINDS += ("wrong_value", "default left out", "default given", "invalid_json", "no_call")

# ---------------------------------------------------------------- what stands around the calls

BEFORE = (
    "", "", "Sure, I can help with that.\n", 'The "name": key is set.\n', "Use {curly} and [square] brackets (1).\n",
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
        return name, before + text[: text.rindex(syntax.closing)], tools, calls, dict.fromkeys(RULES, kind)
    changed = None if kind == "wrong_call_count" and not syntax.many else change(kind, tools, calls, rng)
    if changed is None:
        return None
    made, gold, right = changed
    if kind == "wrong_type" and not syntax.typed and made != gold:
        is_text = any(7 in call["arguments"].values() for call in made)  # 7 is a text like another
        right = dict.fromkeys(RULES, "wrong_value") if is_text and 7 not in gold_values(gold) else right
    return name, before + syntax.render(made) + after, tools, gold, right


def gold_values(gold: list[dict]) -> list:
    return [value for call in gold for value in call["arguments"].values()]


def main() -> int:
    """Judge the texts, print what was found, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    verify('{"name": "f", "arguments": {}}', [], [{"name": "f", "arguments": {}}])  # the first one imports a library
    rng, right, wrong, slowest, slow = random.Random(options.seed), Counter(), [], 0.0, 0
    while right.total() + len(wrong) < options.n:
        made = case(rng)
        if made is None:
            continue
        name, text, tools, gold, expected = made
        rule = rng.choice(RULES)
        reason, seconds = judged(text, tools, gold, rule)
        slowest, slow = max(slowest, seconds), slow + (seconds > LIMIT)
        right[reason] += reason == expected[rule]
        if reason != expected[rule]:
            wrong.append((name, rule, expected[rule], reason, text, tools, gold))
    print(f"{options.n} texts, seed {options.seed}, {len(SYNTAXES)} syntaxes; right: {dict(right.most_common())}")
    print(f"slowest verdict {1000 * slowest:.2f} ms; over {1000 * LIMIT:.0f} ms: {slow}; disagreements: {len(wrong)}")
    for one in wrong[:10]:
        print(*map(repr, one), sep="\n  ")
    return int(bool(wrong or slow))


def judged(text: str, tools: list, gold: list, rule: str) -> tuple[str, float]:
    """Return the reason and the seconds it took; a slow one is timed again, as other work may have disturbed it."""
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
