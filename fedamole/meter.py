"""What a client's work costs: wall time by phase, memory, what it sends and is sent (torch-free).

Costs depend on the machine and the moment. They stand in records of progress, in logs and in files
of costs; no metrics file, pool, or other result depends on them.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

    from fedamole.pools import ClientState, Upload

Phase = Literal["loading", "training", "testing", "embedding"]
MB = 10**6


@dataclass(frozen=True)
class Machine:
    """What a client's work ran on; nothing that tells one machine from another of its kind.

    Attributes
    ----------
    processor, gpu
        Names of their kinds; no GPU is None.
    threads
        Of torch, in one process.
    """

    processor: str
    gpu: str | None
    threads: int


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """What work cost, in numbers; None is what was not measured.

    Attributes
    ----------
    training_seconds
        Wall time of all that is none of the others: the steps, before them the making of the model,
        behind them what a method learns or searches beside; for the first client of a process also
        what is imported late. For a client that trains in a pack it is the pack's training time
        divided by its clients, since they train together. 0 where a client is only tested. The
        loading of the backbone is in none of the times.
    testing_seconds
        Of the evaluation set and the test set.
    embedding_seconds
        Of the embedding set, where it is embedded.
    peak_memory_mb
        Highest resident memory of the process so far, in MB (10^6 bytes): also that of the clients
        that it did before. Of several ranks that of the first.
    peak_gpu_memory_mb
        Highest GPU memory of tensors since the client, or its pack, began; None without a GPU.
    upload_bytes, download_bytes
        Of the tensors that the client sent, and of those that it read of the pool: experts, shared
        expert, P. None where nothing was trained.
    trainable
        Numbers that it trained; None where nothing was.
    """

    training_seconds: float | None = None
    testing_seconds: float | None = None
    embedding_seconds: float | None = None
    peak_memory_mb: float | None = None
    peak_gpu_memory_mb: float | None = None
    upload_bytes: int | None = None
    download_bytes: int | None = None
    trainable: int | None = None


@dataclass(frozen=True, kw_only=True)
class ClientCosts(Amounts):
    """What the work of one client in one round cost.

    Attributes
    ----------
    machine
        What it ran on, if that is known.
    """

    machine: Machine | None = None


@dataclass(frozen=True)
class Reading:
    """What a meter counted.

    Attributes
    ----------
    seconds
        Phase -> wall time, without that of phases inside it.
    counts
        What was counted beside, by name.
    """

    seconds: dict[Phase, float]
    counts: dict[str, int]


class Meter:
    """Counts the time of phases, which may lie inside each other, and numbers by name."""

    machine: Machine | None = None

    def __init__(self) -> None:
        self._open: list[Phase] = []
        self._since = 0.0
        self.forget()

    def forget(self) -> None:
        """Start counting anew."""
        self._seconds: dict[Phase, float] = {}
        self._counts: dict[str, int] = {}

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the time of a block; that of a phase inside it counts there alone."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now = time.monotonic()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def count(self, **numbers: int) -> None:
        """Note numbers by name; a later one replaces an earlier one."""
        self._counts |= numbers

    def read(self) -> Reading:
        """Give what was counted, and start anew."""
        found = Reading(self._seconds, self._counts)
        self.forget()
        return found

    def forget_gpu_peak(self) -> None:
        """Start anew to look for the highest use of GPU memory."""

    def gpu_peak_mb(self) -> float | None:
        """Highest use of GPU memory by tensors since then, in MB; None without a GPU."""
        return None

    def costs(self, reading: Reading, shared_training: float = 0.0) -> ClientCosts:
        """Say what a client cost.

        Parameters
        ----------
        reading
            Of its own work.
        shared_training
            Its share of the training of its pack, in seconds.
        """
        seconds, counts, peak = reading.seconds, reading.counts, self.gpu_peak_mb()
        return ClientCosts(
            training_seconds=round(shared_training + seconds.get("training", 0.0), 3),
            testing_seconds=round(seconds.get("testing", 0.0), 3),
            embedding_seconds=round(seconds.get("embedding", 0.0), 3),
            peak_memory_mb=round(peak_memory_mb(), 1),
            peak_gpu_memory_mb=None if peak is None else round(peak, 1),
            upload_bytes=counts.get("upload_bytes"),
            download_bytes=counts.get("download_bytes"),
            trainable=counts.get("trainable"),
            machine=self.machine,
        )


def peak_memory_mb() -> float:
    """Highest resident memory of this process so far, in MB."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


def state_bytes(state: "ClientState") -> int:
    """Bytes of the tensors that a client reads of a pool."""
    return sum(array.nbytes for array in _tensors(state))


def upload_bytes(upload: "Upload") -> int:
    """Bytes of all arrays that a client sends: tensors, which rows they are, tokens, embeddings."""
    groups = upload.state.groups.values()
    rows = [array for group in groups for array in (group.module_N, group.expert_N)]
    beside = [*upload.expert_embeddings.values(), *upload.tokens.values()]
    arrays = [*_tensors(upload.state), *rows, *beside, upload.client_embeddings_MR]
    return sum(array.nbytes for array in arrays)


def _tensors(state: "ClientState") -> "list[np.ndarray]":
    return [
        array
        for group in state.groups.values()
        for tensors in (group.experts, group.shared)
        for array in tensors.values()
    ]
