"""A million generated answers to Countdown problems: is every verdict right, and in time?

    python benchmarks/fuzz_countdown.py [--n 1000000] [--seed 0]

What is right is known without reading the text: an expression tree is drawn, its value is computed
with fractions, and then it is written in a random notation, marked, placed in a text, or spoilt in
a way that has one reason. Random plain text is judged by Python's own parser instead, and noise has
to get any verdict. Whatever is called right must reach its target by enumeration. Exits with 1 when
a verdict is wrong or takes 10 ms of processor time.
"""

import argparse
import ast
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from random import Random

from r3lib.verifiers.countdown import MAX_LENGTH, verify

LIMIT = 10.0  # ms
REASONS = ("ok", "no_answer", "invalid_expression", "wrong_numbers", "missed_target")


@dataclass(frozen=True)
class Case:
    """A text, its problem, and the only right reason; None where any will do."""

    kind: str
    text: str
    nums: tuple[int, ...]
    target: Fraction
    reason: str | None


# ---------------------------------------------------------------- trees: int or (sign, left, right)


def draw_nums(rng: Random) -> tuple[int, ...]:
    """One of a few hundred sets of numbers, so that what they reach is enumerated only once."""
    pool = Random(rng.randrange(300))
    largest = pool.choice((9, 99, 99, 5000))
    return tuple(pool.randint(0, largest) for _ in range(pool.randint(1, 4)))


def draw_tree(nums, rng: Random):
    """A random tree over all `nums`."""
    nodes = rng.sample(nums, len(nums))
    while len(nodes) > 1:
        left = nodes.pop(rng.randrange(len(nodes)))
        right = nodes.pop(rng.randrange(len(nodes)))
        nodes.append((rng.choice("+-*/"), left, right))
    return nodes[0]


def compute(tree) -> Fraction | None:
    """The value of a tree; None where it divides by zero."""
    if isinstance(tree, int):
        return Fraction(tree)
    left, right = compute(tree[1]), compute(tree[2])
    if left is None or right is None:
        return None
    return combine(tree[0], left, right)


def combine(sign: str, left: Fraction, right: Fraction) -> Fraction | None:
    """The result of one operation; None of a division by zero."""
    if sign == "/":
        return left / right if right else None
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def leaves(tree) -> list[int]:
    """The numbers of a tree from left to right."""
    return [tree] if isinstance(tree, int) else leaves(tree[1]) + leaves(tree[2])


def truth(tree, nums, target) -> str:
    """The right reason of a tree that is written without a fault."""
    value = compute(tree)
    if value is None:
        return "invalid_expression"
    if sorted(leaves(tree)) != sorted(nums):
        return "wrong_numbers"
    return "ok" if value == target else "missed_target"


@cache
def reachable(nums: tuple[int, ...]) -> frozenset[Fraction]:
    """Every value that sorted `nums` reach, each used once: two are joined at a time."""
    return frozenset(_joined(tuple(map(Fraction, nums))))


@lru_cache(maxsize=100_000)
def _joined(values: tuple[Fraction, ...]) -> frozenset[Fraction]:
    if len(values) == 1:
        return frozenset(values)
    found = set()
    for i, left in enumerate(values):
        for j, right in enumerate(values):
            rest = [value for k, value in enumerate(values) if k not in (i, j)]
            joined = {combine(sign, left, right) for sign in "+-*/"} - {None} if i != j else set()
            for value in joined:
                found |= _joined(tuple(sorted([*rest, value])))
    return frozenset(found)


# ---------------------------------------------------------------- notations

