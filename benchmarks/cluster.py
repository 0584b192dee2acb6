"""What SLURM costs: wall time of the ways to cut rounds into jobs, on the test cluster.

Start the cluster first (``tests/cluster/slurm_cluster.sh start``), or call ``make bench-cluster``.
Prints one line per way. Snakemake asks SLURM every second here; on a shared cluster every 20 to 180
seconds, and every round waits for that.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
for folder in ("workflow", "cluster"):
    sys.path.insert(0, str(REPOSITORY / "tests" / folder))

from cluster_study import ClusterStudy, environment  # noqa: E402
from workflow_study import SMOKE, Study  # noqa: E402

from fedamole.progress import read_progress  # noqa: E402

WAYS: dict[str, dict[str, Any] | None] = {
    "without SLURM": None,
    "one job a client": {"clients_per_job": 1},
    "two clients a job": {"clients_per_job": 2},
    "ten clients a job": {"clients_per_job": 10},
    "one job a round": {"clients_per_job": "all"},
    "one job a round, 2 nodes, 4 at once": {
        "clients_per_job": "all",
        "clients_at_once": 4,
        "nodes": 2,
    },
}


def study_of(folder: Path, args: argparse.Namespace, execution: dict[str, Any] | None) -> Study:
    """A study of the smoke model with so many clients and rounds."""
    scenario = {**SMOKE["scenarios"][0], "clients": args.clients, "partition": "iid"}
    scenario |= {"min_examples": 4, "max_test": 2, "max_eval": 2, "max_embedding": 2}
    config = {
        **SMOKE,
        "results": "results",
        "rounds": args.rounds,
        "methods": ["fedamole"],
        "scenarios": [scenario],
        "assignment": {"num_experts": args.clients * 2, "choices": 2, "max_experts": 8},
        "training": {**SMOKE["training"], "steps": args.steps},
        "execution": execution or {},
    }
    folder.mkdir()
    return Study(folder, config) if execution is None else ClusterStudy(folder, config)


def prepare(study: Study) -> None:
    """Make what no round depends on, without taking its time."""
    command = Study.command(study, "--quiet", "all", "--until", "init_server", "tokenize")
    subprocess.run(command, check=True, capture_output=True)


def run(study: Study) -> dict[str, float]:
    """Run a prepared study.

    Returns
    -------
    dict
        Seconds of wall time, jobs, seconds of work summed over clients, and seconds in which no
        client was worked on.
    """
    began = time.monotonic()
    done = subprocess.run(
        study.command("--quiet", "rules"), capture_output=True, text=True, env=environment()
    )
    wall = time.monotonic() - began
    if done.returncode:
        sys.exit(done.stdout + done.stderr + study.logs())
    clients = [
        (item.started, item.started + (item.seconds or 0))
        for folder in study.results.glob("progress/*/*/*")
        for item in read_progress(folder)
    ]
    return {
        "wall": wall,
        "jobs": (done.stdout + done.stderr).count("submitted with SLURM jobid"),
        "work": sum(end - start for start, end in clients),
        "idle": wall - covered(clients),
    }


def covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def main() -> None:
    """Measure every way, in turns, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=1)
    default = [way for way in WAYS if way != "ten clients a job"]
    parser.add_argument("--ways", nargs="+", default=default, choices=list(WAYS), metavar="WAY")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for number, way in enumerate(args.ways):
                study = study_of(Path(folder) / f"{repeat}-{number}", args, WAYS[way])
                prepare(study)
                found[way].append(run(study))
                print(".", end="", flush=True, file=sys.stderr)
    print(f"\n{args.rounds} rounds x {args.clients} clients x {args.steps} steps, smoke model")
    print("wall: all rounds; clients: summed over them; idle: no client was worked on")
    print(
        f"{'way':38} {'wall s':>8} {'jobs':>5} {'clients s':>10} {'idle s':>8} {'idle s/job':>11}"
    )
    for way, runs in found.items():
        middle = sorted(runs, key=lambda one: one["wall"])[len(runs) // 2]
        wall, jobs, work, idle = (middle[key] for key in ("wall", "jobs", "work", "idle"))
        each = f"{idle / jobs:11.1f}" if jobs else ""
        print(f"{way:38} {wall:8.1f} {jobs:5.0f} {work:10.1f} {idle:8.1f} {each}")


if __name__ == "__main__":
    main()
