"""
What will a run's score be, and what would a larger one's?

    python records/forecast.py run runs/NAME [--picture NAME]
        of a finished or a running run: median, 80% interval, chance of a record
    python records/forecast.py watch 0.05 -- python train_gpt.py --run_dir runs/NAME ...
        stop a run whose chance of a record stays below 5%
    python records/forecast.py ladder --vary epochs=1,2,4 --predict 8 --seeds 2 -- --members 1
        train a recipe at growing sizes, and predict the next size
    python records/forecast.py calibrate [--picture NAME]
        how good forecasts are on runs that they have not seen

A forecast reads logs alone: the run's, and those of all finished runs in records/ on the same data, each at
the same fraction of its schedule. records/forecast/README.md says what it can and cannot know. For a picture,
NAME_light.svg and NAME_dark.svg are written.
"""

import argparse
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pictures import INK, figure, save_pictures
from reading import (
    ROOT,
    Alone,
    Eval,
    Refused,
    Score,
    Step,
    Trained,
    mean_loss,
    read_json,
    read_log,
    read_tracks,
    standing_record,
)
from sweeps import train_run

# Draws of the Monte Carlo.
DRAWS = 4000

# There is no forecast before this fraction of a run.
FIRST = 0.1

# As many finished runs are needed to learn from.
FEWEST = 8

# So many forecasts in a row must be below a chance before a run is stopped. With a single one, a future
# record is stopped now and then (calibrate).
IN_A_ROW = 3

# The evaluations during a run are of one of two kinds, which differ by about 0.12 nats on pocket.
FIRST_TOKENS = "on the first tokens of validation"
SPREAD = "spread over validation"
KINDS = {"probe": FIRST_TOKENS, "eval": SPREAD}

# Options that the config of a log must have.
NEEDED = (
    "seed",
    "data",
    "train_tokens",
    "epochs",
    "n_embd",
    "n_layer",
    "batch_tokens",
)

# Others, and what a script that lacks one is taken to have.
SUPPOSED = dict(muon_lr=0.02, weight_decay=0.1, dropout=0.0, warmdown=0.6)

# Options that do not tell one recipe from another.
NOT_OF_RECIPE = ("seed", "track", "members", "probes", "evals", "save_every")

BANDS = {"80%": (0.1, 0.9), "50%": (0.25, 0.75)}


def quantiles(values, axis=None):
    """The ends and the median of the 80% interval."""
    return np.quantile(values, (0.1, 0.5, 0.9), axis=axis)


# ---- what logs say -----------------------------------------------------------------------------------------


def read_curves(path):
    """The models of a log, in order, each a dict:

    config; recipe, the same for runs that differ in nothing but the seed; member, of how many members evals
    and steps: [n, 2], (fraction of the training done, loss); kind: of the evaluations done: fraction of the
    training done final: its own loss on the whole stream, None while unknown; score: the run's; flops: its
    share of the run's
    """
    try:
        log = read_log(path)
    except (OSError, ValueError) as e:
        raise Refused(f"{path}: not the log of a run ({type(e).__name__}: {e})")
    config = SUPPOSED | log.config
    for name in NEEDED:
        if name not in config:
            raise Refused(f"{path}: its script has no option {name}, by which runs are told apart")

    curves = curves_of(log)
    members = max(config.get("members", 1), *curves, 1)
    alone = {entry.member: entry.loss for entry in log.of(Alone)}
    score = None
    for entry in log.of(Score):
        score = entry.val_loss
    flops = None
    for entry in log.of(Trained):
        flops = entry.flops
    of_recipe = {name: value for name, value in sorted(config.items()) if name not in NOT_OF_RECIPE}
    recipe = json.dumps(of_recipe)
    for k, curve in curves.items():
        final = alone.get(k)
        if final is None and members == 1:
            final = score
        curve.update(path=path, config=config, recipe=recipe, member=k, members=members)
        curve.update(score=score, final=final, flops=flops and flops / len(curves))
        for name in ("evals", "steps"):
            curve[name] = np.array(curve[name]).reshape(-1, 2)
    return [curve for _, curve in sorted(curves.items())]


def curves_of(log):
    """{number of the model: its evaluations, their kind, its steps and progress} from a log."""
    curves = {}
    for entry in log.of(Step, Eval):
        curve = curves.setdefault(entry.member, {"evals": [], "steps": [], "kind": SPREAD, "done": 0.0})
        at = entry.step / entry.steps
        if isinstance(entry, Eval):
            curve["kind"] = KINDS[entry.word]
            curve["evals"].append((at, entry.loss))
        else:
            curve["done"] = at
            # The loss of a bag of tokens is not that of one next token, and is not read as one.
            if not entry.of_bags:
                curve["steps"].append((at, entry.loss))
    return curves


