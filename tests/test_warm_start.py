"""--from: going on, making a pool of a MoE's experts, adding layers; and a killed run that takes itself up.

pytest tests/test_warm_start.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_train_small import (
    TINY,
    TRAINER,
    awake,
    corpus,
    metrics,
    one_thread,
    run,
    some_tokens,
    tiny,
    weights,
)

import train_small as ts
from train_small import GPT, resolve

__all__ = ["corpus", "one_thread"]  # fixtures
MOE = {"topology": "none", "num_local": 4, "depth": 4}
POOLED = {"topology": "ring", "num_local": 2, "window": 4, "stride": 2, "depth": 4}


def saved(model: GPT, usage_LS: torch.Tensor | None = None, tokens: int = 0) -> dict:
    usage_LS = torch.rand(model.edges_LS.shape) * model.edges_LS if usage_LS is None else usage_LS
    return {"config": model.config, "model": model.state_dict(), "usage": usage_LS, "tokens": tokens}


def closed_logits(model: GPT, kept_LS: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
    config = replace(model.config, ramp="random", ramp_start=0.1, ramp_end=0.5)
    return model.trace(tokens_BT, ts.ramp_offset(config, model.edges_LS, 0.0, 0, kept_LS)).logits_BTV


KEPT = [("linear", r) for r in ("linear", "gru", "logit_residual", "ema")]
KEPT += [(r, r) for r in ("norm", "mlp", "ema", "gru")]


@pytest.mark.parametrize("pick", ["random", "most_used", "least_used"])
@pytest.mark.parametrize(
    "old, router, rows",
    [
        (*pair, rows)
        for pair in KEPT
        for rows in ("zero", "home")
        if (*pair, rows) != ("norm", "norm", "zero")
    ],
)
def test_a_mixture_becomes_a_pool_without_moving_a_logit(pick, rows, old, router):
    source, tokens = awake(tiny(**MOE, num_shared=1, router=old)), some_tokens(4)
    target = GPT(tiny(**POOLED, num_shared=1, convert_pick=pick, convert_rows=rows, router=router))
    usage_LS = torch.rand(source.edges_LS.shape) * source.edges_LS
    kept_LS = ts.warm_start(target, saved(source, usage_LS))
    wanted = source(tokens)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(closed_logits(target, kept_LS, tokens), wanted, rtol=0, atol=1e-5)
    assert (target(tokens) - wanted).abs().max() > 1e-3, "open edges change the model"
    assert kept_LS.sum(1).tolist() == [4] * 4 and not (kept_LS & ~target.edges_LS).any()
    experts = {bytes(w.detach().numpy()) for w in source.bank("in", torch.float32)}
    assert {bytes(w.detach().numpy()) for w in target.bank("in", torch.float32)} == experts, (
        "none lost, none twice"
    )
    for layer in range(4):  # places 2l and 2l + 1 hold experts of layer l, the ones that were asked for
        own = {bytes(w.detach().numpy()): i for i, w in enumerate(source.local_in[4 * layer : 4 * layer + 4])}
        picked = [own[bytes(w.detach().numpy())] for w in target.pool_in[2 * layer : 2 * layer + 2]]
        order = usage_LS[layer, 4 * layer : 4 * layer + 4].argsort().tolist()
        wanted_two = {"most_used": order[2:], "least_used": order[:2], "random": picked}[pick]
        assert sorted(wanted_two) == picked
    new_rows = target.blocks[1].moe.router[:, ~kept_LS[1][target.edges_LS[1]]]
    if rows == "zero":
        assert new_rows.abs().max() == 0
    else:
        length = source.blocks[1].moe.router.norm(dim=0).mean()
        torch.testing.assert_close(new_rows.norm(dim=0), length.expand(new_rows.shape[1]))


def test_random_picks_follow_the_seed_and_are_stratified():
    picks = []
    for seed in (0, 0, 1):
        target = GPT(tiny(**POOLED, seed=seed))
        ts.warm_start(target, saved(awake(tiny(**MOE))))
        picks.append(target.pool_in.detach().clone())
    assert picks[0].equal(picks[1]) and not picks[0].equal(picks[2])


@pytest.mark.parametrize(
    "shape",
    [
        {"num_local": 2, "num_universal": 4, "window": 4, "topology": "full"},
        {"num_local": 0, "num_universal": 8, "topology": "full", "router": "mlp", "balance": "bias"},
        {"num_local": 4, "num_universal": 0, "topology": "none", "num_shared": 1},
        {"ffn": "dense"},
    ],
    ids=["full", "pool only", "moe", "dense"],
)
@pytest.mark.parametrize("depth", [3, 4, 6])
def test_added_layers_change_nothing_at_first(shape, depth):
    source, tokens = awake(tiny(**shape, layer_gate=True)), some_tokens(4)
    target = GPT(tiny(**{**shape, "depth": depth, "layer_gate": True}))
    ts.warm_start(target, saved(source))
    torch.testing.assert_close(target(tokens), source(tokens), rtol=0, atol=1e-5)
    if target.layer_gate is not None and source.config.ffn == "moe":
        assert target.layer_gate.tolist().count(0.0) == depth - 2
    F.cross_entropy(target(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert all(block.attention.out.grad.abs().max() > 0 for block in target.blocks), "new layers can learn"


def test_a_doubled_ring_keeps_its_windows():
    ring = {"num_local": 0, "num_universal": 8, "window": 4, "stride": 4, "layer_gate": True}
    source, tokens = awake(tiny(**ring, depth=2)), some_tokens(4)
    target = GPT(tiny(**ring, depth=4, layers_per_window=2))
    kept_LS = ts.warm_start(target, saved(source))
    assert kept_LS.equal(target.edges_LS)
    torch.testing.assert_close(target(tokens), source(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_dim": 64}, ["model_dim=64", "32"]),
        ({"depth": 2}, ["depth=2", "4 layers"]),
        ({"num_local": 1, "num_universal": 16, "window": 8, "stride": 4}, ["num_universal=16", "4"]),
        ({"stride": 3}, ["keep_home"]),
        ({"depth": 8, "num_universal": 16}, ["first convert"]),
        ({"top_k": 1}, ["top_k=1", "2"]),
        ({"gate": "sigmoid"}, ["gate='sigmoid'", "softmax"]),
        ({"router": "norm"}, ["router='norm'", "linear"]),
        ({"router": "mlp"}, ["router='mlp'", "linear"]),
    ],
    ids=str,
)
def test_what_cannot_be_converted_is_refused(changes, words):
    target = GPT(tiny(**{**POOLED, "layer_gate": True, **changes}))
    with pytest.raises(ts.Mistake) as error:
        ts.warm_start(target, saved(awake(tiny(**MOE))))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("had", "changes", "word"),
    [
        ({"router": "gru"}, {"router": "gru", "router_feedback": False}, "router_feedback"),
        ({"router": "gru"}, {"router": "gru", "depth": 8}, "depth"),
        ({"router": "gru"}, {}, "router"),
        ({"layer_gate": True}, {}, "layer_gate"),
        ({"depth_embedding": True}, {}, "depth_embedding"),
        ({"balance": "bias"}, {}, "balance"),
        ({"router": "norm"}, {**POOLED, "router": "norm"}, "convert_rows"),
    ],
    ids=str,
)
def test_nothing_the_source_had_is_dropped(had, changes, word):
    with pytest.raises(ts.Mistake, match=word):
        ts.warm_start(GPT(tiny(**{**MOE, **changes})), saved(awake(tiny(**MOE, **had))))


@pytest.mark.parametrize(
    "extra", [{"depth_embedding": True, "layer_gate": True, "balance": "bias"}, {"router": "ema"}]
)
def test_the_same_model_goes_on_as_it_was(extra):
    source, tokens = awake(tiny(**POOLED, **extra)), some_tokens(4)
    target = GPT(tiny(**POOLED, **extra, seed=9))
    kept_LS = ts.warm_start(target, saved(source))
    assert kept_LS.equal(target.edges_LS) and target(tokens).equal(source(tokens))
    assert all(target.state_dict()[name].equal(value) for name, value in source.state_dict().items())


def test_keep_home_makes_any_stride_convertible():
    source, tokens = awake(tiny(**MOE)), some_tokens(2)
    target = GPT(tiny(**{**POOLED, "stride": 3, "keep_home": True}))
    kept_LS = ts.warm_start(target, saved(source))
    torch.testing.assert_close(closed_logits(target, kept_LS, tokens), source(tokens), rtol=0, atol=1e-5)


def test_a_whole_conversion_from_the_command_line(corpus, tmp_path):
    assert run(corpus, tmp_path / "moe", **MOE) == 0
    checkpoint = str(tmp_path / "moe" / "checkpoint.pt")
    words = [f"{k}={v}" for k, v in {**TINY, **POOLED, "ramp": "random", "corpus": corpus}.items()]
    assert ts.main([*words, "--from", checkpoint, "--out", str(tmp_path / "moue")]) == 0
    first, last = (metrics(tmp_path / name) for name in ("moe", "moue"))
    assert last[0]["train_nats"] < first[0]["train_nats"] - 0.3, "it goes on from what the source knew"
    assert torch.load(tmp_path / "moue" / "checkpoint.pt", weights_only=True)["tokens"] == 2 * 1280
    assert torch.load(checkpoint, weights_only=True)["usage"].sum().item() > 0


def test_a_run_that_goes_on_reads_the_rows_after_its_sources(corpus):
    config = resolve(tiny(corpus=str(corpus)))
    first, later = ts.load_rows(config), ts.load_rows(config, first_row=8)
    assert first.batch(2)[1].equal(later.batch(0)[1])


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_file_that_is_no_checkpoint_is_one_line(content, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    if content is not None:
        path.write_bytes(content)
    assert ts.main(["--from", str(path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


# Dies by SIGKILL between two saved states, a few lines of metrics after the last.
DYING = """
import os, signal, sys
import train_small as ts
step = ts.Trainer.step
def dying(self, inputs, targets, number, **options):
    if number == 29:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, inputs, targets, number, **options)
