"""What ``fedamole plan`` says against the real workflow: its jobs, files, times; and pruning."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from workflow_study import REPOSITORY, SMOKE, Study, new_study

from fedamole.cli.study import Study as Known
from fedamole.cli.study import read_benchmarks, read_study
from fedamole.config import load_config
from fedamole.planning.memory import job_memory_mb
from fedamole.planning.volumes import Volumes, disk_of, volumes_of
from fedamole.planning.workload import RunWork, job_counts, works_of

pytestmark = pytest.mark.xdist_group("workflow")

SCENARIO = "chatterbot-dir0.5-s42"
METHODS = ["fedamole", "fedit", "fedit-ft", "zero-shot"]


def fedamole(study: Study, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the folder of a study."""
    study.command()  # Writes the config file.
    command = [sys.executable, "-m", "fedamole", *arguments, "--configfile", "config.yaml"]
    return subprocess.run(command, cwd=study.folder, capture_output=True, text=True, timeout=300)


def known(study: Study) -> Known:
    """What a plan knows of a study."""
    config = load_config(study.config, REPOSITORY / "configs")
    return read_study(config.model_copy(update={"results": str(study.results)}))


def volumes(study: Study) -> dict[str, tuple[RunWork, Volumes]]:
    """Computed volumes by run."""
    facts = known(study)
    assert facts.size
    scenario = facts.config.scenarios[0]
    return {
        work.run: (work, volumes_of(facts.config, facts.size, scenario, work))
        for work in works_of(facts.config)
    }


# Jobs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"execution": {"clients_per_job": 1}},
        {"execution": {"clients_per_job": 2}, "rounds": 3},
        {"methods": ["fedit-ft"], "rounds": 1},
        {"methods": ["fedit", "fedamole"], "rounds": 1},
        {"methods": ["zero-shot"], "seeds": [1, 2]},
        {"methods": ["fedamole"], "seeds": [1, 2], "execution": {"clients_per_job": 2}},
    ],
)
def test_jobs_are_those_that_the_workflow_plans(changes: dict[str, Any], tmp_path: Path) -> None:
    methods = changes.get("methods", METHODS)
    study = new_study(tmp_path / "study", **{"tables": {"reference": methods[0]}, **changes})
    planned = study.planned()
    assert planned.pop("all") == 1
    assert job_counts(load_config(study.config, REPOSITORY / "configs")) == planned


def test_a_large_study_is_gathered_by_a_short_command(tmp_path: Path) -> None:
    """Linux takes 128 KiB for one argument of a process, here the text that bash gets."""
    study = new_study(
        tmp_path / "study",
        methods=["fedit-ft"],
        scenarios=[{**SMOKE["scenarios"][0], "clients": 50}],
        rounds=30,
        results="r" * 60,
    )
    done = study.snakemake("--dry-run", "--printshellcmds")
    assert done.returncode == 0, done.stdout + done.stderr
    command = (done.stdout + done.stderr).partition("printf ")[2].partition("| tee")[0]
    assert "/round_030/" in command and "fedamole gather" in command
    assert len(command) < 2**16


@pytest.mark.parametrize("execution", [{"clients_per_job": 2}, {"clients_per_job": "all"}])
def test_jobs_of_those_who_take_part_are_counted(execution: dict[str, Any], tmp_path: Path) -> None:
    study = new_study(
        tmp_path / "study",
        methods=["fedamole", "fedit", "local", "centralised"],
        participation={"fraction": 0.6, "dropout_rate": 0.2, "quorum": 0.5},
        scenarios=[{**SMOKE["scenarios"][0], "clients": 6, "min_examples": 20}],
        seeds=[1, 2],
        rounds=3,
        execution=execution,
    )
    planned = study.planned()
    assert planned.pop("all") == 1
    assert job_counts(load_config(study.config, REPOSITORY / "configs")) == planned


def test_jobs_of_scenarios_of_different_size_are_counted_too(tmp_path: Path) -> None:
    study = new_study(tmp_path / "study", execution={"clients_per_job": 2})
    first = study.config["scenarios"][0]
    study.config["scenarios"] = [first, {**first, "name": "five", "clients": 5}]
    study.config["assignment"] = {"num_experts": 6, "choices": 2, "max_experts": 6}
    planned = study.planned()
    assert planned.pop("all") == 1
    assert job_counts(load_config(study.config, REPOSITORY / "configs")) == planned


