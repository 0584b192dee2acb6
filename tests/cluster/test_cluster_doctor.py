"""`fedamole doctor` on a real SLURM: what is well, and one line for every mistake."""

import getpass
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedamole import slurm, slurm_site
from fedamole.config_files import read_yaml
from fedamole.errors import FedamoleError

pytestmark = pytest.mark.cluster

CHECKOUT = Path(__file__).parents[2]
PROFILE: dict[str, Any] = {
    "executor": "slurm",
    "jobs": 4,
    "retries": 1,
    "keep-going": True,
    "rerun-incomplete": True,
    "slurm-status-command": "squeue",
    "slurm-init-seconds-before-status-checks": 5,
}
RESOURCES = {"slurm_partition": "main", "slurm_account": "lab", "gpu_request": "gres"}
EXECUTION = {"mem_mb": 500, "runtime": 5}
Doctor = Callable[..., tuple[int, list[str]]]


@pytest.fixture(autouse=True)
def _needs_slurm() -> None:
    try:
        slurm.call("squeue", "--noheader")
    except FedamoleError as error:
        pytest.skip(f"no SLURM: {error}")


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    """Run the command on the smoke study: exit status and lines.

    ``resources`` and ``execution`` change the profile and the study, ``results`` the folder;
    ``within`` is a command that runs it.
    """

    def run(
        *arguments: str,
        resources: dict[str, Any] | None = None,
        execution: dict[str, Any] | None = None,
        results: Path = tmp_path / "results",
        within: Sequence[str] = (),
    ) -> tuple[int, list[str]]:
        profile = PROFILE | {"default-resources": RESOURCES | (resources or {})}
        study = read_yaml(CHECKOUT / "configs" / "smoke.yaml") | {"results": str(results)}
        study["execution"] = EXECUTION | (execution or {})
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(profile))
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
        command = [*within, sys.executable, "-m", "fedamole", "doctor", *arguments]
        command += ["--profile", str(tmp_path), "--configfile", str(tmp_path / "study.yaml")]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=CHECKOUT, env=environment, timeout=300
        )
        assert done.stderr == ""
        return done.returncode, done.stdout.splitlines()

    return run


def level(lines: list[str], name: str) -> list[str]:
    """Lines of a level."""
    return [line for line in lines if line.startswith(name)]


def test_a_good_configuration_has_no_error(doctor: Doctor) -> None:
    code, lines = doctor()
    assert (code, level(lines, "error")) == (0, [])
    things = {line[9:].split("  ")[0].strip() for line in level(lines, "ok")}
    assert things >= {"SLURM", "squeue", "status by squeue", "slurm_partition"}
    assert things >= {"training jobs", "dry submission", "results folder", "backbone", "data"}


def test_a_node_reads_and_answers(doctor: Doctor, tmp_path: Path) -> None:
    code, lines = doctor("--from-node")
    assert (code, level(lines, "error")) == (0, [])
    shared = next(line for line in lines if "node: shared folder" in line)
    assert shared.startswith("ok") and f"{tmp_path}: read and written" in shared
    assert any(line.startswith("ok       answer of the node") for line in lines)
    assert any(line.startswith("ok       node: libraries") for line in lines)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.yaml", "study.yaml"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"resources": {"slurm_partition": "nope"}},
            "slurm_partition      nope does not exist; allowed: main, ",
        ),
        (
            {"execution": {"gpus": 9}},
            "GPUs                 jobs ask for 9 GPUs on a node; the largest of main has 4",
        ),
        (
            {"execution": {"gpus": 1}, "resources": {"gpu_type": "a100"}},
            "GPUs                 partition main has no GPUs of type a100",
        ),
        (
            {"execution": {"runtime": 500}},
            "run time             jobs ask for 500 min; partition main allows 120",
        ),
        (
            {"execution": {"mem_mb": 17000}},
            "memory               jobs ask for 17000 MB on a node; the largest node of main has",
        ),
        (
            {"execution": {"nodes": 5, "clients_at_once": 5}},
            "nodes                jobs ask for 5; in main ",
        ),
        (
            {"results": Path("/proc/none")},
            "results folder       /proc/none cannot be written",
        ),
        ({"resources": {"constraint": "moon"}}, "dry submission       SLURM refuses"),
    ],
    ids=["partition", "gpus", "type", "time", "memory", "nodes", "absent", "feature"],
)
def test_every_mistake_is_one_error(doctor: Doctor, changes: Any, expected: str) -> None:
    code, lines = doctor(**changes)
    (error,) = level(lines, "error")
    assert code == 1
    assert error.startswith(f"error    {expected}")


def test_an_account_of_others_is_one_error(doctor: Doctor) -> None:
    user = getpass.getuser()
    try:
        slurm_site.accounts_of(user)
    except FedamoleError as error:
        pytest.skip(f"this SLURM keeps no accounts: {error}")
    code, lines = doctor(resources={"slurm_account": "nolab"})
    (line,) = level(lines, "error")
    assert code == 1
    assert f"slurm_account        nolab is no account of {user}; allowed: lab" in line


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system that is mounted for reading: root may write to all others."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_results_folder_is_one_error(doctor: Doctor, read_only: Path) -> None:
    code, lines = doctor("--from-node", results=read_only)
    (error,) = level(lines, "error")
    assert code == 1
    assert f"{read_only} cannot be written (Read-only file system" in error
    assert "warning  node                 not checked: correct the errors above first" in lines


def test_a_folder_that_nodes_do_not_see_is_one_error(doctor: Doctor, tmp_path: Path) -> None:
    """A file system that only this process has: for the nodes' daemons the folder is empty."""
    folder = tmp_path / "private"
    folder.mkdir()
    script = 'mount -t tmpfs tmpfs "$0" && mkdir "$0/results" && exec "$@"'
    within = ["unshare", "--mount", "sh", "-c", script, str(folder)]
    if subprocess.run([*within, "true"], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    code, lines = doctor("--from-node", results=folder / "results", within=within)
    (error,) = level(lines, "error")
    assert code == 1
    assert error.startswith(f"error    node: shared folder  {folder / 'results'} on this node is")


def test_slurm_itself_takes_jobs_that_never_start_or_are_never_submitted() -> None:
    """Why times and accounts are compared here, beside the dry submission."""
    assert slurm_site.try_submission(["--partition=main", "--time=500"])[0]
    assert slurm_site.try_submission(["--partition=main", "--account=nolab"])[0]
    assert not slurm_site.try_submission(["--partition=nope"])[0]
