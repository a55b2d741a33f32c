"""Who proposes: random, Optuna, placebo (and the agent, in its own module) behind one small protocol.

Proposers only suggest. The study validates, deduplicates and runs; the ledger remembers.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from harness.errors import UserError
from harness.ledger import Event
from harness.records import BASELINE_ARM, LISTED_ARM, PLACEBO_ARM, SOURCE_ARM, Candidate, Status
from harness.space import Settings, Space, canonical
from harness.view import StudyView

INFEASIBLE = ("config", "constraint")  # kinds of refusal that say something about the point itself
ARMS = ("random", "optuna", "agent", PLACEBO_ARM)


@dataclass(frozen=True)
class Proposal:
    """What a proposer hands in. `overrides` are absolute values laid over the study's baseline.

    A `free` one may set what no parameter of the space names: it comes from the user, or is the incumbent.
    """

    arm: str
    overrides: Settings
    parent: str | None = None
    hypothesis: str = ""
    family: str = ""
    expected_effect: float | None = None  # gain in bits per byte, positive is better
    expected_slope: str | None = None
    placebo: bool = False
    free: bool = False
    name: str = ""
    call: str | None = None  # the agent call it came from


class Proposer(ABC):
    """One arm. Never blocks: `ask` returns None when nothing is ready."""

    arm: str
    exhausted: object = None  # why it will not propose again, once it is so

    @abstractmethod
    def ask(self, view: StudyView, index: int) -> Proposal | None:
        """The arm's proposal number `index` (counts its accepted and refused ones, also before a resume)."""

    def tell(self, view: StudyView, candidate: Candidate) -> None:
        """A candidate of any arm has its final verdict."""

    def refuse(self, rejected: Event) -> None:
        """A proposal of this arm was not run; its `rejected` record says why."""

    def close(self) -> None:
        """The night is over."""


class PlaceboProposer(Proposer):
    """The incumbent in disguise, on seeds of its own: whatever is kept of it is a false keep."""

    arm = PLACEBO_ARM

    def ask(self, view: StudyView, index: int) -> Proposal | None:
        settings = view.candidates[view.incumbent].settings
        return Proposal(self.arm, settings, parent=view.incumbent, placebo=True, free=True, family="placebo")


def next_listed(view: StudyView) -> Proposal | None:
    """The first design of the search-space file that was not handed in yet."""
    number = view.asked[LISTED_ARM]
    for listed in view.space.candidates[number : number + 1]:
        return Proposal(LISTED_ARM, listed.settings, hypothesis=listed.why, free=True, name=listed.name)
    return None


