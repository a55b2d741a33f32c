"""Whole searches, one after the other in this process, on the byte-pair trainer and real prose.

pytest tests/test_search.py
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from messages_server import MessagesServer, Search, message, proposal

from harness.cli import cli
from harness.errors import UserError
from harness.night import Options, run_search
from harness.records import Status, TrialState
from harness.report import audit, write_report
from harness.study import load_study
from harness.view import StudyView

INLINE = {"dispatch": "inline"}
COMMAND = [sys.executable, "-m", "harness", "search", "pairs.toml", "--dispatch", "inline"]


def search(workshop: Path, replace: dict[str, str] | None = None, **options: object) -> StudyView:
    path = workshop / "pairs.toml"
    text = path.read_text()
    for old, new in (replace or {}).items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    run_search(path, Options(**{**INLINE, **options}))
    return load_study(options.get("study") or "pairs")[2]


def events(study: str = "pairs") -> list[dict]:
    return [json.loads(line) for line in Path(f"runs/{study}/ledger.jsonl").read_text().splitlines()]


def completed(study: str = "pairs") -> Counter[str]:
    return Counter(e["trial"] for e in events(study) if e["event"] == "finished" and e["state"] == "COMPLETE")


def test_a_night_measures_keeps_audits_and_promotes(workshop: Path) -> None:
    view = search(workshop, trials=45)
    kept = [c for c in view.candidates.values() if c.status == Status.KEPT and c.id != view.baseline]
    assert kept, "half of this space is better than the baseline"
    for candidate in kept:
        last = candidate.last
        assert last["stage"] == last["split"] == "audit" and last["n"] == 6 and last["z"] >= 1.28
        looked = {t for v in candidate.verdicts if v["stage"] == "look" for t in v["trials"]}
        assert not looked & set(last["trials"]), "the audit's seeds are fresh"
    order = [e["event"] for e in events()]
    assert order[:2] == ["opened", "proposed"] and order[-1] == "stopped"
    started = [e for e in events() if e["event"] == "started"]
    assert [e["purpose"] for e in started[:8]] == ["control"] * 8
    first = next(i for i, e in enumerate(events()) if e["event"] == "proposed" and e["arm"] != "baseline")
    assert sum(e["event"] == "finished" for e in events()[:first]) == 8, (
        "control runs come before any proposal"
    )
    promoted = view.promoted[0]
    assert promoted["n"] == 3 and promoted["low"] <= promoted["delta"] <= promoted["high"]
    assert len(started) <= 45
    settings = [view.candidates[c].settings["sharpness"] for c in view.incumbents]
    assert abs(settings[-1] - 1) < abs(settings[0] - 1), "towards the maximum-likelihood table"


def test_the_baseline_in_disguise_is_never_kept(workshop: Path) -> None:
    view = search(workshop, proposers={"placebo": 1.0}, trials=70, study="disguise")
    placebos = [c for c in view.candidates.values() if c.placebo]
    decided = [c for c in placebos if c.status != Status.OPEN]
    assert len(decided) >= 30
    assert not [c for c in placebos if c.status == Status.KEPT]
    assert view.incumbent == view.baseline
    seeds = Counter(t.seed for t in view.trials.values())
    assert max(seeds.values()) == 1, "each disguise runs on seeds of its own"


def test_a_placebo_is_not_measured_against_itself(workshop: Path) -> None:
    view = search(workshop, proposers={"placebo": 1.0}, trials=40)
    looks = [v for c in view.candidates.values() if c.placebo for v in c.verdicts]
    assert any(v["n"] > 1 for v in looks)
    for verdict in looks:
        assert not set(verdict["trials"]) & set(verdict["control"])


def test_a_setting_without_effect_is_told_as_such(workshop: Path) -> None:
    sharpness = '[params.sharpness]\nkind = "float"\nlow = 0.2\nhigh = 1.4'
    label = '[params.label]\nkind = "int"\nlow = 0\nhigh = 40'
    smoothing = '[params.smoothing]\nkind = "float"\nlow = 0.1\nhigh = 10.0\nlog = true'
    view = search(workshop, {sharpness: label, smoothing: ""}, trials=30)
    others = [c for c in view.candidates.values() if c.id != view.baseline and not c.placebo]
    assert len(others) >= 15
    assert {c.status for c in others} <= {Status.NO_EFFECT, Status.OPEN}
    assert sum(c.status == Status.NO_EFFECT for c in others) >= 14


def test_failures_are_states_and_the_search_goes_on(workshop: Path) -> None:
    behave = '[params.smoothing]\nkind = "float"\nlow = 0.1\nhigh = 10.0\nlog = true'
    kinds = (
        '["well", "crash", "garbage", "diverge", "collapse", "nan-logits", "no-checkpoint", "bad-metrics"]'
    )
    view = search(
        workshop, {behave: f'[params.behave]\nkind = "categorical"\nchoices = {kinds}'}, trials=60,
        proposers={"random": 1.0},
    )  # fmt: skip
    failures = Counter(t.failure.value for t in view.trials.values() if t.state == TrialState.FAIL)
    assert {"crash", "diverged", "collapsed"} <= failures.keys(), failures
    for trial in view.trials.values():
        if trial.state == TrialState.FAIL:
            assert not trial.scores and trial.detail
            assert view.candidates[trial.candidate].status == Status.DISCARDED
    assert any(t.state == TrialState.COMPLETE and t.purpose == "look" for t in view.trials.values())
    for line in Path("runs/pairs/ledger.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the ledger"))


def test_a_cheat_is_caught_before_it_is_kept(workshop: Path) -> None:
    """A model that is told the next token looks wonderful on one seed; the audit's probes see why."""
    old = '[params.smoothing]\nkind = "float"\nlow = 0.1\nhigh = 10.0\nlog = true'
    new = '[params.behave]\nkind = "categorical"\nchoices = ["well", "peek"]'
    view = search(workshop, {old: new}, trials=30)
    caught = [t for t in view.trials.values() if t.failure == "cheat"]
    assert caught and all(view.candidates[t.candidate].settings["behave"] == "peek" for t in caught)
    assert all(view.candidates[c].settings["behave"] == "well" for c in view.incumbents)


