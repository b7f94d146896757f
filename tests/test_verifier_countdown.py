"""Countdown answers: what counts as right, why the others fail, and that no text can stall the verifier."""

import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from r3lib.verifiers.countdown import MAX_DEPTH, MAX_LENGTH, _read, _tokens, answer, verify

REASONS = {"ok", "no_answer", "invalid_expression", "wrong_numbers", "missed_target"}
MEGA = 1_000_000
ROOT = Path(__file__).parent.parent


def reason(expression, nums=(4, 73, 4, 23), target=76):
    """Why `expression`, put in answer tags, passes or fails (the paper's example problem by default)."""
    verdict = verify(f"<answer>{expression}</answer>", nums, target)
    assert verdict.ok == (verdict.reason == "ok")
    return verdict.reason


def value(expression):
    """The value of `expression`."""
    return _read(_tokens(expression))[0]


# ---------------------------------------------------------------- which answer counts


@pytest.mark.parametrize(
    "text, content",
    [
        ("<answer>1+2</answer>", "1+2"),
        ("First <answer>1</answer>, no: <answer>2</answer>.", "2"),
        ("<answer>1</answer> or <answer>2", "1"),
        ("I write <answer> so: <answer>2</answer>", "2"),
        ("<answer><answer>2</answer></answer>", "2"),
        ("<answer>1</answer> and a stray </answer>", "1"),
        ("</answer><answer>1</answer>", "1"),
        ("<ANSWER>1</Answer>", "1"),
        ("İİİ <answer>×日</answer> İ", "×日"),
        ("<answer></answer>", ""),
        ("<answer>1</answer> I put it in <answer> </answer> tags.", "1"),
        ("<answer>1</answer>, between <answer> and </answer>.", "1"),
        ("<answer>1</answer> (`<answer></answer>`) <answer>...</answer>", "1"),
        ("I use <answer> </answer> tags: <answer>1</answer>", "1"),
        ("I use <answer> </answer> or <answer> and </answer> tags.", " and "),
        ("<answer>1<answer", None),
        ("</answer>1<answer>", None),
        ("< answer>1</ answer>", None),
        ("<answers>1</answers>", None),
        ("4 * 23", None),
        ("", None),
        (None, None),
    ],
)
def test_the_last_well_formed_answer_counts(text, content):
    assert answer(text) == content
    assert (verify(text, [1], 1).reason == "no_answer") == (content is None)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["<answer>", "</answer>", "<ANSWER>", "1", "é", "<", "answer>"])))
def test_the_answer_agrees_with_a_reader_that_goes_tag_by_tag(pieces):
    text, start, found = "".join(pieces), None, []
    for position in range(len(text)):
        if text[position : position + 8].lower() == "<answer>":
            start = position + 8
        elif text[position : position + 9].lower() == "</answer>" and start is not None:
            found.append(text[start:position])
            start = None
    assert answer(text) == next((one for one in found[::-1] if "1" in one), found[-1] if found else None)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>maybe <answer>3*5</answer></think> so I", "no_answer"),
        ("<think>maybe <answer>3*5</answer> so I", "no_answer"),
        ("maybe <answer>3*5</answer></think> so I", "no_answer"),
        ("<think>not <answer>3+5</answer></think><answer>3*5</answer>", "ok"),
        ("not <answer>3+5</answer></think><answer>3*5</answer>", "ok"),
        ("<answer>3*5</answer><think>or <answer>3+5</answer>", "ok"),
        ("<|channel|>analysis<|message|><answer>3*5</answer><|end|>", "no_answer"),
        ("<answer>3*5</answer><|end_of_text|>I mean <answer>3+5</answer>", "ok"),
        ("I am done.<|im_end|><answer>3*5</answer>", "no_answer"),
        (r"\boxed{3*5}", "no_answer"),
        ("3*5 = 15", "no_answer"),
    ],
)
def test_neither_reasoning_nor_what_follows_the_turn_is_an_answer(text, expected):
    assert verify(text, [3, 5], 15).reason == expected


