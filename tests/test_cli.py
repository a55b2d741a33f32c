"""The command line: its verbs and flags, its exit codes, and one line for every mistake of the user's.

pytest tests/test_cli.py
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import BIGRAM, BIGRAM_SPACE
from filelock import FileLock

from harness import __version__
from harness.cli import cli, main
from harness.ledger import Ledger

VERBS = {
    "accept": ["--why"],
    "audit": [],
    "doctor": ["--json"],
    "plan": ["--json"],
    "prepare": ["--json", "--source", "--vocab"],
    "reject": ["--why"],
    "report": ["--against"],
    "search": [
        "--dispatch",
        "--gpu-hours",
        "--hours",
        "--json",
        "--proposers",
        "--ray-address",
        "--resume",
        "--study",
        "--trials",
        "--usd",
        "--workers",
    ],
    "status": ["--json"],
}
HEAVY = {"torch", "ray", "optuna", "anthropic", "pandas", "matplotlib", "scipy", "git", "numpy", "pydantic"}
INLINE = ["--dispatch", "inline"]
TRIALS = 9  # the control and one more


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.err.splitlines()[-1]


Harness = Callable[..., Ended]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Harness]:
    """The console script's function in this process."""

    def call(*args: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["harness", *args])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            logging.getLogger("harness").handlers.clear()
        return Ended(code, *capsys.readouterr())

    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    yield call


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one short study in it, made by the console script."""
    folder = tmp_path_factory.mktemp("studied")
    shutil.copy(BIGRAM, folder)
    (folder / "pairs.toml").write_text(BIGRAM_SPACE)
    script = Path(sys.executable).with_name("harness")
    command = [script, "search", "pairs.toml", *INLINE, "--trials", str(TRIALS), "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    told = json.loads(done.stdout)
    assert told == {"study": "pairs", "stopped": "budget-trials", "report": "reports/pairs/report.md"}
    return folder


@pytest.fixture
def there(studied: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(studied)
    return studied


def listing(folder: Path) -> dict[str, bytes]:
    """The records of every study below, and which other files there are."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".lock", ".txt"))
    return {str(p): p.read_bytes() if p.suffix == ".jsonl" else b"" for p in files}


def one_line(ended: Ended, *words: str) -> None:
    assert ended.code == 2, ended
    assert ended.out == ""
    assert ended.last.startswith("harness: ")
    assert "Traceback" not in ended.err and len(ended.err.splitlines()) == 1, ended.err
    for word in words:
        assert word in ended.last, ended.last


# ---- shape ----


def test_verbs_and_flags_are_these_and_no_others() -> None:
    flags = {
        name: sorted(o for p in verb.params for o in p.opts if o.startswith("--"))
        for name, verb in cli.commands.items()
    }
    assert flags == VERBS


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from harness.cli import cli\n"
        f"for args in [['--help'], ['--version'], *([v, '--help'] for v in {sorted(VERBS)!r})]:\n"
        "    try: cli(args)\n"
        "    except SystemExit as end: assert not end.code, args\n"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stderr.split())
    assert done.stdout.count("Usage: ") == len(VERBS) + 1


def test_every_verb_says_what_it_does(harness: Harness) -> None:
    for args in ([], *([v] for v in VERBS)):
        ended = harness(*args, "--help")
        assert ended.code == 0 and ended.err == ""
        assert ended.out.count("\n") >= 5
    assert harness("--version").out.strip().endswith(__version__)


def test_the_module_is_the_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness", "dance"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "harness: No such command 'dance'.\n"


# ---- done: 0; the work failed: 1; ended early: 3 ----


def test_a_study_can_be_read_and_its_report_agrees(there: Path, harness: Harness) -> None:
    before = listing(there / "runs")
    status = json.loads(harness("status", "pairs", "--json").out)
    assert status["state"] == "stopped (budget-trials)"
    assert sum(status["trials"].values()) == TRIALS
    assert "pairs: stopped (budget-trials)" in harness("status", "pairs").out
    assert harness("report", "pairs") == Ended(0, "reports/pairs/report.md\n", "")
    assert harness("report", "pairs", "--against", "pairs").code == 0
    assert harness("audit", "pairs").code == 0
    assert listing(there / "runs") == before


def test_a_report_that_does_not_agree_is_work_that_failed(there: Path, harness: Harness) -> None:
    report = there / "reports" / "pairs" / "report.md"
    text = report.read_text()
    report.write_text(text.replace("4.5", "4.4", 1))
    assert harness("audit", "pairs").code == 1
    report.write_text(text)
    assert harness("audit", "pairs").code == 0


