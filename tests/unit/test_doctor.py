"""What `fedamole doctor` makes of other sites' answers; tests/cluster has it on a real SLURM."""

import builtins
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedamole import slurm_site
from fedamole.cli import main
from fedamole.config import Config, load_config
from fedamole.config_files import read_yaml
from fedamole.doctor import demands, findings, folders, host, node, profile, site, study
from fedamole.errors import FedamoleError

PROFILE: dict[str, Any] = {
    "executor": "slurm",
    "jobs": 10,
    "retries": 2,
    "keep-going": True,
    "rerun-incomplete": True,
    "slurm-status-command": "squeue",
    "default-resources": {"slurm_partition": "gpu", "slurm_account": "lab"},
}
PARTITIONS = """
PartitionName=cpu AllowGroups=ALL AllowAccounts=ALL Default=YES MaxTime=7-00:00:00 State=UP
PartitionName=gpu AllowGroups=ALL AllowAccounts=lab,phys Default=NO MaxTime=02:00:00 State=UP
PartitionName=old AllowGroups=ALL AllowAccounts=ALL Default=NO MaxTime=UNLIMITED State=DRAIN
"""
NODES = """g1|32|256000|gpu:a100:4(S:0-1),lscratch:800G|mixed
g2|32|256000|gpu:a100:4(S:0-1)|drained
g3|16|128000|gpu:v100:2|idle~
g4|64|512000|gpu:a100:8(S:0,1)|down*
"""
ANSWERS = {
    "sbatch": 'echo "sbatch: Job 7 to start at noon on g1" >&2',
    "squeue": "",
    "scancel": "",
    "srun": "",
    "scontrol": f"""case $* in
        *partition*) echo '{PARTITIONS}';;
        *) echo 'MinJobAge = 300 sec';;
        esac""",
    "sinfo": f"echo '{NODES}' | sed /^$/d",
    "sacctmgr": "echo 'lab|'; echo 'guest|cpu'",
    "sacct": "",
}


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Commands of a made-up site, the only ones on the PATH; call it to change what one does."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("mv", "sed"):
        (commands / name).symlink_to(shutil.which(name) or name)
    # Not even /bin: it may have a SLURM of its own.
    monkeypatch.setenv("PATH", str(commands))

    def put(**scripts: str | None) -> None:
        for name, script in scripts.items():
            path = commands / name
            if script is None:
                path.unlink(missing_ok=True)
                continue
            version = 'if [ "$1" = --version ]; then echo "slurm 24.05.1"; exit; fi'
            path.write_text(f"#!/bin/bash\n{version}\n{script}\n")
            path.chmod(0o755)

    put(**ANSWERS, fedamole="")
    return put


def profile_of(path: Path, **changes: Any) -> profile.Profile:
    """The profile above with other resources (``gpu_type=``) or options (``retries=``)."""
    options = json.loads(json.dumps(PROFILE))
    for name, value in changes.items():
        option = name.replace("_", "-")
        known = option in options or option.startswith("slurm-")
        if known and name not in ("slurm_partition", "slurm_account", "slurm_extra"):
            options[option] = value
        else:
            options["default-resources"][name] = value
    path.write_text(json.dumps(options))
    return profile.read_profile(path)


@pytest.fixture
def site_with(tmp_path: Path, answers: Callable[..., None]) -> Callable[..., site.Site]:
    """The made-up site under a profile with other resources or options."""
    return lambda **changes: site.Site(profile_of(tmp_path / "config.yaml", **changes))


@pytest.fixture
def study_with(configs: Path, tmp_path: Path) -> Callable[..., Config]:
    """The smoke study with another execution, backbone or training."""

    def make(**changes: Any) -> Config:
        raw = read_yaml(configs / "smoke.yaml") | {"results": str(tmp_path / "results")}
        raw["execution"] = {"mem_mb": 1000, "runtime": 60} | changes.pop("execution", {})
        return load_config(raw | changes, configs)

    return make


