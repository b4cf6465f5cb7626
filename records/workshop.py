"""
A stranger's script at work for the referee: inside walls, with the data that it may see.
"""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from audit import Audit, Scorer, run_limited
from reading import Refused, expected_hashes, read_json, read_shard, write_json, write_shard, write_sources
from walls import walled


class Workshop:
    """A folder in which the script in a record's log runs inside walls, with the data that it may see.

    dataset_name: the track's own dataset, or another one in tracks.json. The script finds itself and its data
    in `given`, which it cannot change. It may write into `work`, and once it is trained, nowhere but into a
    folder that is made anew for each stream that it scores. So it cannot remember what it has scored.
    """

    def __init__(self, folder, log, dataset_name, tracks, root, seconds):
        self.given = Path(folder) / "given"
        self.work = Path(folder) / "work"
        self.streams = Path(folder) / "streams"
        for made in (self.given, self.work, self.streams):
            made.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.seconds = seconds
        self.hidden = [root / "data"]
        self.script = write_sources(self.given, log.sources)
        self.dataset = tracks["datasets"][dataset_name]
        self.data = root / "data" / dataset_name
        prepare = [sys.executable, str(root / "data" / "prepare.py"), dataset_name]
        if not (self.data / "meta.json").exists() and subprocess.run(prepare).returncode != 0:
            raise Refused(f"{self.data}: is not there, and could not be prepared")
        hashes = expected_hashes(root, tracks, dataset_name)
        self.val = read_shard(self.data / "val.bin", hashes["val.bin"])
        train = read_shard(self.data / "train.bin", hashes["train.bin"])
        self.budget, self.beyond = np.split(train, [self.dataset["train_tokens"]])

    def write_data(self, name, val_tokens):
        """A data folder with train.bin cut to the budget, and text from beyond it as val.bin: a decoy.

        Returns (folder, the text beyond the budget that the script is not given).
        """
        folder = self.given / name
        folder.mkdir(exist_ok=True)
        # A decoy begins with a document.
        begins = np.flatnonzero(self.beyond == self.dataset["bos_id"])
        start = int(begins[0]) if len(begins) else 0
        if len(self.beyond) < start + val_tokens:
            raise Refused(f"{self.data / 'train.bin'}: holds too little beyond the budget for a decoy")
        decoy, unseen = np.split(self.beyond[start:], [val_tokens])
        meta = read_json(self.data / "meta.json")
        for shard, tokens in (("train.bin", self.budget), ("val.bin", decoy)):
            write_shard(folder / shard, tokens)
            meta["sha256"][shard] = hashlib.sha256((folder / shard).read_bytes()).hexdigest()
        write_json(folder / "meta.json", meta)
        return folder, unseen

    def options(self, data, **changes):
        """The record's own recipe as options of its script."""
        config = self.log.config | {"data": data, "dtype": "auto"} | changes
        return option_words({name: config[name] for name in self.log.config})

    def run(self, what, command):
        """Run a command inside the walls. Refused where it fails. Returns the seconds that it took."""
        began = time.monotonic()
        status, last = run_limited(walled(command, self.work, self.hidden), self.seconds)
        if status is None:
            raise Refused(f"{what}: took longer than {self.seconds:,} s ({last})")
        if status != 0:
            raise Refused(f"{what}: exit status {status} ({last})")
        return time.monotonic() - began

    def scorer(self, run):
        """The script's own scoring of a run in `work`, as a function of token ids, inside the walls."""
        command = [sys.executable, str(self.script), "--score", str(run), "--tokens", "{tokens}"]
        return WalledScorer([*command, "--nll", "{nll}"], self.streams, self.seconds, self.hidden)

    def audit(self, run, unseen, show):
        """Audit the script's own scoring of a run in `work`. Returns the Audit, when it is done.

        unseen: what write_data() returns, for the tail check.
        """
        audit = Audit(
            self.scorer(run),
            self.val,
            self.dataset["vocab_size"],
            np.random.default_rng(),
            show=show,
            budget=self.budget,
            beyond=unseen,
        )
        audit.run()
        return audit


class WalledScorer(Scorer):
    """A Scorer whose command runs inside walls, in a folder of its own for each call."""

    def __init__(self, command, folder, seconds, hidden):
        super().__init__(command, folder, seconds)
        self.hidden = hidden

    def start(self, words, folder):
        return run_limited(walled(words, folder, self.hidden), self.seconds)


def option_words(config):
    """A config as options of its script."""
    words = []
    for name, value in config.items():
        if isinstance(value, bool):
            value = int(value)
        words += [f"--{name}", str(value)]
    return words
