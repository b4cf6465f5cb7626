"""
What a track's rules make of a run, finished or not. train_gpt.py asks while it trains and shows the answer:

    python records/leaderboard.py judge runs/NAME [--seconds S] [--flops F]

It reads the run's folder alone and promises nothing: `verify` decides, once there is a record.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from reading import (
    OPEN,
    ROOT,
    Hardware,
    Refused,
    expected_hashes,
    mean_loss,
    read_json,
    read_log,
    read_tracks,
    seeds_wanted,
    standing_record,
    today,
)

WORDS = {  # of a limit that a run is over
    "train_tokens": "--train_tokens {:,} of {:,} that are allowed",
    "train_seconds": "training took {:,.0f} s, the track allows {:,}",
    "train_flops": "training takes {:.3g} FLOPs, the track allows {:.3g}",
    "ranks": "{} ranks, {} are allowed",
    "cores": "{} cores, {} are allowed",
}


def judge(run, seconds=None, flops=None, root=ROOT):
    """Lines for whoever trains the run in folder `run`. seconds: when its training will end, by its own
    estimate; then the answer is about the clock alone. flops: of its whole training, by its own count."""
    try:
        started = read_json(run / "config.json")
        record = read_json(run / "record.json") if (run / "record.json").exists() else None
        tracks = read_tracks(root)
        track = started["config"]["track"]
        rules = tracks["tracks"][track]
        if seconds is not None:
            return clock(track, seconds, rules.get("max_seconds"))
        claims = claims_so_far(run, started, record, flops)
        hashes = expected_hashes(root, tracks, rules["dataset"])
        faults = faults_of(claims, tracks, hashes)
        standing = standing_record(root, track)
        lines = [f"this run cannot become a record: {fault}" for fault in faults]
        if record is None:
            return [*begun(track, rules, standing), *lines]
        return [*finished(record, rules, standing), *lines, *next_steps(run, rules, standing, faults)]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise Refused(f"{run}: not the folder of a run ({type(e).__name__}: {e})")


def faults_of(claims, tracks, hashes):
    """Why a run cannot become a record, a line for each reason.

    claims: of the run, as in record.json. hashes: of its dataset's shards, from expected_hashes().
    """
    rules = tracks["tracks"][claims["track"]]
    faults = []
    if claims["trial"]:
        faults.append("it is a trial (--steps, or an edited script)")
    for what, value, limit in over_the_limits(claims, rules, tracks["datasets"][rules["dataset"]]):
        faults.append(WORDS[what].format(value, limit))
    wanted = other_hardware(claims, rules)
    if wanted:
        faults.append(f"it ran on {claims['hardware']}, the track is for {wanted}")
    for name, digest in claims["data_sha256"].items():
        if hashes.get(name) not in (digest, OPEN):
            faults.append(f"{name} is not the track's")
    return faults


def over_the_limits(claims, rules, dataset):
    """(what, its value, the track's limit) of everything in which a run is over one. claims: train_tokens,
    train_seconds, train_flops, ranks and threads, as in record.json."""
    values = {
        "train_tokens": (claims["train_tokens"], dataset["train_tokens"]),
        "train_seconds": (claims["train_seconds"], rules.get("max_seconds")),
        "train_flops": (claims["train_flops"], rules.get("max_flops")),
        "ranks": (claims["ranks"], rules.get("max_ranks")),
        "cores": (claims["ranks"] * claims["threads"], rules.get("max_cores")),
    }
    return [(what, value, limit) for what, (value, limit) in values.items() if limit and value > limit]


def other_hardware(claims, rules):
    """What the track is for, in words, if the claimed hardware is something else; else None."""
    names = rules.get("hardware", [])
    if not names or any(name in claims["hardware"] for name in names):
        return None
    return " or ".join(names)


def claims_so_far(run, started, record, flops):
    """What faults_of() asks for, of a run that may have no record.json yet."""
    machines = read_log(run / "log.txt").of(Hardware)
    claims = {
        "train_tokens": started["config"]["train_tokens"],
        "train_seconds": 0.0,
        "train_flops": flops or 0.0,
        "ranks": max((machine.ranks for machine in machines), default=1),
        "threads": max((machine.threads for machine in machines), default=1),
        "hardware": machines[-1].name if machines else "",
    }
    if record is not None:
        claims |= record
    return claims | {
        "track": started["config"]["track"],
        "trial": started.get("trial", started.get("steps") is not None),
        "data_sha256": started["data"]["sha256"],
    }


def clock(track, seconds, cap):
    """Whether training will end in the track's time, if it has such a limit."""
    if not cap:
        return []
    when = f"training will end after {seconds:,.0f} s, and {track} allows {cap:,}"
    if seconds <= cap:
        return [f"at this speed, {when}"]
    return [f"TOO SLOW: at this speed, {when}; start again with --fit, or with fewer --epochs"]


def begun(track, rules, standing):
    lines = [f"track {track}: {rules['title']}"]
    if standing:
        folder, best = standing
        lines.append(f"the standing record has {mean_loss(best):.4f} ({folder.name})")
    return lines


def finished(record, rules, standing):
    lines = []
    seconds = record["train_seconds"]
    cap = rules.get("max_seconds")
    if cap and seconds <= cap:
        lines.append(f"training took {seconds:,.1f} s of the {cap:,} s that {record['track']} allows")
    flops = record["train_flops"]
    cap = rules.get("max_flops")
    if cap and flops <= cap:
        lines.append(f"training took {flops:.3g} FLOPs of the {cap:.3g} that {record['track']} allows")
    if standing:
        folder, best = standing
        difference = record["val_loss"] - mean_loss(best)
        side = "below" if difference < 0 else "above"
        lines.append(
            f"{abs(difference):.4f} {side} the standing record, {mean_loss(best):.4f} ({folder.name})"
        )
    return lines


def next_steps(run, rules, standing, faults):
    """What to type next."""
    name = os.path.relpath(run)
    lines = ["next:"]
    if standing:
        lines.append(f"  python records/leaderboard.py compare {name}")
    lines.append(f"  python records/audit.py {name}")
    lines.append(f"  python train_gpt.py --sample {name}")
    if not faults:
        others = " RUN_OF_ANOTHER_SEED" * (seeds_wanted(rules, today()) - 1)
        lines.append(f"  python records/leaderboard.py submit {name}{others} --slug NAME --note NOTE.md")
    return lines
