"""The ledger keeps every whole record, whoever wrote it and whenever he died, and refuses to guess.

pytest tests/test_ledger.py
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import tempfile
from datetime import datetime
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import UserError
from harness.ledger import EVENTS, VERSION, Event, Ledger, number, write_atomic

FORK = multiprocessing.get_context("fork")
plain = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
events = st.builds(
    lambda name, more: {**more, "event": name},
    st.sampled_from(sorted(EVENTS)),
    st.dictionaries(
        st.text().filter(lambda k: k not in ("v", "t", "event")), plain | st.lists(plain), max_size=4
    ),
)


def bare(event: Event) -> Event:
    return {k: v for k, v in event.items() if k not in ("v", "t")}


def read(path: Path) -> list[Event]:
    return [bare(e) for e in Ledger(path).poll()]


def note(n: int, **more: object) -> Event:
    return {"event": "rejected", "n": n, **more}


@settings(max_examples=40, deadline=None)
@given(blocks=st.lists(st.lists(events, max_size=4), max_size=6), polls=st.lists(st.booleans(), min_size=6))
def test_any_split_into_appends_and_polls_tells_the_same_story(
    blocks: list[list[Event]], polls: list[bool]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ledger.jsonl")
        writer, reader, seen = Ledger(path), Ledger(path), []
        for block, poll in zip(blocks, polls, strict=False):
            writer.append(*block)
            if poll:
                seen += [bare(e) for e in reader.poll()]
        seen += [bare(e) for e in reader.poll()]
        assert seen == [event for block in blocks for event in block] == read(path)
        assert list(reader.poll()) == []


def test_each_record_has_version_and_time(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(note(0), note(1))
    for event in ledger.poll():
        assert event["v"] == VERSION
        assert datetime.fromisoformat(event["t"]).utcoffset().total_seconds() == 0
        assert event["t"].endswith("Z")


def test_a_record_torn_at_any_byte_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).append(note(0), note(1, text="é\U0001f600\n"))
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        reader = Ledger(path)
        assert [e["n"] for e in reader.poll()] == [0], end
        Ledger(path).append(note(2))
        assert [e["n"] for e in reader.poll()] == [2], end  # the same reader goes on
        assert [e["n"] for e in read(path)] == [0, 2], end


def test_a_fragment_longer_than_a_block_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).append(note(0))
    for size in (4095, 4096, 4097, 10_000):
        with path.open("ab") as file:
            file.write(b"x" * size)
        Ledger(path).append(note(size))
    assert [e["n"] for e in read(path)] == [0, 4095, 4096, 4097, 10_000]


def test_a_file_of_nothing_but_a_fragment_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"v": 1')
    assert read(path) == []
    Ledger(path).append(note(1))
    assert [e["n"] for e in read(path)] == [1]


def test_no_file_yet_is_no_event(tmp_path: Path) -> None:
    assert read(tmp_path / "ledger.jsonl") == []


@pytest.mark.parametrize(
    "line",
    [
        b'{"v": 1, "event": "reje\n',
        b"\n",
        b"\0\0\0\0\n",
        b"\xff\xfe\n",
        b"[]\n",
        b"3\n",
        b"null\n",
        b'{"event": "rejected"}\n',
        b'{"v": 1}\n',
        b'{"v": 1, "event": []}\n',
    ],
)
def test_a_torn_line_in_the_middle_is_refused_with_its_number(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append(note(0), note(1))
    with path.open("ab") as file:
        file.write(line)
    ledger.append(note(2))
    with pytest.raises(UserError, match=r"ledger\.jsonl:3: unreadable .*; restore") as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"v": 2}, {"v": 0}, {"v": "1"}, {"v": None}, {"event": "guessed"}, {"event": "Opened"}]
)
def test_a_record_of_another_version_is_refused(tmp_path: Path, change: Event) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).append(note(0))
    with path.open("a") as file:
        file.write(
            json.dumps({"v": VERSION, "t": "2026-01-01T00:00:00Z", "event": "rejected", **change}) + "\n"
        )
    with pytest.raises(UserError, match=r"ledger\.jsonl:2: .*use the version that wrote it"):
        read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("-inf")], {"deep": float("nan")}])
def test_what_is_not_a_number_is_not_written(tmp_path: Path, value: object) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append(note(0))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        ledger.append(note(1), note(2, value=value))
    assert path.read_bytes() == before


def test_an_unknown_event_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with pytest.raises(AssertionError):
        Ledger(path).append(note(0), {"event": "guessed"})
    assert not path.exists()


def _write_many(path: Path, writer: int) -> None:
    ledger = Ledger(path)
    for n in range(200):
        ledger.append(note(n, writer=writer, filler="x" * (n % 50) * 100))


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    writers = [FORK.Process(target=_write_many, args=(path, i)) for i in range(2)]
    for process in writers:
        process.start()
    reader, seen = Ledger(path), []
    while any(process.is_alive() for process in writers):
        seen += reader.poll()
    seen += reader.poll()
    assert [process.exitcode for process in writers] == [0, 0]
    for i in range(2):
        assert [e["n"] for e in seen if e["writer"] == i] == list(range(200))


def test_a_writer_waits_for_the_one_before_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path).append(note(0))
    process = FORK.Process(target=_write_many, args=(path, 1))
    with FileLock(path.with_suffix(".lock")):
        process.start()
        process.join(0.5)
        assert process.is_alive()
        assert len(read(path)) == 1
    process.join()
    assert len(read(path)) == 201


def _write_until_full(path: Path, limit_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    ledger = Ledger(path)
    try:
        for n in range(1000):
            ledger.append(note(n))
    except OSError:
        os._exit(9)
    os._exit(0)


@pytest.mark.parametrize("limit_bytes", [1000, 1001, 1017, 1040])
def test_a_full_disk_leaves_the_ledger_readable(tmp_path: Path, limit_bytes: int) -> None:
    path = tmp_path / "ledger.jsonl"
    process = FORK.Process(target=_write_until_full, args=(path, limit_bytes))
    process.start()
    process.join()
    assert process.exitcode == 9
    seen = [e["n"] for e in read(path)]
    assert len(seen) > 5 and seen == list(range(len(seen)))
    Ledger(path).append(note(len(seen)))  # there is room again
    assert [e["n"] for e in read(path)] == list(range(len(seen) + 1))


# ---- small things ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1", [1], {}])
def test_what_is_not_a_finite_number_is_missing(value: object) -> None:
    assert number(value) is None


def test_a_whole_file_is_there_or_the_old_one_is(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    write_atomic(path, "é")
    assert path.read_bytes() == "é".encode()
