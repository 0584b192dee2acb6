"""Packs of clients: the same bytes in any job and on any process, and after a kill."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from workflow_study import SMOKE, Study, new_study

pytestmark = pytest.mark.xdist_group("workflow")

NUMBERS = ("runs/**/*.h5", "runs/**/*.json", "metrics/**/*", "tables/*", "figures/*")
# The clients of one cannot be packed.
METHODS = ["fedamole", "fdlora", "fml"]
PACKS = {**SMOKE["training"], "pack_clients": 2}


def packed(folder: Path, warm: dict[str, str], **changes: Any) -> Study:
    study = new_study(folder, methods=METHODS, training=PACKS, **changes)
    study.environment = warm
    return study


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, warm: dict[str, str]) -> Study:
    """All clients of a round in one job: a pack of two, and a pack of one."""
    study = packed(tmp_path_factory.mktemp("packs") / "study", warm)
    study.run()
    return study


def test_packs_give_the_same_bytes_in_any_job(
    together: Study, tmp_path: Path, warm: dict[str, str]
) -> None:
    study = packed(tmp_path / "study", warm, execution={"clients_per_job": 2})
    study.run()
    assert study.contents(*NUMBERS) == together.contents(*NUMBERS)


def test_packs_are_spread_over_ranks(together: Study, tmp_path: Path, warm: dict[str, str]) -> None:
    study = packed(tmp_path / "study", warm)
    study.config |= {"methods": ["fedamole"], "training": {**PACKS, "ranks": 2}}
    study.run()
    run = "runs/*/fedamole/**/*"
    assert study.contents(run) == together.contents(run)


def test_a_pack_killed_between_its_clients_gives_the_same_bytes(
    together: Study, tmp_path: Path, warm: dict[str, str]
) -> None:
    study = packed(tmp_path / "study", warm)
    study.config["methods"] = ["fedamole"]
    name = "chatterbot-dir0.5-s42/fedamole/round_001/metrics_000.json"
    kept, published = study.results / "progress" / name, study.results / "runs" / name
    with subprocess.Popen(
        study.command("--quiet", "all"),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        deadline = time.monotonic() + 240
        while not kept.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
    assert kept.exists()
    assert not published.exists()
    assert study.snakemake("--unlock").returncode == 0
    done = study.snakemake("--quiet", "rules", "--rerun-incomplete")
    assert done.returncode == 0, done.stderr + study.logs()
    assert "were done by an earlier attempt" in study.logs()
    run = "runs/*/fedamole/**/*"
    assert study.contents(run) == together.contents(run)


def test_other_packs_are_other_numbers_of_which_tables_tell(
    together: Study, tmp_path: Path
) -> None:
    study = together.copy(tmp_path / "study", training={**PACKS, "pack_clients": 3})
    planned = study.planned()
    # Two methods in two rounds; the clients of the third train alone as before.
    assert planned["train_clients"] == 4
    assert planned["aggregate"] == 2
