"""Processes of a job: where each sits, and what happens when one dies."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedamole import launching
from fedamole.errors import FedamoleError
from fedamole.launching import Layout, Seat, srun_command


def seats(monkeypatch: pytest.MonkeyPatch, layout: Layout) -> list[Seat]:
    """Every process of a layout asks for its seat."""
    found = []
    for number in range(layout.processes):
        here = layout.processes // layout.nodes
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", str(layout.processes))
        monkeypatch.setenv("LOCAL_RANK", str(number % here))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        found.append(launching.seat(layout))
    return found


def test_lanes_fill_one_node_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    found = seats(monkeypatch, Layout(lanes=2, ranks=2, nodes=2))
    assert [(seat.lane, seat.rank) for seat in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [seat.local_number for seat in found] == [0, 1, 0, 1]


def test_srun_gets_the_whole_geometry() -> None:
    # Snakemake's plugin drops the variables that srun would read.
    command = srun_command(Layout(lanes=1, ranks=6, nodes=2, cpu_threads=3), ["python"])
    assert command[0] == "srun" and command[-1] == "python"
    assert {"--nodes=2", "--ntasks=6", "--ntasks-per-node=3", "--cpus-per-task=3"} < {*command}
    assert "--kill-on-bad-exit=1" in command
    assert "--kill-on-bad-exit=0" in srun_command(Layout(lanes=4, nodes=2), ["python"])


def test_processes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(FedamoleError, match="--nodes 2 must divide .* = 3 \\* 1 = 3"):
        Layout(lanes=3, nodes=2)


SCRIPT = """
import os, pathlib, sys, time
folder, lane = pathlib.Path(sys.argv[1]), os.environ["RANK"]
if lane == "0":
    {first}
{rest}
(folder / lane).touch()
"""


def run_side_by_side(folder: Path, first: str, rest: str = "") -> None:
    script = folder / "script.py"
    script.write_text(SCRIPT.format(first=first, rest=rest))
    layout = Layout(lanes=3)
    launching._side_by_side(layout, [sys.executable, str(script), str(folder)])


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("os.kill(os.getpid(), 9)", "killed by the system, often for lack of memory"),
        ("os.kill(os.getpid(), 15)", "ended by SIGTERM"),
        ("sys.exit(7)", "exit status 7; the reason is above"),
    ],
)
def test_a_process_that_dies_leaves_the_others_alone(tmp_path: Path, end: str, reason: str) -> None:
    with pytest.raises(FedamoleError, match=f"1 of 3 processes died: {reason}"):
        run_side_by_side(tmp_path, end, rest="time.sleep(0.3)")
    assert {path.name for path in tmp_path.iterdir()} == {"script.py", "1", "2"}


def test_a_parent_that_is_ended_takes_its_processes_along(tmp_path: Path) -> None:
    code = (
        "import sys, signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
        "from fedamole import launching as l;"
        f"l._side_by_side(l.Layout(lanes=2), ['sh', '-c', 'echo $$ > {tmp_path}/$RANK; "
        "exec sleep 60'])"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        deadline = time.monotonic() + 30
        while len([*tmp_path.iterdir()]) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        parent.terminate()
        assert parent.wait(20) == 143
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_workers_know_who_started_them(tmp_path: Path) -> None:
    run_side_by_side(tmp_path, f"assert os.environ['{launching.LAUNCHER}'] == 'here'")
    assert {path.name for path in tmp_path.iterdir()} == {"script.py", "0", "1", "2"}


@pytest.mark.parametrize(
    ("job", "nodes", "expected"), [(None, None, False), ("7", None, True), ("7", "1", False)]
)
def test_several_nodes_are_used_where_the_job_has_them(
    monkeypatch: pytest.MonkeyPatch, job: str | None, nodes: str | None, expected: bool
) -> None:
    for name, value in (("SLURM_JOB_ID", job), ("SLURM_NNODES", nodes)):
        monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert launching._has_nodes(2) is expected
