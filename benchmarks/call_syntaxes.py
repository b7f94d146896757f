"""How each family of models writes function calls: renderers, to test what reads them."""

import json
from collections.abc import Callable
from dataclasses import dataclass


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
    return lambda calls: (
        before + dumps([make(call["name"], call["arguments"]) for call in calls]) + after
    )


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
        opening.format(name)
        + "".join(argument.format(key, xml_text(v)) for key, v in arguments.items())
        + closing
    )


def python(name, arguments, write=repr) -> str:
    return f"{name}({', '.join(f'{key}={write(value)}' for key, value in arguments.items())})"


def mixed(name, arguments) -> str:
    """Python's strings, but lists and objects as JSON, as LFM2's template has it."""
    return python(
        name,
        arguments,
        lambda value: dumps(value) if isinstance(value, list | dict) else repr(value),
    )


def gemma(value, quote='<|"|>', bare=True) -> str:
    if isinstance(value, str):
        return quote + value + quote
    if isinstance(value, dict):
        return (
            "{"
            + ",".join(
                f"{k if bare else gemma(k)}:{gemma(v, quote, bare)}" for k, v in value.items()
            )
            + "}"
        )
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
