"""BPE from the text to the score: lossless tokens, the same splits, bits per byte of the raw text.

pytest tests/test_bpe.py
"""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_judge import all_files, ask, serves

from harness import doctor
from harness.errors import UserError
from harness.judge import bpe, corpus, probes, score, sources
from harness.judge.client import JudgeProcess
from harness.judge.score import PADDING, JudgeError
from harness.night import Options, run_search
from harness.plan import make_plan
from harness.space import load_space
from harness.study import ensure_corpus

ROOT = Path(__file__).parents[1]
VOCAB = 512
CONTEXT = 32
EVERYTHING = 10**9  # bytes
SPLITS = ("train", *corpus.JUDGE_SPLITS)
Model = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="session")
def prose_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The openings of 120 real messages, a file each."""
    folder = tmp_path_factory.mktemp("openings")
    for number, text in enumerate(sorted(sources.read_documents("embedded"))[:120]):
        (folder / f"{number}.txt").write_bytes(text.decode()[:2500].encode())
    return folder


@pytest.fixture(scope="session")
def in_bytes(prose_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    corpus.prepare(str(prose_folder), folder)
    return folder


@pytest.fixture(scope="session")
def prepared(prose_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    corpus.prepare(str(prose_folder), folder, vocab_size=VOCAB)
    return folder


@pytest.fixture
def own_copy(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "own")


@pytest.fixture(scope="session")
def tokenizer(prepared: Path) -> bytes:
    return (prepared / "tokenizer.json").read_bytes()


def load(folder: Path, split: str) -> corpus.Corpus:
    return corpus.load_train(folder) if split == "train" else corpus.load_split(folder, split)


def documents(folder: Path, split: str) -> list[bytes]:
    """The texts of a split, by the table of tokens alone."""
    loaded = load(folder, split)
    path = folder / "tokenizer.json"
    table = bpe.token_bytes(path.read_bytes()) if path.exists() else [bytes([i]) for i in range(256)]
    return [
        b"".join(table[i] for i in loaded.tokens[begin:end])
        for begin, end in itertools.pairwise(loaded.offsets)
    ]


# ---- tokens ------------------------------------------------------------------------------------------

ATTACKS = {
    "empty": b"",
    "a blank": b" ",
    "every byte": bytes(range(256)),
    "every byte backwards": bytes(range(255, -1, -1)),
    "NULs": b"\0" * 999,
    "not UTF-8": b"caf\xe9 \xff\xfe\x80\xbf \xc3",
    "a surrogate": b"\xed\xa0\x80 and a character too long \xf0\x82\x82\xac",
    "emoji": "👩‍👩‍👧‍👦 👍🏽🇫🇷".encode(),
    "composed and decomposed": "é e\u0301 ﬃ İ ǅ ß".encode(),
    "blanks of Unicode": "\u0085\u00a0\u2003\u3000\ufeff x".encode() + b"\x85\xa0 \xa0",
    "white space": b" \t\r\n\r\n  \v\f x  \n",
    "one long word": b"a" * 300_000,
    "one long gap": b" \n" * 100_000,
    "no blanks at all": "日本語".encode() * 5000,
    "looks special": b"<|endoftext|><s></s>[UNK]\\u0000",
    "noise": np.random.default_rng(0).bytes(20_000),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_any_bytes_come_back(name: str, tokenizer: bytes) -> None:
    [ids] = bpe.encode(tokenizer, [ATTACKS[name]])
    table = bpe.token_bytes(tokenizer)
    assert ids.dtype == np.uint16
    assert b"".join(table[i] for i in ids) == ATTACKS[name]


@settings(max_examples=100, deadline=None)
@given(text=st.binary(max_size=200) | st.text(max_size=100).map(lambda t: t.encode(errors="surrogatepass")))
def test_any_bytes_come_back_by_chance_too(text: bytes, tokenizer: bytes) -> None:
    [ids] = bpe.encode(tokenizer, [text])
    table = bpe.token_bytes(tokenizer)
    assert b"".join(table[i] for i in ids) == text


def test_the_table_begins_with_the_bytes_and_names_each_token_once(tokenizer: bytes) -> None:
    table = bpe.token_bytes(tokenizer)
    assert table[:256] == [bytes([i]) for i in range(256)]
    assert len(table) == len(set(table)) == VOCAB
    assert max(map(len, table)) <= bpe.MAX_TOKEN_BYTES


def test_no_token_is_longer_than_allowed() -> None:
    table = bpe.token_bytes(bpe.train([b"-" * 4096 + b" word" * 9], 256 + 8))
    assert {b"-" * 16, b" word"} <= set(table)
    assert max(map(len, table)) <= bpe.MAX_TOKEN_BYTES


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    merged: list[int] = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new
        else:
            merged.append(i)
    return merged


def learn_slowly(texts: list[bytes], num_merges: int) -> list[tuple[int, int]]:
    """The textbook's algorithm: the most frequent pair, at a tie the one of lowest ids."""
    words = [list(piece) for text in texts for piece in pieces(text)]
    merges: list[tuple[int, int]] = []
    while len(merges) < num_merges:
        counts = Counter(pair for word in words for pair in itertools.pairwise(word))
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [merge(word, pair, 256 + len(merges)) for word in words]
        merges.append(pair)
    return merges


