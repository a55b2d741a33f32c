"""The trainer on CUDA: the same model in bf16, no waiting for the device, compiled attention.

pytest tests/test_gpu.py      (skipped where there is no GPU)
"""

from __future__ import annotations

import pytest
import torch
from test_train_small import awake, corpus, metrics, one_thread, run, some_tokens, tiny

import train_small as ts

__all__ = ["corpus", "one_thread"]  # fixtures
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [
    {},
    {"ffn": "dense"},
    {"top_k": 1, "num_shared": 1},
    {"router": "gru"},
    {"router": "norm", "num_local": 0, "topology": "full"},
    {"gate": "sigmoid", "split_top_k": 1, "depth_embedding": True, "layer_gate": True},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_logits_in_bf16_are_near_those_in_fp32(changes):
    model, tokens = awake(tiny(model_dim=64, **changes)), some_tokens(4)
    with torch.inference_mode():
        wanted = model(tokens)
        logits = model.cuda()(tokens.cuda()).cpu()
    # a token near a routing tie may go elsewhere in bf16, so the bulk is compared
    close = (logits - wanted).abs() < 0.05 * wanted.abs().max()
    assert close.float().mean() > 0.97


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_a_step_never_waits_for_the_device(changes, corpus):
    config = ts.resolve(tiny(tokens=12800, corpus=str(corpus), ramp="random", **changes))
    trainer, rows = ts.Trainer(ts.GPT(config).cuda()), ts.load_rows(config)
    batches = [tuple(ts.to_device(x, trainer.device) for x in rows.batch(step)) for step in range(4)]
    trainer.step(*batches[0], 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            trainer.step(*batches[step], step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_learns(compiled, corpus, tmp_path):
    settings = {
        "device": "cuda",
        "tokens": 100_000,
        "batch_tokens": 512,
        "log_every": 20,
        "compile": compiled,
    }
    assert run(corpus, tmp_path, **settings) == 0
    lines = metrics(tmp_path)
    assert lines[-1]["train_nats"] < lines[0]["train_nats"] - 1
