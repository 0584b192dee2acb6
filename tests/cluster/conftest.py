"""A real SLURM on this machine; `make test-cluster` starts it."""

import os
import shutil
import subprocess

import pytest
from cluster_study import SLOW
from workflow_study import Study, new_study


@pytest.fixture(scope="session", autouse=True)
def cluster() -> None:
    """Skip where there is no SLURM; `make test-cluster` says that there must be one."""
    is_here = shutil.which("sinfo") is not None
    if is_here:
        found = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True)
        is_here = "spare" in found.stdout.split()
    if not is_here:
        give_up = pytest.fail if os.environ.get("FEDAMOLE_TEST_CLUSTER") else pytest.skip
        give_up("the test cluster is not there: run `make test-cluster`")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The slow study, run without SLURM; not to be changed."""
    study = new_study(tmp_path_factory.mktemp("undisturbed") / "study", **SLOW)
    study.run()
    return study
