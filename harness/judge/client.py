"""The harness's side of the judge process.

    judge = JudgeProcess(folder, context=256, eval_bytes=300_000)
    reply = judge.judge(channel, "val", timeout_seconds=60.0)

A Unix stream socket joins candidate and judge; the harness hands it over and sees only the score.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from harness.judge.corpus import JUDGE_SPLITS

START_SECONDS = 60.0
GRACE_SECONDS = 30.0  # beyond the candidate's own deadline: arithmetic, a loaded machine
HARNESS_ROOT = Path(__file__).parents[2]


class JudgeLost(RuntimeError):
    """The judge process died or fell silent. Nothing is known about the candidate: ask again."""


class JudgeProcess:
    """One `python -m harness.judge`, started at once and again after a loss; threads take turns.

    `judge_id` names what its scores can be compared with. Raises ValueError when the corpus is not
    there, or when after a restart data or judge are no longer the same.
    """

    def __init__(self, folder: Path, context: int, eval_bytes: int) -> None:
        self._arguments = ["--folder", str(folder.resolve()), "--context", str(context)]
        self._arguments += ["--eval-bytes", str(eval_bytes)]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.judge_id: str | None = None
        self._start()

    def judge(
        self, channel: socket.socket, split: str, *, probes: bool = False, timeout_seconds: float
    ) -> dict[str, Any]:
        """Score the candidate at the other end of `channel`, which stays the caller's to close.

        {"ok": true, "split", "bpb", "nats", "bytes", "seconds", "judge_id"}, or
        {"ok": false, "kind": diverged | crash | timeout | cheat, "detail", "judge_id"}. Raises JudgeLost.
        """
        assert split in JUDGE_SPLITS, split
        request = {"split": split, "probes": probes, "timeout_seconds": timeout_seconds}
        with self._lock:
            if self._process is None:
                self._start()
            try:
                socket.send_fds(self._control, [json.dumps(request).encode() + b"\n"], [channel.fileno()])
                return self._receive(timeout_seconds + GRACE_SECONDS)
            except (OSError, ValueError):  # gone, silent, or half a line
                self._stop()
                raise JudgeLost(f"the judge process was lost while scoring {split}") from None

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-m", "harness.judge", *self._arguments]
            command += ["--control-fd", str(theirs.fileno())]
            # -P and PYTHONPATH: the judge's code comes from here, whatever the working directory holds
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": str(HARNESS_ROOT), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            ready = self._receive(START_SECONDS)
        except (OSError, ValueError):
            self._stop()
            raise JudgeLost("the judge process did not start") from None
        if not ready["ready"]:
            self._stop()
            raise ValueError(ready["detail"])
        if self.judge_id not in (None, ready["judge_id"]):
            self._stop()
            raise ValueError(
                f"the judge changed from {self.judge_id} to {ready['judge_id']}: open a new study or "
                "put its files and corpus back"
            )
        self.judge_id = ready["judge_id"]

    def _receive(self, timeout_seconds: float) -> dict[str, Any]:
        self._control.settimeout(timeout_seconds)
        with self._control.makefile("rb") as lines:
            return json.loads(lines.readline())

    def _stop(self) -> None:
        if self._process is not None:
            self._control.close()
            self._process.kill()
            self._process.wait()
            self._process = None
