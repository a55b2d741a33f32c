"""Designs that a file lists, measured against a baseline that stays, and the run that all others go on from.

pytest tests/test_comparison.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import story
from conftest import BIGRAM
from scipy import stats as textbook
from story import BASE, Story

from harness.errors import UserError
from harness.ledger import Ledger
from harness.night import Options, run_search
from harness.promote import entrants, expected_runs
from harness.purse import Purse
from harness.records import LISTED_ARM, SOURCE_ARM, Status, TrialState, seed_of, trial_id
from harness.report import audit, build, comparison, write_report
from harness.report.document import Number, walk
from harness.schedule import is_done_with, pending
from harness.space import Budget, Space
from harness.study import load_study
from harness.view import StudyView

SPACE = """
name = "designs"
trainer = "bigram_trainer.py"

[metric]
context = 64
eval_bytes = 8192

[baseline]
sharpness = 0.7
behave = "well"

[source]
settings = { horizon = 4.0, sharpness = 0.5 }

[[candidates]]
name = "sharp"
settings = { sharpness = 1.0 }
why = "the maximum-likelihood table"

[[candidates]]
name = "between"
settings = { sharpness = 0.85, label = 3 }

[[candidates]]
name = "smooth"
settings = { smoothing = 5.0 }

[[candidates]]
name = "broken"
settings = { behave = "crash" }

[[candidates]]
name = "same"
settings = { sharpness = 0.7 }

[[candidates]]
name = "unknown"
settings = { nonsense = 1 }

[[rungs]]
depth = 1
tokens = 20_000
seeds = 3
promote = 2
timeout_seconds = 20
memory_mib = 600

[[rungs]]
depth = 2
tokens = 20_000
seeds = 2
timeout_seconds = 20
memory_mib = 600

[decision]
against = "baseline"
looks = [3]
drop = [2.0]
keep = [2.0]
audit_seeds = 2

