"""The command line: verbs only. `harness --help`."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from harness import __version__
from harness.errors import ClusterLost, EndedEarly, UserError, WorkFailed
from harness.guard import restart

EARLY = ("budget-hours", "budget-trials", "budget-gpu-hours", "signal")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


class Amount(click.FloatRange):
    """A finite number within the range."""

    def convert(self, value: Any, *place: Any) -> float:
        amount = super().convert(value, *place)
        if not math.isfinite(amount):
            self.fail(f"{value!r} is not a finite number.", *place)
        return amount


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="harness")
def cli() -> None:
    """An autoresearch harness for MoUE-style language models."""


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check this machine; say what is missing and how to mend it."""
    from harness.doctor import check_all

    checks = check_all()
    if as_json:
        click.echo(json.dumps([c.as_dict() for c in checks], indent=1))
    else:
        for check in checks:
            click.echo(check.line())
    if not all(c.ok for c in checks):
        sys.exit(1)


@cli.command()
@click.option("--source", default="embedded", show_default=True, help="embedded, a PATH, or hf:DATASET.")
@click.option("--vocab", type=click.IntRange(257, 65_535), help="Tokens of a BPE; without it bytes.")
@json_option
def prepare(source: str, vocab: int | None, as_json: bool) -> None:
    """Build the corpus cache and its splits, whole documents held out."""
    from harness.judge import corpus

    vocab_size = vocab or corpus.BYTE_VOCAB
    folder = corpus.corpus_folder(source, vocab_size)
    try:
        manifest = corpus.prepare(source, folder, vocab_size=vocab_size)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from None
    splits = {name: getattr(manifest, name) for name in ("train", *corpus.JUDGE_SPLITS)}
    sizes = {
        name: {"documents": s.num_documents, "bytes": s.num_bytes, "tokens": s.offsets[-1]}
        for name, s in splits.items()
    }
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "sha256": manifest.sha256, "splits": sizes}))
        return
    click.echo(f"{folder}  sha256 {manifest.sha256[:16]}")
    for name, size in sizes.items():
        tokens = f" {size['tokens']:>14,} tokens" if vocab else ""
        click.echo(f"  {name:7s}{size['documents']:>8,} documents {size['bytes']:>14,} bytes{tokens}")
    words = f", vocab_size = {vocab}" if vocab else ""
    also = f'; under [baseline] vocab = "bpe"{words}' if vocab else ""
    click.echo(f'Use it with corpus = "{source}"{words} under [metric]{also}.')


@cli.command()
@click.argument("space", type=click.Path(path_type=Path))
@json_option
def plan(space: Path, as_json: bool) -> None:
    """Print rungs, trials, FLOPs, seconds and ceilings; spend nothing but a calibration."""
    from harness.plan import make_plan

    made = make_plan(space)
    click.echo(json.dumps(made.as_dict(), indent=1) if as_json else made.text())


@cli.command()
@click.argument("space", type=click.Path(path_type=Path))
@click.option("--study", help="Name of the study; the space's own name without it.")
@click.option("--hours", type=Amount(min=0, min_open=True))
@click.option("--trials", type=click.IntRange(min=1), help="Trainings, at most.")
@click.option("--usd", type=Amount(min=0), help="Ceiling for API calls.")
@click.option("--gpu-hours", type=Amount(min=0, min_open=True))
@click.option("--proposers", help="Shares, as in optuna=0.6,agent=0.3,random=0.1.")
@click.option("--resume", is_flag=True, help="Go on with a study that was ended or killed.")
@click.option("--dispatch", type=click.Choice(["ray", "inline"]), default="ray", show_default=True)
@click.option("--ray-address", help="A running Ray cluster; without it Ray starts on this machine.")
@click.option("--workers", type=click.IntRange(min=1), help="CPU slots when Ray starts here.")
@json_option
def search(space: Path, proposers: str | None, as_json: bool, **options: Any) -> None:
    """The night: measure the noise floor, propose, train, decide, promote, report."""
    from harness.night import Options, run_search
    from harness.propose import parse_shares
    from harness.space import load_space

    shares = parse_shares(proposers) if proposers else None
    try:
        paths, reason = run_search(space, Options(proposers=shares, **options))
    except (EndedEarly, WorkFailed):
        _write_report(options["study"] or load_space(space).name)
        raise
    except ClusterLost as loss:
        if not restart("--resume"):
            _end(1, f"{loss}, again and again; everything is saved: mend the machine, go on with --resume")
    written = _write_report(paths.name)
    if as_json:
        click.echo(json.dumps({"study": paths.name, "stopped": reason, "report": str(written)}))
    else:
        click.echo(f"{paths.name} stopped: {reason}. Read {written} or {written.with_name('index.html')}")
    if reason in EARLY:
        sys.exit(3)


@cli.command()
@click.argument("study")
@json_option
def status(study: str, as_json: bool) -> None:
    """State, spend and the best so far."""
    from harness.status import status_of

    state = status_of(study)
    click.echo(json.dumps(state.as_dict(), indent=1) if as_json else state.text())


@cli.command()
@click.argument("study")
@click.option("--against", help="Another study to compare with.")
def report(study: str, against: str | None) -> None:
    """Write reports/STUDY/ from the ledger."""
    click.echo(_write_report(study, against))


@cli.command()
@click.argument("study")
def audit(study: str) -> None:
    """Recompute every number in the report from the ledger; fail on one that does not agree."""
    from harness import report as reports
    from harness.study import load_study

    paths, _, view = load_study(study)
    problems = reports.audit(view, paths.report)
    for problem in problems:
        click.echo(problem)
    if problems:
        raise SystemExit(1)
    click.echo(f"{paths.report}: every number agrees with {paths.ledger}")


@cli.command()
@click.argument("study")
@click.argument("candidate")
@click.option("--why", default="", help="A sentence for the record.")
def accept(study: str, candidate: str, why: str) -> None:
    """Make a branch in this repository with the winner's smallest diff and its evidence."""
    from harness import review
    from harness.study import load_study

    paths, ledger, view = load_study(study)
    click.echo(review.accept(view, ledger, paths.folder, candidate, Path.cwd(), why))


@cli.command()
@click.argument("study")
@click.argument("candidate")
@click.option("--why", required=True, help="The reason; it binds the next night.")
def reject(study: str, candidate: str, why: str) -> None:
    """Refuse a candidate with a reason."""
    from harness import review
    from harness.study import load_study

    _, ledger, view = load_study(study)
    review.reject(view, ledger, candidate, why)
    click.echo(f"rejected {candidate}: {why}")


def _write_report(study: str, against: str | None = None) -> Path:
    from harness import report as reports
    from harness.study import load_study

    paths, _, view = load_study(study)
    if against:
        click.echo(reports.against(view, load_study(against)[2]))
    reports.write_report(view, paths.report)
    return paths.report / "report.md"


def main() -> None:
    """Console script: exit 0 done, 1 the work failed, 2 the user's mistake, 3 ended early, all saved."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger = logging.getLogger("harness")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not sys.stderr.isatty():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.ClickException as error:
        _end(2, error.format_message())
    except UserError as error:
        _end(2, str(error))
    except WorkFailed as error:
        _end(1, str(error))
    except (EndedEarly, KeyboardInterrupt, click.Abort) as error:
        _end(3, str(error) or "interrupted; what was finished is saved")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _end(1, f"{place}{error.strerror or error}; make room or mend the path, then go on with --resume")


def _end(code: int, message: str) -> NoReturn:
    print("harness: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
