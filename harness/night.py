"""Opens or resumes a study and runs one session of it, from the first control run to the reason it stopped."""

from __future__ import annotations

import hashlib
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness import agent
from harness.admission import Admission, Describer
from harness.dispatch import run_inline
from harness.errors import EndedEarly, UserError
from harness.guard import guarded
from harness.ledger import Ledger
from harness.propose import OptunaProposer, PlaceboProposer, Proposer, check_shares, replay
from harness.records import PLACEBO_ARM
from harness.search import Search
from harness.space import Budget, Space, load_space
from harness.study import (
    StudyPaths,
    check_comparable,
    check_resumable,
    clear_false_start,
    ensure_corpus,
    freeze,
    only_driver,
    opened_event,
)
from harness.view import StudyView
from harness.worktree import Candidates, head_commit

log = logging.getLogger("harness")


@dataclass(frozen=True)
class Options:
    """What the command line adds to the search-space file; None leaves the file's value."""

    study: str | None = None
    hours: float | None = None
    trials: int | None = None
    usd: float | None = None
    gpu_hours: float | None = None
    proposers: dict[str, float] | None = None
    resume: bool = False
    dispatch: str = "ray"
    ray_address: str | None = None
    workers: int | None = None

    def budget(self, space: Space) -> Budget:
        given = {k: getattr(self, k) for k in ("hours", "trials", "usd", "gpu_hours")}
        return space.budget.model_copy(update={k: v for k, v in given.items() if v is not None})


def arm_shares(space: Space, budget: Budget, given: dict[str, float] | None) -> dict[str, float]:
    """Shares of the arms, the placebos' added; the agent joins only with a way to call it and money.

    Without [params] there are none. Raises UserError for an unknown arm, or an agent that cannot be called.
    """
    if not space.params:
        if given is not None:
            raise UserError("--proposers: the file has no [params] to propose from; leave the flag out")
        return {}
    shares = dict(given if given is not None else space.proposers)
    check_shares(shares, "--proposers" if given is not None else "[proposers]")
    if shares.get("agent") and not (agent.available() and budget.usd > 0):
        if given is not None:
            raise UserError(
                "--proposers agent: needs ANTHROPIC_API_KEY (or ANTHROPIC_BASE_URL) and a ceiling in --usd"
            )
        log.info(
            "the agent is off: it needs ANTHROPIC_API_KEY or ANTHROPIC_BASE_URL, and a budget.usd above 0"
        )
        del shares["agent"]
    if PLACEBO_ARM not in shares and (share := space.decision.placebo_share) > 0:
        shares[PLACEBO_ARM] = sum(shares.values()) * share / (1 - share)
    shares = {arm: share for arm, share in shares.items() if share > 0}
    if not shares:
        raise UserError("[proposers]: no arm is left to propose; give optuna or random a share")
    return shares


def run_search(space_file: Path, options: Options) -> tuple[StudyPaths, str]:
    """One session. Returns the study's paths and why it stopped. Raises UserError, EndedEarly."""
    space = load_space(space_file)
    paths = StudyPaths(options.study or space.name)
    with only_driver(paths), _log_to(paths.folder / "log.txt"), guarded():
        ledger = Ledger(paths.ledger)
        view = StudyView(ledger.poll())
        if view.opened and not options.resume:
            raise UserError(f"{paths.folder}: this study exists; go on with --resume or choose --study NAME")
        if options.resume and not view.opened:
            raise UserError(f"{paths.folder}: nothing to resume; search without --resume")
        if view.opened:
            check_resumable(view, space, str(space_file))
        search, describer = _prepare(space_file, space, paths, ledger, view, options)
        try:
            with _signals(), progress(search):
                if options.dispatch == "inline":
                    run_inline(search)
                else:
                    from harness.cluster import run_ray  # two seconds of import

                    where = {"address": options.ray_address, "workers": options.workers}
                    run_ray(search, space.rungs, paths.folder / "ray", **where)
        except BaseException as error:
            search.close(error)
            raise
        finally:
            describer.close()
        return paths, search.close()


