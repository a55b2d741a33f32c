"""How fast train_small.py trains a MoUE, always as ratios to rivals measured in the same minutes.

    python bench/trainer.py [--device cpu|cuda]      (minutes: a table, and bench/results/trainer_<device>.json)
    python bench/trainer.py --quick                  (the first shape, three rounds, the table alone)

Rivals do equal active FLOPs a token: a dense model, a plain MoE, the MoUE with its experts looped over naively,
and Mixtral of `transformers` (where installed). All take turns, round after round, and a ratio is the median over
rounds, so that a busy machine slows both sides alike. CPU: process time of one thread. CUDA: events.
Utilisation: FLOPs of flops_per_token over those of one big matrix product that takes its turn in every round.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

import train_small as ts

ROOT = Path(ts.__file__).parent
CPU = {"depth": 4, "batch_tokens": 4096, "optimizer": "adamw", "device": "cpu", "vocab": "bpe"}
D128 = CPU | {"model_dim": 128, "expert_dim": 256, "seq_len": 128, "vocab_size": 512}
CUDA = {"head_dim": 64, "seq_len": 1024, "batch_tokens": 65536, "device": "cuda", "vocab": "bpe"}
SHAPES = {
    "cpu": {
        "d=128": D128,
        "d=256": CPU | {"model_dim": 256, "expert_dim": 512, "seq_len": 256, "vocab_size": 1024},
        "E=32": D128 | {"num_experts": 32, "batch_tokens": 2048},
    },
    "cuda": {
        "d12": CUDA | {"depth": 12, "micro_tokens": 32768},
        "d18": CUDA | {"depth": 18, "micro_tokens": 32768},
    },
}
GROWTH = {  # what is changed of the MoUE at the first shape
    "32 experts a layer for 8": {"num_local": 28},
    "pool of 16 for 8": {"num_universal": 16, "stride": 4},
    "window of 8 for 4": {"window": 8},
    "8 layers for 4": {"depth": 8},
}
TARGETS = {
    "MoUE speed / dense": {"d=128": 0.90, "d=256": 0.90, "d12": 0.65, "d18": 0.65},
    "MoUE speed / plain MoE": {"d=128": 0.97, "d=256": 0.97, "E=32": 0.97},
    "MoUE speed / naive loop": {"d=128": 1.3, "d=256": 1.3, "E=32": 1.3},
    "MoUE speed / transformers": {"d=128": 3.0, "d=256": 3.0, "E=32": 3.0},
    "utilisation, MoUE": {"d=128": 0.45, "d=256": 0.52},
    "MFU, dense": {"d12": 0.35, "d18": 0.35},
    "MFU, MoUE": {"d12": 0.25, "d18": 0.25},
    "host syncs a step": {"d12": 0, "d18": 0},
    "start, fresh process": {"": 4.0},
    "start, fork server": {"": 0.1},
}
AT_MOST = ("host syncs", "start")  # of these less is better
PEAK_FLOPS_PER_SECOND = 989.5e12  # of an H100 or H200 SXM in bf16, dense; MFU is meaningless on another chip


@dataclass(frozen=True)
class Figure:
    """A measured number: the median over rounds and its quartiles; `at` is the shape it was taken at."""

    name: str
    at: str
    value: float
    low: float
    high: float
    unit: str = ""

    @property
    def target(self) -> float | None:
        return TARGETS.get(self.name, {}).get(self.at)

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.name.startswith(AT_MOST) else self.value >= self.target


def figure(name: str, at: str, values: list[float], unit: str = "") -> Figure:
    ordered = sorted(values)
    return Figure(
        name, at, median(ordered), ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4], unit
    )


def moe(shape: dict[str, Any]) -> dict[str, Any]:
    return shape | {"num_local": shape.get("num_experts", 8), "topology": "none"}


def moue(shape: dict[str, Any]) -> dict[str, Any]:
    """As many experts in a layer's sight as in the MoE: half its own, half a window on a pool twice as wide."""
    num_experts = shape.get("num_experts", 8)
    pool = {"num_universal": num_experts, "window": num_experts // 2, "stride": num_experts // 4}
    return shape | pool | {"num_local": num_experts // 2}


# --- Rivals ----------------------------------------------------------------------------------------------


def naive_dispatch(moe: ts.MoE, y_ND: Tensor, gate_NK: Tensor, plan: ts.Plan, banks) -> Tensor:
    """The oracle: every expert in turn picks its tokens, and its weights out of the bank. Same signature and same
    result as MoE.dispatch."""
    choice_A = torch.empty_like(plan.order_A)
    choice_A[plan.order_A] = torch.searchsorted(
        plan.end_E, torch.arange(len(choice_A), device=y_ND.device).int(), right=True
    )
    choice_NK, out_ND = choice_A.view_as(gate_NK), torch.zeros_like(y_ND)
    for column, expert in enumerate(moe.visible):
        token, slot = torch.where(choice_NK == column)
        hidden = F.relu(y_ND[token] @ banks[0][expert]).square()
        out = (hidden @ banks[1][expert]) * gate_NK[token, slot, None].to(y_ND.dtype)
        out_ND = out_ND.index_add(0, token, out)
    return out_ND


def make_naive(model: ts.GPT) -> None:
    """Gives a model the naive loop, with banks that are single tensors, indexed in every layer."""

    def bank(model: ts.GPT, side: str, dtype: torch.dtype) -> Tensor:
        return torch.cat([getattr(model, f"{name}_{side}") for name in model.bank_names]).to(dtype)

    model.bank = types.MethodType(bank, model)
    for block in model.blocks:
        block.moe.dispatch = types.MethodType(naive_dispatch, block.moe)


@dataclass(frozen=True)
class Rival:
    """Something that takes turns: one step, and its FLOPs where they are known."""

    step: Callable[[], Any]
    flops: int | None = None


def some_batches(config: ts.TrainConfig, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets (B, T) of a few steps: ids as frequent as words are, so that routing is lively."""
    stream = torch.Generator().manual_seed(0)
    weight_V = 1 / torch.arange(3, config.vocab_size + 3)
    rows = config.batch_tokens // config.seq_len
    draws = torch.multinomial(weight_V, 4 * config.batch_tokens, True, generator=stream)
    return [(x.to(device), x.roll(-1, 1).to(device)) for x in draws.view(4, rows, config.seq_len)]


def our_rival(settings: dict[str, Any], naive: bool = False) -> Rival:
    """A trainer past its warmup, far from its warmdown."""
    config = ts.resolve(ts.TrainConfig(tokens=10**5 * settings["batch_tokens"], **settings))
    model = ts.GPT(config).to(config.device)
    if naive:
        make_naive(model)
    trainer, batches = ts.Trainer(model), some_batches(config, model.embed.device)
    turns = iter(range(10**4, 10**5))

    def step() -> None:
        turn = next(turns)
        trainer.step(*batches[turn % len(batches)], turn)

    return Rival(step, ts.flops_per_token(config) * config.batch_tokens)


def transformers_rival(settings: dict[str, Any]) -> Rival:
    """Mixtral as it comes, with the same layers, heads, experts and active FLOPs (its experts have three matrices
    for our two) and PyTorch's fused AdamW."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = ts.resolve(ts.TrainConfig(**moe(settings)))
    heads = config.model_dim // config.head_dim
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=config.vocab_size + 1,
            hidden_size=config.model_dim,
            intermediate_size=round(config.expert_dim * 2 / 3 / 16) * 16,
            num_hidden_layers=config.depth,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            num_local_experts=config.num_local,
            num_experts_per_tok=config.top_k,
            output_router_logits=True,  # so that it balances its experts, as ours does
            use_cache=False,
        )
    ).to(config.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batches = some_batches(config, model.device)

    def step() -> None:
        rows = config.micro_tokens // config.seq_len
        for inputs_BT in batches[0][0].split(rows):
            with torch.autocast("cuda", torch.bfloat16, enabled=config.device == "cuda"):
                loss = model(input_ids=inputs_BT, labels=inputs_BT).loss
            (loss * len(inputs_BT) / len(batches[0][0])).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Rival(step)


def product_rival(device: str) -> Rival:
    """The matrix product that stands for what the machine can do."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Rival(lambda: torch.mm(a, b, out=out), 2 * size**3)


def make_rivals(shape: dict[str, Any]) -> dict[str, Callable[[], Rival]]:
    """How to build each rival at a shape, by name."""
    dense = shape | {"ffn": "dense"}
    rivals = {
        "dense": lambda: our_rival(dense),
        "plain MoE": lambda: our_rival(moe(shape)),
        "MoUE": lambda: our_rival(moue(shape)),
        "naive loop": lambda: our_rival(moue(shape), naive=True),
    }
    if importlib.util.find_spec("transformers"):
        rivals["transformers"] = lambda: transformers_rival(shape)
    if shape["device"] == "cpu":  # there Muon, the default, is a large part of a step
        rivals["dense, Muon"] = lambda: our_rival(dense | {"optimizer": "muon"})
        rivals["MoUE, Muon"] = lambda: our_rival(moue(shape) | {"optimizer": "muon"})
    return rivals


PAIRS = {  # whose speed is divided by whose
    "dense": "MoUE",
    "plain MoE": "MoUE",
    "naive loop": "MoUE",
    "transformers": "MoUE",
    "dense, Muon": "MoUE, Muon",
}

# --- Measuring -------------------------------------------------------------------------------------------


def seconds_of(step: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        begun = time.process_time()
        step()
        return time.process_time() - begun
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def take_turns(rivals: dict[str, Rival], device: str, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of every rival's step in each round; who begins moves on from round to round."""
    for rival in [*rivals.values()] * 2:
        rival.step()
    names, seconds = list(rivals), {name: [] for name in rivals}
    for turn in range(num_rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            seconds[name].append(seconds_of(rivals[name].step, device))
    return seconds


def paired(left: list[float], right: list[float]) -> list[float]:
    return [a / b for a, b in zip(left, right, strict=True)]


def speeds(device: str, at: str, num_rounds: int) -> list[Figure]:
    """Every rival's tokens a second at one shape, ratios of the MoUE's to them, and utilisation."""
    shape = SHAPES[device][at]
    rivals = {name: make() for name, make in make_rivals(shape).items()}
    product = product_rival(device)
    seconds = take_turns(rivals | {"product": product}, device, num_rounds)
    figures = [
        figure(f"tokens/s, {name}", at, [shape["batch_tokens"] / s for s in seconds[name]]) for name in rivals
    ]
    for other, ours in PAIRS.items():
        if other in rivals:
            figures.append(figure(f"{ours} speed / {other}", at, paired(seconds[other], seconds[ours])))
    for name in ("dense", "plain MoE", "MoUE"):
        flops = rivals[name].flops
        shares = [flops / product.flops * x for x in paired(seconds["product"], seconds[name])]
        figures.append(figure(f"utilisation, {name}", at, shares))
        if device == "cuda":
            mfu = [flops / s / PEAK_FLOPS_PER_SECOND for s in seconds[name]]
            figures.append(figure(f"MFU, {name}", at, mfu))
    if device == "cuda":
        figures.append(figure("host syncs a step", at, [num_host_syncs(rivals["MoUE"])]))
    return figures


def growth(num_rounds: int) -> list[Figure]:
    """How a step's time grows beyond its FLOPs as the model grows, on CPU; 1 is ideal."""
    at, shape = next(iter(SHAPES["cpu"].items()))
    rivals = {name: our_rival(moue(shape) | change) for name, change in ({"": {}} | GROWTH).items()}
    seconds, base = take_turns(rivals, "cpu", num_rounds), rivals[""].flops
    figures = []
    for name in GROWTH:
        excess = [x * base / rivals[name].flops for x in paired(seconds[name], seconds[""])]
        figures.append(figure(f"time / FLOPs, {name}", at, excess))
    return figures


def num_host_syncs(rival: Rival) -> int:
    """How often the host waits for the device in one step."""
    rival.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rival.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def peak_mib(device: str, at: str, name: str) -> float:
    """Memory that training one rival takes at its peak, beyond that of an idle process; in this process."""
    before = resident_mib("VmRSS")
    rival = make_rivals(SHAPES[device][at])[name]()
    for _ in range(3):
        rival.step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_mib("VmHWM") - before


def resident_mib(key: str) -> float:
    """VmRSS, or its peak VmHWM, from Linux (getrusage would give the parent's peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 2**10


def memory(device: str, at: str) -> list[Figure]:
    """Each rival in a process of its own."""
    figures = []
    for name in ("dense", "plain MoE", "MoUE"):
        command = [sys.executable, __file__, "--device", device, "--peak", at, name]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures.append(figure(f"peak memory, {name}", at, [float(answer)], "MiB"))
    return figures


def starts(device: str, num_runs: int) -> list[Figure]:
    """Seconds from asking for a run to its end, the run being one step of a tiny model, checkpoint and all."""
    from harness.judge import corpus
    from harness.zygote import Child, Zygote, spawn_fresh

    folder, trainer = corpus.corpus_folder("embedded"), ROOT / "train_small.py"
    corpus.prepare("embedded", folder)
    tiny = [f"corpus={folder}", f"device={device}", "depth=1", "seq_len=64", "tokens=64", "batch_tokens=64"]
    figures = []
    with (
        tempfile.TemporaryDirectory() as out,
        open(os.devnull, "r+") as null,
        contextlib.closing(Zygote(trainer)) as zygote,
    ):
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), null.fileno())

        def life(spawn: Callable[..., Child]) -> float:
            begun = time.monotonic()
            child = spawn([*tiny, "--out", out], cwd=Path(out), memory_mib=None, **streams)
            code = child.wait(120.0)
            assert code == 0, f"the tiny run ended with {code}"
            return time.monotonic() - begun

        ways = {
            "fork server": zygote.spawn,
            "fresh process": lambda *args, **more: spawn_fresh(trainer, *args, **more),
        }
        for name, spawn in ways.items():
            figures.append(figure(f"start, {name}", "", [life(spawn) for _ in range(num_runs)], "s"))
    return figures


# --- Report ----------------------------------------------------------------------------------------------


def environment(device: str) -> dict[str, Any]:
    """What the numbers hang on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "train_small.py"], capture_output=True, text=True
    ).stdout
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit + ("+changes" if changed else ""),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def table(figures: list[Figure]) -> str:
    verdicts = {None: "", True: "met", False: "MISSED"}
    rows = [f"{'':42} {'at':6} {'median':>10} {'quartiles':>21}  target"]
    for f in figures:
        sign = "<=" if f.name.startswith(AT_MOST) else ">="
        wanted = "" if f.target is None else f"{sign} {f.target:g}  {verdicts[f.met]}"
        name = f"{f.name}{f', {f.unit}' if f.unit else ''}"
        row = f"{name:42} {f.at:6} {f.value:>10,.4g} {f.low:>10,.4g} {f.high:>10,.4g}  {wanted}"
        rows.append(row.rstrip())
    return "\n".join(rows)


def save(path: Path, device: str, figures: list[Figure]) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = [asdict(f) | {"target": f.target, "met": f.met} for f in figures]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"environment": environment(device), "figures": rows}, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the first shape, three rounds, nothing written")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--peak", nargs=2, metavar=("SHAPE", "RIVAL"), help="print that rival's peak memory in MiB"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if args.peak:
        print(peak_mib(args.device, *args.peak))
        return
    if not importlib.util.find_spec("transformers"):
        print(
            "transformers is not installed, so its rows are left out; pip install --group bench",
            file=sys.stderr,
        )
    num_rounds, shapes = (3, list(SHAPES[args.device])[:1]) if args.quick else (11, list(SHAPES[args.device]))
    figures = [f for at in shapes for f in speeds(args.device, at, num_rounds)]
    figures += growth(num_rounds) if args.device == "cpu" else []
    figures += [f for at in shapes for f in memory(args.device, at)] + starts(
        args.device, 3 if args.quick else 7
    )
    print(table(figures))
    if not args.quick:
        path = ROOT / "bench" / "results" / f"trainer_{args.device}.json"
        save(path, args.device, figures)
        print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
