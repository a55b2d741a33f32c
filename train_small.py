"""Train one small MoUE-style language model: the evaluation target of the harness, in one file.

    python train_small.py --depth 2 tokens=200000 corpus=~/.cache/moue/corpora/embedded --out /tmp/run
    python train_small.py --describe depth=4 topology=clip
    python train_small.py --logits /tmp/run/checkpoint.pt      (serves logits over stdin and stdout)

The model has nanochat's shape (RoPE, QK norm, weightless RMS norm, ReLU^2, untied head, output projections
born at zero). Its feed-forward layers are mixtures of experts, in which every layer owns `num_local` experts
and sees a window of a pool of `num_universal` experts that belong to no layer. "MoUE-style": of MoUE (arXiv
2603.04971) only the abstract could be read, so what is marked ASSUMPTION below is a reading, not the paper.

The run writes metrics.jsonl and checkpoint.pt, never a score: the judge scores.
Exit codes: 0 done, 2 user's mistake, 3 diverged, 4 routing collapsed, 5 out of memory, other: crash.

Shapes, as name suffixes: B rows, T positions, N = B*T tokens, D model width, H heads, C head width,
V vocabulary, L layers, S stored experts, E experts one layer sees, K experts a token uses, A = N*K
assignments, M expert width. A stored expert's id is l*num_local + i for the i-th expert of layer l and
L*num_local + j for universal expert j.
"""

import argparse
import ctypes
import difflib
import gc
import json
import math
import os
import struct
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:  # glibc: keep big buffers mapped between steps, else every large elementwise output pays page faults
    ctypes.CDLL(None).mallopt(-3, 1 << 30)
    ctypes.CDLL(None).mallopt(-1, (1 << 31) - 1)
except (OSError, AttributeError):
    pass

grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm

# --- Settings --------------------------------------------------------------------------------------------


def setting(default, doc: str, low=None, high=None, choices=(), derived=False, run=False):
    """A TrainConfig field. `derived`: -1 stands for "computed by resolve()". `run`: no search may move it."""
    meta = {"doc": doc, "low": low, "high": high, "choices": choices, "derived": derived, "run": run}
    return field(default=default, metadata=meta)