def pieces(text: bytes) -> list[bytes]:
    """In plain words: a run of letters, of up to three digits or of signs, each with one blank before it; of
    white space all but the blank that a word takes."""
    letters, signs = rb" ?[A-Za-z\x80-\xff]+", rb" ?[^A-Za-z\x80-\xff0-9\s]+"
    found = re.findall(rb"%b| ?\d{1,3}|%b|\s+(?!\S)|\s+" % (letters, signs), text)
    assert b"".join(found) == text
    return found


def test_training_and_encoding_equal_the_textbook(prose_folder: Path) -> None:
    texts = [path.read_bytes()[:700] for path in sorted(prose_folder.iterdir())[:20]]
    texts.append("L’éléphant, né en 1234567890, dort.\n".encode() * 200)
    tokenizer = bpe.train(texts, 256 + 80)
    merges = learn_slowly(texts, 80)
    table = [bytes([i]) for i in range(256)]
    for left, right in merges:
        table.append(table[left] + table[right])
    assert bpe.token_bytes(tokenizer) == table

    for text in [texts[0], *ATTACKS.values()]:
        [ids] = bpe.encode(tokenizer, [text[:3000]])
        expected: list[int] = []
        for piece in pieces(text[:3000]):
            word = list(piece)
            for new, pair in enumerate(merges, 256):
                word = merge(word, pair, new)
            expected += word
        assert ids.tolist() == expected


def test_a_text_too_small_for_the_vocabulary_is_refused(own_copy: Path, prose_folder: Path) -> None:
    before = all_files(own_copy)
    with pytest.raises(ValueError, match=r"--vocab 60000: the training text yields \d+ tokens only") as error:
        corpus.prepare(str(prose_folder), own_copy, vocab_size=60_000)
    assert "\n" not in str(error.value)
    assert all_files(own_copy) == before
    found = int(re.search(r"yields (\d+)", str(error.value)).group(1))
    assert corpus.prepare(str(prose_folder), own_copy, vocab_size=found).vocab_size == found


