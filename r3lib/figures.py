"""Tables to figures: one function a figure, DataFrame -> matplotlib Figure, no global state.

A condition has one colour everywhere, a policy one marker; every estimate has its 95% interval, and n and
seeds stand in the legend. Colours are Okabe and Ito's, told apart by colour-blind readers too.
"""

from html import escape

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .conditions import CONDITIONS
from .episodes import UNTRAINED
from .errors import R3Error

COLORS = {c.name: c.color for c in reversed(CONDITIONS)}
POLICIES = {  # colour, marker, label
    "vanilla": ("#777777", "o", "untrained"),
    "r3": ("#0072B2", "o", "trained (R3)"),
    "r3_mask_both": ("#009E73", "s", "mask: reflection + retry"),
    "r3_mask_retry": ("#CC79A7", "^", "mask: retry"),
    "grpo_first_try": ("#E69F00", "D", "GRPO on first tries"),
}
CELL = ["task", "policy", "train_task", "condition"]
COLUMNS = {  # the paper's four columns
    "vanilla_first": ("#777777", "o", "untrained, 1st try"),
    "vanilla_second": ("#777777", "^", "untrained, both tries"),
    "trained_first": ("#0072B2", "o", "trained, 1st try"),
    "trained_second": ("#0072B2", "^", "trained, both tries"),
}
METRICS = {
    "reward": "reward",
    "retry_success": "retries that succeed",
    "zero_variance_share": "groups without variance",
    "reflection_tokens": "reflection length (tokens)",
    "truncated_share": "reflections cut off at the limit",
    "kl": "KL from the reference",
    "entropy": "entropy (nats a token)",
    "grad_norm": "gradient norm",
}
SEEDS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
BELOW = {"loc": "outside lower center", "frameon": False, "fontsize": 9, "title_fontsize": 9}
ABOVE = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False, "fontsize": 8.5}
NO_FORMULAS = "tex2jax_ignore mathjax_ignore"  # what is between two dollar signs stays text in a notebook, too
OTHER, ROLES = "#eef1f5", {"attempt": "#f8e0e0", "reflection": "#dff1e4", "retry": "#fdf0d5"}
ROLES |= {"task": "#e4ebf7"}


def conditions_figure(accuracy: pd.DataFrame) -> Figure:
    """Second-try success on failures under each condition, a panel a task; from `evaluate.accuracy_table`."""
    _need(accuracy, [*CELL, "seed", "n", "rate", "lo", "hi"], "conditions")
    own = accuracy.train_task.isin([""]) | (accuracy.train_task == accuracy.task)
    return _conditions(accuracy[own & (accuracy.condition != "first_try")])


def transfer_figure(accuracy: pd.DataFrame) -> Figure:
    """The same with the policies that were trained on another task, and first tries (share of all problems)."""
    _need(accuracy, [*CELL, "seed", "n", "rate", "lo", "hi"], "transfer")
    return _conditions(accuracy, "tries that succeed: first of all problems, second of failures")


def parts_figure(accuracy: pd.DataFrame) -> Figure:
    """Success of reflect_retry on failures in each part of the test problems; from `by_part`'s accuracy table."""
    _need(accuracy, [*CELL, "split", "seed", "n", "rate", "lo", "hi"], "parts")
    table = accuracy.assign(seeds=accuracy.groupby([*CELL, "split"]).seed.transform("size") - 1)
    table = table[(table.seed.astype(str) == "all") & (table.condition == "reflect_retry")]
    order = list(table.split.unique())
    fig, (ax,) = _figure(1, 1.4 + 0.25 * len(order) * table.policy.nunique())
    _dots(ax, table, "split", order, ("rate", "lo", "hi"), count=True)
    ax.set_xlabel("retries after a reflection that succeed, of failures")
    _policies(ax, table.assign(n=table.groupby("policy").n.transform("sum")), "failures")
    return fig


def _conditions(table, label="second tries that succeed, of failures") -> Figure:
    """A panel a task, one below the other; a row a condition, a dot a policy."""
    table = table.assign(seeds=table.groupby([*CELL, "split"]).seed.transform("size") - 1)
    table = table[table.seed.astype(str) == "all"]
    order = list(dict.fromkeys([*COLORS, *table.condition]))
    order = [name for name in order if name in set(table.condition)]
    tasks = [part for _, part in table.groupby("task", sort=False)]
    heights = [1.4 + 0.2 * len(order) * part.policy.nunique() for part in tasks]
    fig, axes = _figure(1, sum(heights), rows=heights)
    for ax, part in zip(axes, tasks, strict=True):
        _dots(ax, part, "condition", order, ("rate", "lo", "hi"), COLORS)
        _policies(ax, part[part.condition != "first_try"], "failures", part.task.iloc[0], "#222222")
    axes[-1].set_xlabel(label)
    return fig


