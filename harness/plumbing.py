"""The one place where git processes start: no hooks, no system or personal configuration, no prompt.

Nothing that a proposer wrote may become an argument here: messages and file contents go in by stdin.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from harness.errors import UserError

Run = Callable[..., str]  # `git` below with its folder filled in

CONFIG = {
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    "core.fsync": "loose-object",  # a commit that the ledger names must outlive a power cut, as it does
    "gc.auto": "0",
    "maintenance.auto": "false",
    "i18n.commitEncoding": "utf-8",
    "safe.directory": "*",  # a mounted repository often belongs to another user id
}
ENVIRONMENT = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_LITERAL_PATHSPECS": "1",
    "GIT_CONFIG_COUNT": str(len(CONFIG)),
    **{f"GIT_CONFIG_KEY_{i}": key for i, key in enumerate(CONFIG)},
    **{f"GIT_CONFIG_VALUE_{i}": value for i, value in enumerate(CONFIG.values())},
}
IDENTITY = {
    f"GIT_{role}_{part}": value
    for role in ("AUTHOR", "COMMITTER")
    for part, value in (("NAME", "MoUE harness"), ("EMAIL", "harness@localhost"))
}
# A harness that was started from a git hook or alias inherits these; they would point git elsewhere.
INHERITED = ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY"]


class GitError(RuntimeError):
    """A git command failed; the message is what it said."""


def git_bytes(
    folder: Path, *args: str, stdin: bytes = b"", holding: tuple[int, ...] = (), **env: str | None
) -> bytes:
    """Output of one git command run in `folder`.

    `env` goes over ENVIRONMENT and IDENTITY; None leaves a variable as the user has it.
    `holding` are open files (locks) that the git process shares, so that it keeps them even if we are killed.
    Raises GitError when the command fails, UserError when there is no git.
    """
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    from git import Git, GitCommandNotFound

    for name in INHERITED:
        os.environ.pop(name, None)
    with tempfile.TemporaryFile() as source:
        source.write(stdin)
        source.seek(0)
        try:
            status, out, err = Git(folder).execute(
                ["git", *args],
                istream=source,
                env={k: v for k, v in {**IDENTITY, **ENVIRONMENT, **env}.items() if v is not None},
                with_extended_output=True,
                with_exceptions=False,
                stdout_as_string=False,
                strip_newline_in_stdout=False,
                pass_fds=holding,
            )
        except GitCommandNotFound:
            raise UserError("git: not found on PATH; install git") from None
    if status:
        raise GitError(f"git {args[0]} in {folder}: {err.strip() or f'exit {status}'}")
    return out


def git(
    folder: Path, *args: str, stdin: bytes = b"", holding: tuple[int, ...] = (), **env: str | None
) -> str:
    """`git_bytes` as text without its last newline; a path in it survives whatever its bytes are."""
    out = git_bytes(folder, *args, stdin=stdin, holding=holding, **env)
    return os.fsdecode(out).removesuffix("\n")


def commit_files(
    run: Run, parent: str | None, files: dict[str, bytes], message: str, **env: str | None
) -> str:
    """A new commit: the parent's tree with `files` (path -> content) laid over it. Returns its name.

    No ref, index or checkout is touched; a replaced file keeps its mode. `env` may hold dates and identity.
    """
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": f"{folder}/index"}
        run("read-tree", parent or "--empty", **index)
        entries = b""
        for path, content in files.items():
            mode = run("ls-files", "--stage", "-z", "--", path, **index)[:6] or "100644"
            blob = run("hash-object", "-w", "--stdin", stdin=content)
            entries += f"{mode} {blob}\t".encode() + os.fsencode(path) + b"\0"
        run("update-index", "--add", "--replace", "-z", "--index-info", stdin=entries, **index)
        tree = run("write-tree", **index)
    text = message.replace("\0", "").encode(errors="replace")
    return run("commit-tree", tree, *(["-p", parent] if parent else []), "-F", "-", stdin=text, **env)
