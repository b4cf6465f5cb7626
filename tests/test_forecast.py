"""Forecasts from logs, the watcher, and the ladder: on made-up curves whose end is known, and on the repository's own records."""
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from conftest import PLAIN, ROOT, TINY, options

sys.path.insert(0, str(ROOT / "records"))
import forecast as fc  # noqa: E402
from audit import Refused  # noqa: E402
from leaderboard import compare_scores  # noqa: E402

CONFIG = dict(track="pocket", data="pocket", train_tokens=1000, seed=0, epochs=1.0, n_embd=64, n_layer=4, batch_tokens=1000, muon_lr=0.02, weight_decay=0.1, dropout=0.0, warmdown=0.6,
              recall="", memory="", members=1, loop_times=0, bag_size=1)


def write_log(path, rng, seed=0, width=64, upto=1.0, members=1, noise=0.01, **config):
    """A log whose losses fall to an end that depends on the width, by a law that is the same for all."""
    config, lines = CONFIG | dict(seed=seed, n_embd=width, members=members) | config, []
    start = lambda k: f"member {k} " if members > 1 else ""  # noqa: E731
    ends = []
    for k in range(1, members + 1):
        end = 0.6 + 8 / width * np.exp(rng.normal(0, noise))
        ends.append(end)
        for i in range(1, 81):
            if i / 80 <= upto:
                loss = end * (1 + 0.8 * (1 - i / 80) ** 2 * width ** 0.1)
                lines.append(f"{start(k)}step {i}/80 epoch {i / 80:.3f} loss {loss * np.exp(rng.normal(0, 0.01)):.4f} lr 0.02 tok/s 1 time {k}.0s left 0s")
                if i % 10 == 0 and i < 80:
                    lines.append(f"{start(k)}probe {i}/80 val_loss {0.9 * loss * np.exp(rng.normal(0, noise)):.4f} on the first 40,000 tokens")
    score = float(np.mean(ends)) * np.exp(-0.05 * (1 - 1 / members))
    if upto == 1.0:
        lines += [f"member {k} alone: {end:.6f}; the members so far together: 1.0 nats per token" for k, end in enumerate(ends, 1)] if members > 1 else []
        lines += ["trained for 1.0 s, 1,000 tokens seen, 1e+10 FLOPs, peak memory 1 MiB", f"val_loss {score:.6f} nats per token, 1.0 bits per byte, 1 tokens scored"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("==== source x\nnothing\n==== end of source\nconfig " + json.dumps(config) + "\n" + "\n".join(lines) + "\n")
    return score


@pytest.fixture
def root(tmp_path):
    """A repository with 40 finished runs of 20 recipes."""
    rng = np.random.default_rng(1)
    for i, width in enumerate(np.geomspace(16, 128, 20).astype(int)):
        for seed in (0, 1):
            write_log(tmp_path / "records" / "ablations" / "pocket" / f"w{width}_s{seed}.log", rng, seed, int(width))
    (tmp_path / "records" / "tracks.json").write_text((ROOT / "records" / "tracks.json").read_text())
    return tmp_path


def test_what_a_log_says(tmp_path):
    write_log(tmp_path / "log.txt", np.random.default_rng(0), members=2)
    first, second = fc.read_curves(tmp_path / "log.txt")
    assert (first["member"], second["member"], first["members"]) == (1, 2, 2) and first["probes"].shape == (7, 2) and first["steps"].shape == (80, 2)
    assert first["final"] != second["final"] and first["score"] == second["score"] and first["flops"] == 5e9
    assert first["probes"][3, 0] == 0.5
    (tmp_path / "noise.txt").write_text("config {")
    for name in ("noise.txt", "none.txt"):
        with pytest.raises(Refused, match=name):
            fc.read_curves(tmp_path / name)


def test_a_forecast_holds_the_end(root):
    """Runs of widths not in the library: their end lies in the interval about as often as the interval says, and nearer than the probe."""
    rng, inside, errors = np.random.default_rng(2), [], []
    for i in range(30):
        run = root / "runs" / str(i)
        end = write_log(run / "log.txt", rng, 5, int(rng.integers(18, 120)), upto=0.5)
        _, _, life = fc.forecast(run, root)
        assert [done for done, *_ in life] == [0.125, 0.25, 0.375, 0.5]
        low, middle, high = np.quantile(life[-1][-1], (0.1, 0.5, 0.9))
        inside.append(low < end < high)
        errors.append(abs(middle - end))
    assert 0.55 < np.mean(inside) < 0.98 and np.median(errors) < 0.02  # the probe is off by 0.1 and more


@pytest.mark.parametrize("members", [1, 3])
def test_only_what_was_known_is_used(root, members):
    """Nothing that a log holds after a moment moves the forecast of that moment, what the members score alone (at the very end) included."""
    write_log(root / "runs" / "a" / "log.txt", np.random.default_rng(3), 5, 50, members=members)
    text = (root / "runs" / "a" / "log.txt").read_text().splitlines()
    cut = next(i for i, line in enumerate(text) if line.startswith("member 3 probe 40/80" if members > 1 else "probe 40/80"))
    (root / "runs" / "b").mkdir()
    (root / "runs" / "b" / "log.txt").write_text("\n".join(text[:cut + 1]) + "\n")
    a, b = (fc.forecast(root / "runs" / name, root)[2] for name in "ab")
    assert len(a) == 7 * members and len(b) == len(a) - 3
    for (*_, one), (*_, other) in zip(a, b):
        assert np.array_equal(one, other)


def test_more_probes_than_others_had(root):
    """A run with sixteen probes is foretold as far as the library's eight go, and by no fewer."""
    write_log(root / "runs" / "a" / "log.txt", np.random.default_rng(3), 5, 50)
    path = root / "runs" / "a" / "log.txt"
    path.write_text(path.read_text().replace("step 76/80", "probe 76/80 val_loss 0.8000 on the first 40,000 tokens\nstep 76/80"))
    assert [done for done, *_ in fc.forecast(root / "runs" / "a", root)[2]] == [k / 8 for k in range(1, 8)]


def test_a_log_of_another_kind_spoils_nothing(root):
    """A record whose script has dropped an option, and a log that was cut short, are left out; to forecast such a run is refused."""
    before = len(fc.library("pocket", root))
    write_log(root / "records" / "pocket" / "other" / "log.txt", np.random.default_rng(3))
    path = root / "records" / "pocket" / "other" / "log.txt"
    assert len(fc.library("pocket", root)) == before + 1
    path.write_text(path.read_text().replace('"muon_lr"', '"rate"'))
    (root / "records" / "ablations" / "pocket" / "cut.log").write_text("==== source x")
    assert len(fc.library("pocket", root)) == before
    with pytest.raises(Refused, match="muon_lr"):
        fc.forecast(path.parent, root)


def test_the_bar_is_what_compare_asks_for():
    """A loss at the bar, with a text error as records have it, has a p-value near 0.01."""
    seed_sd, text = 0.003, 0.0009
    gap = 3.0 * 2 ** 0.5 * seed_sd
    limit, name = fc.bar("pocket_unlimited")
    assert float(name.split()[-1]) - limit == pytest.approx(gap, abs=1e-4)
    sums = np.full(400, 700.0) + np.random.default_rng(0).normal(0, text * 1000 * 20, 400)
    a, b = (sums - sums.mean() + (0.7 - gap) * 1000, np.array([0.7 - gap]), 399_999), (np.full(400, 700.0), np.array([0.7]), 399_999)
    assert 0.005 < compare_scores(a, b, {"seed_sd": seed_sd})["p"] < 0.015


def test_a_finished_run_is_not_foretold_from_itself(root):
    """A recipe that ends half as high again as its curve promises: its own runs tell that of a third seed, and nobody else's tell it of them."""
    rng, folder = np.random.default_rng(6), root / "records" / "ablations" / "pocket"
    for seed in (0, 1, 2):
        end = write_log(folder / f"odd_s{seed}.log", rng, seed, 50, dropout=0.5)
        (folder / f"odd_s{seed}.log").write_text((folder / f"odd_s{seed}.log").read_text().replace(f"val_loss {end:.6f}", f"val_loss {1.5 * end:.6f}"))
    medians = {}
    for name, lines in (("finished", None), ("running", -2)):
        (root / "runs" / name).mkdir(parents=True)
        (root / "runs" / name / "log.txt").write_text("\n".join((folder / "odd_s2.log").read_text().splitlines()[:lines]) + "\n")
        medians[name] = np.median(fc.forecast(root / "runs" / name, root)[2][-1][-1])
    assert medians["finished"] == pytest.approx(end, rel=0.15) and medians["running"] == pytest.approx(1.5 * end, rel=0.15)


def test_members_together(root):
    """The gain of an ensemble comes from finished ones: here 5% of the loss, times 1 - 1/n."""
    rng = np.random.default_rng(4)
    for k, members in enumerate((2, 3, 4)):
        write_log(root / "records" / "ablations" / "tried" / f"e{k}.log", rng, 0, 40 + k, members=members)
    end = write_log(root / "runs" / "e" / "log.txt", rng, 7, 60, members=4)
    _, _, life = fc.forecast(root / "runs" / "e", root)
    assert len(life) == 28 and np.median(life[-1][-1]) == pytest.approx(end, abs=0.01)
    alone = np.mean([curve["final"] for curve in fc.read_curves(root / "runs" / "e" / "log.txt")])
    assert np.median(life[-1][-1]) < alone - 0.015


def test_too_little_to_learn_from(root, tmp_path, capsys):
    write_log(root / "runs" / "x" / "log.txt", np.random.default_rng(0), data="elsewhere")
    with pytest.raises(Refused, match="only 0 finished runs"):
        fc.forecast(root / "runs" / "x", root)
    for argv, words in [(["run", str(tmp_path / "none")], "none"), (["watch", "0.05", "--", "true"], "--run_dir"), (["ladder", "--vary", "epochs=1,2", "--predict", "3"], "three rungs"),
                        (["ladder", "--vary", "epochs=1,x,4", "--predict", "3"], "numbers"), (["ladder", "--vary", "epochs=4,2,1", "--predict", "8"], "small to large"),
                        (["ladder", "--vary", "epochs=1,2,4", "--predict", "8", "--seeds", "0"], "--seeds"), (["ladder", "--vary", "n_embd=8,16,32", "--predict", "64", "--parameters"], "--check"),
                        (["watch", "0.05", "--every", "-1", "--", "true", "--run_dir=x"], "--every")]:
        with pytest.raises(SystemExit) as stop:
            fc.main(argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and words in err, err


def test_power_law_is_found_again():
    x, rng = np.array([1e5, 2e5, 4e5, 8e5]), np.random.default_rng(0)
    law = lambda x: 0.5 + 40 * x ** -0.4  # noqa: E731
    floor, level, power = fc.fit_power_law(x, law(x))
    assert floor + level * 1.6e6 ** -power == pytest.approx(law(1.6e6), rel=0.003)
    inside = []
    for _ in range(40):  # three seeds with a spread of half a percent
        rungs = [list(law(size) * np.exp(rng.normal(0, 0.005, 3))) for size in x]
        low, high = np.quantile(fc.predict_ladder(x, rungs, 1.6e6, rng, 200), (0.1, 0.9))
        inside.append(low < law(1.6e6) * np.exp(rng.normal(0, 0.005)) < high)
    assert 0.6 < np.mean(inside) <= 1.0
    with pytest.raises(Refused, match="no power law"):
        fc.fit_power_law(x, 1 + x / 1e6)


def test_a_run_without_a_chance_is_stopped(tiny_data, tmp_path):
    """The watcher reads the log of a real run, asks it to stop, says why; the run goes on by --resume. Its forecast is replaced: it never has a chance."""
    run, program = tmp_path / "run", tmp_path / "watch.py"
    program.write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'records')!r})\nimport numpy as np, forecast as fc\n"
                       "fc.forecast = lambda folder: ([], (0.5, 'the standing one'), [(at, 3.0, np.full(fc.DRAWS, 3.0)) for at in (0.25, 0.375, 0.5)])\nfc.main(sys.argv[1:])\n")
    train = [sys.executable, str(ROOT / "train_gpt.py"), *options(**TINY | dict(epochs=40.0, probes=40), data=tiny_data), "--run_dir", str(run), *PLAIN]
    done = subprocess.run([sys.executable, str(program), "watch", "0.05", "--every", "0.2", "--", *train], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "the chance that this run beats the standing one is 0.0%, below 5.0% for the 3rd time in a row" in done.stdout and f"--resume {run}" in done.stdout
    assert not (run / "record.json").exists() and list(run.glob("state-*.pt")) and "Traceback" not in done.stderr
    assert "\nstep 1560/1560" not in (run / "log.txt").read_text()


def test_a_run_with_a_chance_ends(tiny_data, tmp_path):
    """No forecast can be made for data that nobody trained on: the watcher says so and lets the run be."""
    train = [sys.executable, str(ROOT / "train_gpt.py"), *options(**TINY, data=tiny_data), "--run_dir", str(tmp_path / "run"), *PLAIN]
    done = subprocess.run([sys.executable, str(ROOT / "records" / "forecast.py"), "watch", "0.05", "--every", "0.2", "--", *train], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "run" / "record.json").exists(), done.stdout + done.stderr


def test_calibration_on_the_repositorys_runs(capsys):
    """What records/README.md says of the forecasts, on whatever runs are there now: none is foretold from its own recipe."""
    fc.main(["calibrate"])
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()[:1].isdigit() and "%" in line.split()[0]}
    for at in ("25.0%", "50.0%", "75.0%"):
        assert 70 <= int(rows[at][0].rstrip("%")) <= 90, out
        forecast, present, line = map(float, rows[at][1:4])
        assert 2 * forecast < min(present, line), out
    for line in out.splitlines()[-2:]:
        saved, lost, records = map(int, re.search(r": (\d+)% of failed FLOPs saved, (\d+) of (\d+)", line).groups())
        assert saved >= 25 and lost <= (0 if "against the best of all others" in line else 0.05 * records), out
