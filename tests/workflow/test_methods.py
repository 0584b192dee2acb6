"""Every method through the same rules, on a generation and on a classification data set."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from workflow_study import FRUIT, SMOKE, Study, new_study, write_fruit

from fedamole.participation import Participation
from fedamole.registry import METHODS, RUNS
from fedamole.settings import ParticipationSettings

pytestmark = pytest.mark.xdist_group("workflow")

LIMITS = {"max_embedding": 4, "max_eval": 4, "max_test": 6, "max_length": 96}
SCENARIOS = [
    {**SMOKE["scenarios"][0], **LIMITS},
    {"dataset": FRUIT, "partition": "dir1.0", "clients": 3, "min_examples": 20, **LIMITS},
]
NUMBERS = ("runs/*/*/round_*/*.h5", "runs/*/*/round_*/*.json", "metrics/*/*", "tables/*")
CONFIG = {
    "methods": list(METHODS),
    "scenarios": SCENARIOS,
    # A high rate and few words, so that the answers of different models differ.
    "training": {"steps": 3, "batch_size": 2, "learning_rate": 2.0e-2},
    "prompt": {"virtual_tokens": 3, "encoder_width": 16},
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, warm: dict[str, str]) -> Study:
    """A study of all methods, run once; not to be changed."""
    study = new_study(tmp_path_factory.mktemp("methods") / "study", **CONFIG)
    study.environment = warm
    write_fruit(study.folder / "fruit.jsonl")
    study.run()
    return study


def rows(study: Study, table: str) -> list[dict[str, str]]:
    with (study.results / f"tables/{table}.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_method_has_numbers_in_both_kinds_of_data(everything: Study) -> None:
    found = {(row["scenario"], row["method"]): row for row in rows(everything, "main")}
    columns = ("chatterbot-dir0.5", "fruit-dir1", "average")
    assert found.keys() == {(scenario, method) for scenario in columns for method in METHODS}
    for row in found.values():
        assert 0 <= float(row["score_mean"]) <= 1 and float(row["eval_loss_mean"]) > 0


def test_all_methods_are_tested_on_the_same_examples(everything: Study) -> None:
    for scenario in ("chatterbot-dir0.5", "fruit-dir1"):
        tested: dict[str, set[tuple[str, str, str]]] = {}
        for row in rows(everything, "clients"):
            if row["scenario"] == scenario:
                sizes = (row["client"], row["num_eval"], row["num_test"])
                tested.setdefault(row["method"], set()).add(sizes)
        assert len(tested) == len(METHODS)
        assert len({frozenset(sizes) for sizes in tested.values()}) == 1


def test_training_changes_every_method(everything: Study) -> None:
    losses = {
        (row["scenario"], row["method"]): row["eval_loss_mean"] for row in rows(everything, "main")
    }
    for scenario in ("chatterbot-dir0.5", "fruit-dir1"):
        # fdlora may find that the bare backbone is the best mixture; and on so small a problem
        # the greedy and the even assignment may be the best one.
        left_out = {"zero-shot", "fdlora", "fedamole-greedy", "fedamole-homo"}
        of_method = {m: losses[scenario, m] for m in METHODS if m not in left_out}
        assert losses[scenario, "zero-shot"] not in of_method.values()
        # No two methods are the same under two names.
        assert len(set(of_method.values())) == len(of_method)


def test_the_fine_tuned_row_differs_from_the_plain_one(everything: Study) -> None:
    losses = {
        (row["scenario"], row["method"]): row["eval_loss_mean"] for row in rows(everything, "main")
    }
    pairs = [method for method in METHODS if f"{method}-ft" in METHODS]
    assert pairs == ["fedit", "fedprompt", "fedptuning"]
    for scenario in ("chatterbot-dir0.5", "fruit-dir1"):
        for method in pairs:
            assert METHODS[method].run == METHODS[f"{method}-ft"].run
            assert losses[scenario, method] != losses[scenario, f"{method}-ft"]


def test_state_of_clients_is_a_declared_file(everything: Study) -> None:
    for slug in ("chatterbot-dir0.5-s42", "fruit-dir1-s42"):
        for run, facts in RUNS.items():
            folder = everything.results / "runs" / slug / run
            names = {str(path.relative_to(folder)) for path in folder.glob("*/kept_*.h5")}
            expected = {f"round_00{t}/kept_00{k}.h5" for t in (1, 2) for k in range(3)}
            assert names == (expected if facts.keeps else set()), run


def test_a_round_that_was_killed_goes_on_with_the_same_bytes(
    everything: Study, tmp_path: Path
) -> None:
    study = everything.copy(tmp_path / "study")
    for folder in study.results.glob("runs/*/*/round_002"):
        # As a kill -9 leaves it when client 0 is done and the others are not.
        run, slug = folder.parent.name, folder.parent.parent.name
        progress = study.results / "progress" / slug / run / "round_002"
        progress.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir()):
            if path.name.endswith("_000.h5") or path.name == "metrics_000.json":
                shutil.move(path, progress / path.name)
            else:
                path.unlink()
    for name in ("metrics", "tables", "figures"):
        shutil.rmtree(study.results / name)

    study.run()

    expected, found = everything.contents(*NUMBERS), study.contents(*NUMBERS)
    assert found.keys() == expected.keys()
    assert [path for path in expected if found[path] != expected[path]] == []
    logs = [path.read_text() for path in study.results.glob("logs/*/*/round_002/train_clients*")]
    several = [log for log in logs if "clients 0 were done by an earlier attempt" in log]
    assert len(several) == 2 * sum(run.trains for run in RUNS.values())


def test_clients_that_come_back_later_go_on_from_what_they_kept(
    tmp_path: Path, warm: dict[str, str]
) -> None:
    settings = {"fraction": 0.5}
    study = new_study(
        tmp_path / "study",
        **{**CONFIG, "scenarios": [{**SCENARIOS[1], "clients": 4}], "rounds": 4},
        participation=settings,
        tables={"reference": "local"},
    )
    study.config["methods"] = ["local", "fdlora", "fedapen", "fedalt", "fedsa-lora"]
    study.environment = warm
    write_fruit(study.folder / "fruit.jsonl")
    study.run()

    who = Participation(ParticipationSettings(**settings), clients=4, seed=42)
    returning = 0
    for run in study.config["methods"]:
        folder = study.results / f"runs/fruit-dir1-s42/{run}"
        for round_ in range(1, 5):
            for client in who.reporting(round_):
                content = (folder / f"round_{round_:03d}/metrics_{client:03d}.json").read_text()
                before = who.last_before(client, round_)
                returning += before is not None
                assert ("kept" in json.loads(content)["header"]["parents"]) == (before is not None)
    assert returning >= 5

    # Who trains beside whom changes no input of a client.
    study.config["execution"] = {"clients_per_job": 1}
    assert set(study.planned()) == {"describe_study", "all"}
