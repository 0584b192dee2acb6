"""A scenario as token ids: tokenised once, memory-mapped by every job that needs it.

A store is a folder. All sequences lie one after another in ``input_ids.npy``; sequence ``row`` is
``input_ids[offsets[row]:offsets[row + 1]]``, first the prompt, then the answer with its end token.
``meta.json`` says what it is, ``clients.json`` which rows are whose. Axes: N sequences, T tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedamole.artifacts import Header, read_record, replacing, sha256, write_record
from fedamole.errors import FedamoleError
from fedamole.partition import ClientSplit

_DTYPES = {"input_ids": "int32", "offsets": "int64", "prompt_lengths": "int32", "labels": "int32"}


@dataclass(frozen=True, eq=False)
class TokenStore:
    """The token ids of a scenario, in memory or memory-mapped.

    Attributes
    ----------
    input_ids
        All sequences one after another, (T,) int32.
    offsets
        Begin of each sequence and the end of the last, (N + 1,) int64, in tokens.
    prompt_lengths
        Tokens of each prompt, (N,) int32; the loss counts from there on.
    labels
        Class of the answer, (N,) int32: a position in ``choices``; -1 for generation.
    clients
        Rows of each client's four sets.
    references
        Answer text by row, for evaluation and test rows.
    choices
        Token ids of each possible answer with its end token, as an example has them after its
        prompt; empty for generation.
    eos_id, pad_id
        End of sequence, and padding (the end token where the tokenizer has no padding token).
    dropped
        Examples of each client whose prompt has max_length or more tokens; they are left out.
    cut
        Sequences of each client that were cut to max_length.
    """

    input_ids: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    labels: np.ndarray
    clients: tuple[ClientSplit, ...]
    references: Mapping[int, str]
    choices: list[list[int]]
    eos_id: int
    pad_id: int
    dropped: list[int]
    cut: list[int]

    def __len__(self) -> int:
        """Count the sequences N."""
        return len(self.labels)

    def ids(self, row: int) -> np.ndarray:
        """Token ids of a sequence, (tokens,) int32: prompt, answer, end token."""
        return self.input_ids[self.offsets[row] : self.offsets[row + 1]]

    def prompt_length(self, row: int) -> int:
        """Count the tokens of a sequence's prompt."""
        return int(self.prompt_lengths[row])

    def reference(self, row: int) -> str:
        """Answer text of an evaluation or test row, uncut.

        Raises
        ------
        KeyError
            For a row of another set, whose text is not stored.
        """
        return self.references[row]

    @staticmethod
    def open(path: Path, digest: str | None = None) -> "TokenStore":
        """Map a store into memory, read-only.

        Parameters
        ----------
        path
            The folder.
        digest
            Digest of the :class:`~fedamole.stages.TokensStage` it must come from; None accepts all.

        Raises
        ------
        FedamoleError
            If it is missing, broken, foreign or of another config.
        """
        _, meta = read_record(path / "meta.json", "tokens", digest)
        _, owners = read_record(path / "clients.json", "token-clients", digest)
        arrays = {name: _map_array(path / f"{name}.npy", name) for name in _DTYPES}
        try:
            store = TokenStore(
                **arrays,
                clients=tuple(_expand_rows(client) for client in owners["clients"]),
                references={int(row): text for row, text in owners["references"].items()},
                choices=meta["choices"],
                eos_id=meta["eos_id"],
                pad_id=meta["pad_id"],
                dropped=meta["dropped"],
                cut=meta["cut"],
            )
            _check_sizes(store, meta["sequences"], meta["tokens"], path)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise FedamoleError(f"{path}: is not a whole token store ({error!r})") from error
        return store


def write_store(path: Path, header: Header, store: TokenStore) -> None:
    """Write a store as a folder, whole or not at all.

    Raises
    ------
    FedamoleError
        If there is no space left or the folder cannot be written.
    """
    with replacing(path) as scratch:
        scratch.mkdir()
        for name, dtype in _DTYPES.items():
            _write_array(scratch / f"{name}.npy", np.asarray(getattr(store, name), dtype=dtype))
        owners = Header("token-clients", header.digest, header.parents)
        content = {
            "clients": [_contract_rows(client) for client in store.clients],
            "references": {str(row): text for row, text in store.references.items()},
        }
        write_record(scratch / "clients.json", owners, content)
        meta = {
            "choices": store.choices,
            "eos_id": store.eos_id,
            "pad_id": store.pad_id,
            "dropped": store.dropped,
            "cut": store.cut,
            "sequences": len(store),
            "tokens": len(store.input_ids),
            "files": {path.name: sha256(path) for path in sorted(scratch.iterdir())},
        }
        write_record(scratch / "meta.json", header, meta)


def _write_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file with the bytes of ``np.save``.

    On a full disk ``np.save`` only counts what it could not write; a stream says why (errno).
    """
    header = np.lib.format.header_data_from_array_1_0(array)
    with path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(np.ascontiguousarray(array).data)


def _contract_rows(client: ClientSplit) -> dict[str, list[int]]:
    """Give first and last row + 1 of each set; rows of a set lie one after another."""
    return {name: [int(rows[0]), int(rows[-1]) + 1] for name, rows in client.parts().items()}


def _expand_rows(ranges: Mapping[str, Any]) -> ClientSplit:
    """Undo :func:`_contract_rows`."""
    return ClientSplit(**{name: np.arange(*bounds) for name, bounds in ranges.items()})


def _map_array(path: Path, name: str) -> np.ndarray:
    """Map one file of a store into memory."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise FedamoleError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError) as error:
        raise FedamoleError(f"{path}: is not a whole token file ({error})") from error
    if array.dtype != _DTYPES[name] or array.ndim != 1:
        raise FedamoleError(
            f"{path}: holds {array.dtype} in {array.ndim} dimensions; {_DTYPES[name]} in one is "
            "needed"
        )
    return array


def _check_sizes(store: TokenStore, sequences: int, tokens: int, path: Path) -> None:
    """Refuse files that do not belong together."""
    sizes = {
        "input_ids": (len(store.input_ids), tokens),
        "offsets": (len(store.offsets), sequences + 1),
        "prompt_lengths": (len(store.prompt_lengths), sequences),
        "labels": (len(store.labels), sequences),
        "last offset": (int(store.offsets[-1]), tokens),
        "last row": (max(int(client.test[-1]) for client in store.clients) + 1, sequences),
    }
    for name, (found, expected) in sizes.items():
        if found != expected:
            raise FedamoleError(f"{path}: {name} is {found}; meta.json says {expected}")
