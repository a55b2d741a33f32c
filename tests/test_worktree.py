"""Candidates in git: attacks, crashes, crowds. Run: pytest tests/test_worktree.py"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import UserError
from harness.plumbing import GitError
from harness.worktree import Candidates, head_commit, settings_toml

TRAINER = b"print('train')\r\n# \xff not utf-8, no newline at the end"
PATCHED = b"print('patched')\n"
NAME = "ab" * 8
SETTINGS = {"lr": 1e-05, "depth": 4, "wrap": True, "topology": "ring"}
ATTACKS = [
    "--upload-pack=touch pwned",
    "-c core.pager=touch pwned",
    "../../../etc/passwd",
    "$(touch pwned) `touch pwned`",
    "one\ntwo\n\nparent 0000",
    "# a comment line\n; and another",
    "\u202eright to left \U0001f600 é",
    "nul\0inside",
    "\x7f delete \x1b[31m escape",
    "lone \ud800 surrogate",
    "",
]


def git(folder: Path, *args: str) -> bytes:
    """The reference: git itself, by subprocess, without the module under test."""
    run = subprocess.run(["git", *args], cwd=folder, capture_output=True, check=True)
    return run.stdout


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A user's repository that would run a program at every turn: hooks, filters, a file watcher."""
    root = tmp_path / "user"
    (root / "code").mkdir(parents=True)
    git(root, "init", "-q", "-b", "main")
    (root / "code" / "train.py").write_bytes(TRAINER)
    (root / "code" / "train.py").chmod(0o755)
    (root / "other.txt").write_text("$Id$\n")
    (root / ".gitattributes").write_text("*.py text eol=crlf filter=evil\n*.txt ident\n")
    git(root, "add", ".")
    git(root, "-c", "user.name=U", "-c", "user.email=u@example.org", "commit", "-q", "-m", "first")
    witness = f"touch {tmp_path}/pwned"
    hooks = root / ".git" / "hooks"
    for hook in ["post-checkout", "post-commit", "reference-transaction", "post-index-change"]:
        (hooks / hook).write_text(f"#!/bin/sh\n{witness}\n")
        (hooks / hook).chmod(0o755)
    for key, value in {"filter.evil.clean": witness, "filter.evil.smudge": witness}.items():
        git(root, "config", key, value)
    git(root, "config", "core.fsmonitor", witness)
    return root


@pytest.fixture
def candidates(tmp_path: Path, user: Path) -> Candidates:
    return Candidates.create(tmp_path / "study", user / "code", "train.py")


def content(candidates: Candidates, commit: str, path: str) -> bytes:
    return git(candidates.repo, "cat-file", "blob", f"{commit}:{path}")


