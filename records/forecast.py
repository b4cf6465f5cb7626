"""
Know early: what will a run's score be, and what would a larger one's?

    python records/forecast.py run runs/NAME [--picture NAME]       a finished or a running run: median, 80% interval, chance of a record
    python records/forecast.py watch 0.05 -- python train_gpt.py --run_dir runs/NAME ...     stop a run whose chance stays below 5%
    python records/forecast.py ladder --vary train_tokens=125000,250000,500000 --predict 1000000 --seeds 2 -- --epochs 1 ...
    python records/forecast.py calibrate [--picture NAME]           how well a forecast does on runs that it has not seen

A forecast reads logs alone: the run's, and those of all finished runs in records/ on the same data, each at the same fraction of its
schedule. records/README.md says what it can and cannot know. NAME of a picture: NAME_light.svg and NAME_dark.svg are written.
"""
import argparse
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from audit import ROOT, Refused, read_tracks  # noqa: E402
from leaderboard import INK, earlier_records, figure, mean_loss, save_picture  # noqa: E402
from sweeps import train_run  # noqa: E402

DRAWS = 4000        # of the Monte Carlo
FIRST = 0.1         # no forecast before this fraction of a run
FEWEST = 8          # runs to learn from
IN_A_ROW = 3        # forecasts below a chance before a run is stopped: a single one stops a future record now and then (calibrate)
LINE = re.compile(r"(?:member (\d+) )?(step|probe) (\d+)/(\d+) (?:epoch \S+ loss|val_loss) (\d+\.\d+)")
NEEDED = ("seed", "data", "train_tokens", "epochs", "n_embd", "n_layer", "batch_tokens", "muon_lr", "weight_decay", "dropout", "warmdown")  # of a log's config
BANDS = {"80%": (0.1, 0.9), "50%": (0.25, 0.75)}

# ---- what logs say ----------------------------------------------------------------------------------------------------

def read_curves(path):
    """The models of a log, in order, each a dict: config; recipe (what else had this seed only would share it); member, of how many;
    probes and steps, [n, 2]: (fraction of the training done, loss); final, its own loss on the whole stream, None while unknown; score, the run's;
    flops, its share of the run's."""
    try:
        text = path.read_text(errors="replace")
        text = text[max(0, text.find("\n==== end of source")):]
        config = json.loads(re.search(r"^config (.*)$", text, re.MULTILINE)[1])
    except (OSError, TypeError, ValueError) as e:
        raise Refused(f"{path}: not the log of a run ({type(e).__name__})")
    if lacking := [name for name in NEEDED if name not in config]:
        raise Refused(f"{path}: its script has no option {lacking[0]}, by which runs are told apart")
    seen = {}
    for line in text.splitlines():
        if found := LINE.match(line):
            member, kind, i, n, loss = found.groups()
            seen.setdefault(int(member or 1), {"probe": [], "step": []})[kind].append((int(i) / int(n), float(loss)))
    members = max(config.get("members", 1), *seen, 1)
    alone = {int(k): float(loss) for k, loss in re.findall(r"^member (\d+) alone: (\d+\.\d+);", text, re.MULTILINE)}
    score = re.search(r"^val_loss (\d+\.\d+) nats per token", text, re.MULTILINE)
    score = score and float(score[1])
    flops = re.search(r"^trained for .* seen, ([\d.e+]+) FLOPs", text, re.MULTILINE)
    recipe = json.dumps({name: value for name, value in sorted(config.items()) if name not in ("seed", "track", "members", "probes", "save_every")})
    return [dict(path=path, config=config, recipe=recipe, member=k, members=members, score=score, final=alone.get(k, score if members == 1 else None),
                 flops=flops and float(flops[1]) / len(seen), **{f"{kind}s": np.array(values).reshape(-1, 2) for kind, values in parts.items()})
            for k, parts in sorted(seen.items())]

