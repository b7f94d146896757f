"""Every figure of the reference run: nothing collapses, and no text of a model or a task is taken for markup."""

import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from r3lib import figures
from r3lib.episodes import read_episodes
from r3lib.errors import R3Error
from r3lib.failures import (
    arithmetic_table,
    error_types,
    in_categories,
    reflection_rows,
    reflection_stats,
    transitions,
)
from r3lib.tasks import load_task

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "results" / "reference"
TASKS = ("countdown", "function_calling")
LIMIT = 192
HOSTILE = "$x$ <script> <answer> &lt; $\\frac"


@pytest.fixture(scope="module")
def episodes():
    return read_episodes(REFERENCE / "episodes")


@pytest.fixture(scope="module")
def drawn(episodes):
    """Every figure by name, as notebooks 02 to 05 draw it."""
    accuracy = pd.read_csv(REFERENCE / "tables" / "accuracy.csv").fillna({"train_task": ""})
    whole = accuracy[accuracy.split == "test"]
    view = pd.read_csv(REFERENCE / "tables" / "paper_view.csv").fillna({"train_task": ""})
    paper = pd.read_csv(ROOT / "data" / "paper_results.csv")
    found = {"transfer": figures.conditions_figure(whole, first_tries=True), "paper": figures.paper_figure(view, paper)}
    found["conditions"] = figures.conditions_figure(whole[~whole.policy.str.contains("_from_")])
    found["baseline"] = figures.conditions_figure(whole[whole.policy == "vanilla"])
    parts = accuracy[(accuracy.split != "test") & ~accuracy.policy.str.contains("_from_")]
    found["parts"] = figures.parts_figure(parts)
    for task in TASKS:
        found |= {f"{task}_{name}": figure for name, figure in of_task(task, episodes, whole)}
    return found


def of_task(task, episodes, whole):
    own = episodes[(episodes.task == task) & ~episodes.policy.str.contains("_from_")]
    kind, metrics = load_task(task), pd.read_json(REFERENCE / "metrics.jsonl", lines=True)
    yield "conditions", figures.conditions_figure(whole[(whole.task == task) & ~whole.policy.str.contains("_from_")])
    yield "training", figures.training_figure(metrics[metrics.task == task].assign(truncated_share=0.1))
    yield "errors", figures.errors_figure(error_types(own, kind.reasons))
    named = in_categories(own, kind.categories)
    yield "transitions", figures.transitions_figure(transitions(named))
    yield "lengths", figures.reflections_figure(reflection_rows(own, kind.style), LIMIT)
    yield "styles", figures.styles_figure(reflection_stats(own, kind.style, LIMIT))
    yield "arithmetic", figures.arithmetic_figure(arithmetic_table(own))


def laid_out(figure):
    """The figure after its layout, any warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()
    return figure


def shares(figure):
    """Width and height of each axes as shares of the figure's, times the number of axes in a row, in a column."""
    panels = laid_out(figure).axes
    boxes = np.array([(*ax.get_position().min, *ax.get_position().size) for ax in panels])
    columns, rows = (len(set(boxes[:, side].round(3))) for side in (0, 1))
    return boxes[:, 2] * columns, boxes[:, 3] * rows


def test_every_axes_of_every_figure_has_a_reasonable_share_of_it(drawn):
    assert len(drawn) == 5 + 7 * len(TASKS)
    for name, figure in drawn.items():
        widths, heights = shares(figure)
        assert widths.min() > 0.4 and heights.min() > 0.3, (name, widths, heights)


def test_a_figure_of_many_policies_and_tasks_does_not_collapse(drawn):
    policies = ["vanilla", "r3", "own", "r3_from_function_calling"]
    columns = ["attempt_reason", "retry_reason", "n", "share"]
    moves = pd.DataFrame([["missed_target", "ok", 3, 0.5], ["no_answer", "no_answer", 3, 0.5]], columns=columns)
    for count in range(1, len(policies) + 1):
        table = pd.concat([moves.assign(policy=policy) for policy in policies[:count]], ignore_index=True)
        widths, heights = shares(figures.transitions_figure(table))
        assert widths.min() > 0.4 and heights.min() > 0.3, count
    whole = pd.read_csv(REFERENCE / "tables" / "accuracy.csv").fillna({"train_task": ""})
    tasks = pd.concat([whole[whole.split == "test"].assign(task=f"task {i}") for i in range(4)])
    widths, heights = shares(figures.conditions_figure(tasks, first_tries=True))
    assert widths.min() > 0.4 and heights.min() > 0.3 and len(widths) == 4


def test_a_layout_that_fails_is_an_error_in_every_test(request):
    asked = request.config.getini("filterwarnings")
    assert any(line.startswith("error:constrained_layout not applied") for line in asked)
    figure, _ = figures._figure(40, 0.3)
    with pytest.raises(UserWarning, match="constrained_layout not applied"):
        figure.draw_without_rendering()


