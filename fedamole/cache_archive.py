"""A cache in a folder or a zip archive: verified, packed into one file, and unpacked again."""

import logging
import stat
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedamole.artifacts import replacing
from fedamole.errors import FedamoleError
from fedamole.manifest import (
    MANIFEST,
    Manifest,
    check_bytes,
    checked,
    content_of,
    manifest_text,
    parse_manifest,
    read_manifest,
    with_others,
)

logger = logging.getLogger(__name__)

# Bytes of all files together. A study of a hundred rows has a few ten MB; all are read at once.
LIMIT = 2**29
# Zip knows no earlier time; permissions are those of a plain file.
_TIME = (1980, 1, 1, 0, 0, 0)
_MODE = stat.S_IFREG | 0o644
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OverflowError)


@dataclass(frozen=True)
class Contents:
    """All of a cache, in memory.

    Attributes
    ----------
    origin
        Folder or archive.
    manifest
        What it says.
    text
        Its bytes.
    files
        Name -> bytes of every file that the manifest names; None for one that is missing.
    strangers
        Names of files that the manifest does not name.
    """

    origin: Path
    manifest: Manifest
    text: bytes
    files: dict[str, bytes | None]
    strangers: list[str]

    @property
    def whole(self) -> dict[str, bytes]:
        """Files by name, sorted; the manifest comes last, since it vouches for the others."""
        files = {
            name: content for name, content in sorted(self.files.items()) if content is not None
        }
        return {**files, MANIFEST: self.text}


def verify(path: Path) -> Contents:
    """Read a cache, and refuse one that is not what its manifest says.

    Parameters
    ----------
    path
        A folder, or a zip archive.

    Raises
    ------
    FedamoleError
        One line for each file that is missing, changed, or not in the manifest.
    """
    contents = _read_folder(path) if path.is_dir() else _read_archive(path)
    problems: list[str] = []
    for name, content in sorted(contents.files.items()):
        try:
            if name in contents.manifest.costs:
                check_bytes(path / name, content, contents.manifest.costs[name])
            else:
                checked(path / name, content, contents.manifest.files[name])
        except FedamoleError as error:
            problems.append(str(error))
    problems += [f"{path / name}: is not in the manifest" for name in contents.strangers]
    if problems:
        raise FedamoleError("\n".join(problems))
    return contents


def summary(contents: Contents) -> str:
    """One line about a cache: files, runs, size, packages and machines."""
    entries = contents.manifest.files.values()
    runs = {(entry.scenario, entry.digest) for entry in entries}
    packages = sorted({entry.package for entry in entries})
    machines = [machine.processor for machine in contents.manifest.machines]
    return (
        f"{contents.origin}: whole; {len(entries)} files of {len(runs)} runs, "
        f"{sum(entry.size for entry in entries)} bytes, fedamole {', '.join(packages)}, "
        f"machines: {'; '.join(machines)}"
    )


def pack(folder: Path, out: Path) -> Contents:
    """Put a cache into one zip archive: equal files, equal bytes, where zlib is the same.

    Raises
    ------
    FedamoleError
        See :func:`verify`; if the archive cannot be written.
    """
    contents = verify(folder)
    with replacing(out) as scratch, zipfile.ZipFile(scratch, "w") as archive:
        for name, content in sorted(contents.whole.items()):
            info = zipfile.ZipInfo(name, _TIME)
            # 3 is Unix, where the upper half holds the permissions.
            info.create_system, info.external_attr = 3, _MODE << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED, compresslevel=9)
    return contents


