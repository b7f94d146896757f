"""Tables to figures: one function a figure, DataFrame -> matplotlib Figure, no global state.

A condition has one colour everywhere, a policy one marker; every estimate has its 95% interval,
and n and seeds stand in the legend. Colours are Okabe and Ito's, safe for colour-blind readers.
"""

from html import escape
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .conditions import CONDITIONS, FIRST_TRY, REFLECT_RETRY
from .episodes import UNTRAINED
from .errors import R3Error
from .evaluate import pooled

GREY, BLUE, PINK, DARK = "#777777", "#0072B2", "#CC79A7", "#444444"
SEEDS = [BLUE, "#D55E00", "#009E73", PINK, "#E69F00", "#56B4E9"]
POLICIES = {UNTRAINED: (GREY, "o", "untrained"), "r3": (BLUE, "o", "trained (R3)")}
COLUMNS = {  # the paper's four columns: colour, marker, label
    "vanilla_first": (GREY, "o", "untrained, first try"),
    "vanilla_second": (GREY, "^", "untrained, both tries"),
    "trained_first": (BLUE, "o", "trained, first try"),
    "trained_second": (BLUE, "^", "trained, both tries"),
}
METRICS = {
    "reward": "reward",
    "retry_success": "second tries that succeed",
    "zero_variance_share": "groups without variance",
    "reflection_tokens": "reflection length (tokens)",
    "truncated_share": "reflections cut off at the limit",
    "kl": "KL from the reference",
    "entropy": "entropy (nats a token)",
    "grad_norm": "gradient norm",
}
RATE = ("rate", "lo", "hi")
SHARE = ("share", "lo", "hi")
ABOVE = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False, "fontsize": 8.5}
BELOW = {"loc": "outside lower center", "frameon": False, "fontsize": 9, "title_fontsize": 9}
LITERAL = "tex2jax_ignore mathjax_ignore"  # in a notebook, too, two dollar signs make no formula
ROLES = {
    "task": "#e4ebf7",
    "attempt": "#f8e0e0",
    "request": "#eef1f5",
    "reflection": "#dff1e4",
    "retry": "#fdf0d5",
}


def conditions_figure(
    accuracy: pd.DataFrame, conditions=CONDITIONS, first_tries: bool = False
) -> Figure:
    """Second tries under each condition, a panel a task; from `evaluate.accuracy_table`.

    `first_tries`: these too, as a share of all problems.
    """
    label = "tries that succeed: first of all problems, second of failures"
    if not first_tries:
        accuracy = accuracy[accuracy.condition != FIRST_TRY.name]
        label = "second tries that succeed, of failures"
    if accuracy.empty:
        raise R3Error(
            "no first try failed, so that there are no second tries to show: raise test_problems, "
            "or take harder problems (task_options)"
        )
    table = pooled(accuracy)
    colors = {c.name: c.color for c in conditions}
    order = list(table.condition.unique())
    tasks = dict(list(table.groupby("task", sort=False)))
    heights = [1.4 + 0.2 * len(order) * part.policy.nunique() for part in tasks.values()]
    fig, axes = _figure(1, sum(heights), rows=heights)
    for ax, (task, part) in zip(axes, tasks.items()):
        _dots(ax, part, "condition", order, RATE, colors=colors)
        _legend(ax, part[part.condition != FIRST_TRY.name], "failures", title=task, color="#222222")
    axes[-1].set_xlabel(label)
    return fig


def parts_figure(accuracy: pd.DataFrame) -> Figure:
    """Second tries after a reflection in each part of the test problems; from `by_part`'s table."""
    table = pooled(accuracy[accuracy.condition == REFLECT_RETRY.name])
    sizes = table.assign(n=table.groupby("policy").n.transform("sum"))
    label = "second tries after a reflection that succeed, of failures"
    return _one_panel(table, "split", RATE, label, sizes, "failures", count=True)


