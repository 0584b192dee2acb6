"""Studies on the test cluster: run them, disturb them, ask SLURM what became of their jobs."""

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workflow_study import REPOSITORY, SMOKE, Study, new_study

from fedamole.progress import ClientProgress, read_progress
from fedamole.slurm import Job, jobs_of_study

SCRIPT = Path(__file__).parent / "slurm_cluster.sh"
FAST = str(Path(__file__).parent / "fast_polling")
# Everything that carries a number, whatever the jobs were.
NUMBERS = ("runs/**/*.h5", "runs/**/*.json", "metrics/**/*", "tables/*", "figures/*")
# Four clients of one method, some seconds each: long enough to be disturbed.
SLOW: dict[str, Any] = {
    "rounds": 1,
    "methods": ["fedamole"],
    "scenarios": [{**SMOKE["scenarios"][0], "clients": 4, "min_examples": 30}],
    "assignment": {"num_experts": 8, "choices": 2, "max_experts": 6},
    "training": {**SMOKE["training"], "steps": 200},
}
# The three lines that a user edits, and what makes tests quick.
EDITS = {
    'slurm_account: "CHANGE_ME"': "slurm_account: lab",
    'slurm_partition: "CHANGE_ME"': "slurm_partition: {partition}",
    "max_runtime: 1440": "max_runtime: 120",
    "max_mem_mb: 500000": "max_mem_mb: 16000",
    "slurm-init-seconds-before-status-checks: 20": "slurm-init-seconds-before-status-checks: 1",
    "latency-wait: 60": "latency-wait: 10",
}


@dataclass
class ClusterStudy(Study):
    """A study with a profile for the test cluster."""

    partition: str = "main"
    edits: dict[str, str] = field(default_factory=dict)

    def command(self, *arguments: str) -> list[str]:
        """The Snakemake command for this study, with the project's profile."""
        local = super().command(*arguments)
        cores = local.index("--cores")
        del local[cores : cores + 2]
        return [*local, "--profile", str(self.profile())]

    def profile(self) -> Path:
        """The project's profile, edited for this cluster."""
        text = (REPOSITORY / "slurm/config.yaml").read_text()
        for old, new in (EDITS | self.edits).items():
            assert old in text, old
            text = text.replace(old, new.format(partition=self.partition))
        (self.folder / "slurm").mkdir(exist_ok=True)
        (self.folder / "slurm/config.yaml").write_text(text)
        return self.folder / "slurm"

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start Snakemake and go on; its output is in the file snakemake.out."""
        with (self.folder / "snakemake.out").open("w") as output:
            return subprocess.Popen(
                self.command(*arguments),
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment(),
                start_new_session=True,
            )

    def said(self) -> str:
        """What the last started Snakemake said."""
        return (self.folder / "snakemake.out").read_text()

    def finish(self, process: "subprocess.Popen[str]") -> None:
        """Wait for success."""
        assert process.wait(timeout=400) == 0, self.said() + self.logs()

    def jobs(self) -> list[Job]:
        """Living jobs of this study."""
        return jobs_of_study(self.results)

    def progress(self, round_: int = 1) -> dict[int, ClientProgress]:
        """What the clients of a round of the first run are doing."""
        folders = [*self.results.glob(f"progress/*/*/round_{round_:03d}")]
        return {item.client: item for folder in folders for item in read_progress(folder)}

    def wait_for_clients(self, number: int, round_: int = 1) -> None:
        """Wait until so many clients are done."""

        wait_for(lambda: len(self.done(round_)) >= number)

    def done(self, round_: int = 1) -> set[int]:
        """Clients of a round of the first run that are done."""
        return {item.client for item in self.progress(round_).values() if item.state == "done"}

    def fedamole(self, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
        """Run a command of fedamole in the folder of the study."""
        return subprocess.run(
            ["fedamole", *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            env=environment() | more,
            timeout=120,
        )


def environment() -> dict[str, str]:
    """Environment in which Snakemake asks SLURM every second."""
    return {**os.environ, "PYTHONPATH": FAST}


def slow_study(folder: Path, partition: str = "main", **changes: Any) -> ClusterStudy:
    """A study of one round whose training takes some seconds per client."""
    config = {**SMOKE, **SLOW, "results": "results", **changes}
    folder.mkdir()
    return ClusterStudy(folder, config, partition=partition)


def smoke_study(folder: Path, partition: str = "main", **changes: Any) -> ClusterStudy:
    """The smoke study for the cluster."""
    return ClusterStudy(folder, new_study(folder, **changes).config, partition=partition)


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def control(*arguments: str) -> None:
    """Kill and start daemons and nodes of the cluster."""
    subprocess.run(["bash", str(SCRIPT), *arguments], check=True, timeout=120)


def slurm(*command: str) -> str:
    """Run one of SLURM's commands."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def submitted(said: str) -> list[int]:
    """Numbers of the SLURM jobs that Snakemake says it submitted."""
    lines = [line for line in said.splitlines() if "submitted with SLURM jobid" in line]
    return [int(line.split("SLURM jobid ")[1].split()[0]) for line in lines]


def accounted(job: int, *fields: str) -> list[str]:
    """What accounting says of a job, once it says anything."""
    command = ("sacct", "-X", "-n", "-P", "-j", str(job), "-o", ",".join(fields))
    wait_for(lambda: slurm(*command), 30)
    return slurm(*command).splitlines()[0].split("|")
