"""Bits per byte: the one score, computed by the judge from a candidate's logits.

    python -m harness.judge --self-test

Shapes: R rows, B rows of one request, T tokens (= context), V logits per token, N scored bytes.
A model is anything that maps tokens_BT (int32) to logits_BTV (float32); targets never leave the judge.
"""

import hashlib
import math
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.judge.corpus import JUDGE_SPLITS, VOCAB_SIZE, Corpus, load_manifest, load_split
from harness.judge.probes import run_probes

BATCH_TOKENS = 8192
MAX_LOGITS = 1024  # per token; room for a padded head, a bound on what a candidate makes us read
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
    """tokens_RT int32, targets_RT int32 with PADDING where a document's last piece is short."""

    tokens: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Score:
    nats: float
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / (math.log(2) * self.num_bytes)


def cut_rows(corpus: Corpus, context: int, eval_bytes: int) -> Rows:
    """Each document in pieces of `context` bytes b: a row [BOS, b0, b1, ..] with targets [b0, b1, b2, ..].

    Every byte is a target in one row at most. Above `eval_bytes` only eval_bytes // context rows are
    kept, evenly spaced over the whole split, so that all documents have their share.
    """
    pieces = [
        (start, min(start + context, end))
        for begin, end in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
        for start in range(begin, end, context)
    ]
    if len(corpus.tokens) > eval_bytes:
        num_rows = eval_bytes // context
        pieces = [pieces[row * len(pieces) // num_rows] for row in range(num_rows)]
    targets_RT = np.full((len(pieces), context), PADDING, dtype=np.int32)
    for row, (start, end) in enumerate(pieces):
        targets_RT[row, : end - start] = corpus.tokens[start:end]
    tokens_RT = np.full_like(targets_RT, corpus.bos)
    tokens_RT[:, 1:] = np.where(targets_RT[:, 1:] == PADDING, corpus.bos, targets_RT[:, :-1])
    return Rows(tokens_RT, targets_RT)


def nats(logits_BTV: np.ndarray, targets_BT: np.ndarray) -> float:
    """Sum of -log softmax at the targets, over the bytes and BOS, in float64; padding counts nothing.

    Raises JudgeError: diverged for a logit that is not finite, crash for a shape that cannot be.
    """
    if logits_BTV.shape[:2] != targets_BT.shape or logits_BTV.shape[2] <= VOCAB_SIZE:
        raise JudgeError("crash", f"logits of shape {logits_BTV.shape} for tokens {targets_BT.shape}")
    kept_BT = targets_BT != PADDING
    logits_NV = logits_BTV[kept_BT, : VOCAB_SIZE + 1].astype(np.float64)
    if not np.isfinite(logits_NV).all():
        raise JudgeError("diverged", "a logit is not finite")
    target_logits_N = np.take_along_axis(logits_NV, targets_BT[kept_BT][:, None], axis=1)[:, 0]
    peak_N = logits_NV.max(axis=1)
    log_sums_N = peak_N + np.log(np.exp(logits_NV - peak_N[:, None]).sum(axis=1))
    return float((log_sums_N - target_logits_N).sum())


def score_rows(logits: Logits, rows: Rows) -> Score:
    """Ask the model for its logits batch by batch. Raises JudgeError as `nats` and the model do."""
    batch = max(1, BATCH_TOKENS // rows.tokens.shape[1])
    starts = range(0, len(rows.tokens), batch)
    total_nats = math.fsum(
        nats(logits(rows.tokens[i : i + batch]), rows.targets[i : i + batch]) for i in starts
    )
    return Score(total_nats, int((rows.targets != PADDING).sum()))


class Judge:
    """The held-out splits, verified and cut once; `judge_id` names data, code, context and size."""

    def __init__(self, folder: Path, context: int, eval_bytes: int) -> None:
        self.judge_id = judge_id(folder, context, eval_bytes)
        self._rows = {
            split: cut_rows(load_split(folder, split), context, eval_bytes) for split in JUDGE_SPLITS
        }

    def score(self, logits: Logits, split: str, *, probes: bool = False) -> Score:
        """Bits per byte on `split`; with `probes`, JudgeError cheat names the first rule broken."""
        rows = self._rows[split]
        if not probes:
            return score_rows(logits, rows)
        score, broken = run_probes(logits, rows.tokens, lambda: score_rows(logits, rows))
        if broken:
            raise JudgeError("cheat", broken)
        return score


def judge_id(folder: Path, context: int, eval_bytes: int) -> str:
    """16 hex digits; scores are comparable only where they agree. Raises as `load_manifest` does, and
    ValueError where no row would fit."""
    if not 1 <= context <= eval_bytes:
        raise ValueError(f"eval_bytes={eval_bytes} with context={context}: need 1 <= context <= eval_bytes")
    manifest = load_manifest(folder)
    parts = [f"{context} {eval_bytes}", *(getattr(manifest, split).sha256 for split in JUDGE_SPLITS)]
    parts += [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


class ChannelModel:
    """A candidate's model at the other end of a stream socket, within `timeout_seconds` in all.

    Request: uint32 B, T, then B*T int32 ids. Answer: uint32 B, T, V, then B*T*V float32. Little-endian.
    Raises JudgeError: timeout, or crash when the channel closes or answers another shape.
    """

    def __init__(self, channel: socket.socket, timeout_seconds: float) -> None:
        self._channel = channel
        self._deadline = time.monotonic() + timeout_seconds

    def __call__(self, tokens_BT: np.ndarray) -> np.ndarray:
        try:
            self._set_timeout()
            self._channel.sendall(struct.pack("<2I", *tokens_BT.shape) + tokens_BT.astype("<i4").tobytes())
            *shape_BT, num_logits = struct.unpack("<3I", self._receive(12))
            if tuple(shape_BT) != tokens_BT.shape or not VOCAB_SIZE < num_logits <= MAX_LOGITS:
                raise JudgeError("crash", f"logits of shape {(*shape_BT, num_logits)} for {tokens_BT.shape}")
            logits_BTV = np.frombuffer(self._receive(4 * tokens_BT.size * num_logits), dtype="<f4")
            return logits_BTV.reshape(*tokens_BT.shape, num_logits)
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
    corpus = Corpus(text, np.array([0, len(text)]), VOCAB_SIZE, VOCAB_SIZE)
    rows = cut_rows(corpus, 4, len(text))  # three rows, the last one byte short

    def bits(logits_V: np.ndarray) -> float:
        model = lambda tokens_BT: np.broadcast_to(logits_V, (*tokens_BT.shape, logits_V.size))  # noqa: E731
        return score_rows(model, rows).bits_per_byte

    counts_V = np.full(VOCAB_SIZE + 1, 1e-30)
    np.add.at(counts_V, text, 1.0)
    letters_V = np.log(counts_V)
    uniform_V = np.zeros(VOCAB_SIZE + 1, dtype=np.float32)
    golden = {
        "uniform: log2 257": (bits(uniform_V), 8.005624549193879),
        "uniform, shifted": (bits(uniform_V + 1e4), 8.005624549193879),
        "uniform, a padded head": (bits(np.append(uniform_V, [99.0, 99.0])), 8.005624549193879),
        "letters: 5 a, 2 b, 2 r, c, d": (bits(letters_V), 2.0403733936884962),
    }
    for name, (value, expected) in golden.items():
        _check(abs(value - expected) < 1e-12, f"{name}: {value!r} bits, not {expected!r}")
    perfect_RTV = 99.0 * np.eye(VOCAB_SIZE + 1)[rows.targets]
    _check(nats(perfect_RTV, rows.targets) < 1e-12, "perfect prediction must cost nothing")
    _check((rows.targets != PADDING).sum() == len(text), "each byte must count once")


def _check(holds: bool, claim: str) -> None:
    if not holds:  # no assert: the test must also run under python -O
        raise AssertionError(f"judge self-test: {claim}")