def assert_sound(candidates: Candidates) -> None:
    """fsck finds nothing wrong, and nothing that a user's repository asks for was run."""
    found = subprocess.run(
        ["git", "fsck", "--strict", "--no-dangling"], cwd=candidates.repo, capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (0, ""), found.stderr
    assert not list(candidates.repo.parents[1].rglob("pwned"))


# ---- create ----


def test_create_holds_the_users_head(user: Path, candidates: Candidates) -> None:
    (head,) = git(user, "rev-parse", "HEAD").decode().split()
    assert candidates.trainer == "code/train.py"
    parents = git(candidates.repo, "rev-list", "--parents", "-1", candidates.base).decode().split()
    # The attributes made git store other bytes than those on the disk: the base adds the true ones.
    assert parents[1:] == [head]
    assert content(candidates, candidates.base, "code/train.py") == TRAINER
    assert candidates.trainer_source(candidates.base) == TRAINER
    assert_sound(candidates)


def test_create_on_a_clean_and_on_a_dirty_tree(tmp_path: Path) -> None:
    root = tmp_path / "plain"
    root.mkdir()
    git(root, "init", "-q")
    (root / "t.py").write_bytes(TRAINER)
    git(root, "add", ".")
    git(root, "-c", "user.name=U", "-c", "user.email=u@x", "commit", "-qm", "x")
    (root / "untracked").touch()
    clean = Candidates.create(tmp_path / "clean", root, "t.py")
    assert head_commit(root / "t.py") == (clean.base, False)
    (root / "t.py").write_bytes(PATCHED)
    assert head_commit(root) == (clean.base, True)
    dirty = Candidates.create(tmp_path / "dirty", root, "t.py")
    assert content(dirty, dirty.base, "t.py") == PATCHED
    assert git(dirty.repo, "rev-parse", f"{dirty.base}^").decode().strip() == clean.base


@pytest.mark.parametrize("kind", ["no git", "untracked", "no commit"])
def test_create_without_history_holds_the_trainer_alone(tmp_path: Path, user: Path, kind: str) -> None:
    source = {"no git": tmp_path / "plain", "untracked": user / "lib", "no commit": tmp_path / "empty"}[kind]
    source.mkdir()
    if kind == "no commit":
        git(source, "init", "-q")
    (source / "t.py").write_bytes(TRAINER)
    study = Candidates.create(tmp_path / "study", source, "t.py")
    files = git(study.repo, "ls-tree", "-r", "--name-only", study.base).decode().split()
    assert (study.trainer, files) == ("t.py", ["t.py"])
    assert content(study, study.base, "t.py") == TRAINER
    assert head_commit(tmp_path / "plain" if kind == "no git" else tmp_path) == (None, False)


def test_create_from_a_shallow_clone_and_a_linked_worktree(tmp_path: Path, user: Path) -> None:
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{user}", "shallow")
    git(user, "worktree", "add", "-q", "--detach", "../linked")
    (tmp_path / "pwned").unlink(missing_ok=True)
    for name in ("shallow", "linked"):
        study = Candidates.create(tmp_path / f"study-{name}", tmp_path / name / "code", "train.py")
        assert content(study, study.base, "other.txt") == b"$Id$\n"
        assert_sound(study)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_create_from_a_repository_of_another_user(tmp_path: Path, user: Path) -> None:
    subprocess.run(["chown", "-R", "4321:4321", user], check=True)
    study = Candidates.create(tmp_path / "study", user, "code/train.py")
    assert content(study, study.base, "other.txt") == b"$Id$\n"


def test_create_again_keeps_the_first_base(user: Path, candidates: Candidates) -> None:
    base = candidates.base
    (user / "code" / "train.py").write_bytes(PATCHED)
    again = Candidates.create(candidates.repo.parent, user / "code", "train.py")
    assert again.base == base


def test_create_names_a_missing_trainer(tmp_path: Path, user: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.py: no such trainer"):
        Candidates.create(tmp_path / "study", user, "nowhere.py")


def test_an_inherited_git_dir_does_not_mislead(
    tmp_path: Path, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    git(tmp_path, "init", "-q", "other")
    head = git(user, "rev-parse", "HEAD").decode().strip()
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    assert head_commit(user)[0] == head
    assert Candidates.create(tmp_path / "study", user / "code", "train.py").trainer == "code/train.py"
    assert not (other / ".git" / "index").exists()


# ---- commit, note, diff ----


def test_commit_holds_settings_and_trainer(candidates: Candidates) -> None:
    first = candidates.commit(NAME, None, SETTINGS, "first")
    second = candidates.commit("cd" * 8, first, {**SETTINGS, "depth": 5}, "second", PATCHED)
    assert tomllib.loads(content(candidates, first, "candidate.toml").decode()) == SETTINGS
    assert content(candidates, first, "code/train.py") == TRAINER
    assert content(candidates, second, "code/train.py") == PATCHED
    assert git(candidates.repo, "ls-tree", second, "code/train.py").startswith(b"100755 ")
    assert git(candidates.repo, "rev-list", "-2", second).decode().split() == [second, first]
    assert git(candidates.repo, "rev-parse", f"refs/candidates/{'cd' * 8}").decode().strip() == second
    diff = candidates.diff(first, second)
    assert "-depth = 4\n+depth = 5\n" in diff
    assert "+print('patched')" in diff
    assert "train.py" not in candidates.diff(first, second, ["candidate.toml"])
    assert_sound(candidates)


def test_commit_is_the_same_everywhere_and_every_time(
    tmp_path: Path, user: Path, candidates: Candidates
) -> None:
    twin = Candidates.create(tmp_path / "twin", user / "code", "train.py")
    first = candidates.commit(NAME, None, SETTINGS, "m")
    time.sleep(1.1)  # git's clock counts seconds
    assert twin.commit(NAME, None, SETTINGS, "m") == first
    assert candidates.commit(NAME, None, SETTINGS, "m") == first
    assert candidates.commit(NAME, None, SETTINGS, "another hypothesis") == first
    with pytest.raises(GitError):
        candidates.commit(NAME, None, {**SETTINGS, "depth": 9}, "m")


@pytest.mark.parametrize("name", [*ATTACKS, "ab" * 8 + "\n", "AB" * 8, "abc", "a" * 65, "HEAD"])
def test_only_hexadecimal_names_reach_git(candidates: Candidates, name: str) -> None:
    for call in (
        lambda: candidates.commit(name, None, SETTINGS, "m"),
        lambda: candidates.commit(NAME, name or "-", SETTINGS, "m"),
        lambda: candidates.checkout(name),
        lambda: candidates.remove(name),
        lambda: candidates.note(name, "x"),
        lambda: candidates.diff(name, candidates.base),
        lambda: candidates.diff(candidates.base, name),
    ):
        with pytest.raises(UserError):
            call()


def test_foreign_text_is_kept_and_never_obeyed(candidates: Candidates) -> None:
    for index, text in enumerate(ATTACKS):
        settings = {"note": text.replace("\ud800", ""), "x-" + text.replace("\ud800", ""): 1}
        commit = candidates.commit(f"{index:016x}", None, settings, text)
        written = text.replace("\0", "").encode(errors="replace").rstrip(b"\n")
        assert (
            git(candidates.repo, "cat-file", "commit", commit).split(b"\n\n", 1)[1].rstrip(b"\n") == written
        )
        assert tomllib.loads(content(candidates, commit, "candidate.toml").decode()) == settings
        candidates.note(commit, "first")
        candidates.note(commit, text)
        assert git(candidates.repo, "notes", "--ref=verdicts", "show", commit).strip() == written.strip()
        candidates.checkout(commit)
    assert_sound(candidates)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.one_of(
            st.booleans(),
            st.integers(-(2**63), 2**63 - 1),
            st.floats(allow_nan=False, allow_infinity=False),
            st.text(st.characters(exclude_categories=["Cs"])),
        ),
    )
)
def test_settings_come_back_from_toml(settings: dict) -> None:
    text = settings_toml(settings)
    assert tomllib.loads(text) == settings
    assert text == settings_toml(dict(reversed(settings.items())))


# ---- worktrees ----


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".git"
    }