def summary(found: Any) -> list[tuple[str, str]]:
    """Level and thing of findings."""
    return [(finding.level, finding.what) for finding in found]


def problem(found: Any) -> str:
    """The line of the only finding that is not ok."""
    (line,) = [str(finding) for finding in found if finding.level != "ok"]
    return line


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("(null)", {}),
        ("gpu", {"": 1}),
        ("gpu:4", {"": 4}),
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:a100:2(S:0,3,5),gpu:v100:1(S:1),lscratch:800G", {"a100": 2, "v100": 1}),
        ("gpu:nvidia_a100_3g.20gb:8", {"nvidia_a100_3g.20gb": 8}),
        ("gpu:h100:no_consume:4", {"h100": 4}),
        ("lscratch:800G,shard:40,mps:400", {}),
    ],
)
def test_gpus_are_counted_by_type(gres: str, expected: dict[str, int]) -> None:
    assert slurm_site.gpus(gres) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("02:00:00", 120), ("7-00:00:00", 10080), ("1-01:30:00", 1530), ("UNLIMITED", None)],
)
def test_time_limits_are_minutes(text: str, expected: int | None) -> None:
    assert slurm_site.minutes(text) == expected


@pytest.mark.parametrize(
    ("state", "usable"),
    [
        ("idle", True),
        ("mixed", True),
        ("allocated", True),
        ("idle~", True),
        ("planned", True),
        ("down", False),
        ("drained", False),
        ("idle*", False),
        ("failing", False),
    ],
)
def test_nodes_that_are_out_start_no_jobs(state: str, usable: bool) -> None:
    assert slurm_site.Node("n", 1, 1, {}, state).is_usable == usable


def test_a_site_is_read(site_with: Callable[..., site.Site]) -> None:
    here = site_with()
    (gpu,) = here.chosen
    assert (gpu.max_minutes, gpu.accounts) == (120, {"lab", "phys"})
    assert [node.name for node in here.usable] == ["g1", "g3"]
    assert here.nodes[0].gpus == {"a100": 4}
    assert summary(site.commands()) == [("ok", "SLURM"), ("ok", "squeue")]


def test_missing_commands_are_named(answers: Callable[..., None]) -> None:
    answers(sbatch=None, srun="exit 1")
    assert "sbatch" in problem(site.commands())
    silent = "echo 'slurm_load_jobs error: Unable to contact controller' >&2; exit 1"
    answers(**ANSWERS | {"squeue": silent})
    assert "Unable to contact controller" in problem(site.commands())


@pytest.mark.parametrize(
    ("age", "first", "with_sacct", "level"),
    [
        ("300 sec", 40, True, "ok"),
        ("300 sec", 100, True, "ok"),
        ("300 sec", 101, True, "error"),
        ("10 sec", 40, True, "error"),
        ("10 sec", 40, False, "warning"),
        ("1h", 1000, True, "ok"),
    ],
)
def test_finished_jobs_stay_for_three_looks(
    site_with: Callable[..., site.Site],
    answers: Callable[..., None],
    age: str,
    first: int,
    with_sacct: bool,
    level: str,
) -> None:
    answers(scontrol=f"echo 'MinJobAge               = {age}'")
    if not with_sacct:
        answers(sacct=None)
    here = site_with(slurm_init_seconds_before_status_checks=first)
    assert site.status(here.profile).level == level


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"slurm_partition": "cpu"}, None),
        ({"slurm_partition": "gpu,nope"}, "nope does not exist; allowed: cpu, gpu, old"),
        ({"slurm_partition": "old"}, "old is DRAIN; wait"),
        ({"slurm_partition": ""}, "warning  slurm_partition      not set; jobs go to SLURM's"),
    ],
)
def test_partitions_exist_and_take_jobs(
    site_with: Callable[..., site.Site], changes: dict[str, Any], line: str | None
) -> None:
    found = list(site.partitions(site_with(**changes)))
    assert line in problem(found) if line else summary(found) == [("ok", "slurm_partition")]