FIRST_DIGITS = (0x30, 0x30, 0x30, 0xFF10, 0x1D7CE, 0x1D7D8)  # plain, fullwidth, bold, double-struck
SIGNS = {
    "+": "+ + + ＋ ➕ ﹢".split(),
    "-": "- - - − – — ‐ ‑ － ➖".split(),
    "*": r"* * × · ⋅ • ∙ ∗ ＊ ✕ ✖ \times \cdot \ast \* \\times $\times$ \(\cdot\)".split(),
    "/": r"/ / / ÷ ∕ ⁄ ／ ➗ \div".split(),
    "frac": [r"\frac", r"\dfrac"],
    "=": ["=", " = ", " = ", "＝", "\n= "],
}
SIGNS["*"] += [" x ", " X ", "✖\ufe0f"]
BRACKETS = [pair.split() for pair in ("( )", "( )", "( )", "[ ]", "{ }", "（ ）", r"\{ \}")]
BRACKETS += [pair.split() for pair in (r"\left( \right)", r"\left[ \right]", r"\bigl( \bigr)")]
SPACES = ["", "", "", " ", " ", "  ", *"\n\t\u00a0\u2009\u3000\u200b\u2060", r"\,", r"\ "]
SIDE_MARKS = [pair.split() for pair in (r"$ $", r"$$ $$", r"\( \)", r"\[ \]", "` `", "** **", "__ __")]
MARKS = [*SIDE_MARKS, ("***", "***"), ("```\n", "\n```"), ("```python\n", "```"), ("(", ")")]
MARKS += [('"', '"'), ("'", "'"), ("“", "”"), (r"\boxed{", "}"), (r"$\boxed{", "}$")]


class Writer:
    """Writes trees and results in random notation; a plain one writes ASCII with few spaces."""

    def __init__(self, rng: Random, plain: bool = False):
        self.rng, self.plain = rng, plain

    def number(self, number: int) -> str:
        """A whole number in one of the spellings of its digits."""
        text = str(number)
        if self.plain:
            return text
        if number >= 1000 and self.rng.random() < 0.5:
            text = f"{number:,}"
        first = self.rng.choice(FIRST_DIGITS)
        return "".join(chr(first + int(char)) if char != "," else char for char in text)

    def sign(self, sign: str) -> str:
        """One of the spellings of an operator or of the equals sign."""
        return sign if self.plain else self.rng.choice(SIGNS[sign])

    def space(self) -> str:
        """White space or nothing."""
        return self.rng.choice(("", " ") if self.plain else SPACES)

    def brackets(self, text: str) -> str:
        """`text` in brackets of one kind."""
        opening, closing = BRACKETS[0] if self.plain else self.rng.choice(BRACKETS)
        return opening + text + closing

    def tokens(self, tree, parent: str = "", is_right: bool = False) -> list[str]:
        """A tree as tokens, with the brackets it needs and a few more."""
        rng = self.rng
        if isinstance(tree, int):
            tokens = [self.number(tree)]
            needed = False
        elif tree[0] == "/" and not self.plain and rng.random() < 0.3:
            above, below = (self.space().join(self.tokens(side)) for side in tree[1:])
            tokens = [f"{rng.choice(SIGNS['frac'])}{{{above}}}{{{below}}}"]
            needed = False
        else:
            tokens = [
                *self.tokens(tree[1], tree[0]),
                self.sign(tree[0]),
                *self.tokens(tree[2], tree[0], True),
            ]
            weak = tree[0] in "+-" and parent in ("*", "/")
            needed = weak or is_right and (tree[0] in "+-") == (parent in "+-")
        if needed or rng.random() < 0.1:
            return [self.brackets(self.space().join(tokens))]
        return tokens

    def expression(self, tree) -> str:
        """A tree as text."""
        first, *rest = self.tokens(tree)
        return first + "".join(self.space() + token for token in rest)

    def result(self, value: int, marks=()) -> str:
        """A whole number as the result of an equation."""
        rng, text = self.rng, self.number(abs(value))
        text += "" if self.plain else rng.choice(("", "", "", ".0", ".00", "."))
        if value < 0:
            text = self.sign("-") + rng.choice(("", " ")) + text
        opening, closing = rng.choice(marks) if marks and rng.random() < 0.3 else ("", "")
        return opening + text + closing