def test_an_answer_before_another_end_token_counts():
    text = "<answer>4*6</answer><|end_of_text|>I mean <answer>4+6</answer>"
    assert verify(text, [4, 6], 24).reason == "ok"


# ---------------------------------------------------------------- the four ways to fail, in order


def test_the_worked_example_of_the_paper_is_ok():
    assert reason("(73 - 4) + 23 - 4", target=88) == "ok"
    assert reason("73 + 23 / (4 + 4)", target=Fraction(607, 8)) == "ok"


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("73 + 4 + 4 + 23", "missed_target"),
        ("73 + 4 + 23", "wrong_numbers"),
        ("73 + 4 + 4 + 4 + 23", "wrong_numbers"),
        ("76", "wrong_numbers"),
        ("73 + 4 + 4 +", "invalid_expression"),
        ("", "invalid_expression"),
        ("1 / 0", "invalid_expression"),
        ("1 + + 2", "invalid_expression"),
    ],
)
def test_the_first_reason_that_applies_is_given(expression, expected):
    assert reason(expression) == expected


def test_given_numbers_are_a_multiset():
    assert reason("7 + 7 + 3", (7, 7, 3), 17) == "ok"
    assert reason("7 + 7 + 3", (7, 3, 3), 17) == "wrong_numbers"
    assert reason("7 + 3 + 3", (7, 7, 3), 13) == "wrong_numbers"


def test_arithmetic_is_exact():
    assert reason("8 / (3 - 8 / 3)", (8, 8, 3, 3), 24) == "ok"  # 23.99999999999999 in floating point
    assert reason("1 / 3 * 9", (1, 3, 9), 3) == "ok"
    near = "9999999999999999 * 9999999999999999 / 9999999999999998 - 1"  # off by 1e-16
    assert reason(near, (9999999999999999,) * 2 + (9999999999999998, 1), 9999999999999999) == "missed_target"


def test_precedence_and_left_association():
    assert value("2 + 3 * 4") == 14
    assert value("10 - 4 - 3") == 3
    assert value("24 / 4 / 2 * 3") == 9
    assert value("10 - (4 - 3)") == 9
    assert isinstance(value("6 / 2"), Fraction) and isinstance(value("6"), Fraction)


def test_numbers_come_in_order_with_repeats():
    assert _read(_tokens("(4 * 23) - 4/10"))[1] == [4, 23, 4, 10]


@pytest.mark.parametrize("spelling", [*"×✕✖⨯⨉·⋅∙•∗⁎✱*＊﹡xXｘ", r"\times", r"\cdot", r"\ast", r"\*"])
def test_signs_of_multiplication(spelling):
    assert value(f"6 {spelling} 3") == value(f"(6){spelling}(3)") == 18


@pytest.mark.parametrize("spelling", [*"÷∕⁄⧸➗/／", r"\div"])
def test_signs_of_division(spelling):
    assert value(f"6{spelling}4") == Fraction(3, 2)


@pytest.mark.parametrize("spelling", "−–—―‒‑‐˗⁃➖-－﹣﹘")
def test_signs_of_subtraction(spelling):
    assert value(f"6 {spelling} 4") == 2


@pytest.mark.parametrize("spelling", "+＋﹢➕")
def test_signs_of_addition(spelling):
    assert value(f"6 {spelling} 4") == 10


