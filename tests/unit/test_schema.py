"""The description of the config file: in step with the code, complete, and of use to an editor."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fedamole.cli import main
from fedamole.config import Config
from fedamole.config_reference import BEGIN, END, config_reference, config_schema, with_reference
from fedamole.errors import FedamoleError
from fedamole.settings import Section

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "configs/README.md"
RENEW = "run: fedamole schema > workflow/schemas/config.schema.json; "
RENEW += "fedamole schema --markdown --into configs/README.md"


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads(config_schema())


def accepts(schema: dict[str, Any], content: Any, section: str | None = None) -> bool:
    """Whether a JSON schema validator finds nothing wrong, as an editor would."""
    if section:
        schema = {**schema["$defs"][section], "$defs": schema["$defs"]}
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid(content)


def sections(section: type[Section], path: str = "") -> Iterator[tuple[str, type[Section]]]:
    """All section classes under one, each with its path, by the annotations of the fields."""
    yield path, section
    for name, field in section.model_fields.items():
        for part, is_list in classes(field.annotation):
            yield from sections(part, f"{path}.{name}".lstrip(".") + "[]" * is_list)


def classes(annotation: Any, is_list: bool = False) -> Iterator[tuple[type[Section], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, is_list
    is_list = is_list or getattr(annotation, "__origin__", None) is list
    for part in getattr(annotation, "__args__", ()):
        yield from classes(part, is_list)


def test_the_schema_file_is_that_of_the_code() -> None:
    assert (REPOSITORY / "workflow/schemas/config.schema.json").read_text() == config_schema(), (
        RENEW
    )


def test_the_reference_in_the_readme_is_that_of_the_code() -> None:
    text = README.read_text()
    assert text == with_reference(text), RENEW


def test_the_reference_names_every_setting_of_every_section() -> None:
    parts = dict(part.split("\n", 1) for part in f"\n{config_reference()}".split("\n### ")[1:])
    found = dict(sections(Config))
    assert len(found) >= 13
    assert set(parts) == {f"`{path}`" if path else "The file itself" for path in found}
    for path, section in found.items():
        rows = [
            line.split(" | ")[0].removeprefix("| ").strip("`")
            for line in parts[f"`{path}`" if path else "The file itself"].splitlines()
            if line.startswith("| `")
        ]
        assert rows == list(section.model_fields)


def test_every_setting_is_described() -> None:
    for path, section in sections(Config):
        assert section.__doc__
        for name, field in section.model_fields.items():
            assert field.description, f"{path}.{name} has no docstring"


def test_no_row_of_the_reference_is_broken_by_a_bar() -> None:
    rows = [line for line in config_reference().splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {6}


def test_defaults_and_limits_stand_in_the_reference() -> None:
    reference = config_reference()
    assert "| `learning_rate` | number | `5e-05` | > 0 |" in reference
    assert "| `clients` | integer | `10` | >= 1 |" in reference
    assert '| `clients_per_job` | integer or `all` | `"all"` |' in reference
    assert (
        "| `backbone` | name (configs/models) or path of a file or section | required |"
        in reference
    )


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/**/*.yaml")), ids=lambda p: p.stem)
def test_the_schema_accepts_the_configs_that_come_along(schema: dict[str, Any], path: Path) -> None:
    kinds = {"datasets": "DatasetSettings", "models": "BackboneSettings"}
    kind = "PublishedSettings" if path.stem == "published" else kinds.get(path.parent.name)
    assert accepts(schema, yaml.safe_load(path.read_text()), kind)


@pytest.mark.parametrize(
    "change",
    [
        {"trainning": {}},
        {"rounds": 0},
        {"rounds": "many"},
        {"training": {"learning_rate": 0}},
        {"backbone": {"name": "x", "hub": "a/b", "dtype": "int8"}},
        {"backbone": None},
        {"scenarios": []},
        {"execution": {"clients_per_job": "some"}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_config_refuses(
    schema: dict[str, Any], change: dict[str, Any]
) -> None:
    smoke = yaml.safe_load((REPOSITORY / "configs/smoke.yaml").read_text())
    assert accepts(schema, smoke)
    assert not accepts(schema, {**smoke, **change})


def test_names_and_short_forms_may_stand_for_sections(schema: dict[str, Any]) -> None:
    scenario = {"dataset": "dolly", "partition": "dir0.5"}
    config = {"backbone": "llama-3.2-1b", "methods": ["fedamole"], "scenarios": [scenario]}
    assert accepts(schema, {**config, "training": {"deepspeed": "zero3"}})


def test_the_command_prints_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == config_schema()
    assert main(["schema", "--markdown"]) == 0
    assert capsys.readouterr().out == config_reference()


def test_the_reference_is_renewed_between_the_marks_only(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"# Top\n\n{BEGIN}\nold\n{END}\n\nBottom\n")
    assert main(["schema", "--markdown", "--into", str(path)]) == 0
    text = path.read_text()
    assert text.startswith(f"# Top\n\n{BEGIN}\n\n### The file itself\n")
    assert text.endswith(f"\n{END}\n\nBottom\n")
    assert "\nold\n" not in text
    assert with_reference(text) == text


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_file_without_the_marks_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(FedamoleError):
        with_reference(text)
    assert main(["schema", "--markdown", "--into", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"fedamole: {path}: needs the lines")
    assert path.read_text() == text


def test_describing_the_config_needs_no_torch() -> None:
    code = "import sys, fedamole.config_reference; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
