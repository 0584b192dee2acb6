"""Files that cross a job boundary: they appear whole, say what they are, and name their parents.

Torch-free. HDF5 contents are in :mod:`fedamole.pool_files`; here are the header, the atomic
replacement and the JSON records.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedamole import __version__
from fedamole.errors import FedamoleError

FORMAT_VERSION = 1


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

        Raises
        ------
        FedamoleError
            If the data are no header: the file is not one of fedamole's.
        """
        try:
            return Header(**data)
        except TypeError as error:
            raise FedamoleError(f"{path}: is not a file of fedamole (it has no header)") from error

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
        If there is no space left or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        Path(name).unlink()
    except OSError as error:
        raise _storage_error(path, error) from error
    scratch = Path(name)
    try:
        yield scratch
        _flush(scratch)
        if path.is_dir():
            # A folder cannot be replaced in one step; this way its name never holds half of one.
            old = scratch.with_suffix(".old")
            path.replace(old)
            scratch.replace(path)
            shutil.rmtree(old)
        else:
            scratch.replace(path)
    except OSError as error:
        raise _storage_error(path, error) from error
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)


def _flush(scratch: Path) -> None:
    """Bring a file's bytes to the disk, so that a power cut cannot leave a name without content."""
    for path in scratch.rglob("*") if scratch.is_dir() else [scratch]:
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _storage_error(path: Path, error: OSError) -> Exception:
    """Turn the errors of a full or read-only disk into one clear line; keep all others."""
    reasons = {
        errno.ENOSPC: "no space left on the device",
        errno.EDQUOT: "the disk quota is exceeded",
        errno.EFBIG: "the file size limit is exceeded",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission denied",
        errno.ENOTDIR: "a part of the path is a file",
        errno.EEXIST: "a part of the path is a file",
    }
    # HDF5 hides the number in its text ("errno = 28, error message = 'No space left ...'").
    number = next((n for n in reasons if n == error.errno or f"errno = {n}," in str(error)), None)
    if number is None:
        return error
    return FedamoleError(f"{path}: cannot be written, {reasons[number]}")


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical(content: Any) -> str:
    """JSON text with sorted keys and no spaces: equal content, equal bytes."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_record(path: Path, header: Header, content: Mapping[str, Any]) -> None:
    """Write a JSON record: the header and the content, one line each entry, keys sorted."""
    lines = [f'"header":{header.to_json()}']
    lines += [f"{json.dumps(key)}:{canonical(content[key])}" for key in sorted(content)]
    with replacing(path) as scratch:
        scratch.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


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
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FedamoleError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise FedamoleError(f"{path}: is not a whole JSON file ({error})") from error
    if not isinstance(content, dict):
        raise FedamoleError(f"{path}: is not a file of fedamole (it has no header)")
    header = Header.from_mapping(content.pop("header", None), path)
    header.check(path, kind, digest)
    return header, content
