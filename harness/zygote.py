"""A fork server: one process holds torch and the trainer loaded and forks a child per run.

A child starts in about 0.02 s where a fresh interpreter needs about 3 s. The server is started with a
scrubbed environment, holds no threads, and dies with its parent; its children die with it.

    python -m harness.zygote TRAINER CONTROL_FD
    python -m harness.zygote run TRAINER ARGUMENT...    (the same in an interpreter of its own)
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

PR_SET_PDEATHSIG = 1
OUT_OF_MEMORY = 5  # the trial contract's exit code
MAX_FILE_BYTES = 8 << 30  # a run that writes more is ended by the system
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH")
KEPT_PREFIXES = ("CUDA_", "NVIDIA_", "NCCL_", "MOUE_")


def clean_environment() -> dict[str, str]:
    """What a trainer may see of our environment: no key, no token; one thread a trial."""
    kept = {k: v for k, v in os.environ.items() if k in KEPT_VARIABLES or k.startswith(KEPT_PREFIXES)}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def confine(memory_mib: int | None) -> None:
    """Called in a child before the trainer's code: own session, dies with its parent, bounded."""
    os.setsid()
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    if memory_mib:  # private memory; address space would count what CUDA only reserves
        resource.setrlimit(resource.RLIMIT_DATA, (memory_mib << 20, memory_mib << 20))


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends, however it ends (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """A run in a session of its own; `kill` ends the whole group."""

    def __init__(self, pid: int, server: Zygote | None = None, process: subprocess.Popen | None = None):
        self.pid, self._server, self._process = pid, server, process

    def wait(self, timeout_seconds: float) -> int | None:
        """The return code (negative: the signal), or None when it still runs after the time."""
        if self._process:
            try:
                return self._process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                return None
        return self._server.wait(self.pid, timeout_seconds)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(5.0)


class Zygote:
    """Client side. One at a time: not thread-safe."""

    def __init__(self, trainer: Path):
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-m", "harness.zygote", str(trainer), str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, env=clean_environment(), pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        self._socket = ours
        self._codes: dict[int, int] = {}
        self._buffer = b""
        self.trainer = trainer
        ready = self._read(120.0)
        if ready is None or "error" in ready:
            self.close()
            detail = ready["error"] if ready else "it did not answer"
            raise RuntimeError(f"{trainer} cannot be loaded: {detail}")

    def spawn(
        self, argv: list[str], *, stdin: int, stdout: int, stderr: int, cwd: Path, memory_mib: int | None
    ):
        """Forks a child that runs the trainer's `main(argv)` with these file descriptors as 0, 1, 2."""
        request = {"argv": argv, "cwd": str(cwd), "memory_mib": memory_mib}
        socket.send_fds(self._socket, [json.dumps(request).encode() + b"\n"], [stdin, stdout, stderr])
        while True:
            message = self._read(30.0)
            if message is None:
                raise RuntimeError("the fork server is gone")
            if "pid" in message:
                return Child(message["pid"], server=self)

    def wait(self, pid: int, timeout_seconds: float) -> int | None:
        if pid not in self._codes:
            self._read(timeout_seconds)
        return self._codes.get(pid)

    def _read(self, timeout_seconds: float) -> dict[str, Any] | None:
        """The next message, exits noted on the way; None on a timeout. A dead server ends every child."""
        self._socket.settimeout(max(timeout_seconds, 1e-3))
        try:
            while b"\n" not in self._buffer:
                block = self._socket.recv(65536)
                if not block:
                    raise RuntimeError("the fork server is gone")
                self._buffer += block
        except TimeoutError:
            return None
        line, self._buffer = self._buffer.split(b"\n", 1)
        message = json.loads(line)
        if "exited" in message:
            self._codes[message["exited"]] = message["code"]
        return message

    def close(self) -> None:
        self._socket.close()
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def spawn_fresh(
    trainer: Path, argv: list[str], *, stdin: int, stdout: int, stderr: int, cwd: Path, memory_mib: int | None
) -> Child:
    """The same in a fresh interpreter: for a trainer whose code a proposer has changed."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "harness.zygote", "run", str(trainer), *argv],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=cwd,
        env=clean_environment(),
        preexec_fn=lambda: confine(memory_mib),
    )
    return Child(process.pid, process=process)


def load_trainer(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("trainer", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["trainer"] = module
    spec.loader.exec_module(module)
    return module


def run_main(module: ModuleType, argv: list[str]) -> int:
    """The trainer's `main(argv)` as an exit code; memory that ran out is told apart from a crash."""
    sys.argv = [str(module.__file__), *argv]
    try:
        return int(module.main(argv) or 0) & 0xFF
    except SystemExit as end:
        return end.code & 0xFF if isinstance(end.code, int) else int(end.code is not None)
    except MemoryError:
        traceback.print_exc()
        return OUT_OF_MEMORY
    except BaseException:
        traceback.print_exc()
        return 1


def _run_child(module: ModuleType, request: dict[str, Any], fds: list[int]) -> None:
    code = 1
    try:
        confine(request["memory_mib"])
        os.chdir(request["cwd"])
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
        os.closerange(3, 1024)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        code = run_main(module, request["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _serve(control: socket.socket, module: ModuleType) -> None:
    wake_read, wake_write = socket.socketpair()
    wake_read.setblocking(False)
    wake_write.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is wake_read:
                with contextlib.suppress(BlockingIOError):
                    wake_read.recv(4096)
                _report_exits(control)
                continue
            data, fds, _, _ = socket.recv_fds(control, 1 << 20, 3)
            if not data:
                return  # the parent is gone; the kernel ends our children with us
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _run_child(module, json.loads(data), fds)
            for fd in fds:
                os.close(fd)
            _send(control, {"pid": pid})


def _report_exits(control: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _send(control, {"exited": pid, "code": os.waitstatus_to_exitcode(status)})


def _send(control: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        control.sendall(json.dumps(message).encode() + b"\n")


def main(argv: list[str]) -> None:
    if argv[0] == "run":
        sys.exit(run_main(load_trainer(Path(argv[1])), argv[2:]))
    die_with_parent()
    control = socket.socket(fileno=int(argv[1]))
    try:
        module = load_trainer(Path(argv[0]))
        assert callable(module.main), "the trainer has no main(argv)"
    except BaseException as error:
        _send(control, {"error": f"{type(error).__name__}: {error}".splitlines()[0]})
        return
    _send(control, {"ready": True})
    _serve(control, module)


if __name__ == "__main__":
    main(sys.argv[1:])
