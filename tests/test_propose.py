"""What proposers ask is a function of the history; what they are told is true.

pytest tests/test_propose.py
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState
from story import BASE, Story

from harness.errors import UserError
from harness.night import arm_shares
from harness.propose import (
    ARMS,
    OptunaProposer,
    PlaceboProposer,
    Proposal,
    arms_by_need,
    next_listed,
    parse_shares,
    replay,
)
from harness.records import LISTED_ARM, PLACEBO_ARM, SOURCE_ARM
from harness.space import Budget, Settings, Space
from harness.view import StudyView

SPACE = {
    "name": "propose",
    "baseline": {"lr": 0.02, "width": 4, "shape": "flat", "end": 0.3, "fixed": 7},
    "params": {
        "lr": {"kind": "float", "low": 0.001, "high": 0.1, "log": True},
        "width": {"kind": "int", "low": 2, "high": 10, "step": 2},
        "shape": {"kind": "categorical", "choices": ["flat", "ramp"]},
        "end": {"kind": "float", "low": 0.1, "high": 0.7, "step": 0.2, "when": {"shape": "ramp"}},
    },
    "rungs": [{"depth": 1, "tokens": 10}],
}
CHOICES = {
    **SPACE,
    "baseline": {"a": 1, "b": "x"},
    "params": {
        "a": {"kind": "categorical", "choices": [1, 2]},
        "b": {"kind": "categorical", "choices": ["x", "y"]},
    },
}
SEED = 42


@pytest.fixture(autouse=True)
def strict() -> Any:
    """A warning of Optuna's about what we do to it is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def proposer(arm: str, space: dict[str, Any] = SPACE) -> OptunaProposer:
    return OptunaProposer(Space.model_validate(space), arm, SEED)


def told(made: OptunaProposer) -> list[FrozenTrial]:
    return made._study.get_trials(deepcopy=False)


def begun(space: dict[str, Any] = SPACE) -> Story:
    return Story(space).begun().scored(BASE, 1, 3.0).scored(BASE, 2, 5.0)


def loss(chosen: Settings) -> float:
    return abs(math.log(chosen["lr"] / 0.01)) + 0.1 * abs(chosen["width"] - 6) + (chosen["shape"] == "flat")


def night(story: Story, made: OptunaProposer, count: int, first: int = 0) -> list[Settings]:
    """The proposer asked, answered and told `count` times; every seventh of its ideas fails, every fifth is refused."""
    space, asked = made._space, []
    for index in range(first, first + count):
        view = story.view()
        proposal = made.ask(view, index)
        asked.append(proposal.overrides)
        if index % 5 == 4:
            story.tell("rejected", arm=made.arm, kind="constraint", detail="", overrides=proposal.overrides)
            made.refuse({"kind": "constraint", "overrides": proposal.overrides})
            continue
        candidate, chosen = f"{made.arm}-{index}", space.complete(proposal.overrides)
        story.proposed(candidate, made.arm, settings=chosen)
        if index % 7 == 6:
            story.started(candidate, 1).finished(candidate, 1, "diverged")
        else:
            story.scored(candidate, 1, loss(chosen))
        story.verdict(candidate, "discard")
        made.tell(story.view(), story.view().candidates[candidate])
    return asked


# ---- the samplers ----


def test_a_random_proposal_depends_on_the_space_and_its_number_alone() -> None:
    view = begun().view()
    alone = [proposer("random").ask(view, k).overrides for k in range(12)]
    story, together = begun(), proposer("random")
    assert night(story, together, 12) == alone
    backwards = proposer("random")
    assert [backwards.ask(view, k).overrides for k in reversed(range(12))] == alone[::-1]
    assert len({str(a) for a in alone}) == 12
    assert OptunaProposer(Space.model_validate(SPACE), "random", SEED + 1).ask(view, 0).overrides != alone[0]


def test_arms_of_one_seed_do_not_propose_the_same() -> None:
    view = begun().view()
    assert proposer("random").ask(view, 0).overrides != proposer("optuna").ask(view, 0).overrides


def test_what_optuna_asks_is_a_function_of_the_history() -> None:
    stories, made = [begun(), begun()], [proposer("optuna"), proposer("optuna")]
    first, second = (night(s, p, 20) for s, p in zip(stories, made, strict=True))
    assert first == second
    resumed = [proposer("optuna"), proposer("optuna")]
    for again in resumed:
        replay(again, stories[0].view())
    after = [night(fork(stories[0]), again, 6, first=20) for again in resumed]
    assert after[0] == after[1]