ACCEPTED = r"""\boxed{3*5}|\boxed{3*5 = 15}|3*5 = \boxed{15}|\[ 3 \cdot 5 = \boxed{15} \]|\(3 \times 5\)
\(3 \times 5\) = \(15\)|$3*5$|$3*5$ = $15$|$$3 \times 5 = 15$$|3 $\times$ 5|3 \times 5|3\cdot5
\left(3 \times 5\right)|\left[3\right] \times \bigl(5\bigr)|3\,\times\,5|3 \\times 5|3 \* 5
３＊５|１５＝３×５|𝟑×𝟓|𝟛·𝟝|3•5|3✖️5|3 x 5|3x5|（3）＊（5）|3＊5＝15．
`3*5`|`3*5 = 15`|`3` * `5`|```3*5```|**3*5**|**3*5 = 15**|**3*5** = **15**|***3*5***|__3*5__
**$3*5$**|`**3*5**`|"3*5"|'3*5 = 15'|“3*5”|"$3*5$"|3*5.|$3*5$.|\boxed{3*5}.
3*5 = 15.|3*5 = 15.0|3*5 = 15.00|15 = 3*5|15.0 = 3*5|3*5 = (15)|3*5 = +15|(3*5) = 15|(3*5 = 15)
3*5 = 15 = 15|15 = 3*5 = 15|3*5 = 5*3 = 15|3*5 = 10 + 5|[3]*{5}|[3*5]|{3*5}|[(3)*5] = 15|((3*5 = 15))"""
WITH_SPACES = ["3\u200b*5", "\ufeff3*5", "3\u00a0*\u20095", "3 *\n5\n= 15\n", "\n```\n3*5\n```\n"]
WITH_SPACES += ["```python\n3*5 = 15\n```", "``` \n3\n*5\n```", "```3\n*5```", "3*5\n= 5*3\n= 15"]


@pytest.mark.parametrize("expression", ACCEPTED.replace("\n", "|").split("|") + WITH_SPACES, ids=ascii)
def test_a_notation_that_a_careful_reader_accepts(expression):
    assert reason(expression, (3, 5), 15) == "ok"
    assert reason(expression, (3, 5), 16) == "missed_target"
    assert reason(expression, (3, 6), 15) == "wrong_numbers"
    assert reason(expression, (3, 5, 1), 15) == "wrong_numbers"


def test_fractions_of_latex():
    assert reason(r"\frac{15}{1}", (15, 1), 15) == "ok"
    assert reason(r"$\dfrac{3 \times 5}{\left(2 - 1\right)} = 15$", (3, 5, 2, 1), 15) == "ok"
    assert reason(r"\frac{\frac{30}{2}}{1}", (30, 2, 1), 15) == "ok"
    for wrong in (r"3\frac{5}{1}", r"\frac{3}5", r"\frac 3 5", r"\frac{3}{0}", r"\frac", r"\frac(3)(5)"):
        assert reason(wrong, (3, 5, 1), 15) == "invalid_expression"


def test_thousands_may_be_grouped():
    assert reason("50*20 = 1,000", (50, 20), 1000) == "ok"
    assert reason("1,000 * 20 = 20,000.0", (1000, 20), 20000) == "ok"
    assert reason(r"$50 \times 20 = 1{,}000$", (50, 20), 1000) == "ok"
    assert reason("50*20 = 1,001", (50, 20), 1000) == "missed_target"
    for wrong in ("50*20 = 10,00", "50*20 = 1,0000", "50*20 = 1 000", "50*20 = 0,1000", "50,20"):
        assert reason(wrong, (50, 20), 1000) == "invalid_expression"


