"""
Data efficiency and the compute multiplier: what a loss is worth on the baseline's curve, in baselines.json.
"""

import numpy as np


def on_curve(points, loss, what="train_tokens"):
    """(how many tokens, or `what`, the baseline needs for a loss; "", or "<" or "≥" where that is a bound).

    Linear between the measured points, and nothing beyond them.
    """
    points = sorted(points, key=lambda p: p["train_tokens"])
    losses = [p["val_loss"] for p in points]
    if loss > losses[0]:
        return points[0][what], "<"
    if loss < losses[-1]:
        return points[-1][what], "≥"
    return float(np.interp(-loss, [-x for x in losses], [p[what] for p in points])), ""


def data_efficiency(curve, loss, budget):
    """(baseline's tokens for this loss / budget, bound), or None where no baseline is measured."""
    if not curve["points"]:
        return None
    tokens, bound = on_curve(curve["points"], loss)
    return tokens / budget, bound


def compute_multiplier(curve, loss, flops):
    """(baseline's training FLOPs for this loss / flops, bound), or None where they are not known."""
    points = curve["points"]
    if not points or not all("train_flops" in p for p in points):
        return None
    needed, bound = on_curve(points, loss, "train_flops")
    return needed / flops, bound


def times(ratio):
    """(12.3, "<") -> <12.3x."""
    if ratio is None:
        return ""
    value, bound = ratio
    digits = 2 if value < 10 else 1
    return f"{bound}{value:.{digits}f}x"
