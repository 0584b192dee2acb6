"""Studies of one results folder do not write over each other's runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedamole import stages
from fedamole.artifacts import Header
from fedamole.config import load_config
from fedamole.config_files import read_yaml
from fedamole.errors import FedamoleError
from fedamole.sharing import check_shared

SLUG = "chatterbot-dir0.5-s42"


def study(configs: Path, **changes: Any) -> stages.ResultsStage:
    """The smoke study with other settings, as its tables see it."""
    return stages.results_stage(load_config(read_yaml(configs / "smoke.yaml") | changes, configs))


def write(folder: Path, settings: stages.ResultsStage, method: str, kind: str) -> Path:
    """The first line of what the study would leave for a method; the rest is no JSON."""
    header = json.loads(Header(kind, settings.digests[SLUG][method]).to_json())
    path = folder / SLUG / f"{method}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": header}) + "\nnumbers\n")
    return path


def test_runs_of_equal_settings_are_shared(configs: Path, tmp_path: Path) -> None:
    check_shared(tmp_path, study(configs))
    other = study(configs, methods=["fedit-ft", "fedamole"], assignment={"num_experts": 4})
    write(tmp_path, other, "fedit-ft", "metrics-table")
    # Its fedamole has another assignment, and this study none.
    write(tmp_path, other, "fedamole", "metrics-table")
    here = study(configs, methods=["fedit", "fedit-ft"])
    check_shared(tmp_path, here)


def test_a_run_of_other_settings_is_not_overwritten(configs: Path, tmp_path: Path) -> None:
    other, here = study(configs, training={"steps": 7}), study(configs)
    path = write(tmp_path, other, "fedit", "metrics-table")
    with pytest.raises(FedamoleError) as raised:
        check_shared(tmp_path, here)
    text = str(raised.value)
    assert text.startswith(f"{path}: was made with other settings") and "\n" not in text
    assert all(stage.digests[SLUG]["fedit"][:12] in text for stage in (other, here))
    assert "take another results folder, or move the file away" in text


@pytest.mark.parametrize("text", ["", "{}", "[]", "no JSON"])
def test_what_is_no_metrics_file_is_named(text: str, configs: Path, tmp_path: Path) -> None:
    here = study(configs)
    path = write(tmp_path, here, "fedit", "metrics-table")
    path.write_text(text)
    with pytest.raises(FedamoleError, match=f"^{path}"):
        check_shared(tmp_path, here)
    write(tmp_path, here, "fedit", "pool")
    with pytest.raises(FedamoleError, match="holds pool"):
        check_shared(tmp_path, here)