[budget]
hours = 0.5
"""
FIRST = SPACE.index("[[candidates]]"), SPACE.index("[[rungs]]")  # where the designs stand
SOURCE = SPACE[SPACE.index("[source]") : FIRST[0]]
RUNG = SPACE[SPACE.rindex("[[rungs]]") : SPACE.index("[decision]")]  # the second one
COMMAND = [sys.executable, "-m", "harness", "search", "designs.toml", "--dispatch", "inline"]


def with_designs(text: str, designs: dict[str, dict]) -> str:
    """The space file with other designs."""
    listed = ""
    for name, settings in designs.items():
        pairs = ", ".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
        listed += f'[[candidates]]\nname = "{name}"\nsettings = {{ {pairs} }}\n\n'
    return text[: text.index("[[candidates]]")] + listed + text[text.index("[[rungs]]") :]


def finished(folder: Path) -> int:
    try:
        return (folder / "runs/designs/ledger.jsonl").read_text().count('"finished"')
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyView, str]:
    """A whole comparison, killed amid the looks of its first design: folder, view, last words."""
    folder = tmp_path_factory.mktemp("designs")
    shutil.copy(BIGRAM, folder)
    (folder / "designs.toml").write_text(SPACE)
    process = subprocess.Popen(COMMAND, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while finished(folder) < 5 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run([*COMMAND, "--resume"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder, StudyView(Ledger(folder / "runs/designs/ledger.jsonl").poll()), done.stdout


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs/designs/ledger.jsonl").read_text().splitlines()]


def named(view: StudyView) -> dict[str, str]:
    return {c.name: c.id for c in view.candidates.values() if c.arm == LISTED_ARM}


def search(workshop: Path, text: str, **options: object) -> StudyView:
    (workshop / "designs.toml").write_text(text)
    run_search(workshop / "designs.toml", Options(dispatch="inline", **options))
    return load_study(options.get("study") or "designs")[2]


# ---- the list ----


def test_each_design_is_handed_in_once_in_order_and_then_the_night_ends(night: tuple) -> None:
    folder, view, said = night
    asked = [e for e in events(folder) if e["event"] in ("proposed", "rejected") and e["arm"] == LISTED_ARM]
    assert [e["name"] for e in asked] == ["sharp", "between", "smooth", "broken", "same", "unknown"]
    assert [e.get("kind") for e in asked] == [None] * 4 + ["duplicate", "config"]
    assert asked[0]["hypothesis"] == "the maximum-likelihood table"
    assert asked[1]["changed"] == {"sharpness": [0.7, 0.85], "label": [None, 3]}
    assert {c.arm for c in view.candidates.values()} == {"baseline", SOURCE_ARM, LISTED_ARM}
    assert view.sessions[-1]["reason"] == "exhausted" and "designs stopped: exhausted" in said
    for name in ("sharp", "between", "smooth"):
        assert view.candidates[named(view)[name]].verdicts[0]["n"] == 3
    assert view.failures(named(view)["broken"], 0)[0].failure == "crash"
    assert not view.open


def test_no_finished_training_of_a_killed_night_is_run_again(night: tuple) -> None:
    folder, _, _ = night
    done = Counter(
        e["trial"] for e in events(folder) if e["event"] == "finished" and e["state"] == "COMPLETE"
    )
    assert set(done.values()) == {1}
    assert sum(e["event"] == "opened" for e in events(folder)) == 2
    assert sum(e["event"] == "proposed" and e["arm"] == SOURCE_ARM for e in events(folder)) == 1


def test_the_baseline_stays_what_all_are_measured_against(night: tuple) -> None:
    _, view, _ = night
    ids = named(view)
    assert view.incumbent == view.baseline and view.incumbents[1:] == [ids["sharp"], ids["between"]]
    assert {v["against"] for c in view.candidates.values() for v in c.verdicts} == {view.baseline}
    assert {e["candidate"] for e in view.promoted} == {ids["sharp"], ids["between"]}, "both keeps climb"


def test_against_the_incumbent_a_lesser_design_is_not_kept_after_a_better_one(workshop: Path) -> None:
    text = (
        SPACE.replace('against = "baseline"', 'against = "incumbent"').replace(RUNG, "").replace(SOURCE, "")
    )
    view = search(workshop, with_designs(text, {"sharp": {"sharpness": 1.0}, "between": {"sharpness": 0.85}}))
    ids = named(view)
    assert view.incumbents == [view.baseline, ids["sharp"]] and view.incumbent == ids["sharp"]
    assert view.candidates[ids["between"]].status == Status.DISCARDED


def test_a_fixed_standard_is_controlled_by_all_decisions() -> None:
    """A keep that does not become the incumbent leaves the count that asks for more control runs."""
    space = {**Story().space, "decision": {"against": "baseline"}}
    story = Story(space).begun().proposed("a").verdict("a", "discard").proposed("b").verdict("b", "keep")
    view = story.view()
    assert (view.incumbents, view.incumbent, view.decisions_since_keep) == ([BASE, "b"], BASE, 2)


def test_the_best_keep_climbs_once_all_are_decided_when_each_stands_alone() -> None:
    for against, climbs in (("baseline", ["best"]), ("incumbent", ["least"])):
        space = {**story.SPACE, "decision": {"against": against}}
        told = story.Story(space).begun()
        for name in ("middle", "best", "least", "open"):
            told.proposed(name)
        for name, delta in (("middle", 0.2), ("best", 0.3), ("least", 0.1)):
            told.tell(
                "verdict", candidate=name, verdict="keep", provisional=False, n=6, delta=delta, stage="audit"
            )
        if against == "baseline":
            assert entrants(told.view(), 1) == [], "one is still open"
        told.tell(
            "verdict", candidate="open", verdict="discard", provisional=False, n=1, delta=-1.0, stage="look"
        )
        assert entrants(told.view(), 1) == climbs


def test_designs_come_before_what_the_arms_propose_and_samplers_hear_of_points_alone(workshop: Path) -> None:
    """A kept design with settings that no parameter names: its placebos are it, the samplers go on beside it."""
    text = SPACE.replace(RUNG, "").replace(SOURCE, "").replace('against = "baseline"', "placebo_share = 0.3")
    text += '[proposers]\noptuna = 1.0\n[params.sharpness]\nkind = "float"\nlow = 0.2\nhigh = 1.4\n'
    designs = {"sharp": {"sharpness": 0.9}, "better": {"sharpness": 0.95, "smoothing": 0.5}}
    view = search(workshop, with_designs(text, designs), trials=45)
    arms = [c.arm for c in view.candidates.values()]
    assert arms[:3] == ["baseline", LISTED_ARM, LISTED_ARM] and LISTED_ARM not in arms[3:]
    assert "optuna" in arms and view.sessions[-1]["reason"] == "budget-trials"
    better = named(view)["better"]
    assert better in view.incumbents
    placebos = [c for c in view.candidates.values() if c.placebo and c.against == better]
    assert placebos and all(c.settings == view.candidates[better].settings for c in placebos)
    write_report(view, Path("report"))
    assert audit(view, Path("report")) == []
    winner = tomllib.loads(Path(f"report/winners/{better}.toml").read_text())
    assert winner["baseline"]["smoothing"] == 0.5
    assert Space.model_validate({**view.space.model_dump(mode="json"), **winner})


def test_without_parameters_there_is_nothing_to_ask_an_arm_for(workshop: Path) -> None:
    with pytest.raises(UserError, match=r"--proposers.*no \[params\]"):
        search(workshop, SPACE, proposers={"random": 1.0})


# ---- the source ----


def test_the_source_is_trained_once_a_rung_before_all_else(night: tuple) -> None:
    folder, view, _ = night
    mine = [t for t in view.trials.values() if t.candidate == view.source]
    assert [(t.rung, t.seed, t.purpose) for t in mine] == [(r, seed_of(r, 0), "source") for r in (0, 1)]
    assert all(t.state == TrialState.COMPLETE and set(t.scores) == {"val", "audit"} for t in mine)
    assert view.candidates[view.source].status == Status.SOURCE
    assert [f["tokens"] for f in view.candidates[view.source].proposed["facts_by_rung"]] == [80_000, 80_000]
    order = [e for e in events(folder) if e["event"] in ("started", "finished")]
    for rung in (0, 1):
        here = [e["trial"] for e in order if f"-r{rung}-" in e["trial"]]
        last = max(i for i, t in enumerate(here) if t == view.source_trial(rung))
        assert set(here[: last + 1]) == {view.source_trial(rung)}


def test_every_other_run_of_a_rung_goes_on_from_it(night: tuple) -> None:
    folder, view, _ = night
    for trial in view.trials.values():
        told = (folder / "runs/designs/trials" / trial.id / "log.txt").read_text()
        source = folder / "runs/designs/trials" / view.source_trial(trial.rung) / "checkpoint.pt"
        assert source.exists(), "its weights are kept while the study lives"
        ran = trial.failure != "crash" and trial.candidate != view.source
        assert (f"going on from {source.resolve()}\n" in told) == ran, trial.id
    kept = {p.parent.name for p in (folder / "runs/designs/trials").glob("*/checkpoint.pt")}
    assert all(view.trials[t].candidate in (view.source, view.baseline) for t in kept)
    assert is_done_with(view, next(t for t in view.trials if t not in kept))


def test_what_a_run_goes_on_from_is_part_of_what_it_is(night: tuple, workshop: Path) -> None:
    """The same settings from nothing are another candidate."""
    _, view, _ = night
    alone = search(workshop, SPACE.replace(SOURCE, ""), trials=1)
    assert alone.baseline != view.baseline and view.opened["source"] == view.source


def test_work_waits_for_its_rungs_source() -> None:
    story = Story().begun().proposed("src", SOURCE_ARM, parent=None, against=None)
    first = [(w.candidate, w.purpose, w.splits) for w in pending(story.view(), False)]
    assert first == [("src", "source", ("val", "audit"))]
    seed = seed_of(0, 0)
    assert list(pending(story.started("src", seed).view(), False)) == []
    story.finished("src", seed, "lost")
    assert [w.purpose for w in pending(story.view(), False)] == ["source"]
    assert {w.purpose for w in pending(story.started("src", seed).finished("src", seed).view(), False)} == {
        "control"
    }


def test_a_source_that_fails_ends_the_night_in_one_line(workshop: Path) -> None:
    text = SPACE.replace("horizon = 4.0, sharpness = 0.5", 'behave = "diverge"')
    (workshop / "designs.toml").write_text(text)
    for more in ([], ["--resume"]):
        done = subprocess.run([*COMMAND, *more], capture_output=True, text=True, timeout=60)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert last.startswith("harness: the source fails at depth 1: diverged: loss is nan"), last
        assert "mend [source]" in last
    view = load_study("designs")[2]
    assert [t.purpose for t in view.trials.values()] == ["source"]
    assert view.sessions[-1]["reason"] == "error"


def test_a_sources_weights_that_are_gone_are_missed(workshop: Path) -> None:
    view = search(workshop, SPACE, trials=3)
    (Path("runs/designs/trials") / view.source_trial(0) / "checkpoint.pt").unlink()
    with pytest.raises(UserError, match=rf"{view.source_trial(0)}/checkpoint.pt: .* is gone"):
        search(workshop, SPACE, resume=True)


def test_a_checkpoint_that_is_there_can_be_the_source(workshop: Path) -> None:
    one = with_designs(SPACE, {"sharp": {"sharpness": 1.0}}).replace(RUNG, "")
    text = one.replace(SOURCE, '[source]\ncheckpoint = "before.pt"\n')
    with pytest.raises(UserError, match=r"^source.checkpoint = 'before.pt': No such file") as caught:
        search(workshop, text)
    assert "\n" not in str(caught.value) and not Path("runs/designs/ledger.jsonl").exists()
    search(workshop, one.replace(SOURCE, ""), trials=1, study="before")
    made = next(Path("runs/before/trials").glob("*/checkpoint.pt"))
    shutil.copy(made, "before.pt")
    view = search(workshop, text, trials=4)
    assert view.source is None and len(view.opened["source"]) == 64
    for log in Path("runs/designs/trials").glob("*/log.txt"):
        assert log.read_text() == f"going on from {workshop / 'before.pt'}\n"
    with open("before.pt", "ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"before.pt.*sha256.*put it back or search with --study NEW"):
        search(workshop, text, resume=True)
    shutil.copy(made, "before.pt")
    assert search(workshop, text, resume=True).sessions[-1]["reason"] == "exhausted"


# ---- what it costs ----


def priced(horizon: float = 1.0) -> Story:
    """A story whose source trains `horizon` times as long as the rung's 10 and 20 tokens, at twice the FLOPs."""
    rungs = [{"depth": 1, "tokens": 10, "seeds": 2}, {"depth": 2, "tokens": 20, "seeds": 2}]
    story = Story({**Story().space, "rungs": rungs}).opened()
    plain = [{"flops_per_token": 3, "tokens": r["tokens"]} for r in rungs]
    story.proposed(BASE, "baseline", parent=None, against=None, facts_by_rung=plain)
    facts = [{"flops_per_token": 6, "tokens": int(r["tokens"] * horizon)} for r in rungs]
    return story.proposed("src", SOURCE_ARM, parent=None, against=None, facts_by_rung=facts)


