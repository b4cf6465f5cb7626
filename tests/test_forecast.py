"""Forecasts from logs, the watcher, and the ladder: on made-up curves whose end is known."""

import json
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "records"))
import forecast as fc
from compare import compare_scores
from reading import Refused, read_tracks

pytestmark = pytest.mark.contract

CONFIG = dict(
    track="pocket",
    data="pocket",
    train_tokens=1000,
    seed=0,
    epochs=1.0,
    n_embd=64,
    n_layer=4,
    batch_tokens=1000,
    muon_lr=0.02,
    weight_decay=0.1,
    dropout=0.0,
    warmdown=0.6,
    recall="",
    memory="",
    members=1,
    loop_times=0,
    bag_size=1,
)

# How the old and the new script log an evaluation, and what each calls it.
FIRST_TOKENS = ("probe", "on the first 40,000 tokens")
SPREAD = ("eval", "on 40 windows of 1,024 tokens spread over validation")


def write_log(
    path, rng, seed=0, width=64, upto=1.0, members=1, noise=0.01, evals=FIRST_TOKENS, bags_until=0.0, **config
):
    """A log of losses that fall to an end that depends on the width, by one law for all. Returns the score.

    upto: the fraction of the training that is logged. noise: of the end, and of each evaluation.
    """
    config = CONFIG | dict(seed=seed, n_embd=width, members=members) | config
    word, measure = evals
    lines = []
    ends = []
    for k in range(1, members + 1):
        member = f"member {k} " if members > 1 else ""
        end = 0.6 + 8 / width * np.exp(rng.normal(0, noise))
        ends.append(end)
        for i in range(1, 81):
            if i / 80 > upto:
                continue
            loss = end * (1 + 0.8 * (1 - i / 80) ** 2 * width**0.1)
            train_loss = loss * np.exp(rng.normal(0, 0.01))
            name = "bag_loss" if i / 80 <= bags_until else "loss"
            rates = f"lr 0.02 tok/s 1 time {k}.0s left 0s"
            lines.append(f"{member}step {i}/80 epoch {i / 80:.3f} {name} {train_loss:.4f} {rates}")
            if i % 10 == 0 and i < 80:
                val_loss = 0.9 * loss * np.exp(rng.normal(0, noise))
                lines.append(f"{member}{word} {i}/80 val_loss {val_loss:.4f} {measure}")
    score = float(np.mean(ends)) * np.exp(-0.05 * (1 - 1 / members))
    if upto == 1.0:
        if members > 1:
            for k, end in enumerate(ends, 1):
                together = "the members so far together: 1.0 nats per token"
                lines.append(f"member {k} alone: {end:.6f}; {together}")
        lines.append("trained for 1.0 s, 1,000 tokens seen, 1e+10 FLOPs, peak memory 1 MiB")
        lines.append(f"val_loss {score:.6f} nats per token, 1.0 bits per byte, 1 tokens scored")
    path.parent.mkdir(parents=True, exist_ok=True)
    header = "==== source x.py bytes=9 sha256=0\n==== end of source\n"
    path.write_text("\n".join([f"{header}config {json.dumps(config)}", *lines, ""]))
    return score


def write_library(root, rng, evals=FIRST_TOKENS):
    """40 finished runs of 20 recipes."""
    for width in np.geomspace(16, 128, 20).astype(int).tolist():
        for seed in (0, 1):
            path = root / "records" / "ablations" / "pocket" / f"{evals[0]}_w{width}_s{seed}.log"
            write_log(path, rng, seed, width, evals=evals)


@pytest.fixture
def root(tmp_path):
    """A repository with the records' rules and a library of runs."""
    write_library(tmp_path, np.random.default_rng(1))
    tracks = (ROOT / "records" / "tracks.json").read_text()
    (tmp_path / "records" / "tracks.json").write_text(tracks)
    return tmp_path


# ---- logs


def test_what_a_log_says(tmp_path):
    write_log(tmp_path / "log.txt", np.random.default_rng(0), members=2)
    first, second = fc.read_curves(tmp_path / "log.txt")
    assert (first["member"], second["member"], first["members"]) == (1, 2, 2)
    assert first["evals"].shape == (7, 2) and first["evals"][3, 0] == 0.5
    assert first["steps"].shape == (80, 2) and first["done"] == 1
    assert first["final"] != second["final"] and first["score"] == second["score"]
    assert first["flops"] == 5e9


def test_what_is_no_log(tmp_path):
    (tmp_path / "noise.txt").write_text("config {")
    for name in ("noise.txt", "none.txt"):
        with pytest.raises(Refused, match=name):
            fc.read_curves(tmp_path / name)


