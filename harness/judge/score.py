"""Bits per byte: the one score, computed by the judge from a candidate's logits.

    python -m harness.judge --self-test

Shapes: R rows, B rows of one request, T tokens (= context), V logits per token, N scored tokens.
A model is anything that maps tokens_BT (int32) to logits_BTV (float32); targets never leave the judge.
"""

import hashlib
import math
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from harness.judge.corpus import (
    BYTE_VOCAB,
    JUDGE_SPLITS,
    Corpus,
    load_manifest,
    load_split,
    token_num_bytes,
)
from harness.judge.probes import run_probes

BATCH_TOKENS = 8192
BATCH_LOGITS = 2**24  # 64 MiB; a large vocabulary gets fewer tokens in a request, at least one row
CHUNK_LOGITS = 2**18  # worked on in float64 at a time: 2 MiB stay in the cache
MAX_SPARE_LOGITS = 768  # per token; room for a padded head, a bound on what a candidate makes us read
PADDING = -1

Logits = Callable[[np.ndarray], np.ndarray]


class JudgeError(Exception):
    """No score, because the candidate's model is `kind`: diverged, crash, timeout or cheat."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True)
class Rows:
    """tokens_RT int32, targets_RT int32 with PADDING where a document's last piece is short; how much
    text the targets stand for, and how many ids of text there are besides BOS."""

    tokens: np.ndarray
    targets: np.ndarray
    num_bytes: int
    vocab_size: int


@dataclass(frozen=True)
class Score:
    nats: float
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / (math.log(2) * self.num_bytes)


def cut_rows(corpus: Corpus, context: int, eval_bytes: int) -> Rows:
    """Each document in pieces of `context` tokens b: a row [BOS, b0, b1, ..] with targets [b0, b1, b2, ..].

    Every token is a target in one row at most. Where the text is longer than `eval_bytes` only so many rows
    are kept as should fit, fewer if these do not, evenly spaced over the whole split, so that all documents
    have their share.
    """
    starts_R = np.concatenate([np.arange(*span, context) for span in pairwise(corpus.offsets)])
    ends_R = np.append(starts_R[1:], len(corpus.tokens))
    num_bytes_R = np.add.reduceat(corpus.token_num_bytes[corpus.tokens], starts_R)
    kept = np.arange(len(starts_R))
    if (num_bytes := int(num_bytes_R.sum())) > eval_bytes:
        num_rows = eval_bytes * len(corpus.tokens) // (context * num_bytes)
        while num_bytes_R[kept := np.arange(num_rows) * len(starts_R) // num_rows].sum() > eval_bytes:
            num_rows -= 1
    targets_RT = np.full((len(kept), context), PADDING, dtype=np.int32)
    for row, (start, end) in enumerate(zip(starts_R[kept], ends_R[kept], strict=True)):
        targets_RT[row, : end - start] = corpus.tokens[start:end]
    tokens_RT = np.full_like(targets_RT, corpus.bos)
    tokens_RT[:, 1:] = np.where(targets_RT[:, 1:] == PADDING, corpus.bos, targets_RT[:, :-1])
    return Rows(tokens_RT, targets_RT, int(num_bytes_R[kept].sum()), corpus.vocab_size)


def nats(logits_BTV: np.ndarray, targets_BT: np.ndarray, vocab_size: int) -> float:
    """Sum of -log softmax at the targets, over the ids of text and BOS, in float64; padding counts nothing.

    Raises JudgeError: diverged for a logit that is not finite, crash for a shape that cannot be.
    """
    if logits_BTV.shape[:2] != targets_BT.shape or logits_BTV.shape[2] <= vocab_size:
        raise JudgeError("crash", f"logits of shape {logits_BTV.shape} for tokens {targets_BT.shape}")
    places_N2 = np.argwhere(targets_BT != PADDING)
    size = max(1, CHUNK_LOGITS // (vocab_size + 1))
    chunks = (tuple(places_N2[i : i + size].T) for i in range(0, len(places_N2), size))
    return math.fsum(_nats(logits_BTV[at][:, : vocab_size + 1], targets_BT[at]) for at in chunks)


def _nats(logits_NV: np.ndarray, targets_N: np.ndarray) -> float:
    if not np.isfinite(logits_NV).all():
        raise JudgeError("diverged", "a logit is not finite")
    logits_NV = logits_NV.astype(np.float64)
    logits_NV -= logits_NV.max(axis=1, keepdims=True)
    target_logits_N = np.take_along_axis(logits_NV, targets_N[:, None], axis=1)[:, 0]
    log_sums_N = np.log(np.exp(logits_NV, out=logits_NV).sum(axis=1))
    return float((log_sums_N - target_logits_N).sum())


def score_rows(logits: Logits, rows: Rows) -> Score:
    """Ask the model for its logits batch by batch. Raises JudgeError as `nats` and the model do."""
    batch_tokens = min(BATCH_TOKENS, BATCH_LOGITS // (rows.vocab_size + 1))
    batch = max(1, batch_tokens // rows.tokens.shape[1])
    parts = (np.s_[i : i + batch] for i in range(0, len(rows.tokens), batch))
    total_nats = math.fsum(
        nats(logits(rows.tokens[part]), rows.targets[part], rows.vocab_size) for part in parts
    )
    return Score(total_nats, rows.num_bytes)


class Judge:
    """The held-out splits, verified and cut once; `judge_id` names data, code, context and size."""

    def __init__(self, folder: Path, context: int, eval_bytes: int) -> None:
        self.judge_id = judge_id(folder, context, eval_bytes)
        self.vocab_size = load_manifest(folder).vocab_size
        self._rows = {
            split: cut_rows(load_split(folder, split), context, eval_bytes) for split in JUDGE_SPLITS
        }

    def score(self, logits: Logits, split: str, *, probes: bool = False) -> Score:
        """Bits per byte on `split`; with `probes`, JudgeError cheat names the first rule broken."""
        rows = self._rows[split]
        if not probes:
            return score_rows(logits, rows)
        score, broken = run_probes(logits, rows.tokens, rows.vocab_size, lambda: score_rows(logits, rows))
        if broken:
            raise JudgeError("cheat", broken)
        return score


def judge_id(folder: Path, context: int, eval_bytes: int) -> str:
    """16 hex digits; scores are comparable only where they agree. Raises as `load_manifest` and
    `token_num_bytes` do, and ValueError where a row may not fit."""
    manifest = load_manifest(folder)
    row_bytes = context * int(token_num_bytes(folder, manifest).max())
    if not 1 <= row_bytes <= eval_bytes:
        raise ValueError(
            f"eval_bytes={eval_bytes} with context={context}: a row may hold {row_bytes} bytes; "
            "raise eval_bytes or lower context"
        )
    parts = [f"{context} {eval_bytes} {manifest.tokenizer_sha256}"]
    parts += [getattr(manifest, split).sha256 for split in JUDGE_SPLITS]
    parts += [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


class ChannelModel:
    """A candidate's model at the other end of a stream socket, within `timeout_seconds` in all; what it
    answers beyond the `vocab_size` ids of text and BOS is dropped.

    Request: uint32 B, T, then B*T int32 ids. Answer: uint32 B, T, V, then B*T*V float32. Little-endian.
    Raises JudgeError: timeout, or crash when the channel closes or answers another shape.
    """

    def __init__(self, channel: socket.socket, vocab_size: int, timeout_seconds: float) -> None:
        self._channel = channel
        self._vocab_size = vocab_size
        self._deadline = time.monotonic() + timeout_seconds

    def __call__(self, tokens_BT: np.ndarray) -> np.ndarray:
        try:
            self._set_timeout()
            self._channel.sendall(struct.pack("<2I", *tokens_BT.shape) + tokens_BT.astype("<i4").tobytes())
            *shape_BT, num_logits = struct.unpack("<3I", self._receive(12))
            num_spare = num_logits - (self._vocab_size + 1)
            if tuple(shape_BT) != tokens_BT.shape or not 0 <= num_spare <= MAX_SPARE_LOGITS:
                raise JudgeError("crash", f"logits of shape {(*shape_BT, num_logits)} for {tokens_BT.shape}")
            logits_BTV = np.frombuffer(self._receive(4 * tokens_BT.size * num_logits), dtype="<f4")
            return logits_BTV.reshape(*tokens_BT.shape, num_logits)[..., : self._vocab_size + 1]
        except TimeoutError:
            raise JudgeError("timeout", "the model did not answer in time") from None
        except OSError as error:
            raise JudgeError("crash", f"the logits channel broke: {error.strerror}") from None

    def _set_timeout(self) -> None:
        remaining_seconds = self._deadline - time.monotonic()
        if remaining_seconds <= 0:
            raise TimeoutError
        self._channel.settimeout(remaining_seconds)

    def _receive(self, num_bytes: int) -> bytearray:
        answer = bytearray(num_bytes)
        view = memoryview(answer)
        while view:
            self._set_timeout()  # anew for each part: a trickle must not stretch the deadline
            num_received = self._channel.recv_into(view)
            if num_received == 0:
                raise JudgeError("crash", "the logits channel closed before the answer was whole")
            view = view[num_received:]
        return answer


def self_test() -> None:
    """Golden values worked out by hand. Raises AssertionError where this machine's arithmetic differs."""
    text = np.frombuffer(b"abracadabra", dtype=np.uint8)
    ones_V = np.ones(BYTE_VOCAB, dtype=np.int64)
    corpus = Corpus(text, np.array([0, len(text)]), BYTE_VOCAB, BYTE_VOCAB, ones_V)
    rows = cut_rows(corpus, 4, len(text))  # three rows, the last one byte short
    words = np.array([256, 257, 256], dtype=np.uint16)  # abra, cad, abra
    corpus = Corpus(words, np.array([0, len(words)]), 258, 258, np.append(ones_V, [4, 3]))
    word_rows = cut_rows(corpus, 2, len(text))

    def bits(logits_V: np.ndarray, rows: Rows = rows) -> float:
        model = lambda tokens_BT: np.broadcast_to(logits_V, (*tokens_BT.shape, logits_V.size))  # noqa: E731
        return score_rows(model, rows).bits_per_byte

    counts_V = np.full(BYTE_VOCAB + 1, 1e-30)
    np.add.at(counts_V, text, 1.0)
    letters_V = np.log(counts_V)
    uniform_V = np.zeros(BYTE_VOCAB + 1, dtype=np.float32)
    golden = {
        "uniform: log2 257": (bits(uniform_V), 8.005624549193879),
        "uniform, shifted": (bits(uniform_V + 1e4), 8.005624549193879),
        "uniform, a padded head": (bits(np.append(uniform_V, [99.0, 99.0])), 8.005624549193879),
        "letters: 5 a, 2 b, 2 r, c, d": (bits(letters_V), 2.0403733936884962),
        "words: 3 log2 259 for 11 bytes": (bits(np.zeros(259), word_rows), 2.186402260278151),
    }
    for name, (value, expected) in golden.items():
        _check(abs(value - expected) < 1e-12, f"{name}: {value!r} bits, not {expected!r}")
    perfect_RTV = 99.0 * np.eye(BYTE_VOCAB + 1)[rows.targets]
    _check(nats(perfect_RTV, rows.targets, BYTE_VOCAB) < 1e-12, "perfect prediction must cost nothing")
    _check(rows.num_bytes == word_rows.num_bytes == len(text), "each byte must count once")


def _check(holds: bool, claim: str) -> None:
    if not holds:  # no assert: the test must also run under python -O
        raise AssertionError(f"judge self-test: {claim}")