def test_without_the_package_the_remedy_is_named(
    prose_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        corpus.prepare(str(prose_folder), tmp_path / "out", vocab_size=VOCAB)
    assert not (tmp_path / "out").exists()


# ---- corpus ------------------------------------------------------------------------------------------


def test_the_same_documents_in_the_same_splits_as_bytes(prepared: Path, in_bytes: Path) -> None:
    plain, manifest = corpus.load_manifest(in_bytes), corpus.load_manifest(prepared)
    assert manifest.sha256 == plain.sha256
    for split in SPLITS:
        assert documents(prepared, split) == documents(in_bytes, split)
        assert getattr(manifest, split).num_bytes == getattr(plain, split).num_bytes
        assert getattr(manifest, split).num_documents == getattr(plain, split).num_documents
        assert len(load(prepared, split).tokens) < 0.7 * len(load(in_bytes, split).tokens)


def test_layout_on_disk(prepared: Path, tokenizer: bytes) -> None:
    files = {"manifest.json", "tokenizer.json", "train.bin"}
    assert set(all_files(prepared)) == files | {f"judge/{split}.bin" for split in corpus.JUDGE_SPLITS}
    manifest = json.loads((prepared / "manifest.json").read_bytes())
    assert (manifest["tokenizer"], manifest["vocab_size"], manifest["dtype"]) == ("bpe", VOCAB, "uint16")
    train = corpus.load_train(prepared)
    assert train.tokens.dtype == np.uint16 and train.tokens.max() < VOCAB
    assert (train.vocab_size, train.bos) == (VOCAB, VOCAB)
    assert train.token_num_bytes.tolist() == [len(token) for token in bpe.token_bytes(tokenizer)]
    assert train.token_num_bytes.dtype == np.int64
    assert manifest["train"]["offsets"][-1] == len(train.tokens)
    assert manifest["train"]["num_bytes"] == train.token_num_bytes[train.tokens].sum()


def test_the_tokenizer_learns_from_the_training_split_alone(
    prose_folder: Path, prepared: Path, tokenizer: bytes, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    strange = tmp_path / "strange"
    strange.mkdir()
    for number in range(60):
        words = [bytes(rng.choice(list(b"xqzj"), 6)) for _ in range(400)]
        (strange / f"{number}.txt").write_bytes(b" ".join(words))
    corpus.prepare(str(strange), tmp_path / "drawn")
    for split, learnt in (("val", False), ("audit", False), ("locked", False), ("train", True)):
        source = shutil.copytree(prose_folder, tmp_path / split)
        (source / "strange.txt").write_bytes(documents(tmp_path / "drawn", split)[0])
        corpus.prepare(str(source), tmp_path / "out", vocab_size=VOCAB)
        assert documents(tmp_path / "out", split) != documents(prepared, split)
        assert ((tmp_path / "out" / "tokenizer.json").read_bytes() != tokenizer) == learnt


def prepare_by_hand(source: Path, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness", "prepare", "--source", str(source), "--vocab", str(VOCAB)]
    env = {**os.environ, "MOUE_CACHE": str(cache), **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)


def test_preparing_twice_gives_identical_bytes(prose_folder: Path, prepared: Path, tmp_path: Path) -> None:
    for name, threads in (("1", "1"), ("2", "4")):
        told = prepare_by_hand(
            prose_folder, tmp_path / name, PYTHONHASHSEED=name, RAYON_NUM_THREADS=threads
        ).stdout
        folder = Path(told.split()[0])
        assert folder.is_relative_to(tmp_path / name) and folder.name.endswith(f"-bpe{VOCAB}")
        assert f"vocab_size = {VOCAB}" in told and 'vocab = "bpe"' in told
        assert all_files(folder) == all_files(prepared)


@pytest.mark.parametrize("vocab", ["256", "65536", "many"])
def test_a_vocabulary_that_cannot_be_is_the_users_mistake(vocab: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness", "prepare", "--vocab", vocab]
    env = {**os.environ, "MOUE_CACHE": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and vocab in done.stderr


def test_a_folder_for_each_vocabulary() -> None:
    folders = {corpus.corpus_folder(s, v) for s in ("embedded", "hf:a/b") for v in (256, 512, 8192)}
    assert len(folders) == 6
    assert corpus.corpus_folder("embedded", 256) == corpus.corpus_folder("embedded")
    assert corpus.corpus_folder("embedded", 8192).name == "embedded-bpe8192"


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "tokenizer.json").unlink(),
        lambda f: os.truncate(f / "tokenizer.json", 1000),
        lambda f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes() + b" "),
        lambda f: os.truncate(f / "train.bin", 1000),
        lambda f: (f / "train.bin").unlink(),
    ],
)
def test_damage_is_noticed_and_the_whole_command_named(own_copy: Path, damage: Callable) -> None:
    damage(own_copy)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        corpus.load_train(own_copy)
    assert re.search(rf"run `harness prepare --source \S+ --vocab {VOCAB}`$", str(error.value))


def test_a_study_says_which_corpus_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOUE_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"vocab_size = 300: not prepared; run `harness prepare --vocab 300`$"
    ):
        ensure_corpus("embedded", 300)
    with pytest.raises(UserError, match=r"run `harness prepare --source '/a b' --vocab 300`$"):
        ensure_corpus("/a b", 300)


