"""Which files of a finished study may go."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedamole import stages
from fedamole.artifacts import Header, canonical
from fedamole.cli import main
from fedamole.cli.prune import old_files
from fedamole.config import Config, load_config
from fedamole.config_files import read_yaml
from fedamole.planning.volumes import Volumes, disk_of
from fedamole.planning.workload import works_of
from fedamole.registry import RUNS, lookup

SLUG = "chatterbot-dir0.5-s42"
SIZE = 2**18
SAMPLED = {"fraction": 0.6, "dropout_rate": 0.3, "quorum": 0.5}


def study(configs: Path, folder: Path, **changes: Any) -> Config:
    """The smoke study of six rounds, with results in a folder."""
    raw = {**read_yaml(configs / "smoke.yaml"), "rounds": 6, "results": str(folder), **changes}
    (folder / "config.json").write_text(json.dumps(raw))
    return load_config(raw, configs)


def make_rounds(config: Config) -> dict[str, set[str]]:
    """Files of all rounds as the workflow makes them; run -> round/file."""
    made: dict[str, set[str]] = {}
    for work in works_of(config):
        who = stages.run_stage(config, SLUG, work.run).population
        files = {"000/pool.h5", "000/assignment.h5"}
        for round_ in range(1, config.rounds + 1) if work.trains else ():
            clients = [f"{client:03d}" for client in who.reporting(round_)]
            names = [f"client_{client}.h5" for client in clients]
            names += [f"metrics_{client}.json" for client in clients]
            names += [f"kept_{client}.h5" for client in clients if RUNS[work.run].keeps]
            names += ["pool.h5"] * (round_ <= work.aggregations(config.rounds))
            names += ["assignment.h5"] * (round_ < config.rounds)
            files |= {f"{round_:03d}/{name}" for name in names}
        for file in files:
            path = Path(config.results, "runs", SLUG, work.run, f"round_{file}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"0" * SIZE)
        made[work.run] = files
    return made


def there(config: Config) -> dict[str, set[str]]:
    """Files of all rounds that are there; run -> round/file."""
    runs = Path(config.results, "runs", SLUG)
    return {
        run.name: {str(path.relative_to(run))[len("round_") :] for path in run.glob("*/*")}
        for run in runs.iterdir()
    }


def write_metrics(config: Config, method: str) -> None:
    """A metrics file of a finished run."""
    row = lookup(method)
    digest = stages.digest(stages.client_stage(config, SLUG, row.run))
    rounds = range(1, config.rounds + 1) if row.trains else [0]
    numbers = {"eval_loss": 1.0, "score": 0.5, "num_train": 3, "num_eval": 3, "num_test": 3}
    numbers |= dict.fromkeys(("train_loss_first", "train_loss_last", "steps"), None)
    assignment = {"modules": ["q"], "num_experts": 1, "holders": [[[0]]], "objective": [1.0]}
    lines: list[dict[str, Any]] = [
        {"header": json.loads(Header("metrics-table", digest).to_json())},
        {"record": "run", "scenario": SLUG, "seed": 42, "method": method, "metric": "rouge_l"}
        | {"clients": 3, "rounds": max(rounds), "evaluated": row.evaluated},
        {"record": "partition", "classes": ["a"], "counts": [[3], [3], [3]]},
    ]
    for round_ in rounds:
        lines += [{"record": "client", "round": round_, "client": k, **numbers} for k in range(3)]
        lines += [{"record": "assignment", "round": round_, **assignment}] * row.assigns
    path = Path(config.results, "metrics", SLUG, f"{method}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(canonical(line) + "\n" for line in lines))


def prune(config: Config, *arguments: str) -> int:
    """Run the command on the study."""
    return main(["prune", "--configfile", f"{config.results}/config.json", *arguments])


def finished(configs: Path, folder: Path, **changes: Any) -> Config:
    config = study(configs, folder, **changes)
    for method in config.methods:
        write_metrics(config, method)
    return config


def test_the_newest_rounds_stay_with_the_pool_they_started_from(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = finished(configs, tmp_path)
    made = make_rounds(config)
    assert prune(config, "--keep", "2") == 0
    clients = [f"client_{client:03d}.h5" for client in range(3)]
    old = {f"{round_:03d}/{name}" for round_ in (1, 2, 3, 4) for name in clients}
    # Rounds 5 and 6 stay; round 5 started from pool 4, round 0 is where all began.
    old |= {f"{round_:03d}/pool.h5" for round_ in (1, 2, 3)}
    left = there(config)
    assert made["fedamole"] - left["fedamole"] == old
    assert made["fedit"] - left["fedit"] == old
    assert made["zero-shot"] == left["zero-shot"]
    # 15 files of 256 KiB each.
    text = capsys.readouterr().out
    assert f"{SLUG} fedamole: freed 3.8 MiB, 15 files" in text
    assert "together: freed 7.5 MiB" in text


def test_a_dry_run_deletes_nothing(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = finished(configs, tmp_path)
    made = make_rounds(config)
    assert prune(config, "--keep", "last", "--dry-run") == 0
    assert there(config) == made
    # Uploads of five rounds and pools 1 to 4, of two runs.
    assert "together: would free 9.5 MiB" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [6, 7, 1000])
def test_nothing_goes_if_all_rounds_are_kept(keep: int, configs: Path, tmp_path: Path) -> None:
    config = study(configs, tmp_path)
    make_rounds(config)
    for work in works_of(config):
        assert not list(old_files(config, SLUG, work, keep))


def test_of_what_each_client_kept_before_the_rounds_that_stay_the_latest_stays(
    configs: Path, tmp_path: Path
) -> None:
    methods = ["local", "fedsa-lora"]
    changes: dict[str, Any] = {"methods": methods, "tables": {"reference": "local"}}
    config = finished(configs, tmp_path, participation=SAMPLED, rounds=12, **changes)
    made = make_rounds(config)
    assert prune(config, "--keep", "2") == 0
    left = there(config)
    latest: dict[str, str] = {}
    for file in sorted(file for file in made["local"] if "kept" in file and file < "011"):
        latest[file.partition("/")[2]] = file
    # Some client took part for the last time long before.
    assert min(latest.values()) < "010"
    for run in methods:
        kept = {file for file in left[run] if "kept" in file}
        assert kept == set(latest.values()) | {file for file in made[run] if "kept" in file} & {
            f"{round_:03d}/kept_{client:03d}.h5" for round_ in (11, 12) for client in range(3)
        }


@pytest.mark.parametrize("keep", [1, 2, 6, 9])
@pytest.mark.parametrize("participation", [{}, SAMPLED])
def test_what_stays_is_what_the_plan_counts(
    participation: dict[str, float], keep: int, configs: Path, tmp_path: Path
) -> None:
    methods = ["fedamole", "fedit", "local", "centralised", "zero-shot"]
    config = study(
        configs,
        tmp_path,
        methods=methods,
        participation=participation,
        assignment={"num_experts": 4, "choices": 2, "max_experts": 6},
    )
    make_rounds(config)
    for work in works_of(config):
        kept = SIZE if work.run == "local" else 0
        each = Volumes(0, SIZE, kept, pool=SIZE, server=0, first=SIZE, assignment=SIZE)
        folder = Path(config.results, "runs", SLUG, work.run)
        assert disk_of(config, each, SLUG, work) == SIZE * len(list(folder.glob("*/*.h5")))
        for path in old_files(config, SLUG, work, keep):
            path.unlink()
        left = SIZE * len(list(folder.glob("*/*.h5")))
        assert disk_of(config, each, SLUG, work, keep) == left, work.run


@pytest.mark.parametrize("keep", ["0", "-1", "all", "1.5", "\u0663"])
def test_keep_is_a_number_of_rounds(
    keep: str, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = finished(configs, tmp_path)
    made = make_rounds(config)
    assert prune(config, f"--keep={keep}") == 2
    assert "must be last, or a number of rounds from 1 on" in capsys.readouterr().err
    assert there(config) == made


def test_a_study_of_other_settings_is_not_pruned(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_rounds(finished(configs, tmp_path))
    config = study(configs, tmp_path, training={"steps": 5})
    assert prune(config, "--keep", "last") == 2
    assert "was made with other settings" in capsys.readouterr().err
    assert there(config) == made


def test_what_is_no_round_of_the_study_stays(configs: Path, tmp_path: Path) -> None:
    # FedAMoLE was a row of the study before.
    make_rounds(study(configs, tmp_path))
    config = finished(configs, tmp_path, methods=["fedit-ft"], tables={"reference": "fedit-ft"})
    before = there(config)
    assert prune(config, "--keep", "last") == 0
    assert there(config)["fedamole"] == before["fedamole"]
    assert there(config)["fedit"] < before["fedit"]


def test_a_study_that_shows_what_it_cost_is_pruned(configs: Path, tmp_path: Path) -> None:
    # Nobody has gathered the costs: they need no round.
    config = finished(configs, tmp_path, tables={"show": ["overhead", "main"]})
    before = make_rounds(config)
    assert prune(config, "--keep", "last") == 0
    assert there(config)["fedit"] < before["fedit"]


def test_a_study_that_may_share_its_runs_is_pruned_only_on_demand(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A study with the row fedit, of the same run, may still have to test the averages."""
    tables = {"reference": "fedit-ft"}
    config = finished(configs, tmp_path, study="ablation", methods=["fedit-ft"], tables=tables)
    made = make_rounds(config)
    assert prune(config, "--keep", "last") == 2
    error = capsys.readouterr().err
    assert f"study ablation: other studies of {tmp_path} may still need" in error
    assert "--shared" in error and error.count("\n") == 1
    assert there(config) == made
    assert prune(config, "--keep", "last", "--shared") == 0
    assert there(config)["fedit"] < made["fedit"]