def _prepare(
    space_file: Path, space: Space, paths: StudyPaths, ledger: Ledger, view: StudyView, options: Options
) -> tuple[Search, Describer]:
    """Everything that can be wrong is found here, before the first record is written."""
    from harness.judge.score import judge_id

    budget = options.budget(space)
    shares = arm_shares(space, budget, options.proposers)
    folder = ensure_corpus(space.metric.corpus, space.metric.vocab_size)
    trainer = Path(space.trainer)
    if not trainer.exists():
        raise UserError(
            f"trainer = {space.trainer!r}: no such file in {Path.cwd()}; run where the trainer is"
        )
    if not view.opened:
        clear_false_start(paths)
    candidates = Candidates.create(paths.folder, Path.cwd(), space.trainer)
    checkout = candidates.checkout(candidates.base)
    describer = Describer(space, checkout / candidates.trainer)
    try:
        if problem := describer.check(describer.baseline):
            raise UserError(f"{space_file}: the baseline itself breaks its rules {problem}")
        admission = Admission(space, describer, candidates)
        commit, dirty = head_commit(Path.cwd())
        opened = opened_event(
            space,
            paths,
            judge_id=judge_id(folder, space.metric.context, space.metric.eval_bytes),
            commit=commit,
            dirty=dirty,
            base_commit=candidates.base,
            trainer_sha256=describer.trainer_sha256,
            dispatch=options.dispatch,
            proposers=shares,
            resumed=bool(view.opened),
            source=describer.start,
            budget=budget.model_dump(),
        )
        if view.opened:
            check_comparable(view, opened, hashlib.sha256(trainer.read_bytes()).hexdigest())
            _check_start(view, describer.start)
        else:
            freeze(paths, space_file)
        first = [] if view.incumbents else [admission.baseline()]
        if space.source.settings is not None and view.source is None:
            first.append(admission.source())
        ledger.append(opened, *first)
        for event in ledger.poll():
            view.apply(event)
        proposers = [_proposer(arm, space, paths, budget) for arm in shares]
        for proposer in proposers:
            replay(proposer, view)
    except BaseException:
        describer.close()
        raise
    search = Search(paths, space, ledger, view, admission, candidates, proposers, shares, budget)
    search.sweep(list(view.trials))  # what a killed session could not
    return search, describer


def _check_start(view: StudyView, start: str | None) -> None:
    """What training goes on from is what it was when the study was opened. Raises UserError."""
    if (before := view.opened.get("source")) != start:
        raise UserError(
            f"source.checkpoint = {view.space.source.checkpoint!r}: its sha256 is {start[:16]} now, the study was "
            f"opened with {before[:16]}; put it back or search with --study NEW"
        )


def _proposer(arm: str, space: Space, paths: StudyPaths, budget: Budget) -> Proposer:
    if arm == PLACEBO_ARM:
        return PlaceboProposer()
    if arm == "agent":
        return agent.AgentProposer(space, Ledger(paths.ledger), budget.usd)
    return OptunaProposer(space, arm, seed=int(space.sha256()[:8], 16))


@contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the session cleanly; what runs is repeated on --resume."""

    def interrupt(number: int, frame: object) -> None:
        for n in before:
            signal.signal(n, signal.SIG_IGN)  # once is enough: the closing must not be cut short
        raise EndedEarly(f"{signal.Signals(number).name}: stopped with everything saved; go on with --resume")

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for n in before:
        signal.signal(n, interrupt)
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """One line an event, into the study's log; on the terminal a progress bar stands in for it."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


@contextmanager
def progress(search: Search) -> Iterator[None]:
    """A bar over the night's hours on a terminal; nothing elsewhere, the log has the events."""
    if not sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm

    seconds = round(search.purse.budget.hours * 3600)
    shape = "{l_bar}{bar}| {elapsed} of " + f"{seconds / 3600:.2g} h{{postfix}}"
    with tqdm(total=seconds, bar_format=shape, desc=search.paths.name, dynamic_ncols=True) as bar:
        search.on_progress = lambda: _redraw(bar, search)
        yield


def _redraw(bar: object, search: Search) -> None:
    view = search.view
    bar.n = min(bar.total, round(search.purse.elapsed_seconds()))
    done = sum(t.over for t in view.trials.values())
    scores = view.scores(view.incumbent, 0, "val")
    best = f"{sum(scores.values()) / len(scores):.4f}" if scores else "–"
    kept = len(view.incumbents) - 1
    bar.set_postfix_str(f"{done} trials, {len(view.candidates) - 1} candidates, {kept} kept, bpb {best}")