TOPOLOGIES = ("none", "ring", "clip", "blocks", "full", "random")
RAMPS = ("none", "random", "distance")


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run: the one place for names, defaults, ranges and meaning."""

    seed: int = setting(0, "seed of initial weights, data order and random ramp", 0, 2**31 - 1, run=True)
    depth: int = setting(4, "layers; the one dial, from which the rest follows", 1, 128, run=True)
    tokens: int = setting(-1, "training budget; -1: 2 an active parameter", 1, 10**13, derived=True, run=True)
    device: str = setting("auto", "where to run", choices=("auto", "cpu", "cuda"), run=True)
    corpus: str = setting("", "folder of the prepared corpus", run=True)
    log_every: int = setting(10, "steps between two lines of metrics", 1, 10**6, run=True)

    aspect: int = setting(64, "model width per layer", 8, 256)
    model_dim: int = setting(-1, "model width; -1: depth * aspect", 16, 16384, derived=True)
    head_dim: int = setting(32, "width of an attention head", 16, 256)
    vocab: str = setting("bytes", "what a token is", choices=("bytes",))
    seq_len: int = setting(256, "positions in a training row", 8, 65536)

    ffn: str = setting("moe", "dense: one MLP of the width a token uses", choices=("dense", "moe"))
    num_experts: int = setting(8, "experts per layer of the MoE that the budget matches", 1, 4096)
    top_k: int = setting(2, "routed experts a token uses in a layer", 1, 64)
    expert_dim: int = setting(-1, "hidden width of an expert; -1: a token uses 4*D", 16, 65536, derived=True)
    num_shared: int = setting(0, "always-on experts per layer", 0, 16)

    num_local: int = setting(-1, "experts owned by each layer; -1: half", 0, 4096, derived=True)
    num_universal: int = setting(-1, "experts in the pool; -1: stored as in MoE", 0, 1 << 20, derived=True)
    topology: str = setting("ring", "which layers see which universal experts", choices=TOPOLOGIES)
    window: int = setting(-1, "universal experts a layer sees; -1: num_experts", 0, 16384, derived=True)
    stride: int = setting(-1, "ring places between windows; -1: half", 0, 1 << 20, derived=True)
    layers_per_window: int = setting(1, "consecutive layers that share one window", 1, 128)
    wrap: bool = setting(True, "ring: windows go on past the ring's end; false: they are cut there")

    router: str = setting("linear", "how logits are made", choices=("linear",))
    balance: str = setting("uelb", "load balance loss", choices=("uelb", "layer", "pool", "none"))
    balance_coeff: float = setting(0.01, "its weight: its value at uniform routing", 0.0, 10.0)
    exposure_power: int = setting(1, "uelb: 2 asks equal load per expert, 1 per edge", choices=(0, 1, 2))
    balance_scope: str = setting("joint", "experts balanced", choices=("joint", "pool_only"))
    zloss_coeff: float = setting(1e-4, "weight of the squared logsumexp of router logits", 0.0, 1.0)
    collapse_limit: float = setting(-1, "max_over_exposure to stop at; 0: never", 0.0, 1e6, derived=True)

    ramp: str = setting("none", "order in which edges to the pool open", choices=RAMPS)
    ramp_start: float = setting(0.05, "share of training at which edges begin to open", 0.0, 1.0)
    ramp_end: float = setting(0.3, "share of training at which all edges are open", 0.0, 1.0)

    optimizer: str = setting("muon", "of attention and expert matrices", choices=("muon", "adamw"))
    matrix_lr: float = setting(-1, "learning rate of matrices", 1e-9, 100.0, derived=True)
    embed_lr: float = setting(0.2, "learning rate of the embedding", 1e-9, 100.0)
    head_lr: float = setting(0.016, "learning rate of the head", 1e-9, 100.0)
    router_lr: float = setting(0.01, "learning rate of the routers", 1e-9, 100.0)
    pool_lr_divisor: float = setting(0.0, "p: the pool learns at matrix_lr / reach**p", 0.0, 1.0)
    weight_decay: float = setting(0.1, "decoupled decay of matrices", 0.0, 10.0)
    warmup: float = setting(0.05, "share of training with a rising rate", 0.0, 1.0)
    warmdown: float = setting(0.5, "share of training with a falling rate", 0.0, 1.0)
    final_lr_frac: float = setting(0.05, "rate at the end, as a share of the peak", 0.0, 1.0)
    batch_tokens: int = setting(-1, "tokens in a step", 8, 1 << 26, derived=True)


VOCAB_SIZE = {"bytes": 256}  # ids of text; the model has one more, BOS

# How size, horizon and rates follow the one dial. Form: nanochat (width = depth * aspect; AdamW's rates go as
# width^-0.5, all rates as the square root of the batch) with batch ~ tokens^0.383 (Power Lines, arXiv
# 2505.13738). ASSUMPTION: that exponents fitted on larger dense models hold here, for routers and for matrices
# under AdamW too; the constants, which were tuned by hand on a few minutes of training at depth 2.
REFERENCE_DIM, REFERENCE_BATCH_TOKENS, REFERENCE_TOKENS = 256, 4096, 2**21
TOKENS_PER_PARAM = 2  # a smoke run; compute-optimal training is nearer to 20
MATRIX_LR = {"muon": 0.06, "adamw": 0.008}


def adamw_scale(config: TrainConfig) -> float:
    return (config.model_dim / REFERENCE_DIM) ** -0.5 * batch_scale(config)


def batch_scale(config: TrainConfig) -> float:
    return (config.batch_tokens / REFERENCE_BATCH_TOKENS) ** 0.5


def derived_batch_tokens(tokens: int, seq_len: int) -> int:
    ideal = REFERENCE_BATCH_TOKENS * (tokens / REFERENCE_TOKENS) ** 0.383
    num_rows = 2 ** round(math.log2(max(1.0, ideal / seq_len)))
    return min(num_rows, max(1, tokens // seq_len)) * seq_len


class Mistake(ValueError):
    """What the user can mend, in one line; a ValueError of any other kind is a crash."""


def require(holds: bool, config: Any, key: str, remedy: str) -> None:
    if not holds:
        raise Mistake(f"{key}={getattr(config, key)!r}: {remedy}")


def check_fields(config: TrainConfig) -> None:
    """Raise Mistake on a value of the wrong type, outside its range or not among its choices."""
    for spec in fields(config):
        value, meta = getattr(config, spec.name), spec.metadata
        typed = type(value) is spec.type or (spec.type is float and type(value) is int)
        require(typed, config, spec.name, f"must be of type {spec.type.__name__}")
        listed = not meta["choices"] or value in meta["choices"]
        require(listed, config, spec.name, f"choose one of {', '.join(map(str, meta['choices']))}")
        if meta["low"] is not None and not (meta["derived"] and value == -1):
            span = f"must lie in [{meta['low']}, {meta['high']}]" + (", or be -1" if meta["derived"] else "")
            require(meta["low"] <= value <= meta["high"], config, spec.name, span)


def resolve(config: TrainConfig) -> TrainConfig:
    """The same run with every derived (-1) setting filled in; idempotent.

    Settings that mean nothing without a pool get one neutral value, so that equal models have equal configs.
    Raises Mistake, in one line with the remedy, for a value or a combination that cannot be trained.
    """
    check_fields(config)
    c = SimpleNamespace(**{spec.name: spec.type(getattr(config, spec.name)) for spec in fields(config)})
    if c.model_dim == -1:
        c.model_dim = max(1, round(c.depth * c.aspect / c.head_dim)) * c.head_dim
    if c.expert_dim == -1:
        c.expert_dim = max(1, round(4 * c.model_dim / (c.top_k + c.num_shared) / 16)) * 16
    require(c.head_dim % 16 == 0, c, "head_dim", "must be a multiple of 16")
    require(c.model_dim % c.head_dim == 0, c, "model_dim", f"must be a multiple of head_dim={c.head_dim}")
    require(c.expert_dim % 16 == 0, c, "expert_dim", "must be a multiple of 16")
    require(c.warmup + c.warmdown <= 1, c, "warmup", f"with warmdown={c.warmdown} it must not exceed 1")
    require(c.ramp_start <= c.ramp_end, c, "ramp_start", f"must not exceed ramp_end={c.ramp_end}")
    resolve_experts(c)
    resolve_windows(c)
    check_visibility(c)
    if c.collapse_limit == -1:  # routing can do no worse than width / top_k; tolerate all but that
        c.collapse_limit = 0.99 * (c.num_local + c.window) / c.top_k
    if c.matrix_lr == -1:
        c.matrix_lr = MATRIX_LR[c.optimizer]
    if c.tokens == -1:
        c.tokens = TOKENS_PER_PARAM * _count(c)["active"]
    if c.batch_tokens == -1:
        c.batch_tokens = derived_batch_tokens(c.tokens, c.seq_len)
    require(c.batch_tokens % c.seq_len == 0, c, "batch_tokens", f"must be a multiple of seq_len={c.seq_len}")
    require(c.batch_tokens <= c.tokens, c, "tokens", f"less than one step; give at least {c.batch_tokens}")
    return TrainConfig(**vars(c))


def resolve_experts(c: SimpleNamespace) -> None:
    """Settle num_local and num_universal; by default depth*num_local + num_universal = depth*num_experts."""
    if c.ffn == "dense":
        c.num_local, c.num_universal, c.balance = 0, 0, "none"
    if c.topology == "none":
        require(c.num_universal <= 0, c, "num_universal", "topology=none has no pool; set it to 0")
        c.num_universal = 0
    budget = c.depth * c.num_experts
    if c.num_local == -1 and c.num_universal == -1:
        c.num_local = c.num_experts // 2
    if c.num_local == -1:
        c.num_local, rest = divmod(budget - c.num_universal, c.depth)
        remedy = f"give num_local, or a multiple of depth={c.depth} up to {budget}"
        require(c.num_local >= 0 and rest == 0, c, "num_universal", remedy)
    if c.num_universal == -1:
        require(c.num_local <= c.num_experts, c, "num_local", f"exceeds num_experts={c.num_experts}")
        c.num_universal = budget - c.depth * c.num_local


def resolve_windows(c: SimpleNamespace) -> None:
    """Settle window and stride. ASSUMPTION: num_experts and half of it, so that neighbours overlap by a half;
    more where some expert would be left unseen."""
    size, num_groups = c.num_universal, -(-c.depth // c.layers_per_window)
    if size == 0:
        c.topology, c.window, c.stride, c.layers_per_window, c.wrap = "none", 0, 0, 1, True
        c.ramp, c.balance_scope, c.pool_lr_divisor = "none", "joint", 0.0
        return
    require(c.layers_per_window <= c.depth, c, "layers_per_window", f"exceeds depth={c.depth}")
    require(c.wrap or c.topology == "ring", c, "wrap", "only topology=ring can do without")
    if c.topology == "blocks":
        require(size % num_groups == 0, c, "num_universal", f"must be a multiple of {num_groups} blocks")
    block = size // num_groups
    fixed = {"full": (size, 0), "blocks": (block, block), "random": (c.window, 0)}.get(c.topology, ())
    for key, value in zip(("window", "stride"), fixed, strict=False):
        require(
            getattr(c, key) in (-1, value), c, key, f"topology={c.topology} makes it {value}; leave it out"
        )
        setattr(c, key, value)
    if c.window == -1:
        c.window = min(size, max(c.num_experts, -(-size // num_groups)))
    require(1 <= c.window <= size, c, "window", f"must lie in [1, num_universal={size}]")
    if c.stride == -1:
        c.stride = max(1, c.window // 2, -(-(size - c.window) // max(1, num_groups - 1)))


def check_visibility(c: SimpleNamespace) -> None:
    """Every layer must always see top_k experts, and every stored expert must be seen by some layer."""
    if c.ffn == "dense":
        return
    edges_LS = _edges(c)
    closed_LS = open_edges(c, edges_LS, -1.0, 0)
    fewest = int((edges_LS if closed_LS is None else closed_LS).sum(1).min())
    when = "" if closed_LS is None else "while the ramp is closed "
    require(fewest >= c.top_k, c, "top_k", f"{when}a layer sees but {fewest}; raise num_local or window")
    num_unseen = int((~edges_LS.any(0)).sum())
    require(
        num_unseen == 0, c, "window", f"{num_unseen} experts are seen by no layer; raise window or stride"
    )


# --- Topology, exposure, balance -------------------------------------------------------------------------


def connectivity(config: TrainConfig) -> Tensor:
    """(L, S) bool: which layer may route to which stored expert.

    ASSUMPTION for the ring (MoUE calls it a staggered rotational topology): layer l sees `window` experts from
    ring place stride * (l // layers_per_window) on. `clip` holds the last windows back at the ring's end,
    `blocks` gives adjacent layers a block of their own (MoRE, ReXMoE), `full` is one shared pool (UniPool),
    `random` deals windows with reaches that differ by at most one.
    """
    return _edges(resolve(config))


def _edges(c: Any) -> Tensor:
    own = np.kron(np.eye(c.depth, dtype=bool), np.ones(c.num_local, dtype=bool))
    pool = np.zeros((c.depth, c.num_universal), dtype=bool)
    rng = np.random.default_rng(0)  # the graph belongs to the candidate, so it does not move with the seed
    for layer in range(c.depth if c.num_universal else 0):
        start = c.stride * (layer // c.layers_per_window)
        if c.topology == "random":
            deck = rng.permutation(c.num_universal)
            places = deck[np.argsort(pool[:, deck].sum(0), kind="stable")][: c.window]
        elif c.topology == "clip":
            places = min(start, c.num_universal - c.window) + np.arange(c.window)
        else:
            places = start % c.num_universal + np.arange(c.window)
            places = places % c.num_universal if c.wrap else places[places < c.num_universal]
        pool[layer, places] = True
    return torch.from_numpy(np.concatenate([own.reshape(c.depth, -1), pool], axis=1))


def open_edges(c: Any, edges_LS: Tensor, progress: float, step: int) -> Tensor | None:
    """The edges open at `progress` (share of training done), or None once all are.

    After ReXMoE's progressive routing: edges to the pool, but for a layer's home share of the ring, open
    linearly between ramp_start and ramp_end; `random` draws them anew for every (seed, step, layer), `distance`
    opens those to the experts of near layers first.
    """
    if c.ramp == "none" or progress >= c.ramp_end:
        return None
    share = min(1.0, max(0.0, (progress - c.ramp_start) / max(c.ramp_end - c.ramp_start, 1e-9)))
    home_S = np.arange(c.num_universal) * c.depth // c.num_universal
    opened = edges_LS.clone()
    for layer, row in enumerate(opened[:, c.depth * c.num_local :].numpy()):
        foreign = np.flatnonzero(row & (home_S != layer))
        if c.ramp == "random":
            foreign = np.random.default_rng([c.seed, step, layer]).permutation(foreign)
        else:
            foreign = foreign[np.argsort(np.abs(home_S[foreign] - layer), kind="stable")]
        row[foreign[int(share * len(foreign)) :]] = False
    return opened


def exposure(connectivity_LS: Tensor) -> Tensor:
    """(S,) float64: the load each stored expert has under uniform routing, e_j = sum over its layers of 1/V_l."""
    edges_LS = connectivity_LS.double()
    return (edges_LS / edges_LS.sum(1, keepdim=True).clamp_min(1)).sum(0)


def uelb_loss(
    load_LS: Tensor, prob_LS: Tensor, connectivity_LS: Tensor, alpha: float, exposure_power: int
) -> Tensor:
    """Universal expert load balance: (alpha / sum_j e_j^b) * sum_j e_j^(b-2) F_j Q_j, a scalar.

    F and Q are the loads (no gradient) and mean probabilities of every stored expert, summed over layers; each
    row of both sums to 1. ASSUMPTION: the form; MoUE's own is not known. Holds by algebra: it is alpha at
    uniform routing, the mean of the layers' own losses where nothing is shared (b = 1), and UniPool's pool loss
    where every layer sees everything.
    """
    exposure_S = exposure(connectivity_LS).to(prob_LS.dtype)
    load_S, prob_S = load_LS.detach().sum(0), prob_LS.sum(0)
    seen_S = exposure_S > 0
    safe_S = torch.where(seen_S, exposure_S, 1)  # the load of an unseen expert is 0
    norm = (seen_S * safe_S**exposure_power).sum()
    return alpha * (safe_S ** (exposure_power - 2) * load_S * prob_S).sum() / norm


def balance_loss(config: TrainConfig, load_LS: Tensor, prob_LS: Tensor, edges_LS: Tensor) -> Tensor:
    """The chosen balance loss, a scalar: `layer` as in Switch, `pool` as in UniPool, or `uelb`.

    `pool_only` looks at the universal experts alone and renormalises each layer over its window, else the loss
    could be lowered by leaving the pool; local experts are then free.
    """
    alpha = config.balance_coeff
    if config.balance_scope == "pool_only":
        first = config.depth * config.num_local
        load_LS, prob_LS, edges_LS = (x[:, first:] for x in (load_LS, prob_LS, edges_LS))
        load_LS, prob_LS = (x / x.sum(1, keepdim=True).clamp_min(1e-9) for x in (load_LS, prob_LS))
    if config.balance == "layer":
        return alpha * (edges_LS.sum(1) * (load_LS.detach() * prob_LS).sum(1)).mean()
    if config.balance == "pool":
        num_layers, num_stored = edges_LS.shape
        return alpha * num_stored / num_layers**2 * (load_LS.detach().sum(0) * prob_LS.sum(0)).sum()
    return uelb_loss(load_LS, prob_LS, edges_LS, alpha, config.exposure_power)


# --- Counting --------------------------------------------------------------------------------------------


def count_params(config: TrainConfig) -> dict[str, int]:
    """Parameters: `total` stored, `active` (matrices one token is multiplied by, summed over layers, so a
    universal expert counts once for every layer that uses it; no embedding), `unique_experts` (those of stored
    experts, each counted once)."""
    return _count(resolve(config))


def _count(c: Any) -> dict[str, int]:
    vocab, expert, edges_LS = VOCAB_SIZE[c.vocab] + 1, 2 * c.model_dim * c.expert_dim, _edges(c)
    stored = edges_LS.shape[1] * expert
    always = 4 * c.depth * c.model_dim**2 + c.model_dim * (
        int(edges_LS.sum()) + vocab
    )  # attention, router, head
    active = always + c.depth * (c.num_shared + c.top_k) * expert
    total = always + c.depth * num_always(c) * expert + stored + vocab * c.model_dim
    return {"total": total, "active": active, "unique_experts": stored}


def num_always(c: Any) -> int:
    """Experts' worth of a layer's MLP that every token uses: the whole of a dense layer."""
    return c.num_shared + (c.top_k if c.ffn == "dense" else 0)


def flops_per_token(config: TrainConfig) -> int:
    """Forward and backward: 6 an active parameter, and 12*D*seq_len a layer for attention scores (nanochat's
    convention: full rows, no causal discount). Lookups, norms, softmax and sorting count as nothing."""
    c = resolve(config)
    return 6 * _count(c)["active"] + 12 * c.depth * c.model_dim * c.seq_len


def describe(config: TrainConfig) -> dict[str, Any]:
    """What a run would be: counts, topology and the resolved config, without corpus or training."""
    c = resolve(config)
    edges, count = _edges(c), _count(c)
    return {
        "params_total": count["total"],
        "params_active": count["active"],
        "params_unique_experts": count["unique_experts"],
        "flops_per_token": flops_per_token(c),
        "virtual_width": edges.sum(1).tolist(),
        "reach": edges.sum(0).tolist(),
        "exposure": exposure(edges).tolist(),
        "connectivity": edges.int().tolist(),
        "config": asdict(c),
    }


# --- Model -----------------------------------------------------------------------------------------------


class Norm(torch.autograd.Function):
    """RMS norm without weight over the last dimension; by hand it is twice as fast on CPU as F.rms_norm."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        wide = x.float()
        scale = ((wide * wide).mean(-1, keepdim=True) + 1e-6).rsqrt_().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        return (grad - y * (grad * y).mean(-1, keepdim=True)).mul_(scale)


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2; overwrites its input, which must be a fresh product that nothing else reads."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x.relu_()
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (relu,) = ctx.saved_tensors
        return (grad * relu).mul_(2)


class Plan(NamedTuple):
    """How assignments lie once sorted by expert: `order_A` assignment at each sorted place, `token_A` its token,
    `place_NK` where a token's assignments went, `end_E` int32 end of every expert's run."""

    order_A: Tensor
    token_A: Tensor
    place_NK: Tensor
    end_E: Tensor


def make_plan(choice_NK: Tensor, num_visible: int) -> Plan:
    """Sort assignments by expert. numpy's radix sort of int16 on CPU; on CUDA nothing waits for the device."""
    top_k = choice_NK.shape[1]
    if choice_NK.device.type == "cpu":
        choice_A = choice_NK.numpy().reshape(-1).astype(np.int16)
        order_A = np.argsort(choice_A, kind="stable")
        place_A = np.empty_like(order_A)
        place_A[order_A] = np.arange(len(order_A))
        end_E = np.bincount(choice_A, minlength=num_visible).cumsum().astype(np.int32)
        order_A, place_A, end_E = map(torch.from_numpy, (order_A, place_A, end_E))
    else:
        sorted_A, order_A = choice_NK.flatten().sort(stable=True)
        place_A = torch.empty_like(order_A)
        place_A[order_A] = torch.arange(len(order_A), device=order_A.device)
        experts_E = torch.arange(num_visible, device=order_A.device)
        end_E = torch.searchsorted(sorted_A, experts_E, right=True).int()
    return Plan(order_A, order_A // top_k, place_A.view_as(choice_NK), end_E)


class Gather(torch.autograd.Function):
    """Tokens in expert order; the gradient of a token is the sum over its K copies."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return x_ND.index_select(0, plan.token_A)

    @staticmethod
    def backward(ctx, grad_AD: Tensor) -> tuple[Tensor, None]:
        return F.embedding_bag(ctx.plan.place_NK, grad_AD, mode="sum"), None


class Combine(torch.autograd.Function):
    """Back to token order: the sum over a token's K expert outputs, each times its gate."""

    @staticmethod
    def forward(ctx, y_AD: Tensor, gate_NK: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(y_AD, gate_NK)
        return F.embedding_bag(plan.place_NK, y_AD, mode="sum", per_sample_weights=gate_NK)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, Tensor, None]:
        y_AD, gate_NK = ctx.saved_tensors
        plan = ctx.plan
        grad_AD = grad_ND.index_select(0, plan.token_A)
        grad_gate_A = torch.linalg.vecdot(grad_AD, y_AD)
        grad_gate_NK = grad_gate_A.index_select(0, plan.place_NK.flatten()).view_as(gate_NK)
        gate_A = gate_NK.flatten().index_select(0, plan.order_A)
        return grad_AD.mul_(gate_A[:, None]), grad_gate_NK, None


def rotary(seq_len: int, head_dim: int, device: torch.device) -> Tensor:
    """(T, 1, C/2) complex64 unit factors of RoPE, base 10000."""
    freq = 10000.0 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    angle = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), freq)
    return torch.polar(torch.ones_like(angle), angle)[:, None]


