"""A second trainer under the trial contract, numpy alone: byte pair counts, sharpened by `sharpness`.

It trains in milliseconds on the real corpus, so that whole searches can be tested; and it can misbehave in
every way that `behave` names. Its seed noise is real: each seed counts another sample of the text.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from pathlib import Path

import numpy as np

DEFAULTS = {
    "seed": 0,
    "depth": 1,
    "tokens": 20_000,
    "horizon": 1.0,
    "device": "cpu",
    "corpus": "",
    "sharpness": 0.7,  # 1 is the maximum-likelihood table
    "smoothing": 1.0,
    "label": 0,  # without any effect
    "behave": "well",
}
BEHAVIOURS = ("well", "crash", "garbage", "hang", "oom", "diverge", "collapse", "nan-logits", "orphan")
BEHAVIOURS += ("no-checkpoint", "bad-metrics", "wrong-shape", "peek")


def resolve(argv: list[str]) -> tuple[dict, dict]:
    config, flags = dict(DEFAULTS), {}
    items = list(argv)
    while items:
        item = items.pop(0)
        if item in ("--config", "--out", "--logits", "--from"):
            flags[item] = items.pop(0)
        elif item == "--describe":
            flags[item] = True
    given = json.loads(Path(flags["--config"]).read_text()) if "--config" in flags else {}
    for key, value in given.items():
        if key not in DEFAULTS:
            raise SystemExit(refuse(f"{key} = {value!r}: unknown setting; it has {', '.join(DEFAULTS)}"))
        config[key] = value
    if config["behave"] not in BEHAVIOURS:
        raise SystemExit(refuse(f"behave = {config['behave']!r}: choose from {BEHAVIOURS}"))
    return config, flags


def refuse(line: str) -> int:
    print(line, file=sys.stderr)
    return 2


def describe(config: dict) -> dict:
    return {
        "params_total": 257 * 257 * config["depth"],
        "params_active": 257,
        "params_unique_experts": 0,
        "flops_per_token": 257 * config["depth"],
        "virtual_width": [],
        "config": config,
    }


def count(config: dict) -> np.ndarray:
    """How often each byte follows each, in a sample of the text that is the seed's own."""
    text = np.fromfile(Path(config["corpus"]) / "train.bin", dtype=np.uint8)
    rng = np.random.default_rng(config["seed"])
    counts = np.zeros((257, 257))
    span, tokens = 1000, int(config["tokens"] * config["horizon"])
    for start in rng.integers(0, len(text) - span, size=max(1, tokens * config["depth"] // span)):
        piece = text[start : start + span].astype(np.int64)
        np.add.at(counts, (piece[:-1], piece[1:]), 1)
        counts[256, piece] += 1
    return counts


def table(config: dict, counts: np.ndarray) -> np.ndarray:
    counts = counts + config["smoothing"]
    return (config["sharpness"] * np.log(counts / counts.sum(1, keepdims=True))).astype(np.float32)


def train(config: dict, out: Path, source: Path | None) -> int:
    behave = config["behave"]
    if behave == "crash":
        raise ZeroDivisionError("planted")
    if behave == "garbage":
        sys.stdout.write("\x00\xff garbage " * 10_000)
        return 7
    if behave == "hang":
        time.sleep(3600)
    if behave == "orphan" and os.fork() == 0:
        time.sleep(3600)
    if behave == "oom":
        hoard = []
        while True:
            hoard.append(np.ones(1 << 22))
            time.sleep(0.01)
    if behave == "diverge":
        print("loss is nan at step 3", file=sys.stderr)
        return 3
    if behave == "collapse":
        return 4
    counts = count(config)
    if source:
        print(f"going on from {source}")
        counts += np.load(source)["counts"]
    logits = table(config, counts)
    line = {
        "step": 1,
        "tokens": int(config["tokens"] * config["horizon"]),
        "seconds": 0.01,
        "train_nats": float(-logits.mean()),
        "lr": 1.0,
    }
    text = json.dumps(line) + "\n"
    (out / "metrics.jsonl").write_text("{half a rec" if behave == "bad-metrics" else text)
    if behave != "no-checkpoint":
        with (out / "checkpoint.pt").open("wb") as file:
            np.savez(file, logits=logits, counts=counts, behave=behave)
    return 0


def serve(checkpoint: Path) -> int:
    saved = np.load(checkpoint)
    logits, behave = saved["logits"], str(saved["behave"])
    if behave == "nan-logits":
        logits[:] = np.nan
    read, write = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    while head := read.read(8):
        b, t = struct.unpack("<II", head)
        tokens_BT = np.frombuffer(read.read(4 * b * t), dtype="<i4").reshape(b, t)
        answer_BTV = logits[tokens_BT]
        if behave == "peek":  # each position is told the next token
            answer_BTV = answer_BTV.copy()
            np.put_along_axis(answer_BTV[:, :-1], tokens_BT[:, 1:, None].astype(np.int64), 20.0, axis=2)
        if behave == "wrong-shape":
            answer_BTV = answer_BTV[:, :-1]
        write.write(struct.pack("<III", *answer_BTV.shape) + answer_BTV.tobytes())
        write.flush()
    return 0


def main(argv: list[str]) -> int:
    config, flags = resolve(argv)
    if "--logits" in flags:
        return serve(Path(flags["--logits"]))
    if "--describe" in flags:
        print(json.dumps(describe(config)))
        return 0
    return train(config, Path(flags["--out"]), Path(flags["--from"]) if "--from" in flags else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
