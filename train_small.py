"""Train one small MoUE-style language model: the evaluation target of the harness, in one file.

    python train_small.py --depth 2 tokens=200000 corpus=~/.cache/moue/corpora/embedded --out /tmp/run
    python train_small.py --describe depth=4 topology=clip
    python train_small.py --from /tmp/moe/checkpoint.pt ramp=random depth=2 ... --out /tmp/moue
    torchrun --nproc-per-node 8 train_small.py --depth 12 corpus=... --out /tmp/run
    python train_small.py --logits /tmp/run/checkpoint.pt      (serves logits over stdin and stdout)

The model has nanochat's shape (RoPE, QK norm, weightless RMS norm, ReLU^2, untied head, output projections
born at zero). Its feed-forward layers are mixtures of experts, in which every layer owns `num_local` experts
and sees a window of a pool of `num_universal` experts that belong to no layer. "MoUE-style": of MoUE (arXiv
2603.04971) only the abstract could be read, so what is marked ASSUMPTION below is a reading, not the paper.
The designs it is compared with are settings: dense (ffn=dense), MoE (topology=none; fine-grained, shared,
balance=bias), MoRE and ReXMoE (topology=blocks), UniPool (num_local=0 topology=full router=norm balance=pool),
MoEUT-style recursion (recursion=2 num_local=0 gate=sigmoid renormalize=false).

The run writes metrics.jsonl and checkpoint.pt, never a score: the judge scores.
Exit codes: 0 done, 2 user's mistake, 3 diverged, 4 routing collapsed, 5 out of memory, other: crash; torchrun
makes 1 of all but 0.

Shapes, as name suffixes: B rows, T positions, N = B*T tokens, D model width, H heads, C head width,
V vocabulary, L layers, S stored experts, U of them in the pool, E experts one layer sees, K experts a token
uses, A = N*K assignments, M expert width, P width of a router's inner state. A stored expert's id is
l*num_local + i for the i-th expert of layer l and L*num_local + j for universal expert j.
"""

import argparse
import ctypes
import difflib
import gc
import hashlib
import json
import math
import os
import pickle
import struct
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TextIO

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
ROUTERS = ("linear", "mlp", "norm", "logit_residual", "ema", "gru")
BALANCES = ("uelb", "layer", "pool", "bias", "none")
RAMPS = ("none", "random", "distance", "bias")


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run: the one place for names, defaults, ranges and meaning."""

    seed: int = setting(0, "seed of initial weights, data order and random ramp", 0, 2**31 - 1, run=True)
    depth: int = setting(4, "layers; the one dial, from which the rest follows", 1, 128, run=True)
    tokens: int = setting(-1, "token budget; -1: 2 an active parameter", 1, 10**13, derived=True, run=True)
    device: str = setting("auto", "where to run", choices=("auto", "cpu", "cuda"), run=True)
    corpus: str = setting("", "folder of the prepared corpus", run=True)
    log_every: int = setting(10, "steps between two lines of metrics", 1, 10**6, run=True)
    save_every: int = setting(0, "steps between saved states to go on from; 0: none", 0, 10**9, run=True)
    micro_tokens: int = setting(-1, "tokens of one pass; -1: all", 8, 1 << 26, derived=True, run=True)
    compile: bool = setting(False, "compile attention (pays on long CUDA runs)", run=True)

    horizon: float = setting(1.0, "share of the token budget to train on", 1e-4, 1e4)
    aspect: int = setting(64, "model width per layer", 8, 256)
    model_dim: int = setting(-1, "model width; -1: depth * aspect", 16, 16384, derived=True)
    head_dim: int = setting(32, "width of an attention head", 16, 256)
    recursion: int = setting(0, "distinct blocks, layer l using block l % recursion; 0: all", 0, 128)
    depth_embedding: bool = setting(False, "a learned vector before each layer's router and experts (MoRE)")
    vocab: str = setting("bytes", "what a token is", choices=("bytes", "bpe"))
    vocab_size: int = setting(-1, "ids of text; the model has one more, BOS", 256, 65535, derived=True)
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
    keep_home: bool = setting(False, "every layer also sees its own share of the ring, where it began")
    untied_first: int = setting(0, "first layers that share nothing, their pool places being private", 0, 127)
    untied_last: int = setting(0, "last layers that share nothing", 0, 127)
    stages: int = setting(1, "pipeline stages of equal depth, for --describe and stage_sharing", 1, 128)
    stage_sharing: str = setting(
        "all", "within: a part of the pool for each stage", choices=("all", "within")
    )

    router: str = setting("linear", "how logits are made", choices=ROUTERS)
    router_dim: int = setting(-1, "inner width of mlp, ema, gru", 0, 4096, derived=True)
    router_feedback: bool = setting(True, "gru: the state also reads the keys of the experts just used")
    gate: str = setting("softmax", "what makes gates of logits", choices=("softmax", "sigmoid"))
    renormalize: bool = setting(True, "a token's gates sum to 1 (with top_k=1 they never do)")
    split_top_k: int = setting(0, "routed experts taken from the pool; 0: one joint top-k", 0, 64)
    layer_gate: bool = setting(False, "a learned factor on each layer's routed output")

    balance: str = setting("uelb", "what balances the load", choices=BALANCES)
    balance_coeff: float = setting(
        0.01, "weight of its loss; uelb, layer: its value at uniform routing", 0.0, 10.0
    )
    balance_ramp: float = setting(0.0, "share of training over which that weight rises from 0", 0.0, 1.0)
    exposure_power: int = setting(1, "uelb: 2 asks equal load per expert, 1 per edge", choices=(0, 1, 2))
    balance_scope: str = setting("joint", "experts balanced", choices=("joint", "pool_only"))
    balance_batch: str = setting("global", "tokens whose load counts", choices=("global", "micro", "lagged"))
    bias_rate: float = setting(0.001, "balance=bias: change of an expert's bias in a step", 0.0, 1.0)
    zloss_coeff: float = setting(1e-4, "weight of the squared logsumexp of router logits", 0.0, 1.0)
    collapse_limit: float = setting(
        -1, "max_over_exposure to stop at; -1: nearly the worst; 0: never", 0.0, 1e6, derived=True
    )
    dead_limit: float = setting(1.0, "share of dead experts above which to stop; 1: never", 0.0, 1.0)

    ramp: str = setting(
        "none", "order in which edges open; bias: all at once, by a fading bias", choices=RAMPS
    )
    ramp_start: float = setting(0.05, "share of training at which edges begin to open", 0.0, 1.0)
    ramp_end: float = setting(0.3, "share of training at which all edges are open", 0.0, 1.0)
    ramp_keep: float = setting(1.0, "share of its own experts a layer sees from the start", 0.0, 1.0)
    edge_bias: float = setting(
        10.0, "ramp=bias: what is first taken off the logit of a closed edge", 0.0, 1e3
    )
    router_boost: float = setting(1.0, "factor on the routers' rate until ramp_end", 0.01, 100.0)
    convert_pick: str = setting(
        "random",
        "--from a MoE: its experts that found the pool",
        choices=("random", "most_used", "least_used"),
    )
    convert_rows: str = setting("zero", "--from: router rows of new edges", choices=("zero", "home"))

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


VOCAB_SIZE = {"bytes": 256, "bpe": 8192}  # the default number of ids of text

# How size, horizon, batch and rates follow the one dial, relative to a reference that was tuned by hand on a
# few minutes of training at depth 2. Width: nanochat's depth * aspect. Rates against width: muP (Tensor
# Programs V, arXiv 2203.03466) and its form for mixtures (arXiv 2508.09752), under which activations move by
# O(1) a step at every width; bench/coordinates.py checks it. Adam's rate is constant for the embedding and
# falls as 1/width for what reads the stream: head, routers and, under AdamW, matrices. Muon's update has the
# same spectral norm at every width, so its rate stays. Rates against batch: square root (nanochat). Batch
# against horizon: tokens^0.383 (Power Lines, arXiv 2505.13738). Weight decay: so that the averaging time
# 1/(rate * decay) stays the same share of the run (Power Lines). Pool: one step moves a universal expert in
# every layer that uses it, so its rate may fall as reach**-pool_lr_divisor (0.5 in arXiv 2606.16825's code).
# ASSUMPTION: that exponents found on larger and mostly dense models hold here.
REFERENCE_DIM, REFERENCE_BATCH_TOKENS, REFERENCE_TOKENS = 256, 4096, 2**21
TOKENS_PER_PARAM = 2  # a smoke run; compute-optimal training is nearer to 20
MATRIX_LR = {"muon": 0.06, "adamw": 0.008}
WIDTH_POWER = {"embed": 0.0, "head": -1.0, "router": -1.0, "matrix": -1.0}  # of Adam's rates


def batch_scale(config: TrainConfig) -> float:
    return (config.batch_tokens / REFERENCE_BATCH_TOKENS) ** 0.5


def adam_scale(config: TrainConfig, part: str) -> float:
    return (config.model_dim / REFERENCE_DIM) ** WIDTH_POWER[part] * batch_scale(config)


def matrix_rate(config: TrainConfig) -> float:
    """Peak learning rate of matrices, after the scaling rules."""
    scale = adam_scale(config, "matrix") if config.optimizer == "adamw" else batch_scale(config)
    return config.matrix_lr * scale


def decay_at(config: TrainConfig, rate: float) -> float:
    """Weight decay at which 1 / (rate * decay) is the same share of the run's steps as in the reference."""
    reference_steps = REFERENCE_TOKENS / REFERENCE_BATCH_TOKENS
    return config.weight_decay * config.matrix_lr / rate * reference_steps / num_steps(config)