def test_a_baseline_that_fails_is_one_clean_line(workshop: Path) -> None:
    with pytest.raises(UserError, match=r"baseline fails at depth 1: diverged.*mend \[baseline\]"):
        search(workshop, {'behave = "well"': 'behave = "diverge"'})
    assert events()[-1]["event"] == "stopped" and events()[-1]["reason"] == "error"


def test_a_control_run_that_fails_does_not_stall_the_night(workshop: Path) -> None:
    """The incumbent diverges on one seed of the list: another seed takes its place."""
    trainer = (workshop / "bigram_trainer.py").read_text()
    trainer = trainer.replace(
        '    behave = config["behave"]\n    if behave == "crash":',
        '    behave = config["behave"]\n    if config["seed"] == 10_007 and config["sharpness"] != 0.7:\n'
        '        behave = "diverge"\n    if behave == "crash":',
    )
    (workshop / "bigram_trainer.py").write_text(trainer)
    view = search(workshop, trials=60)
    assert len(view.incumbents) > 1
    failed = [t for t in view.trials.values() if t.state == TrialState.FAIL]
    assert failed and all(t.seed == 10_007 for t in failed)
    last = view.sessions[-1]
    assert last["reason"] == "budget-trials", last


def test_a_later_control_run_of_the_baseline_may_fail(workshop: Path) -> None:
    """One run that diverges at three in the morning is a fact about a seed, not the end of the study."""
    trainer = (workshop / "bigram_trainer.py").read_text()
    planted = (
        '    if config["seed"] in (10_003, 10_008):\n        behave = "diverge"\n    if behave == "crash":'
    )
    (workshop / "bigram_trainer.py").write_text(trainer.replace('    if behave == "crash":', planted, 1))
    view = search(workshop, {"low = 0.2\nhigh = 1.4": "low = 0.2\nhigh = 0.7"}, trials=40)
    assert view.sessions[-1]["reason"] == "budget-trials"
    assert len(view.failures(view.baseline, 0)) == 2
    assert not any(t.state == TrialState.FAIL for t in view.trials.values() if t.purpose == "look"), (
        "a candidate does not run on a seed where the incumbent failed"
    )