def test_a_longer_training_is_expected_to_take_longer() -> None:
    story = priced(horizon=4.0)
    assert Purse(story.view(), Budget()).expected_seconds(0, "src") == 0, "nothing is known yet"
    story.scored("src", seed_of(0, 0), 3.0)
    assert Purse(story.view(), Budget()).expected_seconds(0, BASE) == 0, (
        "a source tells nothing of the others"
    )
    purse = Purse(story.scored(BASE, 1, 3.0).view(), Budget())  # 5 s
    assert purse.expected_seconds(0, BASE) == 5
    assert purse.expected_seconds(0, "src") == 5 * 2 * 4
    assert purse.expected_seconds(1, BASE) == 5 * 2
    assert purse.expected_seconds(1, "src") == 5 * 2 * 2 * 4


def test_promotion_counts_the_source_of_its_rung() -> None:
    story = priced().scored("src", seed_of(0, 0), 3.0)
    story.proposed("k", facts_by_rung=[{"flops_per_token": 3, "tokens": 10}] * 2).verdict("k", "keep")
    assert Counter(expected_runs(story.view())) == {(1, "k"): 2, (1, BASE): 2, (1, "src"): 1}
    assert (1, "src") not in expected_runs(story.scored("src", seed_of(1, 0), 3.0, rung=1).view())