def paper_figure(view: pd.DataFrame, paper: pd.DataFrame) -> Figure:
    """Both tries before and after training: this run beside the paper's Tables 1 and 2.

    `view` is `evaluate.paper_view`, `paper` data/paper_results.csv, of which cells of confidence B
    get a dagger and those of confidence C are not drawn.
    """
    ours = view[view.policy.isin(POLICIES)]
    ours = ours.assign(model="this run", value=100 * ours.rate, confidence="ours")
    cells = pd.concat([ours, paper[(paper.confidence != "C") & paper.task.isin(ours.task)]])
    tasks = dict(list(cells.groupby("task", sort=False)))
    heights = [part.model.nunique() for part in tasks.values()]
    fig, axes = _figure(1, 1.4 + 0.45 * sum(heights), rows=heights)
    for ax, (task, part) in zip(axes, tasks.items()):
        _beside_the_paper(ax, part)
        policies = ours[ours.task == task].drop_duplicates("policy").itertuples()
        sizes = "; ".join(_size(row, "first tries") for row in policies)
        ax.set_title(f"{_label(task)}\nthis run: {sizes}", fontsize=9, loc="left")
    marks = []
    for color, marker, label in COLUMNS.values():
        marks.append(Line2D([], [], ls="", marker=marker, color=color, label=label))
    title = "filled: this run, 95% interval; hollow: the paper († second-hand, fits its averages)"
    fig.legend(handles=marks, title=title, ncols=4, **BELOW)
    return fig


def _beside_the_paper(ax, cells):
    """A row a model: this run's cells (filled, with intervals) and the paper's (hollow)."""
    models = list(cells.model.unique())
    for cell in cells.itertuples():
        color, marker, _ = COLUMNS[cell.column]
        y = models.index(cell.model) + (0.16 if cell.column.startswith("trained") else -0.16)
        ax.plot([100 * cell.lo, 100 * cell.hi], [y, y], color=color)
        fill = color if cell.confidence == "ours" else "white"
        ax.plot(cell.value, y, marker, color=color, markerfacecolor=fill, markersize=7)
        if cell.confidence == "B":
            ax.annotate("†", (cell.value, y), (0, 3), textcoords="offset points", ha="center")
    ax.set(xlabel="correct (%)", xlim=(0, 100), ylim=(len(models) - 0.4, -0.6))
    ax.set_yticks(range(len(models)), map(_label, models))


def training_figure(metrics: pd.DataFrame) -> Figure:
    """Training curves, a line a seed; from metrics.jsonl. A metric without values has no panel."""
    shown = [name for name in METRICS if name in metrics and metrics[name].notna().any()]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    fig, axes = _figure(columns, 0.8 + 2 * rows, rows=[1] * rows)
    for ax, name in zip(axes, shown):
        for color, (seed, run) in zip(cycle(SEEDS), metrics.sort_values("step").groupby("seed")):
            ax.plot(run.step, run[name], color=color, lw=1.2, label=f"seed {seed}")
        ax.set_title(METRICS[name], fontsize=10)
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    fig.legend(*axes[0].get_legend_handles_labels(), ncols=6, **BELOW)
    return fig


def errors_figure(errors: pd.DataFrame) -> Figure:
    """Why first tries fail, before and after (the paper's Tables 4, 5); `failures.error_types`."""
    return _one_panel(errors, "reason", SHARE, "share of all first tries", errors, "first tries")


