"""The memory: an append-only, locked, fsynced file of JSON lines. All other state is rebuilt from it."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.errors import UserError

Event = dict[str, Any]
VERSION = 1
EVENTS = frozenset(
    {"opened", "proposed", "rejected", "started", "finished", "judged", "verdict", "promoted"}
    | {"reviewed", "spend", "stopped"}
)


class Ledger:
    """One study's `ledger.jsonl`. Several processes and threads may append; each reads at its own pace."""

    def __init__(self, path: Path):
        from filelock import FileLock

        self.path = path
        self._lock = FileLock(path.with_suffix(".lock"))
        self._thread_lock = threading.Lock()
        self._offset = 0
        self._line = 0

    def append(self, *events: Event) -> None:
        """Writes the events as one block and returns once they are on the disk.

        A fragment that a killed writer left at the end was never a record: it is cut off first.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        lines = []
        for event in events:
            assert event["event"] in EVENTS, event["event"]
            lines.append(json.dumps({"v": VERSION, "t": now, **event}, allow_nan=False) + "\n")
        with self._thread_lock, self._lock, self.path.open("ab+") as file:
            _cut_fragment(file)
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def poll(self) -> Iterator[Event]:
        """The events that were appended since the last poll, by anyone.

        Raises UserError when a line in the middle cannot be read; a torn last line is left for later.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                self._line += 1
                yield self._parse(raw)
                self._offset += len(raw)

    def _parse(self, raw: bytes) -> Event:
        try:
            event = json.loads(raw)
            known = event["v"] == VERSION and event["event"] in EVENTS
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{self.path}:{self._line}: unreadable record {raw[:60]!r}; restore the file from a copy"
            ) from None
        if not known:
            raise UserError(
                f"{self.path}:{self._line}: record v{event['v']} {event['event']!r} is not known to this "
                "version; use the version that wrote it"
            )
        return event


def _cut_fragment(file: Any) -> None:
    end = file.seek(0, os.SEEK_END)
    start = end
    while start > 0:
        step = min(4096, start)
        file.seek(start - step)
        newline = file.read(step).rfind(b"\n")
        if newline >= 0:
            start = start - step + newline + 1
            break
        start -= step
    if start != end:
        file.truncate(start)


def number(value: Any) -> float | None:
    """A finite float, or None: what is not a number is missing."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def write_atomic(path: Path, text: str) -> None:
    """Writes a whole file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
