"""What the ledger's events mean: states of trials and candidates, time, money and the control.

pytest tests/test_view.py
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from story import BASE, Story

from harness.records import (
    BASELINE_ARM,
    MAX_LOSSES,
    PLACEBO_ARM,
    FailureKind,
    Status,
    TrialState,
    seed_of,
    trial_id,
)
from harness.schedule import pending
from harness.view import StudyView

OTHER, PLACEBO, ALIEN = "other", "placebo-of-base", "placebo-of-other"


@pytest.fixture
def story() -> Story:
    return Story().begun()


# ---- trials ----


def test_a_trial_goes_from_running_to_complete(story: Story) -> None:
    trial = trial_id(BASE, 0, 1)
    running = story.started(BASE, 1).view().trials[trial]
    assert (running.state, running.over) == (TrialState.RUNNING, False)
    story.tell("judged", trial=trial, split="val", bpb=2.0)
    assert story.view().scores(BASE, 0, "val") == {}  # not while it runs
    view = story.finished(BASE, 1).view()
    assert (view.trials[trial].state, view.trials[trial].over) == (TrialState.COMPLETE, True)
    assert view.scores(BASE, 0, "val") == {1: 2.0}
    assert view.scores(BASE, 0, "audit") == view.scores(BASE, 1, "val") == {}


@pytest.mark.parametrize("kind", [k for k in FailureKind if k != FailureKind.LOST])
def test_a_failure_is_a_state_for_good_and_never_a_score(story: Story, kind: FailureKind) -> None:
    story.started(BASE, 1).tell("judged", trial=trial_id(BASE, 0, 1), split="val", bpb=9.0)
    view = story.finished(BASE, 1, kind.value).view()
    assert view.failures(BASE, 0)[0].failure == kind
    assert view.scores(BASE, 0, "val") == view.control(BASE, 0, "val") == {}
    assert view.seconds_at[0] == []


def test_a_driver_that_dies_leaves_trials_to_repeat_without_limit(story: Story) -> None:
    seed = seed_of(0, 0)
    for _ in range(5 * MAX_LOSSES):
        story.started(BASE, seed).opened()
        view = story.view()
        trial = view.trials[trial_id(BASE, 0, seed)]
        assert (trial.state, trial.failure) == (TrialState.FAIL, FailureKind.LOST)
        assert not trial.over and trial.losses == 0
        assert not view.failures(BASE, 0)
        assert trial.id in [w.trial for w in pending(view, False)]
    view = story.started(BASE, seed).finished(BASE, seed).view()
    assert view.trials[trial_id(BASE, 0, seed)].state == TrialState.COMPLETE
    assert view.num_started == 5 * MAX_LOSSES + 1


def test_a_resume_leaves_finished_trials_alone(story: Story) -> None:
    story.scored(BASE, 1, 2.0).started(BASE, 2).finished(BASE, 2, "oom").opened()
    view = story.view()
    assert view.scores(BASE, 0, "val") == {1: 2.0}
    assert view.trials[trial_id(BASE, 0, 2)].failure == FailureKind.OOM


def test_three_workers_lost_end_a_trial(story: Story) -> None:
    for n in range(MAX_LOSSES):
        assert not story.view().failures(BASE, 0)
        story.started(BASE, 1).finished(
            BASE, 1, "lost"
        ).opened()  # a resume in between does not reset the count
        assert story.view().trials[trial_id(BASE, 0, 1)].losses == n + 1
    assert MAX_LOSSES == 3
    assert story.view().failures(BASE, 0)[0].failure == FailureKind.LOST


def test_what_is_lost_is_pending_again_until_the_third_time(story: Story) -> None:
    seed = seed_of(0, 0)
    trial = trial_id(BASE, 0, seed)
    for _ in range(MAX_LOSSES):
        assert trial in [w.trial for w in pending(story.view(), False)]
        story.started(BASE, seed)
        assert trial not in [w.trial for w in pending(story.view(), False)]  # running
        story.finished(BASE, seed, "lost")
    assert trial not in [w.trial for w in pending(story.view(), False)]


def test_a_complete_trial_never_starts_again(story: Story) -> None:
    with pytest.raises(AssertionError, match="started twice"):
        story.scored(BASE, 1, 2.0).started(BASE, 1).view()


# ---- candidates ----


def test_verdicts_move_a_candidate_from_look_to_audit_to_incumbent(story: Story) -> None:
    view = story.proposed(OTHER).view()
    assert view.candidates[OTHER].status == Status.OPEN and set(view.open) == {OTHER}
    view = story.verdict(OTHER, "retest").view()
    assert view.candidates[OTHER].status == Status.OPEN and set(view.open) == {OTHER}
    view = story.verdict(OTHER, "retest", provisional=True).view()
    assert view.candidates[OTHER].status == Status.AUDIT and set(view.open) == {OTHER}
    assert view.incumbent == BASE and view.decisions_since_keep == 0
    view = story.verdict(OTHER, "keep").view()
    assert view.candidates[OTHER].status == Status.KEPT and not view.open
    assert (view.baseline, view.incumbent, view.decisions_since_keep) == (BASE, OTHER, 0)


@pytest.mark.parametrize(
    ("verdict", "status"), [("discard", Status.DISCARDED), ("no-effect", Status.NO_EFFECT)]
)
def test_a_candidate_that_is_not_kept_changes_no_incumbent(
    story: Story, verdict: str, status: Status
) -> None:
    view = story.proposed(OTHER).verdict(OTHER, verdict).view()
    assert view.candidates[OTHER].status == status and not view.open
    assert view.incumbents == [BASE] and view.decisions_since_keep == 1


def test_a_placebo_that_is_kept_is_a_false_keep_and_no_incumbent(story: Story) -> None:
    story.proposed(PLACEBO, PLACEBO_ARM, placebo=True)
    view = story.verdict(PLACEBO, "keep").view()
    assert view.candidates[PLACEBO].status == Status.KEPT
    assert view.incumbents == [BASE]


def test_every_ask_is_counted_the_refused_ones_too(story: Story) -> None:
    story.proposed(OTHER).tell("rejected", arm="random", kind="duplicate", detail="")
    story.tell("rejected", arm="agent", kind="malformed", detail="")
    assert dict(story.view().asked) == {BASELINE_ARM: 1, "random": 2, "agent": 1}


# ---- the control ----


def test_the_control_is_the_incumbent_with_its_own_placebos_alone(story: Story) -> None:
    story.proposed(OTHER)
    story.proposed(PLACEBO, PLACEBO_ARM, placebo=True, against=BASE)
    story.proposed(ALIEN, PLACEBO_ARM, placebo=True, against=OTHER)
    for candidate, seed, bpb in [(BASE, 1, 1.0), (PLACEBO, 2, 2.0), (ALIEN, 3, 3.0), (OTHER, 4, 4.0)]:
        story.scored(candidate, seed, bpb)
    story.scored(BASE, 5, 5.0, rung=1).scored(PLACEBO, 6, 6.0, split="audit")
    story.started(PLACEBO, 7).finished(PLACEBO, 7, "crash")
    view = story.view()
    assert view.control(BASE, 0, "val") == {1: 1.0, 2: 2.0}
    assert view.control(OTHER, 0, "val") == {4: 4.0, 3: 3.0}
    assert view.control(BASE, 1, "val") == {5: 5.0}
    assert view.control(BASE, 0, "audit") == {6: 6.0}
    assert view.control_trials(BASE, 0, [2, 1]) == [trial_id(BASE, 0, 1), trial_id(PLACEBO, 0, 2)]


def test_trials_come_in_the_order_of_their_seeds(story: Story) -> None:
    story.scored(BASE, 3, 1.0).scored(BASE, 1, 1.0).started(BASE, 2).finished(BASE, 2, "oom")
    assert story.view().trials_of(BASE, 0, [1, 2, 3]) == [trial_id(BASE, 0, 1), trial_id(BASE, 0, 3)]


def test_seeds_of_two_rungs_never_meet() -> None:
    assert not {seed_of(0, i) for i in range(10_000)} & {seed_of(1, i) for i in range(10_000)}


# ---- time and money ----


def test_time_counts_within_sessions_and_not_between_them() -> None:
    story = Story().begun()  # opened, 1 s later proposed
    story.started(BASE, 1).finished(BASE, 1).tell("stopped", after_seconds=10, reason="signal")
    assert story.view().elapsed_seconds() == 13
    story.tell("reviewed", after_seconds=5000, candidate=BASE, action="reject", why="", by="x")
    assert story.view().elapsed_seconds() == 13  # a person read the report in the morning
    story.opened(after_seconds=100_000)
    assert story.view().elapsed_seconds() == 13
    story.started(BASE, 2).finished(BASE, 2)  # and killed: no `stopped`
    assert story.view().elapsed_seconds() == 15
    story.opened(after_seconds=100_000).tell("stopped", after_seconds=4, reason="finished")
    assert story.view().elapsed_seconds() == 19


def test_gpu_seconds_count_what_ran_the_failed_trials_too(story: Story) -> None:
    rungs = [rung | {"gpus": 0.5} for rung in story.events[0]["space"]["rungs"]]
    story.events[0] = story.events[0] | {"space": story.events[0]["space"] | {"rungs": rungs}}
    for seed, failure in [(1, None), (2, "crash")]:
        story.started(BASE, seed).finished(BASE, seed, failure)
        story.events[-1] |= {"seconds": 8.0}
    view = story.view()
    assert view.gpu_seconds == 8.0
    story.started(BASE, 3).tell("spend", after_seconds=6, call="c", usd=0.0, phase="settled")
    story.opened(after_seconds=100_000)  # killed: the trial under way held its GPU until the last record
    assert story.view().gpu_seconds == 8.0 + 6 / 2
    assert view.seconds_at[0] == [8.0]  # a failure says nothing about how long a training takes


def test_a_settlement_takes_the_place_of_its_reservation(story: Story) -> None:
    assert story.view().spent_usd() == 0
    assert story.spend("a-1", 0.5, "reserved").view().spent_usd() == 0.5
    assert story.spend("a-2", 0.25, "reserved").view().spent_usd() == 0.75
    assert story.spend("a-1", 0.125, "settled").view().spent_usd() == 0.375
    assert story.spend("a-2", 0.0, "settled").view().spent_usd() == 0.125


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 64), st.integers(0, 64), st.booleans()), max_size=12
    )  # reserved and settled in 1/64 USD
)
def test_what_is_spent_is_the_settled_and_the_outstanding(calls: list[tuple[int, int, bool]]) -> None:
    story = Story().begun()
    for i, (reserved, _, _) in enumerate(calls):
        story.spend(f"c-{i}", reserved / 64, "reserved")
    for i, (_, settled, came_back) in enumerate(calls):
        if came_back:
            story.spend(f"c-{i}", settled / 64, "settled")
    assert story.view().spent_usd() == sum(s if back else r for r, s, back in calls) / 64


# ---- the fold ----


@settings(deadline=None)
@given(st.integers(0, 24))
def test_a_view_grown_event_by_event_is_the_view_built_at_once(cut: int) -> None:
    story = Story().begun().scored(BASE, 1, 2.0).scored(BASE, 2, 2.1).proposed(OTHER).scored(OTHER, 1, 1.0)
    story.verdict(OTHER, "retest", True).spend("a", 1.0, "reserved").opened(500).verdict(OTHER, "keep")
    story.proposed(ALIEN, PLACEBO_ARM, placebo=True, against=OTHER).started(ALIEN, 9)
    story.tell("promoted", candidate=OTHER, rung=1).tell("reviewed", candidate=OTHER, action="accept")
    view = StudyView(story.events[:cut])
    for event in story.events[cut:]:
        view.apply(event)
    whole = story.view()
    for name, value in vars(whole).items():
        assert getattr(view, name) == value, name
