"""The judge as a process of its own: scores any number of candidates, one after the other.

    python -m harness.judge --self-test

Control socket: one JSON line in, {"split", "probes", "timeout_seconds"}, sent together with one
descriptor, the logits channel to the candidate; one JSON line out, a score or a kind of failure.
The first line out is {"ready": true, "judge_id"}, or {"ready": false, "detail"} and exit 2. The process
ends when the control socket closes or its parent is gone.
"""

import argparse
import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from harness.judge.score import ChannelModel, Judge, JudgeError, self_test

PARENT_CHECK_SECONDS = 2.0


def answer(judge: Judge, channel_fd: int, request: dict[str, Any]) -> dict[str, Any]:
    """Score the candidate behind `channel_fd`, which is closed afterwards; a failure is an answer too."""
    started = time.monotonic()
    try:
        with socket.socket(fileno=channel_fd) as channel:
            model = ChannelModel(channel, judge.vocab_size, request["timeout_seconds"])
            score = judge.score(model, request["split"], probes=request["probes"])
    except JudgeError as error:
        return {"ok": False, "kind": error.kind, "detail": error.detail, "judge_id": judge.judge_id}
    return {
        "ok": True,
        "split": request["split"],
        "bpb": score.bits_per_byte,
        "nats": score.nats,
        "bytes": score.num_bytes,
        "seconds": time.monotonic() - started,
        "judge_id": judge.judge_id,
    }


def serve(judge: Judge, control: socket.socket) -> None:
    """Answer requests until nobody can ask any more."""
    parent = os.getppid()
    control.settimeout(PARENT_CHECK_SECONDS)
    while True:
        try:
            line, descriptors, _, _ = socket.recv_fds(control, 4096, 1)
        except TimeoutError:
            if os.getppid() != parent:  # a forked relative may hold the socket open after its death
                return
            continue
        if not line:
            return
        _send(control, answer(judge, descriptors[0], json.loads(line)))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.judge", description=__doc__.splitlines()[0])
    parser.add_argument("--self-test", action="store_true", help="check golden values and say ok")
    parser.add_argument("--folder", type=Path, help="the prepared corpus")
    parser.add_argument("--context", type=int, help="tokens in a row")
    parser.add_argument("--eval-bytes", type=int, help="bytes scored in a split, at most")
    parser.add_argument("--control-fd", type=int, help="an inherited Unix stream socket")
    args = parser.parse_args(argv)
    self_test()
    if args.self_test:
        print("ok")
        return 0
    if None in (args.folder, args.context, args.eval_bytes, args.control_fd):
        parser.error("--folder, --context, --eval-bytes and --control-fd are needed together")
    with socket.socket(fileno=args.control_fd) as control, contextlib.suppress(ConnectionError):
        try:
            judge = Judge(args.folder, args.context, args.eval_bytes)
        except (ValueError, OSError) as error:
            _send(control, {"ready": False, "detail": str(error)})
            return 2
        _send(control, {"ready": True, "judge_id": judge.judge_id})
        serve(judge, control)
    return 0


def _send(control: socket.socket, reply: dict[str, Any]) -> None:
    control.sendall(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