def test_checkout_holds_the_very_bytes(candidates: Candidates) -> None:
    commit = candidates.commit(NAME, None, SETTINGS, "m", TRAINER * 2)
    path = candidates.checkout(commit)
    assert path == candidates.work / commit[:12]
    found = files(path)
    assert found["code/train.py"] == TRAINER * 2
    assert found["other.txt"] == b"$Id$\n"
    assert tomllib.loads(found["candidate.toml"].decode()) == SETTINGS
    inode = (path / "candidate.toml").stat().st_ino
    assert candidates.checkout(commit) == path
    assert (path / "candidate.toml").stat().st_ino == inode, "made again without need"
    candidates.remove(commit)
    candidates.remove(commit)
    assert not path.exists()
    assert_sound(candidates)


def wreck_file(c: Candidates, path: Path) -> None:
    (path / "code" / "train.py").write_bytes(b"cheat")


def wreck_link(c: Candidates, path: Path) -> None:
    (path / ".git").unlink()


def wreck_folder(c: Candidates, path: Path) -> None:
    shutil.rmtree(path)


def wreck_entry(c: Candidates, path: Path) -> None:
    shutil.rmtree(c.repo / "worktrees" / path.name)


def wreck_start(c: Candidates, path: Path) -> None:
    """What is there when git dies before it has written the entry's files."""
    shutil.rmtree(path)
    for file in (c.repo / "worktrees" / path.name).iterdir():
        file.unlink() if file.is_file() else shutil.rmtree(file)
    (c.repo / "worktrees" / path.name / "locked").write_text("initializing")


def wreck_middle(c: Candidates, path: Path) -> None:
    """What is there when git dies while it writes the files."""
    (c.repo / "worktrees" / path.name / "locked").write_text("initializing")
    (c.repo / "worktrees" / path.name / "index.lock").touch()
    (c.repo / "worktrees" / path.name / "index").unlink()
    shutil.rmtree(path / "code")


WRECKS = [wreck_file, wreck_link, wreck_folder, wreck_entry, wreck_start, wreck_middle]


@pytest.mark.parametrize("wreck", WRECKS)
def test_checkout_repairs(candidates: Candidates, wreck: Callable[[Candidates, Path], None]) -> None:
    commit, other = (candidates.commit(n * 8, None, {"n": n}, "m") for n in ("ab", "cd"))
    path = candidates.checkout(commit)
    before = files(path)
    wreck(candidates, path)
    candidates.checkout(other)  # another's wreck is no obstacle
    assert files(candidates.checkout(commit)) == before
    wreck(candidates, path)
    candidates.prune()
    registered = {p.name for p in (candidates.repo / "worktrees").iterdir()}
    assert registered == {p.name for p in candidates.work.iterdir()}
    assert other[:12] in registered


