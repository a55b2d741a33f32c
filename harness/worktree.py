"""Candidates in git: a bare repository per study, one commit and one ref per candidate, detached worktrees.

git --git-dir runs/<study>/repo.git log --all --oneline --notes=verdicts

Nothing that a proposer wrote is ever an argument of git: messages, notes and file contents go in by stdin,
candidate and commit names are hexadecimal.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from harness.errors import UserError
from harness.plumbing import GitError, Run, commit_files, git, git_bytes
from harness.space import Setting, Settings

SETTINGS_FILE = "candidate.toml"
BASE_REF = "refs/harness/base"  # the trainer that the study was opened on
NOTES_REF = "refs/notes/verdicts"

# Clone starts the other side without our configuration, so it is told about foreign owners here.
UPLOAD_PACK = "git -c 'safe.directory=*' upload-pack"


def head_commit(path: Path) -> tuple[str | None, bool]:
    """HEAD of the repository around `path` and whether its tracked files differ; (None, False) if none."""
    folder = path if path.is_dir() else path.parent
    try:
        commit = git(folder, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        return commit, bool(git(folder, "status", "--porcelain", "--untracked-files=no"))
    except GitError:
        return None, False


def settings_toml(settings: Settings) -> str:
    """Settings as TOML lines, sorted by key."""
    return "".join(f"{_quoted(key)} = {_value(settings[key])}\n" for key in sorted(settings))


def _quoted(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Setting) -> str:
    # JSON's spelling is TOML's too, but for the delete character, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")


class Candidates:
    """The study's repository `repo.git` and its worktrees `work/`. Any number of processes may use it."""

    def __init__(self, study_dir: Path):
        self.repo = study_dir.resolve() / "repo.git"
        self.work = study_dir.resolve() / "work"
        self._git = _run_in(self.repo)
        self._lock = study_dir.resolve() / "repo.lock"

    @classmethod
    def create(cls, study_dir: Path, source: Path, trainer: str) -> Candidates:
        """Makes the repository once; a later call finds it. `trainer` is a file under the folder `source`.

        It holds the history of the user's HEAD with the trainer as it stands on the disk on top of it, or the
        trainer alone where git does not track it. Raises UserError when there is no such file.
        """
        study_dir.mkdir(parents=True, exist_ok=True)
        candidates = cls(study_dir)
        with candidates._alone():
            if not candidates.repo.exists():
                for half in study_dir.glob(".repo-*"):  # a clone that outlived us may still be writing there
                    shutil.rmtree(half, ignore_errors=True)
                half = Path(tempfile.mkdtemp(dir=study_dir.resolve(), prefix=".repo-"))
                _make(half, (source / trainer).resolve())
                os.replace(half, candidates.repo)
        return candidates

    @property
    def base(self) -> str:
        """The commit that the study was opened on, the user's uncommitted trainer included."""
        return self._git("rev-parse", "--verify", BASE_REF)

    @property
    def trainer(self) -> str:
        """The trainer's path inside a checkout."""
        return self._git("config", "--local", "harness.trainer")

    def trainer_source(self, commit: str) -> bytes:
        blob = f"{_hex(commit)}:{self.trainer}"
        return git_bytes(self.repo, "cat-file", "blob", blob, GIT_DIR=str(self.repo))

    def commit(
        self,
        candidate: str,
        parent_commit: str | None,
        settings: Settings,
        message: str,
        trainer_source: bytes | None = None,
    ) -> str:
        """The candidate's commit on `refs/candidates/<candidate>`; None as parent stands for the base.

        The same candidate again gives the commit that it has. The same input gives the same hash: the date is
        a second after the parent's. Raises GitError when the name is taken by another content.
        """
        ref = f"refs/candidates/{_hex(candidate, 8)}"
        parent = _hex(parent_commit) if parent_commit else self.base
        files = {SETTINGS_FILE: settings_toml(settings).encode()}
        if trainer_source is not None:
            files[self.trainer] = trainer_source
        new = commit_files(self._git, parent, files, message, **_dates(self._git, parent))
        with self._moving(ref) as run:
            try:
                run("update-ref", ref, new, "0" * len(new))
            except GitError:
                if run("rev-parse", f"{ref}^{{tree}}") != run("rev-parse", f"{new}^{{tree}}"):
                    raise
            return run("rev-parse", ref)

    def note(self, commit: str, text: str) -> None:
        """Attaches `text` to the commit (`refs/notes/verdicts`), in place of what was there."""
        add = ["notes", "--ref", NOTES_REF, "add", "--force", "--allow-empty", "-F", "-", _hex(commit)]
        with self._moving(NOTES_REF) as run:
            run(*add, stdin=text.replace("\0", "").encode(errors="replace"))

    def diff(self, a: str, b: str, paths: list[str] | None = None) -> str:
        """Unified diff from commit `a` to `b` of the settings and the trainer, or of `paths`."""
        flags = ["--no-ext-diff", "--no-textconv", "--no-color", "--no-renames"]
        text = self._git("diff", *flags, _hex(a), _hex(b), "--", *(paths or [SETTINGS_FILE, self.trainer]))
        return os.fsencode(text).decode(errors="replace")

    def checkout(self, commit: str) -> Path:
        """A detached worktree of the commit, made where it is missing, half made or altered."""
        path = self._path(commit)
        with self._alone() as run:
            if not self._intact(path, commit):
                self._discard(path, run)
                run("worktree", "add", "--quiet", "--detach", "--force", "--", str(path), commit)
        return path

    def remove(self, commit: str) -> None:
        """Removes the commit's worktree, if there is one."""
        with self._alone() as run:
            self._discard(self._path(commit), run)

    def prune(self) -> None:
        """Removes what killed processes left: folders that git does not know and entries without a folder."""
        with self._alone() as run:
            self._forget(run)
            for path in self.work.glob("*"):
                if not (self.repo / "worktrees" / path.name).exists():
                    shutil.rmtree(path)

    def _path(self, commit: str) -> Path:
        return self.work / _hex(commit)[:12]

    def _intact(self, path: Path, commit: str) -> bool:
        # The git folder is named outright: the candidate's code may have rewritten the link in its worktree.
        entry = self.repo / "worktrees" / path.name
        if not (path / ".git").exists() or (entry / "locked").exists():
            return False
        state = ["status", "--porcelain=v2", "--branch", "--untracked-files=no"]
        try:
            found = git(path, *state, GIT_DIR=str(entry), GIT_WORK_TREE=str(path))
        except GitError:
            return False
        return found.splitlines() == [f"# branch.oid {commit}", "# branch.head (detached)"]

    def _discard(self, path: Path, run: Run) -> None:
        if path.exists():
            shutil.rmtree(path)
        self._forget(run)

    def _forget(self, run: Run) -> None:
        # git locks an entry while it makes it; whoever holds our lock knows that no one is making one.
        for locked in self.repo.glob("worktrees/*/locked"):
            locked.unlink()
        run("worktree", "prune", "--expire=now")

    @contextmanager
    def _moving(self, ref: str) -> Iterator[Run]:
        """git, alone, with the ref freed of a lock file that a killed git left on it."""
        with self._alone() as run:
            (self.repo / f"{ref}.lock").unlink(missing_ok=True)
            yield run

    @contextmanager
    def _alone(self) -> Iterator[Run]:
        """git under the study's lock: its own add, remove and prune race.

        The git process holds the lock too, so that it ends before anyone else begins even if we are killed.
        """
        with self._lock.open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield partial(self._git, holding=(lock.fileno(),))