def test_a_partition_without_a_living_node_is_an_error(
    site_with: Callable[..., site.Site], answers: Callable[..., None]
) -> None:
    answers(sinfo="echo 'g1|32|256000|gpu:4|down*'")
    assert "none of its 1 nodes is up" in problem(site.partitions(site_with()))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, None),
        ({"slurm_account": "LAB", "slurm_partition": "cpu"}, None),
        ({"slurm_account": "nolab"}, "nolab is no account of "),
        (
            {"slurm_account": "guest", "slurm_partition": "old"},
            "guest is not good for partition old",
        ),
        ({"slurm_account": "guest"}, "guest may not use partition gpu; allowed there: lab, phys"),
        ({"slurm_account": ""}, "not set; the plugin guesses"),
    ],
)
def test_accounts_are_the_users_own(
    site_with: Callable[..., site.Site], changes: dict[str, Any], line: str | None
) -> None:
    found = list(site.accounts(site_with(**changes)))
    assert line in problem(found) if line else summary(found) == [("ok", "slurm_account")]


def test_a_site_without_accounting_is_a_warning(
    site_with: Callable[..., site.Site], answers: Callable[..., None]
) -> None:
    answers(
        sacctmgr="echo 'You are not running a supported accounting_storage plugin' >&2; exit 1",
        sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1",
    )
    line = problem(site.accounts(site_with()))
    assert line.startswith("warning") and "supported accounting_storage plugin" in line
    assert site.sacct().level == "warning"
    answers(sacctmgr="")
    assert problem(site.accounts(site_with())).startswith("warning")


@pytest.mark.parametrize(
    ("execution", "changes", "line"),
    [
        ({}, {}, None),
        ({"gpus": 4}, {"gpu_type": "a100"}, None),
        ({"runtime": 121}, {}, "error    run time             jobs ask for 121 min; partition gpu"),
        (
            {"runtime": 121},
            {"max_runtime": 120},
            "jobs need 121 min, but max_runtime gives them",
        ),
        ({"mem_mb": 900}, {"max_mem_mb": 800}, "jobs need 900 MB, but max_mem_mb gives them 800"),
        ({}, {"retries": 2}, "warning  run time             the last retry asks for 240"),
        ({}, {"retries": 1}, None),
        ({}, {"retries": 2, "max_runtime": 120}, None),
        ({"mem_mb": 256001}, {}, "jobs ask for 256001 MB on a node; the largest node of gpu has"),
        (
            {"mem_mb": 200000},
            {"retries": 1},
            "warning  memory               the last retry asks for",
        ),
        ({"mem_mb": 200000}, {"retries": 1, "max_mem_mb": 256000}, None),
        ({"gpus": 5}, {}, "jobs ask for 5 GPUs on a node; the largest of gpu has 4"),
        ({"gpus": 3}, {"gpu_type": "v100"}, "jobs ask for 3 GPUs of type v100 on a node; the"),
        ({"gpus": 1}, {"gpu_type": "h100"}, "has no GPUs of type h100; types there: a100, v100"),
        ({"gpus": 8, "nodes": 2, "clients_at_once": 2}, {}, "jobs ask for 2; in gpu 1 can hold"),
        ({"clients_at_once": 33}, {}, "jobs ask for 33 on a node; the largest of gpu has 32"),
    ],
)
def test_jobs_are_compared_with_the_nodes_that_are_up(
    site_with: Callable[..., site.Site],
    study_with: Callable[..., Config],
    execution: dict[str, Any],
    changes: dict[str, Any],
    line: str | None,
) -> None:
    here = site_with(**{"retries": 0, **changes})
    found = list(demands.check(here, study_with(execution=execution)))
    assert line in problem(found) if line else summary(found) == [("ok", "training jobs")]


