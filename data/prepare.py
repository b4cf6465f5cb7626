"""
Text -> token shards.

    python data/prepare.py pocket        # the Python source of the installed torch, as bytes; no download
    python data/prepare.py pocket_long   # the same with twice the training text, for baselines
    python data/prepare.py mini          # the same source in GPT-2's tokens
    python data/prepare.py fineweb       # 120M GPT-2 tokens of FineWeb, from the Hugging Face Hub (400 MB)
    python data/prepare.py text FILE... [--tokenizer bytes|gpt2] [--out data/text]

Each writes train.bin, val.bin, test.bin and meta.json into one folder. data/README.md describes the format,
the sources and their licenses. Documents are ordered by the sha256 of their names; FineWeb's keep the order
of its shards.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import sys
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
        raise DataError(f"{path}: not a shard of GPT-2 tokens, though it is what the Hub holds")
    return tokens


def encode_documents(names, encode, bos_id, counts, label):
    """Tokenize documents in the given order until every split is full.

    names: document names in order. encode: name -> ids of its text. counts: {"val": n, "test": n, "train":
    n}, filled in this order. A split that is full ends in the middle of a document, and the next split begins
    with the next document. Returns {split: uint16 [n]}, shorter than asked for where the documents run out.
    """
    splits = {}
    names = iter(names)
    total = sum(counts.values())
    with tqdm(total=total, unit="tok", unit_scale=True, desc=label, delay=1, file=sys.stderr) as bar:
        for split, n in counts.items():
            parts = []
            missing = n
            while missing > 0:
                name = next(names, None)
                if name is None:
                    break
                ids = np.array([bos_id, *encode(name)], dtype=np.uint16)
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


def write_dataset(out, splits, tokenizer, source, expect=None):
    """Write the shards and meta.json of `splits` ({name: uint16 [n]}) into the folder `out`, all or nothing.

    meta.json comes last, and a folder without it is no dataset. What is there already is left alone, because
    another process may have begun to read it. expect: sha256 by file name, checked before anything is
    written.
    """
    encoding = get_encoding(tokenizer)
    files = {f"{name}.bin": shard_bytes(tokens) for name, tokens in splits.items()}
    sha256 = {name: hashlib.sha256(b"".join(data)).hexdigest() for name, data in files.items()}
    for name, digest in (expect or {}).items():
        if sha256[name] != digest:
            raise DataError(
                f"{source} gives a {name} with sha256 {sha256[name][:16]}..., not {digest[:16]}...: "
                "its files differ from the released wheel; "
                f"reinstall it with pip install --force-reinstall torch=={TORCH}"
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
        if not all(is_written(out / name, data) for name, data in files.items()):
            (out / "meta.json").unlink(missing_ok=True)
            for name, data in files.items():
                replace_file(out / name, data)
    finally:
        os.close(folder)
    sizes = ", ".join(f"{name} {len(tokens):,}" for name, tokens in splits.items())
    print(f"{os.path.relpath(out)}: {sizes} tokens ({tokenizer}) from {source}", flush=True)


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
    write_dataset(out, splits, recipe["tokenizer"], source, recipe["sha256"])


def by_hash(names):
    """Names in an order that depends on nothing but themselves."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def prepare_pocket(out=ROOT / "pocket"):
    """train_gpt.py calls this where the pocket track's shards are missing."""
    prepare_torch("pocket", POCKET, out)


def fetch(repo, file, path):
    """Download a file of a Hub dataset, or the rest of it where `path` holds a part. Returns its commit.

    huggingface-hub's own cache would start over after a kill.
    """
    # These take a second to import, and read HF_ENDPOINT and HF_HUB_OFFLINE.
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get

    try:
        remote = get_hf_file_metadata(hf_hub_url(repo, file, repo_type="dataset"))
        with open(path, "ab") as f:
            have = f.tell()
            # A file that is longer cannot be a part of it.
            if have > remote.size:
                have = f.truncate(0)
            http_get(remote.location, f, resume_size=have, expected_size=remote.size, displayed_filename=file)
    except Exception as e:
        # A network has many ways to fail, and huggingface-hub passes them all on.
        lines = str(e).splitlines() or [""]
        raise DataError(
            f"{file} of {repo}: not fetched ({type(e).__name__}: {lines[0][:150]}). "
            f"What has arrived is kept in {path.parent}: connect to the internet and run this again, "
            "or copy a prepared data/fineweb from a machine that has it"
        )
    # For large files, the Hub's etag is their sha256.
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != remote.etag:
        path.unlink()
        raise DataError(
            f"{file} of {repo}: damaged on arrival, its sha256 is not the one that the Hub states; "
            "deleted, run this again"
        )
    return remote.commit_hash


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
    write_dataset(out, splits, "gpt2", f"{FINEWEB['repo']}, commit {commits[-1]}")
    for path in shards:
        path.unlink()


def prepare_text(paths, tokenizer="bytes", out=ROOT / "text", holdout=0.05):
    """Anybody's text files. holdout: the share of the text that goes to validation, and again to test."""
    if not 0 < holdout < 0.5:
        raise DataError(f"--holdout {holdout}: choose a share between 0 and 0.5")
    encoding = get_encoding(tokenizer)
    # A document that fills a split loses its rest. So none is larger than a quarter of the smallest split.
    size = sum(os.path.getsize(path) for path in paths if os.path.exists(path))
    limit = min(DOCUMENT_BYTES, holdout / 4 * size)
    documents = {}
    for path in tqdm(paths, "text", unit="file", delay=1):
        for i, piece in enumerate(cut_text(read_text(path), limit)):
            documents[f"{path}#{i}"] = np.array(encoding.encode_ordinary(piece), np.uint16)
    total = sum(1 + len(ids) for ids in documents.values())
    held = int(total * holdout)
    counts = {"val": held, "test": held, "train": total}
    names = by_hash(documents)
    splits = encode_documents(names, documents.__getitem__, encoding.eot_token, counts, "text")
    if len(splits["train"]) < 1000 or held < 1000:
        raise DataError(
            f"{len(names)} document(s), {total:,} tokens: too little text to hold {holdout:.0%} out twice "
            "and train, or too few line ends to cut it at"
        )
    write_dataset(Path(out), splits, tokenizer, f"{len(paths)} text file(s)")


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
    """Pieces of a text, cut at line ends, each with at most one line more than `limit` bytes."""
    pieces = [""]
    size = 0
    for line in text.splitlines(keepends=True):
        if size > limit:
            pieces.append("")
            size = 0
        pieces[-1] += line
        size += len(line.encode())
    return pieces


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sub = parser.add_subparsers(dest="source", required=True)
    sub.add_parser("pocket", help="the Python source of the installed torch, as bytes")
    sub.add_parser("pocket_long", help="the same with twice the training text, for baselines")
    sub.add_parser("mini", help="the same source in GPT-2's tokens")
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
