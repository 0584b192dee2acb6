"""A real SLURM on this machine; `make test-cluster` starts it."""

import shutil
import subprocess

import pytest
from cluster_study import SLOW
from workflow_study import Study, new_study


@pytest.fixture(scope="session", autouse=True)
def cluster() -> None:
    """Skip where there is no SLURM."""
    if not shutil.which("sinfo"):
        pytest.skip("no SLURM here: run `make test-cluster`")
    found = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True)
    if "spare" not in found.stdout.split():
        pytest.skip("not the test cluster: run `make test-cluster`")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The slow study, run without SLURM; not to be changed."""
    study = new_study(tmp_path_factory.mktemp("undisturbed") / "study", **SLOW)
    study.run()
    return study