def rotate(x: Tensor, factor: Tensor) -> Tensor:
    """RoPE on (..., T, H, C), neighbours (2i, 2i+1) being a pair. Complex product: 4x the speed on CPU."""
    if x.device.type == "cpu":
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * factor).flatten(-2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = factor.real.to(x.dtype), factor.imag.to(x.dtype)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, config: TrainConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Parameter(torch.empty(3, config.model_dim, config.model_dim))
        self.out = nn.Parameter(torch.empty(config.model_dim, config.model_dim))

    def forward(self, x_BTD: Tensor, factor: Tensor) -> Tensor:
        qkv = F.linear(x_BTD, self.qkv.flatten(0, 1).to(x_BTD.dtype)).unflatten(-1, (3, -1, self.head_dim))
        q, k = Norm.apply(rotate(qkv[:, :, :2], factor[:, None])).unbind(2)
        heads = (x.transpose(1, 2) for x in (q, k, qkv[:, :, 2]))
        y_BHTC = F.scaled_dot_product_attention(*heads, is_causal=True)
        return F.linear(y_BHTC.transpose(1, 2).flatten(-2), self.out.to(x_BTD.dtype))


class MLP(nn.Module):
    """The dense feed-forward layer, and the always-on experts of a mixture."""

    def __init__(self, model_dim: int, hidden_dim: int):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(model_dim, hidden_dim))
        self.w_out = nn.Parameter(torch.empty(hidden_dim, model_dim))

    def forward(self, x_ND: Tensor) -> Tensor:
        return SquaredReLU.apply(x_ND @ self.w_in.to(x_ND.dtype)) @ self.w_out.to(x_ND.dtype)


