"""
Does what wins on a laptop say something about FineWeb? Writes the tables and the picture of transfer.md.

    python records/transfer.py

For each technique: what Slowrun's history says that it gained on 100M tokens of FineWeb, and what the
ablations of this repository say that it is worth here. All figures but Slowrun's come from the logs in
ablations/.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pictures import INK, figure, save_picture
from reading import HERE
from sweeps import difference, read_groups, table_head, write_between

# A column: the dataset of the ablations, what their names begin with, and the column's title.
COLUMNS = (
    ("prose", "", "prose, 5 epochs"),
    ("prose", "strong_", "prose, 14 epochs"),
    ("pocket", "", "pocket, 5 epochs"),
)

# The standard error of a step in Slowrun's history: single runs, and reruns of one script differ by 0.005.
SLOWRUN_ERROR = 0.005


class Technique(NamedTuple):
    """slowrun: nats per token by track, L limited, T tiny, H two hours, U unlimited, below zero where it
    helped. run: the ablation, whose control lacks the technique, or has it, if it is named no_... or neither.
    comparable: whether both ask the same question, so that it counts in the correlations."""

    name: str
    slowrun: dict
    run: str
    comparable: bool = True


# Steps of https://github.com/qlabs-eng/slowrun's history, in the order of its limited track. Some of them
# were bundled with tuning. Where a track has two steps of a technique, this is their sum. Ensembles took many
# times the FLOPs of a single model there, and take as many here.
TECHNIQUES = (
    Technique("value projections from x0", {"L": -0.027}, "no_value_proj"),
    Technique("U-Net skips", {"L": -0.021, "T": -0.015}, "no_unet"),
    Technique("a gate for each head", {"L": -0.019, "T": -0.010}, "no_attn_gate"),
    Technique("looped layers", {"L": -0.017, "T": -0.013}, "loops"),
    Technique("XSA", {"L": -0.002, "T": -0.003}, "xsa"),
    Technique("EMA of the weights", {"L": -0.018, "T": -0.012}, "ema"),
    Technique("SWA: cosine cycles, their ends averaged", {"L": -0.012, "T": -0.008}, "cycles"),
    Technique("the last epochs' weights averaged", {"L": -0.004}, "averaged"),
    Technique("normal start of the output projections", {"L": -0.006}, "proj_normal"),
    Technique("stochastic depth", {"L": -0.003}, "layer_drop"),
    Technique("multi-token prediction", {"L": -0.005, "T": -0.009}, "mtp"),
    Technique("IHA", {"L": -0.008, "H": -0.006}, "iha"),
    Technique("schedule of decay and rate", {"L": -0.009, "T": -0.009, "H": -0.038}, "decay_cycles"),
    Technique("half RoPE with key offset", {"T": -0.009}, "key_offset"),
    Technique("windows that grow", {"H": -0.006}, "growing_windows"),
    Technique("meta-gradient", {"L": -0.012, "T": -0.012}, "meta"),
    Technique("an ensemble of independent models", {"U": -0.138}, "members2", comparable=False),
    Technique("chain distillation", {"U": -0.040}, "chain2", comparable=False),
    Technique("look-ups: recall", {}, "recall"),
    Technique("look-ups: memory, on top of recall", {}, "memory"),
    Technique("an n-gram model in the logits", {}, "ngrams"),
    Technique("bags of two (TST)", {}, "bags2"),
    Technique("bags of four (TST)", {}, "bags4"),
    Technique("dropout of 0.1", {}, "dropout"),
    Technique("three further targets, annealed, instead of one", {}, "mtp3"),
    Technique("square-root warmdown", {}, "sqrt_warmdown"),
)

# Ablations on pocket that ask the same question under another name, or the other way around.
POCKET_NAMES = {"recall": "neither", "memory": "no_memory"}

FINEWEB = "FineWeb (Slowrun)"
# Where a point's number may stand: (to its right, above it).
SIDES = ((False, True), (True, True), (False, False), (True, False))
DRAWS = 10_000


def slowrun_gain(technique):
    """Mean over the tracks that took a step with it; None where none did."""
    if not technique.slowrun:
        return None
    return float(np.mean(list(technique.slowrun.values())))


def effect(technique, groups, prefix, names):
    """(change in loss with the technique, its standard error, p, seeds) by these ablations; None without."""
    run = names.get(technique.run, technique.run)
    group = groups.get(prefix + run)
    if group is None or group["control"] not in groups:
        return None
    c = difference(group, groups[group["control"]])
    sign = -1 if run.startswith(("no_", "neither")) else 1
    return sign * c["mean"], c["error"], c["p"], len(group["logs"])


def ranks(x):
    """Ranks from 0, [..., n]."""
    return np.argsort(np.argsort(x, axis=-1), axis=-1)


def rank_correlation(a, b):
    """(Spearman's coefficient, its 95% interval) of two columns, each (values [n], standard errors [n]).

    The interval is that of draws of the techniques with replacement, and of the values around what was
    measured. Ties, which the former makes, are broken by the latter.
    """
    rng = np.random.default_rng(0)
    n = len(a[0])
    pick = rng.integers(n, size=(DRAWS, n))
    drawn = []
    for values, errors in (a, b):
        noise = rng.normal(size=(DRAWS, n))
        drawn.append(ranks(values[pick] + errors[pick] * noise))
    centered = [x - (n - 1) / 2 for x in drawn]
    draws = (centered[0] * centered[1]).mean(1) / ((n * n - 1) / 12)
    measured = [ranks(values) - (n - 1) / 2 for values, _ in (a, b)]
    rho = float((measured[0] * measured[1]).mean() / ((n * n - 1) / 12))
    low, high = np.quantile(draws, [0.025, 0.975])
    return rho, (float(low), float(high))


def read_columns():
    """{title of a column: {technique: (change in loss, standard error, p, seeds)}}, FineWeb's first."""
    columns = {FINEWEB: {}}
    for technique in TECHNIQUES:
        gain = slowrun_gain(technique)
        if gain is not None:
            error = SLOWRUN_ERROR / np.sqrt(len(technique.slowrun))
            columns[FINEWEB][technique.name] = (gain, error, None, len(technique.slowrun))
    for dataset, prefix, title in COLUMNS:
        groups = read_groups(HERE / "ablations" / dataset)
        names = POCKET_NAMES if dataset == "pocket" else {}
        found = {technique.name: effect(technique, groups, prefix, names) for technique in TECHNIQUES}
        columns[title] = {name: value for name, value in found.items() if value is not None}
    return columns


def technique_rows(columns):
    lines = table_head("", "technique", *columns)
    for number, technique in enumerate(TECHNIQUES, start=1):
        cells = [str(number), technique.name]
        for title, column in columns.items():
            cells.append(cell(technique, column.get(technique.name), title == FINEWEB))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cell(technique, value, is_slowrun):
    if value is None:
        return ""
    if is_slowrun:
        return ", ".join(f"{track} {gain:+.3f}" for track, gain in technique.slowrun.items())
    mean, _, p, seeds = value
    return f"{mean:+.4f} (p = {p:.1g}, {seeds} seeds)"


def correlation_rows(columns):
    lines = table_head("columns", "techniques in both", "rank correlation", "95% interval")
    titles = list(columns)
    names = [technique.name for technique in TECHNIQUES if technique.comparable]
    for i, first in enumerate(titles):
        for second in titles[i + 1 :]:
            both = [name for name in names if name in columns[first] and name in columns[second]]
            if len(both) < 4:
                continue
            a, b = (np.array([columns[title][name][:2] for name in both]).T for title in (first, second))
            rho, (low, high) = rank_correlation(a, b)
            lines.append(f"| {first} and {second} | {len(both)} | {rho:+.2f} | {low:+.2f} to {high:+.2f} |")
    return lines


def draw_transfer(columns, theme):
    """Each comparable technique's change in loss on FineWeb against the one here, under its number in the
    table: a panel for each column that has any."""
    titles = [title for title in columns if title != FINEWEB and columns[title]]
    fig, [axes] = figure(theme, len(titles), 4)
    for ax, title in zip(axes, titles, strict=True):
        points = {}  # by number
        for number, technique in enumerate(TECHNIQUES, start=1):
            name = technique.name
            if technique.comparable and name in columns[title] and name in columns[FINEWEB]:
                x, x_error, _, _ = columns[title][name]
                y, y_error, _, _ = columns[FINEWEB][name]
                ax.errorbar(x, y, y_error, x_error, "o", color=INK[theme]["blue"], elinewidth=0.8)
                points[number] = x, y
        # The numbers of points that are close together go to different sides of them, from the left on.
        reach = 0.08 * np.ptp(list(points.values()), axis=0)
        placed = []
        for number, point in sorted(points.items(), key=lambda item: item[1]):
            close = sum((abs(np.subtract(other, point)) < reach).all() for other in placed)
            placed.append(point)
            right, above = SIDES[close % len(SIDES)]
            ax.annotate(
                number,
                point,
                (4 if right else -4, 4 if above else -4),
                textcoords="offset points",
                fontsize=9,
                ha="left" if right else "right",
                va="bottom" if above else "top",
            )
        for line in (ax.axhline, ax.axvline):
            line(0, color=INK[theme]["text"], linewidth=0.8)
        ax.set(title=title, xlabel="change in loss here")
    axes[0].set(ylabel="change in loss on FineWeb")
    return fig


def main():
    columns = read_columns()
    page = HERE / "transfer.md"
    command = "python records/transfer.py"
    write_between(page, "techniques", command, technique_rows(columns))
    write_between(page, "correlations", command, correlation_rows(columns))
    for theme in INK:
        save_picture(HERE / f"transfer_{theme}.svg", draw_transfer(columns, theme), "the logs")


if __name__ == "__main__":
    main()
