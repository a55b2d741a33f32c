"""One training run in a process group of its own: train, then let the judge score it.

The runner trusts nothing the trainer says: it owns the clock, the memory limit and the kill, reads
`metrics.jsonl` defensively, and takes the score from the judge alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.judge.client import JudgeLost, JudgeProcess
from harness.ledger import number, write_atomic
from harness.records import FailureKind
from harness.space import Settings
from harness.zygote import Child, Zygote, spawn_fresh

EXIT_KINDS = {
    2: FailureKind.CONFIG,
    3: FailureKind.DIVERGED,
    4: FailureKind.COLLAPSED,
    5: FailureKind.OOM,
}
POLL_SECONDS = 0.1
FULL_DISK_BYTES = 1 << 20
DETAIL_CHARS = 300


@dataclass(frozen=True)
class TrialSpec:
    """Everything a worker needs; plain values, so that it travels to any machine."""

    trial: str
    candidate: str
    rung: int
    purpose: str
    config: Settings  # for the trainer: settings plus seed, depth, tokens, device, corpus
    trainer: str  # path of the trainer file in its checkout
    patched: bool  # a proposer's code: runs in a fresh interpreter
    out: str  # the trial's folder
    source: str | None  # the checkpoint that it goes on from
    train: bool  # false: judge the checkpoint that is there
    splits: tuple[str, ...]
    probes: bool  # the judge also looks for cheats: what may be kept is probed
    corpus: str
    context: int
    eval_bytes: int
    timeout_seconds: float
    budget_seconds: float  # what is left of the night: an end by it says nothing about the candidate
    memory_mib: int
    cpus: float
    gpus: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Failure(Exception):
    def __init__(self, kind: FailureKind, detail: str):
        super().__init__(detail)
        self.kind, self.detail = kind, detail[:DETAIL_CHARS]


class TrialRunner:
    """A worker's slot: keeps a fork server per trainer and one judge process warm between trials."""

    def __init__(self) -> None:
        self._zygote: Zygote | None = None
        self._judge: JudgeProcess | None = None
        self._judge_key: tuple = ()

    def run(self, spec: TrialSpec) -> dict[str, Any]:
        """Returns {"judged": [records], "finished": record or None}; a failure is a state in the record."""
        started = time.monotonic()
        judged: list[dict] = []
        peak_mib, train_seconds = 0.0, 0.0
        record: dict[str, Any] = {"trial": spec.trial, "state": "COMPLETE", "failure": None, "detail": ""}
        try:
            if spec.train or not (Path(spec.out) / "checkpoint.pt").exists():
                train_seconds, peak_mib = self._train(spec)
            if spec.train:
                record |= read_metrics(Path(spec.out) / "metrics.jsonl")
            judged = [self._score(spec, split) for split in spec.splits]
        except Failure as failure:
            record |= {"state": "FAIL", "failure": failure.kind.value, "detail": failure.detail}
        except (RuntimeError, OSError) as error:  # our own processes died: nothing is known of the candidate
            self.close()
            record |= {
                "state": "FAIL",
                "failure": FailureKind.LOST.value,
                "detail": str(error)[:DETAIL_CHARS],
            }
        seconds = time.monotonic() - started
        record |= {"seconds": seconds, "peak_mem_mib": peak_mib, "process_seconds": train_seconds}
        record |= {"log": f"trials/{spec.trial}/log.txt", "gpus": spec.gpus, "cpus": spec.cpus}
        finished = record if spec.train else None
        outcome = {"judged": judged, "finished": finished}
        return outcome | {"failure": record["failure"], "detail": record["detail"]}

    def describe(self, trainer: Path, config: Settings, scratch: Path, *, patched: bool = False) -> dict:
        """The trainer's own counts for a configuration. Raises Failure (config) when it refuses."""
        path = scratch / "describe.json"
        write_atomic(path, json.dumps(config))
        with (scratch / "describe.out").open("w+b") as out, (scratch / "describe.err").open("w+b") as err:
            argv = ["--config", str(path), "--describe"]
            child = self._spawn(trainer, patched, argv, None, out.fileno(), err.fileno(), scratch, 4096)
            code = child.wait(120.0)
            if code is None:
                child.kill()
            out.seek(0), err.seek(0)
            answer, complaint = out.read().decode(errors="replace"), _last_line(err.read())
        if code != 0:
            kind = EXIT_KINDS.get(code, FailureKind.CRASH)
            raise Failure(kind, complaint or f"--describe ended with exit code {code}")
        try:
            return json.loads(answer)
        except ValueError:
            raise Failure(FailureKind.CRASH, f"--describe did not print JSON but {answer[:80]!r}") from None

    def close(self) -> None:
        for part in (self._zygote, self._judge):
            if part:
                with contextlib.suppress(Exception):
                    part.close()
        self._zygote = self._judge = None

    def _train(self, spec: TrialSpec) -> tuple[float, float]:
        """Runs the trainer to its end. Returns (seconds, peak MiB). Raises Failure."""
        out = Path(spec.out)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        config = out / "config.json"
        write_atomic(config, json.dumps(spec.config, indent=1, sort_keys=True))
        with (out / "log.txt").open("wb") as log:
            argv = ["--config", str(config), "--out", str(out)]
            argv += ["--from", spec.source] if spec.source else []
            limit = None if spec.gpus else spec.memory_mib
            started = time.monotonic()
            child = self._spawn(
                Path(spec.trainer), spec.patched, argv, None, log.fileno(), log.fileno(), out, limit
            )
            peak_mib, deadline = 0.0, started + spec.timeout_seconds
            try:
                while (code := child.wait(POLL_SECONDS)) is None:
                    peak_mib = max(peak_mib, group_memory_mib(child.pid))
                    if peak_mib > spec.memory_mib:
                        raise Failure(FailureKind.OOM, f"used more than {spec.memory_mib} MiB")
                    if time.monotonic() > started + spec.budget_seconds:
                        raise Failure(FailureKind.LOST, "the night's hours ended while it ran")
                    if time.monotonic() > deadline:
                        raise Failure(FailureKind.TIMEOUT, f"ran longer than {spec.timeout_seconds:g} s")
            finally:
                child.kill()  # whatever the run left behind in its group ends with it
        seconds = time.monotonic() - started
        if code != 0 and shutil.disk_usage(out).free < FULL_DISK_BYTES:
            raise RuntimeError(f"the disk of {out} is full")  # says nothing about the candidate
        if code != 0:
            kind = EXIT_KINDS.get(code, FailureKind.CRASH)
            last = _last_line(_tail(out / "log.txt"))
            raise Failure(kind, last or f"ended with exit code {code}")
        if not (out / "checkpoint.pt").exists():
            raise Failure(FailureKind.CRASH, "ended without a checkpoint.pt")
        return seconds, peak_mib

    def _score(self, spec: TrialSpec, split: str) -> dict:
        """Lets the judge ask the candidate's process for logits. Raises Failure."""
        out = Path(spec.out)
        ours, theirs = socket.socketpair()
        with (out / "judge.txt").open("ab") as log, ours:
            with theirs:
                argv = ["--logits", str(out / "checkpoint.pt")]
                fd = theirs.fileno()
                child = self._spawn(Path(spec.trainer), spec.patched, argv, fd, fd, log.fileno(), out, None)
            try:
                answer = self._judge_of(spec).judge(
                    ours, split, probes=spec.probes, timeout_seconds=spec.timeout_seconds
                )
            except JudgeLost as lost:
                raise RuntimeError(str(lost)) from None
            finally:
                child.kill()
        if not answer["ok"]:
            raise Failure(FailureKind(answer["kind"]), f"judge: {answer['detail']}")
        return {k: answer[k] for k in ("split", "bpb", "nats", "bytes", "judge_id", "seconds")} | {
            "trial": spec.trial
        }

    def _judge_of(self, spec: TrialSpec) -> JudgeProcess:
        key = (spec.corpus, spec.context, spec.eval_bytes)
        if self._judge is None or self._judge_key != key:
            if self._judge:
                self._judge.close()
            self._judge = JudgeProcess(Path(spec.corpus), spec.context, spec.eval_bytes)
            self._judge_key = key
        return self._judge

    def _spawn(
        self,
        trainer: Path,
        patched: bool,
        argv: list[str],
        stdin: int | None,
        stdout: int,
        stderr: int,
        cwd: Path,
        memory_mib: int | None,
    ) -> Child:
        with open(os.devnull, "rb") as nothing:
            fds = {"stdin": nothing.fileno() if stdin is None else stdin, "stdout": stdout, "stderr": stderr}
            if patched:
                return spawn_fresh(trainer, argv, **fds, cwd=cwd, memory_mib=memory_mib)
            if self._zygote is None or self._zygote.trainer != trainer:
                if self._zygote:
                    self._zygote.close()
                self._zygote = Zygote(trainer)
            return self._zygote.spawn(argv, **fds, cwd=cwd, memory_mib=memory_mib)


