"""Leaves no orphan: when the night's driver ends, however it ends, every process it had started ends too.

Ray's own agents outlive a killed driver, and hide their environment by renaming themselves. So a process
apart keeps count of the driver's descendants, waits for its end, and kills what is left of them and
whatever carries the night's mark in its environment (Linux only).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = "MOUE_NIGHT"
RESTARTS, MAX_RESTARTS = "MOUE_RESTARTS", 5  # after which a night's machine is beyond help
COUNT_SECONDS = 0.5
SWEEPS, PAUSE_SECONDS = 20, 0.1  # a process that forks while it is being killed is met by a later sweep

Process = tuple[int, int]  # pid and start time: a number that was given out again is another process


@contextmanager
def guarded() -> Iterator[None]:
    """Everything that is started inside is gone when the block is left, or when this process is killed."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-P", "-m", "harness.guard", mark]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    os.environ[MARK] = mark
    try:
        yield
    finally:
        del os.environ[MARK]
        guard.stdin.close()
        guard.wait()


def restart(flag: str) -> bool:
    """Runs this command anew, with `flag`, in a fresh image of this process; false after too many times.

    What the old image had started is left to its guard, which sees its end.
    """
    count = int(os.environ.get(RESTARTS, "0")) + 1
    if count > MAX_RESTARTS:
        return False
    os.environ[RESTARTS] = str(count)
    os.environ.pop(MARK, None)
    arguments = sys.orig_argv[1:] + ([] if flag in sys.orig_argv else [flag])
    os.execv(sys.executable, [sys.executable, *arguments])


def running() -> dict[Process, int]:
    """Every process and its parent's pid; zombies are left out."""
    found: dict[Process, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if fields[0] != "Z":
                found[int(entry.name), int(fields[19])] = int(fields[1])
    return found


def below(root: int, processes: dict[Process, int], without: set[Process]) -> set[Process]:
    """The descendants of the process `root`, those in `without` and theirs left out."""
    found: set[Process] = set()
    parents = {root}
    while parents:
        children = {p for p, parent in processes.items() if parent in parents} - found - without
        found |= children
        parents = {pid for pid, _ in children}
    return found


def carries(pid: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def main(mark: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it has to outlive the driver
    driver, known = os.getppid(), set()
    others = {p for p in running() if p[0] in (driver, os.getpid())} | below(
        driver, running(), set()
    )  # not the night's
    while not select.select([sys.stdin], [], [], COUNT_SECONDS)[0]:
        known |= below(driver, running(), others)
    for _ in range(SWEEPS):
        processes = running()
        for pid, _ in known & processes.keys():
            known |= below(pid, processes, others)
        left = {p for p in processes if p in known or (p not in others and carries(p[0], mark))}
        if not left:
            return
        for pid, _ in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1])