def words(figure):
    """Every text of a figure as it is drawn, and whether it is drawn as a formula."""
    from matplotlib.text import Text

    laid_out(figure)
    return {text._preprocess_math(text.get_text()) for text in figure.findobj(Text) if text.get_text()}


def test_text_with_dollars_and_tags_is_drawn_letter_by_letter():
    columns = ["policy", "reason", "seeds", "n", "share", "lo", "hi"]
    rows = [[HOSTILE, HOSTILE, 1, 9, 0.5, 0.4, 0.6], ["r3_from_$a$", "$b$ and $c$", 1, 9, 0.5, 0.4, 0.6]]
    found = words(figures.errors_figure(pd.DataFrame(rows, columns=columns)))
    assert {(HOSTILE, False), ("$b$ and $c$", False)} <= found
    assert any("trained on $a$, n=9" in text for text, _ in found)
    assert not any(text for text, formula in found if formula)
    columns = ["policy", "attempt_reason", "retry_reason", "n", "share"]
    moves = pd.DataFrame([[HOSTILE, "$b$", "$c$", 3, 1.0]], columns=columns)
    assert {("$b$", False), ("$c$", False)} <= words(figures.transitions_figure(moves))


def test_long_names_leave_room_for_the_axes():
    columns = ["policy", "reason", "seeds", "n", "share", "lo", "hi"]
    rows = [["own policy " * 20, "own reason " * 20, 1, 9, 0.5, 0.4, 0.6]]
    widths, _ = shares(figures.errors_figure(pd.DataFrame(rows, columns=columns)))
    assert widths.min() > 0.4


def test_the_share_that_is_cut_off_stands_beside_the_limit(episodes):
    own = episodes[(episodes.task == "countdown") & (episodes.policy == "r3")]
    rows = reflection_rows(own, load_task("countdown").style)
    legend = [text for text, _ in words(figures.reflections_figure(rows, LIMIT))]
    share = (rows.tokens >= LIMIT).mean()
    assert f"limit: {LIMIT} tokens" in legend
    assert any(f"{share:.1%} cut off" in text for text in legend)


def titles(metrics):
    return [ax.get_title() for ax in figures.training_figure(metrics).axes if ax.axison]


def test_the_training_figure_has_a_panel_for_every_metric_with_values():
    metrics = pd.DataFrame({"step": [1, 2], "seed": 0, "reward": [0.5, 0.6], "truncated_share": [0.0, 0.2]})
    assert titles(metrics.assign(kl=float("nan"))) == ["reward", "reflections cut off at the limit"]


class Parts(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


def test_a_mask_view_shows_model_text_as_it_is():
    tokens = [HOSTILE, "<answer>", "&lt;"]
    page = Parts(figures.mask_html(tokens, [0, 1, 0], ["task", "reflection", "retry"]))
    assert page.tags == {"div", "span", "br", "small", "b", "u"}
    assert "".join(tokens) in page.text


def test_the_turns_of_a_mask_view_are_coloured_apart():
    html = figures.mask_html(["a", "b", "c", "d", "e"], [0] * 5, ["task", "attempt", "request", "reflection", "retry"])
    assert len({part.split(";")[0] for part in html.split("background:")[2:7]}) == 5


def test_a_table_of_model_text_shows_it_as_it_is():
    texts = {"reflection": [HOSTILE, "two\nlines"], "<b>": ["<answer>1</answer>", "$x$"]}
    table = pd.DataFrame(texts | {"n": [1.0, 0.25]})
    html = figures.texts_html(table)
    page = Parts(html)
    assert page.tags == {"style", "table", "thead", "tbody", "tr", "th", "td"}
    assert all(text in page.text for text in (HOSTILE, "<answer>1</answer>", "two\nlines", "<b>", "0.25"))
    assert "mathjax_ignore" in html and "pre-wrap" in html


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_notebook_shows_text_of_a_model_as_markup(path):
    """It goes through `texts_html`, `mask_html` or print: Styler and Markdown do not escape."""
    cells = json.loads(path.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    numbers = "metrics[shown].tail(1).round(3).style.hide()"
    assert ".style." not in code.replace(".task.style", "").replace(numbers, "")
    for call in re.findall(r"(?:HTML|Markdown)\((.*)", code):
        assert call.startswith(("texts_html(", "mask_html("))


def test_without_a_failure_there_are_no_second_tries_to_draw():
    first = pd.DataFrame({"condition": ["first_try"], "rate": [1.0]})
    with pytest.raises(R3Error, match="no first try failed.*raise test_problems"):
        figures.conditions_figure(first)