def test_the_log_of_a_real_run(finished_run):
    """The log of the training script: all steps, evaluations between them, one model and its score."""
    record = json.loads((finished_run / "record.json").read_text())
    [curve] = fc.read_curves(finished_run / "log.txt")
    assert len(curve["steps"]) == record["steps"] and curve["done"] == 1
    assert len(curve["evals"]) > 0 and 0 < curve["evals"][0, 0] < 1
    assert curve["kind"] == fc.SPREAD
    assert curve["score"] == curve["final"] == pytest.approx(record["val_loss"], abs=1e-6)


def test_the_loss_of_bags_is_not_read_as_that_of_a_token(tmp_path):
    write_log(tmp_path / "log.txt", np.random.default_rng(0), upto=0.25, bags_until=0.5)
    [curve] = fc.read_curves(tmp_path / "log.txt")
    assert len(curve["steps"]) == 0 and curve["done"] == 0.25 and len(curve["evals"]) == 2
    write_log(tmp_path / "log.txt", np.random.default_rng(0), bags_until=0.5, upto=0.75)
    [curve] = fc.read_curves(tmp_path / "log.txt")
    assert len(curve["steps"]) == 20 and curve["steps"][0, 0] > 0.5 and curve["done"] == 0.75


def test_a_log_of_another_kind_spoils_nothing(root):
    """A script without a size that tells runs apart and a cut log are left out. Such a run is not forecast.
    One without a rate or a schedule of these names is."""
    before = len(fc.library("pocket", root))
    path = root / "records" / "pocket" / "other" / "log.txt"
    write_log(path, np.random.default_rng(3))
    assert len(fc.library("pocket", root)) == before + 1
    path.write_text(path.read_text().replace('"muon_lr"', '"rate"').replace('"warmdown"', '"cosine"'))
    assert len(fc.library("pocket", root)) == before + 1
    path.write_text(path.read_text().replace('"n_embd"', '"width"'))
    (root / "records" / "ablations" / "pocket" / "cut.log").write_text("==== source x")
    assert len(fc.library("pocket", root)) == before
    with pytest.raises(Refused, match="n_embd"):
        fc.forecast(path.parent, root)


# ---- forecasts


def test_a_forecast_holds_the_end(root):
    """Runs of widths that are not in the library: their end lies in the interval as often as that says.

    Of 30 ends, 80% are expected inside, with a standard deviation of 7%: 55% to 98% are more than 3 of these
    below and 2.5 above. What nobody can know of an end is 1% of it or less, and each evaluation is as noisy,
    so the median error is about 0.01; the evaluations themselves are off by 0.1 and more.
    """
    rng = np.random.default_rng(2)
    inside = []
    errors = []
    for i in range(30):
        run = root / "runs" / str(i)
        end = write_log(run / "log.txt", rng, 5, int(rng.integers(18, 120)), upto=0.5)
        _, _, life = fc.forecast(run, root)
        assert [done for done, _, _ in life] == [0.125, 0.25, 0.375, 0.5]
        _, _, values = life[-1]
        low, middle, high = fc.quantiles(values)
        inside.append(low < end < high)
        errors.append(abs(middle - end))
    assert 0.55 < np.mean(inside) < 0.98
    assert np.median(errors) < 0.02


@pytest.mark.parametrize("members", [1, 3])
def test_only_what_was_known_is_used(root, members):
    """Nothing that a log holds after a moment moves the forecast of that moment.

    That goes for what the members score alone, too, which is at the very end.
    """
    write_log(root / "runs" / "a" / "log.txt", np.random.default_rng(3), 5, 50, members=members)
    lines = (root / "runs" / "a" / "log.txt").read_text().splitlines()
    last = "member 3 probe 40/80" if members > 1 else "probe 40/80"
    cut = next(i for i, line in enumerate(lines) if line.startswith(last))
    (root / "runs" / "b").mkdir()
    (root / "runs" / "b" / "log.txt").write_text("\n".join(lines[: cut + 1]) + "\n")
    _, _, whole = fc.forecast(root / "runs" / "a", root)
    _, _, part = fc.forecast(root / "runs" / "b", root)
    assert len(whole) == 7 * members and len(part) == len(whole) - 3
    for (_, _, one), (_, _, other) in zip(whole, part):
        assert np.array_equal(one, other)