# ---- the report ----


def rows(text: str) -> list[dict[str, str]]:
    """The tables of the section on the comparison, a dict a row."""
    section = text.split("\n## Comparison\n")[1].split("\n## ")[0]
    made = []
    for table in re.findall(r"(?:^\|.*\n)+", section, re.M):
        head, _, *body = (line.strip("| \n").split(" | ") for line in table.splitlines())
        made += [dict(zip(head, row, strict=True)) for row in body]
    return made


def test_the_table_follows_from_the_ledger_lines(night: tuple) -> None:
    folder, view, _ = night
    bpb = {e["trial"]: e["bpb"] for e in events(folder) if e["event"] == "judged" and e["split"] == "val"}
    ended = {e["trial"]: e for e in events(folder) if e["event"] == "finished" and e["state"] == "COMPLETE"}
    facts = {e["candidate"]: e["facts_by_rung"] for e in events(folder) if e["event"] == "proposed"}
    shown = rows((folder / "reports/designs/report.md").read_text())
    assert [row["design"].split()[0] for row in shown] == [
        "baseline", "source", "sharp", "between", "smooth", "broken", "baseline", "source", "sharp", "between",
    ]  # fmt: skip
    for place, row in enumerate(shown):
        rung, candidate = int(place >= 6), re.search(r"`(\w+)`", row["design"])[1]
        mine = {t.split("-s")[1]: bpb[t] for t in bpb if t.startswith(f"{candidate}-r{rung}-") and t in ended}
        base = {t.split("-s")[1]: bpb[t] for t in bpb if t.startswith(f"{view.baseline}-r{rung}-")}
        count = facts[candidate][rung]
        assert row["n"] == str(len(mine))
        assert row["val bpb"] == (f"{np.mean(list(mine.values())):.4f}" if mine else "–")
        assert row["stored"] == f"{count['params_total']:,}" and row["tokens"] == f"{count['tokens']:,}"
        assert row["FLOPs a token"] == f"{count['flops_per_token']:,}"
        gains = np.array([base[s] - mine[s] for s in mine if s in base])
        if row["design"].startswith(("baseline", "source", "broken")):
            assert row["gain, bpb"] == row["95 %"] == "–"
            continue
        half = textbook.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / len(gains) ** 0.5
        assert row["gain, bpb"] == f"{gains.mean():+.4f}"
        assert row["95 %"] == f"{gains.mean() - half:+.4f} to {gains.mean() + half:+.4f}"


