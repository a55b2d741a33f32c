"""The report says what the ledger says, the same bytes each time, and the audit finds a single wrong digit.

pytest tests/test_report.py
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as textbook

from harness.errors import UserError
from harness.ledger import Event, Ledger
from harness.promote import conclude
from harness.records import BASELINE_ARM, PLACEBO_ARM
from harness.report import against, audit, build, write_report
from harness.report.document import Number, walk
from harness.schedule import pending
from harness.space import Space
from harness.stats import decide
from harness.view import StudyView

BASE = {"matrix_lr": 0.02, "router": "linear", "top_k": 2}
SPACE = {
    "name": "night",
    "question": "Which router setting lowers bits per byte at equal tokens?",
    "baseline": BASE,
    "params": {
        "matrix_lr": {"kind": "float", "low": 0.001, "high": 0.1, "log": True},
        "router": {"kind": "categorical", "choices": ["linear", "mlp", "norm"]},
        "top_k": {"kind": "int", "low": 1, "high": 4},
    },
    "rungs": [{"depth": 2, "tokens": 100_000, "seeds": 8}, {"depth": 4, "tokens": 400_000, "seeds": 4}],
}
OPENED = {
    "event": "opened",
    "study": "night",
    "space": SPACE,
    "space_sha256": "5" * 64,
    "commit": "c" * 40,
    "dirty": False,
    "trainer_sha256": "7" * 64,
    "judge_id": "judge-0123456789ab",
    "corpus": {"name": "embedded", "sha256": "e" * 64, "num_documents": 249, "num_bytes": 12_200_000},
    "versions": {"python": "3.11.9", "torch": "2.13.0", "harness": "0.1.0"},
    "machine": {"host": "node", "cpus": 2, "gpu": None, "os": "Linux"},
    "dispatch": "pool",
    "proposers": {"optuna": 0.7, "agent": 0.3},
    "resumed": False,
    "budget": {"hours": 8.0, "trials": 1000, "usd": 5.0, "gpu_hours": None},
}
HOSTILE = "<script>alert(1)</script> | a\nnew # line `x` \u202e [l](http://evil.example) " + "long " * 300


class Night:
    """A study whose trainings are numbers: true means, seed noise, and the real decision code."""

    def __init__(self, folder: Path, sigma: float = 0.004):
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.view = StudyView()
        self.sigma = sigma
        self.levels: dict[str, float] = {}
        self.fails: dict[str, str] = {}
        self.append(OPENED)

    def append(self, *events: Event) -> None:
        self.ledger.append(*events)
        for event in self.ledger.poll():
            self.view.apply(event)

    def propose(self, level: float, arm: str, hypothesis: str = "it helps", fails: str = "", **new) -> str:
        against = self.view.incumbent if self.view.incumbents else None
        placebo = arm == PLACEBO_ARM
        settings = {**(self.view.candidates[against].settings if against else BASE), **new}
        candidate = hashlib.sha256(f"{settings}{len(self.view.candidates)}".encode()).hexdigest()[:8]
        self.levels[candidate] = self.levels[against] if placebo else level
        self.fails[candidate] = fails
        event = {"event": "proposed", "candidate": candidate, "arm": arm, "settings": settings, "changed": {}}
        event |= {"parent": against, "against": against, "hypothesis": hypothesis, "family": "routing"}
        sizes = [{"params_total": n * 1_234_567, "params_active": n * 345_678} for n in (1, 2, 3)]
        event |= {"facts": sizes[0], "facts_by_rung": sizes, "placebo": placebo}
        self.append(event | {"trainer_sha256": "7" * 64, "commit": "c" * 40, "seed_block": 5000 * placebo})
        return candidate

    def run(self, promoting: bool = False) -> None:
        """Trains whatever is due and decides, until nothing is due."""
        for _ in range(10_000):
            work = next(pending(self.view, promoting), None)
            if work is not None:
                self._train(work)
            verdicts = (decide(self.view, c) for c in self.view.open.values())
            verdict = next(filter(None, verdicts), None)
            promoted = conclude(self.view) if promoting else []
            if verdict or promoted:
                self.append(*([verdict] if verdict else promoted))
            elif work is None:
                return

    def _train(self, work) -> None:
        failure = self.fails[work.candidate]
        settings = str(self.view.candidates[work.candidate].settings)
        rng = np.random.default_rng([work.seed, *hashlib.sha256(settings.encode()).digest()])
        level = self.levels[work.candidate] - 0.2 * work.rung
        events: list[Event] = []
        scores = [level + self.sigma * float(x) for x in rng.normal(size=2)]
        if not failure:
            for split in work.splits:
                score = scores[split == "audit"]
                judged = {
                    "event": "judged",
                    "trial": work.trial,
                    "split": split,
                    "bpb": score,
                    "judge_id": "j",
                }
                events.append(judged)
        if work.train:
            started = {
                "event": "started",
                "trial": work.trial,
                "candidate": work.candidate,
                "rung": work.rung,
            }
            started |= {"seed": work.seed, "purpose": work.purpose, "depth": 2, "tokens": 100, "attempt": 1}
            finished = {"event": "finished", "trial": work.trial, "state": "FAIL" if failure else "COMPLETE"}
            finished |= {"failure": failure or None, "detail": HOSTILE if failure else "", "seconds": 31.25}
            finished |= {"train_seconds": 29.5, "device": "cpu", "log": f"trials/{work.trial}/log.txt"}
            events = [started, *events, finished | {"curve": str(scores[0])}]
        self.append(*events)


def spend(night: Night, call: str, phase: str, usd: float) -> None:
    event = {"event": "spend", "call": call, "arm": "agent", "phase": phase, "usd": usd, "model": "m"}
    night.append(event | {"input_tokens": 1000, "output_tokens": 200, "outcome": "ok", "seconds": 2.0})


def no_keep(folder: Path) -> Night:
    night = Night(folder)
    night.propose(2.91, BASELINE_ARM)
    night.run()
    for i in range(3):
        night.propose(2.95, "random", matrix_lr=0.03 + 0.01 * i)
    night.run()
    return night


def rich(folder: Path) -> Night:
    """Two keeps in a chain, failures, rejections, placebos, promotion, spending, hostile text, a review."""
    night = Night(folder)
    night.propose(2.91, BASELINE_ARM)
    night.run()
    for i in range(6):
        night.propose(2.911 + 0.004 * i, "optuna", matrix_lr=0.011 + 0.001 * i)
    night.propose(0, PLACEBO_ARM)
    night.propose(2.9, "agent", HOSTILE, fails="diverged", router="norm")
    spend(night, "call-1", "reserved", 0.05)
    spend(night, "call-1", "settled", 0.0123)
    spend(night, "call-2", "reserved", 0.05)
    night.append({"event": "rejected", "arm": "agent", "kind": "malformed", "detail": HOSTILE})
    night.run()
    night.propose(2.885, "agent", HOSTILE, router="mlp")
    night.run()
    night.propose(2.906, "optuna", top_k=4, matrix_lr=0.05)
    night.propose(2.86, "optuna", top_k=3)
    night.run()
    night.propose(2.858, "random", top_k=1)
    night.run(promoting=True)
    last = night.view.incumbent
    night.append({"event": "reviewed", "candidate": last, "action": "accept", "why": "a | b", "by": "ada"})
    night.append({"event": "stopped", "reason": "budget-hours", "detail": "8 h"})
    return night


def one_keep(folder: Path) -> Night:
    """One keep, and one candidate that is still open when the ledger ends."""
    night = Night(folder)
    night.propose(2.91, BASELINE_ARM)
    night.run()
    night.propose(2.88, "agent", "an mlp sees more", router="mlp")
    night.run()
    for i in range(16):
        night.propose(2.877, "optuna", matrix_lr=0.011 + 0.001 * i)
    night.run()
    night.propose(2.8, "random", top_k=4)
    return night


def events_of(night: Night) -> list[Event]:
    return [json.loads(line) for line in night.ledger.path.read_text().splitlines()]


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Night, Path]]:
    made = {}
    for make in (no_keep, one_keep, rich):
        folder = tmp_path_factory.mktemp(make.__name__)
        made[make.__name__] = (make(folder), folder / "report")
        write_report(made[make.__name__][0].view, folder / "report")
    return made


@pytest.fixture
def night(nights: dict, tmp_path: Path) -> tuple[Night, Path]:
    """The rich night with a copy of its report that a test may spoil."""
    shutil.copytree(nights["rich"][1], tmp_path / "report")
    return nights["rich"][0], tmp_path / "report"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


REBUILD = """
import sys
from pathlib import Path
from harness.ledger import Ledger
from harness.report import write_report
from harness.view import StudyView
write_report(StudyView(Ledger(Path(sys.argv[1])).poll()), Path(sys.argv[2]))
"""


def test_another_process_rebuilds_the_same_bytes(nights: dict, tmp_path: Path) -> None:
    night, folder = nights["rich"]
    command = [sys.executable, "-c", REBUILD, str(night.ledger.path), str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert contents(tmp_path) == contents(folder)
    assert len(contents(folder)) == 7


@pytest.mark.parametrize("name", ["no_keep", "one_keep", "rich"])
def test_a_true_report_passes_its_audit(nights: dict, name: str) -> None:
    night, folder = nights[name]
    assert audit(night.view, folder) == []


@pytest.mark.parametrize("kind", ["report.md", "index.html", "figures/progress.svg", "winners/*.toml"])
def test_one_changed_digit_is_found(night: tuple[Night, Path], kind: str) -> None:
    told, folder = night
    path = next(folder.glob(kind))
    text = path.read_text()
    digits = [m.start() for m in re.finditer(r"\d", text)]
    at = digits[np.random.default_rng(len(text)).integers(len(digits))]
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    problems = audit(told.view, folder)
    line = text[:at].count("\n") + 1
    assert len(problems) == 1
    assert problems[0].startswith(f"{path.relative_to(folder)}:{line}: ")


def test_a_missing_and_a_made_up_file_are_found(night: tuple[Night, Path]) -> None:
    told, folder = night
    (folder / "report.md").unlink()
    (folder / "winners" / "deadbeef.toml").write_text("[baseline]\n")
    problems = audit(told.view, folder)
    assert [p.split(":")[0] for p in problems] == ["winners/deadbeef.toml", "report.md"]


def spoiled(night: Night, change: Callable[[list[Event]], None]) -> StudyView:
    events = events_of(night)
    change(events)
    return StudyView(events)


def test_a_number_without_a_finished_trial_is_found(night: tuple[Night, Path]) -> None:
    told, folder = night
    trial = told.view.candidates[told.view.incumbent].last["trials"][0]

    def drop(events: list[Event]) -> None:
        events.remove(next(e for e in events if e["event"] == "finished" and e["trial"] == trial))

    view = spoiled(told, drop)
    problems = audit(view, folder)
    assert any(p.startswith("report.md:") for p in problems)
    write_report(view, folder)
    again = audit(view, folder)
    assert f"verdict 1 of {told.view.incumbent}: n 6 is recorded, its trials give 5" in again
    assert any(f"stands on {trial}, which has no COMPLETE finish" in p for p in again)


@pytest.mark.parametrize("field", ["delta", "z"])
def test_a_recorded_verdict_that_its_scores_do_not_bear_out_is_found(
    night: tuple[Night, Path], field: str
) -> None:
    told, folder = night

    def inflate(events: list[Event]) -> None:
        keep = next(e for e in events if e["event"] == "verdict" and e["verdict"] == "keep")
        keep[field] *= 1.01

    view = spoiled(told, inflate)
    write_report(view, folder)
    first = view.incumbents[1]
    assert any(p.startswith(f"verdict 1 of {first}: {field} ") for p in audit(view, folder))


def test_a_changed_score_is_found_though_the_report_was_rewritten(night: tuple[Night, Path]) -> None:
    told, folder = night
    first = told.view.incumbents[1]

    def improve(events: list[Event]) -> None:
        score = next(
            e
            for e in events
            if e["event"] == "judged" and e["split"] == "audit" and e["trial"].startswith(first)
        )
        score["bpb"] -= 0.01

    view = spoiled(told, improve)
    write_report(view, folder)
    assert any(p.startswith(f"verdict 1 of {first}: delta ") for p in audit(view, folder))


def test_a_keep_below_its_bound_is_found(night: tuple[Night, Path]) -> None:
    told, folder = night

    def lower(events: list[Event]) -> None:
        keep = next(e for e in events if e["event"] == "verdict" and e["verdict"] == "keep")
        keep["bounds"] = [99.0, 99.0]

    view = spoiled(told, lower)
    assert any("below its bound" in p for p in audit(view, folder))


def test_the_headline_follows_from_the_ledger_lines(nights: dict) -> None:
    night, folder = nights["one_keep"]
    events = events_of(night)
    keep = next(e for e in events if e["event"] == "verdict" and e["verdict"] == "keep")
    bpb = {(e["trial"], e["split"]): e["bpb"] for e in events if e["event"] == "judged"}

    def level(candidate: str) -> float:
        return float(
            np.mean([v for (t, split), v in bpb.items() if t.startswith(candidate) and split == "val"])
        )

    x = np.array([bpb[t, "audit"] for t in keep["trials"]])
    control = {t.split("-s")[1]: bpb[t, "audit"] for t in keep["control"]}
    c, v, rho = np.array(list(control.values())), keep["sigma"] ** 2, keep["rho"]
    on_seeds = np.mean([control[t.split("-s")[1]] for t in keep["trials"]])
    delta = c.mean() - (x.mean() - rho * (on_seeds - c.mean()))
    half = textbook.t.ppf(0.975, keep["df"]) * (v * ((1 - rho**2) / len(x) + (1 - rho) ** 2 / len(c))) ** 0.5
    want = (
        f"**1 change confirmed: val {level(night.view.baseline):.4f} → {level(keep['candidate']):.4f} bpb, "
        f"audited gain {delta:+.4f} (95 % {delta - half:+.4f} to {delta + half:+.4f}) bpb over 6 fresh runs.**"
    )
    assert (folder / "report.md").read_text().splitlines()[4] == want


def test_promising_are_the_dropped_and_open_that_last_looked_better(nights: dict) -> None:
    night, folder = nights["one_keep"]
    last: dict[str, Event] = {}
    for e in events_of(night):
        if e["event"] == "verdict":
            last[e["candidate"]] = e
    want = {
        c for c, e in last.items() if e["stage"] == "look" and e.get("z", 0) > 1 and e["verdict"] != "keep"
    }
    text = (folder / "report.md").read_text()
    section = text.split("## Only promising")[1].split("\n## ")[0]
    assert want and set(re.findall(r"^\| `(\w+)` ", section, re.M)) == want
    assert f"Undecided when the ledger ends: `{next(iter(night.view.open))}` by random" in section


def test_the_three_outcomes(nights: dict) -> None:
    first = {name: (folder / "report.md").read_text().splitlines()[4] for name, (_, folder) in nights.items()}
    assert first["no_keep"].startswith("**Nothing is confirmed yet: the baseline stands at val 2.9")
    assert first["one_keep"].startswith("**1 change confirmed: ")
    assert first["rich"].startswith("**2 changes confirmed, each against the one before: ")


def test_failure_is_a_state_and_never_a_number(nights: dict) -> None:
    night, folder = nights["rich"]
    failed = [t for t in night.view.trials.values() if t.failure]
    rows = [
        line
        for line in (folder / "report.md").read_text().splitlines()
        if line.startswith(f"| `{failed[0].id}`")
    ]
    assert len(failed) == 1 and [row.split(" | ")[1:6] for row in rows] == [
        ["agent", "look", "diverged", "–", "–"]
    ]
    assert not [
        n for n in walk(build(night.view), Number) if n.value is not None and not np.isfinite(n.value)
    ]


def test_a_strangers_text_stays_text_in_markdown(nights: dict) -> None:
    text = (nights["rich"][1] / "report.md").read_text()
    assert not re.search(r"(?<!\\)[<\[](script|l)", text)
    assert "\u202e" not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(widths) == 1
    assert not [line for line in text.splitlines() if line.startswith("new ")]


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: set[str] = set()
        self.references: set[str] = set()
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.references |= {
            v for k, v in attrs if v and k in ("src", "href", "xlink:href", "srcset", "action", "data")
        }
        assert not [key for key, _ in attrs if key.startswith("on")]


def test_the_page_needs_nothing_but_itself(nights: dict) -> None:
    text = (nights["rich"][1] / "index.html").read_text()
    page = Page(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert page.references and all(r.startswith("#") and r[1:] in page.ids for r in page.references)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"@import|url\((?!#)", text)
    assert "<!DOCTYPE svg" not in text and "prefers-color-scheme: dark" in text


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_phone_shows_it_without_sideways_scrolling(nights: dict, tmp_path: Path) -> None:
    """A frame as wide as a phone: the page reports its scroll width to the page around it."""
    text = (nights["rich"][1] / "index.html").read_text().replace("<details", "<details open")
    probe = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script>"
    (tmp_path / "page.html").write_text(text.replace("</body>", probe + "</body>"))
    frame = tmp_path / "frame.html"
    listen = "<title></title><script>onmessage = e => { document.title = e.data }</script>"
    frame.write_text(listen + '<iframe src="page.html" width="390" height="800" style="border: 0"></iframe>')
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-component-update "
    flags += f"--disable-background-networking --disable-sync --user-data-dir={tmp_path / 'profile'}"
    command = ["chromium", *flags.split(), "--virtual-time-budget=3000", "--dump-dom", frame.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    width = int(re.search(r"<title>(\d+)</title>", dom)[1])
    assert 390 - 20 <= width <= 390  # a classic scroll bar takes up to 20


def test_a_winner_is_a_baseline(nights: dict) -> None:
    night, folder = nights["rich"]
    for candidate in night.view.incumbents[1:]:
        read = tomllib.loads((folder / "winners" / f"{candidate}.toml").read_text())
        assert read == {"baseline": night.view.candidates[candidate].settings}
        assert Space.model_validate({**SPACE, **read}).baseline == read["baseline"]


def test_comparing_two_studies(nights: dict, tmp_path: Path) -> None:
    mine, other = nights["rich"][0].view, nights["one_keep"][0].view
    text = against(mine, other)
    first, second = mine.incumbents[1:]
    assert f"| last incumbent, val bpb | {2.86:.2f}" in text
    assert "Confirmed in both: " in text and f"`{first}`" in text.split("Confirmed in both")[1]
    assert f"`{second}`" in text.split("Confirmed in both")[0]
    strange = Night(tmp_path)
    strange.view.opened["judge_id"] = "another"
    with pytest.raises(UserError, match="scores are not comparable"):
        against(mine, strange.view)


def test_a_study_that_has_just_begun(tmp_path: Path) -> None:
    night = Night(tmp_path)
    with pytest.raises(UserError, match="no baseline yet"):
        build(night.view)
    night.propose(2.9, BASELINE_ARM)
    write_report(night.view, tmp_path / "report")
    assert audit(night.view, tmp_path / "report") == []
    assert "val – bpb" in (tmp_path / "report" / "report.md").read_text()