class Routing(NamedTuple):
    """What one layer's routing did: `load_E` share of assignments, `prob_E` mean probability, both summing to 1;
    `zloss` mean squared logsumexp and `entropy` mean entropy a token (nats), scalars."""

    load_E: Tensor
    prob_E: Tensor
    zloss: Tensor
    entropy: Tensor


class MoE(nn.Module):
    """One layer's router and dispatch over the experts it sees: one joint top-k, gates renormalised over it.

    ASSUMPTION: local and universal experts compete in one softmax. With top_k = 1 the gate is the probability
    itself (Switch), for a renormalised one would be constant and teach the router nothing.
    """

    def __init__(self, config: TrainConfig, visible: list[int]):
        super().__init__()
        self.visible, self.top_k = visible, config.top_k
        self.router = nn.Parameter(torch.empty(config.model_dim, len(visible)))

    def route(self, x_ND: Tensor, open_E: Tensor | None) -> tuple[Tensor, Plan, Routing]:
        """Gates (N, K) and plan. Closed edges are -inf before the softmax. Routers stay in fp32."""
        logits_NE = x_ND.float() @ self.router
        if open_E is not None:
            logits_NE = logits_NE.masked_fill(~open_E, -math.inf)
        total_N1 = logits_NE.logsumexp(-1, keepdim=True)
        prob_NE = (logits_NE - total_N1).exp()
        top_NK, choice_NK = logits_NE.topk(self.top_k, dim=-1)
        gate_NK = top_NK.softmax(-1) if self.top_k > 1 else (top_NK - total_N1).exp()
        plan = make_plan(choice_NK, len(self.visible))
        load_E = plan.end_E.diff(prepend=plan.end_E.new_zeros(1)) / choice_NK.numel()
        entropy = torch.special.entr(prob_NE.detach()).sum(-1).mean()
        return gate_NK, plan, Routing(load_E, prob_NE.mean(0), total_N1.square().mean(), entropy)

    def forward(self, x_ND: Tensor, w_in_S: list[Tensor], w_out_S: list[Tensor], open_E: Tensor | None):
        gate_NK, plan, routing = self.route(x_ND, open_E)
        w_in_EDM, w_out_EMD = (torch.stack([w[j] for j in self.visible]) for w in (w_in_S, w_out_S))
        hidden_AM = SquaredReLU.apply(grouped_mm(Gather.apply(x_ND, plan), w_in_EDM, offs=plan.end_E))
        y_AD = grouped_mm(hidden_AM, w_out_EMD, offs=plan.end_E)
        return Combine.apply(y_AD, gate_NK.to(y_AD.dtype), plan), routing