def group_memory_mib(leader: int) -> float:
    """Resident memory of all processes in the session that `leader` leads, in MiB (Linux)."""
    total_kib = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{entry.name}/stat") as file:
                    session = int(file.read().rsplit(")", 1)[1].split()[3])
                if session == leader:
                    with open(f"/proc/{entry.name}/statm") as file:
                        total_kib += int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    return total_kib / 1024


def read_metrics(path: Path) -> dict[str, Any]:
    """Curve hash, last training loss, speed and routing health from `metrics.jsonl`. Raises Failure."""
    curve = hashlib.sha256()
    last: dict[str, Any] = {}
    line_number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                line_number += 1
                last = json.loads(line)
                curve.update(f"{last['step']}:{last['train_nats']}\n".encode())
    except OSError:
        raise Failure(FailureKind.CRASH, "ended without a metrics.jsonl") from None
    except (ValueError, KeyError, TypeError):
        raise Failure(
            FailureKind.CRASH, f"metrics.jsonl line {line_number} is not a metrics record"
        ) from None
    if not last:
        raise Failure(FailureKind.CRASH, "metrics.jsonl is empty")
    tokens, seconds = number(last.get("tokens")), number(last.get("seconds"))
    return {
        "curve": curve.hexdigest()[:16],
        "train_nats": number(last["train_nats"]),
        "tokens": tokens,
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds if tokens and seconds else None,
        "health": {
            k: v
            for k, v in last.items()
            if k not in ("step", "tokens", "seconds", "train_nats", "lr") and _plain(v)
        },
        "device": last.get("device") if isinstance(last.get("device"), str) else None,
    }


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 4096 and all(map(_plain, value))
    return number(value) is not None


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        return file.read()


def _last_line(raw: bytes) -> str:
    lines = [line.strip() for line in raw.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:DETAIL_CHARS] if lines else ""