def fork(story: Story) -> Story:
    """A copy that goes on by itself."""
    copy = Story(story.space)
    copy.events, copy.seconds = list(story.events), story.seconds
    return copy


def test_a_resumed_optuna_knows_what_the_killed_one_knew() -> None:
    story, made = begun(), proposer("optuna")
    night(story, made, 20)
    resumed = proposer("optuna")
    replay(resumed, story.view())

    def knowledge(p: OptunaProposer) -> list[tuple]:
        return sorted(
            (str(sorted(t.params.items())), t.state.name, t.value, sum(t.constraints.values()) > 0)
            for t in told(p)
        )

    assert knowledge(resumed) == knowledge(made)


def test_optuna_learns() -> None:
    story, made = begun(), proposer("optuna")
    asked = [made._space.complete(a) for a in night(story, made, 60)]
    early, late = (sorted(map(loss, part)) for part in (asked[:20], asked[-20:]))
    assert late[10] < early[10]


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["random", "optuna"]), st.integers(0, 10_000))
def test_a_proposal_lies_in_the_space_and_has_what_is_in_play(arm: str, index: int) -> None:
    made = proposer(arm)
    overrides = made.ask(begun().view(), index).overrides
    chosen = made._space.complete(overrides)  # raises outside
    assert ("end" in overrides) == (chosen["shape"] == "ramp")
    assert chosen["fixed"] == 7 and "fixed" not in overrides
    assert chosen == {**SPACE["baseline"], **overrides}


def test_conditional_parameters_reach_optuna_only_in_play() -> None:
    story, made = begun(), proposer("optuna")
    night(story, made, 20)
    shapes = Counter(t.params["shape"] for t in told(made))
    assert min(shapes.values()) > 0 and set(shapes) == {"flat", "ramp"}
    for trial in told(made):
        assert ("end" in trial.params) == (trial.params["shape"] == "ramp")


# ---- what Optuna is told ----


def test_the_baseline_is_the_first_point_told_once_as_its_mean() -> None:
    story, made = begun(), proposer("optuna")
    made.ask(story.view(), 0)
    made.ask(story.scored(BASE, 3, 100.0).view(), 1)
    points = [t for t in told(made) if t.state == TrialState.COMPLETE]
    assert [(t.number, t.value) for t in points] == [(0, 4.0)]
    assert points[0].params == {"lr": 0.02, "width": 4, "shape": "flat"}


def test_a_failed_control_run_does_not_make_the_baseline_infeasible() -> None:
    made = proposer("optuna")
    made.ask(begun().started(BASE, 3).finished(BASE, 3, "crash").view(), 0)
    assert (told(made)[0].state, told(made)[0].value) == (TrialState.COMPLETE, 4.0)


@pytest.mark.parametrize("foreign", [False, True], ids=["own", "foreign"])
@pytest.mark.parametrize("failure", [None, "oom", "diverged", "timeout"])
def test_an_outcome_is_a_value_or_a_violated_constraint(foreign: bool, failure: str | None) -> None:
    story, made = begun(), proposer("optuna")
    chosen = {**SPACE["baseline"], "lr": 0.05, "shape": "ramp", "end": 0.5}
    if not foreign:
        chosen = made._space.complete(made.ask(story.view(), 0).overrides)
    story.proposed("c", settings=chosen).scored("c", 1, 2.0).scored("c", 2, 4.0)
    if failure:
        story.started("c", 3).tell("judged", trial="c-r0-s3", split="val", bpb=1e9).finished("c", 3, failure)
    story.verdict("c", "discard")
    view = story.view()
    made.tell(view, view.candidates["c"])
    made.tell(view, view.candidates["c"])  # told twice, known once
    mine = [t for t in told(made) if t.params["lr"] == chosen["lr"]]
    assert len(mine) == 1
    (trial,) = mine
    assert (
        trial.params == {k: v for k, v in chosen.items() if k in trial.params} and "fixed" not in trial.params
    )
    assert not trial.intermediate_values
    if failure:
        assert (trial.state, trial.value) == (TrialState.PRUNED, None)
        assert sum(trial.constraints.values()) > 0
    else:
        assert (trial.state, trial.value) == (TrialState.COMPLETE, 3.0)
        assert sum(trial.constraints.values()) <= 0


