"""Accept and reject on real ledgers and real git. Run: pytest tests/test_review.py"""

from __future__ import annotations

import hashlib
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.ledger import Event, Ledger
from harness.records import seed_of, trial_id
from harness.review import accept, reject, resolve
from harness.view import StudyView
from harness.worktree import Candidates, head_commit

BASE, FIRST, SECOND, OPEN, LOST, PLACEBO = (
    c * 8 + "0123456789ab" for c in ("00", "a1", "a2", "b3", "b4", "c5")
)
TRAINER = b"print('train')\n"
PATCHED = b"print('patched')\n"
HOSTILE = "faster\nrouter -> \x1b[31m `touch pwned` $(touch pwned)\n\n[baseline]\nlr = 9 \u2028 é --exec=x"
SPACE = {
    "name": "smoke",
    "baseline": {"lr": 0.1, "wrap": False},
    "params": {
        "lr": {"kind": "float", "low": 0.01, "high": 1.0},
        "wrap": {"kind": "categorical", "choices": [False, True]},
    },
    "rungs": [{"depth": 2, "tokens": 1000}, {"depth": 4, "tokens": 4000}],
}


def git(folder: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=folder, capture_output=True, check=True, text=True).stdout


@dataclass
class Study:
    user: Path
    folder: Path
    ledger: Ledger
    candidates: Candidates

    @property
    def view(self) -> StudyView:
        return StudyView(Ledger(self.ledger.path).poll())

    def accept(self, candidate: str, why: str = "") -> str:
        return accept(self.view, self.ledger, self.folder, candidate, self.user, why)

    def show(self, branch: str, path: str) -> str:
        return git(self.user, "show", f"{branch}:{path}")


def proposed(study: Candidates, candidate: str, parent: str | None, lr: float, **more: object) -> Event:
    settings = {"lr": lr, "wrap": candidate == SECOND}
    source = PATCHED if candidate == SECOND else None
    return {
        "event": "proposed",
        "candidate": candidate,
        "arm": "agent",
        "settings": settings,
        "parent": parent,
        "against": parent,
        "hypothesis": HOSTILE,
        "commit": study.commit(candidate, None, settings, "m", source),
        **more,
    }


def evidence(candidate: str, against: str, rung: int, delta: float) -> Event:
    trials = [[trial_id(c, rung, seed_of(rung, i)) for i in range(2)] for c in (candidate, against)]
    return {
        "candidate": candidate,
        "against": against,
        "rung": rung,
        "n": 2,
        "delta": delta,
        "se": 0.0031,
        "trials": trials[0],
        "control": trials[1],
    }


def started(candidate: str, rung: int) -> list[Event]:
    seeds = [seed_of(rung, i) for i in range(2)]
    facts = {"candidate": candidate, "rung": rung, "purpose": "audit", "depth": 2, "tokens": 1, "attempt": 1}
    return [{"event": "started", "trial": trial_id(candidate, rung, s), "seed": s, **facts} for s in seeds]


def keep(candidate: str, against: str, delta: float) -> Event:
    facts = {"event": "verdict", "verdict": "keep", "stage": "audit", "split": "audit", "provisional": False}
    return {**facts, **evidence(candidate, against, 0, delta), "z": 9.4}


def make_study(user: Path, folder: Path) -> Study:
    candidates = Candidates.create(folder, user, "train.py")
    commit, dirty = head_commit(user)
    opened = {"study": "night-1", "space": SPACE, "commit": commit, "dirty": dirty, "judge_id": "judge-77"}
    drop = {**keep(LOST, BASE, -0.01), "verdict": "discard"}
    promotion = {"depth": 4, "low": 0.004, "high": 0.036, "complete": True, "reason": ""}
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.append(
        {"event": "opened", **opened},
        proposed(candidates, BASE, None, 0.1, arm="baseline"),
        proposed(candidates, FIRST, BASE, 0.2),
        *(e for c in (BASE, FIRST) for e in started(c, 0)),
        keep(FIRST, BASE, 0.0291),
        proposed(candidates, SECOND, FIRST, 0.2),
        proposed(candidates, OPEN, FIRST, 0.3),
        proposed(candidates, LOST, FIRST, 0.4),
        proposed(candidates, PLACEBO, FIRST, 0.2, arm="placebo", placebo=True),
        *(
            e
            for c, r in ((SECOND, 0), (SECOND, 1), (BASE, 1), (LOST, 0), (PLACEBO, 0))
            for e in started(c, r)
        ),
        keep(SECOND, FIRST, 0.0123),
        keep(PLACEBO, FIRST, 0.002),
        drop,
        {"event": "promoted", **evidence(SECOND, BASE, 1, 0.0201), **promotion},
    )
    return Study(user, folder, ledger, candidates)


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's repository with staged and unstaged work, a stash, hooks, and an identity of its own."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    (tmp_path / "gitconfig").write_text("[user]\nname = Ada\nemail = ada@example.org\n")
    root = tmp_path / "user"
    root.mkdir()
    git(root, "init", "-q", "-b", "main")
    (root / "train.py").write_bytes(TRAINER)
    (root / "notes.txt").write_text("one\n")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    (root / "notes.txt").write_text("stashed\n")
    git(root, "stash", "-q")
    (root / "staged.txt").write_text("staged\n")
    git(root, "add", "staged.txt")
    (root / "notes.txt").write_text("unstaged\n")
    for hook in ("reference-transaction", "post-commit", "pre-commit", "commit-msg", "post-index-change"):
        (root / ".git" / "hooks" / hook).write_text(f"#!/bin/sh\ntouch {tmp_path}/pwned\n")
        (root / ".git" / "hooks" / hook).chmod(0o755)
    git(root, "config", "core.hooksPath", str(root / ".git" / "hooks"))
    return root


