"""What is said before a night (plan, doctor) and during it (status) is what is the case.

pytest tests/test_plan.py
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import BIGRAM_SPACE
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from story import BASE, Story

from harness import doctor
from harness.errors import UserError
from harness.ledger import Event
from harness.plan import CALIBRATION_TOKENS, RUNS_PER_DECISION, Plan, make_plan, random_settings
from harness.records import PLACEBO_ARM
from harness.space import parse_space
from harness.status import status_of

PAIRS = 257
Planner = Callable[..., Plan]


@pytest.fixture
def planned(workshop: Path) -> Planner:
    """The plan of the byte-pair space with some text in it replaced."""

    def call(*changes: tuple[str, str]) -> Plan:
        text = BIGRAM_SPACE
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        (workshop / "pairs.toml").write_text(text)
        return make_plan(workshop / "pairs.toml")

    return call


# ---- plan ----


def test_a_plan_counts_what_each_rung_takes(planned: Planner, workshop: Path) -> None:
    plan = planned()
    assert [(r.depth, r.tokens, r.seeds) for r in plan.rungs] == [(1, 20_000, 8), (2, 20_000, 3)]
    assert [r.params_total for r in plan.rungs] == [PAIRS**2, 2 * PAIRS**2]
    assert [r.flops_per_training for r in plan.rungs] == [PAIRS * 20_000, 2 * PAIRS * 20_000]
    first, second = (r.seconds_per_training for r in plan.rungs)
    assert second == pytest.approx(2 * first)
    assert first == pytest.approx(0.01 * 20_000 / CALIBRATION_TOKENS), "by the trainer's own clock"
    assert plan.allowed_share == 1
    assert plan.slots == os.cpu_count()
    assert plan.trainings_in_time == min(60, int(3600 * plan.slots / first))
    assert plan.decisions_in_time == int(max(0, plan.trainings_in_time - 8) / RUNS_PER_DECISION)
    assert json.loads(json.dumps(plan.as_dict(), allow_nan=False))["rungs"][1]["depth"] == 2
    for word in (
        "pairs: 2 rungs",
        "depth 1, 20,000 tokens, 66,049 parameters",
        "100% of 64",
        "1 h, 60 trainings",
    ):
        assert word in plan.text()
    assert not {p.name for p in workshop.iterdir()} & {"runs", "reports"}  # nothing is spent or left


def test_a_gpu_rung_is_not_timed_on_a_cpu(planned: Planner) -> None:
    plan = planned(("memory_mib = 600", "memory_mib = 600\ngpus = 1"))
    assert [r.seconds_per_training for r in plan.rungs] == [None, None]
    assert plan.trainings_in_time is plan.decisions_in_time is None
    assert "about – a training" in plan.text() and "in that time" not in plan.text()


DESIGNS = """
[source]
settings = { horizon = 2.5 }

[[candidates]]
name = "sharp"
settings = { sharpness = 1.0, horizon = 0.5 }

[[candidates]]
name = "twin"
settings = { sharpness = 0.7 }

[[candidates]]
name = "odd"
settings = { nonsense = 1 }