def library(data, root=ROOT):
    """The models of all finished runs in records/ on this data, those that are logged twice once."""
    kept = {}
    for path in (path for pattern in ("*/*/*.log", "*/*/log*.txt") for path in sorted((root / "records").glob(pattern))):
        try:
            curves = read_curves(path)
        except Refused:  # a script that went another way
            continue
        for curve in curves:
            # an average of weights that has not begun is no probe of anything: then a loss is that of a uniform guess
            usable = len(curve["probes"]) > 3 and curve["probes"][:, 1].max() < 5 and not curve["config"].get("student")
            if usable and curve["final"] and curve["config"]["data"].split("/")[-1] == data:
                kept.setdefault((curve["recipe"], curve["config"]["seed"], curve["member"], round(curve["final"], 4)), curve)
    return list(kept.values())

# ---- one model's end from its beginning -------------------------------------------------------------------------------

def features(curve, at):
    """What a forecast knows of a model at a fraction of its training: (values, the scale on which each is near or far)."""
    c = curve["config"]
    probes, steps = curve["probes"], curve["steps"][curve["steps"][:, 0] <= at + 1e-9]
    loss = lambda f: float(np.interp(f, probes[:, 0], np.log(probes[:, 1])))  # noqa: E731
    lately = steps[steps[:, 0] > at - 0.1251, 1] if len(steps) else []
    gap = math.log(np.mean(lately)) - loss(at) if len(lately) else 0.0  # of training to validation: what is learned by heart
    has = lambda name: float(bool(c.get(name)))  # noqa: E731
    looped, bags = bool(c.get("loop_times")), c.get("bag_size", 1) > 1 and c.get("bag_until", 0)
    table = [(loss(at), 0.3), (loss(at) - loss(at - 0.125), 0.03), (loss(at) - loss(at - 0.25), 0.06), (gap, 0.2),
             (math.log(c["epochs"]), 1.0), (math.log(c["train_tokens"] * c["epochs"]), 1.0), (math.log(c["n_embd"] * c["n_layer"]), 1.0), (math.log(c["batch_tokens"]), 1.0),
             (math.log(c["muon_lr"]), 1.0), (math.log(c["weight_decay"] + 0.01), 1.5),
             # all that the decay takes over the run
             (math.log(c["weight_decay"] * c["muon_lr"] * c["epochs"] * c["train_tokens"] / c["batch_tokens"] + 0.01), 1.0), (c["dropout"], 0.1), (c["warmdown"], 0.2),
             (has("recall"), 0.5), (has("memory"), 0.5), (has("ema"), 0.5), (has("cycles"), 0.5), (has("mtp_weight"), 1.0),
             # phases: those that are still to come shift the curve
             (float(bool(bags and at <= bags)), 0.5), (float(looped and at <= c["loop_from"]), 0.5), (float(looped), 1.0),
             (float(curve["member"] > 1 and c.get("distill_alpha", 0) > 0), 0.5)]
    return np.array(table).T

def known_at(curve, at):
    """Has this curve a probe near this fraction, and does it go on to it?"""
    return curve["probes"][0, 0] <= at + 0.03 and curve["probes"][-1, 0] >= at - 0.03

def kernel(a, b, length, linear):
    """Covariances of a Gaussian process between points [n, d] and [k, d]: smooth in all features, plus a straight line in them."""
    squares = ((a[:, None] - b[None]) ** 2).sum(-1)
    return 0.15 ** 2 * np.exp(-squares / (2 * length ** 2)) + linear ** 2 * (1 + a @ b.T)