def library(data, root=ROOT):
    """The models of all finished runs in records/ on this data; each once, if it is logged twice."""
    paths = []
    for pattern in ("*/*/*.log", "*/*/log*.txt"):
        paths += sorted((root / "records").glob(pattern))
    kept = {}
    for path in paths:
        try:
            curves = read_curves(path)
        except Refused:
            # The script went another way.
            continue
        for curve in curves:
            if is_usable(curve, data):
                key = (curve["recipe"], curve["config"]["seed"], curve["member"], round(curve["final"], 4))
                kept.setdefault(key, curve)
    return list(kept.values())


def is_usable(curve, data):
    """Is this a finished model on this data, without a student, of which there are enough evaluations?"""
    config = curve["config"]
    if not curve["final"] or config.get("student") or config["data"].split("/")[-1] != data:
        return False
    # The loss of a uniform guess is from an average of weights that had not begun: it evaluates nothing.
    return len(curve["evals"]) > 3 and curve["evals"][:, 1].max() < 5


# ---- one model's end from its beginning --------------------------------------------------------------------


def features(curve, at):
    """What a forecast knows of a model at a fraction of its training: (values, scales).

    A difference of one scale is a moderate one.
    """
    c = curve["config"]
    evals = curve["evals"]
    tokens = c["train_tokens"] * c["epochs"]
    decay_of_run = c["weight_decay"] * c["muon_lr"] * tokens / c["batch_tokens"]

    def loss(fraction):
        return float(np.interp(fraction, evals[:, 0], np.log(evals[:, 1])))

    # The gap between training and validation loss: what is learned by heart.
    gap = 0.0
    steps = curve["steps"]
    recent = steps[(steps[:, 0] <= at + 1e-9) & (steps[:, 0] > at - 0.1251), 1]
    if len(recent):
        gap = math.log(np.mean(recent)) - loss(at)

    # Phases that are still to come shift the curve.
    bags_until = 0.0
    if c.get("bag_size", 1) > 1:
        bags_until = c.get("bag_until", 0)
    in_bags = bags_until > 0 and at <= bags_until
    looped = bool(c.get("loop_times"))
    loops_to_come = looped and at <= c["loop_from"]
    learns = curve["member"] > 1 and c.get("distill_alpha", 0) > 0
    table = [
        (loss(at), 0.3),
        (loss(at) - loss(at - 0.125), 0.03),
        (loss(at) - loss(at - 0.25), 0.06),
        (gap, 0.2),
        (math.log(c["epochs"]), 1.0),
        (math.log(tokens), 1.0),
        (math.log(c["n_embd"] * c["n_layer"]), 1.0),
        (math.log(c["batch_tokens"]), 1.0),
        (math.log(c["muon_lr"]), 1.0),
        (math.log(c["weight_decay"] + 0.01), 1.5),
        (math.log(decay_of_run + 0.01), 1.0),
        (c["dropout"], 0.1),
        (c["warmdown"], 0.2),
        (bool(c.get("recall")), 0.5),
        (bool(c.get("memory")), 0.5),
        (bool(c.get("ema")), 0.5),
        (bool(c.get("cycles")), 0.5),
        (bool(c.get("mtp_weight")), 1.0),
        (in_bags, 0.5),
        (loops_to_come, 0.5),
        (looped, 1.0),
        (learns, 0.5),
    ]
    return np.array(table, dtype=float).T


def known_at(curve, at):
    """Does this curve have an evaluation near this fraction, and go on to it?"""
    evals = curve["evals"]
    return len(evals) > 0 and evals[0, 0] <= at + 0.03 and evals[-1, 0] >= at - 0.03


def kernel(squares, products, length, linear):
    """Covariances of a Gaussian process that is smooth in all features, with a straight line in them.

    squares: squared distances of the points; products: their scalar products.
    """
    return 0.15**2 * np.exp(-squares / (2 * length**2)) + linear**2 * (1 + products)


def distances(a, b):
    """(squared distances, scalar products) of points [n, d] and [k, d]."""
    products = a @ b.T
    squares = ((a[:, None] - b[None]) ** 2).sum(-1)
    return squares, products


