"""The trainer against references that share no code with it: loops, float64, brute force, other processes."""

import argparse
import ast
import bisect
import dataclasses
import difflib
import functools
import json
import math
import os
import random
import resource
import string
import struct
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import train_small as ts
from harness.judge.corpus import load_train, prepare
from train_small import GPT, TrainConfig, resolve

TRAINER = Path(ts.__file__)
TINY = {"depth": 2, "model_dim": 32, "head_dim": 16, "expert_dim": 32, "seq_len": 32, "tokens": 1280}
TINY |= {"num_experts": 4, "batch_tokens": 128, "log_every": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    yield
    torch.set_flush_denormal(False)  # a training turns it on for the whole process, which other tests share


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Real prose and code, prepared by the judge: Python's own modules, long and short, a document each."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("corpus") / "prepared"
    for module in (
        argparse,
        ast,
        bisect,
        dataclasses,
        difflib,
        functools,
        json,
        os,
        random,
        string,
        subprocess,
    ):
        (source / f"{module.__name__}.txt").write_text(Path(module.__file__).read_text())
    for number in range(12):
        (source / f"short{number}.txt").write_text(f"A document of a few words, number {number}.")
    prepare(str(source), folder)
    return folder


def tiny(**changes) -> TrainConfig:
    return TrainConfig(**{**TINY, **changes})


def awake(config: TrainConfig) -> GPT:
    """A model whose parameters born as constants are random, so that every part moves the logits."""
    model = GPT(config)
    stream = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("out") or name == "head":
                param.normal_(std=0.3, generator=stream)
            elif name.rpartition(".")[2] in ts.BORN:
                param.add_(torch.empty_like(param).normal_(std=0.3, generator=stream))
        if model.balance_bias is not None:
            model.balance_bias.normal_(std=0.3, generator=stream)
    return model


def some_tokens(rows=2, width=32, seed=3) -> torch.Tensor:
    return torch.randint(0, 257, (rows, width), generator=torch.Generator().manual_seed(seed))


def run(corpus: Path, out: Path, *words: str, **changes) -> int:
    items = [f"{k}={v}" for k, v in {**TINY, **changes, "corpus": corpus}.items()]
    return ts.main([*items, "--out", str(out), *words])


def metrics(out: Path, *, timed: bool = False) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines if timed else [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


# --- topology ---------------------------------------------------------------------------------------------


def ring_by_hand(depth, local, pool, window, stride, group):
    edges = np.zeros((depth, depth * local + pool), dtype=bool)
    for layer in range(depth):
        for i in range(local):
            edges[layer, layer * local + i] = True
        for j in range(pool):
            edges[layer, depth * local + j] = (j - stride * (layer // group)) % pool < window
    return edges


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 24), st.data())
def test_ring_is_the_formula_and_reaches_evenly_when_the_rule_says_so(depth, group, pool, data):
    window, stride = data.draw(st.integers(1, pool)), data.draw(st.integers(1, pool))
    group = min(group, depth)
    config = tiny(
        depth=depth,
        num_local=2,
        num_universal=pool,
        window=window,
        stride=stride,
        layers_per_window=group,
    )
    expected = ring_by_hand(depth, 2, pool, window, stride, group)
    if not expected.any(0).all():
        with pytest.raises(ValueError, match="seen by no layer"):
            resolve(config)
        return
    assert np.array_equal(ts.connectivity(config).numpy(), expected)
    step = math.gcd(stride, pool)
    if depth % group == 0 and (depth // group) % (pool // step) == 0 and window % step == 0:
        assert set(expected[:, 2 * depth :].sum(0)) == {depth * window // pool}


def pool_part(**changes) -> np.ndarray:
    config = resolve(tiny(**changes))
    return ts.connectivity(config)[:, config.depth * config.num_local :].numpy()


def test_clip_holds_the_last_windows_at_the_end_and_unwrapped_windows_are_cut():
    shape = {"depth": 4, "num_experts": 8, "num_local": 4, "num_universal": 10, "window": 6, "stride": 3}
    starts = [np.flatnonzero(row)[[0, -1]].tolist() for row in pool_part(topology="clip", **shape)]
    assert starts == [[0, 5], [3, 8], [4, 9], [4, 9]]
    cut = [np.flatnonzero(row).tolist() for row in pool_part(wrap=False, **shape)]
    assert cut == [[0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8], [6, 7, 8, 9], [9]]
    assert ts.exposure(ts.connectivity(tiny(wrap=False, **shape))).sum() == pytest.approx(4)


def test_blocks_full_and_random():
    blocks = pool_part(topology="blocks", depth=4, layers_per_window=2, num_experts=4)
    assert np.array_equal(blocks, np.kron([[1, 0], [1, 0], [0, 1], [0, 1]], np.ones((1, 4), dtype=bool)))
    assert pool_part(topology="full", depth=3, num_universal=6, num_local=2).all()
    for window in (3, 4, 5):
        dealt = pool_part(
            topology="random", depth=5, num_experts=8, num_local=4, num_universal=12, window=window
        )
        assert set(dealt.sum(1)) == {window}
        assert dealt.sum(0).max() - dealt.sum(0).min() == (0 if 5 * window % 12 == 0 else 1)


@pytest.mark.parametrize("depth", range(1, 13))
def test_the_default_budget_holds_at_every_depth(depth):
    for local in (-1, 6):
        config = resolve(TrainConfig(depth=depth, num_local=local))
        assert depth * config.num_local + config.num_universal == depth * config.num_experts
        expert = 2 * config.model_dim * config.expert_dim
        assert ts.count_params(config)["unique_experts"] == depth * config.num_experts * expert
        assert resolve(config) == config


def is_open(offset_LS: torch.Tensor, edges_LS: torch.Tensor) -> torch.Tensor:
    assert set(offset_LS.unique().tolist()) <= {0.0, -math.inf}
    return edges_LS & (offset_LS == 0)


def test_ramp_opens_exactly_the_edges_it_should():
    config = resolve(
        tiny(
            depth=4,
            num_local=2,
            window=8,
            stride=2,
            topology="ring",
            ramp="distance",
            ramp_start=0.2,
            ramp_end=0.6,
        )
    )
    edges = ts.connectivity(config)
    home = torch.arange(8) // 2
    layers = torch.arange(4)[:, None]
    for progress in (0.0, 0.2, 0.3, 0.5, 0.59):
        opened = is_open(ts.ramp_offset(config, edges, progress, 5), edges)
        assert not (opened & ~edges).any()
        assert opened[:, :8].equal(edges[:, :8])
        assert opened[:, 8:][home == layers].all()
        share = max(0.0, (progress - 0.2) / 0.4)
        assert opened[:, 8:].sum(1).tolist() == [2 + int(share * 6 + 1e-9)] * 4
        farthest_open = ((home - layers).abs() * opened[:, 8:]).amax(1)
        nearest_closed = ((home - layers).abs() + 99 * opened[:, 8:]).amin(1)
        assert (farthest_open <= nearest_closed).all()
    assert ts.ramp_offset(config, edges, 0.6, 5) is None
    drawn = replace(config, ramp="random")
    one, again, later = (is_open(ts.ramp_offset(drawn, edges, 0.4, step), edges) for step in (5, 5, 6))
    assert one.equal(again) and not one.equal(later)
    assert not one.equal(is_open(ts.ramp_offset(replace(drawn, seed=1), edges, 0.4, 5), edges))
    assert one[:, 8:].sum(1).tolist() == [5] * 4


def test_closed_edges_get_no_traffic_no_probability_and_no_gradient():
    config = tiny(depth=4, num_local=2, ramp="random")
    model = awake(config)
    offset = ts.ramp_offset(model.config, model.edges_LS, 0.0, 0)
    opened = is_open(offset, model.edges_LS)
    logits, routings, _ = model.trace(some_tokens(4), offset)
    (logits.square().mean() + sum(r.prob_E.square().sum() + r.zloss for r in routings)).backward()
    for layer, routing in enumerate(routings):
        closed = ~opened[layer][model.edges_LS[layer]]
        assert closed.any()
        assert routing.load_E[closed].sum() == 0 == routing.prob_E[closed].sum()
        assert model.blocks[layer].moe.router.grad[:, closed].abs().max() == 0
        assert routing.load_E.sum() == pytest.approx(1) and routing.prob_E.sum().item() == pytest.approx(1)


# --- balance ----------------------------------------------------------------------------------------------


def random_masks(seed: int, layers=5, stored=9) -> torch.Tensor:
    masks = torch.rand(layers, stored, generator=torch.Generator().manual_seed(seed)) < 0.5
    masks[:, 0] = True
    return masks


def random_shares(masks: torch.Tensor, seed: int) -> torch.Tensor:
    raw = torch.rand(masks.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * masks
    return raw / raw.sum(1, keepdim=True)


@pytest.mark.parametrize("power", [0, 1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_uelb_value_and_its_value_at_uniform_routing(seed, power):
    masks = random_masks(seed)
    load, prob = random_shares(masks, seed + 100), random_shares(masks, seed + 200)
    uniform = masks / masks.sum(1, keepdim=True).double()
    assert ts.uelb_loss(uniform, uniform, masks, 0.7, power).item() == pytest.approx(0.7, rel=1e-12)
    total = norm = 0.0
    for j in range(masks.shape[1]):
        seen = [layer for layer in range(masks.shape[0]) if masks[layer, j]]
        e = sum(1 / masks[layer].sum().item() for layer in seen)
        if seen:
            both = sum(load[layer, j].item() for layer in seen) * sum(prob[layer, j].item() for layer in seen)
            total, norm = total + e ** (power - 2) * both, norm + e**power
    assert ts.uelb_loss(load, prob, masks, 0.7, power).item() == pytest.approx(0.7 * total / norm, rel=1e-12)


def test_uelb_without_sharing_is_the_mean_of_layer_losses_and_with_all_sharing_the_pool_loss():
    private = torch.eye(4, dtype=torch.bool).repeat_interleave(3, dim=1)
    load, prob = random_shares(private, 1), random_shares(private, 2)
    by_layer = torch.stack([3 * (load[i] * prob[i]).sum() for i in range(4)]).mean()
    assert torch.isclose(ts.uelb_loss(load, prob, private, 0.5, 1), 0.5 * by_layer, rtol=1e-12)
    whole = torch.ones(4, 6, dtype=torch.bool)
    load, prob = random_shares(whole, 3), random_shares(whole, 4)
    for power in (0, 1, 2):
        pooled = 6 * (load.mean(0) * prob.mean(0)).sum()
        assert torch.isclose(ts.uelb_loss(load, prob, whole, 0.5, power), 0.5 * pooled, rtol=1e-12)


def test_balance_losses_by_hand():
    config = resolve(tiny(balance_coeff=0.5, num_local=2))
    edges = ts.connectivity(config)
    load, prob = random_shares(edges, 1), random_shares(edges, 2).requires_grad_()
    layer = sum(edges[i].sum() * (load[i] * prob[i]).sum() for i in range(2)) / 2
    assert torch.isclose(ts.balance_loss(replace(config, balance="layer"), load, prob, edges), 0.5 * layer)
    pooled = edges.shape[1] / 4 * (load.sum(0) * prob.sum(0)).sum()
    assert torch.isclose(ts.balance_loss(replace(config, balance="pool"), load, prob, edges), 0.5 * pooled)
    window = slice(4, None)
    inner = [x[:, window] / x[:, window].sum(1, keepdim=True) for x in (load, prob)]
    alone = ts.balance_loss(replace(config, balance_scope="pool_only"), load, prob, edges)
    assert torch.isclose(alone, ts.uelb_loss(*inner, edges[:, window], 0.5, 1))
    halved = prob.detach().clone()
    halved[:, window] /= 2  # leaving the pool as a whole must not pay
    assert torch.isclose(
        alone, ts.balance_loss(replace(config, balance_scope="pool_only"), load, halved, edges)
    )
    held = load.clone().requires_grad_()
    ts.balance_loss(config, held, prob, edges).backward()
    assert held.grad is None and prob.grad.abs().sum() > 0


# --- model ------------------------------------------------------------------------------------------------


def test_the_grouped_product_of_cuda_and_the_runs_of_the_cpu_are_one_function():
    """Both on the CPU here, so that what runs on a GPU is checked where there is none."""
    model, tokens, found = awake(tiny(num_shared=1, depth=3)), some_tokens(4), []
    for way in (ts.MoE.run_experts, ts.MoE.grouped_experts):
        for block in model.blocks:
            block.moe.run_experts = functools.partial(way, block.moe)
        model.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        found.append([loss.detach(), *(param.grad.clone() for param in model.parameters())])
    for one, two in zip(*found, strict=True):
        assert (one - two).abs().max() < 1e-5 * one.abs().max() + 1e-9


def test_a_pool_experts_gradient_is_the_sum_over_its_uses():
    shared = awake(tiny(num_local=0, num_universal=4, topology="full"))
    untied = GPT(tiny(num_local=4, num_universal=0))
    state = {k: v for k, v in shared.state_dict().items() if not k.startswith("pool")}
    state |= {f"local_{side}": getattr(shared, f"pool_{side}").repeat(2, 1, 1) for side in ("in", "out")}
    untied.load_state_dict(state)
    tokens = some_tokens(4)
    losses = [F.cross_entropy(m(tokens).flatten(0, 1), tokens.flatten()) for m in (shared, untied)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()
    for side in ("in", "out"):
        uses = getattr(untied, f"local_{side}").grad.unflatten(0, (2, 4))
        assert uses[0].abs().max() > 0 < uses[1].abs().max()
        torch.testing.assert_close(getattr(shared, f"pool_{side}").grad, uses.sum(0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("changes", [{}, {"ffn": "dense"}, {"top_k": 1, "num_shared": 1}])
def test_no_future_no_companions_no_memory(changes):
    model, tokens = awake(tiny(**changes)).eval(), some_tokens(4)
    with torch.inference_mode():
        logits = model(tokens)
        moved = tokens.clone()
        moved[:, 20:] = (moved[:, 20:] + 1) % 257
        other = model(moved)
        assert (
            (other[:, :20] - logits[:, :20]).abs().max() < 1e-5 < (other[:, 20:] - logits[:, 20:]).abs().max()
        )
        assert (model(tokens[2:3])[0] - logits[2]).abs().max() < 1e-5
        assert model(tokens).equal(logits)


def test_an_empty_pool_is_the_plain_mixture_bit_for_bit(corpus, tmp_path):
    plain, ways = tiny(topology="none"), [{"topology": t} for t in ts.TOPOLOGIES]
    ways.append({"window": 3, "stride": 2, "ramp": "random", "pool_lr_divisor": 0.5})
    for way in ways:
        assert resolve(tiny(num_universal=0, **way)) == resolve(plain)
    assert plain.num_experts == resolve(plain).num_local
    for out, way in (
        ("a", {"topology": "none"}),
        ("b", {"topology": "ring", "num_universal": 0, "window": 2}),
    ):
        assert run(corpus, tmp_path / out, **way) == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    one, two = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(one[name].equal(two[name]) for name in one | two)


def test_models_that_differ_in_one_part_start_equal_in_the_others():
    wide, narrow = (dict(GPT(tiny(num_experts=n)).named_parameters()) for n in (8, 4))
    same = {name for name in wide if wide[name].shape == narrow[name].shape}
    assert {"embed", "head", "blocks.1.attention.qkv"} <= same
    assert all(wide[name].equal(narrow[name]) for name in same)
    assert not GPT(tiny(seed=1)).embed.equal(wide["embed"])
    assert not wide["blocks.0.attention.qkv"].equal(wide["blocks.1.attention.qkv"])


# --- counting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"ffn": "dense"}, {"num_shared": 2, "wrap": False, "num_local": 2}, {"topology": "full"}]
)
def test_counted_parameters_are_those_of_the_model(changes):
    config = tiny(**changes)
    model = GPT(config)
    assert ts.count_params(config)["total"] == sum(p.numel() for p in model.parameters())
    banks = [p.numel() for name, p in model.named_parameters() if name.startswith(("local_", "pool_"))]
    assert ts.count_params(config)["unique_experts"] == sum(banks)


def test_active_parameters_and_flops_by_hand():
    # 3 layers of width 32, each sees 2 own + 4 of a pool of 6 experts (reach 2), uses 2 of them and 1 always-on.
    config = tiny(depth=3, num_local=2, num_universal=6, window=4, stride=2, num_shared=1)
    assert ts.connectivity(config).sum(0).tolist() == [1] * 6 + [2] * 6
    # A layer: attention 4*32*32, router 32*6, three experts of 2*32*32. Head: 257*32. Scores: 12*32*32 a layer.
    assert ts.count_params(config)["active"] == 3 * (4096 + 192 + 3 * 2048) + 8224 == 39_520
    assert ts.flops_per_token(config) == 6 * 39_520 + 3 * 12_288 == 273_984
    assert ts.count_params(config)["unique_experts"] == 12 * 2 * 32 * 32


def test_dense_and_mixture_of_equal_settings_have_equal_active_flops_but_for_the_router():
    moe, dense = tiny(num_shared=1), tiny(num_shared=1, ffn="dense")
    routers = 6 * 32 * int(ts.connectivity(moe).sum())
    assert ts.flops_per_token(moe) - ts.flops_per_token(dense) == routers


# --- optimizer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw"}, {"ffn": "dense"}, {"num_local": 0}])
def test_every_parameter_is_in_exactly_one_group(changes):
    model = GPT(tiny(**changes))
    grouped = [id(p) for group in ts.parameter_groups(model) for p in group.params]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_adamw_equals_its_definition():
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(5, 3))
    wanted, first, second = param.detach().double(), 0.0, 0.0
    optimizer = ts.AdamW([ts.Group("adamw", [param], 0.1, 0.3)])
    for step in range(1, 8):
        grad = torch.randn(5, 3)
        param.grad = grad.clone()
        rate = 0.5 if step % 2 else 1.0
        optimizer.step(rate)
        first, second = 0.9 * first + 0.1 * grad.double(), 0.95 * second + 0.05 * grad.double() ** 2
        wanted = wanted * (1 - 0.1 * rate * 0.3)
        corrected = (second / (1 - 0.95**step)).sqrt() + 1e-10
        wanted = wanted - 0.1 * rate * first / (1 - 0.9**step) / corrected
        torch.testing.assert_close(param.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 32, 48), (3, 48, 32), (2, 64, 64)])
def test_muon_moves_every_matrix_along_its_own_polar_factor(shape):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape).double(), full_matrices=False)
    sizes = torch.tensor([1e-3, 1.0, 1e3])[: shape[0], None] * torch.linspace(0.03, 1, min(shape[1:]))
    grads = (left * sizes[:, None] @ right).float()
    made = ts.orthogonalize(grads)
    assert (torch.linalg.svdvals(made.double()) - 1).abs().max() < 0.15
    assert ((made - left @ right).norm(dim=(1, 2)) / (left @ right).norm(dim=(1, 2))).max() < 0.15
    one, two = torch.nn.Parameter(torch.ones(shape)), torch.nn.Parameter(torch.ones(shape[1:]))
    one.grad, two.grad = grads.clone(), grads[1].clone()
    optimizer = ts.Muon([ts.Group("muon", [one], 0.5, 0.2), ts.Group("muon", [two], 0.25, 0.0)])
    optimizer.step(1.0)
    grow = max(1.0, shape[2] / shape[1]) ** 0.5
    torch.testing.assert_close(one.detach(), 0.9 - 0.5 * grow * made, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(two.detach(), 1.0 - 0.25 * grow * made[1], rtol=1e-3, atol=1e-4)


def test_schedule_corners():
    config = tiny(warmup=0.1, warmdown=0.4, final_lr_frac=0.2)
    found = [ts.schedule(config, x) for x in (0.05, 0.1, 0.5, 0.6, 0.8, 1.0)]
    assert found == pytest.approx([0.5, 1, 1, 1, 0.6, 0.2])
    assert ts.schedule(tiny(warmup=0.0, warmdown=0.0), 1.0) == 1


# --- data -------------------------------------------------------------------------------------------------


def test_rows_cover_the_text_once_an_epoch_and_begin_documents_with_bos(corpus):
    text = load_train(corpus)
    config = resolve(tiny(tokens=10**6))
    rows = ts.Rows(text, config)
    flat, begins = np.asarray(text.tokens), set(text.offsets.tolist())
    unseen: dict[bytes, list[int]] = {}
    for start in range(0, len(flat) - 31, 32):
        unseen.setdefault(flat[start : start + 32].tobytes(), []).append(start)
    starts = []
    for step in range(rows.num_rows // 4):
        inputs, targets = rows.batch(step)
        for row_in, row_out in zip(inputs.numpy(), targets.numpy(), strict=True):
            twins = unseen[row_out.astype(np.uint8).tobytes()]  # rows of equal text, told apart by their BOS
            wanted = {
                s: [256 if i == 0 or s + i in begins else flat[s + i - 1] for i in range(32)] for s in twins
            }
            start = next(s for s in twins if wanted[s] == row_in.tolist())
            twins.remove(start)
            starts.append(start)
    assert starts != sorted(starts) and len(starts) + 4 > len(flat) // 32


def test_data_order_depends_on_the_seed_alone(corpus):
    text = load_train(corpus)

    def order(**changes):
        config = resolve(tiny(tokens=10**6, **changes))
        rows = ts.Rows(text, config)
        rows.num_rows = 10  # several epochs
        return torch.cat([rows.batch(i)[1] for i in range(2048 // config.batch_tokens)])

    assert order().equal(order(depth=3, batch_tokens=256, num_experts=8, top_k=1))
    assert not order().equal(order(seed=1))
    assert not order()[:10].equal(order()[10:20])
    assert sorted(map(bytes, order()[:10].numpy())) == sorted(map(bytes, order()[10:20].numpy()))


# --- whole runs -------------------------------------------------------------------------------------------


def test_a_run_repeats_bit_for_bit_and_writes_what_it_promises(corpus, tmp_path):
    for out in ("a", "b"):
        assert run(corpus, tmp_path / out, ramp="random", log_every=4) == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    one, two = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(one[name].equal(two[name]) for name in one)
    lines = metrics(tmp_path / "a", timed=True)
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert lines[-1]["tokens"] == 1280 and lines[0]["seconds"] < lines[-1]["seconds"]
    assert len(lines[0]["max_load"]) == len(lines[0]["entropy"]) == 2
    assert 0 < lines[0]["pool_share"] < 1 <= lines[0]["max_over_exposure"]
    saved = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)
    assert (saved["step"], saved["tokens"]) == (10, 1280)
    assert TrainConfig(**saved["config"]) == resolve(tiny(ramp="random", log_every=4, corpus=str(corpus)))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["checkpoint.pt", "metrics.jsonl"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_loss_falls_below_that_of_letter_frequencies(corpus, tmp_path, optimizer):
    assert run(corpus, tmp_path, optimizer=optimizer, tokens=100_000, batch_tokens=512, log_every=20) == 0
    counts = np.bincount(load_train(corpus).tokens)
    share = counts[counts > 0] / counts.sum()
    assert metrics(tmp_path)[-1]["train_nats"] < -(share * np.log(share)).sum() - 0.1


RICH = {"ramp": "random", "num_shared": 1, "pool_lr_divisor": 0.5, "num_experts": 8, "num_local": 4}
RICH |= {"window": 6, "stride": 3, "top_k": 2, "tokens": 512}
FLIPS: dict[str, dict] = {
    "seed": {"seed": 1},
    "depth": {"depth": 3},
    "tokens": {"tokens": 640},
    "horizon": {"horizon": 0.5},
    "log_every": {"log_every": 2},
    "micro_tokens": {"micro_tokens": 64},
    "aspect": {"aspect": 32, "model_dim": -1},
    "model_dim": {"model_dim": 48},
    "head_dim": {"head_dim": 32},
    "seq_len": {"seq_len": 64},
    "recursion": {"recursion": 1},
    "depth_embedding": {"depth_embedding": True},
    "ffn": {"ffn": "dense"},
    "num_experts": {"num_experts": 7},
    "top_k": {"top_k": 1},
    "expert_dim": {"expert_dim": 48},
    "num_shared": {"num_shared": 0},
    "num_local": {"num_local": 5},
    "num_universal": {"num_universal": 9},
    "topology": {"topology": "clip"},
    "window": {"window": 5},
    "stride": {"stride": 4},
    "layers_per_window": {"layers_per_window": 2},
    "wrap": {"wrap": False},
    "keep_home": {"keep_home": True},
    "untied_first": {"untied_first": 1},
    "untied_last": {"untied_last": 1},
    "stage_sharing": {"stage_sharing": "within"},
    "router": {"router": "norm"},
    "router_dim": {"router_dim": 16},
    "router_feedback": {"router_feedback": False},
    "gate": {"gate": "sigmoid"},
    "renormalize": {"renormalize": False},
    "split_top_k": {"split_top_k": 1},
    "layer_gate": {"layer_gate": True},
    "balance": {"balance": "layer"},
    "balance_coeff": {"balance_coeff": 0.1},
    "balance_ramp": {"balance_ramp": 0.5},
    "balance_batch": {"balance_batch": "lagged"},
    "exposure_power": {"exposure_power": 2},
    "balance_scope": {"balance_scope": "pool_only"},
    "bias_rate": {"bias_rate": 0.5},
    "zloss_coeff": {"zloss_coeff": 0.1},
    "ramp": {"ramp": "distance"},
    "ramp_start": {"ramp_start": 0.29},
    "ramp_end": {"ramp_end": 0.9},
    "ramp_keep": {"ramp_keep": 0.5},
    "edge_bias": {"edge_bias": 1.0},
    "router_boost": {"router_boost": 3.0},
    "optimizer": {"optimizer": "adamw", "matrix_lr": 0.06},
    "matrix_lr": {"matrix_lr": 0.01},
    "embed_lr": {"embed_lr": 0.01},
    "head_lr": {"head_lr": 0.01},
    "router_lr": {"router_lr": 0.1},
    "pool_lr_divisor": {"pool_lr_divisor": 0.0},
    "weight_decay": {"weight_decay": 1.0},
    "warmup": {"warmup": 0.5},
    "warmdown": {"warmdown": 0.3},
    "final_lr_frac": {"final_lr_frac": 0.5},
    "batch_tokens": {"batch_tokens": 64},
}
# What some settings need beside them to mean anything.
BESIDE: dict[str, dict] = {
    "layers_per_window": {"depth": 3, "window": 8, "stride": 4},
    "recursion": {"num_local": 0, "num_universal": 8, "topology": "full", "window": -1, "stride": -1},
    "keep_home": {"depth": 3, "topology": "random", "stride": -1},
    "untied_first": {"depth": 3},
    "untied_last": {"depth": 3},
    "stage_sharing": {"depth": 4, "stages": 2, "stride": 4},
    "router_dim": {"router": "gru"},
    "router_feedback": {"router": "gru"},
    "bias_rate": {"balance": "bias"},
    "edge_bias": {"ramp": "bias"},
}


@pytest.fixture(scope="session")
def rich_run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("rich")
    assert run(corpus, out, **RICH) == 0
    return out


@pytest.mark.parametrize("name", FLIPS)
def test_every_setting_has_an_effect(name, corpus, tmp_path, rich_run):
    base, base_run = RICH | BESIDE.get(name, {}), rich_run
    if name in BESIDE:
        base_run = tmp_path / "base"
        assert run(corpus, base_run, **base) == 0
    assert run(corpus, tmp_path / "flip", **{**base, **FLIPS[name]}) == 0
    one, two = weights(base_run), weights(tmp_path / "flip")
    weights_moved = one.keys() != two.keys() or any(
        one[k].shape != two[k].shape or not one[k].equal(two[k]) for k in one
    )
    assert weights_moved or metrics(base_run) != metrics(tmp_path / "flip")


def test_no_setting_is_left_out_of_the_flips():
    tested_by_themselves = {"corpus", "device", "compile", "collapse_limit", "dead_limit", "stages"}
    tested_by_themselves |= {"save_every", "convert_pick", "convert_rows", "vocab", "vocab_size"}
    assert {f.name for f in fields(TrainConfig)} == set(FLIPS) | tested_by_themselves


def test_a_diverging_run_exits_3_and_stores_no_number(corpus, tmp_path, capsys):
    assert run(corpus, tmp_path, matrix_lr=90, embed_lr=90, head_lr=90, tokens=6400) == 3
    assert "training loss" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists()
    assert all(math.isfinite(line["train_nats"]) for line in metrics(tmp_path))


def test_collapsed_routing_exits_4_only_when_asked(corpus, tmp_path):
    long = {"tokens": 128 * 80, "balance": "none", "log_every": 100}
    assert run(corpus, tmp_path / "a", collapse_limit=0.5, **long) == 4
    assert not (tmp_path / "a" / "checkpoint.pt").exists()
    assert run(corpus, tmp_path / "b", collapse_limit=0, **long) == 0


def test_running_out_of_memory_exits_5(corpus, tmp_path):
    child = os.fork()
    if child == 0:  # a process of its own, since the limit cannot be lifted again
        used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used_bytes + 2**28,) * 2)
        os._exit(run(corpus, tmp_path, model_dim=8192, expert_dim=16384))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["aspekt=3"], ["aspekt", "aspect"]),
        (["zzz=3"], ["zzz", "--help"]),
        (["depth=two"], ["depth=two", "int"]),
        (["depth=0"], ["depth=0", "[1, 128]"]),
        (["wrap=maybe"], ["wrap=maybe", "bool"]),
        (["matrix_lr=nan"], ["matrix_lr=nan", "must lie"]),
        (["topology=star"], ["topology='star'", "ring"]),
        (["head_dim=24"], ["head_dim=24", "16"]),
        (["model_dim=100"], ["model_dim=100", "head_dim"]),
        (["expert_dim=40"], ["expert_dim=40", "16"]),
        (["num_universal=7"], ["num_universal=7", "num_local"]),
        (["num_local=9"], ["num_local=9", "num_experts=8"]),
        (["topology=none", "num_universal=8"], ["num_universal=8", "none"]),
        (["topology=full", "window=3"], ["window=3", "full"]),
        (["topology=blocks", "depth=3", "num_local=2", "num_universal=8"], ["num_universal=8", "3 blocks"]),
        (["topology=clip", "wrap=false"], ["wrap=False", "ring"]),
        (["window=99"], ["window=99", "num_universal"]),
        (["window=1", "stride=1"], ["window=1", "raise"]),
        (["top_k=20"], ["top_k=20", "raise num_local"]),
        (["num_local=1", "num_experts=2", "ramp=random", "top_k=3", "window=2"], ["top_k=3", "ramp"]),
        (["layers_per_window=9"], ["layers_per_window=9", "depth=4"]),
        (["warmup=0.6", "warmdown=0.6"], ["warmup=0.6", "warmdown"]),
        (["ramp_start=0.6"], ["ramp_start=0.6", "ramp_end"]),
        (["batch_tokens=100"], ["batch_tokens=100", "seq_len=256"]),
        (["tokens=100"], ["tokens=100", "256"]),
        (["--depht", "3"], ["--depht", "--help"]),
        (["--depth"], ["--depth", "--help"]),
        (["nonsense"], ["nonsense", "key=value"]),
        ([], ["corpus", "harness prepare"]),
        (["corpus=/nowhere"], ["/nowhere"]),
        (["--config", "/nowhere.json"], ["/nowhere.json"]),
        (["--logits", "/nowhere.pt"], ["/nowhere.pt", "checkpoint.pt"]),
        (["device=cuda", "corpus=/nowhere"], ["device=cuda", "cpu"]),
    ],
    ids=" ".join,
)
def test_a_users_mistake_is_one_line_exit_2_and_nothing_written(words, parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ts.main([*words, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(part in message for part in parts), message
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_a_mistake_and_a_bug_is_not(corpus, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("taken")
    assert run(corpus, tmp_path / "file") == 2
    assert capsys.readouterr().err.count("\n") == 1

    def broken(*_):
        raise ValueError("a candidate's own fault")

    monkeypatch.setattr(ts, "balance_loss", broken)
    with pytest.raises(ValueError, match="own fault"):
        run(corpus, tmp_path / "out")


@pytest.mark.parametrize(
    "text", ["[1]", "{", '{"depth": "two"}', '{"depth": 2.0}', '{"wrap": 1}', '{"seed": true}', "3", "null"]
)
def test_a_bad_config_file_is_refused(text, tmp_path, capsys):
    (tmp_path / "c.json").write_text(text)
    assert ts.main(["--config", str(tmp_path / "c.json"), "--describe"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_describe_says_what_the_model_is_and_the_config_file_reads_back(tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps({"depth": 3, "aspect": 16, "corpus": "/nowhere"}))
    assert ts.main(["num_experts=4", "--describe", "--config", str(tmp_path / "c.json"), "seed=5"]) == 0
    said = json.loads(capsys.readouterr().out)
    config = TrainConfig(**said["config"])
    assert config == resolve(TrainConfig(depth=3, aspect=16, corpus="/nowhere", num_experts=4, seed=5))
    edges = np.array(said["connectivity"])
    assert said["virtual_width"] == edges.sum(1).tolist() and said["reach"] == edges.sum(0).tolist()
    assert said["exposure"] == pytest.approx((edges / edges.sum(1, keepdims=True)).sum(0).tolist())
    assert said["params_total"] == sum(p.numel() for p in GPT(config).parameters())
    assert said["flops_per_token"] == ts.flops_per_token(config)
    assert set(asdict(config)) == set(said["config"])
    assert ts.main(["--depth", "2", "--describe", "ffn=dense"]) == 0
    assert json.loads(capsys.readouterr().out)["params_unique_experts"] == 0


def test_help_names_every_setting(capsys):
    assert ts.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {spec.name}=" in shown for spec in fields(TrainConfig))


# --- other processes --------------------------------------------------------------------------------------


def test_logits_over_the_wire_equal_those_in_process(corpus, tmp_path):
    assert run(corpus, tmp_path, device="cpu", wrap=False, num_local=2, ramp="random", tokens=512) == 0
    model = ts.load_model(tmp_path / "checkpoint.pt", torch.device("cpu"))
    command = [sys.executable, str(TRAINER), "--logits", str(tmp_path / "checkpoint.pt")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        for rows, width, seed in ((2, 32, 0), (1, 5, 1), (3, 50, 2), (2, 32, 0)):
            tokens = some_tokens(rows, width, seed)
            server.stdin.write(struct.pack("<II", rows, width) + tokens.numpy().astype("<i4").tobytes())
            server.stdin.flush()
            assert struct.unpack("<III", server.stdout.read(12)) == (rows, width, 257)
            got = np.frombuffer(server.stdout.read(4 * rows * width * 257), "<f4").reshape(rows, width, 257)
            with torch.inference_mode():
                np.testing.assert_allclose(got, model(tokens).numpy(), rtol=1e-5, atol=1e-5)
        server.stdin.close()
        assert server.stdout.read() == b"" and server.wait(60) == 0


CHILD = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("candidate_17", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
child = os.fork()
if child == 0:
    code = module.main(sys.argv[2:])
    os._exit(code + 100 if "torch._dynamo" in sys.modules or "torch.optim" in dir() else code)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_it_trains_in_a_fork_of_a_process_that_loaded_it_by_path_and_never_loads_the_compiler(
    corpus, tmp_path
):
    items = [f"{k}={v}" for k, v in {**TINY, "corpus": corpus, "tokens": 512}.items()]
    command = [sys.executable, "-c", CHILD, str(TRAINER), *items, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TRAINER.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 2 and done.stdout == ""
    assert run(corpus, tmp_path / "here", tokens=512) == 0
    assert metrics(tmp_path) == metrics(tmp_path / "here")


def test_a_model_over_bpe_tokens_and_the_corpus_it_needs(corpus, tmp_path, capsys):
    source = json.loads((corpus / "manifest.json").read_text())["source"]
    prepare(source, tmp_path / "bpe", vocab_size=300)
    sizes = {"vocab": "bpe", "vocab_size": 300, "tokens": 12800}
    assert run(tmp_path / "bpe", tmp_path / "run", **sizes) == 0
    lines = metrics(tmp_path / "run")
    assert lines[0]["train_nats"] == pytest.approx(math.log(301), abs=0.1)
    assert lines[-1]["train_nats"] < lines[0]["train_nats"] - 0.5
    assert weights(tmp_path / "run")["embed"].shape == weights(tmp_path / "run")["head"].shape == (301, 32)
    capsys.readouterr()
    for folder, words in ((tmp_path / "bpe", {}), (corpus, sizes), (corpus, {"vocab_size": 300})):
        assert run(folder, tmp_path / "no", **words) == 2
        assert "vocab_size=" in capsys.readouterr().err and not (tmp_path / "no").exists()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_settings_make_a_config_that_resolves_to_itself_and_a_model_that_was_counted(data):
    """Or they are refused in one line."""
    names = (
        "num_local",
        "window",
        "stride",
        "layers_per_window",
        "wrap",
        "keep_home",
        "untied_first",
        "stages",
    )
    names += (
        "stage_sharing",
        "recursion",
        "router",
        "router_feedback",
        "gate",
        "renormalize",
        "split_top_k",
        "ffn",
    )
    names += (
        "layer_gate",
        "depth_embedding",
        "balance",
        "balance_scope",
        "ramp",
        "ramp_keep",
        "router_boost",
    )
    names += ("topology", "num_shared", "num_universal", "optimizer")
    small = {
        "num_local": 6,
        "window": 12,
        "stride": 6,
        "layers_per_window": 3,
        "untied_first": 2,
        "stages": 4,
    }
    small |= {"recursion": 3, "split_top_k": 2, "num_shared": 2, "num_universal": 12}
    changes = {}
    for spec in fields(TrainConfig):
        if spec.name not in names or data.draw(st.booleans(), label=spec.name):
            continue
        if spec.type is bool:
            values = st.booleans()
        elif spec.metadata["choices"]:
            values = st.sampled_from(spec.metadata["choices"])
        elif spec.type is int:
            values = st.integers(spec.metadata["low"], small[spec.name])
        else:
            values = st.sampled_from([spec.metadata["low"], 0.5, 1.0])
        changes[spec.name] = data.draw(values, label=spec.name)
    try:
        config = resolve(tiny(depth=data.draw(st.integers(1, 5)), **changes))
    except ts.Mistake as mistake:
        assert "\n" not in str(mistake)
        return
    assert resolve(config) == config
    trainer = ts.Trainer(GPT(config))
    assert ts.count_params(config)["total"] == sum(p.numel() for p in trainer.model.parameters())
    for step in range(2):
        result = trainer.step(some_tokens(4, seed=step), some_tokens(4, seed=step + 9), step)
        assert math.isfinite(result.nats) and all(p.isfinite().all() for p in trainer.model.parameters())
    json.dumps(ts.describe(config), allow_nan=False)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(
    "change", [{"model_dim": 128}, {"batch_tokens": 64}, {"tokens": 12800}, {"num_local": 0}], ids=str
)
def test_weights_average_over_the_same_share_of_the_run(optimizer, change):
    base, spans = {"optimizer": optimizer, "pool_lr_divisor": 0.5}, []
    for changes in ({}, change):
        config = resolve(tiny(**{**base, **changes}))
        decayed = [g for g in ts.parameter_groups(GPT(config)) if g.weight_decay]
        spans += [1 / (g.lr * g.weight_decay) / ts.num_steps(config) for g in decayed]
    assert spans == pytest.approx([spans[0]] * len(spans))


def test_a_split_choice_has_exposures_of_its_own():
    """2 local and 4 of the pool, one slot each: an even choice gives 1/4 to a local edge, 1/8 to a pool edge."""
    config = resolve(tiny(num_local=2, num_universal=4, topology="full", split_top_k=1))
    edges_LS = ts.connectivity(config)
    even_LS = torch.tensor([[0.25, 0.25, 0, 0] + [0.125] * 4, [0, 0, 0.25, 0.25] + [0.125] * 4])
    assert ts.uniform_rate(config, edges_LS).tolist() == even_LS.tolist()
    assert ts.load_over_exposure(config, even_LS, edges_LS).tolist() == [1.0] * 8
    for balance in ("uelb", "layer"):
        loss = ts.balance_loss(replace(config, balance=balance), even_LS, even_LS, edges_LS)
        assert loss.item() == pytest.approx(config.balance_coeff)
