"""Coordinate check: do activations of a MoUE move alike at every width, so that rates found small hold large?

    python bench/coordinates.py                        (Muon and AdamW, widths 64 to 512; minutes)
    python bench/coordinates.py router=gru optimizer=muon

The model of depth 2 trains some steps at each width, on the same batches, with the trainer's own groups and rates.
On a batch of its own the root mean square of what flows is taken along the way; its slope against width, on
logarithmic axes, is 0 where the scaling rules hold (Tensor Programs V, arXiv 2203.03466). Judged is what stands
after the last step: the first updates of small widths are in part noise that falls as width^-0.5. Exit code 1: some
slope is steeper than MAX_SLOPE. Means over seeds are geometric.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from torch import Tensor

import train_small as ts

WIDTHS = (64, 128, 256, 512)
STEPS = (0, 1, 5, 10)  # updates done when activations are looked at
MAX_SLOPE = 0.25
BATCH_TOKENS, SEQ_LEN = 1024, 64


def text_like(num_batches: int) -> Tensor:
    """(num_batches, B, T + 1) ids below 256: a Markov chain in which each id has 4 likely successors."""
    rng = np.random.default_rng(0)
    successors = rng.integers(0, 256, (256, 4))
    rows = num_batches * BATCH_TOKENS // SEQ_LEN
    ids = np.empty((rows, SEQ_LEN + 1), dtype=np.int64)
    ids[:, 0] = rng.integers(0, 256, rows)
    for place in range(SEQ_LEN):
        likely = successors[ids[:, place], rng.integers(0, 4, rows)]
        ids[:, place + 1] = np.where(rng.random(rows) < 0.9, likely, rng.integers(0, 256, rows))
    return torch.from_numpy(ids).view(num_batches, -1, SEQ_LEN + 1)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@torch.no_grad()
def look(model: ts.GPT, tokens_BT: Tensor) -> tuple[dict[str, float], Tensor]:
    """Root mean squares of what flows through the model on these tokens, by name, and the logits."""
    found, expert_outputs = {"embedding": rms(model.embed[tokens_BT])}, []

    def dispatch(*args) -> Tensor:
        expert_outputs.append(own_dispatch(*args))
        return expert_outputs[-1]

    own_dispatch, ts.MoE.dispatch = ts.MoE.dispatch, dispatch
    try:
        trace = model.trace(tokens_BT, watch=True)
    finally:
        ts.MoE.dispatch = own_dispatch
    for layer, routing in enumerate(trace.routings):
        found[f"stream after block {layer}"] = trace.residual_rms_L[layer].item()
        found[f"router logits {layer}"] = rms(routing.logits_NE)
        found[f"expert outputs {layer}"] = rms(expert_outputs[layer])
    return found, trace.logits_BTV


def run(base: ts.TrainConfig, width: int, seed: int) -> dict[tuple[str, int], float]:
    """Root mean squares by name and number of updates done; those that are zero (at birth) are left out."""
    size = {"model_dim": width, "head_dim": 32, "depth": 2, "seq_len": SEQ_LEN, "batch_tokens": BATCH_TOKENS}
    rates = {"tokens": 1000 * BATCH_TOKENS, "warmup": 0.0, "warmdown": 0.0}
    config = ts.resolve(replace(base, seed=seed, **size, **rates))
    trainer = ts.Trainer(ts.GPT(config))
    probe, *batches = text_like(1 + STEPS[-1])
    found, logits_at_birth = {}, None
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            values, logits = look(trainer.model, probe[:, :-1])
            logits_at_birth = logits if logits_at_birth is None else logits_at_birth
            values["logits' change"] = rms(logits - logits_at_birth)
            found |= {(name, step): value for name, value in values.items() if value > 0}
        if step < STEPS[-1]:
            trainer.step(batches[step][:, :-1], batches[step][:, 1:], step)
    return found


def check(base: ts.TrainConfig, num_seeds: int) -> bool:
    """Print the table of these settings; true when every slope is small."""
    runs = {width: [run(base, width, seed) for seed in range(num_seeds)] for width in WIDTHS}
    by_width = {
        width: {key: np.mean([np.log(r[key]) for r in rs]) for key in rs[0]} for width, rs in runs.items()
    }
    print(f"{'':22}{'step':>5}" + "".join(f"{f'D={width}':>10}" for width in WIDTHS) + f"{'slope':>9}")
    all_small = True
    for name, step in sorted(by_width[WIDTHS[0]], key=lambda key: key[0]):
        logs = [by_width[width][name, step] for width in WIDTHS]
        slope = np.polyfit(np.log(WIDTHS), logs, 1)[0]
        verdict = "" if step < STEPS[-1] else "O(1)" if abs(slope) <= MAX_SLOPE else "NOT O(1)"
        all_small &= verdict != "NOT O(1)"
        row = f"{name:22}{step:>5}" + "".join(f"{np.exp(x):10.3g}" for x in logs)
        print(f"{row}{slope:>+9.2f}  {verdict}".rstrip())
    return all_small


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of train_small.py")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        base = ts.read_config(None, None, args.settings)
        is_given = any(item.startswith("optimizer=") for item in args.settings)
        verdicts = []
        for optimizer in [base.optimizer] if is_given else ["muon", "adamw"]:
            print(f"\noptimizer={optimizer}")
            verdicts.append(check(replace(base, optimizer=optimizer), args.seeds))
    except ts.Mistake as error:
        parser.error(str(error))
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
