"""A person's word on a candidate: accept makes a branch with the evidence, reject binds the next night.

harness accept smoke 3fa9 --why "holds at depth 4 too"
"""

from __future__ import annotations

import difflib
import getpass
import heapq
import re
from functools import partial
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.ledger import Event, Ledger, number
from harness.plumbing import ENVIRONMENT, IDENTITY, GitError, Run, commit_files, git
from harness.records import Candidate, Status
from harness.space import Settings
from harness.view import StudyView
from harness.worktree import Candidates, settings_toml

SHORTEST_PREFIX = 4


def resolve(view: StudyView, prefix: str) -> Candidate:
    """The one candidate whose id begins with `prefix`. Raises UserError naming near ones."""
    if prefix in view.candidates:
        return view.candidates[prefix]
    found = [c for c in view.candidates if c.startswith(prefix)]
    if len(prefix) >= SHORTEST_PREFIX and len(found) == 1:
        return view.candidates[found[0]]
    if len(prefix) < SHORTEST_PREFIX:
        problem = f"too short, give {SHORTEST_PREFIX} characters or more of the id"
    else:
        problem = "begins several ids, give more of it" if found else "no such candidate"

    def distance(candidate: str) -> float:
        return -difflib.SequenceMatcher(None, prefix, candidate[: len(prefix)]).ratio()

    near = ", ".join(heapq.nsmallest(3, found or view.candidates, key=distance))
    raise UserError(f"candidate {prefix[:80]!r}: {problem}; near ones: {near}")


def reject(view: StudyView, ledger: Ledger, candidate: str, why: str) -> None:
    """Records that a person does not want this candidate. Raises UserError without a reason."""
    chosen = resolve(view, candidate)
    if not why.strip():
        raise UserError(f"reject {chosen.id}: needs a reason, which the next night obeys; give --why TEXT")
    _record(ledger, chosen, "reject", why)


def accept(
    view: StudyView, ledger: Ledger, study_dir: Path, candidate: str, repo: Path, why: str = ""
) -> str:
    """Makes branch `moue/<study>/<candidate>` in the user's repository and returns its name.

    One commit on top of the one that the study was opened on: the winner's settings, the trainer where it was
    measured with another one, and the evidence as message. Checkout and index stay as they are. Raises
    UserError when the candidate was not kept or the branch cannot be made.
    """
    chosen = resolve(view, candidate)
    _check_winner(view, chosen)
    root = _root_with(repo, view)
    branch = f"moue/{view.opened['study']}/{chosen.id}"
    run: Run = partial(git, root)
    base = view.opened["commit"]
    trainer = _trainer(run, chosen, study_dir, base)
    files = {f"winners/{chosen.id}.toml": _winner_toml(view, chosen).encode(), **trainer}
    message = _message(view, chosen, why, list(trainer))
    commit = commit_files(run, base, files, message, **_identity(root))
    try:
        run("update-ref", f"refs/heads/{branch}", commit, "0" * len(commit))
    except GitError as error:
        raise UserError(
            f"branch {branch}: {_line(str(error))}; look at what stands there, then `git branch -D` or -m it"
        ) from None
    _record(ledger, chosen, "accept", why, branch=branch)
    return branch


def _record(ledger: Ledger, candidate: Candidate, action: str, why: str, **more: str) -> None:
    try:
        by = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        by = "unknown"
    ledger.append(
        {"event": "reviewed", "candidate": candidate.id, "action": action, "why": why, "by": by, **more}
    )


def _check_winner(view: StudyView, candidate: Candidate) -> None:
    problem = None
    if candidate.status != Status.KEPT:
        problem = f"is {candidate.status.value}, and only a kept candidate can be accepted"
    elif candidate.id == view.baseline:
        problem = "is the baseline: there is nothing to change"
    elif candidate.placebo:
        problem = "is a placebo, the incumbent in disguise: there is nothing to change"
    if problem:
        kept = ", ".join(view.incumbents[1:]) or "none yet"
        raise UserError(f"candidate {candidate.id} {problem}; kept: {kept}")


def _root_with(repo: Path, view: StudyView) -> Path:
    """The root of the user's repository, which must hold the commit that the study was opened on."""
    commit = view.opened["commit"]
    if commit is None:
        raise UserError(
            f"study {view.opened['study']} was opened outside git; take the settings from its report"
        )
    try:
        root = Path(git(repo, "rev-parse", "--show-toplevel"))
        git(root, "cat-file", "-e", f"{commit}^{{commit}}")
    except GitError:
        raise UserError(
            f"{repo}: has no commit {commit}, on which the study was opened; name the repository it came from"
        ) from None
    return root