def _run_in(repo: Path) -> Run:
    """git on a bare repository, named outright so that git never looks for one in the folders above."""
    return partial(git, repo, GIT_DIR=str(repo))


def _make(repo: Path, trainer: Path) -> None:
    if not trainer.is_file():
        raise UserError(f"{trainer}: no such trainer; name a file with `trainer`")
    root, path = _tracked(trainer)
    if root:
        flags = ["--quiet", "--bare", "--no-local", "--single-branch", "--no-tags", "--template="]
        git(root, "clone", *flags, "--upload-pack", UPLOAD_PACK, "--", str(root), str(repo))
    else:
        git(trainer.parent, "init", "--quiet", "--bare", "--template=", "--", str(repo))

    run = _run_in(repo)
    # Files are checked out byte for byte as they were hashed, whatever the tree's .gitattributes say.
    (repo / "info").mkdir(exist_ok=True)
    (repo / "info" / "attributes").write_text("* -text -eol -ident -filter -working-tree-encoding\n")
    run("config", "--local", "harness.trainer", path)
    base = head = run("rev-parse", "HEAD") if root else None
    content = trainer.read_bytes()
    blob = run("hash-object", "-w", "--stdin", stdin=content)
    if not head or run("rev-parse", f"{head}:{path}") != blob:
        message = f"{path} as it stood on the disk"
        base = commit_files(run, head, {path: content}, message, **_dates(run, head))
    run("update-ref", BASE_REF, base)


def _tracked(file: Path) -> tuple[Path | None, str]:
    """The root of the repository that has the file in its HEAD, and the path from there; or no root."""
    try:
        entry = git(file.parent, "ls-tree", "-z", "--full-name", "--name-only", "HEAD", "--", file.name)
        root = git(file.parent, "rev-parse", "--show-toplevel")
    except GitError:
        return None, file.name
    return (Path(root), entry.rstrip("\0")) if entry else (None, file.name)


def _dates(run: Run, parent: str | None) -> dict[str, str]:
    seconds = int(run("show", "--no-patch", "--format=%ct", parent)) + 1 if parent else 0
    return dict.fromkeys(("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"), f"@{seconds} +0000")


def _hex(name: str, shortest: int = 40) -> str:
    """The name of a commit or candidate, which goes to git as it is. Raises UserError for any other text."""
    if not re.fullmatch(rf"[0-9a-f]{{{shortest},64}}", name):
        raise UserError(
            f"{name[:80]!r}: not {shortest} to 64 hexadecimal digits; take a name from the ledger"
        )
    return name
