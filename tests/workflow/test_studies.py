"""Studies beyond the smoke config: own data, classification, several scenarios, several ranks."""

import json
from pathlib import Path

import pytest
from workflow_study import FRUIT, new_study, write_fruit

from fedamole.artifacts import Header

pytestmark = pytest.mark.xdist_group("workflow")


def test_own_data_in_scenarios_of_different_size_on_two_ranks(tmp_path: Path) -> None:
    limits = {"max_embedding": 4, "max_eval": 4, "max_test": 6, "max_length": 64}
    study = new_study(
        tmp_path / "study",
        methods=["fedamole", "zero-shot"],
        execution={"clients_per_job": 2},
        scenarios=[
            {"dataset": FRUIT, "partition": "iid", "clients": 3, **limits},
            {"dataset": FRUIT, "partition": "meta1", "clients": 2, **limits},
        ],
    )
    study.config["training"] = {**study.config["training"], "ranks": 2, "micro_batch_size": 1}
    write_fruit(study.folder / "fruit.jsonl")
    study.run()
    table = (study.results / "tables/main.md").read_text()
    assert "fruit-iid accuracy (%)" in table
    assert "fruit-meta1 accuracy (%)" in table
    for scenario, clients in (("fruit-iid-s42", 3), ("fruit-meta1-s42", 2)):
        run = study.results / f"runs/{scenario}/fedamole/round_002"
        records = [json.loads(path.read_text()) for path in sorted(run.glob("metrics_*.json"))]
        assert [record["client"] for record in records] == list(range(clients))
        assert all(set(record["answers"]) <= {0, 1} for record in records)
        assert all(len(record["answers"]) == record["num_test"] >= 4 for record in records)
    # meta1: one class per client.
    counts = (study.results / "figures/fruit-meta1-s42-classes.csv").read_text().splitlines()
    assert sum(line.endswith(",0") for line in counts) == 2


def test_a_broken_row_ends_the_study_with_file_and_line(tmp_path: Path) -> None:
    study = new_study(tmp_path / "study", methods=["zero-shot"], tables={"reference": "zero-shot"})
    study.config["scenarios"] = [{"dataset": FRUIT, "partition": "iid", "clients": 2}]
    write_fruit(study.folder / "fruit.jsonl")
    with (study.folder / "fruit.jsonl").open("a") as stream:
        stream.write('{"text": "It tastes odd.", "sweet": 2}\n')
    done = study.snakemake("--quiet", "rules")
    assert done.returncode == 1
    # Also on the console: nobody has to look for the log.
    assert "fruit.jsonl:121" in done.stdout + done.stderr
    assert "Traceback" not in study.logs()


def test_a_thousand_rounds_are_planned_without_running_out_of_recursion(tmp_path: Path) -> None:
    planned = new_study(tmp_path / "study", rounds=1000, methods=["fedamole"]).planned()
    assert planned["train_clients"] == 1000 and planned["assign"] == 999


def test_a_study_does_not_overwrite_the_runs_of_another(tmp_path: Path) -> None:
    """Only where studies may share a folder: one in a folder of its own goes on."""
    study = new_study(tmp_path / "study", methods=["zero-shot"], tables={"reference": "zero-shot"})
    header = json.loads(Header("metrics-table", "0" * 64).to_json())
    path = study.results / "metrics/chatterbot-dir0.5-s42/zero-shot.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"header": header}) + "\n")
    assert study.planned()
    study.config["study"] = "mine"
    done = study.snakemake("--dry-run")
    text = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in text
    assert f"{path.relative_to(study.folder)}: was made with other settings" in text
    path.unlink()
    assert "evaluate_clients" in study.planned()
