"""Shared ground: a prepared corpus, and a folder in which whole searches run on the byte-pair trainer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
BIGRAM = Path(__file__).with_name("bigram_trainer.py")

BIGRAM_SPACE = """
name = "pairs"
trainer = "bigram_trainer.py"

[metric]
context = 64
eval_bytes = 8192

[baseline]
sharpness = 0.7
smoothing = 1.0
label = 0
behave = "well"

[params.sharpness]
kind = "float"
low = 0.2
high = 1.4

[params.smoothing]
kind = "float"
low = 0.1
high = 10.0
log = true

[[rungs]]
depth = 1
tokens = 20_000
seeds = 8
timeout_seconds = 20
memory_mib = 600

[[rungs]]
depth = 2
tokens = 20_000
seeds = 3
timeout_seconds = 20
memory_mib = 600

[budget]
hours = 1.0
trials = 60

[proposers]
random = 1.0
"""

# The same examples on every machine, slow or fast: a new one belongs in a change of its own.
settings.register_profile("steady", derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus cache of the whole test session; the user's own is left alone."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["MOUE_CACHE"] = str(folder)
    return folder


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the byte-pair trainer and its space file; the current directory."""
    shutil.copy(BIGRAM, tmp_path)
    (tmp_path / "pairs.toml").write_text(BIGRAM_SPACE)
    monkeypatch.chdir(tmp_path)
    return tmp_path