class Forecaster:
    """Gaussian process regression of log(final loss / loss at a fraction) on the features there. Length, line and noise are those under
    which each recipe of the library is best foretold by all others; and how far off those forecasts are, in their own standard deviations, is the
    distribution that draws come from: no normal one, for now and then a run goes another way."""
    def __init__(self, curves, at):
        self.at, curves = at, [curve for curve in curves if known_at(curve, at)]
        if len(curves) < FEWEST:
            raise Refused(f"only {len(curves)} finished runs to learn from at {at:.0%} of the schedule; {FEWEST} are the fewest")
        self.scale = features(curves[0], at)[1]
        known = np.array([features(curve, at)[0] for curve in curves])
        self.centre = known.mean(0)
        self.x = (known - self.centre) / self.scale
        y = np.log([curve["final"] for curve in curves]) - known[:, 0]  # what is left to fall: the first feature is the log loss there
        self.mean = y.mean()
        recipes = np.array([curve["recipe"] for curve in curves])
        blocks = [np.flatnonzero(recipes == recipe) for recipe in dict.fromkeys(recipes)]
        best = math.inf
        for length in (2.0, 3.0, 5.0, 8.0):
            for linear in (0.03, 0.1):
                smooth = kernel(self.x, self.x, length, linear)
                for noise in (0.005, 0.01, 0.02, 0.03):
                    inverse = np.linalg.inv(smooth + noise ** 2 * np.eye(len(y)))
                    weights, surprise, off = inverse @ (y - self.mean), 0.0, []
                    for block in blocks:  # the recipe's own prediction from all others, without solving anew
                        covariance = np.linalg.inv(inverse[np.ix_(block, block)])
                        error, spread = covariance @ weights[block], np.sqrt(np.diag(covariance))
                        surprise += (0.5 * (error / spread) ** 2 + np.log(spread)).mean()
                        off += list(error / spread)
                    if surprise < best:
                        best, self.chosen, self.inverse, self.weights, self.off = surprise, (length, linear, noise), inverse, weights, np.array(off)

    def __call__(self, curve, rng):
        """Draws of the log of this curve's final loss, [DRAWS]."""
        known = features(curve, self.at)[0]
        x = ((known - self.centre) / self.scale)[None]
        length, linear, noise = self.chosen
        cross = kernel(x, self.x, length, linear)[0]
        spread = kernel(x, x, length, linear)[0, 0] - cross @ self.inverse @ cross + noise ** 2
        middle = self.mean + cross @ self.weights + known[0]
        return middle + math.sqrt(max(spread, noise ** 2)) * (rng.choice(self.off, DRAWS) + 0.3 * rng.normal(size=DRAWS))

# ---- a run's score ----------------------------------------------------------------------------------------------------

def ensemble_gain(curves, rng):
    """Draws of b in: the log loss of n members together is the mean of theirs alone, less b * (1 - 1 / n). From finished ensembles."""
    runs = {}
    for curve in curves:
        if curve["members"] > 1:
            runs.setdefault(curve["path"], []).append(curve)
    gains = [(np.mean([math.log(c["final"]) for c in run]) - math.log(run[0]["score"])) / (1 - 1 / len(run)) for run in runs.values() if len(run) == run[0]["members"]]
    return rng.normal(np.mean(gains) if gains else 0.02, max(0.005, np.std(gains)) if len(gains) > 1 else 0.01, DRAWS)

def draws(run, forecasters, at, others):
    """Final scores of a run, [DRAWS], as likely as they seem when its last model has done the fraction `at`. run: its curves so far; forecasters: by
    fraction; others: the library. Of models that are done only their last probes count, for what each scores alone is logged at the very end; those
    that are to come are taken to end like the present one."""
    present, told = run[-1], lambda curve, at: forecasters[at](curve, np.random.default_rng(0))
    log_final = told(present, at)
    if present["members"] == 1:
        return np.exp(log_final)
    alone = [told(curve, max(forecasters)) for curve in run[:-1]]
    all_alone = np.mean(alone + [log_final] * (present["members"] - len(alone)), axis=0)
    return np.exp(all_alone - ensemble_gain(others, np.random.default_rng(1)) * (1 - 1 / present["members"]))

