"""Byte-level BPE: learnt and applied when a corpus is prepared; afterwards only its table is read.

    harness prepare --vocab 8192

A text is seen as the Latin-1 characters of its bytes. So any bytes have tokens, UTF-8 or not, and come
back from them unchanged; the ids 0 .. 255 are the bytes themselves. `tokenizer.json` is the file format of
the `tokenizers` package, which is imported only to train and to encode.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

MIN_COUNT = 2  # of a pair that becomes a token
MAX_TOKEN_BYTES = 32  # so that the bytes in a row of the judge are bounded
SPACE = "\t\n\v\f\r "
LETTER = "A-Za-z\x80-\xff"  # bytes above ASCII go with the letters, so that no cut falls inside a character
# No token crosses these: words, numbers of three digits, signs, each with the blank before it; white space.
PIECE = f" ?[{LETTER}]+| ?[0-9]{{1,3}}| ?[^{SPACE}0-9{LETTER}]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+"


def train(documents: Sequence[bytes], vocab_size: int) -> bytes:
    """`tokenizer.json` with exactly `vocab_size` tokens, the same each time for the same documents.

    Pairs are merged most frequent first (Sennrich et al. 2016, arXiv 1508.07909).
    Raises ValueError where the package is missing or the text too small for so many tokens.
    """
    tokenizers = _package()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECE), "isolated")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_COUNT,
        max_token_length=MAX_TOKEN_BYTES,
        initial_alphabet=[chr(byte) for byte in range(256)],
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode("latin-1") for text in documents), trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise ValueError(
            f"--vocab {vocab_size}: the training text yields {found} tokens only: ask for {found} or add text"
        )
    return tokenizer.to_str().encode()


def encode(tokenizer_json: bytes, documents: Sequence[bytes]) -> list[np.ndarray]:
    """Each document's token ids, (num_tokens,) uint16. Raises ValueError where the package is missing."""
    tokenizer = _package().Tokenizer.from_buffer(tokenizer_json)
    table = token_bytes(tokenizer_json)
    encoded = []
    for text in documents:
        ids = tokenizer.encode(text.decode("latin-1"), add_special_tokens=False).ids
        assert b"".join(map(table.__getitem__, ids)) == text
        encoded.append(np.array(ids, dtype=np.uint16))
    return encoded


def token_bytes(tokenizer_json: bytes) -> list[bytes]:
    """What each id stands for: a text is `b"".join(table[id] for id in ids)`. Needs no package."""
    ids: dict[str, int] = json.loads(tokenizer_json)["model"]["vocab"]
    return [token.encode("latin-1") for token in sorted(ids, key=ids.__getitem__)]


def _package() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError("--vocab: needs the package tokenizers: pip install tokenizers") from None
    return tokenizers
