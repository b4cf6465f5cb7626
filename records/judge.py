"""
What a track's rules make of a run, finished or not. train_gpt.py asks while it trains and shows the answer:

    python records/leaderboard.py judge runs/NAME [--seconds S]

It reads the run's folder alone and promises nothing: `verify` decides, once there is a record.
"""

import math
import os

from audit import OPEN, ROOT, Refused, read_tracks


def judge(run, seconds=None, root=ROOT):
    """Lines for whoever trains the run in folder `run`. seconds: when its training will end, by its own
    estimate; then only what is wrong is said."""
    from leaderboard import HARDWARE, earlier_records, mean_loss, read_json

    try:
        started = read_json(run / "config.json")
        config = started["config"]
        tracks = read_tracks(root)
        track = config["track"]
        rules = tracks["tracks"][track]
        dataset = tracks["datasets"][rules["dataset"]]
        record = read_json(run / "record.json") if (run / "record.json").exists() else None
        log = (run / "log.txt").read_text(errors="replace")
        faults = fixed_faults(started, rules, dataset, HARDWARE, log)
        if seconds is not None:
            return clock_faults(seconds, rules, "at this speed training will take", "; lower --epochs")
        standing = earlier_records(root, track, "~")
        lines = []
        if standing:
            folder, best = min(standing, key=lambda entry: mean_loss(entry[1]))
            best_loss = mean_loss(best)
        if record is None:
            lines.append(f"track {track}: {rules['title']}")
            if standing:
                lines.append(f"the standing record has {best_loss:.4f} ({folder.name})")
        else:
            faults += clock_faults(record["train_seconds"], rules, "training took", "")
            if "max_seconds" in rules and not faults:
                took = f"training took {record['train_seconds']:,.1f} s"
                lines.append(f"{took} of the {rules['max_seconds']:,} s that {track} allows")
            if standing:
                difference = record["val_loss"] - best_loss
                side = "below" if difference < 0 else "above"
                what = f"the standing record, {best_loss:.4f} ({folder.name})"
                lines.append(f"{abs(difference):.4f} {side} {what}")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise Refused(f"{run}: not the folder of a run ({type(e).__name__}: {e})")
    lines += [f"this run cannot become a record: {fault}" for fault in faults]
    if record is not None:
        lines += next_steps(run, folder if standing else None, faults)
    return lines


def fixed_faults(started, rules, dataset, hardware, log):
    """What is wrong from the start: a trial, other data, too many tokens or cores."""
    faults = []
    config = started["config"]
    if started.get("trial", started.get("steps") is not None):
        faults.append("it is a trial (--steps, or an edited script)")
    if config["train_tokens"] > dataset["train_tokens"]:
        faults.append(
            f"--train_tokens {config['train_tokens']:,} of {dataset['train_tokens']:,} that are allowed"
        )
    for name, digest in started["data"]["sha256"].items():
        if dataset["sha256"].get(name) not in (digest, OPEN):
            faults.append(f"{name} is not the track's")
    machines = [found for found in map(hardware.fullmatch, log.splitlines()) if found]
    ranks = max((int(found[2]) for found in machines), default=1)
    threads = max((int(found[3]) for found in machines), default=1)
    for what, value in (("ranks", ranks), ("cores", ranks * threads)):
        if value > rules.get(f"max_{what}", math.inf):
            faults.append(f"{value} {what}, {rules[f'max_{what}']} are allowed")
    return faults


def clock_faults(seconds, rules, what, remedy):
    cap = rules.get("max_seconds", math.inf)
    if seconds <= cap:
        return []
    return [f"{what} {seconds:,.0f} s, the track allows {cap:,}{remedy}"]


def next_steps(run, standing, faults):
    """What to type next, given the folder of the standing record, if there is one."""
    name = os.path.relpath(run)
    lines = ["next:"]
    if standing:
        lines.append(f"  python records/leaderboard.py compare {name} {os.path.relpath(standing)}")
    lines.append(f"  python records/audit.py {name}")
    lines.append(f"  python train_gpt.py --sample {name} --prompt 'def '")
    if not faults:
        lines.append(f"  python records/leaderboard.py submit {name} --slug NAME --note NOTE.md")
    return lines