@pytest.mark.parametrize(
    ("execution", "changes", "expected"),
    [
        ({}, {}, ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1"]),
        ({"gpus": 2}, {"gpu_type": "a100"}, ["--gpus=a100:2"]),
        ({"gpus": 2}, {"gpu_request": "gres", "gpu_type": "a100"}, ["--gres=gpu:a100:2"]),
        ({"gpus": 2}, {"gpu_request": "gpus-per-node"}, ["--gpus-per-node=2"]),
        (
            {"gpus": 4, "nodes": 2, "clients_at_once": 4},
            {},
            ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"],
        ),
        ({}, {"slurm_extra": "--nice=100 --exclude=g1"}, ["--nice=100", "--exclude=g1"]),
        ({}, {"constraint": "'a100|h100'", "slurm_qos": "long"}, ["--constraint=a100|h100"]),
    ],
)
def test_the_dry_submission_asks_as_the_jobs_will(
    site_with: Callable[..., site.Site],
    study_with: Callable[..., Config],
    answers: Callable[..., None],
    execution: dict[str, Any],
    changes: dict[str, Any],
    expected: list[str],
) -> None:
    answers(sbatch='echo "asked: $*"')
    finding = demands.dry_submission(site_with(**changes), study_with(execution=execution), False)
    always = ["--test-only", "--partition=gpu", "--account=lab", "--mem=1000", "--time=60"]
    assert {*always, *expected} <= set(finding.value.split())


@pytest.mark.parametrize(("failed", "level"), [(False, "error"), (True, "warning")])
def test_a_refusal_is_told_in_slurms_words(
    site_with: Callable[..., site.Site],
    study_with: Callable[..., Config],
    answers: Callable[..., None],
    failed: bool,
    level: str,
) -> None:
    answers(sbatch="echo 'sbatch: error: QOSMaxGRESPerUser' >&2; exit 1")
    finding = demands.dry_submission(site_with(), study_with(), failed)
    assert finding.level == level
    assert "--partition=gpu" in finding.value and "error: QOSMaxGRESPerUser" in finding.value


def test_the_newest_file_of_a_profile_counts(tmp_path: Path) -> None:
    for name in ("config.yaml", "config.v9+.yaml", "config.v999+.yaml", "other.yaml"):
        (tmp_path / name).write_text("executor: slurm")
    found = profile.find_profile(tmp_path)
    assert isinstance(found, profile.Profile) and found.path.name == "config.v9+.yaml"


def test_resources_may_be_a_list_and_rules_have_their_own(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "default-resources: [slurm_partition=cpu, slurm_account=lab]\n"
        "set-resources: {train_clients_000_009: {slurm_partition: gpu}, other: {mem_mb: 1}}\n"
    )
    found = profile.read_profile(path)
    assert (found.partitions, found.text("slurm_account")) == (["gpu"], "lab")
    assert found.number("mem_mb") is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, None),
        ({"constraint": "CHANGE_ME"}, "constraint: CHANGE_ME is a placeholder"),
        ({"qos": "<your qos>"}, "qos: <your qos> is a placeholder"),
        ({"executor": "local"}, "executor: local would run all jobs on this host"),
        ({"retries": 0}, "warning  profile              retries: none"),
        ({"keep_going": False}, "keep-going is not set"),
        ({"slurm_status_command": "sacct"}, "slurm-status-command: sacct; with sacct"),
        ({"gpu_request": "gpu"}, "gpu_request: gpu is unknown; allowed: gpus, gres, gpus-per-node"),
        ({"max_runtime": "2h"}, "max_runtime: 2h is no number; write whole minutes"),
        ({"slurm_partition": "all"}, "slurm_partition: all is a Python expression"),
    ],
)
def test_what_a_profile_must_say(tmp_path: Path, changes: dict[str, Any], line: str | None) -> None:
    found = list(profile.check(profile_of(tmp_path / "config.yaml", **changes), True))
    assert line in problem(found) if line else summary(found) == [("ok", "profile")]