class Forecaster:
    """Gaussian process regression of log(final loss / loss at a fraction) on the features there.

    Its length, line and noise are those under which each recipe is best predicted from all others. How far
    off those predictions are, in their own standard deviations, is the distribution that draws come from. It
    is no normal distribution: now and then a run goes another way.
    """

    def __init__(self, curves, at):
        self.at = at
        curves = [curve for curve in curves if known_at(curve, at)]
        if len(curves) < FEWEST:
            raise Refused(
                f"only {len(curves)} finished runs to learn from at {at:.0%} of the schedule; "
                f"{FEWEST} are the fewest"
            )
        known = np.array([features(curve, at)[0] for curve in curves])
        self.scale = features(curves[0], at)[1]
        self.center = known.mean(0)
        self.x = (known - self.center) / self.scale
        # What is left to fall: the first feature is the log loss at this fraction.
        y = np.log([curve["final"] for curve in curves]) - known[:, 0]
        self.mean = y.mean()
        self.fit(y - self.mean, [curve["recipe"] for curve in curves])

    def fit(self, y, recipes):
        by_recipe = {}
        for i, recipe in enumerate(recipes):
            by_recipe.setdefault(recipe, []).append(i)
        # Recipes of as many runs each are handled at once: [recipe, run].
        by_size = {}
        for rows in by_recipe.values():
            by_size.setdefault(len(rows), []).append(rows)
        groups = [np.array(group) for group in by_size.values()]

        squares, products = distances(self.x, self.x)
        best = math.inf
        for length in (2.0, 3.0, 5.0, 8.0):
            for linear in (0.03, 0.1):
                smooth = kernel(squares, products, length, linear)
                for noise in (0.005, 0.01, 0.02, 0.03):
                    inverse = np.linalg.inv(smooth + noise**2 * np.eye(len(y)))
                    weights = inverse @ y
                    surprise, off = left_out(inverse, weights, groups)
                    if surprise < best:
                        best = surprise
                        self.length = length
                        self.linear = linear
                        self.noise = noise
                        self.inverse = inverse
                        self.weights = weights
                        self.off = off

    def __call__(self, curve, rng):
        """Draws of the log of this curve's final loss, [DRAWS]."""
        known = features(curve, self.at)[0]
        x = ((known - self.center) / self.scale)[None]
        cross = kernel(*distances(x, self.x), self.length, self.linear)[0]
        own = kernel(*distances(x, x), self.length, self.linear)[0, 0]
        variance = own - cross @ self.inverse @ cross + self.noise**2
        spread = math.sqrt(max(variance, self.noise**2))
        middle = self.mean + cross @ self.weights + known[0]
        off = rng.choice(self.off, DRAWS) + 0.3 * rng.normal(size=DRAWS)
        return middle + spread * off


def left_out(inverse, weights, groups):
    """Each recipe predicted from all others, without a new fit: (surprise, errors in standard deviations).

    groups: for each number of runs of a recipe, the rows of the recipes with as many, [recipe, run].
    """
    surprise = 0.0
    errors = []
    for rows in groups:
        covariance = np.linalg.inv(inverse[rows[:, :, None], rows[:, None, :]])
        spread = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
        error = (covariance @ weights[rows][:, :, None])[:, :, 0] / spread
        surprise += (0.5 * error**2 + np.log(spread)).mean(1).sum()
        errors.append(error.flatten())
    return surprise, np.concatenate(errors)


# ---- a run's score -----------------------------------------------------------------------------------------


def ensemble_gain(curves, rng):
    """Draws of b, from finished ensembles.

    The log loss of n members together is the mean of theirs alone, less b * (1 - 1 / n).
    """
    runs = {}
    for curve in curves:
        if curve["members"] > 1:
            runs.setdefault(curve["path"], []).append(curve)
    gains = []
    for run in runs.values():
        n = len(run)
        if n == run[0]["members"]:
            alone = np.mean([math.log(curve["final"]) for curve in run])
            gains.append((alone - math.log(run[0]["score"])) / (1 - 1 / n))
    mean = np.mean(gains) if gains else 0.02
    spread = max(0.005, np.std(gains)) if len(gains) > 1 else 0.01
    return rng.normal(mean, spread, DRAWS)


def draws(run, forecasters, at, others):
    """Final scores of a run, [DRAWS], as likely as they seem when its last model is at the fraction `at`.

    run: its curves so far. forecasters: by fraction. others: the curves that are learned from. Of models that
    are done only the last evaluations count, because what each scores alone is logged at the very end; those
    that are still to come are assumed to end like the present one.
    """

    def predict(curve, at):
        return forecasters[at](curve, np.random.default_rng(0))

    present = run[-1]
    log_final = predict(present, at)
    members = present["members"]
    if members == 1:
        return np.exp(log_final)
    alone = [predict(curve, max(forecasters)) for curve in run[:-1]]
    alone += [log_final] * (members - len(alone))
    gain = ensemble_gain(others, np.random.default_rng(1)) * (1 - 1 / members)
    return np.exp(np.mean(alone, axis=0) - gain)