def test_a_study_and_the_doctor_find_what_was_prepared(
    prose_folder: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOUE_CACHE", str(tmp_path))
    folder = corpus.corpus_folder(str(prose_folder), VOCAB)
    shutil.copytree(prepared, folder)
    assert ensure_corpus(str(prose_folder), VOCAB) == folder
    shutil.copytree(prepared, corpus.corpus_folder("embedded"))
    assert folder.name in doctor._corpus().line() and doctor._corpus().ok


# ---- bits per byte -----------------------------------------------------------------------------------


def uniform(tokens_BT: np.ndarray) -> np.ndarray:
    return np.zeros((*tokens_BT.shape, VOCAB + 1), dtype=np.float32)


def counting_model(tokens_BT: np.ndarray) -> np.ndarray:
    """Honest: the frequencies of the tokens seen so far in the row, and a padded head."""
    return np.log1p(np.cumsum(np.eye(VOCAB + 40, dtype=np.float32)[tokens_BT], axis=1))


def peeks_at_next(tokens_BT: np.ndarray) -> np.ndarray:
    logits = counting_model(tokens_BT)
    logits[:, :-1] += np.eye(VOCAB + 40, dtype=np.float32)[tokens_BT[:, 1:]]
    return logits


def remembers_earlier_rows(tokens_BT: np.ndarray) -> np.ndarray:
    logits = counting_model(tokens_BT)
    return logits + np.concatenate([0 * logits[:1], logits[:-1]])


def bigram_model() -> Model:
    table = np.random.default_rng(0).normal(size=(VOCAB + 1, VOCAB + 7)).astype(np.float32)
    return lambda tokens_BT: table[tokens_BT]


@pytest.mark.parametrize("split", corpus.JUDGE_SPLITS)
def test_a_uniform_guess_costs_what_arithmetic_says(prepared: Path, in_bytes: Path, split: str) -> None:
    judged = score.Judge(prepared, CONTEXT, EVERYTHING).score(uniform, split)
    num_tokens, num_bytes = len(load(prepared, split).tokens), len(load(in_bytes, split).tokens)
    assert judged.num_bytes == num_bytes
    assert judged.bits_per_byte == pytest.approx(math.log2(VOCAB + 1) * num_tokens / num_bytes, rel=1e-12)


def test_letter_frequencies_cost_the_same_in_tokens_and_in_bytes(
    prepared: Path, in_bytes: Path, tokenizer: bytes
) -> None:
    """A token as probable as its bytes together: only the normalisation over all tokens, Z, is new."""
    counts = 1.0 + np.bincount(load(in_bytes, "train").tokens, minlength=256)
    byte_logits = np.append(np.log(counts / counts.sum()), -1e9)  # BOS never comes
    tokens = [list(token) for token in bpe.token_bytes(tokenizer)]
    token_logits = np.append([byte_logits[token].sum() for token in tokens], -1e9)

    def judged(folder: Path, logits: np.ndarray) -> score.Score:
        model = lambda tokens_BT: np.broadcast_to(logits, (*tokens_BT.shape, len(logits)))  # noqa: E731
        return score.Judge(folder, CONTEXT, EVERYTHING).score(model, "val")

    in_tokens, plain = judged(prepared, token_logits), judged(in_bytes, byte_logits)
    log_z_nats = math.log(math.fsum(map(math.exp, token_logits)))
    num_tokens = len(load(prepared, "val").tokens)
    assert in_tokens.num_bytes == plain.num_bytes
    assert in_tokens.nats == pytest.approx(plain.nats + num_tokens * log_z_nats, rel=1e-12)


def test_bits_per_byte_equal_an_independent_computation(prepared: Path) -> None:
    judged = score.Judge(prepared, CONTEXT, EVERYTHING).score(bigram_model(), "audit")
    table = bigram_model()(np.arange(VOCAB + 1)).astype(float)[:, : VOCAB + 1].tolist()
    loaded, costs = load(prepared, "audit"), []
    for begin, end in itertools.pairwise(loaded.offsets):
        ids = loaded.tokens[begin:end].tolist()
        for position, token in enumerate(ids):
            row = table[VOCAB if position % CONTEXT == 0 else ids[position - 1]]
            costs.append(math.log2(math.fsum(map(math.exp, row))) - row[token] / math.log(2))
    num_bytes = sum(map(len, documents(prepared, "audit")))
    assert judged.bits_per_byte == pytest.approx(math.fsum(costs) / num_bytes, rel=1e-12)


def a_corpus(texts: list[list[int]], lengths: list[int]) -> corpus.Corpus:
    tokens = np.array(list(itertools.chain(*texts)), dtype=np.uint16)
    size = len(lengths)
    return corpus.Corpus(tokens, np.cumsum([0, *map(len, texts)]), size, size, np.array(lengths))


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=40), min_size=1, max_size=9),
    lengths=st.lists(st.integers(1, 32), min_size=10, max_size=10),
    context=st.integers(1, 12),
    spare_bytes=st.integers(0, 3000),
)
def test_no_more_bytes_are_scored_than_asked_for(
    texts: list[list[int]], lengths: list[int], context: int, spare_bytes: int
) -> None:
    eval_bytes = context * max(lengths) + spare_bytes  # what the judge insists on: one row always fits
    rows = score.cut_rows(a_corpus(texts, lengths), context, eval_bytes)
    scored = rows.targets[rows.targets != PADDING].tolist()
    assert rows.num_bytes == sum(lengths[token] for token in scored) <= eval_bytes
    cut = [text[i : i + context] for text in texts for i in range(0, len(text), context)]
    kept = [row[row != PADDING].tolist() for row in rows.targets]
    assert kept  # some, in order, none twice
    remaining = iter(cut)
    assert all(row in remaining for row in kept)
    if sum(lengths[token] for text in texts for token in text) <= eval_bytes:
        assert kept == cut


