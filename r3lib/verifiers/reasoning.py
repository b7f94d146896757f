"""What a model answers: its text without reasoning and without what follows the end of its turn.

The tags of each family of models, and the rules for all of them, are in `docs/verdicts.md`.
"""

import re

MAX_LENGTH, MAX_TAGS, MAX_JSON = 400_000, 4_000, 100_000

# Patterns of tags without their first character, "<" or "[": a common start makes the search fast.
_XML = ("think", "thinking", "thought", "reasoning", "reasoning_content")
_PAIRS = {name: (f"(?i:{name})>", f"/(?i:{name})>") for name in _XML} | {
    "mistral": (r"THINK\]", r"/THINK\]"),
    "cohere": (r"\|START_THINKING\|>", r"\|END_THINKING\|>"),
    "gemma": (r"\|channel>", r"channel\|>"),
}
# Here reasoning is a message like others: known by its header, ended by the next tag of a message.
_MESSAGES = {
    "gptoss": (r"\|channel\|>analysis\s*<\|message\|>", r"\|channel\|>final\b"),
    "muse": (r"(?<= to=self<)\|message\|>", r"(?<= to=user<)\|message\|>"),
}
_NEXT_MESSAGE = r"\|(?:end|eom|start|channel|return|call|eot)\|>"
_ENDS = (
    r"\|(?:im_end|endoftext|eot_id|eom_id|end_of_text|eot|return|call)\|>",
    r"\|(?:END_OF_TURN_TOKEN|END_RESPONSE|user|system|observation|USER_TOKEN)\|>",
    r"\|(?:end|eom)\|>(?!\s*<\|(?:start\|>assistant|channel\|>))",
    r"(?:end_of_turn|turn\||\|tool_response|end_of_utterance|eos|/s)>",
    r"(?:｜end▁of▁sentence｜|｜User｜)>|INST\]",
    r"(?:\|im_start\||\|start_header_id\||\|start\||start_of_turn|\|turn)>user",
)


def _tag(pattern: str) -> re.Pattern:
    return re.compile(rf"[<\[](?:{pattern})")


_ROWS = (_PAIRS | _MESSAGES).items()
_OPENING = {kind: _tag(opening) for kind, (opening, _) in _ROWS}
_CLOSING = {kind: _tag(closing) for kind, (_, closing) in _PAIRS.items()}
_CLOSING |= dict.fromkeys(_MESSAGES, _tag(_NEXT_MESSAGE))
_ANY = _tag(
    "|".join(f"(?P<{kind}>{opening})" for kind, (opening, _) in _ROWS)
    + f"|(?P<closing>{'|'.join(closing for _, (_, closing) in _ROWS)})"
    + f"|(?P<end>{'|'.join(_ENDS)})"
)
_QUOTES = "`'\"“”‘’"
# An object of JSON as far as its tokens go: a key, then strings, brackets, numbers and constants.
_STRING = r'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"\s*+'
_OBJECT = re.compile(
    rf"\{{\s*+{_STRING}:(?:{_STRING}[,:}}\]]|[\s{{}}\]:,]++|\[(?![A-Z/])"
    r"|-?\d[\d.eE+-]*+|true|false|null)*+"
)


def answer_text(text: str | None) -> str:
    """Return `text` without its reasoning, up to the end of the model's turn; "" for None."""
    if text is None or len(text) > MAX_LENGTH or text.count("<") + text.count("[") > MAX_TAGS:
        return ""
    searched = text[:-MAX_JSON] + _OBJECT.sub(_without_tags, text[-MAX_JSON:])
    kept: list[str] = []
    outermost = nested = position = 0
    while tag := _find(_ANY, searched, position):
        kept.append(text[position : tag.start()])
        if tag.lastgroup == "end":
            return "".join(kept)
        if tag.lastgroup == "closing":
            del kept[outermost if nested else 0 :]
            nested = max(nested - 1, 0)
            position = tag.end()
            continue
        if not nested:
            outermost = len(kept)
        closing = _find(_CLOSING[tag.lastgroup], searched, tag.end())
        if closing is None:
            return "".join(kept)
        nested += len(_OPENING[tag.lastgroup].findall(searched, tag.end(), closing.start()))
        position = closing.start() if tag.lastgroup in _MESSAGES else closing.end()
    return "".join(kept) + text[position:]


def _without_tags(json_object: re.Match) -> str:
    """Return an object of JSON, in the same length, without what begins a tag."""
    return json_object[0].replace("<", "_").replace("[", "_")


def _find(pattern: re.Pattern, text: str, start: int) -> re.Match | None:
    """Return the first match of `pattern` from `start` on that is not between quotation marks."""
    for found in pattern.finditer(text, start):
        before = text[found.start() - 1 : found.start()]
        after = text[found.end() : found.end() + 1]
        if not (before and after and before in _QUOTES and after in _QUOTES):
            return found
    return None
