"""A local server that speaks the Messages API over real sockets, for tests and for a night without a key.

    python tests/messages_server.py --port 0 --script search --bad-every 7
    ANTHROPIC_BASE_URL=http://127.0.0.1:PORT harness search search_spaces/smoke.toml --proposers agent=1

Answers are queued and given out in order; when the queue is empty the default answers. An answer is a
`Answer` or a function of the request body that returns one.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Answer:
    body: Any = None  # bytes are sent as they are, anything else as JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    send_bytes: int | None = None  # close the connection after so many bytes of the body
    drop: bool = False  # close the connection without a byte


Script = Answer | Callable[[dict[str, Any]], Answer]


@dataclass(frozen=True)
class Request:
    path: str
    headers: dict[str, str]  # lower-case names
    body: dict[str, Any]


def message(text: str | None, stop_reason: str | None = "end_turn", **usage: int) -> Answer:
    """A whole Message with one text block, or with no content when `text` is None."""
    counts = {
        "input_tokens": 1000,
        "output_tokens": 100,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }
    return Answer(
        {
            "id": "msg_01",
            "type": "message",
            "role": "assistant",
            "model": "local",
            "content": [] if text is None else [{"type": "text", "text": text}],
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": {**counts, **usage},
        }
    )


def proposal(changes: dict[str, Any], **fields: Any) -> Answer:
    """A reply of the proposer's form; `fields` replace or add top-level fields."""
    reply = {
        "changes": [{"key": key, "value": value} for key, value in changes.items()],
        "hypothesis": "a smaller step keeps the router stable",
        "family": "learning-rate",
        "expected_effect": 0.004,
        "expected_slope": None,
        "parent": None,
    }
    return message(json.dumps({**reply, **fields}))


def error(
    status: int, kind: str = "api_error", text: str = "scripted", code: str = "", **headers: str
) -> Answer:
    """An API error; header names are given with underscores for dashes."""
    details = {"details": {"error_code": code}} if code else {}
    body = {"type": "error", "error": {"type": kind, "message": text, **details}}
    return Answer(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


class MessagesServer(ThreadingHTTPServer):
    """Context manager: serves on 127.0.0.1 from a thread until the block ends."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, answers: Iterable[Script] = (), default: Script | None = None, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.answers = deque(answers)
        self.default = default or error(500, text="no answer left in the script")
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_answer(self, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            if any(name in request.body for name in SAMPLING):
                return error(400, "invalid_request_error", "sampling parameters are not supported")
            if not {"authorization", "x-api-key"} & request.headers.keys():
                return error(401, "authentication_error", "no key")
            script = self.answers.popleft() if self.answers else self.default
        return script(request.body) if callable(script) else script

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up early is part of the tests."""

    def __enter__(self) -> MessagesServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: MessagesServer

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.split("?")[0] != "/v1/messages":
            return self._send(error(404, "not_found_error", self.path))
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = self.server.next_answer(Request(self.path, headers, json.loads(raw)))
        if answer.delay_seconds and self.server.closing.wait(answer.delay_seconds):
            answer = replace(answer, drop=True)
        self._send(answer)

    def do_GET(self) -> None:
        if not self.path.startswith("/v1/models/"):
            return self._send(error(404, "not_found_error", self.path))
        name = self.path.removeprefix("/v1/models/").split("?")[0]
        body = {
            "id": name,
            "type": "model",
            "display_name": name,
            "created_at": "2026-01-01T00:00:00Z",
            "lifecycle": "active",
        }
        self._send(Answer(body))

    def _send(self, answer: Answer) -> None:
        if answer.drop:
            return self._hang_up()
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        headers = {"content-type": "application/json", "request-id": "req_local", **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: answer.send_bytes])
        if answer.send_bytes is not None:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Quiet: the requests are recorded."""


class Search:
    """Plausible proposals, drawn from the parameter lines of the request; every `bad_every`-th is faulty."""

    def __init__(self, seed: int = 0, bad_every: int = 0):
        self.rng = random.Random(seed)
        self.bad_every = bad_every
        self.num_replies = 0

    def __call__(self, body: dict[str, Any]) -> Answer:
        self.num_replies += 1
        params = parameters(body)
        chosen = self.rng.sample(params, k=min(len(params), self.rng.choice([1, 1, 2, 3])))
        changes = {p["key"]: self._value(p) for p in chosen}
        if self.bad_every and self.num_replies % self.bad_every == 0:
            return self._bad(changes)
        family = "-".join(sorted(changes))[:60]
        return proposal(changes, family=family, hypothesis=f"{', '.join(changes)}: try another value")

    def _value(self, param: dict[str, Any]) -> Any:
        if param["kind"] == "categorical":
            return self.rng.choice(param["choices"])
        low, high, step = param["low"], param["high"], param.get("step")
        if step:
            value = low + step * self.rng.randint(0, int((high - low) / step + 1e-9))
        elif param.get("log"):
            value = min(high, max(low, low * (high / low) ** self.rng.random()))
        else:
            value = self.rng.uniform(low, high)
        return round(value) if param["kind"] == "int" else value

    def _bad(self, changes: dict[str, Any]) -> Answer:
        faults = [
            message("Here is my idea: raise the rate."),
            message('{"changes": [{"key": "matrix_lr", "val', stop_reason="max_tokens"),
            message(None, stop_reason="refusal"),
            message(None),
            proposal(dict.fromkeys(changes, 1e30)),
            proposal({"no_such_setting": 1}),
            error(529, "overloaded_error"),
            error(429, "rate_limit_error", retry_after="1"),
            Answer(drop=True),
        ]
        return faults[self.num_replies // self.bad_every % len(faults)]


def parameters(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters that a request offers: the JSON lines with a `key` and a `kind` in its system text."""
    lines = "\n".join(block["text"] for block in body["system"]).splitlines()
    found = [json.loads(line) for line in lines if line.startswith('{"key":')]
    assert found, "the request names no parameters"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--script", choices=["search"], default="search")
    parser.add_argument("--bad-every", type=int, default=0, help="every N-th answer is faulty; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with MessagesServer(default=Search(args.seed, args.bad_every), port=args.port) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