# ---------------------------------------------------------------- equations


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("3 * 5 = 15", "ok"),
        ("3*5=15", "ok"),
        ("3 * 5 =\n15 ", "ok"),
        ("3 * 5 = 16", "missed_target"),
        ("3 + 5 = 15", "missed_target"),
        ("3 + 5 = 8", "missed_target"),
        ("3 - 5 = -2", "missed_target"),
        ("3 * 4 = 99", "wrong_numbers"),
        ("3 * 5 = 14.5", "missed_target"),
        ("3 * 5 = 99 = 15", "missed_target"),
        ("99 = 3 * 5", "missed_target"),
        ("3 * 5 = 3 + 5", "missed_target"),
        ("3 * 5 * 1 = 15", "wrong_numbers"),
        ("15 = 15", "wrong_numbers"),
        ("15 = 15.0", "wrong_numbers"),
        ("3 * 5 =", "invalid_expression"),
        ("3 * 5 == 15", "invalid_expression"),
        ("3 * 5 = 015", "invalid_expression"),
        ("3 * 5 = 15!", "invalid_expression"),
        ("3 * 5 = ١٥", "invalid_expression"),
        ("3 * 5 = 15 apples", "invalid_expression"),
        ("3 * 5 = 1 5", "invalid_expression"),
        ("3 * 5 = -1 5", "invalid_expression"),
        ("3 * 5. = 15", "invalid_expression"),
        ("3.0 * 5 = 15", "invalid_expression"),
        ("15.0 = +15", "invalid_expression"),
        ("3 - 5 = 5 - 3 = (-(2))", "invalid_expression"),
        ("= 15", "invalid_expression"),
        ("(3 * 5 = 15) = 15", "invalid_expression"),
        ("3 * 5 = 15, 5 * 3 = 15", "invalid_expression"),
        ("5 - 3 = 2\n3 * 5 = 15", "invalid_expression"),
    ],
)
def test_every_side_must_be_the_target(expression, expected):
    assert reason(expression, (3, 5), 15) == expected


def test_a_tail_may_be_negative_when_the_target_is():
    for tail in ("−2", "-2", "- 2", "(-2)", "[-2.0]", "**-2**", r"\boxed{-2}"):
        assert reason(f"3 − 5 = {tail}", (3, 5), -2) == "ok"
        assert reason(f"{tail} = 3 − 5", (3, 5), -2) == "ok"
        assert reason(tail, (2,), -2) == "invalid_expression"


# ---------------------------------------------------------------- what is outside the grammar

OUTSIDE = """-5|+5|3 - -5|3 * (-5)|-(3 - 8)|007|00|3 + 05|3 ** 5|3 ^ 5|3 // 5|3 % 5|3!|3 ***** 5
3 * * 5|**3**5**|2**+**3|2**(3)**5|3 \\* \\* 5|3\\*\\*5|5%|3^{2}|\\sqrt{9}|\\text{3+5}|3 \\timesx 5
1_0|1.5|.5|3 * (5.)|1e3|0x10|0b1|10j|3..|3...
3 5|3 (5)|(3)(5)|[3][5]|3{5}|3(|(3|3)|()|*3|3 +|)3(|(3]|([3)]|3 times 5|3,5|(3, 5)|3;5|3 < 5
3 if 5 else 3|lambda: 3|$3 + $5|$3|3$5$|\\(3 + 5|\\(3\\)\\(5\\)|`3` `5`|3 + 5 cm|3 apples + 5|Answer: 3 + 5
abs(3)|int('3')|__import__('os')|'3' + '5'|f"{3}"|True|None|x|3 + x|3 # five|3\\n|3 + 5 = x
٣|３ ５|³|3²|3⁺5|3₂|½|①|Ⅷ|৩|3\u206214|=|3 = |3 +\0 5|3 + 5\0|\0|3\ud800|\udfff|😀"""


@pytest.mark.parametrize("expression", OUTSIDE.replace("\n", "|").split("|"), ids=ascii)
def test_outside_the_grammar(expression):
    with pytest.raises(ValueError):
        value(expression)
    assert reason(expression, (3, 5), 8) == "invalid_expression"


def test_leading_zeros_are_invalid_but_zero_is_a_number():
    assert reason("007", (7,), 7) == "invalid_expression"
    assert reason("0 + 7", (0, 7), 7) == "ok"


def test_a_sign_is_not_an_operation_on_two_numbers():
    assert reason("-3 + 5", (3, 5), 2) == "invalid_expression"
    assert reason("5 - 3", (3, 5), 2) == "ok"


@pytest.mark.parametrize("expression", ["1 / 0", "3 / (5 - 5)", "0 / 0", "1 / (0 / 3)"])
def test_division_by_zero_is_invalid(expression):
    assert reason(expression) == "invalid_expression"


