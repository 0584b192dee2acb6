"""Files that cross a job boundary: they appear whole, say what they are, and name their parents.

Torch-free. HDF5 contents are in :mod:`fedamole.pool_files`; here are the header, the atomic
replacement and the JSON records.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fedamole import __version__
from fedamole.errors import FedamoleError

FORMAT_VERSION = 1
# Only writing fails with these numbers.
_FULL = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is exceeded",
    errno.EFBIG: "the file size limit is exceeded",
    errno.EROFS: "the file system is read-only",
}
_FORBIDDEN = {
    errno.EACCES: "permission denied",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a part of the path is a file",
}


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes
    ----------
    kind
        What it holds: ``pool``, ``upload``, ``assignment``, ``metrics``, ``partition`` ...
    digest
        SHA-256 of the settings of the stage that wrote it (:func:`fedamole.stages.digest`).
    parents
        Role -> SHA-256 of each file it was computed from.
    package
        Version of fedamole that wrote it.
    format
        Version of the layout of the file.
    """

    kind: str
    digest: str
    parents: dict[str, str] = field(default_factory=dict)
    package: str = __version__
    format: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Canonical JSON text."""
        return canonical(asdict(self))

    @staticmethod
    def from_mapping(data: Any, path: Path) -> "Header":
        """Read a header back.

        Fields that this version does not know are left to :meth:`check`, which names the format.

        Raises
        ------
        FedamoleError
            If the data are no header: the file is not one of fedamole's.
        """
        given = data if isinstance(data, Mapping) else {}
        known = {item.name: given[item.name] for item in fields(Header) if item.name in given}
        if not all(isinstance(known.get(key), str) for key in ("kind", "digest")):
            raise FedamoleError(f"{path}: is not a file of fedamole (it has no header)")
        return Header(**known)

    def check(self, path: Path, kind: str, digest: str | None) -> None:
        """Refuse a file of another kind, format or run.

        Raises
        ------
        FedamoleError
            Names the file, what it is and what is needed.
        """
        if self.kind != kind:
            raise FedamoleError(f"{path}: holds {self.kind}; {kind} is needed")
        if self.format != FORMAT_VERSION:
            raise FedamoleError(
                f"{path}: has format {self.format}; this version of fedamole reads {FORMAT_VERSION}"
            )
        if digest is not None and self.digest != digest:
            raise FedamoleError(
                f"{path}: was made with other settings (digest {self.digest[:12]}, the config "
                f"gives {digest[:12]}); move it away, or choose another results folder"
            )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a scratch path beside ``path`` and move it into place if the block succeeds.

    A reader sees the old file or the new one, never half of either. Nothing is left behind by an
    exception; a process killed outright leaves a hidden ``.name.*.part``, which nothing reads. The
    scratch path may become a file or a folder.

    Raises
    ------
    FedamoleError
        If there is no space left or the folder cannot be written. Errors of reading another file
        inside the block stay what they are.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        Path(name).unlink()
    scratch = Path(name)
    try:
        with _explained(path, scratch):
            yield scratch
        with _explained(path):
            _flush(scratch)
            _move(scratch, path)
    finally:
        _remove(scratch)


def _flush(scratch: Path) -> None:
    """Bring a file's bytes to the disk, so that a power cut cannot leave a name without content."""
    for path in scratch.rglob("*") if scratch.is_dir() else [scratch]:
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _move(scratch: Path, path: Path) -> None:
    """Give the scratch file or folder its name; what had it goes, or keeps it if that fails."""
    if not path.is_dir():
        scratch.replace(path)
        return
    # A folder cannot be replaced in one step; this way its name never holds half of one.
    old = scratch.with_suffix(".old")
    try:
        path.replace(old)
        scratch.replace(path)
    finally:
        # Not an except clause: SIGTERM may come between the two moves.
        if os.path.lexists(path):
            _remove(old)
        else:
            old.replace(path)


def _remove(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(path: Path, scratch: Path | None = None) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into one clear line; keep all others.

    With a scratch path, errors that name other files are kept as well: those were read.
    """
    try:
        yield
    except FedamoleError:
        raise
    except Exception as error:
        reason = _reason(error)
        names = _names(error)
        others = scratch is not None and names and not any(scratch.name in name for name in names)
        if reason is None or others:
            raise
        raise FedamoleError(f"{path}: cannot be written, {reason}") from error


def _names(error: Exception) -> list[str]:
    """Files that an error names; a copy names two. HDF5 has them in its text."""
    names = [getattr(error, key, None) for key in ("filename", "filename2")]
    found = re.findall(r"name = '(.*?)'[,)]", str(error))
    return [os.fsdecode(name) for name in names if isinstance(name, str | bytes)] + found


def _reason(error: Exception) -> str | None:
    """Say why a file cannot be written; None for an error that is about something else."""
    text = str(error)
    if re.search(r"\d requested and \d+ written", text):
        # NumPy does not keep the number.
        return "no space left on the device, or a limit is exceeded"
    number = getattr(error, "errno", None)
    # HDF5 ("errno = 28, ...") and Rust, as in safetensors ("os error 28"), hide it in their text.
    if hidden := re.search(r"(?:errno = |os error )(\d+)", text):
        number = number or int(hidden[1])
    elif "No space left" in text:
        number = errno.ENOSPC
    if not isinstance(error, OSError) and number not in _FULL:
        return None
    return {**_FULL, **_FORBIDDEN}.get(number or 0)


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical(content: Any) -> str:
    """JSON text with sorted keys and no spaces: equal content, equal bytes."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_record(path: Path, header: Header, content: Mapping[str, Any]) -> None:
    """Write a JSON record: the header and the content, one line each entry, keys sorted."""
    with replacing(path) as scratch:
        scratch.write_text(record_text(header, content), encoding="utf-8")


def record_text(header: Header, content: Mapping[str, Any]) -> str:
    """Give the text of a JSON record."""
    lines = [f'"header":{header.to_json()}']
    lines += [f"{json.dumps(key)}:{canonical(content[key])}" for key in sorted(content)]
    return "{" + ",\n".join(lines) + "}\n"


def read_record(path: Path, kind: str, digest: str | None = None) -> tuple[Header, dict[str, Any]]:
    """Read a JSON record.

    Parameters
    ----------
    path
        The file.
    kind
        Kind it must have.
    digest
        Digest of the stage settings it must have been written with; None accepts all.

    Raises
    ------
    FedamoleError
        If it is missing, broken, foreign, of another kind, or of another config.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise FedamoleError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_record(text, path, kind, digest)


def parse_record(
    text: bytes, path: Path, kind: str, digest: str | None = None
) -> tuple[Header, dict[str, Any]]:
    """Read a JSON record from its bytes; see :func:`read_record`."""
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FedamoleError(f"{path}: is not a whole JSON file ({error})") from error
    if not isinstance(content, dict):
        raise FedamoleError(f"{path}: is not a file of fedamole (it has no header)")
    header = Header.from_mapping(content.pop("header", None), path)
    header.check(path, kind, digest)
    return header, content
