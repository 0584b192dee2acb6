"""The replica that comes along: its tables are drawn from what is committed, and from all of it."""

import csv
import shutil
import subprocess
from pathlib import Path

import pytest
from workflow_study import REPOSITORY

from fedamole.cache import check_cache
from fedamole.config import Config, load_config
from fedamole.config_files import read_yaml
from fedamole.errors import FedamoleError

CACHE = REPOSITORY / "paper/replica"


@pytest.fixture(scope="module")
def replica() -> Config:
    path = REPOSITORY / "configs/replica.yaml"
    return load_config(read_yaml(path), REPOSITORY / "configs", str(path), [path.parent])


def test_the_replica_has_what_the_paper_compares(replica: Config) -> None:
    assert len(replica.points) == 7
    assert {"fedamole", "fedamole-static", "fedit-ft", "fdlora"} <= set(replica.methods)
    assert {scenario.clients for scenario, _ in replica.scenario_seeds().values()} == {10}


def test_any_file_that_is_gone_is_named(replica: Config, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(CACHE, folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) == 1 + 7 * len(replica.seeds) * len(replica.methods)
    for path in files:
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(FedamoleError) as error:
            check_cache(folder, replica)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
        path.write_bytes(content)
    assert len(check_cache(folder, replica).metrics) == len(files) - 1


def test_the_study_of_the_learning_rate_is_whole_too() -> None:
    path = REPOSITORY / "configs/replica-learning-rate.yaml"
    config = load_config(read_yaml(path), REPOSITORY / "configs", str(path), [path.parent])
    found = check_cache(REPOSITORY / str(config.cache), config)
    assert len(found.metrics) == len(config.points) * len(config.methods)
    assert config.training.learning_rate == 5e-4


@pytest.mark.xdist_group("workflow")
def test_the_tables_are_drawn_without_training(replica: Config, tmp_path: Path) -> None:
    command = ["snakemake", "tables", "--configfile", str(REPOSITORY / "configs/replica.yaml")]
    command += ["--config", "mode=cached", f"cache={CACHE}", "results=results", "--cores", "1"]
    command += ["--snakefile", str(REPOSITORY / "Snakefile"), "--directory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "results/tables/main.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["scenario"] for row in rows} == {*replica.points, "average"}
    # The average gain is that over rival approaches, not over variants of FedAMoLE.
    scores = {(row["scenario"], row["method"]): float(row["score_mean"]) for row in rows}
    best = {
        name: max(scores[name, rival] for rival in ("fedit-ft", "fdlora"))
        for name in replica.points
    }
    gains = [scores[name, "fedamole"] / best[name] - 1 for name in replica.points]
    [found] = [float(row["gain"]) for row in rows if row["scenario"] == "average" and row["gain"]]
    assert found == pytest.approx(sum(gains) / 7)
