"""
How far a loss varies from seed to seed, by the logs of this repository: leaderboard.py spread.

Most comparisons have one to three seeds on each side, too few to tell a spread. So it is pooled once for each
dataset, and tracks.json states it as seed_sd with its degrees of freedom, seed_df.
"""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from compare import FEWEST_SEEDS
from reading import ROOT, Refused, Score, read_log, read_tracks

# The runs that this repository made to measure something. Their recipes are the ones that count.
MEASURED = ("ablations", "baselines")

# With fewer degrees of freedom no spread is stated. With ten, its 95% interval reaches from 0.70 to 1.75
# times what was measured, and a single recipe with three seeds can make up most of it, as on prose.
FEWEST_DF = 20


class Group(NamedTuple):
    """Runs of one recipe that differ in the seed alone. losses: {seed: loss in nats per token}.

    counts: whether they enter the pooled spread.
    """

    name: str
    losses: dict
    counts: bool

    @property
    def variance(self):
        return float(np.var(list(self.losses.values()), ddof=1))

    @property
    def df(self):
        return len(self.losses) - 1


def seed_groups(root, dataset):
    """The Groups of at least FEWEST_SEEDS seeds that were scored on this dataset, by name.

    A recipe is a config without its seed, and the script that ran it. Records lend their seeds to recipes
    that MEASURED has, but make no group of their own: their authors could choose the seeds. Recipes without
    look-up inputs (option recall) do not count. Whether so small a model learns to copy by itself is a matter
    of luck, which spreads its losses far, and every standing record has these inputs. Nor do recipes on less
    than a quarter of the budget: losses spread further on so little text. Multi-token prediction counts: the
    records use it, and it makes the pooled spread larger.
    """
    found = {}
    for folder in (*MEASURED, *read_tracks(root)["tracks"]):
        records = root / "records" / folder
        for path in sorted([*records.glob("*/log*.txt"), *records.glob("*/*.log")]):
            try:
                log = read_log(path)
                on_this = log.data["sha256"]["val.bin"] == dataset["sha256"]["val.bin"]
                seed = log.config["seed"]
                on_enough = log.config["train_tokens"] >= dataset["train_tokens"] / 4
            except (OSError, ValueError, KeyError, TypeError):
                # A damaged log, or one that tells no data. In a record, verify names it.
                continue
            scores = log.of(Score)
            if not on_this or not scores:
                continue
            recipe = json.dumps([log.sources[0].sha256, log.config | {"seed": None}], sort_keys=True)
            if recipe not in found and folder in MEASURED:
                name = path.relative_to(root / "records").as_posix()
                found[recipe] = Group(name, {}, bool(log.config.get("recall")) and on_enough)
            if recipe in found:
                # A record's own log may be among the measured ones, too.
                found[recipe].losses.setdefault(seed, scores[-1].val_loss)
    groups = [group for group in found.values() if len(group.losses) >= FEWEST_SEEDS]
    return sorted(groups, key=lambda group: group.name)


def pooled(groups):
    """(standard deviation in nats per token, its degrees of freedom) of all Groups that count, pooled; (0, 0)
    where there are too few to tell."""
    counting = [group for group in groups if group.counts]
    df = sum(group.df for group in counting)
    if df < FEWEST_DF:
        return 0.0, 0
    return math.sqrt(sum(group.df * group.variance for group in counting) / df), df


def spread_command(args):
    """Print each dataset's groups, and what belongs in tracks.json. True where tracks.json says otherwise."""
    tracks = read_tracks()
    if args.dataset not in tracks["datasets"]:
        raise Refused(f"dataset {args.dataset!r}: choose one of {', '.join(tracks['datasets'])}")
    dataset = tracks["datasets"][args.dataset]
    groups = seed_groups(ROOT, dataset)
    for group in groups:
        losses = " ".join(f"{loss:.6f}" for _, loss in sorted(group.losses.items()))
        note = "" if group.counts else "  does not count: no look-up inputs, or too little text"
        print(f"{math.sqrt(group.variance):.4f}  {group.name}  {losses}{note}")
    sd, df = pooled(groups)
    if df == 0:
        print(f"{args.dataset}: too few recipes with {FEWEST_SEEDS} seeds; tracks.json states no spread")
        return False
    stated = (dataset.get("seed_sd"), dataset.get("seed_df"))
    found = (round(sd, 5), df)
    print(f'pooled: "seed_sd": {found[0]}, "seed_df": {found[1]}')
    if stated != found:
        print(f"tracks.json states {stated[0]} with {stated[1]} degrees of freedom")
    return stated != found
