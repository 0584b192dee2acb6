"""Tables and figures from cached metrics: nothing can train, and what is wrong is named."""

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from workflow_study import REPOSITORY, Study, new_study

pytestmark = pytest.mark.xdist_group("workflow")

SHOWN = ("tables/*", "figures/*")
CACHED = ("--config", "mode=cached", "cache=cache")


def cached(finished: Study, folder: Path, **changes: Any) -> Study:
    """A study that has nothing but the metrics of a finished one, in a folder `cache`."""
    study = new_study(folder, **changes)
    shutil.copytree(finished.results / "metrics", folder / "cache")
    return study


def refused(study: Study, *more: str) -> str:
    """What cached mode says when it refuses; checks that nothing was drawn, without a traceback."""
    done = study.snakemake("tables", *CACHED, *more)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and not (study.results / "tables").exists()
    return done.stderr


def test_a_clone_with_scrambled_times_draws_the_same_bytes(finished: Study, tmp_path: Path) -> None:
    """Without data, models, runs, Snakemake's records, and with files of any age."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--shared", str(REPOSITORY), str(clone)], check=True)
    for path in ("Snakefile", "workflow", "configs", "fedamole"):
        # What is not committed yet counts as well.
        subprocess.run(["cp", "-r", "-T", str(REPOSITORY / path), str(clone / path)], check=True)
    study = cached(finished, tmp_path / "study")
    study.repository = clone
    ages = random.Random(0)
    for path in [*study.folder.rglob("*"), *clone.glob("workflow/**/*"), clone / "Snakefile"]:
        age = ages.uniform(0, 2e9)
        os.utime(path, (age, age))
    planned = study.snakemake("tables", *CACHED, "--dry-run").stdout
    rules = set(re.findall(r"^(?:local)?rule (\w+):$", planned, re.MULTILINE))
    assert rules == {"tables", "describe_study", "draw_tables", "draw_figures"}
    done = study.snakemake("tables", *CACHED, PATH=without_libraries(tmp_path))
    assert done.returncode == 0, done.stderr
    assert study.contents(*SHOWN) == finished.contents(*SHOWN)
    assert not any((study.results / name).exists() for name in ("runs", "backbones", "scenarios"))
    again = study.snakemake("tables", *CACHED)
    assert "Nothing to be done" in again.stdout + again.stderr


def without_libraries(folder: Path) -> str:
    """A PATH whose `fedamole` cannot import what trains: torch and its like are not there."""
    blocked = folder / "blocked"
    blocked.mkdir()
    names = ("torch", "transformers", "peft", "deepspeed", "datasets")
    (blocked / "fedamole").write_text(
        f"#!{sys.executable}\nimport sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {names!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from fedamole.cli import main\nsys.exit(main())\n"
    )
    (blocked / "fedamole").chmod(0o755)
    return f"{blocked}{os.pathsep}{os.environ['PATH']}"


def test_no_rule_that_trains_exists(finished: Study, tmp_path: Path) -> None:
    study = cached(finished, tmp_path / "study")
    listed = study.snakemake("--list-rules", *CACHED).stdout
    assert {line.split()[0] for line in listed.splitlines() if line and line[0] != " "} == {
        "all",
        "paper",
        "tables",
        "describe_study",
        "draw_tables",
        "draw_figures",
    }
    upload = "results/runs/chatterbot-dir0.5-s42/fedamole/round_001/client_000.h5"
    assert "MissingRuleException" in study.snakemake(upload, *CACHED).stderr


def test_each_missing_file_is_named(finished: Study, tmp_path: Path) -> None:
    for number, path in enumerate(sorted((finished.results / "metrics").rglob("*.json*"))):
        study = cached(finished, tmp_path / f"study{number}")
        gone = study.folder / "cache" / path.relative_to(finished.results / "metrics")
        gone.unlink()
        assert str(gone.relative_to(study.folder)) in refused(study)


def test_a_changed_file_is_named(finished: Study, tmp_path: Path) -> None:
    study = cached(finished, tmp_path / "study")
    path = study.folder / "cache/chatterbot-dir0.5-s42/fedit.jsonl"
    path.write_text(path.read_text().replace('"score":', '"score": ', 1))
    assert "cache/chatterbot-dir0.5-s42/fedit.jsonl" in refused(study)


def test_metrics_of_another_config_are_refused(finished: Study, tmp_path: Path) -> None:
    training = {**finished.config["training"], "learning_rate": 0.002}
    study = cached(finished, tmp_path / "study", training=training)
    said = refused(study)
    assert "other settings" in said and "fedamole.jsonl" in said
    assert "other settings" in refused(study, "stale=accept")


def test_metrics_of_older_code_are_used_only_where_asked_for(
    finished: Study, tmp_path: Path
) -> None:
    study = cached(finished, tmp_path / "study")
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "sitecustomize.py").write_text(
        "import fedamole.stages\nfedamole.stages.VERSIONS['run'] += 1\n"
    )
    study.environment = {"PYTHONPATH": str(newer)}
    assert "stale" in refused(study) or "older" in refused(study)
    done = study.snakemake("tables", *CACHED, "stale=accept")
    assert done.returncode == 0, done.stderr
    assert study.contents(*SHOWN) == finished.contents(*SHOWN)
