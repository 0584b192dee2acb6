"""Rows of local files in any format, each with the place where it stands."""

import contextlib
import csv
import gzip
import importlib.util
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from fedamole.datasets.rows import Row
from fedamole.errors import FedamoleError
from fedamole.settings import SourceSettings


def find_files(source: SourceSettings, fetch: bool = True) -> list[Path]:
    """Find the files of a source: pattern after pattern, sorted within each, none twice.

    A ``~`` at the start stands for the user's home.

    Parameters
    ----------
    source
        The source.
    fetch
        Whether files of the hub are fetched into its cache; otherwise they must be there.

    Raises
    ------
    FedamoleError
        If a file is missing, or nothing matches a pattern.
    """
    root = Path()
    if source.hub:
        root = _snapshot(source.hub, source.revision, source.files, fetch)
    elif source.package:
        root = package_folder(source.package)
    found: dict[Path, None] = {}
    for pattern in map(_expand_home, source.files):
        matches = _matches(root, pattern)
        if not matches and source.hub:
            raise FedamoleError(f"hub data set {source.hub!r}: has no file {pattern!r}")
        if not matches:
            raise FedamoleError(f"{root / pattern}: no such data file, seen from {Path.cwd()}")
        found.update(dict.fromkeys(matches))
    return list(found)


def package_folder(package: str) -> Path:
    """Find the folder of an installed Python package without importing it.

    Raises
    ------
    FedamoleError
        If it is not installed; says what to type.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        # So end names that no package can have, and a.b where a is missing.
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise FedamoleError(
            f"the Python package {package!r} is not installed; "
            f"try: pip install {package.replace('_', '-')}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _snapshot(hub: str, revision: str | None, patterns: Sequence[str], fetch: bool) -> Path:
    """Folder in the cache with files of a data set of the Hugging Face hub."""
    # A fraction of a second of import that only files of the hub need.
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = snapshot_download(
            hub,
            repo_type="dataset",
            revision=revision,
            allow_patterns=list(patterns),
            local_files_only=not fetch,
        )
    except (OSError, ValueError) as error:
        raise hub_error(hub, revision, error) from error
    return Path(folder)


def hub_error(hub: str, revision: str | None, error: Exception) -> FedamoleError:
    """What to say of a data set that the hub, or its cache, does not give."""
    reason = " ".join(str(error).split())
    advice = "without internet point files at a local copy"
    if "scripts are no longer supported" in reason:
        advice = "name files of its repository, or a revision in another format"
    of = f" (revision {revision})" if revision else ""
    return FedamoleError(f"hub data set {hub!r}{of}: cannot be loaded ({reason}); {advice}")


def _expand_home(pattern: str) -> str:
    """Replace a ``~`` or ``~user`` at the start of a path by the home it stands for."""
    if not pattern.startswith("~"):
        return pattern
    try:
        return str(Path(pattern).expanduser())
    except RuntimeError:
        # There is no such user: a file may be called ~draft.csv.
        return pattern


def _matches(root: Path, pattern: str) -> list[Path]:
    """Find the paths that a file name or glob pattern stands for."""
    path = root / pattern
    if path.exists():
        return [path]
    if Path(pattern).is_absolute():
        root, pattern = Path(path.anchor), str(path.relative_to(path.anchor))
    return sorted(root.glob(pattern))


def record_rows(path: Path, suffix: str | None = None) -> Iterator[Row]:
    """Read a file with one object per row; its format follows from its suffix, or that given."""
    suffix = suffix or Path(path.name.removesuffix(".gz")).suffix
    if suffix not in _FORMATS:
        raise FedamoleError(
            f"{path}: has an unknown format {suffix!r}; allowed: {', '.join(_FORMATS)}, "
            "also with .gz"
        )
    with opened(path) as file:
        yield from _FORMATS[suffix](file, path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a plain or gzip file; what goes wrong while it is read is an error with its name."""
    try:
        with path.open("rb") as file:
            yield gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file  # type: ignore[misc]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FedamoleError(f"{path}: is not a whole gzip file ({error})") from error
    except OSError as error:
        raise FedamoleError(f"{path}: cannot be read ({error.strerror})") from error