class Block(nn.Module):
    def __init__(self, config: TrainConfig, visible: list[int]):
        super().__init__()
        self.attention = Attention(config)
        self.moe = MoE(config, visible) if config.ffn == "moe" else None
        hidden_dim = num_always(config) * config.expert_dim
        self.mlp = MLP(config.model_dim, hidden_dim) if hidden_dim else None

    def forward(self, x_BTD: Tensor, factor: Tensor, banks, open_E) -> tuple[Tensor, Routing | None]:
        x_BTD = x_BTD + self.attention(Norm.apply(x_BTD), factor)
        y_ND, routing = Norm.apply(x_BTD).flatten(0, 1), None
        out_ND = self.mlp(y_ND) if self.mlp else 0
        if self.moe:
            routed_ND, routing = self.moe(y_ND, *banks, open_E)
            out_ND = out_ND + routed_ND
        return x_BTD + out_ND.view_as(x_BTD), routing


class GPT(nn.Module):
    """The model. Stored experts are two banks of (in, out) matrices, the layers' own and the pool's; layers hold
    no copies. Raises Mistake for a config that cannot be trained."""

    def __init__(self, config: TrainConfig):
        super().__init__()
        self.config = c = resolve(config)
        vocab = VOCAB_SIZE[c.vocab] + 1
        self.embed = nn.Parameter(torch.empty(vocab, c.model_dim))
        self.edges_LS = _edges(c)  # stays on the CPU, so that reading it never waits for a device
        self.blocks = nn.ModuleList(Block(c, row.nonzero().flatten().tolist()) for row in self.edges_LS)
        sizes = {"local": c.depth * c.num_local, "pool": c.num_universal}
        self.bank_names = [name for name, size in sizes.items() if size]
        for name in self.bank_names:
            shape = (sizes[name], c.model_dim, c.expert_dim)
            self.register_parameter(f"{name}_in", nn.Parameter(torch.empty(shape)))
            self.register_parameter(f"{name}_out", nn.Parameter(torch.empty(shape).mT.contiguous()))
        self.head = nn.Parameter(torch.empty(vocab, c.model_dim))
        for name, param in self.named_parameters():
            init_param(name, param, c.seed)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) in float32 for token ids 0..vocab_size, the last of which is BOS."""
        return self.trace(tokens_BT)[0]

    def trace(self, tokens_BT: Tensor, open_LS: Tensor | None = None) -> tuple[Tensor, list[Routing]]:
        """Logits and every mixture layer's Routing. `open_LS` closes edges (None: all open)."""
        dtype = torch.bfloat16 if tokens_BT.is_cuda else self.embed.dtype
        banks = tuple(self.bank(side, dtype) for side in ("in", "out"))
        factor = rotary(tokens_BT.shape[1], self.config.head_dim, tokens_BT.device)
        x_BTD, routings = Norm.apply(F.embedding(tokens_BT, self.embed).to(dtype)), []
        for layer, block in enumerate(self.blocks):
            open_E = None if open_LS is None else open_LS[layer][self.edges_LS[layer]].to(x_BTD.device)
            x_BTD, routing = block(x_BTD, factor, banks, open_E)
            routings += [routing] if routing else []
        return F.linear(Norm.apply(x_BTD), self.head.to(dtype)).float(), routings

    def bank(self, side: str, dtype: torch.dtype) -> list[Tensor]:
        """One view a stored expert, in id order. Unbound once a pass: indexing the bank in every layer would
        zero-fill the whole of it in every layer's backward."""
        return [w for name in self.bank_names for w in getattr(self, f"{name}_{side}").to(dtype).unbind(0)]


