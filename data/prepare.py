"""
Text -> token shards.

    python data/prepare.py pocket                 # the Python source of the installed torch, as bytes; no download
    python data/prepare.py text FILE... [--tokenizer bytes|gpt2] [--out data/text]

Both write train.bin, val.bin, test.bin and meta.json into one folder. data/README.md describes the format, the
sources and their licences. Documents keep the order that the sha256 of their name gives: validation is cut from the
front, test begins at the next document, training at the next document after that.
"""
import argparse
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

# The corpus that every pocket run is compared on. sha256 of the shards made from the wheel of this torch release.
POCKET = {
    "torch": "2.13.0",
    "tokens": {"val": 400_000, "test": 400_000, "train": 16_000_000},  # a record trains on the first 1M; baselines on more
    "sha256": {
        "val.bin": "f7b5c89e92282ce474befb7981eb92b7343db90f9d2702e8c4a3b07dfa6648f8",
        "test.bin": "3de5abe3f862ebe7d975bf788bff6dc797ffc4fa27a7f2cee31918d31c65151f",
        "train.bin": "7c8208d74b121773d947b3c99aad1f8c6091849cc130fcf80a50a90d51eea8fe",
    },
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
    meta.json comes last, and a folder without it is no dataset. `expect`: sha256 by file name, checked before
    anything is written."""
    encoding = get_encoding(tokenizer)
    shards = {f"{name}.bin": shard_bytes(tokens) for name, tokens in splits.items()}
    sha256 = {name: hashlib.sha256(b"".join(data)).hexdigest() for name, data in shards.items()}
    for name, digest in (expect or {}).items():
        if sha256[name] != digest:
            raise DataError(f"{source} gives a {name} with sha256 {sha256[name][:16]}..., not {digest[:16]}...: its files "
                            "differ from the released wheel; reinstall it with pip install --force-reinstall "
                            f"torch=={POCKET['torch']}")
    meta = {
        "tokenizer": tokenizer, "vocab_size": encoding.n_vocab, "bos_id": encoding.eot_token, "source": source,
        "tokens": {name: len(tokens) for name, tokens in splits.items()},
        "text_bytes": {name: text_bytes(splits[name], encoding) for name in ("val", "test")},
        "sha256": sha256,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "meta.json").unlink(missing_ok=True)
    for name, data in shards.items():
        replace_file(out / name, data)
    replace_file(out / "meta.json", [json.dumps(meta, indent=1).encode() + b"\n"])
    sizes = ", ".join(f"{name} {len(tokens):,}" for name, tokens in splits.items())
    print(f"{os.path.relpath(out)}: {sizes} tokens ({tokenizer}) from {source}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# sources

def prepare_pocket(out=ROOT / "pocket"):
    """The .py files of the pinned torch wheel as bytes. Only files that the wheel lists, without torch/version.py
    (the one that differs between the CPU, CUDA and macOS builds)."""
    try:
        wheel = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"pocket is the Python source of torch {POCKET['torch']}: pip install torch=={POCKET['torch']}")
    if wheel.version.split("+")[0] != POCKET["torch"]:
        raise DataError(f"pocket is the Python source of torch {POCKET['torch']}, this is torch {wheel.version}: "
                        f"pip install torch=={POCKET['torch']}, or copy data/pocket from a machine that has it")
    files = {f.as_posix(): f for f in wheel.files or []
             if f.suffix == ".py" and f.parts[0] in ("torch", "torchgen", "functorch") and f.as_posix() != "torch/version.py"}
    names = sorted(files, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    encoding = get_encoding("bytes")
    splits = encode_documents(names, lambda name: encoding.encode_ordinary(files[name].locate().read_bytes().decode("utf-8")),
                              encoding.eot_token, POCKET["tokens"], "pocket")
    write_dataset(out, splits, "bytes", f"the Python source of torch {POCKET['torch']}", POCKET["sha256"])


def prepare_text(paths, tokenizer="bytes", out=ROOT / "text", holdout=0.05):
    """Anybody's text files. `holdout`: the share of the text that goes to validation, and again to test."""
    if not 0 < holdout < 0.5:
        raise DataError(f"--holdout {holdout}: choose a share between 0 and 0.5")
    encoding, documents = get_encoding(tokenizer), {}  # name -> ids
    for path in tqdm(paths, "text", unit="file", delay=1):
        try:
            lines = Path(path).read_bytes().decode("utf-8").splitlines(keepends=True)
        except OSError as e:
            raise DataError(f"{path}: {e.strerror}")
        except UnicodeDecodeError as e:
            raise DataError(f"{path}: not UTF-8 text (byte {e.start}); convert it, for example with iconv -t utf-8")
        pieces, size = [[]], 0
        for line in lines:
            if size > DOCUMENT_BYTES:
                pieces, size = pieces + [[]], 0
            pieces[-1].append(line)
            size += len(line.encode())
        documents.update({f"{path}#{i}": np.array(encoding.encode_ordinary("".join(piece)), np.uint16) for i, piece in enumerate(pieces)})
    names = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    total = sum(1 + len(ids) for ids in documents.values())
    held = int(total * holdout)
    splits = encode_documents(names, documents.__getitem__, encoding.eot_token, {"val": held, "test": held, "train": total}, "text")
    if len(splits.get("train", [])) < 1000 or held < 1000:
        raise DataError(f"{len(names)} document(s), {total:,} tokens: too little text to hold {holdout:.0%} out twice and train")
    write_dataset(Path(out), splits, tokenizer, f"{len(paths)} text file(s)")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="source", required=True)
    sub.add_parser("pocket", help="the Python source of the installed torch, as bytes")
    text = sub.add_parser("text", help="your own UTF-8 text files")
    text.add_argument("files", nargs="+", metavar="FILE")
    text.add_argument("--tokenizer", default="bytes", choices=["bytes", "gpt2"])
    text.add_argument("--out", default=ROOT / "text", metavar="DIR")
    text.add_argument("--holdout", type=float, default=0.05, help="share of the text for validation, and again for test")
    args = parser.parse_args(argv)
    try:
        if args.source == "pocket":
            prepare_pocket()
        else:
            prepare_text(args.files, args.tokenizer, args.out, args.holdout)
    except (DataError, OSError) as e:
        print(f"prepare.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