def test_only_a_silent_slurm_leaves_its_placeholders_to_the_profile(tmp_path: Path) -> None:
    changed = profile_of(tmp_path / "config.yaml", slurm_partition="CHANGE_ME")
    assert summary(profile.check(changed, slurm_answers=True)) == [("ok", "profile")]
    assert "CHANGE_ME is a placeholder" in problem(profile.check(changed, slurm_answers=False))


FOUND = {"torch": "2.13.0", "cuda": "13.0", "deepspeed": "0.19.8", "gpus": 4, "device": "H100"}


@pytest.mark.parametrize(
    ("usable", "seconds", "needs_gpu", "level"),
    [
        (True, 8.0, True, "ok"),
        (True, 90.0, True, "warning"),
        (False, 8.0, True, "error"),
        (False, 8.0, False, "ok"),
    ],
)
def test_a_gpu_matters_where_one_is_asked_for(
    usable: bool, seconds: float, needs_gpu: bool, level: str
) -> None:
    found = FOUND | {"usable": usable, "seconds": seconds}
    finding = host._libraries("libraries", found, needs_gpu)
    assert finding.level == level
    assert ("4 x H100" in finding.value) == usable


NAMES = """main all gpu-long 2024-12 input 'all' a100|h100 min 1e5 gpu.2 123456 0x10 a.b 1a"""


@pytest.mark.parametrize("text", NAMES.split())
def test_names_that_snakemake_evaluates(text: str) -> None:
    """As its own code does: what has an unknown name, or is no expression, stays a text."""
    try:
        value = eval(text, {"__builtins__": builtins, "input": []})
    except (NameError, SyntaxError):
        value = text
    assert profile._is_evaluated(text) == (str(value) != text.strip("'"))