def paper_figure(view: pd.DataFrame, paper: pd.DataFrame) -> Figure:
    """Both tries before and after training: this run (filled) beside the paper's Tables 1, 2 (hollow).

    `view` is `evaluate.paper_view`, `paper` data/paper_results.csv. Cells of confidence B get a dagger, those
    of confidence C are not drawn. A panel for each task of `view`.
    """
    _need(view, ["task", "policy", "column", "n", "seeds", "rate", "lo", "hi"], "paper")
    ours = view[view.policy.isin([UNTRAINED, "r3"])]
    ours = ours.assign(model="this run", value=100 * ours.rate, confidence="ours")
    cells = pd.concat([ours, paper[(paper.confidence != "C") & paper.task.isin(ours.task)]])
    heights = ours.task.map(cells.groupby("task").model.nunique()).groupby(ours.task, sort=False).first()
    fig, axes = _figure(1, 1.4 + 0.45 * heights.sum(), rows=list(heights))
    for ax, task in zip(axes, heights.index, strict=True):
        part = cells[cells.task == task]
        names = list(part.model.unique())
        for cell in part.itertuples():
            color, marker, _ = COLUMNS[cell.column]
            y = names.index(cell.model) + (0.16 if cell.column.startswith("trained") else -0.16)
            ax.plot([100 * cell.lo, 100 * cell.hi], [y, y], color=color)
            fill = color if cell.confidence == "ours" else "white"
            ax.plot(cell.value, y, marker, color=color, markerfacecolor=fill, markersize=7)
            if cell.confidence == "B":
                ax.annotate("†", (cell.value, y), (0, 3), textcoords="offset points", ha="center")
        sizes = ours[ours.task == task].drop_duplicates("policy").itertuples()
        said = "; ".join(_size(row, "first tries") for row in sizes)
        ax.set_title(f"{_label(task)}\nthis run: {said}", fontsize=9, loc="left")
        ax.set(xlabel="correct (%)", xlim=(0, 100), ylim=(len(names) - 0.4, -0.6))
        ax.set_yticks(range(len(names)), map(_label, names))
    marks = [Line2D([], [], ls="", marker=m, color=c, label=text) for c, m, text in COLUMNS.values()]
    title = "filled: this run, 95% interval; hollow: the paper († second-hand, fits its averages)"
    fig.legend(handles=marks, title=title, ncols=4, **BELOW)
    return fig


