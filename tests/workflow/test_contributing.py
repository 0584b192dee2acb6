"""The method that CONTRIBUTING.md adds, added to a copy of the package and run."""

import os
import re
import shutil
from pathlib import Path

import pytest
from workflow_study import REPOSITORY, new_study

pytestmark = pytest.mark.xdist_group("workflow")


def test_the_method_of_the_worked_example_runs(tmp_path: Path) -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    method, registry = re.findall(r"```python\n# (fedamole/[^\n]*)\n(.*?)```", text, re.DOTALL)
    package = tmp_path / "package"
    shutil.copytree(
        REPOSITORY / "fedamole", package / "fedamole", ignore=shutil.ignore_patterns("__pycache__")
    )
    (package / method[0]).write_text(method[1])
    with (package / "fedamole/registry.py").open("a") as file:
        file.write(registry[1])
    methods = ["fedmedian", "fedmedian-ft", "fedit"]
    study = new_study(tmp_path / "study", methods=methods, tables={"reference": "fedmedian"})
    study.environment = {"PYTHONPATH": os.pathsep.join([str(package), *_pythonpath()])}
    study.run()

    rows = (study.results / "tables/main.csv").read_text().splitlines()[1:]
    losses = {row.split(",")[2]: row.split(",")[6] for row in rows}
    assert set(losses) == set(methods)
    assert len(set(losses.values())) == 3


def _pythonpath() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
