"""Real Ray: a night over two slots, and what a kill -9 of each part leaves behind.

pytest tests/test_cluster.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.study import load_study

COMMAND = [sys.executable, "-m", "harness", "search", "pairs.toml", "--workers", "2"]
SLOWER = 0.3  # seconds a training takes, so that there is a middle to kill it in


@pytest.fixture
def finite(workshop: Path) -> Path:
    """A space of five points, all worse than the baseline: the set of trials does not hang on timing."""
    old = '[params.sharpness]\nkind = "float"\nlow = 0.2\nhigh = 1.4'
    new = '[params.sharpness]\nkind = "categorical"\nchoices = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]'
    smoothing = '[params.smoothing]\nkind = "float"\nlow = 0.1\nhigh = 10.0\nlog = true'
    text = (workshop / "pairs.toml").read_text().replace(old, new).replace(smoothing, "")
    (workshop / "pairs.toml").write_text(text + "\n[decision]\nplacebo_share = 0.0\n")
    trainer = (workshop / "bigram_trainer.py").read_text()
    slowed = trainer.replace(
        '    if behave == "crash":', f'    time.sleep({SLOWER})\n    if behave == "crash":', 1
    )
    (workshop / "bigram_trainer.py").write_text(slowed)
    return workshop


def expected() -> set[tuple[float, int]]:
    """(sharpness, seed): eight control runs, one look at each other point."""
    control = {(0.7, 10_000 + i) for i in range(8)}
    return control | {(s, 10_000) for s in (0.2, 0.3, 0.4, 0.5, 0.6)}


def finished() -> int:
    try:
        return Path("runs/pairs/ledger.jsonl").read_text().count('"finished"')
    except FileNotFoundError:
        return 0


def start(*more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(what: Callable[[], object], process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        if process.poll() is not None:
            raise AssertionError(f"ended early: {process.returncode}: {process.stderr.read()[-2000:]}")
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def descendants(root: int) -> dict[int, str]:
    """pid -> command line of everything below `root`."""
    parents, lines = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            lines[int(entry.name)] = (
                (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            )
        except (OSError, IndexError):
            continue
    below, fresh = set(), {root}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh} - below
        below |= fresh
    return {pid: lines[pid] for pid in below}


def _has_zygote(pid: int) -> bool:
    return any("harness.zygote" in line for line in descendants(pid).values())


def ours() -> dict[int, str]:
    """Processes of this test's night, whoever adopted them: they name its folder or were started for it."""
    here, found = os.getcwd(), {}
    for entry in Path("/proc").glob("[0-9]*"):
        if int(entry.name) == os.getpid():
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            place = os.readlink(entry / "cwd")
        except OSError:
            continue
        if here in line or place.startswith(here):
            found[int(entry.name)] = line[:120]
    return found


def assert_nothing_left(known: set[int]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        left = ours() | {p: "" for p in known if Path(f"/proc/{p}").exists() and not _zombie(p)}
        if not left:
            return
        time.sleep(0.2)
    raise AssertionError(f"orphans: {left}")


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def assert_whole_and_single() -> None:
    _, _, view = load_study("pairs")
    records = [json.loads(line) for line in Path("runs/pairs/ledger.jsonl").read_text().splitlines()]
    done = Counter(r["trial"] for r in records if r["event"] == "finished" and r["state"] == "COMPLETE")
    assert set(done.values()) == {1}, "a finished trial was run again"
    trials = {
        (view.candidates[view.trials[t].candidate].settings["sharpness"], view.trials[t].seed) for t in done
    }
    assert trials == expected()
    assert view.sessions[-1]["reason"] == "space-exhausted"


def test_a_night_over_two_slots_ends_and_leaves_nothing(finite: Path) -> None:
    process = start()
    wait_for(lambda: finished() >= 3, process)
    known = set(descendants(process.pid))
    _, log = process.communicate(timeout=200)
    assert process.returncode == 0, log[-2000:]
    assert_whole_and_single()
    assert_nothing_left(known)
    assert not Path("runs/pairs/ray").exists()
    lines = Path("runs/pairs/ledger.jsonl").read_text().splitlines()
    assert {e["purpose"] for e in map(json.loads, lines) if e["event"] == "started"} == {"control", "look"}


def test_a_killed_driver_leaves_nothing_and_resumes(finite: Path) -> None:
    process = start()
    wait_for(lambda: finished() >= 4, process)
    known = set(descendants(process.pid))
    process.kill()
    process.wait(timeout=30)
    assert_nothing_left(known)
    again = start("--resume")
    _, log = again.communicate(timeout=200)
    assert again.returncode == 0, log[-2000:]
    assert_whole_and_single()


@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_a_killed_head_is_started_again(finite: Path, victim: str) -> None:
    """kill -9 of Ray's head at two in the morning: the night goes on by itself."""
    process = start()
    wait_for(lambda: finished() >= 4, process)
    known = descendants(process.pid)
    head = [p for p, line in known.items() if line.split(" ")[0].endswith(f"/{victim}")]
    assert head, f"no {victim} among {list(known.values())}"
    os.kill(head[0], signal.SIGKILL)
    _, log = process.communicate(timeout=250)
    assert process.returncode == 0, log[-2000:]
    assert_whole_and_single()
    assert_nothing_left(set(known))
    _, _, view = load_study("pairs")
    assert [e["resumed"] for e in view.sessions if e["event"] == "opened"] == [False, True]


def test_a_killed_worker_is_replaced_and_its_trial_repeated(finite: Path) -> None:
    process = start()
    wait_for(lambda: finished() >= 4, process)
    slots = [p for p, line in descendants(process.pid).items() if line.startswith("ray::") and _has_zygote(p)]
    assert slots
    os.kill(slots[0], signal.SIGKILL)
    _, log = process.communicate(timeout=250)
    assert process.returncode == 0, log[-2000:]
    assert_whole_and_single()
    _, _, view = load_study("pairs")
    assert any(t.losses for t in view.trials.values()), "the trial that was under way counts as lost once"