def bar(track, root=ROOT):
    """(loss that a run must reach to beat the track's standing record, that record's name and loss).

    Better by chance is not enough: compare asks for p < 0.01, two-sided, in Student's t with some 55 degrees
    of freedom. These are 2.67 standard errors of two seeds and the text, or 2.75 of the seeds alone.
    """
    tracks = read_tracks(root)
    standing = standing_record(root, track)
    if track not in tracks["tracks"] or standing is None:
        return None, None
    folder, record = standing
    dataset = tracks["datasets"][tracks["tracks"][track]["dataset"]]
    margin = 2.75 * math.sqrt(2) * dataset.get("seed_sd", 0.0)
    return mean_loss(record) - margin, f"{folder.name}, {mean_loss(record):.4f}"


def forecast(folder, root=ROOT):
    """(curves of a run, the bar and the standing record of its track, forecasts over the run's life).

    Each of these forecasts is (models done + fraction of the present one, loss of the evaluation there,
    draws).
    """
    run = read_curves(folder / "log.txt")
    if not run:
        raise Refused(f"{folder}: no step is logged yet")
    config = run[0]["config"]
    if config.get("student"):
        raise Refused(f"{folder}: runs with a student are not forecast")
    data = Path(config["data"]).name
    kind = run[0]["kind"]
    curves = [curve for curve in library(data, root) if curve["kind"] == kind]
    if len(curves) < FEWEST:
        raise Refused(
            f"{folder}: records/ has only {len(curves)} finished runs on {config['data']} with evaluations "
            f"{kind} to learn from; {FEWEST} are the fewest"
        )
    if run[-1]["score"] is not None:
        # A finished run is not predicted from itself.
        curves = [curve for curve in curves if curve["recipe"] != run[0]["recipe"]]

    # The members share the forecasters.
    forecasters = {}
    for at in sorted({float(at) for curve in run for at in curve["evals"][:, 0]}):
        if at >= FIRST and sum(known_at(curve, at) for curve in curves) >= FEWEST:
            forecasters[at] = Forecaster(curves, at)
    life = []
    for k, curve in enumerate(run):
        for at, loss in curve["evals"]:
            if at in forecasters:
                seen = curve["evals"][:, 0] <= at + 1e-9
                so_far = [*run[:k], curve | {"evals": curve["evals"][seen]}]
                life.append((k + at, loss, draws(so_far, forecasters, at, curves)))
    return run, bar(config["track"], root), life


def chance(values, limit):
    return float((values < limit).mean()) if limit else math.nan


def run_command(args):
    run, (limit, standing), life = forecast(args.folder)
    present = run[-1]
    members = present["members"]
    status = f"{present['done']:.0%} of its steps done"
    if present["score"]:
        status = f"finished: {present['score']:.4f}"
    track = present["config"]["track"]
    print(f"{args.folder}: track {track}, model {present['member']} of {members}, {status}")
    if not life:
        raise Refused(f"{args.folder}: no evaluation after the first {FIRST:.0%} yet; wait for it")
    print(f"{'done':>6} {'eval':>8} {'median':>8}   80% interval      chance of a record")
    for done, loss, values in life:
        low, middle, high = quantiles(values)
        text = f"{chance(values, limit):6.1%}" if limit else "no record on this track yet"
        print(f"{done / members:6.0%} {loss:8.4f} {middle:8.4f}   {low:.4f} to {high:.4f}  {text}")
    if limit:
        margin = "less what compare asks for"
        print(f"a record is a loss below {limit:.4f}: the standing one ({standing}) {margin}")
    if args.picture:
        save_pictures(args.picture, lambda theme: draw_fan(run, life, limit, theme))


def watch_command(args):
    """Start a run and read its log; ask it to stop once its chance is too small."""
    folder = run_folder(args.rest)
    if folder is None or not 0 < args.chance < 1 or not args.every > 0:
        raise Refused(
            "watch: write a chance between 0 and 1, --every above 0, then --, then a training command with "
            "--run_dir or --resume"
        )
    try:
        child = subprocess.Popen(args.rest)
    except OSError as e:
        raise Refused(f"watch: {args.rest[0]}: {e.strerror}")
    reason = None
    seen = 0
    while child.poll() is None:
        time.sleep(args.every)
        n = count_evals(folder / "log.txt")
        if n > seen and not reason:
            seen = n
            reason = reason_to_stop(folder, args.chance)
            if reason:
                child.send_signal(signal.SIGTERM)
    if not reason:
        sys.exit(child.returncode)
    print(reason, flush=True)


