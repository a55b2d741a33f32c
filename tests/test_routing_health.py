"""What the metrics and --describe say of routing, against brute force; guards; the coordinate check.

pytest tests/test_routing_health.py
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train_small import awake, corpus, metrics, one_thread, run, some_tokens, tiny

import train_small as ts
from train_small import resolve

__all__ = ["corpus", "one_thread"]  # fixtures


def watched_step(**changes) -> tuple[ts.GPT, ts.Step, list[list[set[int]]]]:
    """A model, one step of it, and the stored experts of every layer and token, read off its own routing."""
    model = awake(tiny(**changes))
    trainer = ts.Trainer(model)
    tokens = some_tokens(4)
    with torch.no_grad():
        routings = model.trace(tokens, ts.ramp_offset(model.config, model.edges_LS, 0.0, 0)).routings
    visible = [row.nonzero().flatten().tolist() for row in model.edges_LS]
    used = [
        [{seen[e] for e in choice} for choice in r.choice_NK.tolist()]
        for seen, r in zip(visible, routings, strict=True)
    ]
    return model, trainer.step(tokens, tokens, 0, watch=True), used


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 3, "window": 6, "stride": 3},
        {"depth": 4, "num_local": 0, "num_universal": 8, "topology": "full", "top_k": 3},
        {"depth": 3, "topology": "none", "num_local": 4},
        {"depth": 4, "ramp": "random"},
        {"depth": 4, "num_local": 0, "num_universal": 8, "window": 4, "stride": 4, "recursion": 2},
    ],
    ids=["ring", "full", "moe", "ramp", "recursion"],
)
def test_health_is_what_counting_finds(changes):
    model, result, used = watched_step(**changes)
    health = ts.routing_health(model, result)
    top_k, depth, num_tokens = model.config.top_k, model.config.depth, 128
    counts_LS = np.zeros(model.edges_LS.shape)
    for layer, tokens in enumerate(used):
        for experts in tokens:
            assert len(experts) == top_k
            counts_LS[layer, list(experts)] += 1
    load_LS = counts_LS / (top_k * num_tokens)
    open_LS = result.open_LS.numpy()
    exposure_S = (open_LS / open_LS.sum(1, keepdims=True)).sum(0)
    ratio_S = [load / e if e else -1.0 for load, e in zip(load_LS.sum(0), exposure_S, strict=True)]
    assert health["load_over_exposure"] == pytest.approx(ratio_S, rel=1e-5)
    reached = [r for r in ratio_S if r >= 0]
    assert health["max_over_exposure"] == pytest.approx(max(reached), rel=1e-5)
    assert health["p5_over_exposure"] == pytest.approx(np.quantile(reached, 0.05), rel=1e-5)
    assert health["dead_experts"] == sum(r < 0.1 for r in reached)
    assert health["saturated_experts"] == sum(r > 4 for r in reached)
    pool = load_LS[:, depth * model.config.num_local :].sum() / depth
    assert health["pool_share"] == pytest.approx(pool, abs=1e-6)
    reuse = [
        sum(len(used[n][t] & set().union(*(used[m][t] for m in range(n)))) for t in range(num_tokens))
        for n in range(depth)
    ]
    assert health["reuse"] == pytest.approx([r / (num_tokens * top_k) for r in reuse], abs=1e-6)
    distinct = sum(len(set().union(*(used[n][t] for n in range(depth)))) for t in range(num_tokens))
    assert health["distinct_experts"] == pytest.approx(distinct / (num_tokens * top_k * depth), abs=1e-6)
    for key in ("entropy", "max_load", "logit_max", "reuse", "residual_rms"):
        assert len(health[key]) == depth and all(math.isfinite(x) for x in health[key])


def test_reuse_by_chance_is_what_dice_give():
    config = resolve(tiny(depth=4, num_local=2, window=4, stride=2))
    edges_LS = ts.connectivity(config)
    rng, repeated, num_draws = np.random.default_rng(0), np.zeros(4), 4000
    for _ in range(num_draws):
        before: set[int] = set()
        for layer in range(4):
            chosen = set(rng.choice(np.flatnonzero(edges_LS[layer]), config.top_k, replace=False).tolist())
            repeated[layer] += len(chosen & before)
            before |= chosen
    assert ts.describe(config)["reuse_uniform"] == pytest.approx(repeated / num_draws / 2, abs=0.02)


def test_what_crosses_a_pipeline_stage_by_hand():
    """Two stages of one layer, pool of 4 seen whole by both: each place lives in stage 0 (a tie), so only the
    second layer sends, its 4 of 6 experts."""
    shared = tiny(num_local=2, num_universal=4, topology="full", stages=2)
    facts = ts.describe(shared)
    assert facts["cross_stage_share"] == pytest.approx(4 / 6 / 2)
    sent_assignments = 2 * 4 / 6  # top_k times the share, in the layer that sends
    assert facts["cross_stage_bytes_per_token"] == round(sent_assignments * 32 * 2 * 4)
    for inside in ({"stages": 1}, {"stage_sharing": "within", "topology": "ring"}):
        facts = ts.describe(replace(shared, **inside))
        assert facts["cross_stage_share"] == facts["cross_stage_bytes_per_token"] == 0


def test_sharing_within_stages_is_two_models_side_by_side():
    within = ts.connectivity(tiny(depth=4, num_local=2, stages=2, stage_sharing="within", window=3, stride=1))
    half = ts.connectivity(tiny(depth=2, num_local=2, window=3, stride=1))
    for stage in range(2):
        rows = slice(2 * stage, 2 * stage + 2)
        assert within[rows, 8 + 4 * stage : 12 + 4 * stage].equal(half[:, 4:])
        assert within[rows, 8:].sum() == half[:, 4:].sum()


def test_untied_layers_share_nothing_and_see_what_the_matched_mixture_sees():
    config = resolve(tiny(depth=5, num_local=1, untied_first=1, untied_last=2, window=4))
    edges_LS = ts.connectivity(config)
    for layer in (0, 3, 4):
        row = edges_LS[layer]
        assert row.sum() == config.num_experts
        assert edges_LS[:, row].sum(0).max() == 1
    assert edges_LS[1:3, 5:].sum(0).max() == 2
    assert config.num_universal + 5 == 5 * config.num_experts


def test_a_fading_bias_goes_to_zero_and_keeps_every_edge_open():
    config = resolve(tiny(depth=4, num_local=2, ramp="bias", edge_bias=8.0, ramp_start=0.2, ramp_end=0.6))
    edges_LS = ts.connectivity(config)
    for progress, bias in ((0.0, -8.0), (0.2, -8.0), (0.3, -6.0), (0.5, -2.0)):
        offset_LS = ts.ramp_offset(config, edges_LS, progress, 0)
        assert offset_LS.unique().tolist() == pytest.approx([bias, 0.0])
        assert not offset_LS[~edges_LS].any() and not offset_LS[:, :8].any()
    assert ts.ramp_offset(config, edges_LS, 0.6, 0) is None


def test_a_ramp_over_its_own_experts_needs_no_pool():
    config = resolve(tiny(topology="none", num_local=4, ramp="random", ramp_keep=0.5, ramp_end=0.9))
    edges_LS = ts.connectivity(config)
    closed_LS = ts.ramp_offset(config, edges_LS, 0.0, 0)
    assert (edges_LS & (closed_LS == 0)).sum(1).tolist() == [2, 2]
    half_LS = ts.ramp_offset(config, edges_LS, 0.05 + 0.85 / 2, 0)
    assert (edges_LS & (half_LS == 0)).sum(1).tolist() == [3, 3]
    assert resolve(tiny(topology="none", num_local=4, ramp="random")).ramp == "none", "nothing to ramp"


def test_too_many_dead_experts_exit_4_only_when_asked(corpus, tmp_path, capsys):
    long = {"tokens": 128 * 80, "balance": "none", "log_every": 100, "collapse_limit": 0}
    long |= {"num_experts": 32, "num_local": 16, "top_k": 1}
    assert run(corpus, tmp_path / "a", dead_limit=0.0, **long) == 4
    assert "dead_limit=0" in capsys.readouterr().err
    assert not (tmp_path / "a" / "checkpoint.pt").exists()
    assert run(corpus, tmp_path / "b", **long) == 0
    assert metrics(tmp_path / "b")[-1]["dead_experts"] > 0


def test_metrics_are_json_numbers_even_where_no_edge_leads(corpus, tmp_path):
    settings = {"depth": 4, "num_local": 2, "ramp": "random", "keep_home": False, "stride": 3, "log_every": 1}
    assert run(corpus, tmp_path, **settings) == 0
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(text))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_activations_move_alike_at_every_width(corpus, optimizer):
    """The coordinate check of muP in small; bench/coordinates.py is the whole of it."""
    widths, sizes = (32, 64, 128, 256), {"stream": [], "logits": [], "router": []}
    for width in widths:
        config = resolve(
            tiny(
                model_dim=width,
                expert_dim=width,
                tokens=512 * 20,
                batch_tokens=512,
                warmup=0.0,
                optimizer=optimizer,
                corpus=str(corpus),
            )
        )
        trainer, rows = ts.Trainer(ts.GPT(config)), ts.load_rows(config)
        probe = rows.batch(100)[0]
        with torch.no_grad():
            before = trainer.model.trace(probe)
        for step in range(4):
            trainer.step(*rows.batch(step), step)
        with torch.no_grad():
            after = trainer.model.trace(probe, watch=True)
        moved = [b.logits_NE - a.logits_NE for a, b in zip(before.routings, after.routings, strict=True)]
        sizes["stream"].append(after.residual_rms_L[-1].item())
        sizes["logits"].append((after.logits_BTV - before.logits_BTV).square().mean().sqrt().item())
        sizes["router"].append(torch.stack(moved).square().mean().sqrt().item())
    for name, values in sizes.items():
        slope = np.polyfit(np.log(widths), np.log(values), 1)[0]
        assert abs(slope) < 0.35, (name, values, slope)