MOUNTS = """22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:40 / /home rw - nfs4 server:/home rw
31 22 0:41 / /home/my\\040data rw,relatime shared:1 master:2 - lustre mds:/x rw
32 22 0:42 / /tmp rw - xfs /dev/sdb rw
33 32 0:43 / /tmp rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/opt/x", ("/", "ext4")),
        ("/home/me/results", ("/home", "nfs4")),
        ("/homes/me", ("/", "ext4")),
        ("/home/my data/results", ("/home/my data", "lustre")),
        ("/tmp/results", ("/tmp", "tmpfs")),
    ],
)
def test_the_file_system_of_a_path(path: str, expected: tuple[str, str]) -> None:
    assert folders.mounts(Path(path), MOUNTS) == expected


def test_a_results_folder_is_left_as_it_was(tmp_path: Path) -> None:
    found = list(folders.check(tmp_path / "not" / "yet", nodes=1))
    assert summary(found) == [
        ("ok", "results folder"),
        ("ok", "clock"),
        ("ok", "file system"),
        ("ok", "free space"),
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["/proc/results", "a file", "a file/results"])
def test_a_folder_that_cannot_be_made_is_one_error(where: str, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    found = list(folders.check(tmp_path / where, nodes=4))
    assert summary(found) == [("error", "results folder")]
    assert str(tmp_path / where) in found[0].value


def test_a_file_system_of_one_machine_is_a_warning_for_several_nodes(tmp_path: Path) -> None:
    kind = folders.file_system(tmp_path)[1]
    if kind not in folders.LOCAL + folders.IN_MEMORY:
        pytest.skip(f"{tmp_path} is on {kind}")
    assert problem(folders.check(tmp_path, nodes=2)).startswith("warning  file system")


def test_a_clock_that_is_ahead_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = folders.time.time
    monkeypatch.setattr(folders.time, "time", lambda: real() + 10)
    finding = folders.skew("clock", tmp_path)
    assert finding.level == "warning" and finding.value.startswith("10.0 s")


def test_little_space_is_a_warning(
    study_with: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = study_with()
    needed = folders.need(config)
    assert needed is not None and 1e4 < needed < 1e8
    usage = type("Usage", (), {"free": needed - 1})
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage)
    assert problem(folders.check(tmp_path, 1, config)).startswith("warning  free space")


def test_the_longest_job_may_be_one_on_the_data_of_all_clients(
    study_with: Callable[..., Config],
) -> None:
    long = {
        "training": {"steps": 5_000_000, "batch_size": 1},
        "execution": {"clients_per_job": 1, "runtime": None},
        "tables": {"reference": "fedit"},
    }
    apart, pooled, half = (
        demands.needs(study_with(methods=["fedit", *methods], **long, **changes))[1]
        for methods, changes in (
            ([], {}),
            (["centralised"], {}),
            (["centralised"], {"participation": {"fraction": 0.5}}),
        )
    )
    assert pooled == half == pytest.approx(3 * apart, rel=0.01)


def test_a_sweep_asks_for_its_largest_job_and_for_the_space_of_all_points(
    study_with: Callable[..., Config], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"execution": {"runtime": None, "mem_mb": None}, "methods": ["fedit"]}
    given["tables"] = {"reference": "fedit"}
    steps, training = [2, 5_000_000], {"batch_size": 1}
    one, other = (study_with(training={**training, "steps": number}, **given) for number in steps)
    sweep = study_with(training=training, sweep={"training.steps": steps}, **given)
    assert demands.needs(sweep) == demands.needs(other) != demands.needs(one)
    spaces = [folders.need(config) for config in (sweep, one, other)]
    assert spaces[0] == pytest.approx((spaces[1] or 0) + (spaces[2] or 0))
    # The points share the tokens of their population.
    name = sweep.backbone.name
    tokens = tmp_path / "results" / "scenarios" / "chatterbot-dir0.5-s42" / f"tokens-{name}"
    tokens.mkdir(parents=True)
    (tokens / "meta.json").touch()
    (found,) = study.data(sweep)
    assert found.value == "chatterbot: tokenised for chatterbot-dir0.5-s42"


def test_kept_states_need_space(study_with: Callable[..., Config]) -> None:
    def needed(method: str, **changes: Any) -> float:
        found = folders.need(study_with(methods=[method], tables={"reference": method}, **changes))
        assert found is not None
        return found

    # Nothing is sent, but what each client trained stays with it. One of three trains in a round.
    assert needed("local") > 0.9 * needed("fedit-ft")
    sampled = {"participation": {"fraction": 0.3}, "rounds": 40}
    assert needed("local", **sampled) < 0.6 * needed("local", rounds=40)


def backbone_of(**source: Any) -> dict[str, Any]:
    return {"name": "model", **source}


def test_a_folder_backbone_needs_its_files(
    study_with: Callable[..., Config], tmp_path: Path
) -> None:
    config = study_with(backbone=backbone_of(folder=str(tmp_path / "model")))
    assert study.backbone(config).level == "error"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert study.backbone(config).level == "error"
    (tmp_path / "model" / "model.safetensors").touch()
    assert study.backbone(config).level == "ok"


def test_a_prepared_backbone_must_not_point_to_nowhere(
    study_with: Callable[..., Config], tmp_path: Path
) -> None:
    config = study_with(backbone=backbone_of(hub="org/model"))
    prepared = tmp_path / "results" / "backbones" / "model"
    prepared.mkdir(parents=True)
    (prepared / "backbone.json").touch()
    assert study.backbone(config, offline_is_error=True).level == "ok"
    (prepared / "model.safetensors").symlink_to("/scratch/of/another/host")
    assert "/scratch/of/another/host, which is not seen here" in str(study.backbone(config))


def test_a_gguf_file_must_exist(study_with: Callable[..., Config], tmp_path: Path) -> None:
    config = study_with(backbone=backbone_of(gguf="none.gguf", package="no_such_package"))
    assert "'no_such_package' is not installed" in str(study.backbone(config))
    config = study_with(backbone=backbone_of(gguf=str(tmp_path / "none.gguf")))
    assert "none.gguf does not exist" in str(study.backbone(config))


@pytest.mark.parametrize(("on_node", "level"), [(False, "warning"), (True, "error")])
def test_the_hub_needs_a_network_or_a_cache(
    study_with: Callable[..., Config],
    configs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_node: bool,
    level: str,
) -> None:
    """The caches are laid out as huggingface_hub and datasets do it."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    dataset = read_yaml(configs / "datasets" / "chatterbot.yaml")
    dataset["source"] = {"hub": "org/MyData"}
    scenario = {"dataset": dataset, "partition": "iid", "clients": 3}
    config = study_with(backbone=backbone_of(hub="org/model"), scenarios=[scenario])
    found = [study.backbone(config, on_node), *study.data(config, on_node)]
    assert [finding.level for finding in found] == [level, level]
    cached = tmp_path / "hf" / "datasets" / "org___my_data" / "default" / "0.0.0" / "abc"
    cached.mkdir(parents=True)
    assert [finding.level for finding in study.data(config, on_node)] == ["ok"]
    tokens = tmp_path / "results" / "scenarios" / next(iter(config.scenario_seeds()))
    (tokens / "tokens-model").mkdir(parents=True)
    (tokens / "tokens-model" / "meta.json").touch()
    assert "tokenised" in next(iter(study.data(config, on_node))).value