def test_each_row_says_what_was_equal(night: tuple) -> None:
    folder, _, _ = night
    equal = {
        r["design"].split()[0]: r["equal to the baseline"]
        for r in rows((folder / "reports/designs/report.md").read_text())
    }
    assert equal["sharp"] == "stored, active, FLOPs, tokens, seconds"
    assert equal["source"] == "stored, active, FLOPs, seconds", "it saw four times the tokens"
    assert equal["broken"] == "stored, active, FLOPs, tokens", "it has no time"
    assert equal["baseline"] == "–"


def test_what_did_not_run_is_named_with_its_reason(night: tuple) -> None:
    folder, view, _ = night
    text = (folder / "reports/designs/report.md").read_text()
    assert f"Refused: same, *duplicate*: same resolved settings as {view.baseline}" in text
    assert "Refused: unknown, *config*: " in text
    assert "changes confirmed, each against the baseline at val " in text.splitlines()[2]
    assert "'Not begun: ', 'sharp, between, smooth" in str(
        comparison.compared(StudyView(events(folder)[:12]))
    )


def test_a_changed_digit_of_the_table_is_found(night: tuple, tmp_path: Path) -> None:
    folder, view, _ = night
    for name in ("report.md", "index.html"):
        shutil.copytree(folder / "reports/designs", tmp_path / name)
        assert audit(view, tmp_path / name) == []
        path = tmp_path / name / name
        text = path.read_text()
        digit = text.index("66,049")
        path.write_text(text[:digit] + "7" + text[digit + 1 :])
        assert [p.split(":")[0] for p in audit(view, tmp_path / name)] == [name]


def test_the_audit_computes_the_table_a_second_time(night: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, view, _ = night
    honest = comparison.paired_interval
    monkeypatch.setattr(comparison, "paired_interval", lambda *runs: tuple(1.01 * x for x in honest(*runs)))
    problems = audit(view, folder / "reports/designs")
    sharp = named(view)["sharp"]
    for name in ("delta", "low", "high"):
        assert any(p.startswith(f"compared/{sharp}/0/paired/{name}: ") for p in problems)


def test_numbers_of_the_table_name_their_trials(night: tuple) -> None:
    _, view, _ = night
    told = {n.key: n.trials for n in walk(build(view), Number) if n.key.startswith("compared/")}
    smooth, seeds = named(view)["smooth"], [seed_of(0, i) for i in range(3)]
    both = [trial_id(c, 0, s) for c in (smooth, view.baseline) for s in seeds]
    assert told[f"compared/{smooth}/0/bpb"] == tuple(both[:3])
    assert sorted(told[f"compared/{smooth}/0/paired/delta"]) == sorted(both)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_the_wide_table_scrolls_inside_the_page(night: tuple, tmp_path: Path) -> None:
    text = (night[0] / "reports/designs/index.html").read_text()
    probe = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script>"
    (tmp_path / "page.html").write_text(text.replace("</body>", probe + "</body>"))
    listen = "<title></title><script>onmessage = e => { document.title = e.data }</script>"
    frame = tmp_path / "frame.html"
    frame.write_text(listen + '<iframe src="page.html" width="390" height="800" style="border: 0"></iframe>')
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    )
    command = [
        "chromium",
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=3000",
    ]
    environment = {**os.environ, "HOME": str(tmp_path)}
    dom = subprocess.run(
        [*command, "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=environment,
    ).stdout
    assert int(re.search(r"<title>(\d+)</title>", dom)[1]) <= 390