def bar(track, root=ROOT):
    """(loss that a run must reach to beat the track's standing record, that record's name and loss). Better by chance is not enough: compare asks for
    p < 0.01, two-sided, in Student's t with some 18 degrees of freedom: 2.88 standard errors, of two seeds and a little of the text."""
    tracks, standing = read_tracks(root), earlier_records(root, track, "~")
    if track not in tracks["tracks"] or not standing:
        return None, None
    folder, record = min(standing, key=lambda entry: mean_loss(entry[1]))
    return mean_loss(record) - 3.0 * math.sqrt(2) * tracks["datasets"][tracks["tracks"][track]["dataset"]].get("seed_sd", 0.0), f"{folder.name}, {mean_loss(record):.4f}"

def forecast(folder, root=ROOT):
    """Forecasts over a run's life: (its curves, the record's bar and name, [(models done + fraction of the present one, loss of the probe there, draws)])."""
    run = read_curves(folder / "log.txt")
    if not run or run[0]["config"].get("student"):
        raise Refused(f"{folder}: {'runs with a student are not forecast' if run else 'no step is logged yet'}")
    config = run[0]["config"]
    curves = library(Path(config["data"]).name, root)
    if len(curves) < FEWEST:
        raise Refused(f"{folder}: records/ has only {len(curves)} finished runs on {config['data']} to learn from, {FEWEST} are the fewest")
    unseen = [curve for curve in curves if curve["recipe"] != run[0]["recipe"] or run[-1]["score"] is None]  # a finished run is not foretold from itself
    fractions = sorted({*np.concatenate([curve["probes"][:, 0] for curve in run])})
    forecasters = {at: Forecaster(unseen, at) for at in fractions if at >= FIRST and sum(known_at(curve, at) for curve in unseen) >= FEWEST}  # members share them
    life = [(k + at, loss, draws([*run[:k], curve | {"probes": curve["probes"][curve["probes"][:, 0] <= at + 1e-9]}], forecasters, at, unseen))
            for k, curve in enumerate(run) for at, loss in curve["probes"] if at in forecasters]
    return run, bar(config["track"], root), life

def chance(values, limit):
    return float((values < limit).mean()) if limit else math.nan

def run_command(args):
    run, (limit, standing), life = forecast(args.folder)
    present = run[-1]
    print(f"{args.folder}: track {present['config']['track']}, model {present['member']} of {present['members']}"
          + (f", finished: {present['score']:.4f}" if present["score"] else f", {present['steps'][-1, 0]:.0%} of its steps done"))
    if not life:
        raise Refused(f"{args.folder}: no probe after the first {FIRST:.0%} yet; wait for it")
    print(f"{'done':>6} {'probe':>8} {'median':>8}   80% interval      chance of a record")
    for done, probe, values in life:
        low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
        print(f"{done / present['members']:6.0%} {probe:8.4f} {middle:8.4f}   {low:.4f} to {high:.4f}  " + (f"{chance(values, limit):6.1%}" if limit else "no record on this track yet"))
    if limit:
        print(f"a record is a loss below {limit:.4f}: the standing one ({standing}) less what compare asks for")
    if args.picture:
        pictures(args.picture, lambda theme: draw_fan(run, life, limit, theme))

def watch_command(args):
    """Start a run and read its log; ask it to stop once its chance is too small."""
    command = args.rest
    words = [word for part in command for word in part.split("=", 1)]
    where = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("--run_dir", "--resume")]
    if not where or not 0 < args.chance < 1 or not args.every > 0:
        raise Refused("watch: write a chance between 0 and 1, --every above 0, then --, then a training command with --run_dir or --resume")
    folder, asked, seen = Path(where[0]), None, 0
    try:
        child = subprocess.Popen(command)
    except OSError as e:
        raise Refused(f"watch: {command[0]}: {e.strerror}")
    while child.poll() is None:
        time.sleep(args.every)
        n = (folder / "log.txt").read_text(errors="replace").count(" val_loss ") if (folder / "log.txt").exists() else 0
        if n > seen and not asked:
            seen = n
            try:
                _, (limit, standing), life = forecast(folder)
            except Refused as e:
                print(f"forecast.py: {e}", flush=True)
                continue
            p = [chance(values, limit) for *_, values in life[-IN_A_ROW:]]
            if len(p) == IN_A_ROW and max(p) < args.chance:
                low, middle, high = np.quantile(life[-1][-1], (0.1, 0.5, 0.9))
                asked = (f"forecast.py: stopped, for the chance that this run beats {standing} is {p[-1]:.1%}, below {args.chance:.1%} for the {IN_A_ROW}rd time in a row: its end is foretold at "
                         f"{middle:.4f}, {low:.4f} to {high:.4f}; go on all the same with: python train_gpt.py --resume {folder}")
                child.send_signal(signal.SIGTERM)
    if asked:
        print(asked, flush=True)
    sys.exit(0 if asked else child.returncode)

