"""
Text -> token shards.

    python data/prepare.py pocket                 # the Python source of the installed torch, as bytes; no download
    python data/prepare.py pocket_long            # the same with twice the training text, for baselines
    python data/prepare.py mini                   # the same source in GPT-2's tokens
    python data/prepare.py fineweb                # 120M of FineWeb's GPT-2 tokens, from the Hugging Face Hub (400 MB)
    python data/prepare.py text FILE... [--tokenizer bytes|gpt2] [--out data/text]

Each writes train.bin, val.bin, test.bin and meta.json into one folder. data/README.md describes the format, the sources and
their licences. Documents keep the order that the sha256 of their name gives (FineWeb's: the order of its shards).
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

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256  # the header of llm.c and modded-nanogpt, so their shards load unchanged
ROOT = Path(__file__).resolve().parent
DOCUMENT_BYTES = 65536  # `text` cuts longer files into documents of this size, so that a single file can be split too

TORCH = "2.13.0"  # the release whose Python source pocket and mini are

# The corpus that every pocket run is compared on. sha256 of the shards made from the wheel of that release.
POCKET = {
    "tokenizer": "bytes",
    "tokens": {"val": 400_000, "test": 400_000, "train": 16_000_000},  # a record trains on the first 1M; baselines on more
    "sha256": {
        "val.bin": "f7b5c89e92282ce474befb7981eb92b7343db90f9d2702e8c4a3b07dfa6648f8",
        "test.bin": "3de5abe3f862ebe7d975bf788bff6dc797ffc4fa27a7f2cee31918d31c65151f",
        "train.bin": "7c8208d74b121773d947b3c99aad1f8c6091849cc130fcf80a50a90d51eea8fe",
    },
}

# The same stream cut later: its training tokens begin with pocket's. For the far end of the baseline's curve.
POCKET_LONG = {
    "tokenizer": "bytes",
    "tokens": POCKET["tokens"] | {"train": 32_000_000},
    "sha256": POCKET["sha256"] | {"train.bin": "4feb45af89d15fee00b53cecba030d3093a324c7f1f980f689badcc506c10eeb"},
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

# Consecutive pieces of one stream: FineWeb's sample-10BT in its order, a BOS before each document.
FINEWEB = {
    "repo": "kjj0/fineweb10B-gpt2",
    "files": ("fineweb_val_000000.bin", "fineweb_train_000001.bin"),
    "tokens": {"val": 10_000_000, "train": 100_000_000, "test": 10_000_000},  # in this order; Slowrun's cut of the same stream, by construction
}


class DataError(Exception):
    """A user's mistake or a missing source; the message is one line with the remedy."""


