"""What the server's work between two rounds costs, and how fast a command starts.

Commands run in processes of their own, start-up included; CPU time and most resident memory are
those of the process:

    python benchmarks/server.py [--quick]

The targets are those of issue 5: the 32 modules of the paper's size scored and assigned in 20 ms,
3000 experts and 1000 clients in 3 s, 100 uploads of 20 MB averaged in 4 s and 0.5 GB, commands
without torch started in 0.4 s.
"""

# M = modules, E = domain experts of one module, K = clients, R = rank

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from assignment import Size as Crowd
from assignment import make_module
from measuring import Claim, claim, interleaved
from server_round import TOP_K, RoundFiles, Size, run_command, run_python, write_round

from fedamole.assignment import assign_all, assign_experts, random_scores, score_experts
from fedamole.pool_files import read_assignment, read_client_state

MODULES, RANK = 32, 8
START = ("--help", "aggregate --help", "assign --help", "show --help", "status --help")
START += ("pool show --help",)
# Uploads of 20 MB: 4.2 experts per module.
TEN = Size(clients=10, experts=21)
HUNDRED = Size(clients=100, experts=30, choices=14)
MANY_EXPERTS = Size(clients=100, experts=210, choices=2)
# What is read and hashed alone, by a process that has imported the same.
READ = """
import hashlib
import fedamole.cli.server, fedamole.methods.fedamole, fedamole.pool_files
from pathlib import Path
for path in map(Path, sys.argv):
    with path.open("rb") as stream:
        hashlib.file_digest(stream, "sha256")
"""


def measure(quick: bool) -> list[Claim]:
    """Measure all; quick: fewer repeats, 10 uploads, a tenth of the experts and clients."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            *_assigning(repeats=5 if quick else 25),
            *_assigning_a_crowd(quick),
            *_aggregating(Path(folder), quick),
            *_starting(repeats=2 if quick else 7),
        ]


def _assigning(repeats: int) -> Iterator[Claim]:
    """Score and assign all modules of the paper's size."""
    rng, size = np.random.default_rng(0), Size()
    experts = rng.standard_normal((MODULES, size.experts, RANK), dtype=np.float32)
    clients = rng.standard_normal((MODULES, size.clients, RANK), dtype=np.float32)
    settings, names = size.stage.assignment, tuple(map(str, range(MODULES)))

    def step() -> None:
        assign_all(score_experts(experts, clients), settings, TOP_K, names, 1)

    seconds = interleaved({"all": step}, repeats)["all"]
    name = f"scoring and assigning {MODULES} modules, {size.experts} experts x {size.clients}"
    yield claim(f"{name} clients", 1000 * seconds, unit="ms", target=20.0)


def _assigning_a_crowd(quick: bool) -> Iterator[Claim]:
    """Assign one module of many experts and clients, of scores as they are and in a first round."""
    crowd = Crowd(300, 100) if quick else Crowd(3000, 1000)
    rng = np.random.default_rng(0)
    laws = {
        "trained scores": make_module(crowd, 1.0, 0).scores,
        "nearly equal scores": make_module(crowd, 0.03, 0).scores,
        "random scores": random_scores(rng, 1, crowd.experts, crowd.clients)[0],
    }
    for law, scores in laws.items():
        seconds = interleaved(
            {"all": lambda scores=scores: assign_experts(scores, crowd.choices, 2, 8)},
            repeats=3,
            warm_up=0,
        )
        name = f"assigning {crowd.experts} experts x {crowd.clients} clients, {law}"
        yield claim(name, seconds["all"], unit="s", target=None if quick else 3.0)


def _aggregating(folder: Path, quick: bool) -> Iterator[Claim]:
    """Average uploads by the command, against a process that reads and hashes the same files."""
    for size in (TEN,) if quick else (TEN, HUNDRED, MANY_EXPERTS):
        files = write_round(folder / f"{size.clients}-{size.experts}", size)
        costs, floors = [], []
        for _ in range(5 if size == TEN else 3):
            costs.append(run_command(files.aggregate))
            floors.append(run_python(READ, *map(str, files.uploads)))
        cpu, floor = (np.array([cost.cpu_s for cost in each]) for each in (costs, floors))
        peaks = np.array([cost.peak_gb for cost in costs])
        megabytes = files.uploads[0].stat().st_size / 1e6
        name = f"{size.clients} uploads of {megabytes:.0f} MB, {size.experts} experts"
        target = 4.0 if size == HUNDRED else None
        yield claim(f"averaging {name}", cpu, unit="s", target=target)
        yield claim(f"memory of averaging {name}", peaks, unit="GB", target=0.5)
        yield claim(f"averaging over start and hashes alone, {name}", cpu / floor)
        yield _reading_a_client(files, name)
        shutil.rmtree(files.pool.parent)


def _reading_a_client(files: RoundFiles, name: str) -> Claim:
    """Count the bytes that are read of a pool for one client, over those of its tensors."""
    assignment = read_assignment(files.assignment)
    before = _bytes_asked()
    state = read_client_state(files.pool, assignment, client=0)
    took = _bytes_asked() - before
    held = sum(
        tensor.nbytes
        for group in state.groups.values()
        for tensor in (*group.experts.values(), *group.shared.values())
    )
    ratio = np.array([took / held])
    return claim(f"bytes read over bytes held by a client, pool of {name}", ratio, target=1.01)


def _bytes_asked() -> int:
    """Bytes that this process has asked of files so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def _starting(repeats: int) -> Iterator[Claim]:
    """Start commands that need no torch."""
    for arguments in START:
        seconds = np.array([run_command(arguments.split()).cpu_s for _ in range(repeats)])
        yield claim(f"start of fedamole {arguments}", seconds, unit="s", target=0.4)


def main() -> None:
    """Print every claim beside its target."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    for found in measure(parser.parse_args().quick):
        goal = "" if found.target is None else f", target {found.target:g} {found.unit}"
        spread = f"[{found.low:.3g}, {found.high:.3g}]"
        print(f"{found.name}: {found.value:.3g} {spread} {found.unit}{goal}")


if __name__ == "__main__":
    main()