# ---- how good it is ---------------------------------------------------------------------------------------------------

def unseen_forecasts(curves, at):
    """Draws of each curve's final loss, [n, DRAWS], from the curves of all other recipes; NaN where it has no probe there."""
    out, cache, rng = np.full((len(curves), DRAWS), np.nan), {}, np.random.default_rng(0)
    for i, curve in enumerate(curves):
        if known_at(curve, at):
            if curve["recipe"] not in cache:
                cache[curve["recipe"]] = Forecaster([other for other in curves if other["recipe"] != curve["recipe"]], at)
            out[i] = np.exp(cache[curve["recipe"]](curve, rng))
    return out

def stopping(curves, told, fractions, least, standing):
    """Curves as attempts at standing(i), the loss of the best that the i-th has to beat (None: no attempt), each stopped when its chance was below
    `least` IN_A_ROW times. told: draws [curve, fraction, DRAWS]. Returns FLOPs of the failed ones, those of them saved, number of records, and of these stopped."""
    spent, saved, records, lost = 0.0, 0.0, 0, 0
    for i, curve in enumerate(curves):
        best = standing(i)
        if best is not None:
            low = [chance(values, best) < least for values in told[i]]
            stopped = next((fractions[k] for k in range(IN_A_ROW - 1, len(low)) if all(low[k - IN_A_ROW + 1:k + 1])), 1.0)
            if curve["final"] < best:
                records, lost = records + 1, lost + (stopped < 1)
            else:
                spent, saved = spent + curve["flops"], saved + curve["flops"] * (1 - stopped)
    return np.array([spent, saved, records, lost])

def calibrate_command(args):
    curves, fractions = library("pocket"), [k / 8 for k in range(1, 8)]
    final = np.array([curve["final"] for curve in curves])
    told = np.stack([unseen_forecasts(curves, at) for at in fractions], axis=1)
    print(f"{len(curves)} models of {len({curve['recipe'] for curve in curves})} recipes on pocket's data, each foretold from those of all other recipes\n"
          "  done  inside 80%   median error: forecast  present loss  straight line   interval's width")
    for k, at in enumerate(fractions):
        rows = np.flatnonzero(~np.isnan(told[:, k, 0]))
        loss = lambda f: np.array([np.interp(f, curves[i]["probes"][:, 0], curves[i]["probes"][:, 1]) for i in rows])  # noqa: E731,B023
        low, middle, high = np.quantile(told[rows, k], (0.1, 0.5, 0.9), axis=1)
        line = loss(at) + (loss(at) - loss(at - 0.125)) * (1 - at) / 0.125
        errors = [float(np.median(np.abs(guess - final[rows]))) for guess in (middle, loss(at), line)]
        inside = ((low < final[rows]) & (final[rows] < high)).mean()
        print(f"{at:6.1%}  {inside:10.0%}   {errors[0]:22.4f}  {errors[1]:12.4f}  {errors[2]:13.4f}   {np.median(high - low):16.4f}")
    budgets = {}
    for i, curve in enumerate(curves):
        if curve["flops"] and not np.isnan(told[i]).any():
            budgets.setdefault(curve["config"]["train_tokens"], []).append(i)
    against, in_turn, rng = np.zeros(4), np.zeros(4), np.random.default_rng(0)
    for rows in (rows for rows in budgets.values() if len(rows) >= FEWEST):
        against += stopping([curves[i] for i in rows], told[rows], fractions, 0.05, lambda i: np.delete(final[rows], i).min())  # noqa: B023
        for _ in range(200):
            order = rng.permutation(rows)
            in_turn += stopping([curves[i] for i in order], told[order], fractions, 0.05, lambda i: final[order[:i]].min() if i else None)  # noqa: B023
    print("runs at token budgets with 8 or more runs, stopped at a chance below 5% three times in a row:")
    for what, (spent, saved, records, lost) in (("against the best of all others", against), ("in random orders, against the best before", in_turn)):
        print(f"  {what}: {saved / spent:.0%} of failed FLOPs saved, {lost:.0f} of {records:.0f} records stopped")
    if args.picture:
        pictures(args.picture, lambda theme: draw_calibration(final, told[:, [1, 3, 5]], theme))

