"""One trial end to end: real processes, the real judge, every way in which a trainer can misbehave.

pytest tests/test_trial.py
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import BIGRAM

from harness.study import ensure_corpus
from harness.trial import Failure, TrialRunner, TrialSpec, read_metrics
from harness.zygote import Zygote, clean_environment


@pytest.fixture(scope="module")
def runner() -> Iterator[TrialRunner]:
    made = TrialRunner()
    yield made
    made.close()


@pytest.fixture
def spec(tmp_path: Path) -> TrialSpec:
    corpus = str(ensure_corpus("embedded").resolve())
    return TrialSpec(
        trial="abc-r0-s1",
        candidate="abc",
        rung=0,
        purpose="look",
        config={"corpus": corpus, "seed": 1, "depth": 1, "tokens": 20_000},
        trainer=str(BIGRAM),
        patched=False,
        out=str(tmp_path / "abc-r0-s1"),
        source=None,
        train=True,
        splits=("val",),
        probes=False,
        corpus=corpus,
        context=64,
        eval_bytes=8192,
        timeout_seconds=20,
        budget_seconds=1000,
        memory_mib=600,
        cpus=1,
        gpus=0,
    )


def with_settings(spec: TrialSpec, **settings: object) -> TrialSpec:
    return replace(spec, config={**spec.config, **settings})


def test_a_good_trial_is_trained_and_judged(runner: TrialRunner, spec: TrialSpec) -> None:
    outcome = runner.run(spec)
    record = outcome["finished"]
    assert record["state"] == "COMPLETE" and record["failure"] is None
    assert 2.0 < outcome["judged"][0]["bpb"] < 8.0
    assert record["seconds"] > 0 and len(record["curve"]) == 16
    again = runner.run(replace(spec, train=False, splits=("audit",)))
    assert again["finished"] is None and again["judged"][0]["split"] == "audit"


def test_same_seed_same_score_in_a_fork_and_in_a_fresh_process(runner: TrialRunner, spec: TrialSpec) -> None:
    scores = [runner.run(replace(spec, patched=p))["judged"][0]["bpb"] for p in (False, True, False)]
    assert len(set(scores)) == 1
    assert runner.run(with_settings(spec, seed=2))["judged"][0]["bpb"] != scores[0]


MISBEHAVIOUR = {
    "crash": ("crash", "ZeroDivisionError"),
    "garbage": ("crash", "garbage"),
    "hang": ("timeout", "longer than"),
    "oom": ("oom", ""),
    "diverge": ("diverged", "nan"),
    "collapse": ("collapsed", ""),
    "nan-logits": ("diverged", "judge"),
    "wrong-shape": ("crash", "judge"),
    "no-checkpoint": ("crash", "checkpoint"),
    "bad-metrics": ("crash", "metrics.jsonl"),
    "never heard of": ("config", "behave"),
}


@pytest.mark.parametrize(
    ("behave", "patched"), [(b, False) for b in MISBEHAVIOUR] + [(b, True) for b in ("crash", "hang", "oom")]
)
def test_misbehaviour_is_a_state_with_a_kind(
    runner: TrialRunner, spec: TrialSpec, behave: str, patched: bool
) -> None:
    kind, word = MISBEHAVIOUR[behave]
    limit = 3 if behave == "hang" else 30
    outcome = runner.run(replace(with_settings(spec, behave=behave), patched=patched, timeout_seconds=limit))
    record = outcome["finished"]
    assert (record["state"], record["failure"]) == ("FAIL", kind), record
    assert word in record["detail"]
    assert "\n" not in record["detail"] and len(record["detail"]) <= 300
    assert outcome["judged"] == []
    assert runner.run(spec)["failure"] is None, "the slot is as good as new"


def test_probes_catch_a_model_that_looks_ahead_and_let_its_honest_twin_pass(
    runner: TrialRunner, spec: TrialSpec
) -> None:
    probed = replace(spec, probes=True)
    assert runner.run(probed)["failure"] is None
    peeking = runner.run(with_settings(probed, behave="peek"))
    assert peeking["failure"] == "cheat" and peeking["judged"] == []


def test_nothing_of_a_run_outlives_it(runner: TrialRunner, spec: TrialSpec) -> None:
    assert runner.run(with_settings(spec, behave="orphan"))["failure"] is None
    time.sleep(0.2)
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            assert not os.path.samefile(entry / "cwd", spec.out), f"{entry} still runs"
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue


def test_a_dead_fork_server_is_a_lost_trial_and_the_next_one_runs(
    runner: TrialRunner, spec: TrialSpec
) -> None:
    assert runner.run(spec)["failure"] is None
    os.kill(runner._zygote._process.pid, signal.SIGKILL)
    assert runner.run(spec)["failure"] == "lost"
    assert runner.run(spec)["failure"] is None


def test_a_dead_judge_is_a_lost_trial_and_the_next_one_runs(runner: TrialRunner, spec: TrialSpec) -> None:
    assert runner.run(spec)["failure"] is None
    os.kill(runner._judge._process.pid, signal.SIGKILL)
    assert runner.run(spec)["failure"] in ("lost", None)
    assert runner.run(spec)["failure"] is None


def test_a_run_dies_with_the_one_who_started_it(spec: TrialSpec, tmp_path: Path) -> None:
    """kill -9 of the slot's process: the fork server, the trial and the judge go with it."""
    code = (
        "import json, sys; from harness.trial import *; raw = json.load(sys.stdin);"
        "raw['splits'] = tuple(raw['splits']); TrialRunner().run(TrialSpec(**raw))"
    )
    import json

    hanging = with_settings(spec, behave="hang")
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps(hanging.as_dict()))
    process.stdin.close()
    marker = Path(spec.out) / "log.txt"
    for _ in range(200):
        if marker.exists():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    process.kill()
    process.wait()
    for _ in range(50):
        if not _processes_with(str(BIGRAM)):
            return
        time.sleep(0.1)
    raise AssertionError(f"still running: {_processes_with(str(BIGRAM))}")