def training_figure(metrics: pd.DataFrame) -> Figure:
    """Training curves, one line a seed; from metrics.jsonl. A metric that was not recorded has no panel.

    Where nothing is taken from the reward it is the share of retries that succeed, which then has no panel.
    """
    _need(metrics, ["step", "seed"], "training")
    shown = [m for m in METRICS if m in metrics and metrics[m].notna().any()]
    if "retry_success" in shown and np.allclose(metrics.retry_success, metrics.reward):
        shown.remove("retry_success")
    rows = max(1, -(-len(shown) // 3))
    fig, axes = _figure(3, 0.4 + 2 * rows, rows=[1] * rows)
    for ax, name in zip(axes, shown, strict=False):
        for i, (seed, run) in enumerate(metrics.sort_values("step").groupby("seed")):
            ax.plot(run.step, run[name], color=SEEDS[i % len(SEEDS)], lw=1.2, label=f"seed {seed}")
        ax.set_title(METRICS[name], fontsize=10)
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for ax in axes[len(shown) :]:
        ax.remove()
    fig.legend(*axes[0].get_legend_handles_labels(), ncols=6, **BELOW)
    return fig


def errors_figure(errors: pd.DataFrame) -> Figure:
    """Why first tries fail, before and after (the paper's Tables 4, 5); from `failures.error_types`."""
    _need(errors, ["policy", "reason", "seeds", "n", "share", "lo", "hi"], "errors")
    order = list(errors.reason.unique())
    fig, (ax,) = _figure(1, 1.4 + 0.25 * len(order) * errors.policy.nunique())
    _dots(ax, errors, "reason", order, ("share", "lo", "hi"))
    ax.set_xlabel("share of all first tries")
    _policies(ax, errors, "first tries")
    return fig


def transitions_figure(transitions: pd.DataFrame) -> Figure:
    """From the first try's failure (row) to the second try's verdict (column); from `failures.transitions`.

    Counts, and colour by the share of the row.
    """
    _need(transitions, ["policy", "attempt_reason", "retry_reason", "n", "share"], "transitions")
    policies = list(transitions.policy.unique())
    before, after = (list(transitions[c].unique()) for c in ("attempt_reason", "retry_reason"))
    rows = -(-len(policies) // 2)
    fig, axes = _figure(min(2, len(policies)), rows * (1.9 + 0.45 * len(before)), rows=[1] * rows)
    for ax, policy in zip(axes, policies, strict=False):
        part = transitions[transitions.policy == policy]
        shares = part.pivot(index="attempt_reason", columns="retry_reason", values="share").loc[before, after]
        ax.imshow(shares.fillna(0), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for cell in part.itertuples():
            ink = "white" if cell.share > 0.55 else "black"
            where = after.index(cell.retry_reason), before.index(cell.attempt_reason)
            ax.text(*where, f"{cell.n:,}", ha="center", va="center", color=ink, fontsize=8)
        ax.set_xticks(range(len(after)), map(_label, after), rotation=35, ha="right")
        ax.set_yticks(range(len(before)), map(_label, before) if ax in axes[::2] else [""] * len(before))
        ax.set_title(f"{_style(policy)[2]}\nn={part.n.sum():,} failures", fontsize=10)
        ax.set_xlabel("second try")
        ax.grid(False)
    for ax in axes[::2]:
        ax.set_ylabel("first try")
    for ax in axes[len(policies) :]:
        ax.remove()
    return fig


def styles_figure(stats: pd.DataFrame) -> Figure:
    """How often each style of reflection is written, and how often its retry succeeds; `reflection_stats`."""
    _need(stats, ["policy", "style", "seeds", "n", "share", "success"], "styles")
    styles = stats[stats["style"] != "all"]
    order = list(styles.groupby("style").n.sum().sort_values(ascending=False).index)
    fig, axes = _figure(2, 1.5 + 0.24 * len(order) * styles.policy.nunique())
    _dots(axes[0], styles, "style", order, ("share", "share_lo", "share_hi"))
    _dots(axes[1], styles, "style", order, ("success", "success_lo", "success_hi"), count=True)
    axes[0].set_xlabel("share of reflections")
    axes[1].set(xlabel="retries that succeed", yticklabels=[])
    _policies(axes[0], stats[stats["style"] == "all"], "reflections")
    return fig


def reflections_figure(rows: pd.DataFrame, limit: int) -> Figure:
    """Length and repetition of reflections (the paper's Fig. 2), dashed: means; `failures.reflection_rows`.

    `limit`, the most tokens of a reflection, is marked; the legend gives the share that is as long (cut off).
    """
    _need(rows, ["policy", "tokens", "repetition"], "reflections")
    fig, axes = _figure(2, 3.4)
    axes[0].axvline(limit, color="#222222", lw=1, ls=":", label=f"limit: {limit} tokens")
    for ax, column in zip(axes, ("tokens", "repetition"), strict=True):
        bins = np.linspace(0, max(0.05, rows[column].max()), 25)
        for policy, part in rows.groupby("policy", sort=False):
            color, _, name = _style(policy)
            said = f"{name}: n={len(part):,}, mean {part[column].mean():.3g}"
            if column == "tokens":
                said += f", {part.tokens.ge(limit).mean():.1%} cut off"
            weights = np.full(len(part), 1 / len(part))
            ax.hist(part[column], bins, weights=weights, histtype="step", lw=1.5, color=color, label=said)
            ax.axvline(part[column].mean(), color=color, lw=1, ls="--")
        ax.yaxis.set_major_formatter(PercentFormatter(1, 0))
        ax.legend(**ABOVE)
    axes[0].set(xlabel="reflection length (tokens)", ylabel="share of reflections")
    axes[1].set_xlabel("share of word 3-grams that repeat")
    return fig


def arithmetic_figure(table: pd.DataFrame) -> Figure:
    """Share of right arithmetic inside reflections, by seed and over all; from `failures.arithmetic_table`."""
    _need(table, ["policy", "seed", "steps", "share", "lo", "hi"], "arithmetic")
    table = table.assign(n=table.steps, seeds=table.groupby("policy").seed.transform("size") - 1)
    table = table.assign(seed="seed " + table.seed.astype(str)).replace({"seed": {"seed all": "all seeds"}})
    order = sorted(table.seed.unique())
    fig, (ax,) = _figure(1, 1.2 + 0.25 * len(order) * table.policy.nunique())
    _dots(ax, table, "seed", order, ("share", "lo", "hi"), count=True)
    ax.set_xlabel("arithmetic steps inside reflections that are right")
    _policies(ax, table[table.seed == "all seeds"], "steps")
    return fig


def mask_html(tokens: list[str], mask: list[int], roles: list[str]) -> str:
    """A conversation as HTML: background by role, trained tokens (mask 1) bold and underlined.

    One string a token, one 0 or 1, one role ("task", "attempt", "request", "reflection", "retry"); everything
    is escaped.
    """
    if len({len(tokens), len(mask), len(roles)}) > 1:
        raise R3Error(f"{len(tokens)} tokens, {len(mask)} mask values, {len(roles)} roles: give one of each")
    spans = []
    for token, trained, role in zip(tokens, mask, roles, strict=True):
        note = f"{role}: {'trained' if trained else 'masked, advantage 0'}"
        line = "font-weight:bold;border-bottom:2px solid #00734F" if trained else ""
        style = f"background:{ROLES.get(role, OTHER)};{line}"
        spans.append(f'<span style="{style}" title="{escape(note)}">{escape(token)}</span>')
    box = "font-family:monospace;white-space:pre-wrap;line-height:1.9;color:#111;background:#fff;padding:8px"
    shade = '<span style="background:{}">{}</span>'
    legend = " ".join(shade.format(ROLES.get(r, OTHER), escape(r)) for r in dict.fromkeys(roles))
    legend += " · bold and underlined: trained; everything else has advantage 0"
    return f'<div class="{NO_FORMULAS}" style="{box}">{"".join(spans)}<br><small>{legend}</small></div>'


def texts_html(table: pd.DataFrame) -> str:
    """A table that holds texts of a model as HTML: line breaks kept, everything escaped, no formulas."""
    shown = table.style.format(escape="html", precision=2).format_index(escape="html")
    shown = shown.format_index(escape="html", axis="columns").set_table_attributes(f'class="{NO_FORMULAS}"')
    return shown.set_properties(**{"text-align": "left", "white-space": "pre-wrap"}).to_html()


def _dots(ax, table, category, order, values, colors=None, count=False):
    """A row a category, in it a dot with interval a policy, the rate written beside it."""
    policies = list(table.policy.unique())
    step = 0.8 / len(policies)
    for cell in table.dropna(subset=[values[0]]).to_dict("records"):
        rate, lo, hi = (cell[v] for v in values)
        color, marker, _ = _style(cell["policy"])
        color = (colors or {}).get(cell[category], color)
        y = order.index(cell[category]) + (policies.index(cell["policy"]) - (len(policies) - 1) / 2) * step
        ax.plot([lo, hi], [y, y], color=color, lw=1.8, clip_on=False)
        fill = "white" if cell["policy"] == UNTRAINED else color
        ax.plot(rate, y, marker, color=color, markerfacecolor=fill, markersize=6, clip_on=False)
        text = f"{rate:.1%}" + (f", n={cell['n']:,}" if count else "")
        ax.annotate(text, (hi, y), (5, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_xlim(0, max(0.01, table[values[2]].max()))
    ax.set_ylim(len(order) - 0.5, -0.5)
    ax.set_yticks(range(len(order)), map(_label, order))
    ax.xaxis.set_major_formatter(PercentFormatter(1, 0))


def _policies(ax, table, unit, title=None, color=None):
    """Legend above `ax` of the policies in `table` (columns policy, n, seeds): marker, n of `unit`, seeds."""
    marks = []
    for row in table.drop_duplicates("policy").itertuples():
        own, marker, _ = _style(row.policy)
        line = Line2D([], [], marker=marker, color=color or own, label=_size(row, unit))
        line.set_markerfacecolor("white" if row.policy == UNTRAINED else color or own)
        marks.append(line)
    ax.legend(handles=marks, title=title and _label(title), ncols=1 if len(ax.figure.axes) > 1 else 2, **ABOVE)


def _size(row, unit) -> str:
    return f"{_style(row.policy)[2]}, n={row.n:,} {unit}, {row.seeds} seed{'s' * (row.seeds > 1)}"


def _style(policy):
    """Colour, marker and label of a policy."""
    if "_from_" in policy:
        return "#CC79A7", "s", _label(f"trained on {policy.partition('_from_')[2]}")
    return POLICIES.get(policy, ("#444444", "X", _label(policy)))


def _label(text, longest: int = 36) -> str:
    """`text` as matplotlib shows it letter by letter, cut so that it leaves room for the axes.

    Two dollar signs would make a formula of what is between them.
    """
    text = str(text)
    short = text if len(text) <= longest else text[: longest - 1] + "…"
    return short.replace("$", r"\$")


def _need(frame, columns, name):
    """Raise R3Error unless `frame` has rows and `columns`."""
    missing = [c for c in columns if c not in frame]
    if missing or frame.empty:
        what = f"lacks the columns {missing}" if missing else "is empty"
        raise R3Error(f"{name}_figure: its table {what}: see its docstring for the function that makes it")


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