# ---- the ladder -------------------------------------------------------------------------------------------------------

LAW = 0.02  # a power law is taken to hold to 2%: so much may a loss be off without speaking against it

def power_laws(x, y):
    """Weighted least squares of log(y - E) = log(A) - a * log(x) for each floor E of a grid below all y; a rung counts twice as much as the one
    below it, for it is nearer to what is to be predicted. Returns (E, log A, -a, mean squared error of log y), arrays over the grid."""
    floors = np.append(0.0, np.linspace(0.02, 0.98, 49)) * min(y)
    w = 2.0 ** np.arange(len(x)) / (2.0 ** len(x) - 1)
    u, z = np.log(x), np.log(y - floors[:, None])  # [rung], [floor, rung]
    centred = u - w @ u
    slopes = (z * w) @ centred / (w @ centred ** 2)
    levels = z @ w - slopes * (w @ u)
    curves = floors[:, None] + np.exp(levels[:, None] + slopes[:, None] * u)
    return floors, levels, slopes, np.log(curves / y) ** 2 @ w

def fit_power_law(x, y):
    """(E, A, a) of the y = E + A * x ** -a that fits best."""
    floors, levels, slopes, errors = power_laws(x, np.asarray(y))
    if not (slopes < 0).any():
        raise Refused("the losses do not fall from rung to rung: no power law")
    best = np.argmin(np.where(slopes < 0, errors, np.inf))
    return floors[best], math.exp(levels[best]), -slopes[best]

def predict_ladder(sizes, losses, size, rng, n=2000):
    """Losses at `size`, [n], from those of the rungs, [rung][seed]. Each draw leaves out some of the smallest rungs (three stay), draws the seeds
    anew, takes a floor as likely as it fits, and adds what a new run's seed, or the law's own misfit, would."""
    fit_power_law(sizes, [np.mean(rung) for rung in losses])  # refuses what is no ladder
    several = [np.std(np.log(rung), ddof=1) for rung in losses if len(rung) > 1]
    seed, out = math.sqrt(np.mean(np.square(several))) if several else LAW / 2, []
    while len(out) < n:
        first = rng.integers(len(sizes) - 2)
        floors, levels, slopes, errors = power_laws(sizes[first:], np.array([np.mean(rng.choice(rung, len(rung))) for rung in losses[first:]]))
        likely = np.exp(-0.5 * (errors - errors.min()) * (len(sizes) - first) / max(LAW, seed) ** 2) * (slopes < 0)
        if likely.sum() > 0:
            k = rng.choice(len(floors), p=likely / likely.sum())
            out.append((floors[k] + math.exp(levels[k]) * size ** slopes[k]) * math.exp(rng.normal(0, max(seed, math.sqrt(errors[k])))))
    return np.array(out)

def train_rung(folder, options):
    """Loss and parameters of a run with these options, trained where it is not finished yet."""
    train_run(folder, options)
    record = json.loads((folder / "record.json").read_text())
    return record["val_loss"], record["parameters"]

