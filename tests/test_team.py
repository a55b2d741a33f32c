"""Several processes on one run: the same result as one, pool gradients counted once, statistics over all.

pytest tests/test_team.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train_small import TINY, TRAINER, corpus, metrics, one_thread, run, weights

__all__ = ["corpus", "one_thread"]  # fixtures


def by_torchrun(corpus: Path, out: Path, num_processes: int, **settings) -> subprocess.CompletedProcess:
    words = [f"{key}={value}" for key, value in {**TINY, "corpus": corpus, **settings}.items()]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_processes}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(TRAINER.parent), "OMP_NUM_THREADS": "1"}
    command += [str(TRAINER), *words, "--out", str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)


@pytest.mark.parametrize("changes", [{}, {"micro_tokens": 32, "balance": "bias", "bias_rate": 0.01}], ids=str)
def test_two_processes_train_what_one_does(changes, corpus, tmp_path):
    settings = {"num_local": 0, "num_universal": 8, "topology": "full", "balance_coeff": 1.0, **changes}
    done = by_torchrun(corpus, tmp_path / "two", 2, **settings)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training depth") == 1, "one process speaks"
    assert run(corpus, tmp_path / "one", **settings) == 0
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    # A sum in another order may send a token near a tie elsewhere, so later steps are compared loosely.
    assert two[1]["train_nats"] == pytest.approx(one[1]["train_nats"], rel=1e-5)
    assert two[-1]["train_nats"] == pytest.approx(one[-1]["train_nats"], rel=1e-3)
    assert two[0]["load_over_exposure"] == pytest.approx(one[0]["load_over_exposure"], abs=1e-6)
    mine, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    gap = max((mine[name] - theirs[name]).abs().mean().item() for name in mine)
    assert gap < 1e-3


def test_rows_that_cannot_be_shared_are_refused(corpus, tmp_path):
    done = by_torchrun(corpus, tmp_path / "out", 3)
    assert done.returncode != 0
    assert "batch_tokens=128: cannot be cut evenly for 3 processes" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train(corpus, tmp_path):
    done = by_torchrun(corpus, tmp_path / "gpus", 2, device="cuda")
    assert done.returncode == 0, done.stderr
    assert run(corpus, tmp_path / "one", device="cuda") == 0
    assert metrics(tmp_path / "gpus")[0]["train_nats"] == pytest.approx(
        metrics(tmp_path / "one")[0]["train_nats"], rel=1e-2
    )