def test_a_folder_that_takes_no_report_is_work_that_failed(
    studied: Path, harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(studied / "runs", tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").write_text("a file is in the way")
    ended = harness("report", "pairs")
    assert ended.code == 1
    assert len(ended.err.splitlines()) == 1 and "reports" in ended.err and "Traceback" not in ended.err


def test_a_resume_with_more_budget_goes_on_and_ends_early_again(workshop: Path, harness: Harness) -> None:
    def started() -> list[str]:
        return [e["trial"] for e in Ledger(Path("runs/pairs/ledger.jsonl")).poll() if e["event"] == "started"]

    assert harness("search", "pairs.toml", *INLINE, "--trials", "2").code == 3
    first = started()
    ended = harness("search", "pairs.toml", *INLINE, "--trials", "4", "--resume")
    assert ended.code == 3
    assert "pairs stopped: budget-trials" in ended.out
    assert started()[:2] == first and len(set(started())) == 4


def test_prepare_says_where_the_corpus_lies(harness: Harness, cache: Path) -> None:
    told = json.loads(harness("prepare", "--json").out)
    assert Path(told["folder"]).is_relative_to(cache)
    assert set(told["splits"]) == {"train", "val", "audit", "locked"}
    assert told["sha256"][:16] in harness("prepare").out


# ---- the user's mistake: 2 ----


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["status", "nope"], ["'nope'", "pairs"]),
        (["report", "nope"], ["'nope'", "pairs"]),
        (["audit", "nope"], ["'nope'", "pairs"]),
        (["accept", "nope", "abc"], ["'nope'", "pairs"]),
        (["reject", "nope", "abc", "--why", "x"], ["'nope'", "pairs"]),
        (["report", "pairs", "--against", "nope"], ["'nope'"]),
        (["status", "../pairs"], ["'../pairs'", "not a name"]),
        (["status", ""], ["not a name"]),
        (["accept", "pairs", "nope"], ["nope"]),
        (["accept", "pairs", "--upload-pack=x"], ["--upload-pack"]),
        (["reject", "pairs", "nope", "--why", "x"], ["nope"]),
        (["reject", "pairs", "nope"], ["--why"]),
        (["search"], ["SPACE"]),
        (["search", "pairs.toml", *INLINE], ["runs/pairs", "--resume", "--study"]),
        (["search", "absent.toml"], ["absent.toml"]),
        (["search", "."], ["directory"]),
        (["search", "pairs.toml", "--study", "fresh", "--resume"], ["runs/fresh", "nothing to resume"]),
        (["search", "pairs.toml", "--study", "../evil"], ["'../evil'", "not a name"]),
        (["search", "pairs.toml", "--study", "/tmp/evil"], ["not a name"]),
        (["search", "pairs.toml", "--study", "a\nb"], ["not a name"]),
        (["search", "pairs.toml", "--study", "fresh", "--proposers", "optima=1"], ["optima", "random"]),
        (["search", "pairs.toml", "--study", "fresh", "--proposers", "random"], ["'random'", "ARM=SHARE"]),
        (
            ["search", "pairs.toml", "--study", "fresh", "--proposers", "agent=1"],
            ["ANTHROPIC_API_KEY", "--usd"],
        ),
        (["search", "pairs.toml", "--study", "fresh", "--hours", "nan"], ["--hours", "nan"]),
        (["search", "pairs.toml", "--study", "fresh", "--hours", "inf"], ["--hours", "inf"]),
        (["search", "pairs.toml", "--study", "fresh", "--hours", "0"], ["--hours", "0"]),
        (["search", "pairs.toml", "--study", "fresh", "--hours", "-1"], ["--hours", "-1"]),
        (["search", "pairs.toml", "--study", "fresh", "--usd", "nan"], ["--usd", "nan"]),
        (["search", "pairs.toml", "--study", "fresh", "--gpu-hours", "inf"], ["--gpu-hours", "inf"]),
        (["search", "pairs.toml", "--study", "fresh", "--trials", "0"], ["--trials", "0"]),
        (["search", "pairs.toml", "--study", "fresh", "--trials", "1.5"], ["--trials", "1.5"]),
        (["search", "pairs.toml", "--study", "fresh", "--workers", "0"], ["--workers", "0"]),
        (["search", "pairs.toml", "--study", "fresh", "--dispatch", "slurm"], ["slurm", "inline"]),
        (["search", "pairs.toml", "--study", "fresh", "--wat"], ["--wat"]),
        (["plan", "absent.toml"], ["absent.toml"]),
        (["prepare", "--source", "absent.txt"], ["absent.txt"]),
        (["prepare", "--source", ""], []),
        (["dance"], ["dance"]),
    ],
    ids=lambda x: " ".join(x)[:50],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    there: Path, harness: Harness, args: list[str], words: list[str]
) -> None:
    before = listing(there)
    one_line(harness(*args), *words)
    assert listing(there) == before
    assert not (there.parent / "evil").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("sharpness = 0.7", "sharpness = 0.8", ["[baseline]", "frozen"]),
        ("low = 0.2", "low = 0.3", ["[params]", "frozen"]),
        ("tokens = 20_000", "tokens = 10_000", ["[rungs]", "frozen"]),
        ("context = 64", "context = 32", ["[metric]", "frozen"]),
        ("[budget]", "[decision]\naudit_z = 0.1\n[budget]", ["[decision]", "frozen"]),
        ("low = 0.2", "low = 9", ["params.sharpness", "swap"]),
    ],
)
def test_another_question_does_not_go_on_with_a_study(
    there: Path, harness: Harness, tmp_path: Path, old: str, new: str, words: list[str]
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(BIGRAM_SPACE.replace(old, new, 1))
    before = listing(there)
    one_line(harness("search", str(other), *INLINE, "--study", "pairs", "--resume"), *words)
    assert listing(there) == before


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('trainer = "bigram_trainer.py"', 'trainer = "absent.py"', ["absent.py", "run where the trainer is"]),
        ('trainer = "bigram_trainer.py"', 'trainer = "."', ["no such"]),
        ("context = 64", 'context = 64\ncorpus = "/absent"', ["/absent", "not prepared", "harness prepare"]),
        ("label = 0", "label = 0\nlabbel = 1", ["bigram_trainer.py", "labbel"]),
        ("[budget]", '[[constraints]]\nexpr = "sharpness > 1"\n[budget]', ["baseline", "sharpness > 1"]),
        ("[budget]", '[[constraints]]\nexpr = "sharpnes > 1"\n[budget]', ["sharpnes"]),
        ("random = 1.0", "agent = 1.0\n[decision]\nplacebo_share = 0.0", ["no arm"]),
    ],
)
def test_a_question_that_cannot_be_asked_here_is_one_line_before_the_first_record(
    workshop: Path, harness: Harness, old: str, new: str, words: list[str]
) -> None:
    good = (workshop / "pairs.toml").read_text()
    (workshop / "pairs.toml").write_text(good.replace(old, new, 1))
    ended = harness("search", "pairs.toml", *INLINE, "--trials", "1")
    if "agent" in new:  # a note in the log that the agent is off goes before
        ended = Ended(ended.code, ended.out, ended.last)
    one_line(ended, *words)
    assert not list(Path("runs").rglob("ledger.jsonl")) and not list(Path("runs").rglob("study.toml"))
    assert not Path("reports").exists()
    one_line(harness("status", "pairs"), "none yet")


