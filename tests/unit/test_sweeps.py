"""Sweeps make columns, each with settings of its own; base files are merged below a config."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedamole import stages, sweeps
from fedamole.config import Config, load_config
from fedamole.config_files import read_yaml
from fedamole.errors import FedamoleError

SLUG = "chatterbot-dir0.5"


@pytest.fixture
def smoke(configs: Path) -> dict[str, Any]:
    """The smoke config as it stands in its file."""
    return dict(yaml.safe_load((configs / "smoke.yaml").read_text()))


def swept(raw: dict[str, Any], configs: Path, **sweep: list[Any]) -> Config:
    """A config with a sweep; double underscores stand for dots."""
    return load_config(
        raw | {"sweep": {key.replace("__", "."): sweep[key] for key in sweep}}, configs
    )


def test_every_combination_is_a_column(smoke: dict[str, Any], configs: Path) -> None:
    config = swept(
        smoke, configs, training__learning_rate=[1e-3, 5e-4], assignment__max_experts=[6, 7, 8]
    )
    assert [*config.points] == [
        f"{SLUG}-learning_rate{rate}-max_experts{most}"
        for rate in ("0.001", "0.0005")
        for most in (6, 7, 8)
    ]
    here = config.at(f"{SLUG}-learning_rate0.0005-max_experts7-s42")
    assert (here.training.learning_rate, here.assignment.max_experts) == (5e-4, 7)
    assert here.training.steps == config.training.steps


def test_settings_of_training_share_the_population(smoke: dict[str, Any], configs: Path) -> None:
    config = swept(smoke, configs, training__learning_rate=[1e-3, 5e-4])
    assert [*config.data_seeds()] == [f"{SLUG}-s42"]
    one, other = (stages.run_stage(config, slug, "fedamole") for slug in config.scenario_seeds())
    assert one.tokens == other.tokens
    assert stages.digest(one) != stages.digest(other)


def test_a_point_has_the_digest_of_a_study_with_its_settings(
    smoke: dict[str, Any], configs: Path
) -> None:
    config = swept(smoke, configs, training__learning_rate=[1e-3, 5e-4])
    training = smoke["training"] | {"learning_rate": 5e-4}
    alone = load_config(smoke | {"training": training}, configs)
    for run in alone.runs():
        expected = stages.client_stage(alone, f"{SLUG}-s42", run)
        found = stages.client_stage(config, f"{SLUG}-learning_rate0.0005-s42", run)
        assert stages.canonical_json(found) == stages.canonical_json(expected)


def test_a_run_that_uses_nothing_of_the_sweep_is_the_same_everywhere(
    smoke: dict[str, Any], configs: Path
) -> None:
    config = swept(smoke, configs, assignment__max_experts=[6, 8])
    digests = {
        run: {
            stages.digest(stages.client_stage(config, slug, run))
            for slug in config.scenario_seeds()
        }
        for run in ("fedit", "fedamole")
    }
    assert (len(digests["fedit"]), len(digests["fedamole"])) == (1, 2)


def test_other_populations_have_names_of_their_own(smoke: dict[str, Any], configs: Path) -> None:
    config = swept(smoke, configs, scenarios__clients=[2, 3])
    assert [*config.data_seeds()] == [f"{SLUG}-clients2-s42", f"{SLUG}-clients3-s42"]
    assert [scenario.clients for scenario, _ in config.data_seeds().values()] == [2, 3]
    config = swept(smoke, configs, scenarios__partition=["dir0.1", "dir0.5", "iid"])
    assert [*config.points] == ["chatterbot-dir0.1", SLUG, "chatterbot-iid"]


def test_a_part_that_is_off_can_be_one_of_the_values(smoke: dict[str, Any], configs: Path) -> None:
    config = swept(smoke, configs, privacy__embeddings=[None, {"eta": 50}])
    assert [*config.points] == [f"{SLUG}-embeddingsnone", f"{SLUG}-embeddings50"]
    etas = [point.config.privacy.embeddings for point in config.points.values()]
    assert etas[0] is None and etas[1] is not None and etas[1].eta == 50


def test_a_copy_with_other_settings_has_points_of_its_own(
    smoke: dict[str, Any], configs: Path
) -> None:
    config = swept(smoke, configs, training__learning_rate=[1e-3, 5e-4])
    assert len(config.points) == 2
    assert [*config.model_copy(update={"sweep": {}}).points] == [SLUG]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (
            {"trainin.steps": [1]},
            "sweep: trainin.steps: is not a setting that can vary; did you mean",
        ),
        (
            {"rounds": [1, 2]},
            "sweep: rounds: is not a setting that can vary; allowed: a path such as",
        ),
        ({"training.ranks": [1, 2]}, "sweep: training.ranks: must be the same in the whole study"),
        ({"training.stepz": [1]}, "sweep: training.stepz 1: training: stepz: is not a setting"),
        ({"training.steps": [3, 3]}, "sweep: training.steps: 'steps3' stands twice"),
        ({"training.steps": [0]}, "sweep: training.steps 0: training: steps: 0 is not allowed"),
        (
            {"assignment.choices": [2, 9]},
            "sweep: assignment.choices 9: no assignment exists for scenario chatterbot-dir0.5",
        ),
        (
            {"training.steps": [1], "adapter.rank": [1], "adapter.alpha": [1]},
            "sweep: training.steps, adapter.rank, adapter.alpha: 3 settings vary; 2 can be shown",
        ),
        ({"training.steps": []}, "sweep: training.steps: has no values"),
        (
            {"training.deepspeed.zero_optimization.stage": [1, 2]},
            "sweep: training.deepspeed.zero_optimization.stage: must be the same in the whole",
        ),
        (
            {"evaluation": [{"max_new_tokens": 8}]},
            "sweep: evaluation: is not a setting that can vary; allowed: a path such as",
        ),
        (
            {"prompt.text": ["short", "in two words"]},
            "sweep: prompt.text: 'in two words' cannot stand in the name of a column, "
            "'textin two words'",
        ),
        (
            {"adapter.target_modules": [["q_proj"]]},
            "sweep: adapter.target_modules: ['q_proj'] cannot stand in the name of a column",
        ),
    ],
)
def test_what_cannot_vary_is_refused_in_one_line(
    smoke: dict[str, Any], configs: Path, sweep: dict[str, list[Any]], message: str
) -> None:
    with pytest.raises(FedamoleError) as error:
        load_config(smoke | {"sweep": sweep}, configs, "study.yaml")
    assert str(error.value).startswith(f"study.yaml: {message}")
    assert "\n" not in str(error.value)


def test_values_are_printed_briefly() -> None:
    assert [sweeps.shown(v) for v in (5e-5, 1e7, 3, None, {"eta": 1.0}, "dir0.1")] == [
        "5e-05",
        "1e07",
        "3",
        "none",
        "1",
        "dir0.1",
    ]


def test_a_config_stands_over_its_base(
    tmp_path: Path, smoke: dict[str, Any], configs: Path
) -> None:
    (tmp_path / "deepest.yaml").write_text(yaml.safe_dump(smoke))
    (tmp_path / "base.yaml").write_text(
        "base: deepest.yaml\nrounds: 7\nsweep: {adapter.rank: [2, 4]}\n"
    )
    above = {
        "base": "base.yaml",
        "methods": ["fedamole"],
        "training": {"steps": 9},
        "sweep": {"training.batch_size": [1, 2]},
    }
    config = load_config(above, configs, "study.yaml", [tmp_path])
    assert (config.rounds, config.methods, config.training.steps) == (7, ["fedamole"], 9)
    assert config.training.learning_rate == smoke["training"]["learning_rate"]
    assert [*config.sweep] == ["training.batch_size"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nowhere.yaml", "base: there is no file 'nowhere.yaml'; looked for "),
        ("base: 3", "base: 3 must be the path of a config file"),
        ("base: study.yaml", "base: the file is a base of itself"),
        ("base: list.yaml", "holds no settings; a mapping of names to values is needed"),
    ],
)
def test_a_base_that_is_none_is_refused(
    tmp_path: Path, configs: Path, text: str, message: str
) -> None:
    (tmp_path / "study.yaml").write_text(text)
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(FedamoleError) as error:
        load_config(read_yaml(tmp_path / "study.yaml"), configs, "study.yaml", [tmp_path])
    assert message in str(error.value)


PAPER = ("main", "ablation", "heterogeneity", "clients", "sensitivity-choices")
PAPER += ("sensitivity-experts", "privacy", "overhead", "stability", "routing")


def test_the_paper_has_its_studies(configs: Path) -> None:
    folder = configs / "paper"
    studies = {path.stem for path in folder.glob("*.yaml")} - {"base", "published"}
    assert studies == set(PAPER)
    for name in sorted(studies):
        config = load_config(read_yaml(folder / f"{name}.yaml"), configs, name, [folder])
        assert config.study == name
        assert config.tables.show and config.tables.figures, "each names its tables and figures"
    main = load_config(read_yaml(folder / "main.yaml"), configs, "main", [folder])
    assert (len(main.points), len(main.seeds), len(main.methods)) == (7, 3, 8)
    grids = [f"sensitivity-{name}" for name in ("choices", "experts")]
    for name in grids:
        config = load_config(read_yaml(folder / f"{name}.yaml"), configs, name, [folder])
        assert len(config.points) == 16


def test_studies_of_the_paper_share_what_they_have_in_common(configs: Path) -> None:
    folder = configs / "paper"
    main, ablation = (
        load_config(read_yaml(folder / f"{name}.yaml"), configs, name, [folder])
        for name in ("main", "ablation")
    )
    assert main.results == ablation.results and main.output != ablation.output
    for slug in main.scenario_seeds():
        for run in ("fedit", "fedamole"):
            one, other = (stages.client_stage(config, slug, run) for config in (main, ablation))
            assert stages.digest(one) == stages.digest(other)


def test_no_study_of_the_paper_would_overwrite_another(configs: Path) -> None:
    folder = configs / "paper"
    digests: dict[tuple[str, str], set[str]] = {}
    for name in PAPER:
        config = load_config(read_yaml(folder / f"{name}.yaml"), configs, name, [folder])
        for slug, methods in stages.results_stage(config).digests.items():
            for method, digest in methods.items():
                digests.setdefault((slug, method), set()).add(digest)
    assert all(len(found) == 1 for found in digests.values())
