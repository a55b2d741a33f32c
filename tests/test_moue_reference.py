"""The trainer against the float64 loops of moue_reference.py: every router, gate, choice and balance, their
special cases against their parents, and the micro-batches of a step against the whole of it.

    python -m pytest tests/test_moue_reference.py
"""

import itertools
import math
from dataclasses import replace

import moue_reference as reference
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import train_small as ts
from train_small import GPT, TrainConfig, resolve

# Layers see 6, 5 and 3 experts, and pool experts are reached 1, 1, 2, 2 and 2 times: nothing here is uniform.
TINY = {"depth": 3, "model_dim": 32, "head_dim": 16, "expert_dim": 16, "seq_len": 8, "batch_tokens": 16}
TINY |= {"tokens": 160, "device": "cpu", "num_experts": 4, "balance_coeff": 0.5, "zloss_coeff": 0.1}
CUT_RING = {"num_local": 2, "num_universal": 5, "window": 4, "stride": 2, "wrap": False}
WITH_STATE = ("gru", "ema")
GATES = [{"gate": g, "renormalize": r} for g in ("softmax", "sigmoid") for r in (True, False)]
ROUTERS = ("linear", "mlp", "norm", "logit_residual", *WITH_STATE)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny(**changes) -> TrainConfig:
    """A small run on a cut ring, or on the topology that the changes give whole."""
    ring = {} if {"topology", "num_universal"} & set(changes) else CUT_RING
    narrow = {"router_dim": 8} if changes.get("router") in ("mlp", *WITH_STATE) else {}
    return TrainConfig(**{**TINY, **ring, **narrow, **changes})


def awake(config: TrainConfig) -> GPT:
    """A model in which no parameter has the one value that it is born with, so that every part counts."""
    model, stream = GPT(config), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.min() == value.max() or name == "head":
                value += 0.3 * torch.randn(value.shape, generator=stream)
    return model


def some_tokens(seed: int, rows=2) -> Tensor:
    return torch.randint(0, 257, (rows, 8), generator=torch.Generator().manual_seed(seed))


def some_offset(edges_LS: Tensor, *, closed: bool, faded: bool, seed=5) -> Tensor:
    """Fades on some edges, others closed, but a layer always keeps its first and its last expert."""
    draw_LS = torch.rand(edges_LS.shape, generator=torch.Generator().manual_seed(seed))
    offset_LS = torch.zeros(edges_LS.shape)
    if faded:
        offset_LS[draw_LS < 0.4] = -1.5
    if closed:
        offset_LS[draw_LS > 0.6] = -math.inf
    for row, edges in zip(offset_LS, edges_LS, strict=True):
        row[edges.nonzero().flatten()[[0, -1]]] = 0  # one of its own and one of the pool
    return offset_LS


def assert_close(got: Tensor, wanted: Tensor, rtol: float, what: str = "") -> None:
    """Equal to within rtol of the largest of what was wanted, and to 5e-7: a scalar may be a sum that cancels."""
    gap, size = (got.double() - wanted.double()).abs().max().item(), wanted.abs().max().item()
    assert gap <= rtol * size + 5e-7, f"{what}: off by {gap:.3g}, largest {size:.3g}"


def over_stored(values: list[Tensor], edges_LS: Tensor) -> Tensor:
    """(L, S) from a vector over the experts that each layer sees."""
    rows = torch.zeros(edges_LS.shape)
    return torch.stack([row.index_put((e,), v) for row, e, v in zip(rows, edges_LS, values, strict=True)])


def trained_loss(model: GPT, tokens: Tensor, targets: Tensor, offset_LS: Tensor | None = None) -> Tensor:
    """What the trainer's own parts say the loss is, once all ramps are over."""
    c, edges_LS = model.config, model.edges_LS
    logits, routings = model.trace(tokens, offset_LS)[:2]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    if not routings:
        return loss
    loss = loss + c.zloss_coeff * torch.stack([r.zloss for r in routings]).mean()
    if c.balance in ("none", "bias"):
        return loss
    load_LS, prob_LS = (
        over_stored([getattr(r, k) for r in routings], edges_LS) for k in ("load_E", "prob_E")
    )
    return loss + ts.balance_loss(c, load_LS, prob_LS, opened(edges_LS, offset_LS))


def opened(edges_LS: Tensor, offset_LS: Tensor | None) -> Tensor:
    return edges_LS if offset_LS is None else edges_LS & (offset_LS > -math.inf)


