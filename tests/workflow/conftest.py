"""What the workflow tests share: a finished smoke run, and commands that start at once."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from workflow_study import Study, new_study

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment in which `fedamole` is a fork of a process that has its libraries loaded.

    For studies of many tiny jobs. Everything else is as always: Snakemake, rules, command lines,
    one process per command.
    """
    path = tmp_path_factory.mktemp("warm") / "socket"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(HERE / "warm_server.py"), str(path)], env=environment
    ) as server:
        deadline = time.monotonic() + 120
        while not path.exists() and time.monotonic() < deadline:
            assert server.poll() is None, "the server of warm processes ended"
            time.sleep(0.1)
        yield {
            "PATH": f"{HERE / 'warm'}{os.pathsep}{os.environ['PATH']}",
            "FEDAMOLE_WARM": str(path),
            "OMP_NUM_THREADS": "1",
        }
        server.kill()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, warm: dict[str, str]) -> Study:
    """The smoke study, run once; not to be changed."""
    study = new_study(tmp_path_factory.mktemp("finished") / "study")
    study.environment = warm
    study.run()
    return study