def _json_lines(file: BinaryIO, path: Path) -> Iterator[Row]:
    """Read one JSON object a line; blank lines are skipped."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield object_row(load_json(line.rstrip(), path, number), f"{path}:{number}")


def _json_array(file: BinaryIO, path: Path) -> Iterator[Row]:
    """Read a JSON array of objects; a file that is none is read as JSON lines."""
    data = file.read()
    if not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _json_lines(io.BytesIO(data), path)
        return
    # The strict parse comes first: it names the line of a mistake. The walk finds the items' lines.
    load_json(data, path)
    text, decoder = data.decode("utf-8-sig"), json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    while item := re.compile(r"[\s,]*([^\s,\]])").match(text, position):
        line += text.count("\n", counted, item.start(1))
        counted = item.start(1)
        value, position = decoder.raw_decode(text, counted)
        yield object_row(value, f"{path}:{line}")


def decode(data: bytes, path: Path, line: int = 1) -> str:
    """Decode UTF-8 text that begins on a line of a file; a byte order mark is left out.

    Raises
    ------
    FedamoleError
        If it is not UTF-8; names the line of the first wrong byte.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise FedamoleError(f"{path}:{line}: is not UTF-8 text ({error.reason})") from error


def load_json(data: bytes, path: Path, line: int = 1) -> Any:
    """Parse JSON that begins on a line of a file."""
    try:
        return json.loads(decode(data, path, line))
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise FedamoleError(
            f"{path}:{line}: is not valid JSON ({error.msg}, column {error.colno})"
        ) from error


def object_row(value: Any, where: str) -> Row:
    """Make a row of a parsed JSON value."""
    if not isinstance(value, dict):
        raise FedamoleError(
            f"{where}: holds a {type(value).__name__}; an object with named fields is needed"
        )
    return Row(value, where)


def _csv_rows(file: BinaryIO, path: Path, delimiter: str = ",") -> Iterator[Row]:
    """Read values separated by commas, or something else, under a header line."""
    records = _csv_records(file, path, delimiter)
    line, header = next(records, (1, []))
    for name in header:
        if header.count(name) > 1:
            raise FedamoleError(
                f"{path}:{line}: has column {name!r} {header.count(name)} times; every column "
                "needs a name of its own"
            )
    for line, values in records:
        if len(values) != len(header):
            raise FedamoleError(
                f"{path}:{line}: has {len(values)} fields; the header has {len(header)}"
            )
        yield Row(dict(zip(header, values, strict=True)), f"{path}:{line}")


def _csv_records(file: BinaryIO, path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Read the records that are not blank, each with the line where it begins."""
    # The module's own limit is 131,072 characters; a long document is no mistake.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_text_lines(file, path), strict=True, delimiter=delimiter)
    line = 1
    try:
        for values in reader:
            if values:
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        kind = "CSV" if delimiter == "," else "TSV with CSV's quotes"
        raise FedamoleError(f"{path}:{line}: is not valid {kind} ({error})") from error


def _text_lines(file: BinaryIO, path: Path) -> Iterator[str]:
    """Read UTF-8 lines with the line ends they have."""
    # A strict decoder reads ahead and fails before the lines above the wrong byte are out; this one
    # lets wrong bytes through, marked, to be refused with their line.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    for number, line in enumerate(text, start=1):
        if not line.isascii():
            decode(line.encode("utf-8", "surrogateescape"), path, number)
        yield line


def _parquet_rows(file: BinaryIO, path: Path) -> Iterator[Row]:
    """Read a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(file.read()))
    except pyarrow.ArrowException as error:
        raise FedamoleError(f"{path}: is not a whole Parquet file ({error})") from error
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Row(values, f"{path}: row {number}")


_FORMATS: dict[str, Callable[[BinaryIO, Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json_array,
    ".csv": _csv_rows,
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
}
