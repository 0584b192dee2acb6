"""The processes that train one client together: start, share of the work, exchange."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed
from torch.utils import deterministic

from fedamole.errors import FedamoleError
from fedamole.launching import Layout, Seat, seat

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
ItemT = TypeVar("ItemT")
LEAVE_POLL_S = 0.2


@contextlib.contextmanager
def process_group(layout: Layout) -> Iterator[tuple[Seat, torch.device]]:
    """Join the processes that train one client together; give this one's place and device.

    A client of one process needs no other: its group is over an in-memory store and opens no port,
    so that any number of jobs can start on one machine at once. Only rank 0 of a client logs.

    Parameters
    ----------
    layout
        Processes of the job.

    Raises
    ------
    FedamoleError
        If another number of processes was started, or the node shows too few GPUs.
    """
    place = seat(layout)
    torch.set_num_threads(layout.cpu_threads)
    # A choice of kernel by timing would make the last bits depend on the load of the machine.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads memory before writing it; filling DeepSpeed's buckets would take seconds.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = _device(place)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = _store(layout, place)
    torch.distributed.init_process_group(
        backend, store=store, rank=place.rank, world_size=layout.ranks
    )
    if place.rank > 0:
        logging.disable(logging.INFO)
    yield place, device
    # Not after an exception: the other ranks may wait in a collective for ever, and we with them.
    _destroy_group()
    if layout.ranks > 1:
        _leave_together(store, place, layout)
    for name in ALONE:
        os.environ.pop(name, None)


def _destroy_group() -> None:
    """End the default group; DeepSpeed forgets its copies of it, so that another can follow."""
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
    else:
        torch.distributed.destroy_process_group()


def _device(place: Seat) -> torch.device:
    """GPU of this process where torch sees one; otherwise the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if place.local_processes > torch.cuda.device_count():
        # Every process of the node sees this, so the first says it.
        raise FedamoleError(
            f"training: {place.local_processes} processes are on this node, which shows "
            f"{torch.cuda.device_count()} GPUs"
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.cuda.set_device(place.local_number)
    return torch.device("cuda", place.local_number)


def _store(layout: Layout, place: Seat) -> torch.distributed.Store:
    """Where the ranks of a client find each other.

    All clients of a job share one server, on the first node; each has names of its own in it.
    """
    if layout.ranks == 1:
        store: torch.distributed.Store = torch.distributed.HashStore()
        # DeepSpeed looks for mpi4py unless these say that there is nothing to discover.
        os.environ.update(ALONE)
    else:
        store = next(torch.distributed.rendezvous("env://"))[0]
        store = torch.distributed.PrefixStore(f"lane {place.lane}", store)
        os.environ |= {"RANK": str(place.rank), "WORLD_SIZE": str(layout.ranks)}
    os.environ["LOCAL_RANK"] = str(place.local_number)
    return store


def _leave_together(store: torch.distributed.Store, place: Seat, layout: Layout) -> None:
    """Keep the server of the store up until its last client is done."""
    while isinstance(store, torch.distributed.PrefixStore):
        store = store.underlying_store
    gone = store.add("left", 1)
    while place.number == 0 and gone < layout.processes:
        time.sleep(LEAVE_POLL_S)
        gone = store.add("left", 0)


def rank() -> int:
    """Index of this process among those of its client."""
    return torch.distributed.get_rank()


def world_size() -> int:
    """Number of processes of the client."""
    return torch.distributed.get_world_size()


def share_of_rank(items: Sequence[ItemT]) -> list[ItemT]:
    """Items for this rank, every world_size-th; padded so that all ranks get equally many.

    Under ZeRO-3 a forward pass is a collective operation: a rank with one batch fewer would leave
    the others waiting for ever. The padding repeats the last item; :func:`collect` drops it.
    """
    if not items:
        return []
    mine = list(items[rank() :: world_size()])
    longest = -(-len(items) // world_size())
    return mine + [items[-1]] * (longest - len(mine))


def collect(results: Sequence[Any], total: int) -> list[Any]:
    """Undo :func:`share_of_rank` of ``total`` items: all results in order, on all ranks."""
    if world_size() == 1:
        return list(results)
    gathered: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(gathered, list(results))
    return [gathered[index % world_size()][index // world_size()] for index in range(total)]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on at least one rank."""
    if world_size() == 1:
        return flag
    found = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)