def run_folder(command):
    """The folder that a training command names, or None."""
    words = []
    for part in command:
        words += part.split("=", 1)
    for name, value in zip(words, words[1:]):
        if name in ("--run_dir", "--resume"):
            return Path(value)
    return None


def count_evals(log):
    try:
        return len(read_log(log).of(Eval))
    except (OSError, ValueError):
        # It is not there yet, or not all of its beginning.
        return 0


def reason_to_stop(folder, least):
    """Why a run has no chance, or None where it has one, or where nobody can tell."""
    try:
        _, (limit, standing), life = forecast(folder)
    except Refused as e:
        print(f"forecast.py: {e}", flush=True)
        return None
    chances = [chance(values, limit) for _, _, values in life[-IN_A_ROW:]]
    if len(chances) < IN_A_ROW or not max(chances) < least:
        return None
    low, middle, high = quantiles(life[-1][-1])
    return (
        f"forecast.py: stopped, because the chance that this run beats {standing} is {chances[-1]:.1%}, "
        f"below {least:.1%} for the {IN_A_ROW}rd time in a row. Its score is predicted at {middle:.4f}, "
        f"{low:.4f} to {high:.4f}. Go on all the same with: python train_gpt.py --resume {folder}"
    )


# ---- how good it is ----------------------------------------------------------------------------------------


def unseen_forecasts(curves, at):
    """Draws of each curve's final loss from all other recipes, [n, DRAWS]; NaN where it is not known."""
    out = np.full((len(curves), DRAWS), np.nan)
    rng = np.random.default_rng(0)
    by_recipe = {}
    for i, curve in enumerate(curves):
        if not known_at(curve, at):
            continue
        recipe = curve["recipe"]
        if recipe not in by_recipe:
            others = [other for other in curves if other["recipe"] != recipe]
            by_recipe[recipe] = Forecaster(others, at)
        out[i] = np.exp(by_recipe[recipe](curve, rng))
    return out


def stopping(curves, predicted, fractions, least, standing):
    """Stop runs without a chance: [FLOPs of failed runs, how many are saved, records, how many are stopped].

    Each curve is an attempt at standing(i), the loss that the i-th has to beat (None: it is no attempt). It
    is stopped when its chance was below `least` IN_A_ROW times. predicted: draws [curve, fraction, DRAWS].
    """
    spent = 0.0
    saved = 0.0
    records = 0
    lost = 0
    for i, curve in enumerate(curves):
        best = standing(i)
        if best is None:
            continue
        stopped = 1.0
        in_a_row = 0
        for at, values in zip(fractions, predicted[i]):
            in_a_row = in_a_row + 1 if chance(values, best) < least else 0
            if in_a_row == IN_A_ROW:
                stopped = at
                break
        if curve["final"] < best:
            records += 1
            lost += stopped < 1
        else:
            spent += curve["flops"]
            saved += curve["flops"] * (1 - stopped)
    return np.array([spent, saved, records, lost])


def stopping_totals(curves, predicted, fractions, final):
    """stopping() over token budgets with enough runs: against the best other run, and in random orders."""
    budgets = {}
    for i, curve in enumerate(curves):
        if curve["flops"] and not np.isnan(predicted[i]).any():
            budgets.setdefault(curve["config"]["train_tokens"], []).append(i)
    against_all = np.zeros(4)
    in_order = np.zeros(4)
    rng = np.random.default_rng(0)
    for rows in budgets.values():
        if len(rows) < FEWEST:
            continue
        against_all += stop_rows(curves, predicted, fractions, rows, best_other)
        for _ in range(200):
            order = rng.permutation(rows)
            in_order += stop_rows(curves, predicted, fractions, order, best_before)
    return against_all, in_order


def stop_rows(curves, predicted, fractions, rows, best):
    """stopping() of some of the curves. best(final losses, i): what the i-th of them has to beat."""
    chosen = [curves[i] for i in rows]
    final = np.array([curve["final"] for curve in chosen])
    return stopping(chosen, predicted[rows], fractions, 0.05, lambda i: best(final, i))


def best_other(final, i):
    return np.delete(final, i).min()


def best_before(final, i):
    return final[:i].min() if i > 0 else None