def unpack(archive: Path, folder: Path, force: bool = False) -> list[Path]:
    """Put the files of an archive into a folder, once all of them were verified.

    Every file appears whole, the manifest last. What is there with the same bytes is left alone.
    A manifest that is there keeps what it says of other files; see
    :func:`fedamole.manifest.with_others`.

    Returns
    -------
    list[Path]
        Files that were written.

    Raises
    ------
    FedamoleError
        See :func:`verify`; one line for each other file that would be overwritten without `force`.
    """
    if archive.is_dir():
        raise FedamoleError(f"{archive}: is a folder; a zip archive is needed")
    contents = verify(archive)
    files = contents.whole
    present = {name: content_of(folder / name) for name in files}
    files[MANIFEST] = _merged(contents, folder, present[MANIFEST], force)
    differing = [
        name
        for name, content in present.items()
        if name != MANIFEST and content not in (None, files[name])
    ]
    if differing and not force:
        lines = [f"{folder / name}: differs from the archive" for name in differing]
        raise FedamoleError("\n".join([*lines, "nothing was unpacked; --force overwrites"]))
    written = [name for name in files if present[name] != files[name]]
    for name in written:
        with replacing(folder / name) as scratch:
            scratch.write_bytes(files[name])
    return [folder / name for name in written]


def _merged(contents: Contents, folder: Path, present: bytes | None, force: bool) -> bytes:
    """Bytes of the manifest of a folder once an archive is unpacked into it."""
    if present is None:
        return contents.text
    try:
        old = parse_manifest(present, folder / MANIFEST)
    except FedamoleError as error:
        if not force:
            raise
        logger.warning("%s; it is replaced", error)
        return contents.text
    merged = with_others(folder, contents.manifest, old)
    return contents.text if merged is contents.manifest else manifest_text(merged)


def _read_folder(folder: Path) -> Contents:
    path = folder / MANIFEST
    manifest = read_manifest(path)
    names = [file.relative_to(folder).as_posix() for file in _visible(folder)]
    return Contents(
        folder,
        manifest,
        path.read_bytes(),
        {name: content_of(folder / name) for name in (*manifest.files, *manifest.costs)},
        sorted(set(names) - {*manifest.files, *manifest.costs, MANIFEST}),
    )


def _visible(folder: Path) -> Iterable[Path]:
    """Files of a folder; hidden ones are scratch files, which nothing reads."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and not path.is_dir():
            yield path


def _read_archive(path: Path) -> Contents:
    members = _members(path)
    if MANIFEST not in members:
        raise FedamoleError(f"{path}: has no {MANIFEST}; `fedamole cache pack` makes archives")
    text = members.pop(MANIFEST)
    manifest = parse_manifest(text, path / MANIFEST)
    files = {name: members.get(name) for name in (*manifest.files, *manifest.costs)}
    return Contents(path, manifest, text, files, sorted(set(members) - set(files)))


def _members(path: Path) -> dict[str, bytes]:
    """Files of an archive by name.

    Raises
    ------
    FedamoleError
        If it cannot be read, is broken, or holds what no cache holds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            _check_members(path, members)
            return {member.filename: _bytes_of(archive, member) for member in members}
    except OSError as error:
        raise FedamoleError(f"{path}: cannot be read ({error.strerror})") from error
    except _BROKEN as error:
        raise FedamoleError(f"{path}: is not a whole zip archive ({error})") from error


def _bytes_of(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Content of a member, no more than it declares: a plain read would inflate all there is."""
    with archive.open(member) as stream:
        return stream.read(member.file_size)


def _check_members(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse an archive before anything of it is inflated."""
    names: set[str] = set()
    for member in members:
        if problem := _unfit(member):
            raise FedamoleError(f"{path}: {member.orig_filename!r} {problem}")
        if member.filename in names:
            raise FedamoleError(f"{path}: {member.filename!r} stands twice")
        names.add(member.filename)
    total = sum(member.file_size for member in members)
    if total > LIMIT:
        raise FedamoleError(f"{path}: would take {total} bytes; {LIMIT} are allowed")


def _unfit(member: zipfile.ZipInfo) -> str | None:
    """Say why a member cannot be a file of a cache."""
    name, kind = member.orig_filename, stat.S_IFMT(member.external_attr >> 16)
    if name.startswith("/") or "\\" in name or set(name.split("/")) & {"", ".", ".."}:
        return "would leave the folder"
    if not name.isprintable():
        return "is no name of a file"
    if kind not in (0, stat.S_IFREG):
        return "is a link or another special file"
    if member.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if member.compress_type not in _METHODS:
        return f"is compressed by method {member.compress_type}; stored or deflated are allowed"
    return None
