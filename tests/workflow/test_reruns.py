"""What runs again after a change, and what does not. All of these plan; none trains."""

from pathlib import Path

import pytest
from workflow_study import Study, new_study

pytestmark = pytest.mark.xdist_group("workflow")


def test_a_finished_study_has_nothing_to_do(finished: Study) -> None:
    assert not finished.planned()


def test_one_more_round_trains_one_round(finished: Study, tmp_path: Path) -> None:
    longer = finished.copy(tmp_path / "study", rounds=3)
    planned = longer.planned()
    # FedAMoLE and FedIT each train round 3; FedAMoLE first has to aggregate and assign round 2.
    assert planned["train_clients"] == 2
    assert planned["aggregate"] == 2
    assert planned["assign"] == 2
    assert planned["evaluate_clients"] == 1
    assert not {"prepare_backbone", "partition", "tokenize", "init_server"} & set(planned)


def test_a_new_method_trains_only_that_method(tmp_path: Path) -> None:
    study = new_study(tmp_path / "study", methods=["zero-shot"])
    study.run()
    study.config["methods"] = ["zero-shot", "fedit-ft"]
    study.config["tables"] = {"reference": "fedit-ft"}
    planned = study.planned()
    assert planned["train_clients"] == 2
    assert planned["init_server"] == 1
    assert planned["evaluate_clients"] == 0
    assert not {"prepare_backbone", "partition", "tokenize"} & set(planned)


def test_changed_table_settings_only_write_tables(finished: Study, tmp_path: Path) -> None:
    study = finished.copy(tmp_path / "study", tables={"decimals": 3})
    assert set(study.planned()) == {"describe_study", "draw_tables", "draw_figures", "all"}


def test_a_changed_learning_rate_retrains_but_keeps_the_data(
    finished: Study, tmp_path: Path
) -> None:
    training = {**finished.config["training"], "learning_rate": 0.002}
    planned = finished.copy(tmp_path / "study", training=training).planned()
    assert planned["train_clients"] == 4
    assert not {"prepare_backbone", "partition", "tokenize"} & set(planned)


# Of these settings only the page that lists them all is written again.
PAGE = {"describe_study", "all"}


def test_another_cut_into_jobs_computes_nothing(finished: Study, tmp_path: Path) -> None:
    for number, size in enumerate((1, 2)):
        folder = tmp_path / f"study{number}"
        study = finished.copy(folder, execution={"clients_per_job": size})
        assert set(study.planned()) == PAGE


def test_a_lower_quorum_computes_nothing(finished: Study, tmp_path: Path) -> None:
    study = finished.copy(tmp_path / "study", participation={"quorum": 0.5})
    assert set(study.planned()) == PAGE


def test_a_dry_run_does_not_import_torch(finished: Study, tmp_path: Path) -> None:
    trap = tmp_path / "trap" / "torch"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise RuntimeError('torch was imported')\n")
    fresh = new_study(tmp_path / "study")
    done = fresh.snakemake("--dry-run", PYTHONPATH=str(trap.parent))
    assert done.returncode == 0, done.stderr
    assert "train_clients" in done.stdout + done.stderr