def ladder_command(args):
    try:
        vary = {name: values.split(",") for name, _, values in (part.partition("=") for part in args.vary)}
        predict = args.predict.split(",")
        [float(value) for values in (*vary.values(), predict) for value in values]
    except ValueError:
        raise Refused("--vary NAME=N,N,...: and --predict: write numbers with commas between")
    n, name = len(next(iter(vary.values()))), next(iter(vary))
    if args.seeds < 1 or sorted({*map(float, vary[name])}) != [float(value) for value in vary[name]]:
        raise Refused("--vary: write the rungs of its first option from small to large; --seeds: 1 or more")
    if args.parameters and not args.check:
        raise Refused("--parameters: the size to predict has a number of parameters that only a run tells; add --check, which trains it")
    if n < 3 or any(len(values) != n for values in vary.values()) or len(predict) != len(vary):
        raise Refused("--vary: three rungs or more, as many for each option; --predict: a value for each option, with commas between")
    rungs = [dict(zip(vary, values)) for values in (*zip(*vary.values()), *([predict] if args.check else []))]
    sizes, losses, others = [], [], hashlib.sha256(" ".join(args.rest).encode()).hexdigest()[:8]  # other options are other runs
    for rung in rungs:
        folder = args.folder / "_".join([*(f"{key}{value}" for key, value in rung.items()), others])
        done = [train_rung(Path(f"{folder}_s{seed}"), [*args.rest, *(word for key, value in rung.items() for word in (f"--{key}", value)), "--seed", str(seed)]) for seed in range(args.seeds)]
        losses.append([loss for loss, _ in done])
        sizes.append(done[0][1] if args.parameters else float(rung[name]))
        print(f"{name} {rung[name]}: {' '.join(f'{loss:.4f}' for loss in losses[-1])}, {done[0][1]:,} parameters", flush=True)
    sizes, rng, told = np.array(sizes), np.random.default_rng(0), []
    for last, what in ((n - 1, "the largest rung from those below it"), (n, "the size to predict")):
        if last < 3:
            continue
        size = sizes[last] if last < len(sizes) else float(predict[0])
        values = predict_ladder(sizes[:last], losses[:last], size, rng)
        low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
        found = f"; it came out at {np.mean(losses[last]):.4f}" if last < len(losses) else ""
        print(f"{what}, {size:,.0f}: median {middle:.4f}, 80% interval {low:.4f} to {high:.4f}{found}")
        told.append((size, low, middle, high))
    floor, level, power = fit_power_law(sizes[:n], [np.mean(rung) for rung in losses[:n]])
    print(f"val_loss = {floor:.4f} + {level:.4g} * size ** -{power:.3f}")
    if args.picture:
        pictures(args.picture, lambda theme: draw_ladder(name if not args.parameters else "parameters", sizes, losses, n, (floor, level, power), told, theme))

# ---- pictures ---------------------------------------------------------------------------------------------------------

def pictures(name, draw):
    for theme in INK:
        path = Path(f"{name}_{theme}.svg")
        save_picture(path, draw(theme), "the logs")
        print(path)

def draw_fan(run, life, limit, theme):
    """What was foretold over a run's life, and what its probes said at the time."""
    text, _, blue, orange = INK[theme]
    fig, [[ax]] = figure(theme, 1, 4)
    members = run[-1]["members"]
    x = [done / members for done, _, _ in life]
    for shade, (name, ends) in zip((0.2, 0.35), BANDS.items()):
        ax.fill_between(x, *np.quantile([values for *_, values in life], ends, axis=1), color=blue, alpha=shade, linewidth=0, label=f"{name} interval")
    ax.plot(x, [np.median(values) for *_, values in life], "o-", color=blue, label="median forecast")
    ax.plot(x, [loss for _, loss, _ in life], "o:", color=orange, label="probe: the first tokens of validation")
    if run[-1]["score"]:
        ax.axhline(run[-1]["score"], color=text, linewidth=1, label=f"how it ended: {run[-1]['score']:.4f}")
    if limit:
        ax.axhline(limit, color=text, linewidth=1, linestyle="--", label=f"a record now: {limit:.4f}")
    ax.set(xlabel="fraction of the run", ylabel="validation loss (nats per token)", xlim=(0, 1))
    ax.legend(fontsize=9)
    return fig