def test_no_value_that_optuna_holds_is_of_a_failed_or_refused_point() -> None:
    story, made = begun(), proposer("optuna")
    night(story, made, 35)
    view = story.view()
    scores = {sum(s.values()) / len(s) for c in view.candidates if (s := view.scores(c, 0, "val"))}
    states = Counter(t.state for t in told(made))
    failed = sum(bool(view.failures(c, 0)) for c in view.candidates)
    assert {t.value for t in told(made) if t.value is not None} == scores
    assert states == {TrialState.COMPLETE: len(scores), TrialState.PRUNED: failed + len(view.rejected)}
    for trial in told(made):
        assert (trial.value is None) == (sum(trial.constraints.values()) > 0)


def test_a_candidate_without_any_outcome_and_a_placebo_are_not_told() -> None:
    story = begun().proposed("c").proposed("p", PLACEBO_ARM, placebo=True).scored("p", 1, 2.0)
    made = proposer("optuna")
    for name in ("c", "p"):
        made.tell(story.view(), story.view().candidates[name])
    assert told(made) == []


def test_a_duplicate_leaves_nothing_running() -> None:
    story, made = begun(CHOICES), proposer("optuna", CHOICES)
    waiting: dict[str, Settings] = {}
    for index in range(24):  # four points: most are asked again while the first ask is still out
        overrides = made.ask(story.view(), index).overrides
        name = str(sorted(overrides.items()))
        if name in waiting:
            made.refuse({"kind": "duplicate", "overrides": overrides})
        else:
            waiting[name] = overrides
            story.proposed(name, settings=overrides).scored(name, 1, 2.0).verdict(name, "discard")
    assert len(waiting) < 24
    for name in waiting:
        made.tell(story.view(), story.view().candidates[name])
    states = Counter(t.state for t in told(made))
    assert states[TrialState.RUNNING] == 0
    assert states[TrialState.COMPLETE] == len(waiting) + 1  # and the baseline
    assert states[TrialState.FAIL] == 24 - len(waiting), "a duplicate says nothing against its point"


def test_replay_tells_decided_candidates_of_all_arms_and_own_refusals_alone() -> None:
    story = begun()
    for name, arm, lr in [("r", "random", 0.01), ("a", "agent", 0.03), ("o", "optuna", 0.04)]:
        story.proposed(name, arm, settings={**SPACE["baseline"], "lr": lr}).scored(name, 1, lr)
        story.verdict(name, "discard")
    story.proposed("open", "optuna", settings={**SPACE["baseline"], "lr": 0.05}).scored("open", 1, 1.0)
    for arm, lr in [("optuna", 0.06), ("random", 0.07)]:
        story.tell("rejected", arm=arm, kind="constraint", detail="", overrides={"lr": lr})
    story.tell("rejected", arm="optuna", kind="malformed", detail="")
    made = proposer("optuna")
    replay(made, story.view())
    assert {t.params["lr"]: t.value for t in told(made)} == {
        0.02: 4.0,
        0.01: 0.01,
        0.03: 0.03,
        0.04: 0.04,
        0.06: None,
    }


def test_the_placebo_is_the_incumbent_in_disguise() -> None:
    better = {**SPACE["baseline"], "lr": 0.05}
    view = begun().proposed("k", settings=better).verdict("k", "keep").view()
    proposal = PlaceboProposer().ask(view, 0)
    assert isinstance(proposal, Proposal) and proposal.placebo and proposal.parent == "k"
    assert proposal.overrides == better and proposal.free


def test_listed_designs_are_handed_in_by_their_number() -> None:
    listed = [
        {"name": "wide", "settings": {"width": 10}, "why": "more"},
        {"name": "odd", "settings": {"fixed": 8}},
    ]
    story = begun({**SPACE, "candidates": listed})
    first = next_listed(story.view())
    assert (first.arm, first.name, first.overrides, first.hypothesis) == (
        LISTED_ARM,
        "wide",
        {"width": 10},
        "more",
    )
    story.tell("rejected", arm=LISTED_ARM, kind="config", detail="")
    assert next_listed(story.view()).name == "odd"
    assert next_listed(story.proposed("odd", LISTED_ARM).view()) is None


def test_a_sampler_is_told_of_points_of_its_space_alone() -> None:
    """Neither a design beside the space nor the source says what a point of the space is worth."""
    story, made = begun(), proposer("optuna")
    beside = {**SPACE["baseline"], "fixed": 8}
    inside = {**SPACE["baseline"], "lr": 0.05}
    for name, arm, chosen in (
        ("a", LISTED_ARM, beside),
        ("b", LISTED_ARM, inside),
        ("c", SOURCE_ARM, inside),
    ):
        story.proposed(name, arm, settings=chosen).scored(name, 1, 1.0)
        if arm == LISTED_ARM:
            story.verdict(name, "discard")
    replay(made, story.view())
    assert sorted((t.params["lr"], t.value) for t in told(made)) == [(0.02, 4.0), (0.05, 1.0)]