def calibrate_command(args):
    curves = library("pocket")
    # Kinds of evaluations are not comparable: the more common one is looked at.
    kinds = [curve["kind"] for curve in curves]
    kind = max(KINDS.values(), key=kinds.count)
    curves = [curve for curve in curves if curve["kind"] == kind]
    fractions = [k / 8 for k in range(1, 8)]
    final = np.array([curve["final"] for curve in curves])
    predicted = np.stack([unseen_forecasts(curves, at) for at in fractions], axis=1)
    recipes = {curve["recipe"] for curve in curves}
    print(
        f"{len(curves)} models of {len(recipes)} recipes on pocket's data, each predicted from those of all "
        f"other recipes (evaluations {kind})"
    )
    print("  done  inside 80%   median error: forecast  present loss  straight line   interval's width")
    for k, at in enumerate(fractions):
        print(calibration_row(curves, final, predicted[:, k], at))
    print("runs at token budgets with 8 or more runs, stopped at a chance below 5% three times in a row:")
    against_all, in_order = stopping_totals(curves, predicted, fractions, final)
    for what, totals in (
        ("against the best of all others", against_all),
        ("in random orders, against the best before", in_order),
    ):
        spent, saved, records, lost = totals
        print(
            f"  {what}: {saved / spent:.0%} of failed FLOPs saved, "
            f"{lost:.0f} of {records:.0f} records stopped"
        )
    if args.picture:
        save_pictures(args.picture, lambda theme: draw_calibration(final, predicted[:, [1, 3, 5]], theme))


def calibration_row(curves, final, predicted, at):
    """Errors of forecasts at a fraction, beside those of two simple guesses. predicted: [curve, DRAWS]."""
    rows = np.flatnonzero(~np.isnan(predicted[:, 0]))
    final = final[rows]

    def loss(fraction):
        return np.array([np.interp(fraction, *curves[i]["evals"].T) for i in rows])

    def median_error(guess):
        return float(np.median(np.abs(guess - final)))

    low, middle, high = quantiles(predicted[rows], axis=1)
    inside = ((low < final) & (final < high)).mean()
    present = loss(at)
    line = present + (present - loss(at - 0.125)) * (1 - at) / 0.125
    errors = f"{median_error(middle):22.4f}  {median_error(present):12.4f}  {median_error(line):13.4f}"
    return f"{at:6.1%}  {inside:10.0%}   {errors}   {np.median(high - low):16.4f}"


# ---- the ladder --------------------------------------------------------------------------------------------

# A power law is assumed to hold to 2%: a loss may be off by so much without speaking against it.
LAW = 0.02


def power_laws(x, y):
    """Fits of y = E + A * x ** -a for each floor E of a grid below all y: (E, log A, -a, error).

    The fit is weighted least squares of log(y - E) = log(A) - a * log(x). A rung counts twice as much as the
    one below it, because it is nearer to what is to be predicted. The error is the mean squared one of log y.
    Each result is an array over the grid.
    """
    floors = np.append(0.0, np.linspace(0.02, 0.98, 49)) * min(y)
    w = 2.0 ** np.arange(len(x)) / (2.0 ** len(x) - 1)
    u = np.log(x)
    # [floor, rung]
    z = np.log(y - floors[:, None])
    centered = u - w @ u
    slopes = (z * w) @ centered / (w @ centered**2)
    levels = z @ w - slopes * (w @ u)
    curves = floors[:, None] + np.exp(levels[:, None] + slopes[:, None] * u)
    errors = np.log(curves / y) ** 2 @ w
    return floors, levels, slopes, errors


def fit_power_law(x, y):
    """(E, A, a) of the y = E + A * x ** -a that fits best."""
    floors, levels, slopes, errors = power_laws(x, np.asarray(y))
    if not (slopes < 0).any():
        raise Refused("the losses do not fall from rung to rung: no power law")
    best = np.argmin(np.where(slopes < 0, errors, np.inf))
    return floors[best], math.exp(levels[best]), -slopes[best]


def predict_ladder(sizes, losses, size, rng, n=2000):
    """Draws of the loss at `size`, [n], from those of the rungs, [rung][seed].

    Each draw leaves out some of the smallest rungs (three stay), draws the seeds again, takes a floor with a
    chance given by how well it fits, and adds what a new run's seed, or the law's own error, would add.
    """
    # This refuses what is no ladder.
    fit_power_law(sizes, [np.mean(rung) for rung in losses])
    spreads = [np.std(np.log(rung), ddof=1) for rung in losses if len(rung) > 1]
    seed_spread = LAW / 2
    if spreads:
        seed_spread = math.sqrt(np.mean(np.square(spreads)))
    out = []
    while len(out) < n:
        first = rng.integers(len(sizes) - 2)
        means = np.array([np.mean(rng.choice(rung, len(rung))) for rung in losses[first:]])
        floors, levels, slopes, errors = power_laws(sizes[first:], means)
        misfit = (errors - errors.min()) * (len(sizes) - first) / max(LAW, seed_spread) ** 2
        likely = np.exp(-0.5 * misfit) * (slopes < 0)
        if likely.sum() > 0:
            k = rng.choice(len(floors), p=likely / likely.sum())
            loss = floors[k] + math.exp(levels[k]) * size ** slopes[k]
            spread = max(seed_spread, math.sqrt(errors[k]))
            out.append(loss * math.exp(rng.normal(0, spread)))
    return np.array(out)