def test_a_checkpoint_that_cannot_be_read_again_is_trained_anew(workshop: Path) -> None:
    search(workshop, trials=8)
    for path in Path("runs/pairs/trials").glob("*/checkpoint.pt"):
        path.write_bytes(b"torn")
    view = search(workshop, trials=25, resume=True)
    assert view.sessions[-1]["reason"] == "budget-trials", view.sessions[-1]
    assert any(v["stage"] == "audit" for c in view.candidates.values() for v in c.verdicts)


def test_every_rung_is_reached_and_a_later_keep_climbs_too(workshop: Path) -> None:
    third = "\n[[rungs]]\ndepth = 3\ntokens = 20_000\nseeds = 3\ntimeout_seconds = 20\nmemory_mib = 600\n"
    for name, sharpness in (("good", 0.85), ("better", 1.0)):
        third += f'[[candidates]]\nname = "{name}"\nsettings = {{ sharpness = {sharpness} }}\n'
    with (workshop / "pairs.toml").open("a") as file:
        file.write(third)
    view = search(workshop, trials=33)  # 21 until the first is kept, 12 for it and the baseline to climb
    assert {e["rung"] for e in view.promoted} == {1, 2}
    assert all(e["split"] == "audit" for e in view.promoted)
    before = {e["candidate"] for e in view.promoted}
    view = search(workshop, trials=80, resume=True)
    later = {e["candidate"] for e in view.promoted} - before
    assert later and later <= set(view.incumbents), "a keep of the second session climbs too"
    assert not list(Path("runs/pairs/trials").glob("*-r1-*/checkpoint.pt")), "nothing reads these again"


def test_a_rule_without_a_value_somewhere_refuses_that_point_alone(workshop: Path) -> None:
    text = (workshop / "pairs.toml").read_text()
    rule = '\n[[constraints]]\nexpr = "1 / (smoothing > 5) > 0 or smoothing < 5"\n'
    (workshop / "pairs.toml").write_text(
        text.replace("[[rungs]]", rule + "\n[[rungs]]", 1).replace("smoothing = 1.0", "smoothing = 6.0")
    )
    view = search(workshop, trials=20)
    assert view.sessions[-1]["reason"] == "budget-trials"
    assert any("zero" in e["detail"] for e in view.rejected)


