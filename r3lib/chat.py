"""The conversation of an episode as token ids: every join adds tokens, none is decoded and encoded again."""

from jinja2 import TemplateError

from .errors import R3Error

TOOL = {"name": "r3_probe", "description": "", "parameters": {"type": "object", "properties": {}, "required": []}}
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
REWRITES = "rewrites earlier turns: use a template that only appends"


class Chat:
    """Chat template and end-of-turn tokens of one tokenizer.

    Raises R3Error when the tokenizer has no chat template, no end-of-turn token, or a template that rewrites
    earlier turns, since then a reflection could not be joined to the very tokens that were sampled.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not tokenizer.chat_template:
            raise R3Error(f"the tokenizer of {self.name!r} has no chat template: use an instruction-tuned model")
        self.end_id = self._end_of_turn()
        self.end_ids = frozenset({self.end_id} | ({tokenizer.eos_token_id} - {None}))
        self._turn("a")
        self.takes_tools = self._takes_tools()

    def start(self, task, problem) -> list[int]:
        """Ids of the first prompt: tools through the template if `takes_tools`, else the task's plain form."""
        if (tools := task.tools(problem)) and self.takes_tools:
            return self._ids(self._text(task.bare_messages(problem), add_generation_prompt=True, tools=tools))
        return self.prompt(task.messages(problem))

    def shown(self, task, problem) -> str:
        """What `start` asks, as text: the last message, or all that the template makes of tools and query."""
        if task.tools(problem) and self.takes_tools:
            return self.tokenizer.decode(self.start(task, problem))
        return task.messages(problem)[-1]["content"]

    def prompt(self, messages: list[dict]) -> list[int]:
        """Ids of `messages` and of the header of the assistant's next turn."""
        return self._ids(self._text(messages, add_generation_prompt=True))

    def follow(self, ids: list[int], reply: list[int], user_text: str) -> list[int]:
        """`ids` + `reply` (closed if it was cut off) + a user turn + the header of the assistant's next turn."""
        if not reply or reply[-1] not in self.end_ids:
            reply = reply + [self.end_id]
        return ids + reply + self._turn(user_text)

    def text(self, ids: list[int]) -> str:
        """The text of `ids` without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _text(self, messages, add_generation_prompt=False, tools=None) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise R3Error(
                f"the chat template of {self.name!r} refuses this conversation ({error}): use another model"
            ) from error

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _takes_tools(self) -> bool:
        """Whether the template presents tools and, with them, still closes and opens turns as without."""
        tools, again = [{"type": "function", "function": TOOL}], {"role": "user", "content": "a"}
        try:
            opened = self._text(PROBE[:1], add_generation_prompt=True, tools=tools)
            talk = self._text([*PROBE, again], add_generation_prompt=True, tools=tools)
        except R3Error:
            return False
        joined = [*self._ids(opened + PROBE[1]["content"]), self.end_id, *self._turn("a")]
        return TOOL["name"] in opened and self._ids(talk) == joined

    def _end_of_turn(self) -> int:
        """The first token that the template writes after an assistant's text."""
        opened = self._text(PROBE[:1], add_generation_prompt=True) + PROBE[1]["content"]
        closed = self._text(PROBE)
        if not closed.startswith(opened):
            raise R3Error(f"the chat template of {self.name!r} {REWRITES}")
        tail = self._ids(closed)[len(self._ids(opened)) :]
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        if not tail or tail[0] not in special:
            raise R3Error(
                f"the tokenizer of {self.name!r} has no end-of-turn token: its chat template must close an "
                "assistant turn with a special token"
            )
        return tail[0]

    def _turn(self, user_text: str) -> list[int]:
        """The tokens from a closed assistant turn to the next assistant header."""
        opened = self._ids(self._text(PROBE[:1], add_generation_prompt=True) + PROBE[1]["content"])
        talk = self._text([*PROBE, {"role": "user", "content": user_text}], add_generation_prompt=True)
        before, after = [*opened, self.end_id], self._ids(talk)
        if after[: len(before)] != before:
            raise R3Error(f"the chat template of {self.name!r} {REWRITES}")
        return after[len(before) :]
