"""Whole studies on SLURM: the same bytes as without it, however the work is cut and placed."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from cluster_study import (
    NUMBERS,
    ClusterStudy,
    accounted,
    environment,
    smoke_study,
    submitted,
    wait_for,
)
from workflow_study import REPOSITORY, SMOKE, Study, new_study

from fedamole.pool_files import read_upload

pytestmark = pytest.mark.cluster

ALLOCATION = ["salloc", "-Q", "-p", "main", "-A", "lab", "-N2", "--ntasks-per-node=2"]
DEMO = yaml.safe_load((REPOSITORY / "configs/demo.yaml").read_text())


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The smoke study, run without SLURM; not to be changed."""
    study = new_study(tmp_path_factory.mktemp("smoke") / "study")
    study.run()
    return study


def differing(study: Study, other: Study) -> list[str]:
    """Files whose bytes differ."""
    expected, found = other.contents(*NUMBERS), study.contents(*NUMBERS)
    assert expected.keys() == found.keys()
    return [name for name in expected if expected[name] != found[name]]


def test_the_profile_gives_the_bytes_of_a_local_run(smoke: Study, tmp_path: Path) -> None:
    study = smoke_study(tmp_path / "study")
    process = study.start()
    wait_for(study.jobs)
    # What a person sees in the queue: the study, then what each job does.
    job = study.jobs()[0]
    study.finish(process)
    assert differing(study, smoke) == []
    assert job.name.startswith("fedamole-results-")
    rule = "evaluate_clients" if "evaluate" in job.comment else "train_clients"
    assert job.comment.startswith(f"rule_{rule}_000_002_wildcards_")
    assert "chatterbot-dir0.5-s42" in job.comment
    # Two runs of two rounds, and tests of FedIT's two averages and of the backbone. Nothing else
    # went to the queue.
    assert len(submitted(study.said())) == 7


def test_the_demo_scaled_down(tmp_path: Path) -> None:
    changes = {
        "rounds": 1,
        "scenarios": [
            {**DEMO["scenarios"][0], "clients": 2, "max_embedding": 4, "max_eval": 2, "max_test": 2}
        ],
        "methods": ["fedamole", "fedit"],
        "assignment": {"num_experts": 4, "choices": 1, "max_experts": 4},
        "training": {**DEMO["training"], "steps": 1},
        "evaluation": {"max_new_tokens": 4},
    }
    config = {**DEMO, **changes, "results": "results"}
    local = Study(tmp_path / "local", config)
    study = ClusterStudy(tmp_path / "cluster", config)
    for one in (local, study):
        one.folder.mkdir()
    study.finish(study.start())
    local.run()
    assert differing(study, local) == []


@pytest.mark.parametrize(
    ("execution", "ranks", "wanted", "granted"),
    [
        ({"clients_at_once": 3, "nodes": 3, "gpus": 3}, 1, "gres", "gres/gpu=3,node=3"),
        ({"clients_at_once": 2, "nodes": 2, "gpus": 4}, 2, "gpus", "gres/gpu=4,node=2"),
        ({"gpus": 2}, 2, "gpus-per-node", "gres/gpu=2,node=1"),
    ],
)
def test_a_round_in_one_job_over_nodes_and_gpus(
    tmp_path: Path, execution: dict[str, int], ranks: int, wanted: str, granted: str
) -> None:
    changes = {
        "rounds": 1,
        "methods": ["fedamole"],
        "training": {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "ranks": ranks},
    }
    local = new_study(tmp_path / "local", **changes)
    study = smoke_study(tmp_path / "study", execution=execution, **changes)
    study.edits = {"gpu_request: gpus ": f"gpu_request: {wanted} "}
    study.finish(study.start())
    local.run()
    assert differing(study, local) == []
    [job] = submitted(study.said())
    tres, nodes, cores = accounted(job, "AllocTRES", "NNodes", "AllocCPUS")
    assert int(cores) == execution.get("clients_at_once", 1) * ranks
    assert granted == f"{next(part for part in tres.split(',') if 'gpu' in part)},node={nodes}"
    seats = {item.process for item in study.progress().values()}
    assert len(seats) == execution.get("clients_at_once", 1)


def weights(study: Study, *within: str) -> dict[str, np.ndarray]:
    """Tensors that client 0 uploads after a round; the study runs within a command."""
    study.folder.mkdir()
    done = subprocess.run(
        [*within, *study.command("--quiet", "rules")],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr + study.logs()
    upload = next(study.results.glob("runs/*/fedamole/round_001/client_000.h5"))
    return {
        f"{name} {part} {key}": array
        for name, group in read_upload(upload).state.groups.items()
        for part in ("experts", "shared")
        for key, array in getattr(group, part).items()
    }


ONE_ROUND = {
    **SMOKE,
    "results": "results",
    "rounds": 1,
    "methods": ["fedamole"],
    "training": {"steps": 4, "batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-3},
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return weights(Study(tmp_path_factory.mktemp("one") / "study", ONE_ROUND))


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("deepspeed", ["zero1", "zero2", "zero3"])
def test_two_nodes_with_two_ranks_each_give_the_weights_of_one_process(
    one_process: dict[str, np.ndarray], tmp_path: Path, deepspeed: str
) -> None:
    training = {**ONE_ROUND["training"], "ranks": 4, "deepspeed": deepspeed}
    config = {**ONE_ROUND, "training": training, "execution": {"nodes": 2}}
    # A job of two nodes in which Snakemake runs; the rule starts the ranks through srun.
    found = weights(Study(tmp_path / "study", config), *ALLOCATION)
    assert found.keys() == one_process.keys()
    for name, expected in one_process.items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-5, err_msg=name)


def test_the_ranks_of_a_client_sat_on_two_nodes(tmp_path: Path) -> None:
    code = (
        "from fedamole.launching import *; from fedamole.launching import seat; import os, json;"
        "s = seat(Layout(ranks=4, nodes=2));"
        "gpus = os.environ['CUDA_VISIBLE_DEVICES'];"
        "print(json.dumps([os.environ['SLURMD_NODENAME'], s.rank, s.local_number, gpus]))"
    )

    launch = (
        "from fedamole import launching as l;"
        "l._by_srun(l.Layout(ranks=4, nodes=2), ['python', '-c', " + repr(code) + "])"
    )

    done = subprocess.run(
        [*ALLOCATION, "--gres=gpu:2", "python", "-c", launch],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    seats = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda s: s[1])
    nodes = [node for node, *_ in seats]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    assert [local for _, _, local, _ in seats] == [0, 1, 0, 1]
    # Every rank sees the GPUs of its node; its local number chooses.
    assert {gpus for *_, gpus in seats} == {"0,1"}
