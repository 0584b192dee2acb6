"""Costs of a finished study: asked for later they train nothing, also once it was pruned."""

import json
from pathlib import Path
from typing import Any

import pytest
from workflow_study import Study

from fedamole.cli import main

pytestmark = pytest.mark.xdist_group("workflow")

SLUG = "chatterbot-dir0.5-s42"
TARGETS = [f"results/metrics/{SLUG}/{method}.costs.json" for method in ("fedamole", "fedit")]


def rules(study: Study, *targets: str) -> set[str]:
    """Rules that would run for some targets."""
    done = study.snakemake("--dry-run", *targets)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in (done.stdout + done.stderr).splitlines()]
    return {line[1].rstrip(":") for line in lines if line[:1] in (["rule"], ["localrule"])}


def costs(study: Study, method: str) -> dict[str, Any]:
    path = study.results / f"metrics/{SLUG}/{method}.costs.json"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture(scope="module")
def counted(finished: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The finished study without its old uploads and pools, and with its costs."""
    study = finished.copy(tmp_path_factory.mktemp("costs") / "study")
    study.config["results"] = str(study.results)
    config = study.folder / "pruned.yaml"
    config.write_text(json.dumps(study.config))
    assert main(["prune", "--configfile", str(config), "--keep", "last"]) == 0
    assert not [*study.results.glob("runs/*/*/round_001/client_*.h5")]
    study.config["results"] = "results"
    assert rules(study, *TARGETS) == {"gather_costs"}
    done = study.snakemake(*TARGETS, "--quiet", "rules")
    assert done.returncode == 0, done.stderr + study.logs()
    return study


def test_nobody_asks_for_costs_by_default(finished: Study) -> None:
    assert not [*finished.results.glob("metrics/*/*.costs.json")]


def test_costs_that_are_there_are_not_gathered_again(counted: Study) -> None:
    assert not rules(counted, *TARGETS)
    assert not counted.planned()


def test_costs_are_measured_of_every_client_and_round(counted: Study) -> None:
    found = costs(counted, "fedamole")
    assert [each["round"] for each in found["rounds"]] == [1, 2]
    for each in found["rounds"]:
        assert [client["client"] for client in each["clients"]] == [0, 1, 2]
        for client in each["clients"]:
            for part in ("training", "testing", "embedding"):
                assert 0 < client[f"{part}_seconds"] < 60
            assert 50 < client["peak_memory_mb"] < 5000
            assert client["peak_gpu_memory_mb"] is None
    # Nothing is averaged or assigned behind the last round.
    first, last = found["rounds"]
    assert first["aggregate_seconds"] > 0 and first["assign_seconds"] > 0
    assert last["aggregate_seconds"] is last["assign_seconds"] is None


def test_volumes_follow_from_who_holds_what(counted: Study) -> None:
    """Rank 4, width 32, four modules: experts of A (4, 32) and B (32, 4), and P (4, 32)."""
    lines = (counted.results / f"metrics/{SLUG}/fedamole.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    holders = {r["round"]: r["holders"] for r in records if r.get("record") == "assignment"}
    for each in costs(counted, "fedamole")["rounds"]:
        for client in each["clients"]:
            held = sum(client["client"] in e for module in holders[each["round"]] for e in module)
            expert, projection, modules = 2 * 4 * 32, 4 * 32, 4
            numbers = (held + modules) * expert + modules * projection
            assert client["download_bytes"] == 4 * numbers
            assert client["trainable"] == numbers
            # Embeddings of rank 4 of the client and of each expert row; rows and tokens as int64.
            beside = 4 * 4 * (modules + held) + 3 * 8 * held
            assert client["upload_bytes"] == 4 * numbers + beside


def test_an_averaged_model_has_the_tests_of_all_clients(counted: Study) -> None:
    for each in costs(counted, "fedit")["rounds"]:
        assert all(client["testing_seconds"] > 0 for client in each["clients"])
        assert {client["embedding_seconds"] for client in each["clients"]} == {0.0}
        # One LoRA per module.
        assert {client["upload_bytes"] for client in each["clients"]} == {4 * 4 * 2 * 4 * 32}


def test_costs_tell_no_place_and_no_time(counted: Study, finished: Study) -> None:
    text = json.dumps(costs(counted, "fedamole"))
    assert str(finished.folder) not in text and str(counted.folder) not in text
    assert not {"host", "process", "started", "ended"} & set(text.split('"'))


def test_without_records_of_progress_costs_are_unknown_and_nothing_trains(
    counted: Study, tmp_path: Path
) -> None:
    study = counted.copy(tmp_path / "study")
    for path in study.results.glob("progress/*/*/round_*/*.json"):
        path.unlink()
    (study.results / f"metrics/{SLUG}/fedamole.costs.json").unlink()
    assert rules(study, *TARGETS) == {"gather_costs"}
    done = study.snakemake(*TARGETS, "--quiet", "rules")
    assert done.returncode == 0, done.stderr + study.logs()
    found = costs(study, "fedamole")
    numbers = {
        client[key] for each in found["rounds"] for client in each["clients"] for key in client
    }
    assert numbers == {0, 1, 2, None}
    assert found["machines"] == []