def test_more_evaluations_than_others_had(root):
    """A run with sixteen evaluations is predicted as far as the library's eight go, and by all of them."""
    path = root / "runs" / "a" / "log.txt"
    write_log(path, np.random.default_rng(3), 5, 50)
    late = "probe 76/80 val_loss 0.8000 on the first 40,000 tokens\nstep 76/80"
    path.write_text(path.read_text().replace("step 76/80", late))
    _, _, life = fc.forecast(path.parent, root)
    assert [done for done, _, _ in life] == [k / 8 for k in range(1, 8)]


def test_kinds_of_evaluations_are_not_mixed(root):
    """A forecast learns from runs with evaluations of its kind, and is refused where these are too few."""
    rng = np.random.default_rng(3)
    run = root / "runs" / "new"
    end = write_log(run / "log.txt", rng, 5, 50, upto=0.5, evals=SPREAD)
    with pytest.raises(
        Refused, match="only 0 finished runs on pocket with evaluations spread over validation"
    ):
        fc.forecast(run, root)
    write_library(root, rng, SPREAD)
    _, _, life = fc.forecast(run, root)
    # Three times the noise of 1% that is in the end and in each evaluation.
    assert np.median(life[-1][-1]) == pytest.approx(end, rel=0.03)

    # Old runs that ended at half of what their evaluations promised would move it, if they were read.
    for path in (root / "records" / "ablations" / "pocket").glob("probe_*.log"):
        text = path.read_text()
        score = float(text.split("\nval_loss ")[1].split()[0])
        path.write_text(text.replace(f"\nval_loss {score:.6f}", f"\nval_loss {score / 2:.6f}"))
    _, _, again = fc.forecast(run, root)
    assert np.array_equal(life[-1][-1], again[-1][-1])


def test_the_bar_is_what_compare_asks_for():
    """A loss at the bar, with a text error as records have it, has a p-value near 0.01.

    The bar is 2.75 standard errors of the seeds; with the text's error beside them it is a little less.
    """
    dataset = read_tracks()["datasets"]["pocket"]
    seed_sd = dataset["seed_sd"]
    text = 0.0009
    gap = 2.75 * 2**0.5 * seed_sd
    limit, name = fc.bar("pocket_unlimited")
    assert float(name.split()[-1]) - limit == pytest.approx(gap, abs=1e-4)
    sums = np.full(400, 700.0) + np.random.default_rng(0).normal(0, text * 1000 * 20, 400)
    a = (sums - sums.mean() + (0.7 - gap) * 1000, np.array([0.7 - gap]), 399_999)
    b = (np.full(400, 700.0), np.array([0.7]), 399_999)
    assert 0.008 < compare_scores(a, b, dataset)["p"] < 0.012


def test_a_finished_run_is_not_predicted_from_itself(root):
    """A recipe that ends half as high again as its curve promises.

    Its own runs tell that of a third seed that is still running. Nobody else's tell it of them.
    """
    rng = np.random.default_rng(6)
    folder = root / "records" / "ablations" / "pocket"
    for seed in (0, 1, 2):
        path = folder / f"odd_s{seed}.log"
        end = write_log(path, rng, seed, 50, dropout=0.5)
        path.write_text(path.read_text().replace(f"val_loss {end:.6f}", f"val_loss {1.5 * end:.6f}"))
    lines = (folder / "odd_s2.log").read_text().splitlines()
    medians = {}
    for name, kept in (("finished", lines), ("running", lines[:-2])):
        run = root / "runs" / name
        run.mkdir(parents=True)
        (run / "log.txt").write_text("\n".join(kept) + "\n")
        _, _, life = fc.forecast(run, root)
        medians[name] = np.median(life[-1][-1])
    # The two are 50% apart: 15% is far from the other.
    assert medians["finished"] == pytest.approx(end, rel=0.15)
    assert medians["running"] == pytest.approx(1.5 * end, rel=0.15)


def test_members_together(root):
    """The gain of an ensemble comes from finished ones: here it is 5% of the loss, times 1 - 1/n."""
    rng = np.random.default_rng(4)
    for k, members in enumerate((2, 3, 4)):
        path = root / "records" / "ablations" / "tried" / f"e{k}.log"
        write_log(path, rng, 0, 40 + k, members=members)
    run = root / "runs" / "e"
    end = write_log(run / "log.txt", rng, 7, 60, members=4)
    _, _, life = fc.forecast(run, root)
    alone = np.mean([curve["final"] for curve in fc.read_curves(run / "log.txt")])
    middle = np.median(life[-1][-1])
    assert len(life) == 28
    # Each of four members is predicted with an error of about 1%; their mean is off by half of that. The gain
    # is 3.75% of the loss, of which half must be seen.
    assert middle == pytest.approx(end, rel=0.015)
    assert middle < alone * (1 - 0.0375 / 2)