def test_a_cached_hub_model_is_found(tmp_path: Path) -> None:
    """In a process of its own: the hub's library reads its folders when it is imported."""
    hub = tmp_path / "hub" / "models--org--model"
    (hub / "snapshots" / "c0ffee").mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("c0ffee")
    for name in ("config.json", "model.safetensors"):
        (hub / "snapshots" / "c0ffee" / name).touch()
    code = (
        "from fedamole.doctor import study; from fedamole.settings import BackboneSettings\n"
        "print(study._hub_model(BackboneSettings(name='m', hub='org/model'), True))"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.startswith("ok") and "snapshots/c0ffee" in done.stdout


def test_missing_data_files_are_named(study_with: Callable[..., Config], configs: Path) -> None:
    dataset = read_yaml(configs / "datasets" / "chatterbot.yaml")
    dataset["source"] = {"files": ["nowhere/*.jsonl"]}
    scenario = {"dataset": dataset, "partition": "iid", "clients": 3}
    assert "nowhere/*.jsonl: no such data file" in problem(
        study.data(study_with(scenarios=[scenario]))
    )


def test_a_check_that_fails_hides_no_other() -> None:
    def crashes() -> Any:
        yield findings.ok("first", "is kept")
        raise KeyError("a defect")

    def cannot() -> Any:
        raise FedamoleError("squeue: is not on this machine")

    assert summary(findings.attempt("crash", crashes)) == [("ok", "first"), ("warning", "crash")]
    assert "not checked (squeue: is not" in problem(findings.attempt("silent", cannot))


def test_a_finding_is_one_line() -> None:
    line = str(findings.error("thing", "has\ntwo lines", "do\nthis"))
    assert line == "error    thing                has two lines; do this"


# A site whose nodes are this machine: srun runs its command, with what the test puts before it.
SRUN = """
while [[ $1 == --* ]]; do shift; done
export SLURMD_NODENAME=g1
exec "$@"
"""


@pytest.fixture
def node_with(
    site_with: Callable[..., site.Site],
    study_with: Callable[..., Config],
    answers: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], list[findings.Finding]]:
    """Look from a node whose srun is this script."""
    monkeypatch.setattr(node, "SEEN_LIMIT_S", 0.5)
    (tmp_path / "results").mkdir()

    def look(srun: str) -> list[findings.Finding]:
        answers(srun=srun)
        return list(node.look(site_with().profile, study_with()))

    return look