def twin(model: GPT) -> dict[str, Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def assert_gradients(gradients: dict[str, Tensor], loss: Tensor, params: dict[str, Tensor]) -> None:
    """That these are the gradients of a loss of the reference."""
    wanted = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
    assert len(gradients) == len(wanted)
    for name, gradient in zip(params, wanted, strict=True):
        assert_close(gradients[name], gradient, 1e-5, name)


def gradients_of(loss: Tensor, model: GPT) -> dict[str, Tensor]:
    values = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return dict(zip(dict(model.named_parameters()), values, strict=True))


def assert_agrees(model: GPT, offset_LS: Tensor | None = None) -> None:
    """Logits, routing, loss and the gradient of every parameter equal the reference's."""
    c, edges_LS, params = model.config, model.edges_LS, twin(model)
    tokens, targets = some_tokens(3), some_tokens(4)
    logits, routings = model.trace(tokens, offset_LS)[:2]
    wanted_logits, routed = reference_forward(model, params, tokens, offset_LS)
    assert len(routings) == len(routed) == (c.depth if c.ffn == "moe" else 0)
    for layer, (got, wanted) in enumerate(zip(routings, routed, strict=True)):
        seen = edges_LS[layer]
        assert_close(got.load_E, wanted.load_S[seen], 1e-6, f"load of layer {layer}")
        assert_close(got.prob_E, wanted.prob_S[seen], 1e-5, f"probabilities of layer {layer}")
        assert_close(got.zloss, wanted.zloss, 1e-5, f"zloss of layer {layer}")
        assert_close(got.entropy, wanted.entropy, 1e-5, f"entropy of layer {layer}")
    assert_close(logits, wanted_logits, 1e-5, "logits")
    loss = trained_loss(model, tokens, targets, offset_LS)
    wanted = reference.total_loss(c, wanted_logits, routed, targets, opened(edges_LS, offset_LS))
    assert_close(loss, wanted, 1e-5, "loss")
    assert_gradients(gradients_of(loss, model), wanted, params)


def reference_forward(model: GPT, params: dict[str, Tensor], tokens: Tensor, offset_LS: Tensor | None = None):
    c, widths = model.config, model.edges_LS.sum(1).tolist()
    scales = [ts.unit_norm_scale(width, c.top_k) for width in widths] if c.router == "norm" else None
    return reference.forward(c, params, model.edges_LS, tokens, offset_LS, model.balance_bias, scales)


# --- every variant against the reference ------------------------------------------------------------------


def variants() -> list[dict]:
    one, two = {"top_k": 1}, {"top_k": 2}
    ways = [{**gate, **chosen} for gate in GATES for chosen in (two, two | {"split_top_k": 1})]
    ways += [
        {"gate": g, **chosen} for g in ("softmax", "sigmoid") for chosen in (one, one | {"split_top_k": 1})
    ]
    norm = [{"router": "norm", **chosen} for chosen in (one, two, two | {"split_top_k": 1})]
    return norm + [{"router": r, **way} for r, way in itertools.product(ROUTERS, ways) if r != "norm"]


def named(changes: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in changes.items())


@pytest.mark.parametrize("changes", variants(), ids=named)
def test_router_gate_and_choice(changes):
    assert_agrees(awake(tiny(**changes)))


NO_POOL_FIRST = {"topology": "ring", "num_universal": 4, "num_local": 4, "window": 3, "stride": 1}
NO_POOL_FIRST |= {
    "untied_first": 1
}  # with as many local experts as in the matched mixture it needs no others


@pytest.mark.parametrize(
    "changes",
    [
        {"ffn": "dense"},
        {"ffn": "dense", "depth_embedding": True},
        {"depth_embedding": True},
        {"depth_embedding": True, "num_shared": 1, "router": "gru"},
        {"layer_gate": True},
        {"layer_gate": True, "router": "gru"},
        {"layer_gate": True, "router": "ema", "depth_embedding": True, "num_shared": 1},
        {"router": "gru", "router_feedback": False},
        {"top_k": 3, "renormalize": False, "num_shared": 1},
        {"top_k": 3, "gate": "sigmoid", "num_local": 3, "split_top_k": 1},
        {"balance": "bias"},
        {"balance": "bias", "gate": "sigmoid", "split_top_k": 1, "router": "gru"},
        {"balance": "bias", "router": "norm"},
        {"balance": "none"},
        {"topology": "none", "num_local": 4},
        {"topology": "none", "num_local": 4, "router": "gru"},
        {"topology": "full", "num_universal": 6, "num_local": 1, "router": "ema"},
        {"topology": "full", "num_universal": 4, "num_local": 0, "depth": 4, "recursion": 2},
        {"topology": "full", "num_universal": 4, "num_local": 0, "depth": 4, "recursion": 2, "router": "gru"}
        | {"layer_gate": True, "depth_embedding": True, "num_shared": 1},
        {"topology": "full", "num_universal": 4, "num_local": 0, "recursion": 1, "router": "logit_residual"},
        {"topology": "ring", "num_universal": 6, "num_local": 1, "window": 2, "stride": 2, "depth": 4}
        | {"router": "logit_residual"},  # experts come back after layers that do not see them
        NO_POOL_FIRST | {"split_top_k": 1, "balance": "layer", "balance_scope": "pool_only"},
        NO_POOL_FIRST | {"router": "logit_residual"},
    ],
    ids=named,
)
def test_parts_one_by_one_and_together(changes):
    assert_agrees(awake(tiny(**changes)))


UNTIED = {"topology": "ring", "depth": 4, "num_local": 2, "num_universal": 8, "window": 3, "stride": 2}
UNTIED |= {"untied_first": 1, "untied_last": 1}
STAGED = {"topology": "ring", "depth": 4, "num_local": 1, "num_universal": 8, "window": 3, "stride": 2}
STAGED |= {"stages": 2, "stage_sharing": "within"}


@pytest.mark.parametrize(
    "changes, pool",
    [
        (UNTIED, [{0, 1}, {2, 3, 4}, {4, 5, 2}, {6, 7}]),
        (STAGED, [{0, 1, 2}, {2, 3, 0}, {4, 5, 6}, {6, 7, 4}]),
    ],
    ids=["untied", "stages"],
)
def test_layers_with_a_pool_of_their_own(changes, pool):
    config = resolve(tiny(**changes))
    edges_LU = ts.connectivity(config)[:, config.depth * config.num_local :]
    assert [set(row.nonzero().flatten().tolist()) for row in edges_LU] == pool
    for extra in ({}, {"router": "gru"}, {"router": "logit_residual"}, {"top_k": 2, "split_top_k": 1}):
        assert_agrees(awake(tiny(**changes, **extra)))


CLOSED, FADED = {"closed": True, "faded": False}, {"closed": False, "faded": True}
BALANCES = [{"balance": b} for b in ("layer", "pool")] + [
    {"balance": "uelb", "exposure_power": power} for power in (0, 1, 2)
]


@pytest.mark.parametrize("how", [CLOSED, FADED, {"closed": True, "faded": True}], ids=named)
@pytest.mark.parametrize(
    "router, gate", [(r, {}) for r in ROUTERS] + [("linear", gate) for gate in GATES[1:]]
)
def test_closed_and_faded_edges(router, gate, how):
    model = awake(tiny(router=router, **gate))
    assert_agrees(model, some_offset(model.edges_LS, **how))


@pytest.mark.parametrize("scope", ["joint", "pool_only"])
@pytest.mark.parametrize("balance", BALANCES, ids=named)
def test_balance(balance, scope):
    model = awake(tiny(balance_scope=scope, **balance))
    assert_agrees(model)
    assert_agrees(model, some_offset(model.edges_LS, closed=True, faded=True))


@pytest.mark.parametrize("balance", BALANCES[:3], ids=named)
def test_the_load_gets_no_gradient(balance):
    config = resolve(tiny(**balance))
    edges_LS = ts.connectivity(config)
    load_LS, prob_LS = (edges_LS / edges_LS.sum(1, keepdim=True) for _ in range(2))
    load_LS.requires_grad_(), prob_LS.requires_grad_()
    ts.balance_loss(config, load_LS, prob_LS, edges_LS).backward()
    assert load_LS.grad is None and prob_LS.grad.abs().sum() > 0


@pytest.mark.parametrize("scope", ["joint", "pool_only"])
def test_the_bias_moves_against_the_load(scope):
    model = awake(tiny(balance="bias", balance_scope=scope, bias_rate=0.05))
    c, stream = model.config, torch.Generator().manual_seed(1)
    first = c.depth * c.num_local if scope == "pool_only" else 0
    model.balance_bias[:first] = 0
    for closed in (False, True):
        open_LS = opened(model.edges_LS, some_offset(model.edges_LS, closed=closed, faded=False))
        load_LS = torch.rand(open_LS.shape, generator=stream) * open_LS
        load_LS /= load_LS.sum(1, keepdim=True)
        before_S = model.balance_bias.clone()
        wanted_S = reference.moved_bias(c, before_S, load_LS, open_LS)
        ts.update_balance_bias(model, load_LS, open_LS)
        assert_close(model.balance_bias, wanted_S, 1e-5)
        assert (model.balance_bias - before_S).abs().max() > 0.01 and not model.balance_bias[:first].any()


# --- special cases equal their parents --------------------------------------------------------------------


def loss_and_gradients(model: GPT, offset_LS: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    loss = trained_loss(model, some_tokens(3), some_tokens(4), offset_LS)
    return loss.detach(), gradients_of(loss, model)


def assert_same_model(one: GPT, other: GPT) -> None:
    """Bit for bit: logits, loss and gradients of the parameters that both have."""
    assert one(some_tokens(3)).equal(other(some_tokens(3)))
    (loss, gradients), (other_loss, other_gradients) = loss_and_gradients(one), loss_and_gradients(other)
    assert loss.equal(other_loss)
    for name in gradients.keys() & other_gradients.keys():
        assert gradients[name].equal(other_gradients[name]), name


def with_weights(config: TrainConfig, source: GPT, **renamed: str) -> GPT:
    """A model with the weights of another, but for those that only one of them has."""
    model = GPT(config)
    weights = {renamed.get(name, name): value for name, value in source.state_dict().items()}
    mine = model.state_dict()
    model.load_state_dict(mine | {name: value for name, value in weights.items() if name in mine})
    return model


@pytest.mark.parametrize("router", ROUTERS)
def test_a_window_as_wide_as_the_pool_is_the_full_topology(router):
    pool = {"num_local": 1, "num_universal": 5, "router": router}
    full = awake(tiny(topology="full", **pool))
    assert_same_model(full, with_weights(tiny(topology="ring", window=5, stride=2, **pool), full))


@pytest.mark.parametrize("router", ROUTERS)
def test_an_empty_pool_is_the_plain_mixture(router):
    plain = awake(tiny(topology="none", num_local=4, router=router))
    empty = tiny(topology="ring", num_local=4, num_universal=0, window=3, stride=2, router=router)
    assert_same_model(plain, with_weights(empty, plain))


@pytest.mark.parametrize("balance", BALANCES, ids=named)
@pytest.mark.parametrize("router", ["linear", "norm", *WITH_STATE])
def test_a_pool_that_no_two_layers_share_is_local_experts(router, balance):
    own = awake(tiny(topology="none", num_local=2, num_universal=0, router=router, **balance))
    shared = tiny(topology="blocks", num_local=0, num_universal=6, router=router, **balance)
    pool = with_weights(shared, own, local_in="pool_in", local_out="pool_out")
    assert_same_model(own, pool)
    gradients = [loss_and_gradients(model)[1] for model in (own, pool)]
    for side in ("in", "out"):
        assert gradients[0][f"local_{side}"].equal(gradients[1][f"pool_{side}"])


@pytest.mark.parametrize("router, scale", [("gru", "gamma"), ("ema", "gamma"), ("logit_residual", "rho")])
def test_a_state_of_no_weight_is_the_linear_router(router, scale):
    model = awake(tiny(router=router))
    with torch.no_grad():
        for block in model.blocks:
            getattr(block.moe, scale).zero_()
    assert_same_model(model, with_weights(tiny(), model))


@pytest.mark.parametrize(
    "changes", [{}, {"gate": "sigmoid"}, {"router": "gru"}, {"balance": "pool"}], ids=named
)
def test_closed_edges_are_columns_that_are_not_there(changes):
    pool = {"num_local": 1, "num_universal": 6, **changes}
    wide, narrow = (
        awake(tiny(topology="full", **pool)),
        GPT(tiny(topology="ring", window=3, stride=2, **pool)),
    )
    weights = wide.state_dict()
    for layer, row in enumerate(narrow.edges_LS):
        weights[f"blocks.{layer}.moe.router"] = wide.blocks[layer].moe.router[:, row[wide.edges_LS[layer]]]
    narrow.load_state_dict(weights)
    offset_LS = torch.zeros(wide.edges_LS.shape).masked_fill(~narrow.edges_LS, -math.inf)
    assert_close(wide.trace(some_tokens(3), offset_LS)[0], narrow(some_tokens(3)), 1e-6)
    loss, gradients = loss_and_gradients(wide, offset_LS)
    narrow_loss, narrow_gradients = loss_and_gradients(narrow)
    assert_close(loss, narrow_loss, 1e-6)
    for name, wanted in narrow_gradients.items():
        got = gradients[name]
        if name.endswith("router"):
            layer = int(name.split(".")[1])
            kept = narrow.edges_LS[layer][wide.edges_LS[layer]]
            assert not got[:, ~kept].any()
            got = got[:, kept]
        assert_close(got, wanted, 1e-5, name)


LOOPED = {"topology": "full", "num_local": 0, "num_universal": 4, "depth": 4}


@pytest.mark.parametrize("router", ROUTERS)
def test_recursion_over_all_layers_is_none(router):
    looped = awake(tiny(recursion=4, router=router, **LOOPED))
    assert_same_model(looped, with_weights(tiny(router=router, **LOOPED), looped))


@pytest.mark.parametrize("router", ROUTERS)
def test_a_recursive_blocks_gradient_is_the_sum_over_its_uses(router):
    looped = awake(tiny(recursion=2, router=router, num_shared=1, **LOOPED))
    flat = GPT(tiny(router=router, num_shared=1, **LOOPED))
    again = {n.replace(f".{b}.", f".{b + 2}.", 1): v for n, v in looped.state_dict().items() for b in (0, 1)}
    flat.load_state_dict(looped.state_dict() | again)
    assert_close(looped(some_tokens(3)), flat(some_tokens(3)), 1e-6)
    gradients, uses = loss_and_gradients(looped)[1], loss_and_gradients(flat)[1]
    for name, got in gradients.items():
        wanted = uses[name]
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            second = uses[f"blocks.{int(block) + 2}.{rest}"]
            assert wanted.any() or second.any(), name
            wanted = wanted + second
        assert_close(got, wanted, 1e-5, name)


def test_one_stage_is_no_stages():
    for sharing in ("all", "within"):
        for ring in ({}, {"topology": "full", "num_universal": 6}):
            alone = ts.connectivity(tiny(stages=1, stage_sharing=sharing, **ring))
            assert alone.equal(ts.connectivity(tiny(**ring)))


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_one_chosen_gate_is_never_renormalized(gate):
    one = awake(tiny(top_k=1, gate=gate, renormalize=True))
    assert_same_model(one, with_weights(tiny(top_k=1, gate=gate, renormalize=False), one))
    silent = with_weights(tiny(top_k=1, gate=gate, balance="none", zloss_coeff=0.0), one)
    assert loss_and_gradients(silent)[1]["blocks.1.moe.router"].abs().max() > 1e-3


# --- the state runs along depth, and its gradient with it --------------------------------------------------


@pytest.mark.parametrize("router", ["logit_residual", *WITH_STATE])
def test_the_state_never_runs_along_the_row_or_between_rows(router):
    model, tokens = awake(tiny(router=router)), some_tokens(3, rows=4)
    logits, moved = model(tokens), tokens.clone()
    moved[:, 5] = (moved[:, 5] + 1) % 257
    other = model(moved)
    assert_close(other[:, :5], logits[:, :5], 1e-6)
    assert (other[:, 5:] - logits[:, 5:]).abs().amax((0, 2)).min() > 1e-3
    order = torch.tensor([2, 0, 3, 1])
    assert_close(model(tokens[order]), logits[order], 1e-6)


@pytest.mark.parametrize("router", WITH_STATE)
def test_a_pool_experts_gradient_is_the_sum_over_its_uses(router):
    shared = awake(tiny(topology="full", num_local=0, num_universal=4, router=router, balance="none"))
    untied = GPT(tiny(topology="none", num_local=4, router=router, balance="none"))
    weights = {name: v for name, v in shared.state_dict().items() if not name.startswith("pool")}
    tied = {"trajectory.keys": "trajectory.keys", "local_in": "pool_in", "local_out": "pool_out"}
    bank = shared.state_dict()
    weights |= {one: torch.cat([bank[many]] * 3) for one, many in tied.items()}
    untied.load_state_dict(weights)
    gradients, uses = loss_and_gradients(shared)[1], loss_and_gradients(untied)[1]
    for one, many in tied.items():
        by_layer = uses[one].unflatten(0, (3, 4))
        assert all(part.abs().max() > 0 for part in by_layer)
        assert_close(gradients[many], by_layer.sum(0), 1e-5, many)


@pytest.mark.parametrize(
    "early",
    ["blocks.0.moe.state_in", "blocks.1.moe.state_in", "trajectory.cell.weight_ih", "trajectory.feedback"],
)
def test_the_gradient_runs_back_along_the_state(early):
    """Only the last layer reads the state, so what it gives to earlier layers has come through the state."""
    model = awake(tiny(router="gru"))
    with torch.no_grad():
        model.blocks[0].moe.gamma.zero_()
        model.blocks[1].moe.gamma.zero_()
    assert loss_and_gradients(model)[1][early].abs().max() > 1e-6
    assert_agrees(model)


@pytest.mark.parametrize(
    "router, early", [("logit_residual", "router"), ("ema", "router"), ("gru", "state_in")]
)
def test_routing_reaches_later_routing_where_the_stream_does_not(router, early):
    """Experts that say nothing leave the stream alone, so that a later layer's logits can only have moved by what
    the token carries along."""
    model = awake(tiny(router=router, renormalize=False))
    with torch.no_grad():
        model.local_out.zero_(), model.pool_out.zero_()
    loss = model.trace(some_tokens(3))[1][1].zloss
    assert gradients_of(loss, model)[f"blocks.0.moe.{early}"].abs().max() > 1e-3


# --- a step, in one batch and in many ---------------------------------------------------------------------

MICRO = {"batch_tokens": 32, "micro_tokens": 8, "tokens": 320, "balance_coeff": 5.0}


class Recorder:
    """An optimizer that keeps the gradients and moves nothing."""

    def __init__(self, model: GPT):
        self.params, self.gradients = dict(model.named_parameters()), {}

    def step(self, *_rates: float) -> None:
        zeros = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.gradients = {n: zeros[n] if p.grad is None else p.grad.clone() for n, p in self.params.items()}


def rehearsal(model: GPT) -> tuple[ts.Trainer, Recorder]:
    trainer, recorder = ts.Trainer(model), Recorder(model)
    trainer.optimizers = [recorder]
    return trainer, recorder


def step_loss(model, params, tokens, targets, progress=1.0, offset_LS=None, batch="global", last_LS=None):
    """The reference's loss of a step of micro-batches, and the load of the whole of it. Its global balance loss
    is that of the whole step's loads and probabilities, said once for every micro-batch and averaged."""
    c, rows = model.config, model.config.micro_tokens // model.config.seq_len
    pieces = list(zip(tokens.split(rows), targets.split(rows), strict=True))
    passes = [reference_forward(model, params, piece, offset_LS) for piece, _ in pieces]
    loads = [torch.stack([r.load_S for r in routed]) for _, routed in passes]
    whole_LS, loss = sum(loads) / len(loads), 0
    probs = [torch.stack([r.prob_S for r in routed]) for _, routed in passes]
    prob_LS = sum(probs) / len(probs) if batch == "global" else None
    for (logits, routed), own_LS, (_, wanted) in zip(passes, loads, pieces, strict=True):
        load_LS = {"global": whole_LS, "micro": own_LS, "lagged": last_LS}[batch]
        part = reference.total_loss(
            c, logits, routed, wanted, opened(model.edges_LS, offset_LS), progress, load_LS, prob_LS
        )
        loss = loss + part / len(passes)
    return loss, whole_LS


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"balance": "layer", "balance_ramp": 0.8},
        {"balance": "none", "router": "gru"},
        {"balance": "bias", "bias_rate": 0.1},
        {"balance": "bias", "bias_rate": 0.1, "balance_scope": "pool_only", "micro_tokens": 8},
        {"ramp": "random", "ramp_end": 0.8},
        {"ramp": "distance", "ramp_end": 0.8, "router": "logit_residual", "horizon": 0.5},
        {"ramp": "bias", "ramp_end": 0.8, "edge_bias": 3.0, "balance": "layer"},
    ],
    ids=named,
)
def test_a_step_is_the_gradient_of_the_references_loss(changes):
    model = awake(tiny(**changes))
    c, edges_LS, params = model.config, model.edges_LS, twin(model)
    trainer, recorder = rehearsal(model)
    progress = 2 / (int(c.tokens * c.horizon) // c.batch_tokens)
    offset_LS = ts.ramp_offset(c, edges_LS, progress, 2)
    assert (offset_LS is not None) == (c.ramp != "none")
    loss, load_LS = step_loss(model, params, some_tokens(3), some_tokens(4), progress, offset_LS)
    before_S = model.balance_bias.clone() if c.balance == "bias" else None
    result = trainer.step(some_tokens(3), some_tokens(4), 2)
    assert_gradients(recorder.gradients, loss, params)
    assert_close(result.load_LS, load_LS, 1e-6)
    if before_S is not None:
        assert_close(model.balance_bias, reference.moved_bias(c, before_S, load_LS, edges_LS), 1e-5)
        assert not model.balance_bias.equal(before_S)


@pytest.mark.parametrize("scope", ["joint", "pool_only"])
@pytest.mark.parametrize("balance", BALANCES[:3], ids=named)
@pytest.mark.parametrize("batch", ["global", "micro", "lagged"])
def test_micro_batches_balance_the_load_they_are_told_to(batch, balance, scope):
    config = tiny(balance_batch=batch, balance_scope=scope, micro_tokens=8, **balance)
    model = awake(replace(config, balance_coeff=5.0))
    params, (trainer, recorder) = twin(model), rehearsal(model)
    last_LS = torch.zeros(model.edges_LS.shape)  # nothing was lagged yet: no balance loss
    for step in range(2):
        tokens, targets = some_tokens(step), some_tokens(step + 50)
        loss, load_LS = step_loss(model, params, tokens, targets, batch=batch, last_LS=last_LS)
        result = trainer.step(tokens, targets, step)
        assert_gradients(recorder.gradients, loss, params)
        assert_close(result.load_LS, load_LS, 1e-6)
        last_LS = load_LS


@pytest.mark.parametrize("router", ["linear", "gru"])
@pytest.mark.parametrize("balance", [*BALANCES[:3], BALANCES[3] | {"balance_scope": "pool_only"}], ids=named)
def test_global_balance_does_not_feel_the_micro_batch_and_micro_balance_does(balance, router):
    gradients = {}
    for batch, micro_tokens in (("global", 32), ("global", 8), ("micro", 8)):
        shape = {**MICRO, "micro_tokens": micro_tokens, "balance_batch": batch}
        trainer, recorder = rehearsal(awake(tiny(router=router, **balance, **shape)))
        trainer.step(some_tokens(3, rows=4), some_tokens(4, rows=4), 0)
        gradients[batch, micro_tokens] = recorder.gradients
    whole, pieces, apart = gradients.values()
    for name, wanted in whole.items():
        assert_close(pieces[name], wanted, 1e-5, name)
    gap = (apart["blocks.1.moe.router"] - whole["blocks.1.moe.router"]).abs().max()
    assert gap > 0.02 * whole["blocks.1.moe.router"].abs().max()


def test_micro_batches_train_to_the_same_weights():
    trained = {}
    for batch, micro_tokens in (("global", 32), ("global", 8), ("micro", 8)):
        shape = {**MICRO, "micro_tokens": micro_tokens, "balance_batch": batch}
        trainer = ts.Trainer(awake(tiny(**shape)))
        born = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        for step in range(3):
            trainer.step(some_tokens(step, rows=4), some_tokens(step + 50, rows=4), step)
        trained[batch, micro_tokens] = {n: v - born[n] for n, v in trainer.model.state_dict().items()}
    whole, pieces, apart = trained.values()
    for name, moved in whole.items():
        assert (pieces[name] - moved).norm() < 1e-3 * moved.norm(), name
    assert (apart["blocks.1.moe.router"] - whole["blocks.1.moe.router"]).norm() > 0.01


def test_the_scale_of_the_norm_router_where_it_can_be_worked_out():
    mean = (2 + 2**0.5) / (2 * math.pi)  # of the greater of cosine, sine and 0 around the circle
    assert ts.unit_norm_scale(2, 1) == pytest.approx(1 / mean, rel=0.02)


@pytest.mark.parametrize("num_visible, top_k", [(6, 1), (6, 2), (16, 4)])
def test_the_scale_of_the_norm_router_makes_the_top_scores_a_unit_vector(num_visible, top_k):
    z = torch.randn(20_000, num_visible, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    top = (z / z.norm(dim=1, keepdim=True)).relu().topk(top_k).values
    assert (ts.unit_norm_scale(num_visible, top_k) * top).norm(dim=1).mean() == pytest.approx(1, rel=0.02)