# ---- shares ----


def asked_over(shares: dict[str, float], count: int) -> list[Counter[str]]:
    view, history = StudyView(), []
    for _ in range(count):
        view.asked[arms_by_need(view, shares)[0]] += 1
        history.append(Counter(view.asked))
    return history


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=4).filter(any))
def test_realised_shares_stay_within_one_proposal_of_the_wanted(weights: list[int]) -> None:
    shares = {arm: weight / 10 for arm, weight in zip(ARMS, weights, strict=False)}
    total = sum(shares.values())
    for count, asked in enumerate(asked_over(shares, 200), 1):
        for arm, share in shares.items():
            assert abs(asked[arm] - count * share / total) <= 1 + 1e-9, (count, asked)
    assert set(arms_by_need(StudyView(), shares)) == {arm for arm, share in shares.items() if share > 0}


def test_an_arm_with_nothing_to_say_holds_up_no_other() -> None:
    view, shares = StudyView(), {"agent": 0.5, "random": 0.25, "optuna": 0.25}
    for _ in range(40):  # the agent never answers: the next in line is taken
        order = arms_by_need(view, shares)
        assert sorted(order) == sorted(shares)
        view.asked[next(arm for arm in order if arm != "agent")] += 1
    assert view.asked == {"random": 20, "optuna": 20}
    assert arms_by_need(view, shares)[0] == "agent"


def test_shares_are_read() -> None:
    assert parse_shares("optuna=0.6, random=1") == {"optuna": 0.6, "random": 1.0}
    assert parse_shares("random=0,optuna=2") == {"random": 0.0, "optuna": 2.0}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "ARM=SHARE"),
        (",", "ARM=SHARE"),
        ("optuna", "ARM=SHARE"),
        ("optuna=", "ARM=SHARE"),
        ("optuna=much", "ARM=SHARE"),
        ("optuna:0.5", "ARM=SHARE"),
        ("optuna=0.5 random=0.5", "ARM=SHARE"),
        ("optuna=0.5,", "ARM=SHARE"),
        ("=0.5", "choose from"),
        ("optima=0.5", "choose from"),
        ("Optuna=0.5", "choose from"),
        ("baseline=1", "choose from"),
        ("optuna=-0.1", "0 or more"),
        ("optuna=nan", "0 or more"),
        ("optuna=1e999", "0 or more"),
        ("optuna=0,random=0", "above 0"),
        ("optuna=0.5,optuna=0.6", "twice"),
    ],
)
def test_shares_that_say_nothing_are_refused(text: str, word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        parse_shares(text)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("--proposers")


def test_the_agent_without_a_key_or_money_is_off_by_file_and_refused_by_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    space = Space.model_validate({**SPACE, "proposers": {"random": 0.5, "agent": 0.5}})
    assert set(arm_shares(space, Budget(usd=5.0), None)) == {"random", PLACEBO_ARM}
    with pytest.raises(UserError, match="ANTHROPIC_API_KEY"):
        arm_shares(space, Budget(usd=5.0), {"agent": 1.0})
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-none")
    assert "agent" in arm_shares(space, Budget(usd=5.0), {"agent": 1.0})
    with pytest.raises(UserError, match="--usd"):
        arm_shares(space, Budget(usd=0.0), {"agent": 1.0})


@settings(deadline=None)
@given(st.floats(0.01, 0.99))
def test_placebos_have_their_share_of_all_proposals(share: float) -> None:
    space = Space.model_validate({**SPACE, "decision": {"placebo_share": share}})
    shares = arm_shares(space, Budget(), {"random": 0.3, "optuna": 1.2})
    assert shares[PLACEBO_ARM] / sum(shares.values()) == pytest.approx(share)


def test_without_a_placebo_share_there_are_none() -> None:
    space = Space.model_validate({**SPACE, "decision": {"placebo_share": 0.0}})
    assert set(arm_shares(space, Budget(), {"random": 1.0})) == {"random"}


def test_no_arm_left_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    space = Space.model_validate({**SPACE, "proposers": {"agent": 1.0}, "decision": {"placebo_share": 0.0}})
    with pytest.raises(UserError, match="no arm is left"):
        arm_shares(space, Budget(), None)


def test_optuna_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    night(begun(), proposer("optuna"), 10)
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR
    assert capfd.readouterr() == ("", "")