def test_a_smaller_evaluation_is_nearly_used_up_and_even() -> None:
    rng = np.random.default_rng(0)
    lengths = [1] * 256 + rng.integers(2, 12, 256).tolist()
    texts = [rng.integers(0, 512, 900 + i).tolist() for i in range(60)]
    everything = score.cut_rows(a_corpus(texts, lengths), CONTEXT, EVERYTHING)
    rows = score.cut_rows(a_corpus(texts, lengths), CONTEXT, 50_000)
    assert 0.9 * 50_000 < rows.num_bytes <= 50_000
    indices = [int(np.flatnonzero((everything.targets == row).all(axis=1))[0]) for row in rows.targets]
    gaps = np.diff([*indices, len(everything.targets)])
    assert gaps.max() - gaps.min() <= 1


def test_a_row_that_may_not_fit_is_refused_before_any_training(prepared: Path, tokenizer: bytes) -> None:
    row_bytes = CONTEXT * max(map(len, bpe.token_bytes(tokenizer)))
    assert 0 < score.Judge(prepared, CONTEXT, row_bytes).score(uniform, "val").num_bytes <= row_bytes
    with pytest.raises(
        ValueError, match=f"eval_bytes={row_bytes - 1} with context={CONTEXT}: a row may hold"
    ):
        score.judge_id(prepared, CONTEXT, row_bytes - 1)


def test_judge_id_names_the_tokenizer(own_copy: Path, prepared: Path, in_bytes: Path) -> None:
    path = own_copy / "tokenizer.json"
    before = path.read_bytes()
    path.write_bytes(before.replace(b'"version":"1.0"', b'"version":"1.1"'))
    with pytest.raises(ValueError, match="is not what was prepared"):
        score.judge_id(own_copy, CONTEXT, EVERYTHING)
    manifest = own_copy / "manifest.json"
    sha256 = {
        name: corpus._sha256([content]) for name, content in (("old", before), ("new", path.read_bytes()))
    }
    manifest.write_text(manifest.read_text().replace(sha256["old"], sha256["new"]))
    ids = {score.judge_id(folder, CONTEXT, EVERYTHING) for folder in (own_copy, prepared, in_bytes)}
    assert len(ids) == 3