def init_param(name: str, param: Tensor, seed: int) -> None:
    """Each parameter draws from a stream of its own name and seed, so that models that differ in one part start
    equal in all others. Scales: nanochat."""
    stream = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    with torch.no_grad():
        if name == "embed":
            param.normal_(generator=stream)
        elif name == "head":
            param.normal_(std=0.001, generator=stream)
        elif name.endswith("out"):
            param.zero_()
        elif name.endswith("router"):
            param.normal_(std=param.shape[0] ** -0.5, generator=stream)
        else:
            bound = (3 / param.shape[-2]) ** 0.5
            param.uniform_(-bound, bound, generator=stream)


# --- Optimizer -------------------------------------------------------------------------------------------


class Group(NamedTuple):
    kind: str  # "adamw" or "muon"
    params: list[Tensor]
    lr: float
    weight_decay: float


def parameter_groups(model: GPT) -> list[Group]:
    """Every parameter in exactly one group, with its peak learning rate after the scaling rules."""
    c = model.config
    parts: dict[str, list[Tensor]] = {"embed": [], "head": [], "router": [], "pool": [], "": []}
    for name, param in model.named_parameters():
        parts[next(part for part in parts if part in name)].append(param)
    scale = adamw_scale(c)
    matrix_lr = c.matrix_lr * (scale if c.optimizer == "adamw" else batch_scale(c))
    mean_reach = model.edges_LS[:, c.depth * c.num_local :].sum().item() / max(1, c.num_universal)
    pool_lr = matrix_lr / max(1.0, mean_reach) ** c.pool_lr_divisor
    groups = [
        Group("adamw", parts["embed"], c.embed_lr * scale, 0.0),
        Group("adamw", parts["head"], c.head_lr * scale, 0.0),
        Group("adamw", parts["router"], c.router_lr * scale, 0.0),
        Group(c.optimizer, parts["pool"], pool_lr, c.weight_decay),
        Group(c.optimizer, parts[""], matrix_lr, c.weight_decay),
    ]
    return [group for group in groups if group.params]


class AdamW:
    """Decoupled-decay Adam by the fused kernel itself: torch.optim would load the compiler stack for seconds."""

    def __init__(self, groups: list[Group]):
        self.groups = groups
        self.moments = [[[torch.zeros_like(p) for p in g.params] for _ in range(2)] for g in groups]
        self.num_steps = torch.zeros((), device=groups[0].params[0].device)

    def step(self, rate: float) -> None:
        self.num_steps += 1
        for group, (first, second) in zip(self.groups, self.moments, strict=True):
            grads, steps = [p.grad for p in group.params], [self.num_steps] * len(group.params)
            rates = {"lr": group.lr * rate, "weight_decay": group.weight_decay, "eps": 1e-10}
            modes = {"beta1": 0.9, "beta2": 0.95, "amsgrad": False, "maximize": False}
            torch._fused_adamw_(group.params, grads, first, second, [], steps, **rates, **modes)


# Degree-5 odd polynomials that drive singular values to 1 (Polar Express, arXiv 2505.16932).
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each of (n, rows, cols), to within a few percent."""
    x = g.bfloat16() if g.is_cuda else g
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)
    for a, b, c in POLAR:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(g.dtype)


class Muon:
    """Momentum, orthogonalized matrix by matrix, each expert on its own, same shapes in one batch (nanochat)."""

    def __init__(self, groups: list[Group]):
        shaped: dict[tuple, list[tuple[Tensor, Group]]] = {}
        for group in groups:
            for param in group.params:
                shaped.setdefault(param.shape[-2:], []).append((param, group))
        self.batches = [(members, [torch.zeros_like(p) for p, _ in members]) for members in shaped.values()]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for members, momenta in self.batches:
            grads = [p.grad for p, _ in members]
            torch._foreach_lerp_(momenta, grads, 0.05)
            torch._foreach_lerp_(grads, momenta, 0.95)  # Nesterov
            rows, cols = grads[0].shape[-2:]
            update = orthogonalize(torch.cat([g.view(-1, rows, cols) for g in grads]))
            update *= max(1.0, cols / rows) ** 0.5
            pieces = update.split([p.numel() // (rows * cols) for p, _ in members])
            for (param, group), piece in zip(members, pieces, strict=True):
                param.mul_(1 - group.lr * rate * group.weight_decay)
                param.add_(piece.view_as(param), alpha=-group.lr * rate)


def make_optimizers(model: GPT) -> list[AdamW | Muon]:
    groups = parameter_groups(model)
    by_kind = {
        make: [g for g in groups if g.kind == kind] for kind, make in (("adamw", AdamW), ("muon", Muon))
    }
    return [make(chosen) for make, chosen in by_kind.items() if chosen]


def schedule(config: TrainConfig, progress: float) -> float:
    """Share of the peak learning rate at `progress` in (0, 1]: linear up, constant, linear down."""
    if progress < config.warmup:
        return progress / config.warmup
    left = (1 - progress) / config.warmdown if config.warmdown else 1.0
    return config.final_lr_frac + (1 - config.final_lr_frac) * min(1.0, left)


# --- Data ------------------------------------------------------------------------------------------------


class Rows:
    """Training rows: the documents laid end to end and cut in pieces of seq_len tokens; a piece predicts its
    own tokens from BOS and the ones before. A document that begins inside a row begins with BOS there. Only
    the last seq_len - 1 tokens of a corpus can go unused. Order: a permutation for each (seed, epoch), which
    depends neither on the model nor on the batch."""

    def __init__(self, corpus: Any, config: TrainConfig):
        self.corpus, self.config = corpus, config
        self.num_rows = len(corpus.tokens) // config.seq_len
        require(corpus.vocab_size == VOCAB_SIZE[config.vocab], config, "vocab", "not what the corpus holds")
        require(self.num_rows > 0, config, "seq_len", "the corpus has fewer tokens; shorten it or add text")
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def row_ids(self, first: int, count: int) -> Iterator[int]:
        for number in range(first, first + count):
            epoch, place = divmod(number, self.num_rows)
            if epoch != self.epoch:
                self.epoch = epoch
                self.order = np.random.default_rng([self.config.seed, epoch]).permutation(self.num_rows)
            yield self.order[place]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one step, (B, T) int64 each."""
        width = self.config.seq_len
        num_rows = self.config.batch_tokens // width
        start_B = np.fromiter(self.row_ids(step * num_rows, num_rows), np.int64, num_rows) * width
        place_BT = start_B[:, None] + np.arange(width)
        targets_BT = self.corpus.tokens[place_BT].astype(np.int64)
        inputs_BT = np.roll(targets_BT, 1, axis=1)
        begins = self.corpus.offsets[np.searchsorted(self.corpus.offsets, place_BT)] == place_BT
        begins[:, 0] = True
        inputs_BT[begins] = self.corpus.bos
        return torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT)