ts.Trainer.step = dying
ts.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "changes",
    [
        {"ramp": "random", "balance_batch": "lagged", "ramp_end": 0.9},
        {"optimizer": "adamw", "balance": "bias"},
        {"from": True, **POOLED, "ramp": "distance", "ramp_end": 0.9, "keep_home": True, "stride": 3},
    ],
    ids=str,
)
def test_a_killed_run_ends_as_if_nothing_had_happened(changes, corpus, tmp_path):
    options, changes = [], dict(changes)
    if changes.pop("from", False):
        assert run(corpus, tmp_path / "moe", **MOE) == 0
        options = ["--from", str(tmp_path / "moe" / "checkpoint.pt")]
    settings = {
        **TINY,
        "tokens": 128 * 60,
        "corpus": str(corpus),
        "log_every": 7,
        "save_every": 10,
        **changes,
    }
    words = [*(f"{key}={value}" for key, value in settings.items()), *options]
    assert ts.main([*words, "--out", str(tmp_path / "whole")]) == 0
    environment = {**os.environ, "PYTHONPATH": str(TRAINER.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DYING, *words, "--out", str(tmp_path / "killed")]
    assert subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    state = tmp_path / "killed" / "state.pt"
    assert torch.load(state, weights_only=True)["step"] == 20
    assert metrics(tmp_path / "killed")[-1]["step"] == 28, "lines after the state are there to be dropped"
    assert ts.main([*words, "--out", str(tmp_path / "killed")]) == 0
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(one[name].equal(two[name]) for name in one)
    usages = [torch.load(tmp_path / name / "checkpoint.pt")["usage"] for name in ("whole", "killed")]
    assert usages[0].equal(usages[1])
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    assert not state.exists()


def test_the_state_of_another_run_is_refused(corpus, tmp_path, capsys):
    words = [f"{key}={value}" for key, value in {**TINY, "corpus": corpus, "save_every": 1}.items()]
    trainer = ts.Trainer(GPT(tiny(seed=5)))
    ts.save(
        tmp_path / "state.pt",
        trainer.state() | {"identity": {}, "step": 3, "seconds": 1.0, "nats": [], "checks": []},
    )
    assert ts.main([*words, "--out", str(tmp_path)]) == 2
    assert "another run" in capsys.readouterr().err.splitlines()[-1]
    assert Path(tmp_path / "state.pt").exists()


def test_a_state_goes_with_its_source_and_a_torn_one_is_one_line(corpus, tmp_path, capsys):
    assert run(corpus, tmp_path / "moe", **MOE) == 0
    words = [f"{k}={v}" for k, v in {**TINY, **MOE, "corpus": corpus, "save_every": 1}.items()]
    out, options = tmp_path / "out", ["--from", str(tmp_path / "moe" / "checkpoint.pt")]
    subprocess.run(
        [sys.executable, "-c", DYING.replace("29", "5"), *words, *options, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(TRAINER.parent)},
        stderr=subprocess.DEVNULL,
    )
    assert (out / "state.pt").exists()
    assert ts.main([*words, "--out", str(out)]) == 2
    assert "another run" in capsys.readouterr().err
    (out / "state.pt").write_bytes((out / "state.pt").read_bytes()[:5000])
    assert ts.main([*words, *options, "--out", str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"train_small.py: --out {out}: cannot be used")


def test_a_failed_run_leaves_no_checkpoint_of_the_one_before(corpus, tmp_path):
    assert run(corpus, tmp_path) == 0 and (tmp_path / "checkpoint.pt").exists()
    assert run(corpus, tmp_path, matrix_lr=90, embed_lr=90, head_lr=90, tokens=6400) == 3
    assert not (tmp_path / "checkpoint.pt").exists()