def test_length_and_depth_have_limits():
    assert value("(" * MAX_DEPTH + "7" + ")" * MAX_DEPTH) == 7
    with pytest.raises(ValueError, match="nested"):
        value("(" * (MAX_DEPTH + 1) + "7" + ")" * (MAX_DEPTH + 1))
    assert value("7".rjust(MAX_LENGTH)) == 7
    with pytest.raises(ValueError, match="characters"):
        value("7".rjust(MAX_LENGTH + 1))


# ---------------------------------------------------------------- no text stalls it

TAGGED = "<answer>{}</answer>".format
LONG = 390_000  # of what is read at all
ADVERSARIAL = {
    "power tower": (TAGGED("9**9**9**9**9"), "invalid_expression"),
    "caret tower": (TAGGED("9^9^9^9^9"), "invalid_expression"),
    "huge integer": (TAGGED("9" * LONG), "invalid_expression"),
    "longest integer": (TAGGED("9" * MAX_LENGTH), "wrong_numbers"),
    "huge product": (TAGGED("*".join(["99999"] * 83)), "wrong_numbers"),
    "sum of fractions": (TAGGED("+".join(f"1/{n}" for n in range(997, 833, -2))), "wrong_numbers"),
    "huge tail": (TAGGED("1+2=" + "9" * 490), "missed_target"),
    "blank tail": (TAGGED("1+2=" + " " * 490), "invalid_expression"),
    "100k deep": (TAGGED("(" * 100_000 + "1" + ")" * 100_000), "invalid_expression"),
    "deep and open": (TAGGED("(" * MAX_LENGTH), "invalid_expression"),
    "call": (TAGGED("__import__('time').sleep(9)"), "invalid_expression"),
    "string": (TAGGED("'9' * 999999999"), "invalid_expression"),
    "NULs": ("\0" * MEGA, "no_answer"),
    "NULs inside": (TAGGED("\0" * LONG), "invalid_expression"),
    "surrogates": ("\ud800" * MEGA, "no_answer"),
    "surrogates inside": (TAGGED("\ud800" * LONG), "invalid_expression"),
    "alternating": ("a\ud800" * (MEGA // 2), "no_answer"),
    "emoji": ("😀" * MEGA, "no_answer"),
    "no tag": ("4 + 73 " * (MEGA // 7), "no_answer"),
    "opening tags": ("<answer>" * (MEGA // 8), "no_answer"),
    "opening tags, one closing": ("<answer>" * (MEGA // 8) + "</answer>", "no_answer"),
    "closing tags": ("</answer>" * (MEGA // 9), "no_answer"),
    "one opening, closing tags": ("<answer>" + "</answer>" * (MEGA // 9), "no_answer"),
    "pairs": ("<answer></answer>" * (MEGA // 17), "no_answer"),
    "half tags": ("<answer" * (MEGA // 7), "no_answer"),
    "half closing tags": ("<answer>" + "</answer" * (MEGA // 8), "no_answer"),
    "ends of tags": ("answer>" * (MEGA // 7) + "</answer>", "no_answer"),
    "sum inside": (TAGGED("1+" * (LONG // 2)), "invalid_expression"),
    "blanks inside": (TAGGED(" " * LONG), "invalid_expression"),
    "tags": ("<answer>1</answer>" * 2000, "wrong_numbers"),
    "mentions": ("<answer></answer>" * 2000, "invalid_expression"),
    "letters": ("a" * LONG, "no_answer"),
    "reasoning": ("<think>" * 1000 + "</think>" * 3000, "no_answer"),
    "brackets": (TAGGED("(" * 249 + "1" + ")" * 249), "invalid_expression"),
    "formulas": (TAGGED(r"\(" * 120 + "1" + r"\)" * 120), "invalid_expression"),
    "open formulas": (TAGGED(r"\[" * 249), "invalid_expression"),
    "bold": (TAGGED("**a" * 166), "invalid_expression"),
    "dollars": (TAGGED("$" * 499), "invalid_expression"),
    "fences": (TAGGED("```" * 166), "invalid_expression"),
    "full stops": (TAGGED("." * 499), "invalid_expression"),
    "fractions": (TAGGED(r"\frac{1}{" * 50), "invalid_expression"),
    "thousands": (TAGGED("1" + ",000" * 124), "wrong_numbers"),
    "chain": (TAGGED("1=" * 249 + "1"), "wrong_numbers"),
    "chain of fractions": (TAGGED("=".join(f"1/{n}" for n in range(900, 983))), "wrong_numbers"),
    "equals inside": (TAGGED("=" * LONG), "invalid_expression"),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_an_adversarial_text_is_rejected_and_stalls_nothing(name):
    text, expected = ADVERSARIAL[name]
    start = time.process_time()
    verdict = verify(text, (1, 2), 4)
    assert time.process_time() - start < 1  # the goal, 10 ms, is in benchmarks/verifiers.py
    assert verdict.reason == expected and not verdict.ok


# ---------------------------------------------------------------- properties


@st.composite
def solved(draw):
    """A random expression tree over some numbers: (text of it, its numbers, its value)."""
    nums = draw(st.lists(st.integers(0, 120), min_size=1, max_size=6))
    nodes = [(str(n), Fraction(n)) for n in draw(st.permutations(nums))]
    while len(nodes) > 1:
        (a, x), (b, y) = (nodes.pop(draw(st.integers(0, len(nodes) - 1))) for _ in range(2))
        symbol = draw(st.sampled_from("+-*/" if y else "+-*"))
        result = {"+": x + y, "-": x - y, "*": x * y, "/": x / (y or 1)}[symbol]
        nodes.append((f"({a}{symbol}{b})", result))
    return nodes[0][0], nums, nodes[0][1]


@settings(deadline=None)
@given(solved())
@example(("(3-(8/3))", [8, 3, 3], Fraction(1, 3)))
def test_an_expression_over_the_given_numbers_is_ok_exactly_at_its_value(problem):
    expression, nums, result = problem
    assert value(expression) == result
    assert sorted(_read(_tokens(expression))[1]) == sorted(nums)
    assert reason(expression, nums, result) == "ok"
    assert reason(expression, nums, result + 1) == "missed_target"
    assert reason(expression, [*nums, 1], result) == "wrong_numbers"


@settings(deadline=None)
@given(solved(), st.integers(-3, 3), st.randoms(use_true_random=False))
def test_the_order_of_the_given_numbers_does_not_matter(problem, off, rng):
    expression, nums, result = problem
    shuffled = rng.sample(nums, len(nums))
    assert reason(expression, shuffled, result + off) == reason(expression, nums, result + off)


@settings(deadline=None)
@given(st.text(), st.lists(st.integers(0, 9), max_size=4), st.integers(-9, 9))
def test_any_text_gets_a_verdict(text, nums, target):
    assert verify(text, nums, target).reason in REASONS
    assert reason(text, nums, target) in REASONS - {"no_answer"}


@pytest.mark.parametrize(
    "text",
    [
        '<answer>3*5</answer>, as in "<answer>(1 + 2) / 3</answer>"',
        "<answer>3*5</answer> (the form was `<answer>1 + 2</answer>`)",
        "`<answer>3*5</answer>`",
        "<answer>3*5。</answer>",
    ],
)
def test_an_answer_in_quotation_marks_is_a_mention_where_another_stands(text):
    assert verify(text, [3, 5], 15).ok


@pytest.mark.parametrize("macro", ["left", "big", "mathbf", "boxed"])
def test_a_macro_does_not_glue_digits_together(macro):
    assert verify(f"<answer>2\\{macro}3</answer>", [23], 23).reason == "invalid_expression"
