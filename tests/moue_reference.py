"""The model and its losses from their formulas, in float64: loops over layers, rows, tokens and experts.

Shares no code with train_small.py: it is given resolved settings, parameters by name and the edges.

Shapes, as name suffixes: B rows, T positions, D width, V vocabulary, L layers, S stored experts, E experts a
layer sees (its visible ones, ascending ids), P router state. Stored expert l*num_local + i is layer l's own i-th,
depth*num_local + j is the j-th of the pool.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]


class Routed(NamedTuple):
    """What one layer did over a batch: share of assignments and mean probability of every stored expert, mean
    squared logsumexp and mean entropy."""

    load_S: Tensor
    prob_S: Tensor
    zloss: Tensor
    entropy: Tensor


@dataclass
class Carried:
    """What one token takes from layer to layer: its state, a summary of the experts it just used, and the logit
    that every pool expert had where it was last seen."""

    state_P: Tensor
    used_P: Tensor
    last: dict[int, Tensor] = field(default_factory=dict)


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@cache
def turn(position: int, head_dim: int) -> Tensor:
    """(C, C) rotation of RoPE, base 10000, of neighbours (2i, 2i+1); for row vectors."""
    rotation = torch.zeros(head_dim, head_dim, dtype=torch.float64)
    for i in range(0, head_dim, 2):
        cos, sin = (f(position * 10000.0 ** (-i / head_dim)) for f in (math.cos, math.sin))
        rotation[i : i + 2, i : i + 2] = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    return rotation


def attend(c: Any, p: Params, block: int, x_TD: Tensor) -> Tensor:
    q_TD, k_TD, v_TD = (x_TD @ w.T for w in p[f"blocks.{block}.attention.qkv"])
    heads = []
    for h in range(c.model_dim // c.head_dim):
        own = slice(h * c.head_dim, (h + 1) * c.head_dim)
        q, k = ([norm(row @ turn(t, c.head_dim)) for t, row in enumerate(x[:, own])] for x in (q_TD, k_TD))
        rows = []
        for t in range(len(x_TD)):
            score = torch.stack([q[t] @ k[u] for u in range(t + 1)]) / c.head_dim**0.5
            rows.append(score.softmax(0) @ v_TD[: t + 1, own])
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=1) @ p[f"blocks.{block}.attention.out"].T


def gru(p: Params, input_P: Tensor, state_P: Tensor) -> Tensor:
    fresh = (p["trajectory.cell.weight_ih"] @ input_P + p["trajectory.cell.bias_ih"]).chunk(3)
    kept = (p["trajectory.cell.weight_hh"] @ state_P + p["trajectory.cell.bias_hh"]).chunk(3)
    reset, update = torch.sigmoid(fresh[0] + kept[0]), torch.sigmoid(fresh[1] + kept[1])
    candidate = torch.tanh(fresh[2] + reset * kept[2])
    return (1 - update) * candidate + update * state_P


def router_logits(c: Any, p: Params, block: int, y_D: Tensor, visible: list[int], token: Carried) -> Tensor:
    """(E,) before any offset; moves the token's GRU state and its last logits on."""
    moe = f"blocks.{block}.moe."
    x = (y_D @ p[moe + "router_in"]).relu() ** 2 if c.router == "mlp" else y_D
    z = list(x @ p[moe + "router"])
    if c.router == "gru":
        feedback = token.used_P @ p["trajectory.feedback"] if c.router_feedback else 0
        token.state_P = gru(p, y_D @ p[moe + "state_in"] + feedback, token.state_P)
    if c.router in ("gru", "ema"):
        query_P = token.state_P @ p["trajectory.read"]
        z = [z[e] + p[moe + "gamma"] * (query_P @ p["trajectory.keys"][j]) for e, j in enumerate(visible)]
    if c.router == "logit_residual":
        pool = [(e, j) for e, j in enumerate(visible) if j >= c.depth * c.num_local]
        for e, j in pool:
            z[e] = z[e] + p[moe + "rho"] * token.last.get(j, 0)
        token.last |= {j: z[e] for e, j in pool}
    return torch.stack(z)


def choose(c: Any, selection_E: Tensor, visible: list[int]) -> list[int]:
    """Places, among the visible experts, of the top_k; split_top_k of them from the pool."""
    best = sorted(range(len(visible)), key=lambda e: -selection_E[e].item())
    pool = [e for e in best if visible[e] >= c.depth * c.num_local]
    own = [e for e in best if visible[e] < c.depth * c.num_local]
    if c.split_top_k == 0 or not pool:
        return best[: c.top_k]
    return pool[: c.split_top_k] + own[: c.top_k - c.split_top_k]