def equation(tree, rng: Random, results=(), plain: bool = False) -> str:
    """A tree in random notation, in an equation with `results`, marked as a whole or by side."""
    writer = Writer(rng, plain)
    whole = rng.choice(MARKS) if not plain and rng.random() < 0.4 else None
    side_marks = [] if whole or plain else SIDE_MARKS
    sides = [writer.expression(tree)] + [writer.result(value, side_marks) for value in results]
    if results and rng.random() < 0.2:
        sides.insert(rng.randrange(len(sides)), writer.expression(tree))
    if rng.random() < 0.2:
        sides.reverse()
    text = writer.sign("=").join(sides)
    if whole and not any(mark in text for mark in ("$", r"\(", r"\[", "`")):
        text = whole[0] + text + whole[1]
    if not plain and not text.endswith(".") and rng.random() < 0.1:
        text += "."
    return text


def fits(text: str) -> bool:
    """Whether an answer may be that long, with some room for a fault."""
    return len(text) < MAX_LENGTH - 60


# ---------------------------------------------------------------- places

ENDS = "<|im_end|> <|endoftext|> <|eot_id|> <|end_of_text|> <|end|> </s> <end_of_turn>".split()
CHANNEL = "<|channel|>{}<|message|>".format
REASONING = [("<think>", "</think>"), ("<THINK>", "</THINK>"), ("[THINK]", "[/THINK]")]
REASONING += [("", "</think>"), ("<|START_THINKING|>", "<|END_THINKING|>")]
REASONING += [("<|channel>thought\n", "<channel|>")]
REASONING += [(CHANNEL("analysis"), f"<|end|><|start|>assistant{CHANNEL('final')}")]
OTHERS = ("<answer>1 + 1</answer>", "<answer>", "2 * 3", "<answer> </answer>", "a < b")
MENTIONS = ("I put it in <answer> </answer> tags.", "(see <answer>", "</answer>", "Done.", "", "\n")


def place(answer: str, rng: Random) -> str:
    """A text whose answer is `answer`, whatever else it says."""
    opening, closing = rng.choice(REASONING)
    other = rng.choice(OTHERS)
    before = ["", "", "So: ", "<answer>9</answer> No: ", "<answer>"]
    before += [f"{opening}Hm, {other}.{closing}\n"] * 2
    after = [*MENTIONS, rng.choice(ENDS) + other, rng.choice(ENDS) + other]
    after += [f" <think>{other}</think>", " <think>So <answer>4</answer>"]
    tag = rng.choice(("answer", "answer", "answer", "ANSWER", "Answer"))
    return f"{rng.choice(before)}<{tag}>{answer}</{tag}>{rng.choice(after)}"


def misplace(answer: str, rng: Random) -> str:
    """A text without an answer, although `answer` stands in it."""
    opening, closing = rng.choice(REASONING)
    tagged = f"<answer>{answer}</answer>"
    texts = [answer, f"<answer>{answer}", f"{answer}</answer>", f"</answer>{answer}<answer>"]
    texts += [f"\\boxed{{{answer}}}", f"<answers>{answer}</answers>"]
    texts += [f"{opening}{tagged}{closing} so I", f"{opening or '<think>'}{tagged} so"]
    texts += [f"<think>x<think>y</think>{tagged}</think>", f"No.{rng.choice(ENDS)}{tagged}"]
    return rng.choice(texts)


# ---------------------------------------------------------------- faults

# Each is wrong wherever it stands: {} is the number or the equation, {r} any number.
BAD_SIGNS = [*r"** // ^ % +* -- */ ***** **+** \times\times e . : < ± mod ·÷ ;".split(), " "]
BAD_NUMBERS = r"0{} {}.0 {}.5 {}e0 {}! {}% {}² {}₂ ½ {}_0 ٣ -{} +{} 0x{} {}cm {}n five {}j √{}".split()
BAD_NUMBERS += [r"\sqrt{{{}}}", "{}^{{2}}", "{}(1)", "({})({})", "{} {}", "{} apples"]
BAD_EQUATIONS = """({}|{})|({}]|{} +|* {}|{} =|= {}|{} == {r}|{} = {r} =|{} = {r} apples|{} ≈ {r}
{} → {r}|{} or {}|The answer is {}|{} ()|-({})|({}) ({})|{}, {r}|{} = {r} {r}|{}!|{}%|eval({})
{}; {}|{} # {r}|{} = -{r} {r}|{} & {}|{}..|{}...""".replace("\n", "|").split("|")
BAD_EQUATIONS += ["{}\n{}"]