def load_rows(config: TrainConfig) -> Rows:
    from harness.judge.corpus import load_train

    require(config.corpus != "", config, "corpus", "none named; run `harness prepare` and give its folder")
    try:
        corpus = load_train(Path(config.corpus).expanduser())
    except (ValueError, OSError) as error:
        raise Mistake(f"corpus={config.corpus}: {error}") from None
    return Rows(corpus, config)


# --- Training --------------------------------------------------------------------------------------------

CHECK_EVERY_STEPS = 10  # how often the loop looks at the loss and the loads (on CUDA it waits for the device)
DIVERGED_MARGIN_NATS = 1.0  # above the loss of a uniform guess
COLLAPSE_CHECKS = 5  # checks whose mean the collapse guard takes
COLLAPSE_AFTER = 0.2  # share of training before which the guard is silent
DEAD_BELOW = 0.1  # an expert with less than this share of its exposure counts as dead


class Diverged(RuntimeError):
    """The loss is not a number, or worse than guessing once the warmup is over."""


class Collapsed(RuntimeError):
    """A few experts take all the traffic."""


def spread(values: list[Tensor], edges_LS: Tensor) -> Tensor:
    """(L, S) from a vector over the visible experts of each layer."""
    return torch.zeros(edges_LS.shape, device=edges_LS.device).masked_scatter(edges_LS, torch.cat(values))


class Step(NamedTuple):
    nats: Tensor  # mean cross-entropy of the batch, a scalar without gradient
    load_LS: Tensor | None
    open_LS: Tensor
    entropy: list[Tensor]


def routing_health(config: TrainConfig, result: Step) -> dict[str, Any]:
    """Numbers for the metrics. `*_over_exposure`: load of a stored expert over that of uniform routing."""
    load_LS, exposure_S = result.load_LS, exposure(result.open_LS)
    ratio_S = (load_LS.sum(0).double() / exposure_S)[exposure_S > 0]
    return {
        "max_load": (load_LS * result.open_LS.sum(1, keepdim=True)).amax(1).tolist(),
        "entropy": torch.stack(result.entropy).tolist(),
        "max_over_exposure": ratio_S.max().item(),
        "p5_over_exposure": ratio_S.quantile(0.05).item(),
        "dead_experts": int((ratio_S < DEAD_BELOW).sum()),
        "pool_share": load_LS[:, config.depth * config.num_local :].sum().item() / config.depth,
    }


def train_step(model: GPT, optimizers: list, inputs_BT: Tensor, targets_BT: Tensor, step: int) -> Step:
    """One update at `step`; the schedule and the ramp are functions of the share of tokens seen."""
    c, device = model.config, inputs_BT.device
    num_steps = c.tokens // c.batch_tokens
    open_LS = open_edges(c, model.edges_LS, step / num_steps, step)
    logits_BTV, routings = model.trace(inputs_BT, open_LS)
    loss = nats = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
    edges_LS = (model.edges_LS if open_LS is None else open_LS).to(device, non_blocking=True)
    load_LS = None
    if routings:
        visible_LS = model.edges_LS.to(device, non_blocking=True)
        load_LS = spread([r.load_E for r in routings], visible_LS)
        prob_LS = spread([r.prob_E for r in routings], visible_LS)
        loss = loss + c.zloss_coeff * torch.stack([r.zloss for r in routings]).mean()
        if c.balance != "none":
            loss = loss + balance_loss(c, load_LS, prob_LS, edges_LS)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step(schedule(c, (step + 1) / num_steps))
    for param in model.parameters():
        param.grad = None
    return Step(nats.detach(), load_LS, edges_LS, [r.entropy for r in routings])


class Watch:
    """Looks at a step every CHECK_EVERY_STEPS and raises when the run is lost."""

    def __init__(self, config: TrainConfig):
        self.config, self.ratios = config, deque(maxlen=COLLAPSE_CHECKS)
        self.worst_nats = math.log(VOCAB_SIZE[config.vocab] + 1) + DIVERGED_MARGIN_NATS

    def check(self, result: Step, progress: float) -> None:
        nats, limit = result.nats.item(), self.config.collapse_limit
        if not math.isfinite(nats) or (progress > self.config.warmup and nats > self.worst_nats):
            raise Diverged(f"training loss {nats:.3g} nats after {progress:.0%} of training")
        if result.load_LS is None or limit == 0:
            return
        self.ratios.append(routing_health(self.config, result)["max_over_exposure"])
        mean = sum(self.ratios) / len(self.ratios)
        if len(self.ratios) == COLLAPSE_CHECKS and progress > COLLAPSE_AFTER and mean > limit:
            raise Collapsed(
                f"the busiest expert has {mean:.3g} times its exposure, collapse_limit={limit:.3g}"
            )


def tell(text: str, *, passing: bool = False) -> None:
    """A line on stderr; a passing one is redrawn in place, and shown on a terminal only."""
    live = sys.stderr.isatty()
    if live or not passing:
        line = f"\r{text:<70}" if live else text
        print(line, end="" if passing else "\n", file=sys.stderr, flush=True)


