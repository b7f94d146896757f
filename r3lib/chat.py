"""The conversation of an episode as token ids: joins add tokens, nothing is encoded again."""

import json
import re
from contextlib import suppress
from datetime import datetime

from jinja2 import TemplateError

from .errors import R3Error

DATE = "2025-05-30"  # the paper's: what a template that writes today's date takes for today
ENDS = {  # tokens that end a reply in any tokenizer that has them
    "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>",
    "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<|im_end|>", "<end_of_turn>", "<turn|>",
    "<|END_OF_TURN_TOKEN|>", "<|return|>", "<|call|>",
}  # fmt: skip
NOTHING = {"type": "object", "properties": {}, "required": []}
TOOL = {"name": "r3_probe", "description": "", "parameters": NOTHING}
PROBE = [{"role": "user", "content": "a"}]
ANSWER = ["b"]  # the parts of a reply to it
REASONED = ["<think>", "c", "</think>", "b"]  # and of one with reasoning
OPEN = re.compile(r"<think>\s*$")  # a prompt that ends so has begun the reply's reasoning
EMPTY = re.compile(r"<think>\s*</think>\s*$")  # and one that ends so has skipped it
MOST_TURNS = 4096  # of ours, whose tokens a chat keeps
KEEP_REASONING = (  # arguments under which templates neither drop nor add reasoning
    {"enable_thinking": False},
    {"preserve_thinking": True},
    {"truncate_history_thinking": False},
)


class Rewrites(R3Error):
    """The chat template does not only append."""