def test_a_mended_trainer_is_the_one_that_is_searched(workshop: Path, harness: Harness) -> None:
    """The false start leaves nothing behind that the next one would take up."""
    trainer = workshop / "bigram_trainer.py"
    good = trainer.read_text()
    trainer.write_text("import sys\nsys.exit('half-written trainer')\n")
    one_line(harness("search", "pairs.toml", *INLINE, "--trials", "1"), "half-written trainer")
    trainer.write_text(good.replace('"flops_per_token":', '"flops":'))
    one_line(harness("search", "pairs.toml", *INLINE, "--trials", "1"), "flops_per_token")
    trainer.write_text(good)
    assert harness("search", "pairs.toml", *INLINE, "--trials", "1").code == 3


def test_a_study_torn_before_its_baseline_begins_again(workshop: Path, harness: Harness) -> None:
    assert harness("search", "pairs.toml", *INLINE, "--trials", "1").code == 3
    ledger = Path("runs/pairs/ledger.jsonl")
    ledger.write_bytes(ledger.read_bytes().splitlines(keepends=True)[0] + b'{"v": 1, "event": "prop')
    one_line(harness("status", "pairs"), "no baseline")
    assert harness("search", "pairs.toml", *INLINE, "--trials", "1", "--resume").code == 3
    assert json.loads(harness("status", "pairs", "--json").out)["trials"] == {"COMPLETE": 1}


def test_a_study_that_another_search_drives_is_left_alone(there: Path, harness: Harness) -> None:
    before = listing(there)
    lock = "lock = filelock.FileLock('runs/pairs/driver.lock'); lock.acquire()"
    holder = f"import filelock; {lock}; print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", holder], stdin=-1, stdout=-1) as process:
        process.stdout.readline()
        one_line(
            harness("search", "pairs.toml", *INLINE, "--resume", "--trials", "1"), "another search drives"
        )
        assert json.loads(harness("status", "pairs", "--json").out)["state"] == "running"
        process.communicate(b"\n")
    with FileLock("runs/pairs/driver.lock", timeout=0):
        pass
    assert listing(there) == before


@pytest.mark.parametrize("place", ["runs", "runs/pairs", "runs/pairs/driver.lock"])
def test_a_folder_that_cannot_be_written_is_one_line(workshop: Path, harness: Harness, place: str) -> None:
    (workshop / place).parent.mkdir(parents=True, exist_ok=True)
    if place.endswith(".lock"):
        (workshop / place).mkdir()
    else:
        (workshop / place).write_text("a file is in the way")
    one_line(harness("search", "pairs.toml", *INLINE, "--trials", "1"), "runs/pairs", "write")