# Bytes


@pytest.mark.parametrize("run", ["fedamole", "fedit"])
def test_traffic_is_that_of_the_real_files(run: str, finished: Study) -> None:
    folder = finished.results / "runs" / SCENARIO / run
    _, computed = volumes(finished)[run]
    uploads = [path.stat().st_size for path in folder.glob("round_*/client_*.h5")]
    assert len(uploads) == 2 * 3
    # Clients hold different numbers of experts; together they hold E c.
    assert computed.upload == pytest.approx(sum(uploads) / len(uploads), rel=0.1)
    pools = [path.stat().st_size for path in folder.glob("round_*/pool.h5")]
    assert computed.pool == pytest.approx(max(pools), rel=0.1)


def test_a_client_reads_what_it_sends_but_for_embeddings(finished: Study) -> None:
    from fedamole.pool_files import read_assignment, read_client_state

    folder = finished.results / "runs" / SCENARIO / "fedamole" / "round_001"
    assignment = read_assignment(folder / "assignment.h5")
    states = [read_client_state(folder / "pool.h5", assignment, client) for client in range(3)]
    numbers = [
        sum(array.nbytes for array in (*group.experts.values(), *group.shared.values()))
        for state in states
        for group in state.groups.values()
    ]
    _, computed = volumes(finished)["fedamole"]
    assert computed.download == sum(numbers) / 3


@pytest.mark.parametrize("run", ["fedamole", "fedit", "zero-shot"])
def test_disk_is_that_of_the_real_rounds(run: str, finished: Study) -> None:
    facts = known(finished)
    work, computed = volumes(finished)[run]
    disk = disk_of(facts.config, computed, SCENARIO, work)
    real = (finished.results / "runs" / SCENARIO / run).glob("round_*/*.h5")
    assert disk == pytest.approx(sum(path.stat().st_size for path in real), rel=0.1)


# What the results folder says


def test_a_plan_of_a_finished_study_counts_and_measures(finished: Study) -> None:
    done = fedamole(finished, "plan")
    assert done.returncode == 0, done.stderr
    assert "exact, from results/backbones/tiny/backbone.json" in done.stdout
    assert "Counted: chatterbot-dir0.5:" in done.stdout
    assert "computed" not in done.stdout.split("What a job")[0]
    facts = known(finished)
    assert facts.data[SCENARIO].eval <= 8
    times = read_benchmarks(facts.config)
    assert set(times) == {
        (SCENARIO, "fedamole", "train_clients"),
        (SCENARIO, "fedit", "train_clients"),
        (SCENARIO, "fedit", "evaluate_clients"),
        (SCENARIO, "zero-shot", "evaluate_clients"),
    }


def test_times_of_other_settings_do_not_count(finished: Study, tmp_path: Path) -> None:
    training = {**finished.config["training"], "steps": 100}
    changed = finished.copy(tmp_path / "study", training=training)
    # The zero-shot model is not trained.
    assert set(read_benchmarks(known(changed).config)) == {
        (SCENARIO, "zero-shot", "evaluate_clients")
    }


def test_jobs_took_less_memory_than_they_ask_for(finished: Study) -> None:
    facts = known(finished)
    paths = finished.results.glob("benchmarks/*/*/round_*/*_clients_*.tsv")
    peaks = [float(path.read_text().splitlines()[1].split("\t")[2]) for path in paths]
    assert peaks
    assert max(peaks) < job_memory_mb(facts.config, facts.size)


