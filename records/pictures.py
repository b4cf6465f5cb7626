"""
The pictures on the board, and what all pictures of this repository have in common: their size and colors.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from efficiency import times
from reading import Refused

INK = {
    "light": {"text": "#1f2328", "grid": "#d0d7de", "blue": "#0969da", "orange": "#bc4c00"},
    "dark": {"text": "#e6edf3", "grid": "#30363d", "blue": "#4493f8", "orange": "#f0883e"},
}
# Of curves that share a picture; then the same again, dashed.
COLORS = {
    "light": ["#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#59636e"],
    "dark": ["#4493f8", "#f0883e", "#3fb950", "#ab7df8", "#f778ba", "#9198a1"],
}


def figure(theme, columns, height):
    """A matplotlib figure as wide as a page of GitHub, on no background, and its axes.

    Text becomes paths, so that it looks the same everywhere.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    text = INK[theme]["text"]
    grid = INK[theme]["grid"]
    plt.rcParams.update(
        {
            "svg.hashsalt": "tokenrun",
            "svg.fonttype": "path",
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": text,
            "axes.labelcolor": text,
            "xtick.color": text,
            "ytick.color": text,
            "axes.edgecolor": grid,
            "grid.color": grid,
            "axes.grid": True,
            "axes.axisbelow": True,
            "legend.frameon": False,
        }
    )
    return plt.subplots(
        1, columns, figsize=(9, height), sharey=columns > 1, squeeze=False, layout="constrained"
    )


def draw_progress(data, theme):
    """Each record on a line of its own, the newest last: its loss, and its data efficiency."""
    names = [name[11:] for name, _, _ in data["records"]]
    losses = [loss for _, loss, _ in data["records"]]
    ratios = [efficiency[0] for _, _, efficiency in data["records"]]
    blue = INK[theme]["blue"]
    fig, [[left, right]] = figure(theme, 2, 1.4 + 0.32 * len(names))
    y = np.arange(len(names))
    left.plot(losses, y, "o-", color=blue)
    left.set(xlabel="validation loss (nats per token)", yticks=y, yticklabels=names)
    left.margins(x=0.18)
    right.barh(y, ratios, color=blue, height=0.6)
    right.set(xlabel="data efficiency (baseline tokens / budget)")
    right.margins(x=0.14)
    for i, (_, loss, efficiency) in enumerate(data["records"]):
        left.annotate(f"{loss:.4f}", (loss, i), (7, -3), textcoords="offset points", fontsize=9)
        right.annotate(times(efficiency), (efficiency[0], i), (4, -3), textcoords="offset points", fontsize=9)
    left.invert_yaxis()
    return fig


def draw_curve(data, theme):
    """The baseline's loss over its tokens, and each record at the budget.

    A line leads from each record to where the baseline needs as many tokens.
    """
    fig, [[ax]] = figure(theme, 1, 4.4)
    blue = INK[theme]["blue"]
    orange = INK[theme]["orange"]
    points = sorted((p["train_tokens"] / 1e6, p["val_loss"]) for p in data["points"])
    x = [tokens for tokens, _ in points]
    y = [loss for _, loss in points]
    # Data efficiency is read off straight lines between the points; on this axis they are bent.
    tokens = np.geomspace(x[0], x[-1], 200)
    ax.plot(tokens, np.interp(tokens, x, y), color=orange)
    ax.plot(x, y, "o", color=orange, label="baseline: one epoch of the plain recipe")
    if data["look_ups"]:
        points = sorted((p["train_tokens"] / 1e6, p["val_loss"]) for p in data["look_ups"])
        tokens, losses = zip(*points, strict=True)
        ax.plot(tokens, losses, "s--", color=orange, fillstyle="none", label="the same with look-up inputs")

    budget = data["budget"] / 1e6
    for _, loss, (ratio, _) in data["records"]:
        ax.plot([budget, budget * ratio], [loss, loss], ":", color=blue, linewidth=1)
    losses = [loss for _, loss, _ in data["records"]]
    ax.plot([budget] * len(losses), losses, "D", color=blue, label=f"records on {budget:g}M tokens")
    name, loss, efficiency = min(data["records"], key=lambda record: record[1])
    ax.annotate(
        f"{name[11:]}: {times(efficiency)}",
        (budget * efficiency[0] ** 0.5, loss),
        (0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )
    ax.set(xscale="log", xlabel="training tokens (millions)", ylabel="validation loss (nats per token)")
    ax.set_xticks(x, [f"{tokens:g}" for tokens in x])
    ax.minorticks_off()
    ax.legend()
    return fig


def is_drawn(path):
    """Whether a file is a picture that save_picture wrote: all others are somebody's own."""
    return b"drawn from" in path.read_bytes()[:2000]


def draw_losses(data, theme):
    """Training loss on the left, validation loss on the right, over the epochs of each model.

    data: {"curves": of curves.curves_of(), "range": of curves.loss_range()}. A run's models share a color. A
    diamond is the score on the whole validation stream; dotted are evaluations on its first tokens alone.
    """
    fig, [[left, right]] = figure(theme, 2, 4.4)
    colors = COLORS[theme]
    for i, curve in enumerate(data["curves"]):
        color = colors[i % len(colors)]
        style = "-" if i < len(colors) else "--"
        label = curve["name"].replace("$", r"\$")
        last = 0.0
        for model in curve["models"]:
            if model["train"]:
                left.plot(*np.transpose(model["train"]), style, color=color, linewidth=1)
                last = max(last, model["train"][-1][0])
            if model["evals"]:
                of_evals = ":" if model["word"] == "probe" else style
                right.plot(*np.transpose(model["evals"]), of_evals, color=color, marker=".")
        if curve["score"] is not None:
            right.plot(last, curve["score"], "D", color=color, markersize=5)
            label += f": {curve['score']:.4f}"
        left.plot([], [], style, color=color, label=label)
    low, high = data["range"]
    room = 0.04 * (high - low) or 0.1
    left.set(xlabel="epochs", ylabel="training loss (nats per token)", ylim=(low - room, high + room))
    right.set(xlabel="epochs", ylabel="validation loss", xlim=left.get_xlim())
    fig.legend(loc="outside lower center", ncols=2, fontsize=9)
    return fig


def save_pictures(name, draw):
    """Draw NAME_light.svg and NAME_dark.svg with draw(theme), and say so. Refused where a file that nothing
    here has drawn has such a name."""
    paths = {theme: Path(f"{name}_{theme}.svg") for theme in INK}
    for path in paths.values():
        if path.exists() and not is_drawn(path):
            raise Refused(f"--picture {name}: {path} exists, and is no picture of this kind")
        if not path.parent.is_dir():
            raise Refused(f"--picture {name}: {path.parent} is not a folder")
    for theme, path in paths.items():
        save_picture(path, draw(theme), "the logs")
        print(path)


def save_picture(path, fig, digest):
    """Write an SVG in place of an older one. Refused where the file is anything else."""
    import matplotlib.pyplot as plt

    if path.exists() and not is_drawn(path):
        raise Refused(f"{path}: exists, and was not drawn here; choose another name, or move it away")
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, transparent=True, metadata={"Date": None, "Description": f"drawn from {digest}"})
    # Figures that stay open take memory.
    plt.close(fig)