[budget]"""


def test_listed_designs_and_the_source_are_priced_by_what_they_train_on(planned: Planner) -> None:
    plan = planned(("[budget]", DESIGNS))
    rung = plan.rungs[0]
    assert [s.tokens for s in plan.sources] == [50_000, 50_000]
    assert [s.flops for s in plan.sources] == [PAIRS * 50_000, 2 * PAIRS * 50_000]
    assert plan.sources[0].seconds == pytest.approx(2.5 * rung.seconds_per_training)
    assert [(d.name, d.tokens, d.flops) for d in plan.designs] == [("sharp", 10_000, PAIRS * 10_000)]
    assert set(plan.refused) == {"twin", "odd"} and "the baseline" in plan.refused["twin"]
    assert plan.listed_trainings == 1 + 8 + 8  # source, control, the last look of the one design
    slots = plan.slots
    assert plan.listed_seconds == pytest.approx(rung.seconds_per_training * (2.5 + (8 + 8 * 0.5) / slots))
    assert json.loads(json.dumps(plan.as_dict(), allow_nan=False))["designs"][0]["name"] == "sharp"
    for word in ("listed designs: 1, 17 trainings", "sharp: ", "twin: refused: ", "nonsense"):
        assert word in plan.text()


def test_without_parameters_no_random_candidate_is_drawn(planned: Planner) -> None:
    text = BIGRAM_SPACE[BIGRAM_SPACE.index("[params.sharpness]") : BIGRAM_SPACE.index("[[rungs]]")]
    plan = planned((text, ""), ("[budget]", DESIGNS))
    assert plan.allowed_share is None and "random candidates" not in plan.text()
    assert plan.decisions_in_time == 1


def test_the_share_that_the_rules_allow_is_counted(planned: Planner) -> None:
    """sharpness is uniform on [0.2, 1.4]: the rule takes away two thirds of it."""
    plan = planned(("[budget]", '[[constraints]]\nexpr = "0.5 < sharpness < 0.9"\n[budget]'))
    assert 1 / 3 - 0.2 < plan.allowed_share < 1 / 3 + 0.2
    assert plan.allowed_share * 64 == int(plan.allowed_share * 64)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "[budget]",
            '[[constraints]]\nexpr = "sharpness == 0.7"\n[budget]',
            ["none of 4", "sharpness == 0.7"],
        ),
        ("[budget]", '[[constraints]]\nexpr = "depth < 2"\n[budget]', ["the baseline itself", "depth 2"]),
        ("[budget]", '[[constraints]]\nexpr = "deph < 2"\n[budget]', ["deph"]),
        ('behave = "well"', 'behave = "crash"', ["baseline fails", "crash", "mend"]),
        ('behave = "well"', 'behave = "diverge"', ["baseline fails", "diverged", "mend"]),
        ('behave = "well"', 'behave = "bad-metrics"', ["baseline fails"]),
        ('behave = "well"', 'behave = "sing"', ["bigram_trainer.py", "sing"]),
        ("bigram_trainer.py", "absent.py", ["absent.py"]),
        ("context = 64", 'context = 64\ncorpus = "/absent"', ["/absent", "prepare"]),
    ],
)
def test_a_night_that_cannot_be_is_refused(
    planned: Planner, monkeypatch: pytest.MonkeyPatch, old: str, new: str, words: list[str]
) -> None:
    monkeypatch.setattr("harness.plan.DRAWS", 4)
    with pytest.raises(UserError) as caught:
        planned((old, new))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_the_calibration_is_short() -> None:
    assert CALIBRATION_TOKENS <= 65_536


@st.composite
def spaces(draw: st.DrawFn) -> dict:
    param = draw(
        st.one_of(
            st.builds(
                lambda low, span, step: {"kind": "float", "low": low, "high": low + span * step, "step": step},
                st.floats(-10, 10), st.integers(0, 20), st.sampled_from([0.1, 0.2, 0.3, 0.7]),
            ),
            st.builds(
                lambda low, span: {"kind": "float", "low": low, "high": low * (1 + span), "log": True},
                st.floats(1e-6, 10), st.floats(0, 1e3),
            ),
            st.builds(
                lambda low, span, step: {"kind": "int", "low": low, "high": low + span, "step": step},
                st.integers(-50, 50), st.integers(0, 50), st.integers(1, 7),
            ),
            st.lists(st.text(), min_size=1, unique=True).map(lambda c: {"kind": "categorical", "choices": c}),
        )
    )  # fmt: skip
    start = param["choices"][0] if "choices" in param else param["low"]
    return {
        "name": "draws",
        "baseline": {"x": start},
        "params": {"x": param},
        "rungs": [{"depth": 1, "tokens": 1}],
    }


@settings(deadline=None)
@given(spaces(), st.integers(0, 100))
def test_what_is_drawn_lies_in_the_space(raw: dict, seed: int) -> None:
    space, rng = parse_space(raw, "here"), random.Random(seed)
    for _ in range(20):
        assert space.params["x"].holds(random_settings(space, rng)["x"])


def test_the_last_step_does_not_overshoot() -> None:
    param = {"kind": "float", "low": 0.1, "high": 0.7, "step": 0.2}  # 0.1 + 3 * 0.2 > 0.7 in binary
    raw = {"name": "draws", "baseline": {"x": 0.1}, "params": {"x": param}}
    space, rng = parse_space({**raw, "rungs": [{"depth": 1, "tokens": 1}]}, "here"), random.Random(0)
    assert max(random_settings(space, rng)["x"] for _ in range(50)) == 0.7


# ---- status ----

BUDGET = {"hours": 8.0, "usd": 5.0}


def kept(story: Story, *, folder: Path) -> Path:
    """The story as the ledger of the study `view`."""
    for event in story.events:
        if event["event"] == "opened":
            event["budget"] = BUDGET
    path = folder / "runs" / "view" / "ledger.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(e) + "\n" for e in story.events))
    return path


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_status_counts_trials_candidates_and_money(there: Path) -> None:
    story = Story().begun().scored(BASE, 1, 3.0).scored(BASE, 2, 4.0)
    story.proposed("good").scored("good", 1, 2.0).verdict("good", "retest", True).verdict("good", "keep")
    story.proposed("bad").started("bad", 1).finished("bad", 1, "oom").verdict("bad", "discard")
    story.proposed("ill").started("ill", 1).finished("ill", 1, "oom").verdict("ill", "discard")
    story.proposed("same").scored("same", 1, 3.0).verdict("same", "no-effect")
    story.proposed("new").started("new", 1)
    story.proposed("p", PLACEBO_ARM, placebo=True)
    story.tell("rejected", arm="random", kind="constraint", detail="")
    story.spend("a-1", 1.0, "reserved").spend("a-1", 0.25, "settled").spend("a-2", 0.5, "reserved")
    kept(story, folder=there)
    state = status_of("view").as_dict()
    assert state["trials"] == {"COMPLETE": 4, "FAIL": 2, "RUNNING": 1}
    assert state["failures"] == {"oom": 2}
    assert state["candidates"] == {"kept": 1, "discarded": 2, "no-effect": 1, "undecided": 1}
    assert (state["placebos"], state["rejected"]) == (1, 1)
    assert (state["baseline_bpb"], state["incumbent_bpb"], state["incumbent"]) == (3.5, 2.0, "good")
    assert (state["spent_usd"], state["budget_usd"]) == (0.75, 5.0)
    assert state["elapsed_hours"] == pytest.approx((story.seconds - 1) / 3600)
    for word in ("4 COMPLETE", "(2 oom)", "3.5000", "2.0000", "0.75 of 5 USD", "of 8 h"):
        assert word in status_of("view").text()


def test_a_missing_score_is_missing(there: Path) -> None:
    kept(Story().begun(), folder=there)
    state = status_of("view")
    assert state.baseline_bpb is None and state.incumbent_bpb is None
    assert "– val bpb" in state.text() and "none yet" in state.text()


@pytest.mark.parametrize(
    ("last", "state"),
    [(None, "interrupted: go on with --resume"), ({"reason": "signal"}, "stopped (signal)")],
)
def test_status_tells_running_from_stopped_from_killed(there: Path, last: Event | None, state: str) -> None:
    story = Story().begun()
    if last:
        story.tell("stopped", **last)
    path = kept(story, folder=there)
    assert status_of("view").state == state
    with FileLock(path.with_name("driver.lock")):
        assert status_of("view").state == "running"
    assert status_of("view").state == state
    if last:
        kept(story.opened(), folder=there)
        assert status_of("view").state == "interrupted: go on with --resume"


def test_the_budget_is_that_of_the_last_session(there: Path) -> None:
    path = kept(Story().begun().opened(), folder=there)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[-1]["budget"] = {"hours": 1.5, "usd": 0.0}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert status_of("view").budget_hours == 1.5


# ---- doctor ----


def test_a_sound_machine_passes_every_check(there: Path) -> None:
    checks = doctor.check_all()
    assert {c.name for c in checks} >= {
        "python",
        "torch",
        "device",
        "git",
        "disk",
        "corpus",
        "judge",
        "agent",
    }
    assert [c.line() for c in checks if not c.ok] == []
    assert all("\n" not in c.line() for c in checks)


def one_fault(check: doctor.Check, *words: str) -> None:
    assert not check.ok and check.line().startswith("FAIL")
    for word in words:
        assert word in check.line()


def test_what_is_missing_is_named_with_a_remedy(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_fault(doctor._package("no-such-package"), "missing", "pip install", "no-such-package")
    monkeypatch.setenv("PATH", str(there))
    one_fault(doctor._git(), "missing", "install git")
    free = shutil.disk_usage(there).free / 2**30
    monkeypatch.setattr(doctor, "FREE_GIB", free + 1000)
    one_fault(doctor._disk(), "make room", str(there))
    monkeypatch.setenv("MOUE_CACHE", str(there / "empty"))
    assert "prepare" in doctor._corpus().line() and doctor._corpus().ok
    folder = there / "empty" / "corpora" / "embedded"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{half")
    one_fault(doctor._corpus(), "manifest.json")
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert doctor._key().ok and "ANTHROPIC_API_KEY" in doctor._key().line()
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    assert doctor._key().ok and "sk-secret" not in doctor._key().line()