def gates_and_probs(c: Any, p: Params, block: int, z_E: Tensor, chosen: list[int], norm_scale: float):
    """Gates of the chosen, and (E,) probabilities, from logits in which closed edges are -inf."""
    renormalize = c.renormalize and c.top_k > 1
    if c.router == "norm":
        length = sum(z**2 for z in z_E if z > -math.inf).sqrt()
        direction = [(z / length).relu() if z > -math.inf else torch.zeros_like(z) for z in z_E]
        gates = [p[f"blocks.{block}.moe.sigma"] * norm_scale * direction[e] for e in chosen]
        return gates, torch.stack(direction) / (sum(direction) + 1e-9)
    if c.gate == "softmax":
        raw_E = z_E.exp() / z_E.exp().sum()
    else:
        raw_E = torch.stack([1 / (1 + (-z).exp()) if z > -math.inf else torch.zeros_like(z) for z in z_E])
    whole = sum(raw_E[e] for e in chosen) if renormalize else 1
    return [raw_E[e] / whole for e in chosen], raw_E / raw_E.sum()


def feed(c: Any, p: Params, layer: int, y_D: Tensor, token: Carried, visible: list[int], **how):
    """One token through the routed experts of one layer: output (D,) and its own Routed."""
    block = layer % c.recursion if c.recursion else layer
    z_E = router_logits(c, p, block, y_D, visible, token) + how["offset_S"][visible]
    chosen = choose(c, z_E + how["bias_S"][visible], visible)
    gates, prob_E = gates_and_probs(c, p, block, z_E, chosen, how["norm_scale"])
    out_D, used_P = torch.zeros_like(y_D), torch.zeros_like(token.used_P)
    load_S, prob_S = torch.zeros_like(how["offset_S"]), torch.zeros_like(how["offset_S"])
    for gate, e in zip(gates, chosen, strict=True):
        w_in, w_out = how["experts"][visible[e]]
        out_D = out_D + gate * ((y_D @ w_in).relu() ** 2 @ w_out)
        load_S[visible[e]] += 1 / c.top_k
        if "trajectory.keys" in p:
            used_P = used_P + gate * p["trajectory.keys"][visible[e]]
    token.used_P = used_P
    if c.router == "ema":
        decay = torch.sigmoid(p["trajectory.decay"])
        token.state_P = decay * token.state_P + (1 - decay) * used_P
    if c.layer_gate:
        out_D = out_D * p["layer_gate"][layer]
    prob_S = prob_S.index_put((torch.tensor(visible),), prob_E)
    entropy = sum((-q * q.log() for q in prob_E if q > 0), torch.zeros((), dtype=torch.float64))
    return out_D, Routed(load_S, prob_S, z_E.exp().sum().log() ** 2, entropy)


def forward(
    c: Any,
    p: Params,
    edges_LS: Tensor,
    tokens_BT: Tensor,
    offset_LS: Tensor | None = None,
    bias_S: Tensor | None = None,
    norm_scale: list[float] | None = None,
) -> tuple[Tensor, list[Routed]]:
    """Logits (B, T, V) and what every mixture layer did. `norm_scale`: c0 of each layer, router=norm."""
    offset_LS = torch.zeros(edges_LS.shape) if offset_LS is None else offset_LS
    bias_S = torch.zeros(edges_LS.shape[1]) if bias_S is None else bias_S
    nothing_P = torch.zeros(
        p["trajectory.keys"].shape[1] if "trajectory.keys" in p else 0, dtype=torch.float64
    )
    rows = [norm(p["embed"][row]) for row in tokens_BT]
    carried = [[Carried(nothing_P, nothing_P) for _ in row] for row in tokens_BT]
    sides = ([w for bank in ("local", "pool") for w in p.get(f"{bank}_{side}", ())] for side in ("in", "out"))
    experts, routed = list(zip(*sides, strict=True)), []
    for layer in range(c.depth):
        block = layer % c.recursion if c.recursion else layer
        rows = [x_TD + attend(c, p, block, norm(x_TD)) for x_TD in rows]
        how = {"offset_S": offset_LS[layer].double(), "bias_S": bias_S.double(), "experts": experts}
        how["norm_scale"] = norm_scale[layer] if norm_scale else 1.0
        visible, seen = edges_LS[layer].nonzero().flatten().tolist(), []
        for b, x_TD in enumerate(rows):
            y_TD = norm(x_TD) + (p["depth_embedding"][layer] if c.depth_embedding else 0)
            if (mlp := f"blocks.{block}.mlp.w_") + "in" in p:
                x_TD = x_TD + (y_TD @ p[mlp + "in"]).relu() ** 2 @ p[mlp + "out"]
            if c.ffn == "moe":
                outs = [
                    feed(c, p, layer, y, token, visible, **how)
                    for y, token in zip(y_TD, carried[b], strict=True)
                ]
                x_TD = x_TD + torch.stack([out_D for out_D, _ in outs])
                seen += [one for _, one in outs]
            rows[b] = x_TD
        if seen:
            routed.append(Routed(*(torch.stack(values).mean(0) for values in zip(*seen, strict=True))))
    return torch.stack([norm(x_TD) @ p["head"].T for x_TD in rows]), routed


