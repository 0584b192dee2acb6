"""Sweeps and studies as graphs of files: what they have in common is done once."""

from pathlib import Path

import pytest
from workflow_study import Study, new_study

pytestmark = pytest.mark.xdist_group("workflow")

SWEEP = {"training.learning_rate": [0.02, 0.002]}


def test_points_of_a_sweep_share_their_population(tmp_path: Path) -> None:
    study = new_study(tmp_path / "study", sweep=SWEEP)
    planned = study.planned()
    assert planned["partition"] == planned["tokenize"] == 1
    # Two rounds of fedamole and fedit at each point.
    assert planned["train_clients"] == 8


def test_a_point_has_the_numbers_of_a_study_with_its_settings(
    finished: Study, tmp_path: Path, warm: dict[str, str]
) -> None:
    rate = finished.config["training"]["learning_rate"]
    study = new_study(
        tmp_path / "study", sweep={"training.learning_rate": [rate, rate / 4]}, rounds=1
    )
    study.environment = warm
    study.run()
    slug = "chatterbot-dir0.5"
    uploads = [
        [*study.contents(f"runs/{slug}{point}-s42/*/round_001/client_*.h5").values()]
        for point in (f"-learning_rate{rate:g}", f"-learning_rate{rate / 4:g}")
    ]
    expected = [*finished.contents(f"runs/{slug}-s42/*/round_001/client_*.h5").values()]
    assert expected and uploads[0] == expected != uploads[1]
    rows = (study.results / "tables/sweep.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(study.config["methods"])
    assert (study.results / "figures/sweep.svg").stat().st_size > 1000


def test_a_second_study_trains_what_the_first_has_not(finished: Study, tmp_path: Path) -> None:
    """Studies of one results folder, told apart by their names."""
    study = finished.copy(tmp_path / "study", study="second", methods=["fedamole", "fedit-ft"])
    planned = study.planned()
    assert not {"train_clients", "evaluate_clients", "partition", "init_server"} & set(planned)
    study.run()
    assert (study.results / "second/tables/main.md").is_file()
    assert finished.contents("tables/*") == study.contents("tables/*")
