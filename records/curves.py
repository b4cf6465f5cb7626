"""
Watch runs: which there are and how they stand, and their losses side by side.

    python records/curves.py                            all runs in runs/: state, score, and what is wrong
    python records/curves.py A B ... [--picture NAME]   their training and validation losses

A, B: folders of runs, finished or not, records, or log files. The curves are drawn in the terminal and, with
--picture, into NAME_light.svg and NAME_dark.svg.
"""

import argparse
import fcntl
import os
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from judge import claims_so_far, faults_of
from pictures import COLORS, draw_losses, save_pictures
from reading import (
    ROOT,
    Eval,
    Refused,
    Score,
    Step,
    expected_hashes,
    mean_loss,
    printable,
    read_json,
    read_log,
    read_tracks,
    require_keys,
)

# A training curve has at most so many points; each is the mean of the steps near it.
POINTS = 60

# What a training loop that went wrong, or a stranger's folder, may make a file raise.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)


# ---- curves ------------------------------------------------------------------------------------------------


def losses_of(log):
    """The curves of a log's models, in order: [{"train", "evals": [[epochs, nats per token], ...], "word"}].

    The training loss is averaged over neighboring steps. That of bags of tokens is another quantity, and is
    left out. word: of the evaluations, see reading.Eval.
    """
    models = {}
    for entry in log.of(Step):
        model = models.setdefault(entry.member, {"epochs": {}, "train": []})
        model["epochs"][entry.step] = entry.epoch
        if not entry.of_bags:
            model["train"].append([entry.epoch, entry.loss])
    for model in models.values():
        parts = np.array_split(np.array(model["train"]).reshape(-1, 2), POINTS)
        model["train"] = [part.mean(axis=0).round(5).tolist() for part in parts if len(part)]
        model |= {"evals": [], "word": "eval"}
    for entry in log.of(Eval):
        model = models.get(entry.member)
        if model and entry.step in model["epochs"]:
            model["evals"].append([model["epochs"][entry.step], entry.loss])
            model["word"] = entry.word
    return [{name: model[name] for name in ("train", "evals", "word")} for _, model in sorted(models.items())]


def curves_of(path):
    """{"name", "models": as losses_of() has them, "score"} of a run's folder, a record or a log file.

    score: the loss on the whole validation stream, None while there is none. A record's seeds are models of
    one curve, and its score is their mean. Refused where there is no log.
    """
    path = Path(path)
    try:
        logs = [path]
        score = None
        if path.is_dir():
            logs = [path / "log.txt"]
            record = read_json(path / "record.json") if (path / "record.json").exists() else {}
            if "runs" in record:
                logs = [path / Path(run["log"]).name for run in record["runs"]]
                score = mean_loss(record)
        logs = [read_log(log) for log in logs]
    except UNREADABLE as e:
        raise Refused(f"{path}: not a run, a record or a log ({type(e).__name__}: {e})")
    models = []
    for log in logs:
        models += losses_of(log)
    if score is None:
        score = next((entry.val_loss for entry in log.of(Score)), None)
    return {"name": printable(path.resolve().name), "models": models, "score": score}


def text_plot(all_points, last, low, high, width, height):
    """Lines of a plot in characters, of epochs 0 to last and losses low to high. all_points: for each letter
    from A on, its [[epochs, loss], ...]."""
    rows = [[" "] * width for _ in range(height)]
    for i, points in enumerate(all_points):
        for x, y in points:
            row = round((high - y) / max(high - low, 1e-9) * (height - 1))
            if 0 <= row < height:
                column = round(x / last * (width - 1))
                taken = rows[row][column] not in (" ", chr(65 + i))
                rows[row][column] = "*" if taken else chr(65 + i)
    axis = f"0{last:>{width - 1}.3g}"
    return ["".join(row) for row in rows] + ["-" * width, axis]


def loss_range(curves):
    """(lowest, highest) loss to show: the fall from the first weights would flatten all that follows it."""
    shown = [curve["score"] for curve in curves if curve["score"] is not None]
    for curve in curves:
        for model in curve["models"]:
            points = model["train"] + model["evals"]
            last = max((epoch for epoch, _ in points), default=0.0)
            shown += [loss for epoch, loss in points if epoch >= last / 5]
    if not shown:
        return 0.0, 1.0
    return min(shown), max(shown)