def spoil(tree, rng: Random) -> str:
    """An equation of at least two numbers that is outside the grammar."""
    text = " ".join(Writer(rng, plain=True).tokens(tree))
    if rng.random() < 0.3:
        return rng.choice(BAD_EQUATIONS).format(text, text, r=rng.randint(1, 99))
    if rng.random() < 0.5:
        return _with_bad_number(tree, rng)
    return _with_bad_sign(tree, rng)


def _with_bad_number(tree, rng: Random) -> str:
    bad = rng.randrange(len(leaves(tree)))
    spelling = rng.choice(BAD_NUMBERS)

    def written(node, first):
        if isinstance(node, int):
            return spelling.format(node, node) if first == bad else str(node)
        left, right = written(node[1], first), written(node[2], first + len(leaves(node[1])))
        return f"({left} {node[0]} {right})"

    return written(tree, 0)


def _with_bad_sign(tree, rng: Random) -> str:
    bad = rng.randrange(len(leaves(tree)) - 1)
    sign = rng.choice(BAD_SIGNS)

    def written(node, first):
        if isinstance(node, int):
            return str(node)
        middle = first + len(leaves(node[1]))
        left, right = written(node[1], first), written(node[2], middle)
        return f"({left}{sign if middle - 1 == bad else node[0]}{right})"

    return written(tree, 0)


# ---------------------------------------------------------------- cases


def whole(value: Fraction | None) -> bool:
    """Whether a value can be written as a whole number."""
    return value is not None and value.denominator == 1


def right(rng: Random) -> Case:
    """A tree in random notation, for its own problem or one a little different."""
    nums = draw_nums(rng)
    tree = draw_tree(nums, rng)
    target = value = compute(tree)
    if value is None:
        target = Fraction(rng.randint(0, 99))
    if rng.random() < 0.2:
        nums = rng.choice((nums[1:], (*nums, nums[0]), (*nums, 1), (nums[0] + 1, *nums[1:])))
    if rng.random() < 0.2:
        target += rng.choice((-1, 1, 10, Fraction(1, 10**9)))
    # A result may be the only given number itself, and then it is an answer of its own.
    most = 2 if whole(value) and len(nums) > 1 else 0
    results = [int(value)] * rng.randint(1, most) if most and rng.random() < 0.7 else []
    answer = equation(tree, rng, results)
    if not fits(answer):
        answer = equation(tree, rng, results, plain=True)
    return Case("notation", place(answer, rng), nums, target, truth(tree, nums, target))


def false_result(rng: Random) -> Case:
    """A right expression in an equation with a false result."""
    nums = draw_nums(rng)
    tree = draw_tree(nums, rng)
    value = compute(tree)
    if not whole(value):
        return right(rng)
    results = [int(value) + rng.choice((-1, 1, 9, 100))] + [int(value)] * rng.randint(0, 1)
    rng.shuffle(results)
    plain = rng.random() < 0.3
    answer = equation(tree, rng, results, plain)
    if not fits(answer):
        return right(rng)
    return Case("false result", place(answer, rng), nums, value, "missed_target")


def spoilt(rng: Random) -> Case:
    """An equation outside the grammar."""
    nums = draw_nums(rng)
    while len(nums) < 2:
        nums = draw_nums(rng)
    tree = draw_tree(nums, rng)
    value = compute(tree)
    text = place(spoil(tree, rng), rng)
    return Case("spoilt", text, nums, Fraction(0) if value is None else value, "invalid_expression")


def misplaced(rng: Random) -> Case:
    """A right equation that is not the answer."""
    nums = draw_nums(rng)
    tree = draw_tree(nums, rng)
    answer = equation(tree, rng, plain=rng.random() < 0.5)
    return Case("misplaced", misplace(answer, rng), nums, compute(tree) or Fraction(0), "no_answer")