def train_rung(folder, options):
    """Loss and parameters of a run with these options, which is trained unless it is finished."""
    train_run(folder, options)
    record = read_json(folder / "record.json")
    return record["val_loss"], record["parameters"]


def parse_ladder(args):
    """({option: its rungs, as text}, [the value of each option to predict]) of the command line."""
    vary = {}
    for part in args.vary:
        name, _, values = part.partition("=")
        vary[name] = values.split(",")
    predict = args.predict.split(",")
    try:
        for values in (*vary.values(), predict):
            for value in values:
                float(value)
    except ValueError:
        raise Refused("--vary NAME=N,N,...: and --predict: write numbers with commas between")
    rungs = next(iter(vary.values()))
    sizes = [float(value) for value in rungs]
    if args.seeds < 1 or sizes != sorted(set(sizes)):
        raise Refused("--vary: write the rungs of its first option from small to large; --seeds: 1 or more")
    if args.parameters and not args.check:
        raise Refused(
            "--parameters: only a run tells how many the next size has; add --check, which trains it"
        )
    as_many = all(len(values) == len(rungs) for values in vary.values())
    if len(rungs) < 3 or not as_many or len(predict) != len(vary):
        raise Refused(
            "--vary: three rungs or more, as many for each option; --predict: a value for each option, with "
            "commas between"
        )
    return vary, predict


def ladder_command(args):
    vary, predict = parse_ladder(args)
    name = next(iter(vary))
    n = len(vary[name])
    rungs = list(zip(*vary.values()))
    if args.check:
        rungs.append(tuple(predict))

    # Runs with other options are other runs.
    others = hashlib.sha256(" ".join(args.rest).encode()).hexdigest()[:8]
    sizes = []
    losses = []
    for values in rungs:
        rung = dict(zip(vary, values))
        folder = "_".join([*(f"{key}{value}" for key, value in rung.items()), others])
        options = list(args.rest)
        for key, value in rung.items():
            options += [f"--{key}", value]
        done = []
        for seed in range(args.seeds):
            done.append(train_rung(args.folder / f"{folder}_s{seed}", [*options, "--seed", str(seed)]))
        losses.append([loss for loss, _ in done])
        parameters = done[0][1]
        sizes.append(parameters if args.parameters else float(rung[name]))
        text = " ".join(f"{loss:.4f}" for loss in losses[-1])
        print(f"{name} {rung[name]}: {text}, {parameters:,} parameters", flush=True)

    sizes = np.array(sizes)
    rng = np.random.default_rng(0)
    predictions = []
    for last, what in (
        (n - 1, "the largest rung predicted from those below it"),
        (n, "the size to predict"),
    ):
        if last < 3:
            continue
        size = sizes[last] if last < len(sizes) else float(predict[0])
        values = predict_ladder(sizes[:last], losses[:last], size, rng)
        low, middle, high = quantiles(values)
        line = f"{what}, {size:,.0f}: median {middle:.4f}, 80% interval {low:.4f} to {high:.4f}"
        if last < len(losses):
            line += f"; it came out at {np.mean(losses[last]):.4f}"
        print(line)
        predictions.append((size, low, middle, high))
    law = fit_power_law(sizes[:n], [np.mean(rung) for rung in losses[:n]])
    floor, level, power = law
    print(f"val_loss = {floor:.4f} + {level:.4g} * size ** -{power:.3f}")
    if args.picture:
        label = "parameters" if args.parameters else name
        save_pictures(
            args.picture, lambda theme: draw_ladder(label, sizes, losses, n, law, predictions, theme)
        )


# ---- pictures ----------------------------------------------------------------------------------------------


def draw_fan(run, life, limit, theme):
    """What was predicted over a run's life, and its evaluations at the time."""
    text = INK[theme]["text"]
    blue = INK[theme]["blue"]
    orange = INK[theme]["orange"]
    fig, [[ax]] = figure(theme, 1, 4)
    x = [done / run[-1]["members"] for done, _, _ in life]
    losses = [loss for _, loss, _ in life]
    values = np.array([values for _, _, values in life])
    for alpha, (name, ends) in zip((0.2, 0.35), BANDS.items()):
        low, high = np.quantile(values, ends, axis=1)
        ax.fill_between(x, low, high, color=blue, alpha=alpha, linewidth=0, label=f"{name} interval")
    ax.plot(x, np.median(values, axis=1), "o-", color=blue, label="median prediction")
    ax.plot(x, losses, "o:", color=orange, label=f"evaluation {run[-1]['kind']}")
    score = run[-1]["score"]
    if score:
        ax.axhline(score, color=text, linewidth=1, label=f"final score: {score:.4f}")
    if limit:
        ax.axhline(limit, color=text, linewidth=1, linestyle="--", label=f"a record now: {limit:.4f}")
    ax.set(xlabel="fraction of the run", ylabel="validation loss (nats per token)", xlim=(0, 1))
    ax.legend(fontsize=9)
    return fig