def _processes_with(word: str) -> list[str]:
    found = []
    own = os.getpid()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if word in line and parent != own and int(entry.name) != own:
            found.append(line)
    return found


def test_the_trainer_sees_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANTHROPIC_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "secret")
    assert "secret" not in clean_environment().values()


def test_describe_gives_counts_and_refuses_in_the_trainers_words(runner: TrialRunner, tmp_path: Path) -> None:
    answer = runner.describe(BIGRAM, {"depth": 3}, tmp_path)
    assert answer["flops_per_token"] == 257 * 3 and answer["config"]["depth"] == 3
    with pytest.raises(Failure, match="never = 3: unknown setting"):
        runner.describe(BIGRAM, {"never": 3}, tmp_path)


def test_a_trainer_that_cannot_be_loaded_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_like_this\n")
    with pytest.raises(RuntimeError, match="nothing_like_this"):
        Zygote(broken)


@pytest.mark.parametrize(
    "text", ["", "[]\n", '{"step": 1}\n', '{"step": 1, "train_nats": 2}\n{"step"', "\x00\n", "3\n"]
)
def test_bad_metrics_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(Failure):
        read_metrics(path)


def test_missing_numbers_stay_missing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train_nats": NaN, "tokens": 5, "odd": {"a": 1}, "dead_experts": 2}\n')
    record = read_metrics(path)
    assert record["train_nats"] is None and record["tokens_per_second"] is None
    assert record["health"] == {"dead_experts": 2}


def test_a_lost_trials_leftovers_do_not_leak_into_the_next_try(runner: TrialRunner, spec: TrialSpec) -> None:
    shutil.rmtree(spec.out, ignore_errors=True)
    Path(spec.out).mkdir()
    (Path(spec.out) / "checkpoint.pt").write_bytes(b"half a checkpoint")
    (Path(spec.out) / "metrics.jsonl").write_text("half")
    assert runner.run(spec)["failure"] is None