def test_a_checkout_that_its_code_rewrote_runs_nothing(tmp_path: Path, candidates: Candidates) -> None:
    commit = candidates.commit(NAME, None, SETTINGS, "m")
    path = candidates.checkout(commit)
    before = files(path)
    git(tmp_path, "clone", "-q", "--bare", str(candidates.repo), "evil")
    git(tmp_path / "evil", "config", "core.bare", "false")
    git(tmp_path / "evil", "config", "filter.evil.clean", f"touch {tmp_path}/pwned")
    git(tmp_path / "evil", "read-tree", "HEAD")
    (path / ".git").write_text(f"gitdir: {tmp_path}/evil\n")
    (path / ".gitattributes").write_text("* filter=evil\n")
    (path / "other.txt").touch()
    assert files(candidates.checkout(commit)) == before
    assert_sound(candidates)


def in_process(body: Callable[[], None]) -> multiprocessing.Process:
    def run() -> None:
        os.setpgid(0, 0)
        body()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def test_sixteen_processes_at_once(candidates: Candidates) -> None:
    def work(own: int) -> None:
        for candidate in (0, own):  # one that all want, one of its own
            commit = candidates.commit(f"{candidate:08x}", None, {"n": candidate}, "m")
            path = candidates.checkout(commit)
            assert tomllib.loads((path / "candidate.toml").read_text()) == {"n": candidate}
            candidates.note(commit, f"by {candidate}")
        candidates.remove(commit)

    crowd = [in_process(lambda own=own: work(own)) for own in range(1, 17)]
    for process in crowd:
        process.join()
    assert [process.exitcode for process in crowd] == [0] * 16
    assert len(list(candidates.work.iterdir())) == 1
    assert len(git(candidates.repo, "for-each-ref", "refs/candidates").splitlines()) == 17
    assert_sound(candidates)


@pytest.mark.parametrize("whole_group", [True, False], ids=["group", "process"])
def test_killed_at_any_moment_then_works(tmp_path: Path, user: Path, whole_group: bool) -> None:
    def night(study: Path) -> list[str]:
        candidates = Candidates.create(study, user / "code", "train.py")
        first = candidates.commit(NAME, None, SETTINGS, "m")
        second = candidates.commit("cd" * 8, first, SETTINGS, "m", PATCHED)
        candidates.note(second, "keep")
        return [files(candidates.checkout(c)) for c in (first, second)]

    started = time.monotonic()
    expected = night(tmp_path / "undisturbed")
    length_seconds = time.monotonic() - started
    interrupted = 0
    for index in range(12):
        study = tmp_path / f"study{index}"
        process = in_process(lambda study=study: night(study))
        time.sleep(length_seconds * (index + 0.5) / 12)
        interrupted += process.is_alive()
        kill = os.killpg if whole_group else os.kill
        try:
            kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            assert not process.is_alive()
        process.join()
        assert night(study) == expected
        assert not [p for p in (study / "repo.git").rglob("*.lock") if "index" not in p.name]
        assert_sound(Candidates(study))
    assert interrupted > 3


def test_a_git_process_that_outlives_its_harness_keeps_the_lock(candidates: Candidates) -> None:
    begun, ended = candidates.repo / "begun", candidates.repo / "ended"

    def work() -> None:
        with candidates._alone() as run:
            run("-c", f"alias.nap=!touch {begun}; sleep 0.5; touch {ended}", "nap")

    process = in_process(work)
    while not begun.exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not ended.exists()
    candidates.prune()
    assert ended.exists()


def test_a_dead_lock_file_is_no_obstacle(candidates: Candidates) -> None:
    (candidates.repo / "refs" / "candidates").mkdir()
    (candidates.repo / "refs" / "candidates" / f"{NAME}.lock").touch()
    commit = candidates.commit(NAME, None, SETTINGS, "m")
    candidates.note(commit, "first")
    (candidates.repo / "refs" / "notes" / "verdicts.lock").touch()
    candidates.note(commit, "second")
    assert git(candidates.repo, "notes", "--ref=verdicts", "show", commit) == b"second\n"


def test_no_git_process_stays(candidates: Candidates) -> None:
    for n in range(3):
        commit = candidates.commit(f"{n:08x}", None, {"n": n}, "m")
        candidates.checkout(commit)
        candidates.note(commit, "x")
        candidates.diff(candidates.base, commit)
    listed = subprocess.run(
        ["ps", "-o", "pid,comm", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    assert not re.findall(r"\bgit\b", listed.stdout)
    assert not [
        p for p in Path("/proc/self/fd").iterdir() if str(candidates.repo.parent) in os.path.realpath(p)
    ]
