"""Three rules that an honest language model keeps, each tried from outside, through its logits alone.

A model that passes may still cheat (it could recognise a probe); one that fails has no score.
Shapes: B rows, T tokens, V logits. The two inputs a probe compares have one shape, so that an honest
model repeats its arithmetic exactly but for the order in which tokens reach their experts.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

NUM_PROBE_TOKENS = 2048
TOLERANCE_NATS = 1e-3

Logits = Callable[[np.ndarray], np.ndarray]
Result = TypeVar("Result")


def probe_causality(
    logits: Logits, tokens_BT: np.ndarray, vocab_size: int, rng: np.random.Generator
) -> str | None:
    """Later tokens must not move earlier logits: each row is changed after a place of its own."""
    num_rows, context = tokens_BT.shape
    num_kept_B = rng.integers(1, context + 1, size=num_rows)
    kept_BT = np.arange(context) < num_kept_B[:, None]
    other_BT = np.where(kept_BT, tokens_BT, _other_tokens(tokens_BT, vocab_size, rng))
    before, after = (
        [row_TV[:num_kept] for row_TV, num_kept in zip(logits(input_BT), num_kept_B, strict=True)]
        for input_BT in (tokens_BT, other_BT)
    )
    if _moved(before, after):
        return "causality: future tokens move past logits"
    return None


def probe_batch(
    logits: Logits, tokens_BT: np.ndarray, vocab_size: int, rng: np.random.Generator
) -> str | None:
    """A row's logits must not depend on its companions: every other row is changed, before and after."""
    other_BT = _other_tokens(tokens_BT, vocab_size, rng)
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
    logits: Logits, tokens_RT: np.ndarray, vocab_size: int, evaluate: Callable[[], Result]
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
        broken = broken or (
            probe(logits, first_BT, vocab_size, rng) and probe(logits, second_BT, vocab_size, rng)
        )
    return result, broken


def _other_tokens(tokens_BT: np.ndarray, vocab_size: int, rng: np.random.Generator) -> np.ndarray:
    shift_BT = rng.integers(1, vocab_size, size=tokens_BT.shape)
    return ((tokens_BT + shift_BT) % vocab_size).astype(tokens_BT.dtype)


def _moved(rows: Iterable[np.ndarray], others: Iterable[np.ndarray]) -> bool:
    # row by row: the comparison makes copies, and a large vocabulary makes large ones
    pairs = zip(rows, others, strict=True)
    return not all(np.allclose(row, other, rtol=0, atol=TOLERANCE_NATS) for row, other in pairs)