def derived_batch_tokens(tokens: int, seq_len: int) -> int:
    ideal = REFERENCE_BATCH_TOKENS * (tokens / REFERENCE_TOKENS) ** 0.383
    num_rows = 2 ** round(math.log2(max(1.0, ideal / seq_len)))
    return min(num_rows, max(1, tokens // seq_len)) * seq_len


def num_steps(config: TrainConfig) -> int:
    return int(config.tokens * config.horizon) // config.batch_tokens


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

    Settings that mean nothing beside the others get one neutral value, so that equal models mostly have equal
    configs; a window that happens to be the whole pool is not called full.
    Raises Mistake, in one line with the remedy, for a value or a combination that cannot be trained.
    """
    check_fields(config)
    c = SimpleNamespace(**{spec.name: spec.type(getattr(config, spec.name)) for spec in fields(config)})
    if c.vocab_size == -1 or c.vocab == "bytes":
        require(c.vocab_size in (-1, VOCAB_SIZE[c.vocab]), c, "vocab_size", "vocab=bytes has 256 ids")
        c.vocab_size = VOCAB_SIZE[c.vocab]
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
    resolve_routing(c)
    check_visibility(c)
    if c.collapse_limit == -1:  # routing can do no worse than width / top_k; the score judges all but that
        worst = int(_edges(c).sum(1).max()) / c.top_k
        c.collapse_limit = 0.99 * worst if worst > 1 else 0.0
    if c.matrix_lr == -1:
        c.matrix_lr = MATRIX_LR[c.optimizer]
    if c.tokens == -1:
        c.tokens = TOKENS_PER_PARAM * _count(c)["active"]
    budget = int(c.tokens * c.horizon)
    if c.batch_tokens == -1:
        c.batch_tokens = derived_batch_tokens(budget, c.seq_len)
    require(c.batch_tokens % c.seq_len == 0, c, "batch_tokens", f"must be a multiple of seq_len={c.seq_len}")
    require(c.batch_tokens <= budget, c, "tokens", f"less than one step; give at least {c.batch_tokens}")
    if c.micro_tokens == -1:
        c.micro_tokens = c.batch_tokens
    fits = c.micro_tokens % c.seq_len == 0 and c.batch_tokens % c.micro_tokens == 0
    remedy = f"must be a multiple of seq_len={c.seq_len} and divide batch_tokens={c.batch_tokens}"
    require(fits, c, "micro_tokens", remedy)
    resolved = TrainConfig(**vars(c))
    check_fields(resolved)
    return resolved


def resolve_experts(c: SimpleNamespace) -> None:
    """Settle num_local and num_universal; by default depth*num_local + num_universal = depth*num_experts."""
    if c.ffn == "dense":
        c.num_local, c.num_universal, c.balance, c.router, c.layer_gate = 0, 0, "none", "linear", False
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
    if c.recursion in (0, c.depth):
        c.recursion = 0
    else:
        require(c.recursion < c.depth, c, "recursion", f"exceeds depth={c.depth}")
        require(c.num_local == 0, c, "num_local", "recursion shares whole blocks; set it to 0, with a pool")


def num_private(c: Any) -> int:
    """Pool places of its own that an untied layer has, so that it sees as many experts as in the matched MoE."""
    return max(0, c.num_experts - c.num_local)


def ring_size(c: Any) -> int:
    return c.num_universal - (c.untied_first + c.untied_last) * num_private(c)


def resolve_windows(c: SimpleNamespace) -> None:
    """Settle window and stride. ASSUMPTION: num_experts and half of it, so that neighbours overlap by a half;
    more where some expert would be left unseen."""
    require(c.depth % c.stages == 0, c, "stages", f"must divide depth={c.depth}")
    if c.num_universal == 0:
        c.topology, c.window, c.stride, c.layers_per_window, c.wrap = "none", 0, 0, 1, True
        c.untied_first, c.untied_last, c.keep_home, c.stages, c.stage_sharing = 0, 0, False, 1, "all"
        c.balance_scope, c.pool_lr_divisor = "joint", 0.0
        return
    num_untied = c.untied_first + c.untied_last
    require(
        num_untied < c.depth, c, "untied_first", f"with untied_last it must leave some of depth={c.depth}"
    )
    size, num_parts = ring_size(c), c.stages if c.stage_sharing == "within" else 1
    require(
        size > 0, c, "num_universal", f"untied layers take {c.num_universal - size}; raise it or untie less"
    )
    if num_parts > 1:
        require(num_untied == 0, c, "untied_first", "untied layers go with stage_sharing=all only")
        require(size % num_parts == 0, c, "num_universal", f"must be a multiple of stages={c.stages}")
    else:
        c.stage_sharing = "all"
    size, num_layers = size // num_parts, (c.depth - num_untied) // num_parts
    require(
        c.layers_per_window <= num_layers,
        c,
        "layers_per_window",
        f"exceeds the {num_layers} sharing layers of depth={c.depth}",
    )
    require(c.wrap or c.topology == "ring", c, "wrap", "only topology=ring can do without")
    num_groups = -(-num_layers // c.layers_per_window)
    if c.topology == "blocks":
        require(size % num_groups == 0, c, "num_universal", f"must be a multiple of {num_groups} blocks")
    block = size // num_groups
    fixed = {"full": (size, 0), "blocks": (block, block), "random": (c.window, 0)}.get(c.topology, ())
    for key, value in zip(("window", "stride"), fixed, strict=False):
        remedy = f"topology={c.topology} makes it {value}; leave it out"
        require(getattr(c, key) in (-1, value), c, key, remedy)
        setattr(c, key, value)
    if c.topology in ("full", "random"):
        c.layers_per_window, c.keep_home = 1, c.keep_home and c.topology != "full"
    if c.window == -1:
        c.window = min(size, max(c.num_experts, -(-size // num_groups)))
    require(
        1 <= c.window <= size,
        c,
        "window",
        f"must lie in [1, {size}], the places of num_universal that it may see",
    )
    if c.stride == -1:
        c.stride = max(1, c.window // 2, -(-(size - c.window) // max(1, num_groups - 1)))


def resolve_routing(c: SimpleNamespace) -> None:
    """Give what the chosen router, balance and ramp do not read its neutral value, and settle router_dim."""
    if c.num_universal == 0:
        c.router = "linear" if c.router == "logit_residual" else c.router
        c.split_top_k = 0
    if c.router == "ema" and c.depth == 1:  # its state is read by the layer after
        c.router = "linear"
    reads_dim = c.router in ("mlp", "ema", "gru")
    require(c.router_dim <= 0 or reads_dim, c, "router_dim", f"router={c.router} has none; leave it out")
    if reads_dim:
        c.router_dim = 64 if c.router_dim == -1 else c.router_dim
        require(c.router_dim > 0, c, "router_dim", f"router={c.router} needs at least 1")
    else:
        c.router_dim = 0
    faded = c.ramp == "bias" and c.router == "norm" and c.ffn == "moe"
    require(not faded, c, "ramp", "router=norm would scale the fade away; use random or distance")
    require(c.split_top_k <= c.top_k, c, "split_top_k", f"exceeds top_k={c.top_k}")
    neutral = {spec.name: spec.default for spec in fields(TrainConfig)}
    ramped = c.ramp != "none" and (c.num_universal > 0 or c.ramp_keep < 1) and c.ffn == "moe"
    boosted = c.router_boost != 1 and c.ffn == "moe"
    unread = {
        "router_feedback": c.router != "gru",
        "gate": c.router == "norm" or c.ffn == "dense",
        "renormalize": c.router == "norm" or c.top_k == 1 or c.ffn == "dense",
        "split_top_k": c.ffn == "dense",
        "exposure_power": c.balance != "uelb",
        "balance_scope": c.balance == "none",
        "balance_coeff": c.balance in ("bias", "none"),
        "balance_ramp": c.balance in ("bias", "none"),
        "balance_batch": c.balance in ("bias", "none"),
        "bias_rate": c.balance != "bias",
        "zloss_coeff": c.ffn == "dense",
        "ramp": not ramped,
        "ramp_keep": not ramped,
        "edge_bias": not ramped or c.ramp != "bias",
        "ramp_start": not ramped,
        "ramp_end": not ramped and not boosted,
        "router_boost": not boosted,
    }
    vars(c).update({name: neutral[name] for name, unused in unread.items() if unused})
    c.ramp_start = min(c.ramp_start, c.ramp_end)


def check_visibility(c: SimpleNamespace) -> None:
    """Every layer must always see the experts it has to choose, and every stored expert be seen by a layer."""
    if c.ffn == "dense":
        return
    edges_LS, first = _edges(c), c.depth * c.num_local
    closed_LS = ramp_offset(c, edges_LS, -1.0, 0)
    open_LS = edges_LS if closed_LS is None else edges_LS & (closed_LS > -math.inf)
    when = "" if closed_LS is None else "while the ramp is closed "
    fewest = int(open_LS.sum(1).min())
    require(fewest >= c.top_k, c, "top_k", f"{when}a layer sees but {fewest}; raise num_local or window")
    if c.split_top_k:
        sharing_L = edges_LS[:, first:].any(1)
        pool, own = (int(x.sum(1).min()) for x in (open_LS[sharing_L, first:], open_LS[:, :first]))
        require(pool >= c.split_top_k, c, "split_top_k", f"{when}a layer sees but {pool} of the pool")
        remedy = f"{when}leaves {c.top_k - c.split_top_k} to the {own} local experts of a layer"
        require(own >= c.top_k - c.split_top_k, c, "split_top_k", remedy)
    num_unseen = int((~edges_LS.any(0)).sum())
    remedy = f"{num_unseen} experts are seen by no layer; raise window or stride"
    require(num_unseen == 0, c, "window", remedy)
    if c.recursion:
        repeats = bool((edges_LS[c.recursion :] == edges_LS[: -c.recursion]).all())
        remedy = (
            "a block must see the same experts each time; use topology=full, or ring with a fitting stride"
        )
        require(repeats, c, "recursion", remedy)


# --- Topology, exposure, balance -------------------------------------------------------------------------


def connectivity(config: TrainConfig) -> Tensor:
    """(L, S) bool: which layer may route to which stored expert.

    ASSUMPTION for the ring (MoUE calls it a staggered rotational topology): layer l sees `window` experts from
    ring place stride * (l // layers_per_window) on. `clip` holds the last windows back at the ring's end,
    `blocks` gives adjacent layers a block of their own (MoRE, ReXMoE), `full` is one shared pool (UniPool),
    `random` deals windows with reaches that differ by at most one. Untied layers have private places at the
    pool's two ends; with stage_sharing=within every pipeline stage has its own, equal, part of the pool.
    """
    return _edges(resolve(config))


def _edges(c: Any) -> Tensor:
    own = np.kron(np.eye(c.depth, dtype=bool), np.ones(c.num_local, dtype=bool))
    pool = np.zeros((c.depth, c.num_universal), dtype=bool)
    if c.num_universal:
        home_U = home_layer(c)
        untied = set(range(c.untied_first)) | set(range(c.depth - c.untied_last, c.depth))
        for layer in untied:
            pool[layer] = home_U == layer
        num_parts = c.stages if c.stage_sharing == "within" else 1
        layers, places = (
            np.array(sorted(set(range(c.depth)) - untied)),
            np.flatnonzero(~np.isin(home_U, [*untied])),
        )
        for rows, columns in zip(np.split(layers, num_parts), np.split(places, num_parts), strict=True):
            pool[np.ix_(rows, columns)] = windows(c, len(rows), len(columns))
        if c.keep_home:
            pool[home_U, np.arange(c.num_universal)] = True
    return torch.from_numpy(np.concatenate([own.reshape(c.depth, -1), pool], axis=1))


def windows(c: Any, num_layers: int, size: int) -> np.ndarray:
    """(num_layers, size) bool: the topology over layers that share `size` places."""
    seen = np.zeros((num_layers, size), dtype=bool)
    rng = np.random.default_rng(0)  # the graph belongs to the candidate, so it does not move with the seed
    for layer in range(num_layers):
        start = c.stride * (layer // c.layers_per_window)
        if c.topology == "random":
            deck = rng.permutation(size)
            places = deck[np.argsort(seen[:, deck].sum(0), kind="stable")][: c.window]
        elif c.topology == "clip":
            places = min(start, size - c.window) + np.arange(c.window)
        else:
            places = start % size + np.arange(c.window)
            places = places % size if c.wrap else places[places < size]
        seen[layer, places] = True
    return seen


def home_layer(c: Any) -> np.ndarray:
    """(U,) the layer to which each pool place belongs in order of depth: equal shares of the ring for the layers
    that share it, private places for untied ones."""
    sharing = np.arange(c.untied_first, c.depth - c.untied_last)
    size = ring_size(c)
    ring = sharing[np.arange(size) * len(sharing) // max(1, size)]
    ends = (range(c.untied_first), range(c.depth - c.untied_last, c.depth))
    head, tail = (np.repeat(np.array(layers, dtype=int), num_private(c)) for layers in ends)
    return np.concatenate([head, ring, tail]).astype(int)


def ramp_offset(
    c: Any, edges_LS: Tensor, progress: float, step: int, kept_LS: Tensor | None = None
) -> Tensor | None:
    """(L, S) float32 to add to router logits at `progress` (share of training done), or None once it is all 0.

    After ReXMoE's progressive routing: all edges but those `kept_LS` (by default a layer's own experts and its
    home share of the ring; after a conversion, the edges the source had) are closed, -inf, and open linearly
    between ramp_start and ramp_end. `random` draws them anew for every (seed, step, layer), `distance` opens the
    experts of near layers first; `bias` closes none but fades all, from -edge_bias to 0. With ramp_keep < 1 a
    layer's own experts take part too, so that a ramp can be tried without any sharing.
    """
    if c.ramp == "none" or progress >= c.ramp_end:
        return None
    share = min(1.0, max(0.0, (progress - c.ramp_start) / max(c.ramp_end - c.ramp_start, 1e-9)))
    home_S = np.concatenate([np.repeat(np.arange(c.depth), c.num_local), home_layer(c)]).astype(int)
    kept = np.array(home_S == np.arange(c.depth)[:, None]) if kept_LS is None else kept_LS.numpy().copy()
    own_place = np.arange(c.depth * c.num_local) % max(1, c.num_local)
    kept[:, : c.depth * c.num_local] &= own_place < math.ceil(c.ramp_keep * c.num_local)
    offset_LS = torch.zeros(edges_LS.shape)
    for layer, row in enumerate(offset_LS.numpy()):
        foreign = np.flatnonzero(edges_LS[layer].numpy() & ~kept[layer])
        if c.ramp == "random":
            foreign = np.random.default_rng([c.seed, step, layer]).permutation(foreign)
        else:
            foreign = foreign[np.argsort(np.abs(home_S[foreign] - layer), kind="stable")]
        if c.ramp == "bias":
            row[foreign] = -c.edge_bias * (1 - share)
        else:
            row[foreign[int(share * len(foreign)) :]] = -math.inf
    return offset_LS


def exposure(connectivity_LS: Tensor) -> Tensor:
    """(S,) float64: the load each stored expert has under uniform routing, e_j = sum over its layers of 1/V_l.
    Instead of edges, rates may be given, of which each row is brought to the sum 1."""
    edges_LS = connectivity_LS.double()
    return (edges_LS / edges_LS.sum(1, keepdim=True).clamp_min(1e-12)).sum(0)


def uniform_rate(c: Any, edges_LS: Tensor) -> Tensor:
    """(L, S) float64, rows summing to 1: the load under uniform routing, 1/V_l on every edge; with split_top_k
    that many of a token's experts are drawn from the pool's edges and the others from the layer's own."""
    rate_LS = edges_LS.double()
    if c.split_top_k:
        parts = rate_LS.split((c.depth * c.num_local, c.num_universal), dim=1)
        counts = (c.top_k - c.split_top_k, c.split_top_k)
        scaled = [
            part / part.sum(1, keepdim=True).clamp_min(1) * k for part, k in zip(parts, counts, strict=True)
        ]
        rate_LS = torch.cat(scaled, dim=1)
    return rate_LS / rate_LS.sum(1, keepdim=True).clamp_min(1e-12)


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
    norm = (seen_S * safe_S**exposure_power).sum().clamp_min(1e-12)
    return alpha * (safe_S ** (exposure_power - 2) * load_S * prob_S).sum() / norm


def balance_loss(config: TrainConfig, load_LS: Tensor, prob_LS: Tensor, edges_LS: Tensor) -> Tensor:
    """The chosen balance loss, a scalar: `layer` as in Switch, `pool` as in UniPool, or `uelb`.

    `pool_only` looks at the universal experts alone and renormalises each layer over its window, else the loss
    could be lowered by leaving the pool; local experts are then free.
    """
    alpha, rate_LS = config.balance_coeff, uniform_rate(config, edges_LS)
    if config.balance_scope == "pool_only":
        first = config.depth * config.num_local
        parts = (x[:, first:] for x in (load_LS, prob_LS, rate_LS))
        load_LS, prob_LS, rate_LS = (x / x.sum(1, keepdim=True).clamp_min(1e-9) for x in parts)
    if config.balance == "layer":
        scarcity_LS = torch.where(rate_LS > 0, 1 / rate_LS, 0).to(prob_LS.dtype)
        return alpha * (scarcity_LS * load_LS.detach() * prob_LS).sum(1).mean()
    if config.balance == "pool":
        num_layers, num_stored = rate_LS.shape
        return alpha * num_stored / num_layers**2 * (load_LS.detach().sum(0) * prob_LS.sum(0)).sum()
    return uelb_loss(load_LS, prob_LS, rate_LS, alpha, config.exposure_power)


# --- Counting --------------------------------------------------------------------------------------------


def count_params(config: TrainConfig) -> dict[str, int]:
    """Parameters: `total` stored, `active` (matrices one token is multiplied by, summed over layers, so a
    universal expert counts once for every layer that uses it; no embedding), `unique_experts` (those of stored
    experts, each counted once)."""
    return _count(resolve(config))


def _count(c: Any) -> dict[str, int]:
    num_ids, expert, edges_LS = c.vocab_size + 1, 2 * c.model_dim * c.expert_dim, _edges(c)
    num_layers, num_blocks, num_stored = c.depth, c.recursion or c.depth, edges_LS.shape[1]
    has_moe, wide, inner = c.ffn == "moe", c.model_dim, c.router_dim
    rows = inner if c.router == "mlp" else wide
    projection = wide * inner if c.router in ("mlp", "gru") else 0  # a block's own
    cell = inner**2 * (6 + c.router_feedback) if c.router == "gru" else 0  # shared by all layers
    read = inner**2 if c.router in ("ema", "gru") else 0
    used_keys = inner * int(edges_LS.sum()) if read else 0
    block = 4 * wide**2 + has_moe * projection + num_always(c) * expert
    active = (
        num_layers * (4 * wide**2 + has_moe * (projection + cell + read))
        + rows * int(edges_LS.sum())
        + used_keys
        + num_layers * (c.num_shared + c.top_k) * expert
        + wide * num_ids
    )
    scalars = has_moe * num_blocks * (c.router in ("norm", "logit_residual", "ema", "gru"))
    scalars += {"gru": 6 * inner, "ema": 1}.get(c.router, 0) + num_layers * (
        c.depth_embedding * wide + c.layer_gate
    )
    stored = num_stored * expert
    total = (
        num_blocks * block
        + rows * int(edges_LS[:num_blocks].sum())
        + cell
        + read
        + (num_stored * inner if read else 0)
        + scalars
        + stored
        + 2 * num_ids * wide
    )
    return {"total": total, "active": active, "unique_experts": stored}


def num_always(c: Any) -> int:
    """Experts' worth of a layer's MLP that every token uses: the whole of a dense layer."""
    return c.num_shared + (c.top_k if c.ffn == "dense" else 0)


def flops_per_token(config: TrainConfig) -> int:
    """Forward and backward: 6 an active parameter, and 12*D*seq_len a layer for attention scores (nanochat's
    convention: full rows, no causal discount). Lookups, norms, softmax and sorting count as nothing."""
    c = resolve(config)
    return 6 * _count(c)["active"] + 12 * c.depth * c.model_dim * c.seq_len


def reuse_uniform(c: Any, edges_LS: Tensor) -> list[float]:
    """For each layer the share of its assignments that would go to an expert the token has used before, were
    every layer to choose uniformly and on its own."""
    rate_LS = uniform_rate(c, edges_LS)
    unused_LS = torch.cat([torch.ones_like(rate_LS[:1]), (1 - c.top_k * rate_LS)[:-1]]).cumprod(0)
    return (rate_LS * (1 - unused_LS)).sum(1).tolist()


def cross_stage_share(c: Any, edges_LS: Tensor) -> float:
    """Share of routed assignments, under uniform routing, whose expert lives in another pipeline stage. An
    expert lives in the first of the stages in which most layers see it."""
    rate_LS = uniform_rate(c, edges_LS)
    stage_L = torch.arange(c.depth) * c.stages // c.depth
    seen_by_stage = torch.stack([edges_LS[stage_L == s].sum(0) for s in range(c.stages)])
    away_LS = seen_by_stage.argmax(0)[None] != stage_L[:, None]
    return (rate_LS * away_LS).sum().item() / c.depth


def describe(config: TrainConfig) -> dict[str, Any]:
    """What a run would be: counts, topology and the resolved config, without corpus or training.

    `reuse_uniform` and `cross_stage_share` assume uniform routing; the bytes are those of bf16 activations sent
    to another stage and back, forward and backward."""
    c = resolve(config)
    edges, count = _edges(c), _count(c)
    crossing = cross_stage_share(c, edges)
    return {
        "params_total": count["total"],
        "params_active": count["active"],
        "params_unique_experts": count["unique_experts"],
        "flops_per_token": flops_per_token(c),
        "virtual_width": edges.sum(1).tolist(),
        "reach": edges.sum(0).tolist(),
        "exposure": exposure(uniform_rate(c, edges)).tolist(),
        "reuse_uniform": reuse_uniform(c, edges),
        "cross_stage_share": crossing,
        "cross_stage_bytes_per_token": round(crossing * c.depth * c.top_k * c.model_dim * 2 * 4),
        "connectivity": edges.int().tolist(),
        "config": asdict(c),
    }


# --- Model -----------------------------------------------------------------------------------------------


class Norm(torch.autograd.Function):
    """RMS norm without weight over the last dimension; by hand it is twice as fast on CPU as F.rms_norm."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype == torch.bfloat16 else x
        scale = ((wide * wide).mean(-1, keepdim=True) + 1e-6).rsqrt_().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        return (grad - y * (grad * y).mean(-1, keepdim=True)).mul_(scale)


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2; overwrites its input, and backwards its gradient: both must be fresh products that nothing else
    reads."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x.relu_()
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (relu,) = ctx.saved_tensors
        return grad.mul_(relu).mul_(2)


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


class ExpertRuns(torch.autograd.Function):
    """(A, D) -> (A, D): each expert's MLP on its own run of rows, whose sizes are given. For the CPU: expert by
    expert all intermediates stay in cache, and no weights are stacked. weights_2E: w_in, w_out in turn."""

    @staticmethod
    def forward(ctx, x_AD: Tensor, sizes: list[int], *weights_2E: Tensor) -> Tensor:
        relu_AM, y_AD = x_AD.new_empty(len(x_AD), weights_2E[0].shape[1]), torch.empty_like(x_AD)
        runs = zip(*(rows.split(sizes) for rows in (x_AD, relu_AM, y_AD)), strict=True)
        for (x, relu, y), w_in, w_out in zip(runs, weights_2E[::2], weights_2E[1::2], strict=True):
            torch.mm(x, w_in, out=relu).relu_()
            torch.mm(relu * relu, w_out, out=y)
        ctx.sizes = sizes
        ctx.save_for_backward(x_AD, relu_AM, *weights_2E)
        return y_AD

    @staticmethod
    def backward(ctx, grad_AD: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, relu_AM, *weights_2E = ctx.saved_tensors
        grad_x_AD, grads_2E = torch.empty_like(x_AD), []
        runs = zip(*(rows.split(ctx.sizes) for rows in (x_AD, relu_AM, grad_AD, grad_x_AD)), strict=True)
        for (x, relu, grad, grad_x), w_in, w_out in zip(runs, weights_2E[::2], weights_2E[1::2], strict=True):
            hidden = (grad @ w_out.mT).mul_(relu).mul_(2)
            grads_2E += [x.mT @ hidden, (relu * relu).mT @ grad]
            torch.mm(hidden, w_in.mT, out=grad_x)
        return grad_x_AD, None, *grads_2E


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
    """What one layer's routing did: `load_E` share of assignments and `prob_E` mean probability, both summing to
    1, `zloss` mean squared logsumexp; and, for the metrics, the choices, probabilities and logits themselves."""

    load_E: Tensor
    prob_E: Tensor
    zloss: Tensor
    choice_NK: Tensor
    prob_NE: Tensor
    logits_NE: Tensor

    @property
    def entropy(self) -> Tensor:
        """Mean over tokens of the entropy of their probabilities, in nats."""
        return torch.special.entr(self.prob_NE.detach()).sum(-1).mean()


class Memory(NamedTuple):
    """What routing carries along depth, never along the sequence and never detached: the trajectory state and
    the summary of the experts just used (N, P), or the last logits of every universal expert (N, U)."""

    state_NP: Tensor | None = None
    used_NP: Tensor | None = None
    logits_NU: Tensor | None = None


class Trajectory(nn.Module):
    """The part of a trajectory router that all layers share (MoUE's Universal Router; ASSUMPTION: its form).

    gru, after RMoE (arXiv 2408.06793), extended by a key for every stored expert and by feedback of what was
    chosen: s_l = GRU(A_l y_l + R r_{l-1}, s_{l-1}), z_l = w_l y_l + gamma_l * keys O s_l, r_l = the gated sum
    of the keys of the experts used. ema is its lower bound: s_l = decay * s_{l-1} + (1 - decay) * r_l, read by
    the layer after. gamma starts at 0, where both are the linear router.
    """

    def __init__(self, config: TrainConfig, num_stored: int):
        super().__init__()
        width = config.router_dim
        self.keys = nn.Parameter(torch.empty(num_stored, width))
        self.read = nn.Parameter(torch.empty(width, width))
        has_cell = config.router == "gru"
        self.cell = nn.GRUCell(width, width) if has_cell else None
        self.feedback = (
            nn.Parameter(torch.empty(width, width)) if has_cell and config.router_feedback else None
        )
        self.decay = None if has_cell else nn.Parameter(torch.empty(()))

    def start(self, num_tokens: int) -> Memory:
        zeros_NP = self.keys.new_zeros(num_tokens, self.keys.shape[1])
        return Memory(zeros_NP, zeros_NP)

    def advance(self, memory: Memory, drive_NP: Tensor) -> Memory:
        if self.feedback is not None:
            drive_NP = drive_NP + memory.used_NP @ self.feedback
        return memory._replace(state_NP=self.cell(drive_NP, memory.state_NP))

    def hint(self, memory: Memory, visible_E: Tensor) -> Tensor:
        return (memory.state_NP @ self.read) @ self.keys.index_select(0, visible_E).T

    def note(self, memory: Memory, gate_NK: Tensor, choice_NK: Tensor, visible_E: Tensor) -> Memory:
        keys_NKP = self.keys.index_select(0, visible_E[choice_NK].flatten()).unflatten(0, choice_NK.shape)
        used_NP = (gate_NK[:, :, None] * keys_NKP).sum(1)
        state_NP = memory.state_NP
        if self.cell is None:
            state_NP = used_NP.lerp(state_NP, self.decay.sigmoid())
        return Memory(state_NP, used_NP)


@cache
def unit_norm_scale(num_visible: int, top_k: int) -> float:
    """c0 of UniPool's NormRouter: makes the top_k of relu(z / |z|) a vector of mean length 1 for normal z."""
    z = np.random.default_rng(0).standard_normal((4096, num_visible))
    top = np.sort(np.maximum(z / np.linalg.norm(z, axis=1, keepdims=True), 0), axis=1)[:, -top_k:]
    return float(1 / np.linalg.norm(top, axis=1).mean())


class MoE(nn.Module):
    """One layer's router and dispatch over the experts it sees.

    ASSUMPTION: local and universal experts compete in one softmax and one top-k, gates renormalised over it;
    split_top_k, renormalize and gate are the rival readings. With top_k = 1 the gate is the probability itself
    (Switch), for a renormalised one would be constant and teach the router nothing. Routers are in fp32.
    """

    def __init__(self, config: TrainConfig, visible: list[int]):
        super().__init__()
        self.config = c = config
        first = c.depth * c.num_local
        self.visible = visible
        self.num_own = sum(expert < first for expert in visible)
        self.register_buffer("visible_E", torch.tensor(visible), persistent=False)
        self.register_buffer(
            "places", torch.tensor(visible[self.num_own :], dtype=torch.int64) - first, persistent=False
        )
        self.router = nn.Parameter(
            torch.empty(c.router_dim if c.router == "mlp" else c.model_dim, len(visible))
        )
        self.router_in = nn.Parameter(torch.empty(c.model_dim, c.router_dim)) if c.router == "mlp" else None
        self.state_in = nn.Parameter(torch.empty(c.model_dim, c.router_dim)) if c.router == "gru" else None
        for name, routers in {"sigma": ["norm"], "rho": ["logit_residual"], "gamma": ["ema", "gru"]}.items():
            self.register_parameter(name, nn.Parameter(torch.empty(())) if c.router in routers else None)

    def score(self, y_ND: Tensor, memory: Memory, trajectory: Trajectory | None) -> tuple[Tensor, Memory]:
        """Logits (N, E) of the experts seen, before any edge is closed, and the memory after looking."""
        y_ND = y_ND.to(self.router.dtype)
        inner = y_ND if self.router_in is None else SquaredReLU.apply(y_ND @ self.router_in)
        logits_NE = F.linear(inner, self.router.mT.contiguous())  # a narrow product: twice as fast so on CPU
        if trajectory is not None:
            if self.state_in is not None:
                memory = trajectory.advance(memory, y_ND @ self.state_in)
            logits_NE = logits_NE + self.gamma * trajectory.hint(memory, self.visible_E)
        if self.rho is not None:
            own_NE, pool_NE = logits_NE.tensor_split((self.num_own,), dim=1)
            pool_NE = pool_NE + self.rho * memory.logits_NU.index_select(1, self.places)
            logits_NE = torch.cat((own_NE, pool_NE), dim=1)
            memory = Memory(logits_NU=memory.logits_NU.index_copy(1, self.places, pool_NE))
        return logits_NE, memory

    def choose(self, logits_NE: Tensor) -> Tensor:
        """(N, K) columns of the experts chosen."""
        num_pool = self.config.split_top_k
        if not num_pool or self.num_own == len(self.visible):
            return logits_NE.topk(self.config.top_k, dim=-1).indices
        own_NE, pool_NE = logits_NE.tensor_split((self.num_own,), dim=1)
        own_NK = own_NE.topk(self.config.top_k - num_pool, dim=-1).indices
        return torch.cat((own_NK, pool_NE.topk(num_pool, dim=-1).indices + self.num_own), dim=1)

    def weigh(self, logits_NE: Tensor, total_N1: Tensor, choice_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Gates (N, K) of the chosen and probabilities (N, E) for the balance."""
        c = self.config
        if self.sigma is not None:
            finite_NE = logits_NE.masked_fill(logits_NE == -math.inf, 0.0)
            positive_NE = F.normalize(finite_NE, dim=-1).relu()
            score_NE = self.sigma * unit_norm_scale(len(self.visible), c.top_k) * positive_NE
            return score_NE.gather(1, choice_NK), positive_NE / (positive_NE.sum(-1, keepdim=True) + 1e-9)
        if c.gate == "sigmoid":
            score_NE = logits_NE.sigmoid()
            total_N1 = score_NE.sum(-1, keepdim=True).clamp_min(1e-30)
            gate_NK, prob_NE = score_NE.gather(1, choice_NK), score_NE / total_N1
            return (
                gate_NK / gate_NK.sum(-1, keepdim=True) if c.renormalize and c.top_k > 1 else gate_NK
            ), prob_NE
        top_NK = logits_NE.gather(1, choice_NK)
        gate_NK = top_NK.softmax(-1) if c.renormalize and c.top_k > 1 else (top_NK - total_N1).exp()
        return gate_NK, (logits_NE - total_N1).exp()

    def route(self, y_ND, memory, trajectory, offset_E, bias_E) -> tuple[Tensor, Plan, Routing, Memory]:
        """Gates (N, K) and plan. Closed edges are -inf from here on; a balance bias is for the choice alone."""
        logits_NE, memory = self.score(y_ND, memory, trajectory)
        if offset_E is not None:
            logits_NE = logits_NE + offset_E
        choice_NK = self.choose(logits_NE.detach() if bias_E is None else logits_NE.detach() + bias_E)
        total_N1 = logits_NE.logsumexp(-1, keepdim=True)
        gate_NK, prob_NE = self.weigh(logits_NE, total_N1, choice_NK)
        plan = make_plan(choice_NK, len(self.visible))
        load_E = plan.end_E.diff(prepend=plan.end_E.new_zeros(1)) / choice_NK.numel()
        if trajectory is not None:
            memory = trajectory.note(memory, gate_NK, choice_NK, self.visible_E)
        zloss = total_N1.square().mean()
        return gate_NK, plan, Routing(load_E, prob_NE.mean(0), zloss, choice_NK, prob_NE, logits_NE), memory

    def dispatch(
        self, y_ND: Tensor, gate_NK: Tensor, plan: Plan, banks: tuple[list[Tensor], list[Tensor]]
    ) -> Tensor:
        experts = self.grouped_experts if y_ND.is_cuda else self.run_experts
        return Combine.apply(experts(Gather.apply(y_ND, plan), plan, banks), gate_NK.to(y_ND.dtype), plan)

    def grouped_experts(self, x_AD: Tensor, plan: Plan, banks: tuple[list[Tensor], list[Tensor]]) -> Tensor:
        w_in_EDM, w_out_EMD = (torch.stack([bank[j] for j in self.visible]) for bank in banks)
        hidden_AM = SquaredReLU.apply(grouped_mm(x_AD, w_in_EDM, offs=plan.end_E))
        return grouped_mm(hidden_AM, w_out_EMD, offs=plan.end_E)

    def run_experts(self, x_AD: Tensor, plan: Plan, banks: tuple[list[Tensor], list[Tensor]]) -> Tensor:
        sizes = plan.end_E.diff(prepend=plan.end_E.new_zeros(1)).tolist()
        return ExpertRuns.apply(x_AD, sizes, *(bank[j] for j in self.visible for bank in banks))


class Block(nn.Module):
    def __init__(self, config: TrainConfig, visible: list[int]):
        super().__init__()
        self.attention = Attention(config)
        self.moe = MoE(config, visible) if config.ffn == "moe" else None
        hidden_dim = num_always(config) * config.expert_dim
        self.mlp = MLP(config.model_dim, hidden_dim) if hidden_dim else None


class Trace(NamedTuple):
    """One forward pass: logits (B, T, V) float32, every mixture layer's Routing, and the root mean square of the
    residual stream after every layer (L,), if it was asked for."""

    logits_BTV: Tensor
    routings: list[Routing]
    residual_rms_L: Tensor | None


class GPT(nn.Module):
    """The model. Stored experts are two banks of (in, out) matrices, the layers' own and the pool's; layers hold
    no copies. Raises Mistake for a config that cannot be trained."""

    def __init__(self, config: TrainConfig):
        super().__init__()
        self.config = c = resolve(config)
        self.edges_LS = _edges(c)  # stays on the CPU, so that reading it never waits for a device
        num_stored = self.edges_LS.shape[1]
        self.embed = nn.Parameter(torch.empty(c.vocab_size + 1, c.model_dim))
        rows = self.edges_LS[: c.recursion or c.depth]
        self.blocks = nn.ModuleList(Block(c, row.nonzero().flatten().tolist()) for row in rows)
        sizes = {"local": c.depth * c.num_local, "pool": c.num_universal}
        self.bank_names = [name for name, size in sizes.items() if size]
        for name in self.bank_names:
            shape = (sizes[name], c.model_dim, c.expert_dim)
            self.register_parameter(f"{name}_in", nn.Parameter(torch.empty(shape)))
            self.register_parameter(f"{name}_out", nn.Parameter(torch.empty(shape).mT.contiguous()))
        self.trajectory = Trajectory(c, num_stored) if c.router in ("ema", "gru") else None
        self.depth_embedding = nn.Parameter(torch.empty(c.depth, c.model_dim)) if c.depth_embedding else None
        self.layer_gate = nn.Parameter(torch.empty(c.depth)) if c.layer_gate else None
        self.register_buffer("balance_bias", torch.zeros(num_stored) if c.balance == "bias" else None)
        self.head = nn.Parameter(torch.empty(c.vocab_size + 1, c.model_dim))
        for name, param in self.named_parameters():
            init_param(name, param, c.seed)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) in float32 for token ids 0..vocab_size, the last of which is BOS."""
        return self.trace(tokens_BT).logits_BTV

    def trace(self, tokens_BT: Tensor, offset_LS: Tensor | None = None, *, watch: bool = False) -> Trace:
        """A forward pass with `offset_LS` added to the router logits: -inf closes an edge (None: all open)."""
        dtype = torch.bfloat16 if tokens_BT.is_cuda else self.embed.dtype
        banks = tuple(self.bank(side, dtype) for side in ("in", "out"))
        factor = rotary(tokens_BT.shape[1], self.config.head_dim, tokens_BT.device)
        x_BTD = Norm.apply(F.embedding(tokens_BT, self.embed).to(dtype))
        routings, rms, memory = [], [], self.first_memory(tokens_BT.numel())
        for layer in range(self.config.depth):
            block = self.blocks[layer % len(self.blocks)]
            x_BTD = x_BTD + block.attention(Norm.apply(x_BTD), factor)
            y_ND = Norm.apply(x_BTD).flatten(0, 1)
            if self.depth_embedding is not None:
                y_ND = y_ND + self.depth_embedding[layer].to(dtype)
            out_ND = block.mlp(y_ND) if block.mlp else 0
            if block.moe:
                offset_E, bias_E = self.of_layer(layer, offset_LS), self.of_layer(layer, self.balance_bias)
                gate_NK, plan, routing, memory = block.moe.route(
                    y_ND, memory, self.trajectory, offset_E, bias_E
                )
                if self.layer_gate is not None:
                    gate_NK = gate_NK * self.layer_gate[layer]
                out_ND = out_ND + block.moe.dispatch(y_ND, gate_NK, plan, banks)
                routings.append(routing)
            x_BTD = x_BTD + out_ND.view_as(x_BTD)
            if watch:
                rms.append(x_BTD.detach().float().square().mean().sqrt())
        logits_BTV = F.linear(Norm.apply(x_BTD), self.head.to(dtype)).float()
        return Trace(logits_BTV, routings, torch.stack(rms) if rms else None)

    def first_memory(self, num_tokens: int) -> Memory:
        if self.trajectory is not None:
            return self.trajectory.start(num_tokens)
        if self.config.router == "logit_residual":
            return Memory(logits_NU=self.embed.new_zeros(num_tokens, self.config.num_universal))
        return Memory()

    def of_layer(self, layer: int, values: Tensor | None) -> Tensor | None:
        """What (L, S) or (S,) values hold for the experts the layer sees, on the model's device."""
        if values is None:
            return None
        visible_E = self.blocks[layer % len(self.blocks)].moe.visible_E
        row = values[layer] if values.ndim == 2 else values
        return row.to(visible_E.device, self.embed.dtype, non_blocking=True).index_select(0, visible_E)

    def bank(self, side: str, dtype: torch.dtype) -> list[Tensor]:
        """One view a stored expert, in id order. Unbound once a pass: indexing the bank in every layer would
        zero-fill the whole of it in every layer's backward."""
        return [w for name in self.bank_names for w in getattr(self, f"{name}_{side}").to(dtype).unbind(0)]


BORN = {"sigma": 1.0, "layer_gate": 1.0, "rho": 0.0, "gamma": 0.0, "decay": 0.0, "depth_embedding": 0.0}


def init_param(name: str, param: Tensor, seed: int) -> None:
    """Each parameter draws from a stream of its own name and seed, so that models that differ in one part start
    equal in all others. Scales: nanochat."""
    stream = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    own_name = name.rpartition(".")[2]
    with torch.no_grad():
        if own_name in BORN:
            param.fill_(BORN[own_name])
        elif name == "embed":
            param.normal_(generator=stream)
        elif name == "head":
            param.normal_(std=0.001, generator=stream)
        elif own_name.endswith("out") or own_name.startswith("bias"):
            param.zero_()
        elif own_name == "router":
            param.normal_(std=param.shape[0] ** -0.5, generator=stream)
        elif own_name in ("keys", "weight_ih", "weight_hh"):  # these multiply from the right
            param.normal_(std=param.shape[1] ** -0.5, generator=stream)
        else:
            bound = (3 / param.shape[-2]) ** 0.5
            param.uniform_(-bound, bound, generator=stream)


# --- Optimizer -------------------------------------------------------------------------------------------


class Group(NamedTuple):
    kind: str  # "adamw" or "muon"
    params: list[Tensor]
    lr: float
    weight_decay: float
    is_router: bool = False


def part_of(name: str) -> str:
    """The part of the model a parameter belongs to: its rates, and its scaling rule, hang on that."""
    parts = {
        "embed": ("embed",),
        "head": ("head",),
        "pool": ("pool_in", "pool_out"),
        "blocks": ("qkv", "out"),
    }
    parts["blocks"] += ("w_in", "w_out", "local_in", "local_out")
    own_name = name.rpartition(".")[2]
    return next((part for part, names in parts.items() if own_name in names), "router")


def parameter_groups(model: GPT) -> list[Group]:
    """Every parameter in exactly one group, with its peak learning rate after the scaling rules."""
    c = model.config
    parts: dict[str, list[Tensor]] = {
        "embed": [],
        "head": [],
        "router": [],
        "vectors": [],
        "pool": [],
        "blocks": [],
    }
    for name, param in model.named_parameters():
        part = part_of(name)
        readers = ("router_in", "state_in") if c.router == "mlp" else ("router", "state_in")
        is_vector = part == "router" and name.rpartition(".")[2] not in readers
        parts["vectors" if is_vector else part].append(param)
    matrix_lr = matrix_rate(c)
    mean_reach = model.edges_LS[:, c.depth * c.num_local :].sum().item() / max(1, c.num_universal)
    pool_lr = matrix_lr / max(1.0, mean_reach) ** c.pool_lr_divisor
    groups = [
        Group("adamw", parts["embed"], c.embed_lr * adam_scale(c, "embed"), 0.0),
        Group("adamw", parts["head"], c.head_lr * adam_scale(c, "head"), 0.0),
        Group("adamw", parts["router"], c.router_lr * adam_scale(c, "router"), 0.0, is_router=True),
        Group("adamw", parts["vectors"], c.router_lr * batch_scale(c), 0.0, is_router=True),
        Group(c.optimizer, parts["pool"], pool_lr, decay_at(c, pool_lr)),
        Group(c.optimizer, parts["blocks"], matrix_lr, decay_at(c, matrix_lr)),
    ]
    return [group for group in groups if group.params]


class AdamW:
    """Decoupled-decay Adam by the fused kernel itself: torch.optim would load the compiler stack for seconds."""

    def __init__(self, groups: list[Group]):
        self.groups = groups
        self.moments = [[[torch.zeros_like(p) for p in g.params] for _ in range(2)] for g in groups]
        self.num_steps = torch.zeros((), device=groups[0].params[0].device)

    def step(self, rate: float, router_boost: float = 1.0) -> None:
        self.num_steps += 1
        for group, (first, second) in zip(self.groups, self.moments, strict=True):
            grads, steps = [p.grad for p in group.params], [self.num_steps] * len(group.params)
            lr = group.lr * rate * (router_boost if group.is_router else 1)
            rates = {"lr": lr, "weight_decay": group.weight_decay, "eps": 1e-10}
            modes = {"beta1": 0.9, "beta2": 0.95, "amsgrad": False, "maximize": False}
            torch._fused_adamw_(group.params, grads, first, second, [], steps, **rates, **modes)

    def state(self) -> list[Tensor]:
        return [self.num_steps, *(m for pair in self.moments for moments in pair for m in moments)]


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

    def state(self) -> list[Tensor]:
        return [m for _, momenta in self.batches for m in momenta]

    @torch.no_grad()
    def step(self, rate: float, router_boost: float = 1.0) -> None:  # it holds no router
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


# --- Several processes -----------------------------------------------------------------------------------


class Team(NamedTuple):
    """The processes of one run, as torchrun starts them; each takes its share of every step's rows."""

    rank: int = 0
    size: int = 1

    def mean(self, values: list[Tensor]) -> None:
        """Replace each tensor by its mean over the team. One message, so a pool's gradient crosses once a step,
        however many layers added to it."""
        if self.size > 1:
            flat = torch.cat([v.flatten() for v in values])
            torch.distributed.all_reduce(flat)
            for value, piece in zip(
                values, (flat / self.size).split([v.numel() for v in values]), strict=True
            ):
                value.copy_(piece.view_as(value))


ALONE = Team()


@contextmanager
def join_team(device: torch.device) -> Iterator[Team]:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    import torch.distributed

    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Team(int(os.environ["RANK"]), size)
    finally:
        torch.distributed.destroy_process_group()


# --- Data ------------------------------------------------------------------------------------------------


class Rows:
    """Training rows: the documents laid end to end and cut in pieces of seq_len tokens; a piece predicts its
    own tokens from BOS and the ones before. A document that begins inside a row begins with BOS there. Only
    the last seq_len - 1 tokens of a corpus can go unused. Order: a permutation for each (seed, epoch), which
    depends neither on the model nor on the batch. `first_row` rows of that order were read by an earlier run."""

    def __init__(self, corpus: Any, config: TrainConfig, first_row: int = 0):
        self.corpus, self.config, self.first_row = corpus, config, first_row
        self.num_rows = len(corpus.tokens) // config.seq_len
        remedy = (
            f"the corpus has {corpus.vocab_size} ids; set vocab=bpe vocab_size={corpus.vocab_size} for one "
        )
        remedy += "made by `harness prepare --vocab`, vocab=bytes for one made without"
        require(corpus.vocab_size == config.vocab_size, config, "vocab_size", remedy)
        require(self.num_rows > 0, config, "seq_len", "the corpus has fewer tokens; shorten it or add text")
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def row_ids(self, first: int, count: int) -> Iterator[int]:
        for number in range(first, first + count):
            epoch, place = divmod(number, self.num_rows)
            if epoch != self.epoch:
                self.epoch = epoch
                self.order = np.random.default_rng([self.config.seed, epoch]).permutation(self.num_rows)
            yield self.order[place]

    def batch(self, step: int, team: Team = ALONE) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one step, (B, T) int64 each: every team.size-th of the step's rows."""
        width = self.config.seq_len
        num_rows = self.config.batch_tokens // width
        ids = [*self.row_ids(self.first_row + step * num_rows, num_rows)][team.rank :: team.size]
        place_BT = np.array(ids, np.int64)[:, None] * width + np.arange(width)
        targets_BT = self.corpus.tokens[place_BT].astype(np.int64)
        inputs_BT = np.roll(targets_BT, 1, axis=1)
        begins = self.corpus.offsets[np.searchsorted(self.corpus.offsets, place_BT)] == place_BT
        begins[:, 0] = True
        inputs_BT[begins] = self.corpus.bos
        return torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT)


def load_rows(config: TrainConfig, first_row: int = 0) -> Rows:
    from harness.judge.corpus import load_train

    require(config.corpus != "", config, "corpus", "none named; run `harness prepare` and give its folder")
    try:
        corpus = load_train(Path(config.corpus).expanduser())
    except (ValueError, OSError) as error:
        raise Mistake(f"corpus={config.corpus}: {error}") from None
    return Rows(corpus, config, first_row)


# --- Training --------------------------------------------------------------------------------------------

CHECK_EVERY_STEPS = 10  # how often the loop looks at the loss and the loads (on CUDA it waits for the device)
DIVERGED_MARGIN_NATS = 1.0  # above the loss of a uniform guess
COLLAPSE_CHECKS = 5  # checks whose mean the collapse guard takes
COLLAPSE_AFTER = 0.2  # share of training before which the guard is silent
DEAD_BELOW = 0.1  # an expert with less than this share of its exposure counts as dead
SATURATED_ABOVE = 4.0  # and one with more than this multiple as saturated
USAGE_DECAY = 0.98  # a step, of the mean load kept in the checkpoint


class Diverged(RuntimeError):
    """The loss is not a number, or worse than guessing once the warmup is over."""


class Collapsed(RuntimeError):
    """A few experts take all the traffic, or too many take none."""


class Step(NamedTuple):
    nats: Tensor  # mean cross-entropy of the batch, a scalar without gradient
    load_LS: Tensor | None  # of the whole batch, over all processes
    open_LS: Tensor
    routings: list[Routing]  # of the last pass, and only if it was watched
    residual_rms_L: Tensor | None


def load_over_exposure(c: TrainConfig, load_LS: Tensor, open_LS: Tensor) -> Tensor:
    """(S,) load of every stored expert over that of uniform routing; nan for one that no edge leads to now."""
    exposure_S = exposure(uniform_rate(c, open_LS))
    return torch.where(exposure_S > 0, load_LS.sum(0).double() / exposure_S, math.nan)


def routing_health(model: GPT, result: Step) -> dict[str, Any]:
    """Numbers for the metrics, by layer or by stored expert. `*_over_exposure`: see there, -1 for unreachable.
    Loads are of the whole step; entropy, logits, reuse and the residual stream of its last pass on one process.

    `reuse`: share of a layer's assignments whose expert the token used before (what chance gives: describe's
    reuse_uniform); `distinct_experts`: the experts a token used, as a share of its assignments."""
    load_LS, open_LS, routings = result.load_LS, result.open_LS, result.routings
    ratio_S = load_over_exposure(model.config, load_LS, open_LS)
    seen_S = ratio_S[~ratio_S.isnan()]
    blocks = model.blocks
    stored = [blocks[n % len(blocks)].moe.visible_E[r.choice_NK] for n, r in enumerate(routings)]
    used_NLK = torch.stack(stored, dim=1)
    reuse = [0.0] * len(stored)
    for layer in range(1, len(stored)):
        before_NA = used_NLK[:, :layer].flatten(1)
        repeated = (used_NLK[:, layer, :, None] == before_NA[:, None]).any(-1)
        reuse[layer] = repeated.float().mean().item()
    return {
        "max_load": (load_LS * open_LS.sum(1, keepdim=True)).amax(1).tolist(),
        "load_over_exposure": ratio_S.nan_to_num(-1.0).tolist(),
        "max_over_exposure": seen_S.max().item(),
        "p5_over_exposure": seen_S.quantile(0.05).item(),
        "dead_experts": int((seen_S < DEAD_BELOW).sum()),
        "saturated_experts": int((seen_S > SATURATED_ABOVE).sum()),
        "pool_share": load_LS[:, model.config.depth * model.config.num_local :].sum().item() / len(stored),
        "entropy": [r.entropy.item() for r in routings],
        "logit_max": [r.logits_NE.detach()[r.prob_NE > 0].abs().max().item() for r in routings],
        "reuse": reuse,
        "distinct_experts": 1 - sum(reuse) / len(reuse),
        "residual_rms": result.residual_rms_L.tolist(),
    }


class Shares(NamedTuple):
    """Of every layer and stored expert (L, S): the share of assignments, and the mean probability."""

    load_LS: Tensor
    prob_LS: Tensor


class Trainer:
    """The state of a training run and its one step."""

    def __init__(self, model: GPT, *, kept_LS: Tensor | None = None, team: Team = ALONE):
        self.model, self.kept_LS, self.team = model, kept_LS, team
        self.optimizers = make_optimizers(model)
        self.num_steps = num_steps(model.config)
        self.device = model.embed.device
        self.visible_LS = model.edges_LS.to(self.device)
        self.places = model.edges_LS.flatten().nonzero().flatten().to(self.device)
        self.last_load_LS: Tensor | None = None  # of the last step's whole batch
        self.usage_LS = torch.zeros(model.edges_LS.shape, device=self.device)

    def step(self, inputs_BT: Tensor, targets_BT: Tensor, step: int, *, watch: bool = False) -> Step:
        """One update by this process's rows of step `step`; schedules are functions of the share of steps done.

        Gradients, loss and loads are means over micro-batches and processes."""
        c, model = self.model.config, self.model
        progress = step / self.num_steps
        offset_LS = ramp_offset(c, model.edges_LS, progress, step, self.kept_LS)
        open_LS = self.visible_LS
        if offset_LS is not None:
            offset_LS = offset_LS.to(self.device, non_blocking=True)
            open_LS = open_LS & (offset_LS > -math.inf)
        rows = c.micro_tokens // c.seq_len
        passes = list(zip(inputs_BT.split(rows), targets_BT.split(rows), strict=True))
        whole = self.survey(passes, offset_LS) if len(passes) > 1 and self.balances_whole_batch else None
        nats, loads = torch.zeros((), device=self.device), []
        for micro_inputs_BT, micro_targets_BT in passes:
            trace = model.trace(micro_inputs_BT, offset_LS, watch=watch)
            loss = F.cross_entropy(trace.logits_BTV.flatten(0, 1), micro_targets_BT.flatten())
            nats += loss.detach() / len(passes)
            if trace.routings:
                shares = self.shares(trace.routings)
                loads.append(shares.load_LS)
                loss = loss + c.zloss_coeff * torch.stack([r.zloss for r in trace.routings]).mean()
                loss = loss + self.balance(shares, whole, open_LS, progress)
            (loss / len(passes)).backward()
        self.team.mean([nats, *(p.grad for p in model.parameters())])
        boost = c.router_boost if progress < c.ramp_end else 1.0
        for optimizer in self.optimizers:
            optimizer.step(schedule(c, (step + 1) / self.num_steps), boost)
        for param in model.parameters():
            param.grad = None
        load_LS = self.note_load(loads, open_LS)
        return Step(nats, load_LS, open_LS, trace.routings if watch else [], trace.residual_rms_L)

    def shares(self, routings: list[Routing]) -> Shares:
        return Shares(self.spread([r.load_E for r in routings]), self.spread([r.prob_E for r in routings]))

    def spread(self, values: list[Tensor]) -> Tensor:
        """(L, S) from a vector over the visible experts of each layer; by places known from the start, for a mask
        would make CUDA wait."""
        flat = values[0].new_zeros(self.visible_LS.numel()).index_copy(0, self.places, torch.cat(values))
        return flat.view_as(self.visible_LS)

    @property
    def balances_whole_batch(self) -> bool:
        c = self.model.config
        return c.balance_batch == "global" and c.balance in ("uelb", "layer", "pool")

    @torch.no_grad()
    def survey(self, passes: list[tuple[Tensor, Tensor]], offset_LS: Tensor | None) -> Shares:
        """The whole step's shares, by passes without gradients: the balance of each micro-batch needs them."""
        traces = (self.model.trace(inputs_BT, offset_LS) for inputs_BT, _ in passes)
        parts = [self.shares(trace.routings) for trace in traces]
        return self.over_team(Shares(*(torch.stack(values).mean(0) for values in zip(*parts, strict=True))))

    def over_team(self, shares: Shares) -> Shares:
        whole = Shares(shares.load_LS.clone(), shares.prob_LS.detach().clone())
        self.team.mean([*whole])
        return whole

    def balance(
        self, shares: Shares, whole: Shares | None, open_LS: Tensor, progress: float
    ) -> Tensor | float:
        """The balance loss of these tokens. Over the global batch (arXiv 2501.11873) it is the loss of the whole
        batch, linear around it, so that the gradients of all parts add up to its gradient."""
        c = self.model.config
        weight = min(1.0, progress / c.balance_ramp) if c.balance_ramp else 1.0
        if c.balance_batch == "lagged":
            shares = None if self.last_load_LS is None else shares._replace(load_LS=self.last_load_LS)
        if c.balance in ("bias", "none") or shares is None:
            return 0.0
        if self.balances_whole_batch and (whole or self.team.size > 1):
            whole = whole or self.over_team(shares)
            prob_LS = whole.prob_LS.requires_grad_()
            (slope_LS,) = torch.autograd.grad(balance_loss(c, whole.load_LS, prob_LS, open_LS), prob_LS)
            return weight * (slope_LS * shares.prob_LS).sum()
        return weight * balance_loss(c, *shares, open_LS)

    def note_load(self, loads: list[Tensor], open_LS: Tensor) -> Tensor | None:
        if not loads:
            return None
        load_LS = torch.stack(loads).mean(0)
        self.team.mean([load_LS])
        self.last_load_LS = load_LS
        self.usage_LS.lerp_(load_LS, 1 - USAGE_DECAY)
        if self.model.balance_bias is not None:
            update_balance_bias(self.model, load_LS, open_LS)
        return load_LS

    def state(self) -> dict[str, Any]:
        moments = [optimizer.state() for optimizer in self.optimizers]
        own = {"usage": self.usage_LS, "last_load": self.last_load_LS, "kept": self.kept_LS}
        return {"model": self.model.state_dict(), "moments": moments, **own}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, moments in zip(self.optimizers, state["moments"], strict=True):
            for mine, saved in zip(optimizer.state(), moments, strict=True):
                mine.copy_(saved)
        self.usage_LS.copy_(state["usage"])
        self.kept_LS = None if state["kept"] is None else state["kept"].cpu()
        self.last_load_LS = None if state["last_load"] is None else state["last_load"].to(self.device)


@torch.no_grad()
def update_balance_bias(model: GPT, load_LS: Tensor, open_LS: Tensor) -> None:
    """Loss-free balancing (DeepSeek, arXiv 2408.15664) over exposures: every expert's bias moves by bias_rate
    towards its exposure e_j; one bias a stored expert, so shared along depth. ASSUMPTION, not MoUE's."""
    c = model.config
    first = c.depth * c.num_local if c.balance_scope == "pool_only" else 0
    load_LS, rate_LS = load_LS[:, first:].double(), uniform_rate(c, open_LS)[:, first:]
    load_LS = load_LS / load_LS.sum(1, keepdim=True).clamp_min(1e-9)
    exposure_S = exposure(rate_LS)
    bias_S, reached_S = model.balance_bias[first:], exposure_S > 0
    bias_S += c.bias_rate * torch.sign(exposure_S - load_LS.sum(0)).to(bias_S.dtype) * reached_S
    bias_S -= (bias_S * reached_S).sum() / reached_S.sum().clamp_min(1) * reached_S


class Watch:
    """Looks at a step every CHECK_EVERY_STEPS and raises when the run is lost."""

    def __init__(self, config: TrainConfig):
        self.config, self.checks = config, deque(maxlen=COLLAPSE_CHECKS)
        self.worst_nats = math.log(config.vocab_size + 1) + DIVERGED_MARGIN_NATS

    def check(self, result: Step, progress: float) -> None:
        c, nats = self.config, result.nats.item()
        if not math.isfinite(nats) or (progress > c.warmup and nats > self.worst_nats):
            raise Diverged(f"training loss {nats:.3g} nats after {progress:.0%} of training")
        if result.load_LS is None:
            return
        ratio_S = load_over_exposure(c, result.load_LS, result.open_LS)
        ratio_S = ratio_S[~ratio_S.isnan()]
        self.checks.append((ratio_S.max().item(), (ratio_S < DEAD_BELOW).double().mean().item()))
        if len(self.checks) < COLLAPSE_CHECKS or progress <= COLLAPSE_AFTER:
            return
        busiest, dead = (sum(values) / len(values) for values in zip(*self.checks, strict=True))
        if c.collapse_limit and busiest > c.collapse_limit:
            limit = f"collapse_limit={c.collapse_limit:.3g}"
            raise Collapsed(f"the busiest expert has {busiest:.3g} times its exposure, {limit}")
        if dead > c.dead_limit:
            raise Collapsed(f"{dead:.0%} of the experts are dead, dead_limit={c.dead_limit:.3g}")


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
    if not has_cuda or name == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a file of tensors and plain values whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def checkpoint(trainer: Trainer, step: int, tokens_before: int) -> dict[str, Any]:
    """{"config", "model", "usage" (L, S) mean load, "step", "tokens" seen, those of earlier runs included}."""
    c = trainer.model.config
    weights = {name: value.cpu() for name, value in trainer.model.state_dict().items()}
    seen = {"step": step, "tokens": tokens_before + step * c.batch_tokens}
    return {"config": asdict(c), "model": weights, "usage": trainer.usage_LS.cpu(), **seen}


def read_checkpoint(path: Path, option: str) -> dict[str, Any]:
    if not path.is_file():
        raise Mistake(f"{option} {path}: no such file; give a checkpoint.pt")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        wanted = {key: saved[key] for key in ("model", "usage", "step", "tokens")}
        return wanted | {"config": TrainConfig(**saved["config"])}
    except (RuntimeError, OSError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Mistake(f"{option} {path}: not a checkpoint of this trainer ({reason})") from None


def train(config: TrainConfig, out: Path, source: Path | None = None) -> None:
    """Train, from the weights of `source` if given, and write out/metrics.jsonl and out/checkpoint.pt.

    With save_every, a run that was killed goes on from out/state.pt and ends as if nothing had happened.
    Raises Mistake before anything is written, then Diverged, Collapsed or a memory error.
    """
    c = resolve(config)
    device = pick_device(c.device)
    with join_team(device) as team:
        num_rows, rest = divmod(c.batch_tokens // c.seq_len, team.size)
        even = rest == 0 and num_rows % min(num_rows, c.micro_tokens // c.seq_len) == 0
        remedy = f"cannot be cut evenly for {team.size} processes with micro_tokens={c.micro_tokens}"
        require(even, c, "batch_tokens", remedy)
        model, kept_LS, tokens_before, source_sha256 = GPT(c), None, 0, ""
        if source:
            saved = read_checkpoint(source, "--from")
            kept_LS, tokens_before = warm_start(model, saved), saved["tokens"]
            source_sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
        rows = load_rows(c, -(-tokens_before // c.seq_len))
        trainer = Trainer(model.to(device), kept_LS=kept_LS, team=team)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Mistake(f"--out {out}: {error.strerror}; name another folder") from None
        code_sha256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        identity = {"config": asdict(c), "source": source_sha256, "code": code_sha256}
        Loop(trainer, rows, out, tokens_before, identity).run()


class Loop:
    """Steps, metrics, saved states and the lines a person sees."""

    def __init__(self, trainer: Trainer, rows: Rows, out: Path, tokens_before: int, identity: dict[str, Any]):
        self.trainer, self.rows, self.out, self.tokens_before = trainer, rows, out, tokens_before
        self.identity = identity | {"text": hashlib.sha256(rows.corpus.offsets.tobytes()).hexdigest()}
        self.config, self.leads = trainer.model.config, trainer.team.rank == 0
        self.first_step, self.since_line, self.seconds_before = 0, [], 0.0
        self.watch = Watch(self.config)
        self.state_path = out / "state.pt"

    def run(self) -> None:
        c, trainer = self.config, self.trainer
        metrics_path = self.out / "metrics.jsonl"
        try:
            if c.save_every and self.state_path.is_file():
                self.go_on(metrics_path)
            elif self.leads:
                (self.out / "checkpoint.pt").unlink(missing_ok=True)  # of an earlier run
                metrics_path.write_text("")
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
            if isinstance(error, Mistake):
                raise
            raise Mistake(f"--out {self.out}: cannot be used ({error}); name another folder") from None
        self.agree()
        if c.compile:
            for block in trainer.model.blocks:
                block.attention.compile(dynamic=False)
        size = f"depth {c.depth}, width {c.model_dim}, {_count(c)['total']:,} parameters"
        where = (
            f"{trainer.device.type} x {trainer.team.size}" if trainer.team.size > 1 else trainer.device.type
        )
        self.tell(f"training {size}: {trainer.num_steps} steps of {c.batch_tokens} tokens on {where}")
        gc.collect()
        gc.freeze()  # what stands now lives to the end: spare the collector from walking it
        self.started = time.monotonic()
        with open(metrics_path if self.leads else os.devnull, "a") as metrics:
            for step in range(self.first_step, trainer.num_steps):
                self.one_step(step, metrics)
        if self.leads:
            save(self.out / "checkpoint.pt", checkpoint(trainer, trainer.num_steps, self.tokens_before))
            self.state_path.unlink(missing_ok=True)
        self.tell(f"{self.done_text}  {self.seconds():.1f} s")

    def one_step(self, step: int, metrics: TextIO) -> None:
        c, done, num_steps = self.config, step + 1, self.trainer.num_steps
        is_last = done == num_steps
        logs = done % c.log_every == 0 or is_last
        batch = (to_device(x, self.trainer.device) for x in self.rows.batch(step, self.trainer.team))
        result = self.trainer.step(*batch, step, watch=logs)
        self.since_line.append(result.nats)
        if done % CHECK_EVERY_STEPS == 0 or is_last:
            self.watch.check(result, done / num_steps)
        if logs:
            line = self.metrics_line(result, done)
            try:
                print(json.dumps(line, allow_nan=False), file=metrics, flush=True)
            except ValueError:
                raise Diverged(f"training loss {line['train_nats']:.3g} nats, routing not finite") from None
            speed, nats = done * c.batch_tokens / line["seconds"], line["train_nats"]
            self.done_text = f"{done / num_steps:4.0%}  {nats:.4f} nats  {speed:,.0f} tokens/s"
            left_seconds = (num_steps - done) * c.batch_tokens / speed
            self.tell(f"{self.done_text}  {left_seconds:.0f} s left", passing=True)
            self.since_line = []
        if c.save_every and done % c.save_every == 0 and not is_last and self.leads:
            seen = {
                "step": done,
                "seconds": self.seconds(),
                "nats": self.since_line,
                "identity": self.identity,
            }
            save(self.state_path, self.trainer.state() | seen | {"checks": list(self.watch.checks)})

    def go_on(self, metrics_path: Path) -> None:
        """Take up the saved state, and drop the lines of metrics that lie after it."""
        state = torch.load(self.state_path, map_location=self.trainer.device, weights_only=True)
        if state["identity"] != self.identity:
            raise Mistake(
                f"--out {self.out}: holds the state of another run; name another folder or remove it"
            )
        self.trainer.load_state(state)
        self.watch.checks.extend(state["checks"])
        self.first_step, self.seconds_before, self.since_line = state["step"], state["seconds"], state["nats"]
        if self.leads:
            lines = metrics_path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            kept = "".join(line for line in whole if json.loads(line)["step"] <= self.first_step)
            temporary = metrics_path.with_name("metrics.tmp")
            temporary.write_text(kept)
            os.replace(temporary, metrics_path)

    def agree(self) -> None:
        """Mistake unless all processes begin at the same step."""
        mean = torch.tensor(float(self.first_step), device=self.trainer.device)
        self.trainer.team.mean([mean])
        if mean.item() != self.first_step:
            raise Mistake(f"--out {self.out}: all processes of a run must share this folder")

    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def tell(self, text: str, *, passing: bool = False) -> None:
        if self.leads:
            tell(text, passing=passing)

    def metrics_line(self, result: Step, done: int) -> dict[str, Any]:
        """One line of metrics.jsonl; train_nats is the mean over the steps since the line before."""
        nats = torch.stack(self.since_line).double().mean().item()
        if not math.isfinite(nats):
            raise Diverged(f"training loss {nats} nats at step {done}")
        c = self.config
        line = {"step": done, "tokens": done * c.batch_tokens, "seconds": self.seconds(), "train_nats": nats}
        line |= {"lr": matrix_rate(c) * schedule(c, done / self.trainer.num_steps)}
        return line | (routing_health(self.trainer.model, result) if result.routings else {})


def to_device(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


# --- Warm start ------------------------------------------------------------------------------------------

SAME = ("vocab_size", "model_dim", "head_dim", "expert_dim", "ffn", "num_shared", "recursion", "top_k")
SAME += ("gate", "renormalize", "split_top_k")
STATEFUL = ("logit_residual", "ema", "gru")  # routers that start as the linear one


class Ancestry(NamedTuple):
    """Where a model's parts come from: the source layer of each layer and whether the layer is a copy put in,
    and the source's stored expert of each stored expert."""

    layer_L: list[int]
    inserted_L: list[bool]
    expert_S: list[int]


def warm_start(model: GPT, saved: dict[str, Any]) -> Tensor:
    """Load a checkpoint's weights into `model`, converting where it must, and return the edges that the source
    had, (L, S) bool. ASSUMPTION throughout: MoUE's own conversion is not known.

    The same model goes on. A MoE gives each layer's picked experts to the pool, in order of depth; nothing is
    copied, so both have the same stored and active parameters. A deeper target gets copies of its layers, each
    after its original, that add nothing at first. As long as a ramp holds the new edges closed the model computes
    what the source did. Raises Mistake where it could not.
    """
    c, source = model.config, GPT(saved["config"])
    old = source.config
    source.load_state_dict(saved["model"])
    for key in SAME:
        require(
            getattr(c, key) == getattr(old, key), c, key, f"the source of --from has {getattr(old, key)!r}"
        )
    check_routers(c, old)
    ancestry = find_ancestry(c, old, saved["usage"])
    kept_LS = inherited_edges(model, source, ancestry)
    theirs = dict(source.named_parameters())
    with torch.no_grad():
        for name in ("embed", "head"):
            getattr(model, name).copy_(theirs[name])
        for side in ("in", "out"):
            bank, new_bank = source.bank(side, torch.float32), model.bank(side, torch.float32)
            for mine, expert in zip(new_bank, ancestry.expert_S, strict=True):
                mine.copy_(bank[expert])
        for block, layer, inserted in zip(model.blocks, ancestry.layer_L, ancestry.inserted_L, strict=False):
            copy_block(block, source.blocks[layer % len(source.blocks)], inserted)
        for layer, block in enumerate(model.blocks):
            if block.moe:
                copy_router(block.moe, source, ancestry, layer, home_rows=c.convert_rows == "home")
        copy_shared(model, source, ancestry)
    return kept_LS


def check_routers(c: TrainConfig, old: TrainConfig) -> None:
    """Mistake unless the model's routing can do what the source's did."""
    theirs = f"the source of --from has {old.router}"
    grows = old.router == "linear" and c.router in STATEFUL
    require(c.router == old.router or grows, c, "router", f"{theirs}, which cannot become it")
    if c.router == old.router:
        for key in ("router_dim", "router_feedback"):
            require(getattr(c, key) == getattr(old, key), c, key, f"{theirs} with {getattr(old, key)!r}")
    learns = c.router != "norm" or c.num_universal == old.num_universal or c.convert_rows == "home"
    require(learns, c, "convert_rows", "under router=norm a row of zeros never learns; set convert_rows=home")
    deeper = c.depth > old.depth and old.router in STATEFUL
    require(not deeper, c, "depth", f"{theirs}, whose state new layers would change; keep depth={old.depth}")
    for key in ("layer_gate", "depth_embedding"):
        require(getattr(c, key) or not getattr(old, key), c, key, "the source of --from has it; keep it")
    kept = c.balance == "bias" or old.balance != "bias"
    require(kept, c, "balance", "the source of --from chooses by biases; set balance=bias")


def find_ancestry(c: TrainConfig, old: TrainConfig, usage_LS: Tensor) -> Ancestry:
    remedy = f"the source of --from has {old.depth} layers"
    require(c.depth >= old.depth, c, "depth", f"{remedy}; layers are added, never taken away")
    require(not c.recursion or c.depth == old.depth, c, "depth", f"{remedy} and recursion; keep them")
    layer_L = [layer * old.depth // c.depth for layer in range(c.depth)]
    inserted_L = [layer > 0 and layer_L[layer] == layer_L[layer - 1] for layer in range(c.depth)]
    require(
        c.layer_gate or c.ffn == "dense" or not any(inserted_L), c, "layer_gate", f"{remedy}; set it to true"
    )
    if (c.num_local, c.num_universal) == (old.num_local, old.num_universal) or c.depth > old.depth:
        same = (c.num_local, c.num_universal) == (old.num_local, old.num_universal)
        require(
            same,
            c,
            "num_universal",
            f"{remedy} and {old.num_local} local, {old.num_universal} universal experts; "
            "first convert, then add layers",
        )
        own = [layer * c.num_local + i for layer in layer_L for i in range(c.num_local)]
        return Ancestry(
            layer_L, inserted_L, own + [old.depth * c.num_local + j for j in range(c.num_universal)]
        )
    require(
        old.num_universal == 0, c, "num_universal", f"the source of --from has a pool of {old.num_universal}"
    )
    per_layer, rest = divmod(c.num_universal, c.depth)
    remedy = (
        f"must give num_local + num_universal / depth = {old.num_local}, the experts of the source's layers"
    )
    require(rest == 0 and c.num_local + per_layer == old.num_local, c, "num_universal", remedy)
    own, pool = [], []
    for layer in range(c.depth):
        ids = np.arange(layer * old.num_local, (layer + 1) * old.num_local)
        order = np.random.default_rng([c.seed, layer]).permutation(len(ids))
        if c.convert_pick != "random":
            order = (
                usage_LS[layer, ids].argsort(stable=True, descending=c.convert_pick == "most_used").numpy()
            )
        picked = np.sort(order[:per_layer])
        pool += ids[picked].tolist()
        own += np.delete(ids, picked).tolist()
    return Ancestry(layer_L, inserted_L, own + pool)


def inherited_edges(model: GPT, source: GPT, ancestry: Ancestry) -> Tensor:
    """Which edges of the model the source had; Mistake if an edge of the source has no place in the model."""
    c = model.config
    had_LS = source.edges_LS[ancestry.layer_L][:, ancestry.expert_S]
    own_layer_S = torch.arange(c.depth).repeat_interleave(c.num_local)
    had_LS[:, : len(own_layer_S)] = own_layer_S == torch.arange(c.depth)[:, None]
    kept_LS = had_LS & model.edges_LS
    for layer, inserted in enumerate(ancestry.inserted_L):
        if not inserted:
            num_lost = int((had_LS & ~model.edges_LS)[layer].sum())
            remedy = f"layer {layer} would lose {num_lost} experts of its source; "
            remedy += "set keep_home=true, or widen window, or put layers_per_window to the growth in depth"
            require(num_lost == 0, c, "window", remedy)
        elif kept_LS[layer].sum() < c.top_k:
            kept_LS[layer] = model.edges_LS[layer]
    return kept_LS


def copy_block(block: Block, old: Block, inserted: bool) -> None:
    block.attention.load_state_dict(old.attention.state_dict())
    if block.mlp:
        block.mlp.load_state_dict(old.mlp.state_dict())
    if inserted:
        block.attention.out.zero_()
        if block.mlp:
            block.mlp.w_out.zero_()


def copy_router(moe: MoE, source: GPT, ancestry: Ancestry, layer: int, home_rows: bool) -> None:
    """Old edges take their router columns along; new ones get zeros, or the column of a layer that has one, at
    the mean length of this layer's."""
    blocks = source.blocks
    old = blocks[ancestry.layer_L[layer] % len(blocks)].moe
    for name, param in old.named_parameters():
        mine = getattr(moe, name, None)
        if name != "router" and mine is not None:
            mine.copy_(param)
    if moe.sigma is not None:  # the scale that goes with the number of experts seen
        seen, top_k = (len(m.visible) for m in (old, moe)), moe.config.top_k
        before, after = (unit_norm_scale(number, top_k) for number in seen)
        moe.sigma *= before / after
    columns = {expert: old.router[:, place] for place, expert in enumerate(old.visible)}
    others = {e: b.moe.router[:, place] for b in blocks for place, e in enumerate(b.moe.visible)}
    length = old.router.norm(dim=0).mean()
    for place, expert in enumerate(moe.visible):
        ancestor = ancestry.expert_S[expert]
        fresh = (
            F.normalize(others[ancestor], dim=0) * length if home_rows else torch.zeros_like(moe.router[:, 0])
        )
        moe.router[:, place] = columns.get(ancestor, fresh)


def copy_shared(model: GPT, source: GPT, ancestry: Ancestry) -> None:
    if model.trajectory is not None and source.trajectory is not None:
        theirs = source.trajectory.state_dict()
        theirs["keys"] = theirs["keys"][ancestry.expert_S]
        model.trajectory.load_state_dict(theirs)
    if model.depth_embedding is not None and source.depth_embedding is not None:
        model.depth_embedding.copy_(source.depth_embedding[ancestry.layer_L])
    if model.layer_gate is not None:
        if source.layer_gate is not None:
            model.layer_gate.copy_(source.layer_gate[ancestry.layer_L])
        model.layer_gate[torch.tensor(ancestry.inserted_L)] = 0.0
    if model.balance_bias is not None and source.balance_bias is not None:
        model.balance_bias.copy_(source.balance_bias[ancestry.expert_S])


# --- Serving logits --------------------------------------------------------------------------------------


def load_model(path: Path, device: torch.device) -> GPT:
    saved = read_checkpoint(path, "--logits")
    model = GPT(saved["config"])
    model.load_state_dict(saved["model"])
    return model.to(device).eval()


def serve_logits(path: Path) -> None:
    """Answer requests until the end of input. Request: uint32 B, T and B*T int32 ids, little-endian; answer:
    uint32 B, T, V and B*T*V float32. Every edge is open, nothing is carried from one request to the next."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints to stdout now cannot corrupt the channel
    device = pick_device("auto")
    model = load_model(path, device)
    while head := requests.read(8):
        shape = struct.unpack("<II", head)
        body = requests.read(4 * shape[0] * shape[1])
        tokens_BT = torch.from_numpy(np.frombuffer(body, "<i4").astype(np.int64).reshape(shape))
        with torch.inference_mode():
            logits_BTV = model(tokens_BT.to(device)).cpu().contiguous()
        answers.write(struct.pack("<III", *logits_BTV.shape))
        answers.write(logits_BTV.numpy().astype("<f4", copy=False).data)
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
    parser.add_argument(
        "--from", dest="source", metavar="CHECKPOINT", type=Path, help="begin with these weights, converted"
    )
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
        train(config, args.out, args.source)
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
