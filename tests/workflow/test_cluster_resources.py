"""What jobs ask of a cluster, planned with the profile; nothing is submitted."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from workflow_study import REPOSITORY, Study, new_study

PROFILE = yaml.safe_load((REPOSITORY / "slurm/config.yaml").read_text())
SITE = {"slurm_account": "lab", "slurm_partition": "gpu"}


def plan(study: Study, **site: Any) -> str:
    """What a dry run says with the project's profile, edited for a site."""
    profile = study.folder / "profile"
    profile.mkdir()
    resources = PROFILE["default-resources"] | site
    (profile / "config.yaml").write_text(yaml.safe_dump(PROFILE | {"default-resources": resources}))
    command = study.command("--dry-run", "--profile", str(profile))
    cores = command.index("--cores")
    del command[cores : cores + 2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


def asked(said: str, rule: str = "train_clients") -> dict[str, str]:
    """Resources of the first job of a rule."""
    lines = re.findall(rf"^rule {rule}\w*:$(.*?)\n\n", said, re.MULTILINE | re.DOTALL)
    assert lines, said
    found = re.search(r"resources: (.*)", lines[0])
    assert found
    pairs = (entry.split("=", 1) for entry in found[1].split(", ") if "=" in entry)
    return dict(pairs)


FOUR_GPUS = {"gpus": 4, "clients_at_once": 2}
TWO_NODES = FOUR_GPUS | {"nodes": 2}


@pytest.mark.parametrize(
    ("execution", "site", "expected"),
    [
        ({}, {}, {"mem_mb": "2200", "runtime": "30"}),
        (FOUR_GPUS, {}, {"gpu": "4", "nodes": "1"}),
        (FOUR_GPUS, {"gpu_type": "a100"}, {"gpu": "4", "gpu_model": "a100"}),
        (FOUR_GPUS, {"gpu_request": "gres"}, {"gres": "gpu:4", "nodes": "1"}),
        (TWO_NODES, {"gpu_request": "gres", "gpu_type": "v100"}, {"gres": "gpu:v100:2"}),
        (
            TWO_NODES,
            {},
            {"nodes": "2", "mpi": "srun", "tasks_per_node": "2", "cpus_per_task": "1"}
            | {"slurm_extra": " --gpus-per-node=2"},
        ),
        (FOUR_GPUS, {"gpu_request": "gpus-per-node"}, {"slurm_extra": " --gpus-per-node=4"}),
        ({"nodes": 2}, {}, {"nodes": "2", "mpi": "srun", "tasks": "2"}),
        (
            {"mem_mb": 9000, "runtime": 600},
            {"max_runtime": 100},
            {"mem_mb": "9000", "runtime": "100"},
        ),
    ],
)
def test_jobs_ask_in_the_words_of_the_site(
    tmp_path: Path, execution: dict[str, int], site: dict[str, Any], expected: dict[str, str]
) -> None:
    study = new_study(tmp_path / "study", execution=execution)
    study.config["training"] = {**study.config["training"], "ranks": 2}
    found = asked(plan(study, **SITE, **site))
    assert {name: found.get(name) for name in expected} == expected
    # Two requests for GPUs contradict each other at most sites.
    ways = {"gpu", "gres", "slurm_extra"}
    assert ways & {*found} == ways & {*expected}


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ({}, "default-resources: slurm_account is CHANGE_ME; set it to that of your cluster"),
        (SITE | {"gpu_request": "gers"}, "gpu_request 'gers' is unknown; allowed: gpus, gres, gpu"),
        (SITE | {"max_runtime": "long"}, "max_runtime 'long' must be a whole number"),
    ],
)
def test_a_mistake_in_the_profile_is_one_clear_line(
    tmp_path: Path, site: dict[str, Any], message: str
) -> None:
    said = plan(new_study(tmp_path / "study"), **site)
    assert message in said
    assert "Traceback" not in said


def test_a_backbone_that_is_not_trained_gets_all_processes(tmp_path: Path) -> None:
    study = new_study(tmp_path / "study", execution=TWO_NODES)
    study.config["training"] = {**study.config["training"], "ranks": 2}
    done = study.snakemake("--dry-run", "--printshellcmds")
    said = done.stdout + done.stderr
    commands = re.findall(r"(?:train|evaluate)-clients --at-once (\d) --nodes (\d)", said)
    # FedIT's average takes two ranks a client, as in training; zero-shot takes one.
    assert {("2", "2"), ("4", "2")} == {*commands}