def show_curves(curves, columns):
    """Lines for a terminal of so many columns: both plots side by side, and a line about each run."""
    low, high = loss_range(curves)
    all_trained = [model["train"] for curve in curves for model in curve["models"]]
    last = max((train[-1][0] for train in all_trained if train), default=0.0) or 1.0
    width = max(20, (columns - 14) // 2)
    height = 16
    plots = []
    for kind in ("train", "evals"):
        points = [[point for model in curve["models"] for point in model[kind]] for curve in curves]
        plots.append(text_plot(points, last, low, high, width, height))
    labels = [f"{high - (high - low) * i / (height - 1):8.4f} |" for i in range(height)]
    labels += [" " * 9 + "+", " " * 10]
    lines = [f"{'':10}{'training loss':{width}}    validation loss (nats per token), over epochs"]
    lines += [f"{label}{left}    {right}".rstrip() for label, left, right in zip(labels, *plots, strict=True)]
    for i, curve in enumerate(curves):
        lines.append(f"{chr(65 + i)}  {curve['name']}: {numbers_of(curve)}")
    if any(model["word"] == "probe" for curve in curves for model in curve["models"]):
        lines.append("An old log's evaluations (probe) are of the first tokens of validation alone.")
    return lines


def numbers_of(curve):
    """How far a run has come, in words."""
    if not curve["models"]:
        return "no step yet"
    model = curve["models"][-1]
    words = []
    if len(curve["models"]) > 1:
        words.append(f"{len(curve['models'])} models, of the last one:")
    if model["train"]:
        epoch, loss = model["train"][-1]
        words.append(f"training {loss:.4f} at epoch {epoch:.2f}")
    if model["evals"]:
        words.append(f"{model['word']} {model['evals'][-1][1]:.4f}")
    if curve["score"] is not None:
        words.append(f"val_loss {curve['score']:.4f} on the whole stream")
    return " ".join(words)


# ---- all runs ----------------------------------------------------------------------------------------------


def is_locked(log):
    """Whether a process is at work on a run: it holds a lock on the log. False where there are no locks."""
    with open(log, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def run_row(folder, tracks):
    """Cells about a run: its name, track, state, step, score, and what is wrong with it."""
    name = printable(folder.name)
    try:
        log = read_log(folder / "log.txt")
        started = read_json(folder / "config.json")
        record = read_json(folder / "record.json") if (folder / "record.json").exists() else None
        claims = claims_so_far(folder, started, record, None)
        require_keys(tracks["tracks"], claims["track"])
        dataset = tracks["tracks"][claims["track"]]["dataset"]
        wrong = faults_of(claims, tracks, expected_hashes(ROOT, tracks, dataset))
        locked = is_locked(folder / "log.txt")
        score = "" if record is None else f"{record['val_loss']:.4f}"
    except UNREADABLE as e:
        return [name, "", "unreadable", "", "", f"{type(e).__name__}: {printable(str(e))}"]
    if locked:
        state = "training"
    elif record is None:
        state = "interrupted"
        wrong.append(f"go on with: python train_gpt.py --resume {folder}")
    else:
        state = "finished"
    if claims["trial"]:
        state += ", trial"
    if log.malformed(Step, Eval):
        wrong.append("its log has damaged lines")
    steps = log.of(Step)
    at = f"{steps[-1].step}/{steps[-1].steps}" if steps else ""
    if steps and steps[-1].member > 1:
        at = f"member {steps[-1].member} {at}"
    evals = log.of(Eval)
    if not score and evals:
        score = f"eval {evals[-1].loss:.4f}"
    return [name, printable(claims["track"]), state, at, score, "; ".join(wrong)]


def list_runs(folder):
    """Lines of a table of the runs in a folder, those that were written to last at its end."""
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    if not found:
        return [f"{folder}/ holds no runs; python train_gpt.py makes one"]
    found.sort(key=lambda path: path.stat().st_mtime)
    tracks = read_tracks()
    rows = [["run", "track", "state", "step", "val_loss", "what is wrong"]]
    rows += [run_row(path, tracks) for path in found]
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    return ["  ".join([*map(str.ljust, row, widths), row[5]]).rstrip() for row in rows]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "paths", nargs="*", metavar="A", help="runs, records or logs [list the runs in runs/]"
    )
    parser.add_argument("--picture", metavar="NAME", help="draw NAME_light.svg and NAME_dark.svg")
    args = parser.parse_args(argv)
    try:
        if not args.paths:
            if args.picture:
                raise Refused("--picture: name the runs to draw, too")
            print("\n".join(list_runs(Path("runs"))))
        else:
            if len(args.paths) > 2 * len(COLORS["light"]):
                raise Refused(f"{len(args.paths)} runs: name at most {2 * len(COLORS['light'])}")
            curves = [curves_of(path) for path in args.paths]
            print("\n".join(show_curves(curves, shutil.get_terminal_size().columns)))
            if args.picture:
                data = {"curves": curves, "range": loss_range(curves)}
                save_pictures(args.picture, lambda theme: draw_losses(data, theme))
    except Refused as e:
        print(f"curves.py: {e}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