def draw_calibration(final, told, theme):
    """Foretold and true final losses, at a quarter, a half and three quarters of the run."""
    text, _, blue, _ = INK[theme]
    fig, axes = figure(theme, 3, 3.6)
    for k, (ax, at) in enumerate(zip(axes[0], ("a quarter", "a half", "three quarters"))):
        low, middle, high = np.quantile(told[:, k], (0.1, 0.5, 0.9), axis=1)
        ax.errorbar(final, middle, [middle - low, high - middle], fmt="o", markersize=3, linewidth=1, color=blue)
        ax.axline((1, 1), slope=1, color=text, linewidth=1)
        ax.set(xlabel="final loss", title=f"after {at}")
    axes[0][0].set_ylabel("foretold, with its 80% interval")
    return fig

def draw_ladder(name, sizes, losses, n, law, told, theme):
    """Rungs, their power law, and the intervals for the rungs that it had not seen."""
    _, _, blue, orange = INK[theme]
    fig, [[ax]] = figure(theme, 1, 4)
    floor, level, power = law
    line = np.geomspace(sizes[0] / 1.2, max([*sizes, *(size for size, *_ in told)]) * 1.2, 200)
    ax.plot(line, floor + level * line ** -power, color=blue, label=f"{floor:.3g} + {level:.3g} / size^{power:.2f}, fitted to the first {n}")
    for i, (size, rung) in enumerate(zip(sizes, losses)):
        ax.plot([size] * len(rung), rung, "o", color=blue if i < n else orange, label="runs" if i == 0 else "a run not used for the fit" if i == n else None)
    for i, (size, low, middle, high) in enumerate(told):
        ax.errorbar([size * 1.06], [middle], [[middle - low], [high - middle]], fmt="s", color=orange, capsize=4, label=None if i else "foretold from the rungs below, 80% interval")
    ax.set(xscale="log", xlabel=name, ylabel="validation loss (nats per token)")
    ax.set_xticks(sorted({*sizes, *(size for size, *_ in told)}), [f"{x:,.0f}" for x in sorted({*sizes, *(size for size, *_ in told)})])
    ax.minorticks_off()
    ax.legend(fontsize=9)
    return fig

# ---- command line -----------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    picture = dict(metavar="NAME", help="draw NAME_light.svg and NAME_dark.svg")
    one = commands.add_parser("run", help="how a run will end")
    one.add_argument("folder", type=Path, metavar="RUN")
    one.add_argument("--picture", **picture)
    one.set_defaults(do=run_command)
    one = commands.add_parser("watch", help="start a run, and stop it if it has little chance of a record; after --, the command that trains")
    one.add_argument("chance", type=float, metavar="P")
    one.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two looks at the log [2]")
    one.set_defaults(do=watch_command)
    one = commands.add_parser("ladder", help="train a ladder of sizes, and predict the next; after --, options of train_gpt.py for all runs")
    one.add_argument("--vary", action="append", required=True, metavar="NAME=N,N,N", help="an option and its rungs; several options vary together")
    one.add_argument("--predict", required=True, metavar="N", help="the next rung")
    one.add_argument("--seeds", type=int, default=1)
    one.add_argument("--check", action="store_true", help="train the next rung, too, and say how it came out")
    one.add_argument("--parameters", action="store_true", help="the size is the number of parameters, not the first option")
    one.add_argument("--folder", type=Path, default=Path("runs/ladder"), help="[runs/ladder]")
    one.add_argument("--picture", **picture)
    one.set_defaults(do=ladder_command)
    one = commands.add_parser("calibrate", help="how well a forecast does on runs that it has not seen")
    one.add_argument("--picture", **picture)
    one.set_defaults(do=calibrate_command)
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.rest = argv[end + 1:]
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