def pick_device(name: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise Mistake("device=cuda: no such device here; use device=cpu or device=auto")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def save_checkpoint(path: Path, model: GPT, step: int) -> None:
    """Write {"config", "model", "step", "tokens"} whole or not at all."""
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    saved = {"config": asdict(model.config), "model": weights, "step": step}
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(saved | {"tokens": step * model.config.batch_tokens}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def train(config: TrainConfig, out: Path) -> None:
    """Train and write out/metrics.jsonl and out/checkpoint.pt.

    Raises Mistake before anything is written, then Diverged, Collapsed or a memory error.
    """
    c = resolve(config)
    device, rows = pick_device(c.device), load_rows(c)
    model = GPT(c).to(device)
    optimizers, watch, num_steps = make_optimizers(model), Watch(c), c.tokens // c.batch_tokens
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"--out {out}: {error.strerror}; name another folder") from None
    size = f"depth {c.depth}, width {c.model_dim}, {_count(c)['total']:,} parameters"
    tell(f"training {size}: {num_steps} steps of {c.batch_tokens} tokens on {device.type}")
    gc.collect()
    gc.freeze()  # what stands now lives to the end: spare the collector from walking it
    since_line, started = [], time.monotonic()
    with open(out / "metrics.jsonl", "w") as metrics:
        for step in range(num_steps):
            inputs_BT, targets_BT = (x.to(device, non_blocking=True) for x in rows.batch(step))
            result, done = train_step(model, optimizers, inputs_BT, targets_BT, step), step + 1
            since_line.append(result.nats)
            if done % CHECK_EVERY_STEPS == 0 or done == num_steps:
                watch.check(result, done / num_steps)
            if done % c.log_every == 0 or done == num_steps:
                line = metrics_line(c, result, since_line, done, time.monotonic() - started)
                print(json.dumps(line, allow_nan=False), file=metrics, flush=True)
                speed, nats = line["tokens"] / line["seconds"], line["train_nats"]
                eta_seconds = (c.tokens - line["tokens"]) / speed
                done_text = f"{done / num_steps:4.0%}  {nats:.4f} nats  {speed:,.0f} tokens/s"
                tell(f"{done_text}  {eta_seconds:.0f} s left", passing=True)
                since_line = []
    save_checkpoint(out / "checkpoint.pt", model, num_steps)
    tell(f"{done_text}  {time.monotonic() - started:.1f} s")


def metrics_line(
    config: TrainConfig, result: Step, since_line: list[Tensor], done: int, seconds: float
) -> dict[str, Any]:
    """One line of metrics.jsonl; train_nats is the mean over the steps since the line before."""
    nats = torch.stack(since_line).double().mean().item()
    if not math.isfinite(nats):
        raise Diverged(f"training loss {nats} nats at step {done}")
    rate = schedule(config, done / (config.tokens // config.batch_tokens))
    line = {"step": done, "tokens": done * config.batch_tokens, "seconds": seconds, "train_nats": nats}
    line |= {"lr": config.matrix_lr * rate}
    return line if result.load_LS is None else line | routing_health(config, result)


# --- Serving logits --------------------------------------------------------------------------------------


def load_model(checkpoint: Path, device: torch.device) -> GPT:
    if not checkpoint.is_file():
        raise Mistake(f"--logits {checkpoint}: no such file; give a checkpoint.pt")
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = GPT(TrainConfig(**saved["config"]))
    model.load_state_dict(saved["model"])
    return model.to(device).eval()


def serve_logits(checkpoint: Path) -> None:
    """Answer requests until the end of input. Request: uint32 B, T and B*T int32 ids, little-endian; answer:
    uint32 B, T, V and B*T*V float32. Every edge is open, nothing is carried from one request to the next."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints to stdout now cannot corrupt the channel
    device = pick_device("auto")
    model = load_model(checkpoint, device)
    while head := requests.read(8):
        shape = struct.unpack("<II", head)
        body = requests.read(4 * shape[0] * shape[1])
        tokens_BT = torch.from_numpy(np.frombuffer(body, "<i4").astype(np.int64).reshape(shape))
        with torch.inference_mode():
            logits_BTV = model(tokens_BT.to(device)).cpu().contiguous()
        answers.write(struct.pack("<III", *logits_BTV.shape) + logits_BTV.numpy().astype("<f4").tobytes())
        answers.flush()


# --- Command line ---------------------------------------------------------------------------------------


def parse_setting(item: str) -> tuple[str, Any]:
    """("depth", 2) from "depth=2", typed as the field is; Mistake if it cannot be."""
    key, equals, text = item.partition("=")
    if not equals:
        raise Mistake(f"{item}: not understood; write settings as key=value")
    kind = {spec.name: spec.type for spec in fields(TrainConfig)}.get(key, str)
    try:
        return key, {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise Mistake(f"{item}: must be of type {kind.__name__}") from None


def read_config(path: Path | None, depth: int | None, items: list[str]) -> TrainConfig:
    """The file's settings, then --depth, then key=value items; Mistake for what is not a setting."""
    try:
        values = json.loads(path.read_text()) if path else {}
        values |= {"depth": depth} if depth is not None else {}
    except (ValueError, TypeError, OSError) as error:
        raise Mistake(f"--config {path}: must be one flat JSON object of settings ({error})") from None
    values |= dict(map(parse_setting, items))
    known = [spec.name for spec in fields(TrainConfig)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            remedy = f"did you mean {near[0]}?" if near else "see --help for the settings"
            raise Mistake(f"{key}={values[key]!r}: no such setting; {remedy}")
    return TrainConfig(**values)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Mistake(f"{message}; see --help")


def parse_args(argv: list[str]) -> argparse.Namespace:
    about = __doc__.partition("\n\nShapes")[0]
    settings = "\n".join(f"  {s.name}={s.default}  {s.metadata['doc']}" for s in fields(TrainConfig))
    parser = Parser("train_small.py", description=about, epilog=f"settings:\n{settings}", allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", metavar="FILE", type=Path, help="flat JSON object of settings")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where metrics.jsonl and checkpoint.pt go")
    parser.add_argument("--depth", type=int, metavar="N", help="the one dial; same as depth=N")
    parser.add_argument("--describe", action="store_true", help="print what the run would be, as JSON")
    parser.add_argument(
        "--logits", metavar="CHECKPOINT", type=Path, help="serve logits over stdin and stdout"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="a setting; wins over the file")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # trials run side by side; a second thread costs more than it brings
    torch.set_flush_denormal(True)
    if args.logits:
        serve_logits(args.logits)
        return
    config = read_config(args.config, args.depth, args.settings)
    if args.describe:
        print(json.dumps(describe(config)))
    elif args.out:
        train(config, args.out)
    else:
        raise Mistake("--out: missing; say where the run goes with --out DIR")


def is_out_of_memory(error: BaseException) -> bool:
    allocator = any(text in str(error) for text in ("can't allocate memory", "not enough memory"))
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or allocator


def main(argv: list[str]) -> int:
    """Run the command line and return its exit code; safe to call in a forked process."""
    try:
        run(parse_args(argv))
        return 0
    except SystemExit as leaving:  # --help
        return int(leaving.code or 0)
    except Mistake as error:
        code, text = 2, str(error)
    except Diverged as error:
        code, text = 3, str(error)
    except Collapsed as error:
        code, text = 4, str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code, text = 5, f"out of memory; lower batch_tokens or the model ({error})"
    print("train_small.py:", " ".join(text.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
