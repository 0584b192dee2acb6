"""Start the processes of a job: on this node, or by srun on several (torch-free when imported).

A job has one parent, which the workflow starts, and one worker for each process that computes. The
parent computes nothing; its workers run the same command again.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedamole.errors import FedamoleError

logger = logging.getLogger(__name__)

# Tells a worker who started it: "here", "torchrun" or "srun".
LAUNCHER = "FEDAMOLE_LAUNCHER"
# After SIGTERM; SLURM itself waits 30 s before it kills.
GRACE_S = 10


@dataclass(frozen=True)
class Layout:
    """How the processes of a job lie.

    Processes are numbered through: those of lane l are l * ranks ... l * ranks + ranks - 1.
    They fill one node after the other.

    Attributes
    ----------
    lanes
        Clients that are worked on side by side.
    ranks
        Processes that work on one client together.
    nodes
        Nodes of the job.
    cpu_threads
        Threads of each process.
    """

    lanes: int = 1
    ranks: int = 1
    nodes: int = 1
    cpu_threads: int = 1

    @property
    def processes(self) -> int:
        """Processes of the job."""
        return self.lanes * self.ranks

    def __post_init__(self) -> None:
        if self.processes % self.nodes:
            raise FedamoleError(
                f"--nodes {self.nodes} must divide the processes of the job, --at-once * ranks = "
                f"{self.lanes} * {self.ranks} = {self.processes}"
            )


@dataclass(frozen=True)
class Seat:
    """The place of this process in its job.

    Attributes
    ----------
    lane
        Which of the clients at once.
    rank
        Number among the processes of the lane.
    number
        Number among all processes of the job.
    local_number, local_processes
        The same on this node.
    """

    lane: int = 0
    rank: int = 0
    number: int = 0
    local_number: int = 0
    local_processes: int = 1


def is_worker() -> bool:
    """Whether this process was started by :func:`launch`."""
    return LAUNCHER in os.environ


def seat(layout: Layout) -> Seat:
    """Find the place of this process.

    Raises
    ------
    FedamoleError
        If another number of processes was started than the layout has.
    """
    if os.environ.get(LAUNCHER) == "srun":
        _export_slurm_ranks()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != layout.processes:
        raise FedamoleError(
            f"training: ranks * --at-once is {layout.processes}, but {started} processes were "
            "started; fedamole starts them itself, without torchrun or srun in front"
        )
    number = int(os.environ.get("RANK", "0"))
    lane, rank = divmod(number, layout.ranks)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Seat(lane, rank, number, int(os.environ.get("LOCAL_RANK", "0")), here)


def _export_slurm_ranks() -> None:
    """Put what SLURM says of this task into the variables that torch reads."""
    from submitit.helpers import TorchDistributedEnvironment

    # All GPUs of the node stay visible: LOCAL_RANK chooses, as under torchrun.
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def launch(layout: Layout, arguments: Sequence[str]) -> None:
    """Run ``fedamole`` with these arguments in every process of a job, and wait for all.

    Several nodes are used only inside a SLURM job that has them; elsewhere all processes run on
    this machine, which gives the same numbers.

    Raises
    ------
    FedamoleError
        If a process died.
    """
    command = [sys.executable, "-m", "fedamole", *arguments]
    if layout.nodes > 1 and _has_nodes(layout.nodes):
        _by_srun(layout, command)
        return
    if layout.nodes > 1:
        logger.info(
            "no SLURM job of %d nodes: all %d processes run on this machine",
            layout.nodes,
            layout.processes,
        )
    if layout.ranks > 1:
        _by_torchrun(layout, command)
    else:
        _side_by_side(layout, command)


def _has_nodes(nodes: int) -> bool:
    """Whether this process is in a SLURM job of so many nodes."""
    if "SLURM_JOB_ID" not in os.environ:
        return False
    # Snakemake's plugin drops the number; it made the job as large as the layout.
    given = os.environ.get("SLURM_JOB_NUM_NODES") or os.environ.get("SLURM_NNODES")
    return given is None or int(given) >= nodes


def _environment(layout: Layout, launcher: str) -> dict[str, str]:
    """What every worker finds in its environment."""
    # Snakemake sets these to the cores of the whole job; two threads on a busy core are many times
    # slower than one.
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(layout.cpu_threads)), LAUNCHER: launcher}


def srun_command(layout: Layout, command: Sequence[str]) -> list[str]:
    """Command that spreads the processes evenly over the nodes of the job."""
    # Ranks of one client wait for each other: if one dies the others must not wait for ever.
    # Clients of one process each have nothing to do with each other.
    together = int(layout.ranks > 1)
    return [
        "srun",
        f"--nodes={layout.nodes}",
        f"--ntasks={layout.processes}",
        f"--ntasks-per-node={layout.processes // layout.nodes}",
        f"--cpus-per-task={layout.cpu_threads}",
        f"--kill-on-bad-exit={together}",
        *command,
    ]


def _by_srun(layout: Layout, command: Sequence[str]) -> None:
    """One step of the SLURM job over all its nodes."""
    environment = _environment(layout, "srun")
    # Snakemake's plugin removes what submitit needs to know that it is in SLURM, and on how many
    # nodes; srun sets the rest again.
    environment |= {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_NUM_NODES": str(layout.nodes)}
    with _children([(srun_command(layout, command), environment)]) as children:
        _check([child.wait() for child in children])


def _side_by_side(layout: Layout, command: Sequence[str]) -> None:
    """Independent processes on this machine: if one dies the others go on."""
    shared = _environment(layout, "here")
    numbers = ("WORLD_SIZE", "LOCAL_WORLD_SIZE"), ("RANK", "LOCAL_RANK")
    places = [
        dict.fromkeys(numbers[0], str(layout.processes)) | dict.fromkeys(numbers[1], str(number))
        for number in range(layout.processes)
    ]
    with _children([(command, shared | place) for place in places]) as children:
        _check([child.wait() for child in children])


@contextlib.contextmanager
def _children(
    commands: Sequence[tuple[Sequence[str], Mapping[str, str]]],
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start processes; end those that still run when the block is left."""
    children: list[subprocess.Popen[bytes]] = []
    try:
        for command, environment in commands:
            children.append(subprocess.Popen(command, env=environment))
        yield children
    finally:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        for child in children:
            try:
                child.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()


def _check(codes: Sequence[int]) -> None:
    """Say why processes ended badly.

    Raises
    ------
    FedamoleError
        If one did.
    """
    if bad := [code for code in codes if code]:
        raise FedamoleError(f"{len(bad)} of {len(codes)} processes died: {_meaning(bad[0])}")


def _meaning(code: int) -> str:
    """Exit status in words."""
    number = -code if code < 0 else code - 128
    if number == signal.SIGKILL:
        return "killed by the system, often for lack of memory"
    if number in signal.valid_signals():
        return f"ended by {signal.Signals(number).name}"
    return f"exit status {code}; the reason is above"


def _by_torchrun(layout: Layout, command: Sequence[str]) -> None:
    """What torchrun does on one node, without its traceback below our own line."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    before = dict(os.environ)
    # The agent hands its own environment on.
    os.environ.update(_environment(layout, "torchrun"))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=layout.processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        raise FedamoleError(
            f"{len(codes)} of {layout.processes} processes died: {_meaning(codes[0])}"
        ) from error
    except SignalException as error:
        sys.exit(128 + error.sigval)
    finally:
        os.environ.clear()
        os.environ.update(before)