# ---- refusals


def test_too_little_to_learn_from(root):
    write_log(root / "runs" / "x" / "log.txt", np.random.default_rng(0), data="elsewhere")
    with pytest.raises(Refused, match="only 0 finished runs"):
        fc.forecast(root / "runs" / "x", root)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["run", "nowhere"], "nowhere"),
        (["watch", "0.05", "--", "true"], "--run_dir"),
        (["watch", "0.05", "--every", "-1", "--", "true", "--run_dir=x"], "--every"),
        (["ladder", "--vary", "epochs=1,2", "--predict", "3"], "three rungs"),
        (["ladder", "--vary", "epochs=1,x,4", "--predict", "3"], "numbers"),
        (["ladder", "--vary", "epochs=4,2,1", "--predict", "8"], "small to large"),
        (["ladder", "--vary", "epochs=1,2,4", "--predict", "8", "--seeds", "0"], "--seeds"),
        (["ladder", "--vary", "n_embd=8,16,32", "--predict", "64", "--parameters"], "--check"),
    ],
)
def test_mistakes_get_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        fc.main(argv)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and words in err, err


# ---- the ladder


def law(x):
    return 0.5 + 40 * x**-0.4


SIZES = np.array([1e5, 2e5, 4e5, 8e5])
NEXT = 1.6e6


def test_power_law_is_found_again():
    """Floors are tried in steps of 2% of the smallest loss, so the best one is off by at most half a step."""
    floor, level, power = fc.fit_power_law(SIZES, law(SIZES))
    assert floor + level * NEXT**-power == pytest.approx(law(NEXT), rel=0.01)
    with pytest.raises(Refused, match="no power law"):
        fc.fit_power_law(SIZES, 1 + SIZES / 1e6)


def test_the_interval_of_a_ladder():
    """Three seeds with a spread of half a percent: the interval of 80% holds the next run at least as often.

    It is wider than that spread, as a law is only assumed to hold to 2%. Of 40 trials, 80% would be inside
    with a standard deviation of 6%: the bound is 3 of these below.
    """
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(40):
        rungs = [list(law(size) * np.exp(rng.normal(0, 0.005, 3))) for size in SIZES]
        low, high = np.quantile(fc.predict_ladder(SIZES, rungs, NEXT, rng, 200), (0.1, 0.9))
        inside.append(low < law(NEXT) * np.exp(rng.normal(0, 0.005)) < high)
    assert np.mean(inside) > 0.6


# ---- the watcher

# This stands for a training script: it logs an evaluation, and waits for SIGTERM.
TRAINING = """
import pathlib, signal, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--run_dir") + 1])
folder.mkdir()
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("stopped and saved"))
log = ["==== source x.py bytes=9 sha256=0", "==== end of source", "config {}"]
(folder / "log.txt").write_text("\\n".join([*log, "eval 1/8 val_loss 3.0 on a part of validation"]))
signal.pause()
"""

# The forecast is replaced: a run never has a chance.
WATCHER = """
import sys
sys.path.insert(0, {records!r})
import numpy as np
import forecast as fc
life = [(at, 3.0, np.full(fc.DRAWS, 3.0)) for at in (0.25, 0.375, 0.5)]
fc.forecast = lambda folder: ([], (0.5, "the standing one"), life)
fc.main(sys.argv[1:])
"""


def test_a_run_without_a_chance_is_stopped(tmp_path):
    """The watcher sees a new evaluation, asks the run to stop, and says why and how to go on."""
    run = tmp_path / "run"
    training = [sys.executable, "-c", TRAINING, "--run_dir", str(run)]
    watcher = WATCHER.replace("{records!r}", repr(str(ROOT / "records")))
    command = [sys.executable, "-c", watcher, "watch", "0.05", "--every", "0.2", "--", *training]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "stopped and saved" in done.stderr, done.stderr
    reason = "the chance that this run beats the standing one is 0.0%, below 5.0% for the 3rd time in a row"
    assert reason in done.stdout and f"--resume {run}" in done.stdout


def test_a_run_that_cannot_be_forecast_goes_on(tmp_path, capsys):
    (tmp_path / "log.txt").write_text("no log of a run, val_loss 1.0")
    assert fc.reason_to_stop(tmp_path, 0.05) is None
    assert "not the log of a run" in capsys.readouterr().out


def test_the_watcher_ends_as_the_run_does(tmp_path):
    training = [sys.executable, "-c", "raise SystemExit(3)", "--run_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        fc.main(["watch", "0.05", "--every", "0.2", "--", *training])
    assert stopped.value.code == 3
