"""What a study leaves behind, and that it is always the same."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from workflow_study import REPOSITORY, Study, new_study

pytestmark = pytest.mark.xdist_group("workflow")

# Everything that carries a number. Not the backbone: its folder also has Snakemake's time stamp.
NUMBERS = ("runs/**/*.h5", "runs/**/*.json", "metrics/**/*", "tables/*", "figures/*")


def test_every_method_stands_in_the_tables(finished: Study) -> None:
    table = (finished.results / "tables/main.md").read_text()
    clients = (finished.results / "tables/clients.md").read_text()
    for method in finished.config["methods"]:
        assert f"| {method}" in table.replace("**", "")
        assert f"| {method}" in clients.replace("**", "")


def test_the_schema_of_a_round_is_complete(finished: Study) -> None:
    folder = finished.results / "runs/chatterbot-dir0.5-s42/fedamole"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    clients = {
        f"round_{t:03d}/{name}_{k:03d}.{suffix}"
        for t in (1, 2)
        for k in range(3)
        for name, suffix in (("client", "h5"), ("metrics", "json"))
    }
    servers = {f"round_{t:03d}/{name}.h5" for t in (0, 1) for name in ("pool", "assignment")}
    # Nothing is aggregated for a round that does not follow.
    assert names == clients | servers


def test_one_client_per_job_killed_and_resumed_gives_the_same_bytes(
    finished: Study, tmp_path: Path
) -> None:
    study = new_study(tmp_path / "study", execution={"clients_per_job": 1})
    first = study.results / "runs/chatterbot-dir0.5-s42/fedamole/round_001/metrics_001.json"
    with subprocess.Popen(
        study.command("--quiet", "all"), start_new_session=True, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 240
        while not first.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    assert first.exists()
    assert not (study.results / "tables/main.csv").exists()

    assert study.snakemake("--unlock").returncode == 0
    done = study.snakemake("--quiet", "rules", "--rerun-incomplete")
    assert done.returncode == 0, done.stderr + study.logs()
    expected, found = finished.contents(*NUMBERS), study.contents(*NUMBERS)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []


def test_two_clients_per_job_give_the_same_bytes(finished: Study, tmp_path: Path) -> None:
    study = finished.copy(tmp_path / "study", execution={"clients_per_job": 2})
    folders = [*study.results.glob("runs/*/fedamole/round_002"), study.results / "metrics"]
    for folder in [*folders, study.results / "tables", study.results / "figures"]:
        shutil.rmtree(folder)
    study.run()
    # Clients 0 and 1 in one job, client 2 in another.
    assert len([*study.results.glob("logs/*/fedamole/round_002/train_clients_*.log")]) == 3
    assert study.contents(*NUMBERS) == finished.contents(*NUMBERS)


def test_a_training_job_logs_one_tidy_line_per_client(finished: Study) -> None:
    log = next(finished.results.glob("logs/*/fedamole/round_001/train_clients_*.log")).read_text()
    lines = [line for line in log.splitlines() if line.strip()]
    pattern = (
        r"\d\d:\d\d:\d\d chatterbot-dir0.5-s42 fedamole round 1 client (\d): 3 steps, "
        r"[\d.]+ steps/s, loss [\d.]+ -> [\d.]+; eval loss [\d.]+, rouge_l [\d.]+"
    )
    matches = [re.fullmatch(pattern, line) for line in lines]
    assert all(matches), log
    assert [match[1] for match in matches if match] == ["0", "1", "2"]


def test_the_report_holds_tables_and_figures_with_captions(finished: Study, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    done = finished.snakemake("--report", str(report))
    assert done.returncode == 0, done.stderr
    text = report.read_text()
    tables = [path.stem for path in (finished.results / "tables").glob("*.html")]
    kinds = {path.stem.rpartition("-")[2] for path in finished.results.glob("figures/*.svg")}
    captions = [f"{name}_table" for name in tables] + sorted(kinds) + ["settings", "workflow"]
    for name in captions:
        # Captions are rendered; their first words stand in the page as they are.
        caption = (REPOSITORY / f"workflow/report/{name}.rst").read_text()
        words = re.split(r"[`*:.{=]", caption)[0].split()[:4]
        assert " ".join(words) in text, name


def test_stale_metrics_alone_give_no_tables(finished: Study, tmp_path: Path) -> None:
    training = {**finished.config["training"], "learning_rate": 0.002}
    study = new_study(tmp_path / "study", training=training)
    shutil.copytree(finished.results / "metrics", study.results / "metrics")
    done = study.snakemake("tables", "--quiet", "rules")
    assert done.returncode == 1
    assert "was made with other settings" in study.logs()
    assert not (study.results / "tables/main.md").exists()


def test_fresh_metrics_alone_give_the_same_tables_without_training(
    finished: Study, tmp_path: Path
) -> None:
    study = new_study(tmp_path / "study")
    shutil.copytree(finished.results / "metrics", study.results / "metrics")
    done = study.snakemake("tables", "--quiet", "rules")
    assert done.returncode == 0, done.stderr
    shown = ("tables/*", "figures/*")
    assert study.contents(*shown) == finished.contents(*shown)
    assert not (study.results / "runs").exists()


def test_a_failing_client_is_named_with_its_log(tmp_path: Path) -> None:
    study = new_study(tmp_path / "study", methods=["zero-shot"])
    study.config["backbone"] = {"name": "missing", "folder": "no/such/folder"}
    study.config["tables"] = {"reference": "zero-shot"}
    done = study.snakemake("--quiet", "rules")
    assert done.returncode == 1
    assert "prepare_backbone.log" in done.stderr
    assert "backbone folder no/such/folder: does not exist" in study.logs()
    assert "Traceback" not in study.logs()


def test_results_of_another_config_in_the_way_are_refused(finished: Study, tmp_path: Path) -> None:
    training = {**finished.config["training"], "learning_rate": 0.002}
    study = finished.copy(tmp_path / "study", training=training)
    # As after copying results to another machine: Snakemake's own records are lost.
    for path in (study.folder / ".snakemake/metadata").iterdir():
        path.unlink()
    scenario = "chatterbot-dir0.5-s42"
    for path in (study.results / f"runs/{scenario}/fedamole/round_002").iterdir():
        path.unlink()
    for folder in ("metrics", "tables", "figures"):
        shutil.rmtree(study.results / folder)
    done = study.snakemake("--quiet", "rules", "--rerun-triggers", "mtime")
    assert done.returncode == 1
    line = "was made with other settings"
    assert line in study.logs()
    assert "move it away, or choose another results folder" in study.logs()


def test_a_mistake_in_the_config_ends_the_parse_with_one_line(tmp_path: Path) -> None:
    study = new_study(tmp_path / "study", trainning={"steps": 3})
    done = study.snakemake("--dry-run")
    assert done.returncode == 1
    # A dry run reports on standard output, a run on standard error.
    said = done.stdout + done.stderr
    assert "trainning: is not a setting" in said
    assert "did you mean training?" in said
    assert "Traceback" not in said


def test_no_rule_names_a_method() -> None:
    from fedamole.registry import METHODS

    rules = REPOSITORY.glob("workflow/rules/*.smk")
    text = "\n".join(path.read_text() for path in [REPOSITORY / "Snakefile", *rules])
    # The program has the name of its first method.
    others = set(METHODS) - {"fedamole"}
    words = {method for method in others if re.search(rf"(?<![\w-]){method}(?![\w-])", text)}
    words |= set(re.findall(r"[=!]= *[\"']fedamole[\"']", text))
    assert not words, words