def soup(rng: Random) -> Case:
    """Random plain characters, judged by Python's parser."""
    pieces = [*"123405+-*/()", " ", " + ", "12", "(4-", "7)", "*", "(", ")"]
    text = "".join(rng.choices(pieces, k=rng.randint(1, 9)))
    tree = parsed(text)
    nums = tuple(leaves(tree)) if tree is not None and rng.random() < 0.9 else draw_nums(rng)
    value = compute(tree) if tree is not None else None
    target = value if value is not None and rng.random() < 0.8 else Fraction(rng.randint(0, 20))
    reason = "invalid_expression" if tree is None else truth(tree, nums, target)
    if text.count("**") > 1 or "00" in text:  # bold; and Python reads 00 as a number
        reason = None
    elif not any(char.isdigit() for char in text):
        reason = "invalid_expression"
    return Case("soup", f"<answer>{text}</answer>", nums, target, reason)


def parsed(text: str):
    """The tree that Python's parser makes of `text`; None unless of whole numbers and + - * /."""
    signs = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}

    def tree(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in signs:
            return signs[type(node.op)], tree(node.left), tree(node.right)
        raise ValueError

    try:
        return tree(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError):
        return None


NOISE = [*"0123456789+-*/()[]{}=$`\"'\\._^!%,<>| \n", *ENDS, "<answer>", "</answer>", "<think>"]
NOISE += [*r"</think> [THINK] \frac{1}{ \frac \boxed{ \( \) \[ \] ** *** ``` __ 1/997+ $$".split()]
NOISE += [*"½١𝟏é😀\u200b\ud800\0", "9" * 40, CHANNEL("analysis"), CHANNEL("final")]
NOISE += ["<answer>1</answer>"]


def noise(rng: Random) -> Case:
    """Anything, now and then at length."""
    length = rng.choice((5, 20, 100, 300)) if rng.random() < 0.995 else 20_000
    pieces = rng.choices(rng.sample(NOISE, rng.randint(1, len(NOISE))), k=rng.randint(1, length))
    text = "".join(pieces)
    if rng.random() < 0.5:
        text = f"<answer>1{text}"[: rng.choice((MAX_LENGTH, 10**6))] + "</answer>"
    return Case("noise", text, draw_nums(rng), Fraction(rng.randint(0, 99)), None)


KINDS = ((right, 40), (false_result, 10), (spoilt, 20), (misplaced, 10), (soup, 15), (noise, 5))


def draw_case(rng: Random) -> Case:
    """One case of a random kind."""
    (make,) = rng.choices([make for make, _ in KINDS], [weight for _, weight in KINDS])
    return make(rng)


# ---------------------------------------------------------------- the run


def judge(case: Case) -> tuple[str, float]:
    """The verdict's reason and the milliseconds of processor time it took."""
    start = time.thread_time()
    reason = verify(case.text, case.nums, case.target).reason
    return reason, 1000 * (time.thread_time() - start)


def agrees(case: Case, reason: str) -> bool:
    """Whether `reason` is right, and possible where the case leaves it open."""
    if reason == "ok" and len(case.nums) <= (3 if case.kind == "soup" else 4):
        if case.target not in reachable(tuple(sorted(case.nums))):
            return False
    return reason in ((case.reason,) if case.reason else REASONS)


def main() -> None:
    """Run, print the counts, and exit with 1 when a verdict is wrong or late."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore", SyntaxWarning)
    counts, kinds, wrong, slowest = Counter(), Counter(), 0, 0.0
    for index in range(options.n):
        case = draw_case(Random(f"{options.seed}/{index}"))
        reason, took = judge(case)
        if took > LIMIT / 2:  # the first run of a process warms caches
            took = min(took, *(judge(case)[1] for _ in range(3)))
        slowest = max(slowest, took)
        counts[reason] += 1
        kinds[case.kind] += 1
        if not agrees(case, reason):
            wrong += 1
            if wrong <= 20:
                print(f"{options.seed}/{index}: {reason}, but right is {case}", flush=True)
    for name, tally in (("reasons", counts), ("kinds", kinds)):
        print(f"{name}: " + ", ".join(f"{key} {count:,}" for key, count in tally.most_common()))
    print(f"n {options.n:,}, seed {options.seed}: {wrong} wrong, slowest {slowest:.2f} ms")
    raise SystemExit(wrong > 0 or slowest >= LIMIT)


if __name__ == "__main__":
    main()