class Chat:
    """Chat template and end tokens of one tokenizer.

    `end_ids` are all tokens that end a reply: the template's own (`end_id`), the tokenizer's eos,
    those that `generation_config.eos_token_id` (an int or a list) names, and well-known ones that
    the tokenizer has (`ENDS`). `chat_template_kwargs` are arguments for the template, such as
    {"enable_thinking": False}.

    Equal arguments give equal ids on every day: a template that asks for today's date is told
    `DATE`; one that takes the date as an argument (Llama's `date_string`) may be given another.

    What is asked next is joined as the template itself renders the conversation, with two
    differences. White space around a reply is as the model wrote it. Where the prompt ends with an
    empty reasoning block (Qwen3 with thinking off), the block stays, though the template leaves it
    out of earlier turns.

    Raises R3Error when the tokenizer has no chat template, no end-of-turn token, or a template that
    rewrites earlier turns (drops their reasoning, moves a system message), since then a reflection
    could not be joined to the very tokens that were sampled; also for an argument that the template
    does not have.
    """

    def __init__(self, tokenizer, generation_config=None, chat_template_kwargs: dict | None = None):
        self.tokenizer = tokenizer
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        template = self.chat_template_kwargs.get("chat_template")
        template = template or getattr(tokenizer, "chat_template", None)
        if not template:
            raise R3Error(
                f"the tokenizer of {self.name!r} has no chat template: use an instruction-tuned "
                "model"
            )
        self._refuse_unknown_arguments(str(template))
        self.end_ids = self._named_ends(generation_config)
        try:
            self._probe()
        except Rewrites as error:
            raise R3Error(f"{error}{self._way_out()}") from None
        self.takes_tools = self._takes_tools()

    def start(self, task, problem) -> list[int]:
        """Ids of the first prompt; tools go through the template if it takes them."""
        tools = task.tools(problem)
        bare = tools and self.takes_tools
        messages = task.bare_messages(problem) if bare else task.messages(problem)
        try:
            asked = messages[-1]["role"] == "user" and messages[-1]["content"]
        except (TypeError, KeyError, IndexError):
            asked = False
        if not asked or not isinstance(asked, str):
            raise R3Error(
                f"{task.name}: messages of problem {problem.id!r} are {messages!r:.80}: return "
                "[{role, content}, ...], of which the last is the user's"
            )
        return self._ids(self._text(messages, tools)) if bare else self.prompt(messages)

    def shown(self, task, problem) -> str:
        """What `start` asks, as text: the last message, or the whole prompt if it holds tools."""
        if task.tools(problem) and self.takes_tools:
            return self.tokenizer.decode(self.start(task, problem))
        return task.messages(problem)[-1]["content"]

    def prompt(self, messages: list[dict]) -> list[int]:
        """Ids of `messages` and of the header of the assistant's next turn."""
        self._check_roles(messages)
        return self._ids(self._text(messages))

    def follow(self, ids: list[int], reply: list[int], user_text: str) -> list[int]:
        """`ids` + `closed(reply)` + a user turn + the header of the assistant's next turn."""
        return ids + self.closed(reply) + self._turn(user_text)

    def closed(self, reply: list[int]) -> list[int]:
        """`reply` with the template's own end, which is added to one that was cut off.

        It replaces another end at which the reply stopped (the sampled ids of the reply itself stay
        as they are): after `<|eom_id|>` no template goes on.
        """
        if reply and reply[-1] == self.end_id:
            return list(reply)
        own = reply[:-1] if reply and reply[-1] in self.end_ids else reply
        return [*own, *self._closing]

    def written(self, text: str) -> list[int]:
        """The ids of a reply of ours; reasoning that the prompt has begun is closed before it."""
        if self._opening:
            text = "\n" + re.sub(r"^.", r"\g<0>/", self._opening.strip()) + "\n\n" + text
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, ids: list[int]) -> str:
        """The text of a reply as sampled, special tokens too, but not the end or padding behind it.

        Where the prompt has begun the reply's reasoning, the text starts with its tag `<think>`.
        """
        size = len(ids)
        while size and ids[size - 1] in self._unseen:
            size -= 1
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return self._opening + self.tokenizer.decode(ids[:size], **options)

    def _text(self, messages, tools=None, add_generation_prompt=True) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt,
                strftime_now=datetime.fromisoformat(DATE).strftime, **self.chat_template_kwargs,
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise R3Error(
                f"the chat template of {self.name!r} refuses this conversation ({said}): use "
                "another model, or other chat_template_kwargs"
            ) from error

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _refuse_unknown_arguments(self, template: str) -> None:
        """Raise R3Error for an argument that the template never reads: it would be ignored."""
        for name in set(self.chat_template_kwargs) - {"chat_template", "documents"}:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise R3Error(
                    f"chat_template_kwargs has {name!r}, which the chat template of {self.name!r} "
                    "does not read: leave it out"
                )

    def _named_ends(self, generation_config) -> frozenset[int]:
        """The ends that are known without the template."""
        named = getattr(generation_config, "eos_token_id", None)
        if not isinstance(named, list | tuple):
            named = [named]
        added = {str(token): id for id, token in self.tokenizer.added_tokens_decoder.items()}
        known = [added[end] for end in ENDS & set(added)]
        return frozenset({self.tokenizer.eos_token_id, *named, *known} - {None})

    def _probe(self) -> None:
        """Find the template's own end and check that it only appends. R3Error: see the class."""
        self._turns: dict[str, list[int]] = {}
        prompt = self._text(PROBE)
        before, self._after = self._split(PROBE, "a")
        self._said = self._ids(before)
        self._closing = self._close(prompt, self._ids(before + self._after)[len(self._said) :])
        self.end_id = self._closing[-1]
        self.end_ids |= {self.end_id}
        self._unseen = self.end_ids | {self.tokenizer.pad_token_id}
        opening = OPEN.search(prompt)
        self._opening = opening.group() if opening else ""
        self._roles_checked = {("user",)}
        self._refuse_rewriting(PROBE)
        self._turn("a")

    def _close(self, prompt: str, tail: list[int]) -> list[int]:
        """The tokens that close a reply: those of `tail`, which follow it, up to a special one."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        place = next((i for i, token in enumerate(tail) if token in special), None)
        if place is not None and not self.tokenizer.decode(tail[:place]).strip():
            closed = self._text([*PROBE, *answered(ANSWER)], add_generation_prompt=False)
            closes = self._ids(closed).count(tail[place]) > self._ids(prompt).count(tail[place])
            if closes or tail[place] in self.end_ids:  # in GLM's the next turn's header closes one
                return tail[: place + 1]
        raise R3Error(
            f"the tokenizer of {self.name!r} has no end-of-turn token: its chat template must "
            "close an assistant turn with a special token"
        )

    def _split(self, first: list[dict], user_text: str, tools=None) -> tuple[str, str]:
        """What the template makes of `first`, a reply, a user turn: to the reply's end, the rest.

        Raises Rewrites unless the prompt that `first` gives and the reply stand there unchanged.
        """
        prompt = self._text(first, tools)
        reply = ANSWER if EMPTY.search(prompt) else REASONED
        whole = self._text([*first, *answered(reply, user_text)], tools)
        shown = re.compile("".join(r"\s*" + re.escape(part) for part in reply))
        for start in (prompt, EMPTY.sub("", OPEN.sub("", prompt))):
            found = shown.match(whole, len(start)) if whole.startswith(start) else None
            if found:
                return whole[: found.end()], whole[found.end() :]
        raise Rewrites(self._rewrites())

    def _refuse_rewriting(self, first: list[dict], tools=None) -> None:
        """Raise Rewrites unless what follows two replies to `first` is what follows the probe's."""
        reply = ANSWER if EMPTY.search(self._text(first, tools)) else REASONED
        _, one = self._split(first, "a", tools)
        _, two = self._split([*first, *answered(reply, "a")], "a", tools)
        if not one == two == self._after:
            raise Rewrites(self._rewrites())

    def _rewrites(self, when="") -> str:
        template = f"the chat template of {self.name!r}"
        return f"{template} rewrites earlier turns{when}: use a template that only appends"

    def _check_roles(self, messages: list[dict]) -> None:
        """Raise R3Error if a conversation with these roles is not continued as the probe is."""
        roles = tuple(message["role"] for message in messages)
        if roles[-1] != "user" or roles in self._roles_checked:
            return
        try:
            self._refuse_rewriting(messages)
        except Rewrites:
            when = f" after a start by {', '.join(roles)}"
            raise R3Error(f"{self._rewrites(when)}, or put all into one user message") from None
        self._roles_checked.add(roles)

    def _takes_tools(self) -> bool:
        """Whether the template presents tools and joins turns with them as without."""
        tools = [{"type": "function", "function": TOOL}]
        try:
            self._refuse_rewriting(PROBE, tools)
            return TOOL["name"] in self._text(PROBE, tools)
        except R3Error:
            return False

    def _way_out(self) -> str:
        """What a refusal adds: arguments under which the template only appends, if we know any."""
        given = self.chat_template_kwargs
        for extra in KEEP_REASONING:
            self.chat_template_kwargs = given | extra
            with suppress(R3Error):
                self._probe()
                return f", or set chat_template_kwargs={json.dumps(extra)}: with it, this one does"
        return ""

    def _turn(self, user_text: str) -> list[int]:
        """The tokens from a closed assistant turn to the next assistant header.

        The last ones are kept: the rows of a group are asked the same.
        """
        if user_text not in self._turns:
            closed = [*self._said, *self._closing]
            whole = self._ids("".join(self._split(PROBE, user_text)))
            if whole[: len(closed)] != closed:
                raise Rewrites(self._rewrites(f" when told {user_text[:40]!r}"))
            if len(self._turns) >= MOST_TURNS:
                self._turns.clear()
            self._turns[user_text] = whole[len(closed) :]
        return self._turns[user_text]


def answered(reply: list[str], user_text: str | None = None) -> list[dict]:
    """The next messages of a conversation: a reply with these parts, what the user says then."""
    said = [{"role": "assistant", "content": "\n".join(reply)}]
    return said if user_text is None else [*said, {"role": "user", "content": user_text}]
