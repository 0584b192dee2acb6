"""Named arrays in an HDF5 file: whole or absent, equal content -> equal bytes. Torch-free.

No compression, no pickle, no time stamps. What the arrays mean is in :mod:`fedamole.pool_files`.
"""

import contextlib
import json
import os
from collections import UserDict
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5f, h5p, h5s, h5t

from fedamole.artifacts import Header, replacing
from fedamole.errors import FedamoleError
from fedamole.pools import BFLOAT16

# Fixed versions of the format: the bytes do not depend on the HDF5 library that h5py brings along.
LIBVER = ("v110", "v110")
# Bytes that are read at least, as one page of a disk.
SIEVE = 4096


def _bfloat16_type() -> h5t.TypeFloatID:
    """Describe bfloat16 to HDF5, so that any tool reads it: 8 exponent and 7 mantissa bits."""
    kind = h5t.IEEE_F16LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_ebias(127)
    return kind


def write_arrays(
    path: Path, header: Header, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write a file.

    Parameters
    ----------
    path
        The file; what stood there stays until the new one is whole.
    header
        What the file says of itself.
    facts
        Small values, kept as JSON.
    arrays
        Path inside the file -> values. Any dtype of NumPy, and BFLOAT16.

    Raises
    ------
    FedamoleError
        If there is no space left or the folder cannot be written.
    """
    with writing(path, header, facts) as file:
        for name in sorted(arrays):
            write_array(file, name, arrays[name])


@contextlib.contextmanager
def writing(path: Path, header: Header, facts: Mapping[str, Any]) -> Iterator[h5py.File]:
    """Open a new file for :func:`write_array`; see :func:`write_arrays`."""
    # Through a Python file: HDF5's own driver crashes the process at its end after a full disk.
    with (
        replacing(path) as scratch,
        scratch.open("w+b") as stream,
        h5py.File(stream, "w", libver=LIBVER) as file,
    ):
        file.attrs["header"] = header.to_json()
        file.attrs["facts"] = json.dumps(facts)
        yield file


def write_array(file: h5py.File, name: str, array: np.ndarray) -> None:
    """Write one array, contiguous, in its own dtype."""
    if array.dtype != BFLOAT16:
        file.create_dataset(name, data=array, track_times=False)
        return
    write_part(file, name, array, 0, len(array))


def write_part(file: h5py.File, name: str, array: np.ndarray, start: int, length: int) -> None:
    """Write some rows of an array, which is made with the first of them.

    The bytes are those of :func:`write_array` if the first parts of all arrays come in the order of
    the whole ones.

    Parameters
    ----------
    file, name
        Where.
    array
        The rows.
    start, length
        Number of the first one, and of all rows of the whole array.
    """
    kind = _bfloat16_type() if array.dtype == BFLOAT16 else h5t.py_create(array.dtype)
    if name not in file:
        shape = (length, *array.shape[1:])
        file.create_dataset(name, shape=shape, dtype=h5py.Datatype(kind), track_times=False)
    dataset = file[name]
    space = _rows(dataset, start, len(array))
    memory = h5s.create_simple(array.shape)
    dataset.id.write(memory, space, np.ascontiguousarray(array), mtype=kind)


def _rows(dataset: h5py.Dataset, start: int, count: int) -> h5s.SpaceID:
    """Select rows that follow each other."""
    space = dataset.id.get_space()
    others = dataset.shape[1:]
    space.select_hyperslab((start, *(0 for _ in others)), (count, *others))
    return space


class _File(h5py.File):
    """An HDF5 file that says in one line what is missing or damaged in it."""

    def __getitem__(self, name: str) -> h5py.Group | h5py.Dataset:
        with _reading(Path(self.filename)):
            return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        with _reading(Path(self.filename)):
            return super().__contains__(name)


class _Facts(UserDict[str, Any]):
    """The facts of a file; one that is missing is a damage of the file."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        super().__init__(facts)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise FedamoleError(f"{self._path}: is damaged (it has no {key!r})")


@contextlib.contextmanager
def opened(
    path: Path, kind: str | None, digest: str | None
) -> Iterator[tuple[h5py.File, MutableMapping[str, Any]]]:
    """Open one of fedamole's files for reading.

    Parameters
    ----------
    path
        The file.
    kind, digest
        What its header must say; None accepts all.

    Yields
    ------
    tuple
        The open file and its facts.

    Raises
    ------
    FedamoleError
        If it is missing, broken, foreign, of another kind or of another config; also where the
        block reads what is missing or broken. Other errors of the block stay what they are.
    """
    with _reading(path):
        with path.open("rb"):
            pass
        if not h5py.is_hdf5(path):
            raise FedamoleError(f"{path}: is not an HDF5 file, or only the start of one")
        file = _File(h5f.open(os.fsencode(path), h5f.ACC_RDONLY, _reading_access()))
    with file:
        with _reading(path):
            if "header" not in file.attrs or "facts" not in file.attrs:
                raise FedamoleError(f"{path}: is not a file of fedamole (it has no header)")
            header = Header.from_mapping(_json(file.attrs["header"]), path)
            facts = _Facts(path, _json(file.attrs["facts"]))
        header.check(path, kind or header.kind, digest)
        yield file, facts


def _reading_access() -> h5p.PropFAID:
    """How files are opened for reading."""
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    # NFS and Lustre refuse locks; files are replaced, never changed, so that none is needed.
    access.set_file_locking(False, True)
    # HDF5 would read 64 KiB around every smaller row.
    access.set_sieve_buf_size(SIEVE)
    return access


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what HDF5 raises for a missing or damaged part of a file into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror if error.errno else "it is truncated or damaged"
        raise FedamoleError(f"{path}: cannot be read ({reason})") from error
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise FedamoleError(f"{path}: is damaged ({' '.join(str(error).split())})") from error


def _json(text: Any) -> Any:
    """Parse the JSON of an attribute; it is written in ASCII, so that anything else is damage."""
    if not str(text).isascii():
        raise ValueError("its header is not ASCII text")
    return json.loads(text)


def _path(item: h5py.Group | h5py.Dataset) -> Path:
    """Path of the file that something belongs to."""
    return Path(item.file.filename)


def datasets(file: h5py.File, folder: str) -> dict[str, h5py.Dataset]:
    """List the datasets of a folder; none if there is no such folder."""
    with _reading(_path(file)):
        return dict(file[folder]) if folder in file else {}


def read_arrays(file: h5py.File, folder: str, rows: slice | None = None) -> dict[str, np.ndarray]:
    """Read the arrays of a folder, or rows of them; none if there is no such folder."""
    return {name: read_array(dataset, rows) for name, dataset in datasets(file, folder).items()}


def _dtypes(dataset: h5py.Dataset) -> tuple[np.dtype, h5t.TypeID]:
    """NumPy and HDF5 type in memory, such that reading copies bits and converts nothing."""
    kind = _bfloat16_type()
    if dataset.id.get_type().equal(kind):
        return BFLOAT16, kind
    return dataset.dtype, h5t.py_create(dataset.dtype)


def read_array(dataset: h5py.Dataset, rows: slice | None = None) -> np.ndarray:
    """Read a whole array, or rows of it that follow each other.

    Raises
    ------
    FedamoleError
        If the file is damaged there.
    """
    with _reading(_path(dataset)):
        dtype, kind = _dtypes(dataset)
        if rows is None and dtype != BFLOAT16:
            return dataset[()]
        start, stop, _ = (rows or slice(None)).indices(len(dataset))
        array = np.empty((stop - start, *dataset.shape[1:]), dtype)
        if array.size:
            memory = h5s.create_simple(array.shape)
            dataset.id.read(memory, _rows(dataset, start, stop - start), array, mtype=kind)
        return array


def read_rows(dataset: h5py.Dataset, module_N: np.ndarray, expert_N: np.ndarray) -> np.ndarray:
    """Read the rows (module, expert) of an (M, E, ...) dataset into (N, ...).

    Raises
    ------
    FedamoleError
        If the file is damaged there.
    """
    rows_of_file = list(zip(module_N.tolist(), expert_N.tolist(), strict=True))
    with _reading(_path(dataset)):
        dtype, kind = _dtypes(dataset)
        row_shape = dataset.shape[2:]
        rows = np.empty((len(rows_of_file), *row_shape), dtype)
        in_memory, in_file = h5s.create_simple(row_shape), dataset.id.get_space()
        # One selection per row: 12 us each. h5py's own indexing takes ten times that.
        for row, at in zip(rows, rows_of_file, strict=True):
            in_file.select_hyperslab((*at, *(0 for _ in row_shape)), (1, 1, *row_shape))
            dataset.id.read(in_memory, in_file, row, mtype=kind)
        return rows
