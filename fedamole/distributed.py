"""The processes that train one client together: start, share of the work, exchange."""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed
from torch.utils import deterministic

from fedamole.errors import FedamoleError

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
ItemT = TypeVar("ItemT")


@contextlib.contextmanager
def process_group(ranks: int, cpu_threads: int) -> Iterator[torch.device]:
    """Join the process group of this job and give the device of this rank.

    Under torchrun, rank and world size come from the environment. Without it, a single process
    forms a group of its own over an in-memory store: no port is opened, so that any number of jobs
    can start on one machine at once. Only rank 0 logs.

    Parameters
    ----------
    ranks
        Processes that the settings ask for.
    cpu_threads
        Threads of each process.

    Raises
    ------
    FedamoleError
        If the launcher started another number of processes.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != ranks:
        raise FedamoleError(f"training: ranks is {ranks}, but {started} processes were started")
    torch.set_num_threads(cpu_threads)
    # A choice of kernel by timing would make the last bits depend on the load of the machine.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads memory before writing it; filling DeepSpeed's buckets would take seconds.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if on_gpu and here > torch.cuda.device_count():
        # Every rank of the node sees this, so rank 0 says it.
        raise FedamoleError(
            f"training: {here} ranks are on this node, which shows {torch.cuda.device_count()} GPUs"
        )
    if on_gpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(local_rank)
    backend = "nccl" if on_gpu else "gloo"
    if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        torch.distributed.init_process_group(backend)
    else:
        # DeepSpeed looks for mpi4py unless these say that there is nothing to discover.
        os.environ.update(ALONE)
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    if rank() > 0:
        logging.disable(logging.INFO)
    yield torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    # Not after an exception: the other ranks may wait in a collective for ever, and we with them.
    torch.distributed.destroy_process_group()
    if started == 1:
        for name in ALONE:
            os.environ.pop(name)


def rank() -> int:
    """Index of this process among those of the job."""
    return torch.distributed.get_rank()


def world_size() -> int:
    """Number of processes of the job."""
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