def transitions_figure(transitions: pd.DataFrame) -> Figure:
    """From the first try's failure (row) to the second try's verdict; `failures.transitions`.

    Each cell has its share of the row, which its shade shows too, and its count.
    """
    policies = list(transitions.policy.unique())
    before = list(transitions.attempt_reason.unique())
    after = list(transitions.retry_reason.unique())
    fig, axes = _figure(len(policies), 1.9 + 0.5 * len(before))
    for ax, policy in zip(axes, policies):
        part = transitions[transitions.policy == policy]
        table = part.pivot(index="attempt_reason", columns="retry_reason", values="share")
        ax.imshow(table.loc[before, after], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for cell in part[part.n > 0].itertuples():
            place = after.index(cell.retry_reason), before.index(cell.attempt_reason)
            ink = "white" if cell.share > 0.55 else "black"
            text = f"{cell.share:.0%}\nn={cell.n:,}"
            ax.text(*place, text, ha="center", va="center", color=ink, fontsize=7.5)
        ax.set_title(f"{_label(style(policy)[2])}\nn={part.n.sum():,} failures", fontsize=10)
        ax.set_xticks(range(len(after)), map(_label, after), rotation=35, ha="right")
        ax.set_yticks(range(len(before)), [""] * len(before))
        ax.set_xlabel("second try")
        ax.grid(False)
    axes[0].set_yticklabels(map(_label, before))
    axes[0].set_ylabel("first try")
    return fig


def styles_figure(stats: pd.DataFrame) -> Figure:
    """How often a style of reflection is written, and its retry succeeds; `reflection_stats`."""
    styles = stats[stats["style"] != "all"]
    order = list(styles.groupby("style").n.sum().sort_values(ascending=False).index)
    fig, axes = _figure(2, 1.5 + 0.24 * len(order) * styles.policy.nunique())
    _dots(axes[0], styles, "style", order, ("share", "share_lo", "share_hi"))
    _dots(axes[1], styles, "style", order, ("success", "success_lo", "success_hi"), count=True)
    axes[0].set_xlabel("share of reflections")
    axes[1].set(xlabel="second tries that succeed", yticklabels=[])
    _legend(axes[0], stats[stats["style"] == "all"], "reflections")
    return fig


def reflections_figure(rows: pd.DataFrame, limit: int) -> Figure:
    """Length and repetition of reflections (the paper's Fig. 2); from `failures.reflection_rows`.

    Dashed: means. `limit`, the most tokens of a reflection, is marked; the legend gives the share
    that is as long (cut off).
    """
    fig, axes = _figure(2, 3.4)
    axes[0].axvline(limit, color="#222222", lw=1, ls=":", label=f"limit: {limit} tokens")
    for ax, column in zip(axes, ("tokens", "repetition")):
        bins = np.linspace(0, max(0.05, rows[column].max()), 25)
        for policy, part in rows.groupby("policy", sort=False):
            color, _, name = style(policy)
            text = f"{_label(name)}: n={len(part):,}, mean {part[column].mean():.3g}"
            if column == "tokens":
                text += f", {part.tokens.ge(limit).mean():.1%} cut off"
            outline = {"histtype": "step", "lw": 1.5, "color": color, "label": text}
            ax.hist(part[column], bins, weights=np.full(len(part), 1 / len(part)), **outline)
            ax.axvline(part[column].mean(), color=color, lw=1, ls="--")
        ax.yaxis.set_major_formatter(PercentFormatter(1, 0))
        ax.legend(**ABOVE)
    axes[0].set(xlabel="reflection length (tokens)", ylabel="share of reflections")
    axes[1].set_xlabel("share of word 3-grams that repeat")
    return fig


def arithmetic_figure(table: pd.DataFrame) -> Figure:
    """Share of right arithmetic inside reflections; from `failures.arithmetic_table`.

    A row a seed and one over all. The axis starts at the multiple of 5% below all intervals.
    """
    table = table.assign(n=table.steps, seeds=table.groupby("policy").seed.transform("size") - 1)
    table = table.sort_values("seed", key=lambda seed: seed.astype(str), kind="stable")
    table = table.assign(seed="seed " + table.seed.astype(str)).replace("seed all", "all seeds")
    pooled = table[table.seed == "all seeds"]
    label = "arithmetic steps inside reflections that are right"
    fig = _one_panel(table, "seed", SHARE, label, pooled, "steps", count=True)
    fig.axes[0].set_xlim(left=np.floor(20 * table.lo.fillna(0).min()) / 20)
    return fig


def mask_html(tokens: list[str], mask: list[int], roles: list[str]) -> str:
    """A conversation as HTML, escaped: background by role, trained tokens bold and underlined.

    One string a token, one 0 or 1, one role: a key of `ROLES`.
    """
    spans = []
    for token, trained, role in zip(tokens, mask, roles, strict=True):
        span = _span(token, role)
        spans.append(f"<b><u>{span}</u></b>" if trained else span)  # shown also without styles
    key = " ".join(_span(role, role) for role in dict.fromkeys(roles))
    key += " · bold and underlined: trained; everything else has advantage 0"
    box = "font-family:monospace;white-space:pre-wrap;line-height:1.9;color:#111;background:#fff"
    text = f"{''.join(spans)}<br><small>{key}</small>"
    return f'<div class="{LITERAL}" style="{box};padding:8px">{text}</div>'


def _span(text, role) -> str:
    return f'<span style="background:{ROLES[role]}" title="{role}">{escape(text)}</span>'


def texts_html(table: pd.DataFrame) -> str:
    """A table with texts of a model as HTML: line breaks kept, all escaped, no formulas."""
    shown = table.style.format(escape="html", precision=2)
    shown = shown.format_index(escape="html").format_index(escape="html", axis="columns")
    shown = shown.set_table_attributes(f'class="{LITERAL}"')
    return shown.set_properties(**{"text-align": "left", "white-space": "pre-wrap"}).to_html()


def _one_panel(table, category, values, label, sizes, unit, count=False) -> Figure:
    """A row a category, in the order of the table; `sizes` holds n and seeds of each policy."""
    order = list(table[category].unique())
    fig, (ax,) = _figure(1, 1.4 + 0.25 * len(order) * table.policy.nunique())
    _dots(ax, table, category, order, values, count=count)
    ax.set_xlabel(label)
    _legend(ax, sizes, unit)
    return fig


def _dots(ax, table, category, order, values, colors=None, count=False):
    """A row a category, in it a dot with interval a policy, the rate written beside it.

    `values` names the columns of rate and interval; `colors`, by category, are the policies' else.
    """
    policies = list(table.policy.unique())
    for cell in table.dropna(subset=[values[0]]).to_dict("records"):
        rate, lo, hi = (cell[name] for name in values)
        color, marker, _ = style(cell["policy"])
        color = (colors or {}).get(cell[category], color)
        offset = policies.index(cell["policy"]) - (len(policies) - 1) / 2
        y = order.index(cell[category]) + 0.8 * offset / len(policies)
        ax.plot([lo, hi], [y, y], color=color, lw=1.8, clip_on=False)
        fill = "white" if cell["policy"] == UNTRAINED else color
        dot = {"color": color, "markerfacecolor": fill, "markersize": 6}
        ax.plot(rate, y, marker, **dot, clip_on=False)
        text = f"{rate:.1%}" + (f", n={cell['n']:,}" if count else "")
        beside = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        ax.annotate(text, (hi, y), **beside)
    ax.set_xlim(0, max(0.01, table[values[2]].max()))
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_yticks(range(len(order)), map(_label, order))
    ax.xaxis.set_major_formatter(PercentFormatter(1, 0))


def _legend(ax, table, unit, title=None, color=None):
    """Legend above `ax` of the policies in `table` (columns policy, n, seeds)."""
    marks = []
    for row in table.drop_duplicates("policy").itertuples():
        own, marker, _ = style(row.policy)
        fill = "white" if row.policy == UNTRAINED else color or own
        line = {"marker": marker, "color": color or own, "markerfacecolor": fill}
        marks.append(Line2D([], [], **line, label=_size(row, unit)))
    columns = 1 if len(ax.figure.axes) > 1 else 2
    ax.legend(handles=marks, title=title and _label(title), ncols=columns, **ABOVE)


def _size(row, unit) -> str:
    name = _label(style(row.policy)[2])
    return f"{name}, n={row.n:,} {unit}, {row.seeds} seed{'s' * (row.seeds > 1)}"


def style(policy: str) -> tuple[str, str, str]:
    """Colour, marker and label of a policy."""
    if "_from_" in policy:
        return PINK, "s", f"trained on {policy.partition('_from_')[2]}"
    return POLICIES.get(policy, (DARK, "X", policy))


def _label(text, longest: int = 36) -> str:
    """`text` without formulas, which two dollar signs would make, cut to leave the axes room."""
    text = str(text)
    short = text if len(text) <= longest else text[: longest - 1] + "…"
    return short.replace("$", r"\$")


def _figure(columns, height, rows=(1,)):
    """A Figure of notebook width and its axes in reading order."""
    fig = Figure((7.4, height), layout="constrained", dpi=120)
    axes = fig.subplots(len(rows), columns, squeeze=False, height_ratios=rows).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", color="#dddddd", lw=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8.5)
    return fig, axes