def _trainer(run: Run, candidate: Candidate, study_dir: Path, base: str) -> dict[str, bytes]:
    """The trainer that was measured, where it differs from the user's: a patch, or edits never committed."""
    candidates = Candidates(study_dir)
    path, measured = candidates.trainer, candidates.trainer_source(candidate.proposed["commit"])
    try:
        same = run("rev-parse", f"{base}:{path}") == run("hash-object", "--stdin", stdin=measured)
    except GitError:  # the user's repository does not hold the trainer, as when it is an installed one
        same = measured == candidates.trainer_source(candidates.base)
    return {} if same else {path: measured}


def _identity(root: Path) -> dict[str, str]:
    """The user's own name and address as git knows them, or none."""
    own: dict[str, Any] = dict.fromkeys([*IDENTITY, *(k for k in ENVIRONMENT if k.startswith("GIT_CONFIG_"))])
    found = {}
    for role in ("AUTHOR", "COMMITTER"):
        try:
            ident = git(root, "-c", "user.useConfigOnly=true", "var", f"GIT_{role}_IDENT", **own)
        except GitError:
            return {}
        name, address = re.match(r"(.*) <(.*)> ", ident).groups()
        found |= {f"GIT_{role}_NAME": name, f"GIT_{role}_EMAIL": address}
    return found


def _winner_toml(view: StudyView, candidate: Candidate) -> str:
    comments = [
        f"Candidate {candidate.id} of study {view.opened['study']}",
        _step(candidate),
        f"Hypothesis: {_line(candidate.proposed.get('hypothesis', '')) or 'none'}",
    ]
    return "".join(f"# {line}\n" for line in comments) + "\n[baseline]\n" + settings_toml(candidate.settings)


def _message(view: StudyView, candidate: Candidate, why: str, patched: list[str]) -> str:
    baseline = view.candidates[view.baseline]
    lines = [
        f"Accept {candidate.id[:12]} of study {view.opened['study']}",
        "",
        f"Hypothesis ({_line(candidate.arm)}): {_line(candidate.proposed.get('hypothesis', '')) or 'none'}",
        f"Why accepted: {_line(why) or 'no reason given'}",
        "",
        "Settings against the baseline:",
        *_settings_diff(baseline.settings, candidate.settings),
        "",
        "Evidence, each step over the candidate before it (gains in bits per byte, positive is better):",
    ]
    for step in _chain(view, candidate):
        lines += [_step(step), *_sources(view, step.last)]
    for event in view.promoted:
        if event["candidate"] == candidate.id:
            lines += [_promotion(event), *_sources(view, event)]
    lines += ["", f"Judge: {view.opened['judge_id']}"]
    lines += [f"The commit holds {path} as it was measured." for path in patched]
    return "\n".join(lines) + "\n"


def _chain(view: StudyView, candidate: Candidate) -> list[Candidate]:
    """The keeps that lead from the baseline to the candidate: the settings diff holds all of them."""
    steps = []
    while candidate.id != view.baseline:
        steps.append(candidate)
        candidate = view.candidates[candidate.last["against"]]
    return steps[::-1]


def _settings_diff(old: Settings, new: Settings) -> list[str]:
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [f"  {key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed] or ["  none"]


def _step(candidate: Candidate) -> str:
    verdict = candidate.last
    return (
        f"{candidate.id}: gain {_number(verdict, 'delta', '+.4f')} over {verdict['against']}, "
        f"standard error {_number(verdict, 'se', '.4f')}, z {_number(verdict, 'z', '.2f')}, "
        f"n {_number(verdict, 'n', '.0f')}, {verdict['split']} split, rung {verdict['rung']}"
    )


def _promotion(event: Event) -> str:
    return (
        f"Promotion to depth {event['depth']}: "
        f"gain {_number(event, 'delta', '+.4f')} over {event['against']}, "
        f"95 % interval {_number(event, 'low', '+.4f')} to {_number(event, 'high', '+.4f')}, "
        f"n {_number(event, 'n', '.0f')}" + ("" if event["complete"] else ", incomplete")
    )


def _sources(view: StudyView, event: Event) -> list[str]:
    seeds = " ".join(str(view.trials[trial].seed) for trial in event["trials"])
    return [
        f"  seeds {seeds}",
        f"  trials {' '.join(event['trials'])}",
        f"  control {' '.join(event['control'])}",
    ]


def _number(event: Event, key: str, style: str) -> str:
    value = number(event.get(key))
    return "missing" if value is None else format(value, style)


def _line(text: str) -> str:
    """Foreign text as one line without control characters: it can end neither a comment nor a paragraph."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())