def test_with_nobody_left_to_propose_the_night_ends(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:9")
    text = (workshop / "pairs.toml").read_text()
    (workshop / "pairs.toml").write_text(text + "\n[decision]\nplacebo_share = 0.0\n")
    view = search(workshop, proposers={"agent": 1.0}, usd=0.0001)
    assert view.sessions[-1]["reason"] == "proposers-exhausted"
    view = search(workshop, proposers={"agent": 1.0}, usd=5.0, hours=12 / 3600, study="silent")
    assert view.sessions[-1]["reason"] == "budget-hours"
    assert not any(c.placebo for c in view.candidates.values()), (
        "a slot that waits is not filled with placebos"
    )


def test_a_trial_that_outlasts_the_night_is_no_ones_fault(workshop: Path) -> None:
    from harness import search as driver

    driver.GRACE_SECONDS, grace = 0.0, driver.GRACE_SECONDS
    try:
        view = search(workshop, {'behave = "well"': 'behave = "hang"'}, hours=4 / 3600)
    finally:
        driver.GRACE_SECONDS = grace
    assert view.sessions[-1]["reason"] == "budget-hours"
    assert [t.failure for t in view.trials.values()] == ["lost"]
    assert view.elapsed_seconds() < 15


def test_a_changed_trainer_is_another_study(workshop: Path) -> None:
    search(workshop, trials=9)
    with (workshop / "bigram_trainer.py").open("a") as file:
        file.write("\n# changed\n")
    with pytest.raises(UserError, match=r"trainer's sha256 .* --study NEW"):
        search(workshop, trials=12, resume=True)


def test_budgets_end_the_night(workshop: Path) -> None:
    view = search(workshop, trials=11, study="few")
    assert view.num_started == 11 and view.sessions[-1]["reason"] == "budget-trials"
    started = time.monotonic()
    view = search(workshop, hours=6 / 3600, study="short")
    assert view.sessions[-1]["reason"] == "budget-hours"
    assert time.monotonic() - started < 60 and view.elapsed_seconds() < 12


def test_an_exhausted_space_ends_the_night(workshop: Path) -> None:
    old = '[params.sharpness]\nkind = "float"\nlow = 0.2\nhigh = 1.4'
    new = '[params.sharpness]\nkind = "categorical"\nchoices = [0.5, 0.7, 0.6]'
    smoothing = '[params.smoothing]\nkind = "float"\nlow = 0.1\nhigh = 10.0\nlog = true'
    view = search(workshop, {old: new, smoothing: ""}, proposers={"random": 1.0})
    assert view.sessions[-1]["reason"] == "space-exhausted"
    assert {c.settings["sharpness"] for c in view.candidates.values()} == {0.5, 0.7, 0.6}
    assert {e["kind"] for e in view.rejected} == {"duplicate"}


def test_rules_are_checked_at_every_depth(workshop: Path) -> None:
    text = (workshop / "pairs.toml").read_text()
    rule = '\n[[constraints]]\nexpr = "sharpness * depth < 2"\nwhy = "a rule that bites at depth 2 alone"\n'
    (workshop / "pairs.toml").write_text(text.replace("[[rungs]]", rule + "\n[[rungs]]", 1))
    view = search(workshop, trials=25)
    assert any("at depth 2" in e["detail"] and "bites" in e["detail"] for e in view.rejected)
    assert all(c.settings["sharpness"] < 1 for c in view.candidates.values())


def test_a_person_who_must_agree_is_waited_for(workshop: Path) -> None:
    gate = {"depth = 2\ntokens = 20_000": "depth = 2\nreview = true\ntokens = 20_000"}
    view = search(workshop, gate, trials=40)
    assert len(view.incumbents) > 1 and not view.promoted
    _, ledger, _ = load_study("pairs")
    ledger.append(
        {"event": "reviewed", "candidate": view.incumbent, "action": "accept", "why": "", "by": "me"}
    )
    view = search(workshop, trials=60, resume=True)
    assert [e["candidate"] for e in view.promoted] == [e["candidate"] for e in view.promoted[:1]] != []


def test_killed_at_random_moments_it_ends_with_the_same_trials(workshop: Path) -> None:
    old = '[params.sharpness]\nkind = "float"\nlow = 0.2\nhigh = 1.4'
    new = '[params.sharpness]\nkind = "categorical"\nchoices = [0.4, 0.6, 0.7, 0.8, 1.2]'
    smoothing = '[params.smoothing]\nkind = "float"\nlow = 0.1\nhigh = 10.0\nlog = true'
    text = (workshop / "pairs.toml").read_text().replace(old, new).replace(smoothing, "")
    (workshop / "pairs.toml").write_text(text + "\n[decision]\nplacebo_share = 0.0\n")
    subprocess.run([*COMMAND, "--study", "whole"], check=True, capture_output=True, timeout=200)
    rng = random.Random(0)
    resumed = []
    for _ in range(40):
        process = subprocess.Popen([*COMMAND, *resumed], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        target = _finished() + rng.randint(2, 7)
        while process.poll() is None and _finished() < target:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.3)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        resumed = ["--resume"]
    else:
        raise AssertionError("never came to an end")
    assert process.returncode == 0
    assert set(completed().values()) == {1}, "a finished trial was run again"
    assert completed() == completed("whole")
    assert len(load_study("pairs")[2].incumbents) > 1
    assert sum(e["event"] == "opened" for e in events()) >= 4
    scores = {e["trial"]: e["bpb"] for e in events("whole") if e["event"] == "judged" and e["split"] == "val"}
    for e in events():
        if e["event"] == "judged" and e["split"] == "val":
            assert e["bpb"] == scores[e["trial"]], "a repeated trial gives the same score"


def _finished() -> int:
    try:
        return Path("runs/pairs/ledger.jsonl").read_text().count('"finished"')
    except FileNotFoundError:
        return 0


def test_a_signal_ends_it_with_everything_saved(workshop: Path) -> None:
    process = subprocess.Popen(COMMAND, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while _finished() < 5 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "SIGTERM" in complaint.splitlines()[-1] and "Traceback" not in complaint
    assert events()[-1] | {"t": 0} == {
        "v": 1, "t": 0, "event": "stopped", "reason": "signal", "detail": events()[-1]["detail"],
    }  # fmt: skip
    assert not [p for p in Path("/proc").glob("[0-9]*") if _runs_in(p, os.getcwd())]


def _runs_in(process: Path, folder: str) -> bool:
    try:
        return os.readlink(process / "cwd").startswith(folder) and int(process.name) != os.getpid()
    except (OSError, ValueError):
        return False


def test_a_night_with_the_agent_over_http(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its proposals run with hypothesis and cost in the ledger; faulty replies are refused, the night goes on."""
    faulty = [message("Raise the sharpness, I say."), proposal({"sharpness": 99.0}), proposal({"depth": 9})]
    with MessagesServer(faulty, default=Search(seed=1, bad_every=5)) as server:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
        monkeypatch.setenv("ANTHROPIC_API_KEY", "a-key-that-must-not-be-written")
        view = search(workshop, proposers={"agent": 1.0}, usd=5.0, trials=45)
    mine = [c for c in view.candidates.values() if c.arm == "agent"]
    assert len(mine) >= 5
    calls = {e["call"] for e in view.spends if e["phase"] == "settled" and e["usd"] > 0}
    for candidate in mine:
        assert "try another value" in candidate.proposed["hypothesis"]
        assert candidate.proposed["call"] in calls
        assert all(view.space.params[k].holds(candidate.settings[k]) for k in view.space.params)
    ran = {t.candidate for t in view.trials.values() if t.state == TrialState.COMPLETE}
    assert ran & {c.id for c in mine}
    assert {"malformed", "out_of_range", "unknown_key"} <= {e["kind"] for e in view.rejected}
    assert 0 < view.spent_usd() <= 5.0
    assert view.sessions[-1]["reason"] == "budget-trials"
    write_report(view, Path("reports/pairs"))
    assert audit(view, Path("reports/pairs")) == []
    for path in [*Path("runs").rglob("*"), *Path("reports").rglob("*")]:
        if path.is_file() and "repo.git" not in path.parts:
            assert b"must-not-be-written" not in path.read_bytes(), path


def test_one_digit_changed_in_the_report_fails_the_audit(workshop: Path) -> None:
    search(workshop, trials=12)
    verify = CliRunner().invoke
    assert verify(cli, ["report", "pairs"]).exit_code == 0
    assert verify(cli, ["audit", "pairs"]).exit_code == 0
    path = Path("reports/pairs/report.md")
    text = path.read_text()
    digit = text.index(".", text.index("val ")) + 3
    changed = str((int(text[digit]) + 1) % 10)
    path.write_text(text[:digit] + changed + text[digit + 1 :])
    done = verify(cli, ["audit", "pairs"])
    assert done.exit_code == 1 and "report.md:" in done.output
