"""The benches measure what they say: rivals compute the same thing, verdicts read targets the right way round.

pytest tests/test_bench.py
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_small as ts

BENCH = Path(__file__).parent.parent / "bench"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    return load("trainer")


def gradients(model: ts.GPT, tokens_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    trace = model.trace(tokens_BT)
    (trace.logits_BTV.logsumexp(-1).mean() + sum(r.zloss for r in trace.routings)).backward()
    return {"logits": trace.logits_BTV.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_naive_loop_computes_what_the_trainer_does(bench, top_k):
    shape = {"depth": 3, "model_dim": 32, "expert_dim": 32, "seq_len": 16, "tokens": 10**6, "top_k": top_k}
    model = ts.GPT(ts.TrainConfig(**bench.moue(shape)))
    torch.manual_seed(0)
    with torch.no_grad():  # what is born at zero would hide most gradients
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))
    tokens_BT = torch.randint(0, 256, (4, 16))
    wanted = gradients(model, tokens_BT)
    bench.make_naive(model)
    found = gradients(model, tokens_BT)
    assert all(value.abs().max() > 0 for value in found.values())
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item(), msg=name
        )


def test_rivals_do_equal_active_flops(bench):
    for shape in bench.SHAPES["cpu"].values():
        dense, *others = (
            ts.flops_per_token(ts.TrainConfig(**settings))
            for settings in (shape | {"ffn": "dense"}, bench.moe(shape), bench.moue(shape))
        )
        assert others[0] == others[1]
        router = 6 * shape["depth"] * shape["model_dim"] * shape.get("num_experts", 8)
        assert others[0] == dense + router


def test_a_verdict_knows_which_way_is_better(bench):
    speed, start = "MoUE speed / dense", "start, fork server"
    values = [
        (speed, "d=128", 0.95),
        (speed, "d=128", 0.85),
        (start, "", 0.05),
        (start, "", 0.2),
        (speed, "E=32", 2),
    ]
    figures = [bench.figure(name, at, [value]) for name, at, value in values]
    assert [f.met for f in figures] == [True, False, True, False, None]
    lines = bench.table(figures).splitlines()[1:]
    assert ["MISSED" in line for line in lines] == [False, True, False, True, False]


def test_every_target_is_of_a_figure_and_a_shape_that_exist(bench):
    shapes = {at for shapes in bench.SHAPES.values() for at in shapes} | {""}
    assert {at for targets in bench.TARGETS.values() for at in targets} <= shapes
    written = json.loads((BENCH / "results" / "trainer_cpu.json").read_text())["figures"]
    on_cuda = {name for name in bench.TARGETS if name.startswith(("MFU", "host syncs"))}
    assert bench.TARGETS.keys() - on_cuda <= {figure["name"] for figure in written}


def test_all_take_equal_turns_and_each_begins_in_turn(bench):
    calls = []
    rivals = {name: bench.Rival(lambda name=name: calls.append(name)) for name in "abc"}
    seconds = bench.take_turns(rivals, "cpu", 3)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(calls[6:]) == "abcbcacab"


def test_the_coordinate_check_sees_a_wrong_rule(monkeypatch, capsys):
    coordinates = load("coordinates")
    monkeypatch.setattr(coordinates, "WIDTHS", (32, 64, 128))
    monkeypatch.setattr(coordinates, "STEPS", (0, 4))
    monkeypatch.setattr(coordinates, "MAX_SLOPE", 0.35)  # narrow models are noisier
    base = replace(ts.TrainConfig(), optimizer="adamw")
    assert coordinates.check(base, 1)
    monkeypatch.setitem(ts.WIDTH_POWER, "matrix", 0.0)
    monkeypatch.setitem(ts.WIDTH_POWER, "head", 0.0)
    assert not coordinates.check(base, 1)
    assert "NOT O(1)" in capsys.readouterr().out