def draw_calibration(final, predicted, theme):
    """Predicted and actual final losses, at a quarter, a half and three quarters of the run."""
    text = INK[theme]["text"]
    blue = INK[theme]["blue"]
    fig, axes = figure(theme, 3, 3.6)
    for k, (ax, at) in enumerate(zip(axes[0], ("a quarter", "a half", "three quarters"))):
        low, middle, high = quantiles(predicted[:, k], axis=1)
        errors = [middle - low, high - middle]
        ax.errorbar(final, middle, errors, fmt="o", markersize=3, linewidth=1, color=blue)
        ax.axline((1, 1), slope=1, color=text, linewidth=1)
        ax.set(xlabel="actual final loss", title=f"after {at}")
    axes[0][0].set_ylabel("predicted, with its 80% interval")
    return fig


def draw_ladder(name, sizes, losses, n, law, predictions, theme):
    """Rungs, their power law, and the intervals for the rungs that it had not seen."""
    blue = INK[theme]["blue"]
    orange = INK[theme]["orange"]
    fig, [[ax]] = figure(theme, 1, 4)
    floor, level, power = law
    ticks = sorted({*sizes, *(size for size, _, _, _ in predictions)})
    line = np.geomspace(sizes[0] / 1.2, ticks[-1] * 1.2, 200)
    label = f"{floor:.3g} + {level:.3g} / size^{power:.2f}, fitted to the first {n}"
    ax.plot(line, floor + level * line**-power, color=blue, label=label)
    for i, (size, rung) in enumerate(zip(sizes, losses)):
        color = blue if i < n else orange
        label = {0: "runs", n: "a run not used for the fit"}.get(i)
        ax.plot([size] * len(rung), rung, "o", color=color, label=label)
    label = "predicted from the rungs below, 80% interval"
    for size, low, middle, high in predictions:
        errors = [[middle - low], [high - middle]]
        ax.errorbar([size * 1.06], [middle], errors, fmt="s", color=orange, capsize=4, label=label)
        label = None
    ax.set(xscale="log", xlabel=name, ylabel="validation loss (nats per token)")
    ax.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    ax.minorticks_off()
    ax.legend(fontsize=9)
    return fig


# ---- command line ------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    picture = dict(metavar="NAME", help="draw NAME_light.svg and NAME_dark.svg")

    one = commands.add_parser("run", help="how a run will end")
    one.add_argument("folder", type=Path, metavar="RUN")
    one.add_argument("--picture", **picture)
    one.set_defaults(do=run_command)

    one = commands.add_parser(
        "watch",
        help="start a run, and stop it if it has little chance of a record; after --, its command",
    )
    one.add_argument("chance", type=float, metavar="P")
    one.add_argument(
        "--every", type=float, default=2.0, metavar="S", help="seconds between two looks at the log [2]"
    )
    one.set_defaults(do=watch_command)

    one = commands.add_parser(
        "ladder",
        help="train a ladder of sizes, and predict the next; after --, options of train_gpt.py for all runs",
    )
    one.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="NAME=N,N,N",
        help="an option and its rungs; several options vary together",
    )
    one.add_argument("--predict", required=True, metavar="N", help="the next rung")
    one.add_argument("--seeds", type=int, default=1)
    one.add_argument("--check", action="store_true", help="train the next rung, too, and say how it came out")
    one.add_argument(
        "--parameters", action="store_true", help="the size is the number of parameters, not the first option"
    )
    one.add_argument("--folder", type=Path, default=Path("runs/ladder"), help="[runs/ladder]")
    one.add_argument("--picture", **picture)
    one.set_defaults(do=ladder_command)

    one = commands.add_parser("calibrate", help="how good forecasts are on runs that they have not seen")
    one.add_argument("--picture", **picture)
    one.set_defaults(do=calibrate_command)

    # What follows -- belongs to the training script.
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.rest = argv[end + 1 :]
    return args


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        args.do(args)
    except Refused as e:
        print(f"forecast.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("forecast.py: interrupted; the same command goes on")
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
