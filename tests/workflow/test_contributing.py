"""The method that CONTRIBUTING.md adds, added to a copy of the package and run."""

import csv
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
    checkout = tmp_path / "checkout"
    for name in ("fedamole", "workflow", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=ignored)
    shutil.copy(REPOSITORY / "Snakefile", checkout)
    (checkout / method[0]).write_text(method[1])
    with (checkout / "fedamole/registry.py").open("a") as file:
        file.write(registry[1])
    methods = ["fedmedian", "fedmedian-ft", "fedit"]
    study = new_study(tmp_path / "study", methods=methods, tables={"reference": "fedmedian"})
    study.repository = checkout
    paths = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    study.environment = {"PYTHONPATH": os.pathsep.join(paths)}
    study.run()

    with (study.results / "tables/main.csv").open() as file:
        losses = {row["method"]: row["eval_loss_mean"] for row in csv.DictReader(file)}
    assert set(losses) == set(methods)
    assert len(set(losses.values())) == 3
