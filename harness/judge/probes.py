"""Three rules that an honest language model keeps, each tried from outside, through its logits alone.

A model that passes may still cheat (it could recognise a probe); one that fails has no score.
Shapes: B rows, T tokens, V logits. The two inputs a probe compares have one shape, so that an honest
model repeats its arithmetic exactly but for the order in which tokens reach their experts.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np

NUM_PROBE_TOKENS = 2048
TOLERANCE_NATS = 1e-3
NUM_BYTE_IDS = 256

Logits = Callable[[np.ndarray], np.ndarray]
Result = TypeVar("Result")


def probe_causality(logits: Logits, tokens_BT: np.ndarray, rng: np.random.Generator) -> str | None:
    """Later tokens must not move earlier logits: each row is changed after a place of its own."""
    num_rows, context = tokens_BT.shape
    last_kept_B1 = rng.integers(0, context, size=(num_rows, 1))
    kept_BT = np.arange(context) <= last_kept_B1
    other_BT = np.where(kept_BT, tokens_BT, _other_bytes(tokens_BT, rng))
    if _moved(logits(tokens_BT)[kept_BT], logits(other_BT)[kept_BT]):
        return "causality: future tokens move past logits"
    return None


def probe_batch(logits: Logits, tokens_BT: np.ndarray, rng: np.random.Generator) -> str | None:
    """A row's logits must not depend on its companions: every other row is changed, before and after."""
    other_BT = _other_bytes(tokens_BT, rng)
    other_BT[1::2] = tokens_BT[1::2]
    if _moved(logits(tokens_BT)[1::2], logits(other_BT)[1::2]):
        return "batch: a row's logits depend on its companions"
    return None


def probe_purity(logits: Logits, tokens_BT: np.ndarray, before_BTV: np.ndarray) -> str | None:
    """The same input must give the same output after an evaluation as before it."""
    if _moved(logits(tokens_BT), before_BTV):
        return "purity: the same input gives another output after the evaluation"
    return None


def run_probes(
    logits: Logits, tokens_RT: np.ndarray, evaluate: Callable[[], Result]
) -> tuple[Result, str | None]:
    """`evaluate()` with every probe around it: its result, and the first broken rule or None.

    Two experts that tie within rounding may swap when a batch is laid out otherwise, in an honest model
    too, about once in hundreds of probes: so a rule counts as broken when two sets of rows break it.
    """
    rng = np.random.default_rng(0)
    num_rows = max(2, NUM_PROBE_TOKENS // tokens_RT.shape[1])
    first_BT, second_BT = (tokens_RT[np.resize(rng.permutation(len(tokens_RT)), num_rows)] for _ in range(2))
    before_BTV = logits(first_BT)
    result = evaluate()
    broken = probe_purity(logits, first_BT, before_BTV)
    for probe in (probe_batch, probe_causality):  # in this order: a leak between rows is both
        broken = broken or (probe(logits, first_BT, rng) and probe(logits, second_BT, rng))
    return result, broken


def _other_bytes(tokens_BT: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    shift_BT = rng.integers(1, NUM_BYTE_IDS, size=tokens_BT.shape)
    return ((tokens_BT + shift_BT) % NUM_BYTE_IDS).astype(tokens_BT.dtype)


def _moved(logits: np.ndarray, others: np.ndarray) -> bool:
    return not np.allclose(logits, others, rtol=0, atol=TOLERANCE_NATS)