def test_a_node_that_sees_everything(
    node_with: Callable[[str], list[findings.Finding]], tmp_path: Path
) -> None:
    found = node_with(SRUN)
    assert {finding.what for finding in found} >= {
        "node: python",
        "node: working folder",
        "node: shared folder",
        "node: clock",
        "node: libraries",
        "node: TMPDIR",
        "node: backbone",
        "node: data",
        "answer of the node",
    }
    assert found[0].value.startswith("g1 on host ")
    assert [finding for finding in found if finding.level == "error"] == []
    assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.parametrize(
    ("srun", "line"),
    [
        (
            "echo 'srun: error: Unable to allocate resources: Requested nodes are busy' >&2; false",
            "warning  node                 the job did not start within 120 s (srun: error: Unable",
        ),
        (
            "echo 'slurmstepd-g1: error: execve(): python: No such file or directory' >&2; exit 2",
            "error    node                 the job ended with exit status 2 (slurmstepd-g1: error:",
        ),
        ("exit 0", "error    answer of the node   its file in "),
    ],
    ids=["busy", "no python", "another folder"],
)
def test_why_a_node_found_nothing(
    node_with: Callable[[str], list[findings.Finding]], srun: str, line: str
) -> None:
    assert problem(node_with(srun)).startswith(line)


def test_a_node_without_the_folder_says_so(
    node_with: Callable[[str], list[findings.Finding]], tmp_path: Path
) -> None:
    """Its file system is another one: the results folder is not there."""
    hide = f"mv {tmp_path}/results {tmp_path}/elsewhere"
    back = f"mv {tmp_path}/elsewhere {tmp_path}/results"
    found = node_with(f"{hide}; {SRUN.replace('exec ', '')}\n{back}")
    (error,) = [finding for finding in found if finding.level == "error"]
    assert error.what == "node: shared folder"
    assert "on this node is not that of the host that submits" in error.value


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    """Run the command: exit status, lines, and what it complains of."""
    try:
        code = main(["doctor", *arguments])
    except SystemExit as end:
        code = int(str(end.code))
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the seconds of importing torch."""
    monkeypatch.setattr(host, "libraries", lambda: findings.ok("libraries", "as tested elsewhere"))


@pytest.mark.usefixtures("quick")
def test_a_good_site_ends_with_0(
    answers: Callable[..., None],
    configs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(configs.parent)
    profile_of(tmp_path / "config.yaml")
    code, lines, err = run(capsys, "--profile", str(tmp_path))
    assert (code, lines[-1], err) == (0, "0 errors, 0 warnings", "")
    assert all(line.startswith("ok ") for line in lines[:-1])


@pytest.mark.usefixtures("quick")
def test_a_host_without_slurm_is_one_error(
    answers: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(**dict.fromkeys(ANSWERS))
    profile_of(tmp_path / "config.yaml")
    code, lines, _ = run(capsys, "--profile", str(tmp_path), "--from-node")
    assert code == 1
    (line,) = [line for line in lines if line.startswith("error")]
    assert "sbatch, squeue, scancel, srun, scontrol, sinfo: not on the PATH" in line
    assert "warning  cluster              not checked: SLURM and a profile are needed" in lines


@pytest.mark.usefixtures("quick")
def test_every_mistake_in_a_config_is_an_error(
    answers: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile_of(tmp_path / "config.yaml")
    (tmp_path / "study.yaml").write_text("rounds: 0\nseed: 1")
    arguments = ["--profile", str(tmp_path), "--configfile", str(tmp_path / "study.yaml")]
    code, lines, _ = run(capsys, *arguments)
    mistakes = [line for line in lines if line.startswith("error    config")]
    assert code == 1 and len(mistakes) >= 2
    assert any(line.startswith("ok       slurm_partition") for line in lines)


@pytest.mark.parametrize("option", ["--profile", "--configfile"])
def test_a_path_that_does_not_exist_is_a_bad_argument(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, err = run(capsys, option, str(tmp_path / "none"))
    assert (code, lines) == (2, [])
    assert err.startswith(f"fedamole: {option} {tmp_path / 'none'}: is no file")


def test_the_doctor_needs_no_torch() -> None:
    code = "import sys, fedamole.doctor, fedamole.doctor.on_node; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