def test_a_plan_needs_no_results_and_says_what_it_guessed(tmp_path: Path) -> None:
    study = new_study(tmp_path / "study")
    done = fedamole(study, "plan")
    assert done.returncode == 0, done.stderr
    assert "approximate, from backbone: generate" in done.stdout
    assert "Guess: chatterbot-dir0.5: 32 tokens a sequence" in done.stdout
    assert not study.results.exists()
    untrained = new_study(tmp_path / "untrained", methods=["zero-shot"])
    untrained.config["tables"] = {"reference": "zero-shot"}
    done = fedamole(untrained, "plan")
    assert done.returncode == 0, done.stderr
    assert "Nothing is trained" in done.stdout
    study.config["backbone"] = {"name": "somewhere", "hub": "somebody/something"}
    done = fedamole(study, "plan")
    assert done.returncode == 0, done.stderr
    assert "train_clients" in done.stdout
    assert "The size of the model is unknown" in done.stdout
    study.config["rounds"] = 0
    done = fedamole(study, "plan")
    assert done.returncode == 2
    assert done.stderr.startswith("fedamole: config.yaml: rounds")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_calibration_measures_here(tmp_path: Path) -> None:
    study = new_study(
        tmp_path / "study",
        scenarios=[{**SMOKE["scenarios"][0], "clients": 6, "min_examples": 20}],
        participation={"fraction": 0.5},
        training={**SMOKE["training"], "min_steps": 2},
    )
    done = fedamole(study, "plan", "--calibrate")
    assert done.returncode == 0, done.stderr
    assert f"Measured here on clients of {SCENARIO}:" in done.stdout
    assert not study.results.exists()


# Pruning


def uploads(study: Study) -> set[str]:
    """Uploads and pools that are there, as run/round/file."""
    folder = study.results / "runs" / SCENARIO
    files = [*folder.glob("*/*/client_*.h5"), *folder.glob("*/*/pool.h5")]
    return {str(path.relative_to(folder)) for path in files}


def test_nothing_runs_again_after_pruning(finished: Study, tmp_path: Path) -> None:
    study = finished.copy(tmp_path / "study")
    before = uploads(study)
    assert fedamole(study, "prune", "--keep", "last", "--dry-run").returncode == 0
    assert uploads(study) == before
    size = sum(path.stat().st_size for path in study.results.rglob("client_*.h5"))
    done = fedamole(study, "prune", "--keep", "last")
    assert done.returncode == 0, done.stderr
    gone = before - uploads(study)
    # Round 2 starts from the pool of round 1.
    assert gone == {
        f"{run}/round_001/client_{client:03d}.h5"
        for run in ("fedamole", "fedit")
        for client in range(3)
    }
    freed = size - sum(path.stat().st_size for path in study.results.rglob("client_*.h5"))
    assert f"together: freed {freed / 2**20:.1f} MiB" in done.stdout
    assert not study.planned()
    assert "freed 0.0 MiB" in fedamole(study, "prune", "--keep", "1").stdout.splitlines()[-1]


def test_a_pruned_study_draws_its_tables_again(finished: Study, tmp_path: Path) -> None:
    study = finished.copy(tmp_path / "study", tables={"decimals": 3})
    tables = study.contents("tables/clients.csv")
    assert fedamole(study, "prune", "--keep", "last").returncode == 0
    assert set(study.planned()) == {"describe_study", "draw_tables", "draw_figures", "all"}
    (study.results / "tables/clients.csv").unlink()
    study.run()
    assert study.contents("tables/clients.csv") == tables


def test_a_pruned_study_can_go_on(finished: Study, tmp_path: Path) -> None:
    pruned, whole = (finished.copy(tmp_path / name) for name in ("pruned", "whole"))
    assert fedamole(pruned, "prune", "--keep", "last").returncode == 0
    for study in (pruned, whole):
        study.config["rounds"] = 4
    assert pruned.planned() == whole.planned()


def test_an_unfinished_study_is_not_pruned(finished: Study, tmp_path: Path) -> None:
    study = finished.copy(tmp_path / "study", rounds=3)
    before = uploads(study)
    done = fedamole(study, "prune", "--keep", "last")
    assert done.returncode == 2
    assert "has 2 rounds, the config says 3" in done.stderr
    study.config["rounds"] = 2
    (study.results / "metrics" / SCENARIO / "fedit.jsonl").unlink()
    done = fedamole(study, "prune", "--keep", "last")
    assert done.returncode == 2
    assert "only a finished study is pruned" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert uploads(study) == before
