"""Rounds in which not all clients take part: drawn, dropped out, lost."""

import json
from pathlib import Path

import pytest
from workflow_study import SMOKE, Study, new_study

from fedamole.participation import Participation
from fedamole.settings import ParticipationSettings

pytestmark = pytest.mark.xdist_group("workflow")
SAMPLED = {"fraction": 0.6, "dropout_rate": 0.2, "quorum": 0.5}
NUMBERS = ("runs/*/*/round_*/*", "metrics/*/*.jsonl", "tables/*")


@pytest.fixture
def sampled(tmp_path: Path, warm: dict[str, str]) -> Study:
    """Five clients, of which three are drawn for a round."""
    scenario = {**SMOKE["scenarios"][0], "clients": 5}
    settings = {"methods": ["fedamole"], "rounds": 3, "participation": SAMPLED}
    study = new_study(tmp_path / "study", scenarios=[scenario], **settings)
    study.environment = warm
    return study


@pytest.fixture
def broken(tmp_path: Path, warm: dict[str, str]) -> Study:
    """Three clients, of which the last has nothing to train on."""
    study = new_study(tmp_path / "study", methods=["fedamole"])
    study.environment = warm
    assert study.snakemake("--quiet", "all", "--until", "tokenize").returncode == 0
    path = next(study.results.glob("scenarios/*/tokens-*/clients.json"))
    content = json.loads(path.read_text())
    content["clients"][2]["train"] = [0, 0]
    path.write_text(json.dumps(content))
    return study


def records(study: Study, method: str, kind: str) -> list[dict[str, object]]:
    """Records of one kind in the metrics file of a method."""
    path = next(study.results.glob(f"metrics/*/{method}.jsonl"))
    lines = map(json.loads, path.read_text().splitlines())
    return [line for line in lines if line.get("record") == kind]


def test_only_those_who_are_drawn_work_whatever_the_jobs(sampled: Study, tmp_path: Path) -> None:
    study, other = sampled, sampled.copy(tmp_path / "one", execution={"clients_per_job": 1})
    study.run()
    other.run()

    assert study.contents(*NUMBERS) == other.contents(*NUMBERS)
    who = Participation(ParticipationSettings(**SAMPLED), clients=5, seed=42)
    for round_ in (1, 2, 3):
        folder = study.results / f"runs/chatterbot-dir0.5-s42/fedamole/round_{round_:03d}"
        names = {path.stem for path in folder.glob("client_*.h5")}
        assert names == {f"client_{client:03d}" for client in who.reporting(round_)}
    # Experts are handed out to those who are drawn, dropouts included.
    for record in records(study, "fedamole", "assignment"):
        holders = {k for module in record["holders"] for held in module for k in held}
        assert holders == set(who.drawn(record["round"]))
    last = {r["client"]: r["round"] for r in records(study, "fedamole", "client")}
    rows = (study.results / "tables/clients.csv").read_text().splitlines()[1:]
    assert {int(row.split(",")[5]): int(row.split(",")[4]) for row in rows} == last


def test_a_round_goes_on_without_a_client_that_fails_and_says_so(broken: Study) -> None:
    study = broken
    study.config["participation"] = {"quorum": 0.6}
    study.run()

    lost = records(study, "fedamole", "dropout")
    assert [(record["round"], record["client"]) for record in lost] == [(1, 2), (2, 2)]
    assert all("client 2 has no training examples" in record["reason"] for record in lost)
    tested = records(study, "fedamole", "client")
    assert [(r["round"], r["client"]) for r in tested] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert "client_002 dropped out: " in study.logs()
    assert "client 2" not in (study.results / "tables/clients.md").read_text()


def test_a_mistake_in_the_config_drops_no_client(broken: Study) -> None:
    study = broken
    private = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 0.01}
    study.config |= {"participation": {"quorum": 0.5}, "privacy": {"dp_sgd": private}}
    done = study.snakemake("--quiet", "rules")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "delta 0.01 must be below 1 / training examples of every client; client " in said
    assert "drops out" not in study.logs() and "Traceback" not in study.logs()


def test_too_few_clients_end_the_study_until_one_is_mended(broken: Study) -> None:
    study = broken
    study.config["participation"] = {"quorum": 0.7}
    whole = next(study.results.glob("scenarios/*/tokens-*/clients.json"))
    done = study.snakemake("--quiet", "rules")

    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "no upload of clients [2]; 2 of 3 reported, the quorum is 3" in said
    assert "Traceback" not in study.logs()

    upload = next(study.results.glob("runs/*/fedamole/round_001/client_002.h5"))
    again = str(upload.relative_to(study.folder))
    assert f"snakemake --forcerun {again} lets it try again" in said
    content = json.loads(whole.read_text())
    content["clients"][2]["train"] = content["clients"][2]["embedding"]
    whole.write_text(json.dumps(content))
    done = study.snakemake("--quiet", "rules", "--forcerun", again)
    assert done.returncode == 0, done.stderr + study.logs()
    assert records(study, "fedamole", "dropout") == []


def test_the_quorum_holds_in_the_last_round_too_which_is_not_averaged(broken: Study) -> None:
    study = broken
    study.config |= {"participation": {"quorum": 0.7}, "rounds": 1}
    done = study.snakemake("--quiet", "rules")

    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "round 1: no upload of clients [2]; 2 of 3 reported, the quorum is 3" in said
    assert "client 2 has no training examples (snakemake --forcerun " in said
    assert "round_001/metrics_002.json lets it try again)" in said
    assert not [*study.results.glob("metrics/*/*.jsonl")]