# --- losses -----------------------------------------------------------------------------------------------


def fair_loads(c: Any, open_LS: Tensor) -> Tensor:
    """Load of every open edge under uniform routing: with a split top-k each group has its own number of slots."""
    own, fair_LS = c.depth * c.num_local, torch.zeros(open_LS.shape, dtype=torch.float64)
    for layer, row in enumerate(open_LS):
        seen = [j for j in range(len(row)) if row[j]]
        groups = [[j for j in seen if j < own], [j for j in seen if j >= own]]
        slots = [c.top_k - c.split_top_k, c.split_top_k]
        if not c.split_top_k or not groups[1]:
            groups, slots = [seen], [c.top_k]
        for group, number in zip(groups, slots, strict=True):
            for j in group:
                fair_LS[layer, j] = number / c.top_k / len(group)
    return fair_LS


def exposure(fair_LS: Tensor) -> list[float]:
    """e_j, the load of stored expert j under uniform routing."""
    return [sum(column.tolist()) for column in fair_LS.T]


def in_scope(c: Any, values_LS: Tensor, *, rescale: bool) -> Tensor:
    """The columns that are balanced; in scope pool_only every layer's shares are made to sum to 1 again."""
    if c.balance_scope == "joint":
        return values_LS
    pool_LU = values_LS[:, c.depth * c.num_local :]
    sums = [row.sum() for row in pool_LU]
    return torch.stack([r / s if rescale and s > 0 else r for r, s in zip(pool_LU, sums, strict=True)])


def balance_loss(c: Any, load_LS: Tensor, prob_LS: Tensor, open_LS: Tensor) -> Tensor:
    load_LS = in_scope(c, load_LS.double(), rescale=True)
    prob_LS = in_scope(c, prob_LS, rescale=True)
    fair_LS = in_scope(c, fair_loads(c, open_LS), rescale=True)
    layers, stored = fair_LS.shape
    if c.balance == "layer":
        edges = [(i, j) for i in range(layers) for j in range(stored) if fair_LS[i, j] > 0]
        return c.balance_coeff / layers * sum(load_LS[e] * prob_LS[e] / fair_LS[e] for e in edges)
    expected = exposure(fair_LS) if c.balance == "uelb" else [layers / stored] * stored
    power = c.exposure_power if c.balance == "uelb" else 1  # a pool loss expects the same of every expert
    total, whole = 0, 0
    for j, e in enumerate(expected):
        if e > 0:
            total = total + e ** (power - 2) * load_LS[:, j].sum() * prob_LS[:, j].sum()
            whole += e**power
    return c.balance_coeff * total / whole


def total_loss(
    c: Any,
    logits_BTV: Tensor,
    routed: list[Routed],
    targets_BT: Tensor,
    open_LS: Tensor,
    progress: float = 1.0,
    load_LS: Tensor | None = None,
    prob_LS: Tensor | None = None,
) -> Tensor:
    """Cross-entropy, z-loss and balance loss. `load_LS`, `prob_LS`: what to balance instead of the batch's own."""
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
    if not routed:
        return loss
    loss = loss + c.zloss_coeff * sum(r.zloss for r in routed) / len(routed)
    if c.balance in ("none", "bias"):
        return loss
    ramp = min(1.0, progress / c.balance_ramp) if c.balance_ramp else 1.0
    load_LS = torch.stack([r.load_S for r in routed]) if load_LS is None else load_LS
    prob_LS = torch.stack([r.prob_S for r in routed]) if prob_LS is None else prob_LS
    return loss + ramp * balance_loss(c, load_LS, prob_LS, open_LS)


def moved_bias(c: Any, bias_S: Tensor, load_LS: Tensor, open_LS: Tensor) -> Tensor:
    """The selection bias after a step: up where an expert had less than its exposure, down where more."""
    load_S = in_scope(c, load_LS.double(), rescale=True).sum(0)
    expected = exposure(in_scope(c, fair_loads(c, open_LS), rescale=True))
    first = len(bias_S) - len(expected)
    moved = bias_S.double().clone()
    seen = [j for j, e in enumerate(expected) if e > 0]
    for j in seen:
        moved[first + j] += c.bias_rate * ((expected[j] > load_S[j]) * 1.0 - (expected[j] < load_S[j]) * 1.0)
    mean = sum(moved[first + j] for j in seen) / len(seen)
    for j in seen:
        moved[first + j] -= mean
    return moved