@pytest.mark.parametrize(("vocab_size", "context"), [(256, 64), (8192, 64), (50_000, 64), (50_000, 1024)])
def test_a_large_vocabulary_makes_small_requests(
    vocab_size: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 64 MiB of logits at once, or a single row; and no request for a few tokens only."""
    rows = score.cut_rows(a_corpus([[1] * 20_000], [1] * vocab_size), context, EVERYTHING)
    asked: list[int] = []

    def model(tokens_BT: np.ndarray) -> np.ndarray:
        asked.append(tokens_BT.size)
        return np.broadcast_to(np.float32(0), (*tokens_BT.shape, vocab_size + 1))

    monkeypatch.setattr(score, "nats", lambda *_: 0.0)  # the arithmetic is not what is looked at
    score.score_rows(model, rows)
    limit = min(8192, 2**24 // (vocab_size + 1))
    assert max(asked) <= max(context, limit)
    assert max(asked) > limit - context


# ---- probes and the process --------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "rule"), [(peeks_at_next, "causality"), (remembers_earlier_rows, "batch")])
def test_a_cheat_has_no_score(prepared: Path, model: Model, rule: str) -> None:
    with pytest.raises(JudgeError, match=f"cheat: {rule}"):
        score.Judge(prepared, CONTEXT, 4000).score(model, "val", probes=True)


def test_probes_change_tokens_to_any_of_the_vocabulary_but_never_to_bos() -> None:
    tokens_RT = np.full((8, CONTEXT), VOCAB - 1, dtype=np.int32)
    asked: list[np.ndarray] = []
    probes.run_probes(lambda t: (asked.append(t), uniform(t))[1], tokens_RT, VOCAB, lambda: None)
    ids = np.unique(np.concatenate([tokens_BT.ravel() for tokens_BT in asked]))
    assert ids.max() < VOCAB and len(ids) > 0.95 * VOCAB


@pytest.fixture(scope="module")
def judge_process(prepared: Path) -> Iterator[JudgeProcess]:
    with contextlib.closing(JudgeProcess(prepared, CONTEXT, 4000)) as process:
        yield process


def test_the_process_gives_the_score_of_the_library(judge_process: JudgeProcess, prepared: Path) -> None:
    expected = score.Judge(prepared, CONTEXT, 4000).score(counting_model, "val")
    reply = ask(judge_process, serves(counting_model), probes=True)
    assert reply["ok"] and reply["bpb"] == expected.bits_per_byte and reply["bytes"] == expected.num_bytes
    assert reply["judge_id"] == judge_process.judge_id == score.judge_id(prepared, CONTEXT, 4000)


@pytest.mark.parametrize(
    ("num_logits", "ok"), [(257, False), (VOCAB, False), (VOCAB + 1, True), (1280, True), (1282, False)]
)
def test_the_process_takes_a_head_of_the_vocabulary_and_a_little_padding(
    judge_process: JudgeProcess, num_logits: int, ok: bool
) -> None:
    reply = ask(judge_process, serves(lambda t: np.zeros((*t.shape, num_logits))))
    assert reply["ok"] == ok
    assert ok or reply["kind"] == "crash"


def test_neither_trainer_nor_judge_loads_the_package(prepared: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from harness.judge import corpus, score; import numpy as np\n"
        "folder = Path(sys.argv[1]); corpus.load_train(folder)\n"
        f"model = lambda t: np.zeros((*t.shape, {VOCAB + 1}))\n"
        "score.Judge(folder, 32, 4000).score(model, 'val', probes=True)\n"
        "print({'tokenizers', 'huggingface_hub'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script, str(prepared)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# ---- studies -----------------------------------------------------------------------------------------


def test_plan_and_search_ask_for_the_corpus_of_that_vocabulary(workshop: Path) -> None:
    text = (workshop / "pairs.toml").read_text()
    (workshop / "pairs.toml").write_text(text.replace("context = 64", "context = 64\nvocab_size = 300"))
    for begin in (make_plan, lambda file: run_search(file, Options(dispatch="inline"))):
        with pytest.raises(UserError, match="not prepared; run `harness prepare --vocab 300`"):
            begin(workshop / "pairs.toml")


def test_a_model_of_another_vocabulary_is_refused_before_it_trains(workshop: Path) -> None:
    text = (workshop / "pairs.toml").read_text()
    (workshop / "pairs.toml").write_text(text.replace("context = 64", "context = 64\nvocab_size = 300"))
    space = load_space(workshop / "pairs.toml")
    refusal = space.broken({"vocab_size": 256, "depth": 1}, {}, {})
    assert refusal is not None and "vocab_size = 256 is not the corpus's 300" in refusal
    assert space.broken({"vocab_size": 300, "depth": 1}, {}, {}) is None
    assert space.broken({"depth": 1}, {}, {}) is None  # a trainer that takes what the corpus has