@pytest.fixture
def study(user: Path, tmp_path: Path) -> Study:
    return make_study(user, tmp_path / "night-1")


def fingerprint(root: Path) -> dict[str, str]:
    """Every file of the checkout and of .git but the objects, which only ever grow."""
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file() and ".git/objects" not in str(p)
    }


def test_accept_makes_one_commit_on_the_commit_of_the_study(study: Study) -> None:
    (study.user / "later.txt").touch()
    git(study.user, "-c", "core.hooksPath=/dev/null", "commit", "-qam", "the user went on")
    branch = study.accept(FIRST[:5], "holds\nat depth 4")
    assert branch == f"moue/night-1/{FIRST}"
    parent, commit = git(study.user, "rev-list", "--reverse", branch).split()
    assert parent == study.view.opened["commit"]
    assert git(study.user, "diff", "--name-only", parent, commit).split() == [f"winners/{FIRST}.toml"]
    text = study.show(branch, f"winners/{FIRST}.toml")
    assert tomllib.loads(text) == {"baseline": {"lr": 0.2, "wrap": False}}
    assert "gain +0.0291" in text
    assert git(study.user, "log", "-1", "--format=%an <%ae> %cn", branch) == "Ada <ada@example.org> Ada\n"
    review = study.view.reviews[FIRST]
    assert (review["action"], review["why"], review["branch"]) == ("accept", "holds\nat depth 4", branch)
    assert review["by"]


def test_accept_leaves_checkout_index_and_head_alone(study: Study, tmp_path: Path) -> None:
    before = fingerprint(study.user)
    branch = study.accept(SECOND)
    after = fingerprint(study.user)
    assert set(after) - set(before) == {f".git/refs/heads/{branch}", f".git/logs/refs/heads/{branch}"}
    assert before.items() <= after.items()
    assert not (tmp_path / "pwned").exists()
    assert subprocess.run(["git", "fsck", "--strict"], cwd=study.user, capture_output=True).returncode == 0


def test_the_message_holds_the_evidence_of_every_step(study: Study) -> None:
    message = git(study.user, "log", "-1", "--format=%B", study.accept(SECOND))
    for fact in (
        "lr: 0.1 -> 0.2",
        "wrap: False -> True",
        f"{FIRST}: gain +0.0291 over {BASE}, standard error 0.0031, z 9.40, n 2, audit split, rung 0",
        f"{SECOND}: gain +0.0123 over {FIRST}",
        "Promotion to depth 4: gain +0.0201",
        "95 % interval +0.0040 to +0.0360",
        "seeds 10000 10001",
        "seeds 20000 20001",
        trial_id(SECOND, 1, 20001),
        "Judge: judge-77",
        "train.py as it was measured",
    ):
        assert fact in message, fact
    assert message.index(f"{FIRST}: gain") < message.index(f"{SECOND}: gain")


def test_a_missing_number_is_missing_and_not_zero(study: Study) -> None:
    study.ledger.append({**keep(OPEN, SECOND, 0.01), "se": None})
    study.ledger.append(*started(OPEN, 0))
    message = git(study.user, "log", "-1", "--format=%B", study.accept(OPEN))
    assert "gain +0.0100" in message
    assert "standard error missing" in message


def test_accept_brings_the_patched_trainer_and_nothing_else(study: Study) -> None:
    branch = study.accept(SECOND)
    changed = git(study.user, "diff", "--name-only", f"{branch}^", branch).split()
    assert changed == ["train.py", f"winners/{SECOND}.toml"]
    assert study.show(branch, "train.py").encode() == PATCHED


