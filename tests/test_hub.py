"""data/prepare.py fineweb, against a small local server that speaks the Hugging Face Hub's protocol."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

from conftest import ROOT
from data import prepare

sys.path.insert(0, str(ROOT / "records"))
import audit

pytestmark = pytest.mark.contract

BOS = 256
COMMIT = "0123456789abcdef" * 2 + "01234567"

# Of 40,000 tokens in two shards.
COUNTS = {"val": 3000, "train": 20_000, "test": 3000}


class Hub(http.server.ThreadingHTTPServer):
    """Serves `files` {name: bytes} of one dataset, and notes the ranges that were asked for.

    stated: {name: bytes whose size and sha256 are stated instead}. broken_after: a number of bytes after
    which every answer breaks off. unstated: names of headers that it leaves out, as mirrors do. status: of
    every answer, in place of the file.
    """

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.stated = {}
        self.broken_after = None
        self.unstated = ()
        self.status = None
        self.ranges = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, body):
        match = re.fullmatch(rf"/datasets/{prepare.FINEWEB['repo']}/resolve/\w+/(.*)", self.path)
        data = self.server.files.get(match[1]) if match else None
        # A token that nobody knows is refused, also where none is needed.
        status = 401 if self.headers.get("Authorization") else self.server.status
        if status:
            self.send_response(status)
            self.end_headers()
            return
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return
        stated = self.server.stated.get(match[1], data)
        first = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if body and asked:
            first = int(asked[1])
            self.server.ranges.append(first)
        self.send_response(206 if first else 200)
        headers = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{hashlib.sha256(stated).hexdigest()}"',
            "X-Linked-Size": str(len(stated)),
            "ETag": '"of the pointer"',
            "Content-Length": str(len(data) - first),
        }
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        for name, value in headers.items():
            if name not in self.server.unstated:
                self.send_header(name, value)
        self.end_headers()
        if body:
            stop = len(data)
            if self.server.broken_after is not None:
                stop = first + self.server.broken_after
            self.wfile.write(data[first:stop])
            self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def stream():
    """40,000 tokens in documents of 2 to 500."""
    rng = np.random.default_rng(0)
    documents = [[BOS, *rng.integers(0, 256, rng.integers(1, 499))] for _ in range(400)]
    return np.concatenate(documents).astype(np.uint16)[:40_000]


@pytest.fixture
def hub(stream):
    halves = dict(zip(prepare.FINEWEB["files"], np.split(stream, 2)))
    server = Hub({name: b"".join(prepare.shard_bytes(part)) for name, part in halves.items()})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(hub, folder, **environment):
    """`prepare.py fineweb` into folder/fineweb, at a small size and with bytes for tokens.

    Returns its exit status and the line of its mistake.
    """
    code = f"""if True:
        import huggingface_hub.constants, pathlib, sys
        huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000
        sys.path.insert(0, {str(ROOT)!r})
        from data import prepare
        tokenizer = prepare.get_encoding("bytes")
        prepare.get_encoding = lambda name: tokenizer
        prepare.ROOT = pathlib.Path({str(folder)!r})
        prepare.FINEWEB["tokens"] = {COUNTS}
        prepare.main(["fineweb"])"""
    here = dict(
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1"
    )
    env = os.environ | here | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    errors = [line for line in done.stderr.splitlines() if line.startswith("prepare.py: ")]
    assert "Traceback" not in done.stderr, done.stderr
    is_prepared = (folder / "fineweb" / "meta.json").exists()
    if done.returncode == 0:
        assert is_prepared and errors == []
        return 0, ""
    assert not is_prepared and len(errors) == 1, done.stderr
    return done.returncode, errors[0]


def test_the_cut(hub, stream, tmp_path):
    """Validation from the front, training from the next document, test from the one after; across shards."""
    assert fetch(hub, tmp_path) == (0, "")
    meta = json.loads((tmp_path / "fineweb" / "meta.json").read_text())
    assert meta["tokens"] == COUNTS and COMMIT in meta["source"]
    at = 0
    for split, n in COUNTS.items():
        shard = audit.read_shard(tmp_path / "fineweb" / f"{split}.bin")
        # This is written differently from cut_stream().
        while stream[at] != BOS:
            at += 1
        assert (shard == stream[at : at + n]).all() and len(shard) == n
        at += n
    assert at > 20_000 + 10


def test_a_download_that_breaks_off_goes_on(hub, tmp_path):
    """Within a command and over two of them, one killed: the next asks only for the rest."""
    name = prepare.FINEWEB["files"][0]
    whole = len(hub.files[name])
    part = tmp_path / "fineweb" / name
    part.parent.mkdir(parents=True)
    part.write_bytes(hub.files[name][:5000])
    hub.broken_after = 0
    status, line = fetch(hub, tmp_path)
    assert status == 2 and name in line and "run this again" in line
    assert part.stat().st_size == 5000
    hub.ranges.clear()
    hub.broken_after = 30_500
    assert fetch(hub, tmp_path) == (0, "")
    # The rest of the first file in two pieces; then that of the second, from the last whole chunk of 1,000
    # bytes.
    assert hub.ranges == [5000, 35_000, 30_000]
    assert whole < 5000 + 2 * 30_500
    assert sorted(path.name for path in part.parent.iterdir()) == [
        "meta.json",
        "test.bin",
        "train.bin",
        "val.bin",
    ]
    hub.broken_after = None
    assert fetch(hub, tmp_path / "other")[0] == 0
    undisturbed = tmp_path / "other" / "fineweb" / "train.bin"
    assert (tmp_path / "fineweb" / "train.bin").read_bytes() == undisturbed.read_bytes()


def test_a_truncated_file(hub, tmp_path):
    """Shorter than the Hub states; whole again, only the rest is fetched."""
    name = prepare.FINEWEB["files"][1]
    hub.stated[name] = hub.files[name]
    hub.files[name] = hub.files[name][:-1000]
    status, line = fetch(hub, tmp_path)
    assert status == 2 and name in line and "size" in line
    hub.files[name] = hub.stated[name]
    hub.ranges.clear()
    assert fetch(hub, tmp_path)[0] == 0 and hub.ranges == [len(hub.files[name]) - 1000]


@pytest.mark.parametrize("where", ["on the server", "on the disk"])
def test_a_wrong_hash(hub, tmp_path, where):
    """As long as it should be, but other bytes: named and deleted, so the next command fetches it again."""
    name = prepare.FINEWEB["files"][0]
    good = hub.files[name]
    if where == "on the server":
        hub.stated[name] = good
        hub.files[name] = good[:-1] + b"\x01"
    else:
        (tmp_path / "fineweb").mkdir()
        (tmp_path / "fineweb" / name).write_bytes(b"x" + good[1:])
    status, line = fetch(hub, tmp_path)
    assert status == 2 and name in line and "sha256" in line
    hub.files[name] = good
    assert fetch(hub, tmp_path) == (0, "")


def test_a_file_that_is_too_long(hub, tmp_path):
    """It cannot be a part of the file, and is fetched again at once."""
    name = prepare.FINEWEB["files"][0]
    (tmp_path / "fineweb").mkdir()
    (tmp_path / "fineweb" / name).write_bytes(hub.files[name] + b"xx")
    assert fetch(hub, tmp_path) == (0, "")


def test_what_is_no_shard(hub, tmp_path):
    name = prepare.FINEWEB["files"][0]
    page = b"<html>not found</html>" * 100
    too_short = hub.files[name][:-2]
    unknown_tokens = b"".join(prepare.shard_bytes(np.full(20_000, 257)))
    for i, content in enumerate((page, too_short, unknown_tokens)):
        hub.files[name] = content
        status, line = fetch(hub, tmp_path / str(i))
        assert status == 2 and name in line and "not a shard" in line


def test_too_short_a_stream(hub, tmp_path):
    name = prepare.FINEWEB["files"][1]
    hub.files[name] = b"".join(prepare.shard_bytes(np.full(1000, BOS)))
    status, line = fetch(hub, tmp_path)
    assert status == 2 and "before train is full" in line


def test_a_token_that_has_expired(hub, tmp_path):
    """The dataset is public: no token is sent."""
    assert fetch(hub, tmp_path, HF_TOKEN="hf_0123456789") == (0, "")


@pytest.mark.parametrize(
    "unstated",
    [
        ("X-Linked-Etag",),
        ("X-Linked-Etag", "ETag"),
        ("X-Linked-Size", "Content-Length"),
        ("X-Linked-Etag", "ETag", "X-Linked-Size", "Content-Length", "X-Repo-Commit"),
    ],
)
def test_a_mirror_that_states_less(hub, tmp_path, unstated):
    """What it does not state cannot be checked, and is not called damaged. A part of unknown size is no part:
    here one of other bytes."""
    hub.unstated = unstated
    name = prepare.FINEWEB["files"][0]
    if "X-Linked-Size" in unstated:
        (tmp_path / "fineweb").mkdir()
        (tmp_path / "fineweb" / name).write_bytes(b"x" * 5000)
    assert fetch(hub, tmp_path) == (0, "")
    meta = json.loads((tmp_path / "fineweb" / "meta.json").read_text())
    assert meta["tokens"] == COUNTS
    assert ("commit" in meta["source"]) == ("X-Repo-Commit" not in unstated)


@pytest.mark.parametrize(
    "status, words", [(403, "HF_ENDPOINT"), (429, "slow down"), (503, "run this again later")]
)
def test_a_server_that_refuses(hub, tmp_path, status, words):
    """Each needs another remedy, and none is that of a machine without a network."""
    hub.status = status
    code, line = fetch(hub, tmp_path)
    assert code == 2 and words in line and str(status) in line and "connect to" not in line, line


def test_a_full_disk(hub, tmp_path):
    """The remedy is not the internet."""
    (tmp_path / "fineweb").mkdir()
    (tmp_path / "fineweb" / prepare.FINEWEB["files"][0]).symlink_to("/dev/full")
    code, line = fetch(hub, tmp_path)
    assert code == 2 and "No space left" in line and "connect to" not in line, line


def test_offline(hub, tmp_path):
    """Offline, at an address where nobody listens, and without a file: the message says what to do."""
    for environment in (dict(HF_HUB_OFFLINE="1"), dict(HF_ENDPOINT="http://127.0.0.1:9")):
        status, line = fetch(hub, tmp_path, **environment)
        assert status == 2 and "connect to the internet" in line and "data/fineweb" in line
    del hub.files[prepare.FINEWEB["files"][1]]
    status, line = fetch(hub, tmp_path)
    assert status == 2 and prepare.FINEWEB["files"][1] in line
