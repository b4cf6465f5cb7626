"""
Make one run of several finished ones: chains that were trained apart become the chains of one ensemble.

    python records/join.py runs/A runs/B ... --run_dir runs/JOINED

The runs have one recipe and different seeds. The new run is trained but not scored, as if the chains had
trained side by side: its clock is that of the slowest one, and their ranks add up. The command that scores it
is printed. This works on files alone, and imports nothing of the script that wrote them.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from reading import (
    MAX_LOG_BYTES,
    MAX_WEIGHTS_BYTES,
    Refused,
    file_digest,
    printable,
    read_json,
    read_plain,
    require_keys,
    split_log,
    write_json,
)

# A checkpoint is a file state-NUMBER.DIGEST.json, numbered by the model and the step that come next, as MODEL
# * STEPS + STEP. Final weights are weights-MODEL.DIGEST.pt. A digest is the beginning of the sha256 of a
# file's bytes. config.json states that of the rest of itself.
STEPS = 10**7

# The state of a finished run has a clock and no weights.
MAX_STATE_BYTES = 2**20

MAX_MEMBERS = 1000


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def check_numbers(content, *names, kind=int):
    """TypeError, unless these entries of a dict are numbers of this type, from 0 up to a trillion."""
    for name in names:
        value = content[name]
        if type(value) is not kind or not 0 <= value <= 10**12:
            raise TypeError(f"{name} is {value!r:.40}")


def json_sha256(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Chain:
    """A finished run that is to become a chain: what its files say."""

    def __init__(self, folder):
        self.folder = folder
        if not (folder / "record.json").exists():
            resume = f"python train_gpt.py --resume {folder}"
            raise Refused(f"{folder}: is not the folder of a finished run; finish one with: {resume}")
        try:
            self.stored = read_json(folder / "config.json")
            require_keys(self.stored, "config", "data", "steps", "sha256")
            if self.stored.pop("sha256") != json_sha256(self.stored):
                raise ValueError("the content of config.json does not match its sha256")
            self.config = self.stored["config"]
            require_keys(self.config, "seed", "members", "chains", "student")
            check_numbers(self.config, "seed", "members")
            if not 1 <= self.config["members"] <= MAX_MEMBERS:
                raise ValueError(f"{self.config['members']} members")
            # The log ends where training did. What follows is the score of this chain alone.
            self.state = read_state(folder)
            self.progress = self.state["progress"]
            check_numbers(self.progress, "log_bytes", "ranks", "threads")
            check_numbers(self.progress, "seconds", "compile_seconds", kind=float)
            log = read_plain(folder / "log.txt", MAX_LOG_BYTES)[: self.progress["log_bytes"]]
            sources, lines = split_log(log)
            self.source_part = log[: len(log) - len(lines)]
            self.sources_sha256 = " ".join(source.sha256 for source in sources)
            self.lines = lines.decode()
            self.weights = [self.find_weights(k) for k in range(self.config["members"])]
        except OSError as e:
            raise Refused(f"{e.filename}: {e.strerror}")
        except (ValueError, KeyError, TypeError) as e:
            what = printable(f"{type(e).__name__}: {e}"[:200])
            raise Refused(f"{folder}: damaged, or of another kind of script ({what})")
        if self.state["source"] != self.sources_sha256:
            raise Refused(f"{folder}: its log and its checkpoint are of different scripts")
        if self.config["chains"] != 1 or self.config["student"]:
            raise Refused(f"{folder}: has chains or a student already")

    def find_weights(self, k):
        """The file of the final weights of a member."""
        for path in self.folder.glob(f"weights-{k:07d}.*.pt"):
            if file_digest(path, MAX_WEIGHTS_BYTES).hex()[:16] == path.name.split(".")[-2]:
                return path
        raise Refused(f"{self.folder}: the weights of member {k + 1} are missing or damaged")

    def recipe(self):
        """What must be the same in all chains: everything but the seed."""
        config = self.config | {"seed": None}
        return (
            config,
            self.stored["data"],
            self.stored["steps"],
            self.stored.get("trial"),
            self.sources_sha256,
        )

    def seeds(self):
        """Of its members, as the training script derives them."""
        return {self.config["seed"] + 1000 * k for k in range(self.config["members"])}

    def numbered_lines(self, first):
        """The lines of the log behind the source, with members numbered from `first` on."""

        def renumber(found):
            return f"member {first + int(found[1] or 1) - 1} "

        of_member = r"(?m)^(?:member (\d{1,9}) )?(?=(?:step|probe|eval) \d|done:)"
        return re.sub(of_member, renumber, self.lines).rstrip()


def read_state(folder):
    """The newest undamaged checkpoint of a run. KeyError or TypeError where there is none."""
    paths = folder.glob("state-*.*.json")
    for path in sorted(paths, key=lambda path: (len(path.name), path.name), reverse=True):
        data = read_plain(path, MAX_STATE_BYTES)
        if digest(data) != path.name.split(".")[-2]:
            continue
        state = read_json(path)
        require_keys(state, "source", "recipe", "progress")
        require_keys(state["progress"], "seconds", "compile_seconds", "ranks", "threads", "log_bytes")
        return state
    raise KeyError("no undamaged checkpoint")


def check_chains(chains):
    first = chains[0]
    seeds = set()
    for chain in chains:
        if chain.recipe() != first.recipe():
            raise Refused(f"{chain.folder}: differs from {first.folder} in more than the seed")
        if seeds & chain.seeds():
            raise Refused(
                f"{chain.folder}: has members of the same seeds as another run; join different seeds"
            )
        seeds |= chain.seeds()


def write_run(chains, folder):
    """Write the files of the joined run into a folder."""
    first = chains[0]
    members = len(chains) * first.config["members"]
    config = first.config | {"members": members, "chains": len(chains)}
    stored = first.stored | {"config": config}
    write_json(folder / "config.json", stored | {"sha256": json_sha256(stored)})

    lines = [f"config {json.dumps(config)}", f"data {json.dumps(first.stored['data'])}"]
    weights = []
    for i, chain in enumerate(chains, 1):
        clock = chain.progress
        size = f"{clock['ranks']} rank(s), {clock['seconds']:.1f} s"
        lines.append(f"chain {i} of {len(chains)}: {size}, seed {chain.config['seed']}")
        lines.append(chain.numbered_lines(len(weights) + 1))
        for path in chain.weights:
            _, file_digest, _ = path.name.rsplit(".", 2)
            weights.append(f"weights-{len(weights):07d}.{file_digest}.pt")
            shutil.copyfile(path, folder / weights[-1])
    log = first.source_part + "\n".join([*lines, ""]).encode()
    (folder / "log.txt").write_bytes(log)

    clocks = [chain.progress for chain in chains]
    progress = {
        "model": members,
        "step": 0,
        "seconds": max(clock["seconds"] for clock in clocks),
        "compile_seconds": max(clock["compile_seconds"] for clock in clocks),
        "ranks": sum(clock["ranks"] for clock in clocks),
        "threads": max(clock["threads"] for clock in clocks),
        "log_bytes": len(log),
    }
    state = first.state | {"progress": progress, "shards": [], "weights": weights}
    data = json.dumps(state, indent=1).encode()
    (folder / f"state-{members * STEPS:07d}.{digest(data)}.json").write_bytes(data)
    return members


def join(folders, run):
    """Make the run, all of it or nothing. Returns the number of its members."""
    if run is None or len(folders) < 2:
        raise Refused("name several runs of different seeds, and with --run_dir a new folder")
    if os.path.lexists(run):
        raise Refused(f"--run_dir {run}: exists already; name a new folder")
    chains = [Chain(folder) for folder in folders]
    check_chains(chains)
    staged = None
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".join-", dir=run.parent))
        members = write_run(chains, staged)
        staged.chmod(0o755)
        staged.rename(run)
    except OSError as e:
        raise Refused(f"{e.filename}: {e.strerror}")
    finally:
        if staged and staged.exists():
            shutil.rmtree(staged)
    return members


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of finished runs")
    parser.add_argument("--run_dir", type=Path, metavar="DIR", help="the new folder")
    args = parser.parse_args(argv)
    try:
        members = join(args.runs, args.run_dir)
    except Refused as e:
        print(f"join.py: {e}", file=sys.stderr)
        sys.exit(2)
    chains = f"{members} members in {len(args.runs)} chains"
    print(f"{args.run_dir}: {chains}; score them with: python train_gpt.py --resume {args.run_dir}")


if __name__ == "__main__":
    main()