def test_accept_brings_edits_that_were_never_committed(user: Path, tmp_path: Path) -> None:
    (user / "train.py").write_bytes(b"dirty\n")
    study = make_study(user, tmp_path / "night-1")
    assert study.show(study.accept(FIRST), "train.py") == "dirty\n"


def test_an_installed_trainer_is_not_copied_into_the_users_repository(user: Path, tmp_path: Path) -> None:
    (user / "lib").mkdir()
    (user / "lib" / "train.py").write_bytes(TRAINER)  # not tracked
    git(user, "rm", "-q", "--cached", "train.py")
    git(user, "-c", "core.hooksPath=/dev/null", "commit", "-qm", "no trainer")
    study = make_study(user / "lib", tmp_path / "night-1")
    branch = study.accept(FIRST)
    assert git(user, "diff", "--name-only", f"{branch}^", branch).split() == [f"winners/{FIRST}.toml"]


def test_foreign_text_stays_on_its_line(study: Study, tmp_path: Path) -> None:
    branch = study.accept(FIRST, HOSTILE)
    lines = study.show(branch, f"winners/{FIRST}.toml").splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "",
        "[baseline]",
        "lr = 0.2",
        "wrap = false",
    ]
    message = git(study.user, "log", "-1", "--format=%B", branch)
    assert "\x1b" not in message
    assert "[baseline]\n" not in message
    assert not list(tmp_path.rglob("pwned"))


def test_without_an_identity_the_harness_signs(study: Study, tmp_path: Path) -> None:
    (tmp_path / "gitconfig").write_text("")
    branch = study.accept(FIRST)
    assert git(study.user, "log", "-1", "--format=%an", branch) == "MoUE harness\n"


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        (OPEN, "is open"),
        (LOST, "is discarded"),
        (BASE, "is the baseline"),
        (PLACEBO, "is a placebo"),
        ("a1a", "too short"),
        ("a1a1ffff", f"no such candidate; near ones: {FIRST}"),
        ("", "too short"),
        ("--help", "no such candidate"),
        ("../../x", "no such candidate"),
        ("x\ny" * 400, "no such candidate"),
    ],
)
def test_accept_refuses_all_but_a_winner(study: Study, candidate: str, said: str) -> None:
    before, ledger = fingerprint(study.user), study.ledger.path.read_bytes()
    with pytest.raises(UserError) as caught:
        study.accept(candidate)
    assert said.split(" (")[0] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (fingerprint(study.user), study.ledger.path.read_bytes()) == (before, ledger)


def test_an_ambiguous_prefix_lists_what_it_could_mean(study: Study) -> None:
    twin = FIRST[:12] + "f" * 8
    study.ledger.append(proposed(study.candidates, twin, BASE, 0.5))
    study.ledger.append(proposed(study.candidates, FIRST + "ff", BASE, 0.6))
    with pytest.raises(UserError, match="begins several ids") as caught:
        resolve(study.view, FIRST[:6])
    assert FIRST in str(caught.value)
    assert twin in str(caught.value)
    assert resolve(study.view, FIRST).id == FIRST


@pytest.mark.parametrize("standing", ["the same", "above", "below"])
def test_a_branch_in_the_way_is_named(study: Study, standing: str) -> None:
    name = {"the same": f"moue/night-1/{FIRST}", "above": "moue", "below": f"moue/night-1/{FIRST}/x"}[
        standing
    ]
    git(study.user, "-c", "core.hooksPath=/dev/null", "branch", name)
    before = fingerprint(study.user)
    with pytest.raises(UserError, match="branch moue/night-1/") as caught:
        study.accept(FIRST)
    assert "\n" not in str(caught.value)
    assert fingerprint(study.user) == before
    assert FIRST not in study.view.reviews


def test_accept_wants_the_repository_of_the_study(study: Study, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    with pytest.raises(UserError, match="has no commit"):
        accept(study.view, study.ledger, study.folder, FIRST, stranger)
    git(stranger, "init", "-q")
    with pytest.raises(UserError, match="has no commit"):
        accept(study.view, study.ledger, study.folder, FIRST, stranger)


def test_accept_of_a_study_outside_git_says_where_the_settings_are(tmp_path: Path) -> None:
    source = tmp_path / "plain"
    source.mkdir()
    (source / "train.py").write_bytes(TRAINER)
    study = make_study(source, tmp_path / "night-1")
    with pytest.raises(UserError, match="outside git"):
        study.accept(FIRST)


def test_reject_needs_a_reason_and_binds(study: Study) -> None:
    for why in ("", " \n"):
        with pytest.raises(UserError, match="--why"):
            reject(study.view, study.ledger, OPEN[:4], why)
    assert not study.view.reviews
    reject(study.view, study.ledger, OPEN[:4], "too slow")
    review = study.view.reviews[OPEN]
    assert (review["action"], review["why"]) == ("reject", "too slow")