class OptunaProposer(Proposer):
    """An Optuna sampler over the declared space; one Optuna trial is one candidate, never one seed.

    The study lives in memory and is rebuilt from the ledger by `tell`. A fresh sampler per ask, seeded by
    the index, makes a random proposal a function of the space and the index alone, and one of TPE's a function
    of these and of what it was told.
    """

    def __init__(self, space: Space, arm: str, seed: int):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.arm, self._space = arm, space
        self._seed = seed + zlib.crc32(arm.encode())
        self._asked: dict[str, list[optuna.Trial]] = defaultdict(list)  # settings -> running Optuna trials
        self._told: set[str] = set()  # candidates whose outcome the study holds
        self._study = optuna.create_study(direction="minimize", sampler=optuna.samplers.RandomSampler(0))

    def _sampler(self, index: int) -> Any:
        import warnings

        import optuna

        seed = (self._seed + 7919 * index) % 2**32
        if self.arm == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=8
            )

    def ask(self, view: StudyView, index: int) -> Proposal | None:
        self.tell(view, view.candidates[view.baseline])
        self._study.sampler = self._sampler(index)
        trial = self._study.ask()
        settings = dict(self._space.baseline)
        overrides: Settings = {}
        for key, param in self._space.params.items():
            if not self._space.active(key, settings):
                continue
            if param.kind == "categorical":
                overrides[key] = trial.suggest_categorical(key, param.choices)
            elif param.kind == "int":
                overrides[key] = trial.suggest_int(
                    key, int(param.low), int(param.high), step=int(param.step or 1), log=param.log
                )
            else:
                overrides[key] = trial.suggest_float(
                    key, param.low, param.high, step=param.step, log=param.log
                )
            settings[key] = overrides[key]
        self._asked[self._key(settings)].append(trial)
        hypothesis = "drawn at random" if self.arm == "random" else "TPE expects an improvement here"
        return Proposal(self.arm, overrides, hypothesis=hypothesis, family="sampler")

    def tell(self, view: StudyView, candidate: Candidate) -> None:
        if candidate.placebo or candidate.arm == SOURCE_ARM or candidate.id in self._told:
            return
        if not self._space.holds(candidate.settings):
            return
        values = view.scores(candidate.id, 0, "val")
        failed = candidate.arm != BASELINE_ARM and bool(view.failures(candidate.id, 0))
        if not values and not failed:
            return
        self._told.add(candidate.id)
        self._settle(candidate.settings, None if failed else sum(values.values()) / len(values))

    def refuse(self, rejected: Event) -> None:
        from optuna.trial import TrialState

        if rejected["kind"] not in INFEASIBLE and rejected["kind"] != "duplicate":
            return
        settings = self._space.complete(rejected["overrides"])
        if rejected["kind"] in INFEASIBLE:
            self._settle(settings, None)
        elif asked := self._asked[self._key(settings)]:  # what it is worth is known from the first one
            self._study.tell(asked.pop(), state=TrialState.FAIL)

    def _settle(self, settings: Settings, mean: float | None) -> None:
        """The outcome of the point: of this sampler's own trial there, where it has one."""
        from optuna.trial import TrialState

        asked = self._asked[self._key(settings)]
        if not asked:
            self._add(settings, mean)
            return
        trial = asked.pop()
        if mean is None:  # a violated constraint, never a huge loss
            trial.set_constraint("infeasible", 1.0)
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, mean)

    def _add(self, settings: Settings, mean: float | None) -> None:
        """A point that this sampler did not suggest: another arm's, or one from before a resume."""
        from optuna import distributions
        from optuna.trial import TrialState, create_trial

        active = [k for k in self._space.params if self._space.active(k, settings)]
        spaces: dict[str, Any] = {}
        for key in active:
            p = self._space.params[key]
            if p.kind == "categorical":
                spaces[key] = distributions.CategoricalDistribution(p.choices)
            elif p.kind == "int":
                step = int(p.step or 1)
                spaces[key] = distributions.IntDistribution(int(p.low), int(p.high), log=p.log, step=step)
            else:
                spaces[key] = distributions.FloatDistribution(p.low, p.high, log=p.log, step=p.step)
        self._study.add_trial(
            create_trial(
                state=TrialState.PRUNED if mean is None else TrialState.COMPLETE,
                value=mean,
                params={k: settings[k] for k in active},
                distributions=spaces,
                constraints={"infeasible": 1.0 if mean is None else 0.0},
            )
        )

    def _key(self, settings: Settings) -> str:
        active = {k: settings[k] for k in self._space.params if self._space.active(k, settings)}
        return canonical({k: round(v, 12) if isinstance(v, float) else v for k, v in active.items()})


def parse_shares(text: str) -> dict[str, float]:
    """`optuna=0.6,random=0.4` -> shares. Raises UserError."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        arm, _, value = part.strip().partition("=")
        if arm in shares:
            raise UserError(f"--proposers: {arm!r} stands there twice; give it one share")
        try:
            shares[arm] = float(value)
        except ValueError:
            raise UserError(f"--proposers {part.strip()!r}: write ARM=SHARE, as in optuna=0.6") from None
    check_shares(shares, "--proposers")
    return shares


def check_shares(shares: dict[str, float], place: str) -> None:
    for arm, share in shares.items():
        if arm not in ARMS:
            raise UserError(f"{place}: {arm!r} is not a proposer; choose from {', '.join(ARMS)}")
        if not 0 <= share < float("inf"):
            raise UserError(f"{place}: {arm} = {share!r}: a share is 0 or more")
    if not any(shares.values()):
        raise UserError(f"{place}: no proposer has a share above 0")


def arms_by_need(view: StudyView, shares: dict[str, float]) -> list[str]:
    """Arms, the one furthest behind its share first: a pure function of how often each was asked."""
    total = sum(shares.values())
    asked = sum(view.asked[arm] for arm in shares)
    return sorted(
        (arm for arm in shares if shares[arm] > 0),
        key=lambda arm: (view.asked[arm] - shares[arm] / total * (asked + 1), list(shares).index(arm)),
    )


def replay(proposer: Proposer, view: StudyView) -> None:
    """Tells a fresh proposer everything that is decided already."""
    for candidate in view.candidates.values():
        if candidate.arm == BASELINE_ARM or candidate.status not in (Status.OPEN, Status.AUDIT):
            proposer.tell(view, candidate)
    for event in view.rejected:
        if event["arm"] == proposer.arm:
            proposer.refuse(event)