def get_encoding(name):
    """The tiktoken Encoding of a tokenizer name in meta.json: `bytes` (257 ids) or `gpt2` (50,257 ids).
    Both have <|endoftext|> as their last id, which begins every document here (BOS)."""
    if name == "bytes":
        # the pattern only cuts the text into short pieces; with no merges every piece falls apart into its bytes
        return tiktoken.Encoding("bytes", pat_str=r"(?s).{1,8}", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as e:  # tiktoken lets through whatever its HTTP library raises
            raise DataError(f"tokenizer gpt2: tiktoken could not fetch its vocabulary ({type(e).__name__}); connect to "
                            "the internet once, or set TIKTOKEN_CACHE_DIR to a folder that holds it")
    raise DataError(f"tokenizer {name!r}: choose bytes or gpt2")


# ----------------------------------------------------------------------------------------------------------------------
# shards

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


def encode_documents(names, encode, bos_id, counts, label):
    """Tokenize documents in the given order until every split is full.

    names: document names in order. encode: name -> ids of its text. counts: {"val": n, "test": n, "train": n}, filled in this order;
    a split that is full ends in the middle of a document, and the next split begins with the next document.
    Returns {split: uint16 [n]}, shorter than asked for where the documents run out."""
    splits, parts, have, todo = {}, [], 0, list(counts.items())
    with tqdm(total=sum(counts.values()), unit="tok", unit_scale=True, desc=label, delay=1, file=sys.stderr) as bar:
        for name in names:
            if not todo:
                break
            split, want = todo[0]
            ids = np.array([bos_id, *encode(name)], dtype=np.uint16)[: want - have]
            if len(ids) == 1 and want - have > 1:
                continue  # an empty file is no document
            parts.append(ids)
            have += len(ids)
            bar.update(len(ids))
            if have == want:
                splits[split] = np.concatenate(parts)
                parts, have = [], 0
                todo.pop(0)
        if todo:
            splits[todo[0][0]] = np.concatenate(parts) if parts else np.empty(0, np.uint16)
    return splits


def text_bytes(tokens, encoding):
    """How many bytes of text the tokens stand for; BOS stands for none."""
    lengths = np.array([len(encoding.decode_single_token_bytes(i)) for i in range(encoding.n_vocab)])
    lengths[encoding.eot_token] = 0
    return int(lengths[tokens].sum())


def write_dataset(out, splits, tokenizer, source, expect=None):
    """Write the shards and meta.json of `splits` ({name: uint16 [n]}) into the folder `out`, all or nothing:
    meta.json comes last, and a folder without it is no dataset. What is there already is left alone: another process
    may have begun to read it. `expect`: sha256 by file name, checked before anything is written."""
    encoding = get_encoding(tokenizer)
    shards = {f"{name}.bin": shard_bytes(tokens) for name, tokens in splits.items()}
    sha256 = {name: hashlib.sha256(b"".join(data)).hexdigest() for name, data in shards.items()}
    for name, digest in (expect or {}).items():
        if sha256[name] != digest:
            raise DataError(f"{source} gives a {name} with sha256 {sha256[name][:16]}..., not {digest[:16]}...: its files "
                            f"differ from the released wheel; reinstall it with pip install --force-reinstall torch=={TORCH}")
    meta = {
        "tokenizer": tokenizer, "vocab_size": encoding.n_vocab, "bos_id": encoding.eot_token, "source": source,
        "tokens": {name: len(tokens) for name, tokens in splits.items()},
        "text_bytes": {name: text_bytes(splits[name], encoding) for name in ("val", "test")},
        "sha256": sha256,
    }
    shards["meta.json"] = [json.dumps(meta, indent=1).encode() + b"\n"]
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if not all((out / name).exists() and (out / name).read_bytes() == b"".join(data) for name, data in shards.items()):
            (out / "meta.json").unlink(missing_ok=True)
            for name, data in shards.items():
                replace_file(out / name, data)
    finally:
        os.close(folder)
    sizes = ", ".join(f"{name} {len(tokens):,}" for name, tokens in splits.items())
    print(f"{os.path.relpath(out)}: {sizes} tokens ({tokenizer}) from {source}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# sources

def prepare_torch(name, recipe, out):
    """The .py files of the pinned torch wheel, as the dataset `name`. Only files that the wheel lists, without torch/version.py
    (the one that differs between the CPU, CUDA and macOS builds). Validation is cut from the front, test begins at the next
    document, training at the next document after that."""
    try:
        wheel = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"{name} is the Python source of torch {TORCH}: pip install torch=={TORCH}")
    if wheel.version.split("+")[0] != TORCH:
        raise DataError(f"{name} is the Python source of torch {TORCH}, this is torch {wheel.version}: "
                        f"pip install torch=={TORCH}, or copy data/{name} from a machine that has it")
    files = {f.as_posix(): f for f in wheel.files or []
             if f.suffix == ".py" and f.parts[0] in ("torch", "torchgen", "functorch") and f.as_posix() != "torch/version.py"}
    names = sorted(files, key=lambda path: hashlib.sha256(path.encode()).hexdigest())
    encoding = get_encoding(recipe["tokenizer"])
    splits = encode_documents(names, lambda path: encoding.encode_ordinary(files[path].locate().read_bytes().decode("utf-8")),
                              encoding.eot_token, recipe["tokens"], name)
    write_dataset(out, splits, recipe["tokenizer"], f"the Python source of torch {TORCH}", recipe["sha256"])


def prepare_pocket(out=ROOT / "pocket"):
    """What train_gpt.py calls where the pocket track's shards are missing."""
    prepare_torch("pocket", POCKET, out)


def fetch(repo, file, path):
    """Download a file of a Hub dataset to `path`, or the rest of it where a part is there already. Returns the commit it is of.
    huggingface-hub's own cache would begin anew after a kill."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url  # takes a second to import, and reads HF_ENDPOINT, HF_HUB_OFFLINE
    from huggingface_hub.file_download import http_get
    try:
        remote = get_hf_file_metadata(hf_hub_url(repo, file, repo_type="dataset"))
        with open(path, "ab") as f:
            have = f.tell() if f.tell() <= remote.size else f.truncate(0)
            http_get(remote.location, f, resume_size=have, expected_size=remote.size, displayed_filename=file)
    except Exception as e:  # a network has many ways to fail, and huggingface-hub passes them all on
        reason = (str(e).splitlines() or [""])[0][:150]
        raise DataError(f"{file} of {repo}: not fetched ({type(e).__name__}: {reason}). What has come so far is kept in {path.parent}: connect to the "
                        "internet and run this again, or copy a prepared data/fineweb from a machine that has it")
    with open(path, "rb") as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != remote.etag:  # of large files, that is what the Hub's etag is
            path.unlink()
            raise DataError(f"{file} of {repo}: came damaged, its sha256 is not the one that the Hub states; deleted, run this again")
    return remote.commit_hash


def read_shard(path, vocab_size):
    """Token ids of a shard, uint16 [n]."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    tokens = np.fromfile(path, dtype="<u2", offset=4 * HEADER_INTS)
    if len(header) < HEADER_INTS or tuple(header[:3]) != (MAGIC, VERSION, len(tokens)) or not len(tokens) or tokens.max() >= vocab_size:
        raise DataError(f"{path}: not a shard of GPT-2 tokens, though it is what the Hub holds")
    return tokens


def cut_stream(tokens, bos_id, counts):
    """Consecutive splits of one stream of documents, each but the first from the next BOS on. counts: {split: n}, in the stream's order."""
    splits, at, starts = {}, 0, np.flatnonzero(tokens == bos_id)
    for split, n in counts.items():
        if splits:
            later = starts[np.searchsorted(starts, at):]
            at = int(later[0]) if len(later) else len(tokens)
        splits[split] = tokens[at:at + n]
        at += n
        if len(splits[split]) < n:
            raise DataError(f"the stream ends {n - len(splits[split]):,} tokens before {split} is full")
    return splits


def prepare_fineweb(out):
    """The first 120M tokens of FineWeb, as far as a split that ends in the middle of a document leaves its rest out."""
    encoding = get_encoding("gpt2")
    out.mkdir(parents=True, exist_ok=True)
    shards = [out / file for file in FINEWEB["files"]]
    commits = [fetch(FINEWEB["repo"], path.name, path) for path in shards]
    stream = np.concatenate([read_shard(path, encoding.n_vocab) for path in shards])
    write_dataset(out, cut_stream(stream, encoding.eot_token, FINEWEB["tokens"]), "gpt2", f"{FINEWEB['repo']}, commit {commits[-1]}")
    for path in shards:
        path.unlink()


def prepare_text(paths, tokenizer="bytes", out=ROOT / "text", holdout=0.05):
    """Anybody's text files. `holdout`: the share of the text that goes to validation, and again to test."""
    if not 0 < holdout < 0.5:
        raise DataError(f"--holdout {holdout}: choose a share between 0 and 0.5")
    encoding, documents = get_encoding(tokenizer), {}  # name -> ids
    # a document that fills a split loses its rest: so none is larger than a quarter of the smallest split
    limit = min(DOCUMENT_BYTES, holdout / 4 * sum(os.path.getsize(path) for path in paths if os.path.exists(path)))
    for path in tqdm(paths, "text", unit="file", delay=1):
        try:
            lines = Path(path).read_bytes().decode("utf-8").splitlines(keepends=True)
        except OSError as e:
            raise DataError(f"{path}: {e.strerror}")
        except UnicodeDecodeError as e:
            raise DataError(f"{path}: not UTF-8 text (byte {e.start}); convert it, for example with iconv -t utf-8")
        pieces, size = [[]], 0
        for line in lines:
            if size > limit:
                pieces, size = pieces + [[]], 0
            pieces[-1].append(line)
            size += len(line.encode())
        documents.update({f"{path}#{i}": np.array(encoding.encode_ordinary("".join(piece)), np.uint16) for i, piece in enumerate(pieces)})
    names = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    total = sum(1 + len(ids) for ids in documents.values())
    held = int(total * holdout)
    splits = encode_documents(names, documents.__getitem__, encoding.eot_token, {"val": held, "test": held, "train": total}, "text")
    if len(splits.get("train", [])) < 1000 or held < 1000:
        raise DataError(f"{len(names)} document(s), {total:,} tokens: too little text to hold {holdout:.0%} out twice and train, "
                        "or too few line ends to cut it at")
    write_dataset(Path(out), splits, tokenizer, f"{len(paths)} text file(s)")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="source", required=True)
    sub.add_parser("pocket", help="the Python source of the installed torch, as bytes")
    sub.add_parser("pocket_long", help="the same with twice the training text, for baselines")
    sub.add_parser("mini", help="the same source in GPT-2's tokens")
    sub.add_parser("fineweb", help="120M tokens of FineWeb, downloaded from the Hugging Face Hub")
    text = sub.add_parser("text", help="your own UTF-8 text files")
    text.add_argument("files", nargs="+", metavar="FILE")
    text.add_argument("--tokenizer", default="bytes", choices=["bytes", "gpt2"])
    text.add_argument("--out", default=ROOT / "text", metavar="DIR")
    text.add_argument("--holdout", type=float, default=0.05, help="share of the text for validation, and again for test")
    args = parser.parse_args(argv)
    try:
        if args.source == "pocket":
            prepare_pocket()
        elif args.source in ("pocket_long", "mini"):
            prepare_torch(args.source, {"pocket_long": POCKET_LONG, "mini": MINI}[args.source], ROOT / args.source)
        elif args.source == "fineweb":
            prepare_fineweb(ROOT / "fineweb")
        else:
            prepare_text(args.files, args.tokenizer, args.out, args.holdout)
    except (DataError, OSError) as e:
        print(f"prepare.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
