"""What runs cost: phases, files of costs, their table and figure, against numbers by hand."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.style
import pytest
from study import Study

from fedamole.artifacts import Header, read_record
from fedamole.cli import main
from fedamole.config import load_config
from fedamole.config_files import read_yaml
from fedamole.costs import (
    ClientCost,
    RoundCosts,
    RunCosts,
    StudyCosts,
    client_costs,
    job_seconds,
    read_costs,
    read_study_costs,
    write_costs,
)
from fedamole.drawing_overhead import draw_overhead
from fedamole.errors import FedamoleError
from fedamole.figures import DRAWN, PNG_DOTS_PER_INCH, STYLE, render
from fedamole.meter import ClientCosts, Machine, Meter
from fedamole.overhead_table import (
    overhead_bars,
    overhead_columns,
    overhead_notes,
    overhead_rows,
)
from fedamole.progress import ClientProgress, RoundProgress, Work
from fedamole.results import Metrics
from fedamole.stages import canonical_json, client_stage, digest

CHECKOUT = Path(__file__).parents[2]
HERE = Machine("a processor", None, 2)


# Phases


def test_time_counts_in_the_innermost_phase_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # Enter training, enter loading, leave it, enter testing, leave it, leave training.
    times = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    meter = Meter()
    with meter.phase("training"):
        with meter.phase("loading"):
            pass
        with meter.phase("testing"):
            pass
    reading = meter.read()
    assert reading.seconds == {"training": 1 + 4 + 16, "loading": 2, "testing": 8}
    assert meter.read().seconds == {}


def test_a_phase_that_fails_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 10.0, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    meter = Meter()
    with pytest.raises(ValueError, match="no"), meter.phase("training"):
        raise ValueError("no")
    with meter.phase("testing"):
        pass
    assert meter.read().seconds == {"training": 1, "testing": 2}


# What a client cost


def record(client: int, work: Work = "train", **changes: Any) -> ClientProgress:
    costs = ClientCosts(
        training_seconds=10.0 + client if work == "train" else 0.0,
        testing_seconds=2.0 if work == "train" else 3.0,
        embedding_seconds=1.0 if work == "train" else 0.0,
        peak_memory_mb=100.0 if work == "train" else 300.0,
        upload_bytes=2_000_000 if work == "train" else None,
        download_bytes=1_000_000 if work == "train" else None,
        trainable=500_000 if work == "train" else None,
        machine=HERE,
    )
    done = ClientProgress(work, client, "done", 0.0, 13.0, digest="mine", costs=costs)
    return replace(done, **changes)


def test_a_personal_model_costs_what_its_own_job_took() -> None:
    (cost,) = client_costs([4], [record(4), record(4, "test")], "fedit-ft", "mine")
    assert cost == ClientCost(
        client=4,
        training_seconds=14.0,
        testing_seconds=2.0,
        embedding_seconds=1.0,
        peak_memory_mb=100.0,
        upload_bytes=2_000_000,
        download_bytes=1_000_000,
        trainable=500_000,
    )


def test_an_averaged_model_costs_the_tests_of_its_own() -> None:
    """Clients that did not train in the round are tested as well."""
    records = [record(0), record(0, "test"), record(1, "test")]
    trained, only_tested = client_costs([0, 1], records, "fedit", "mine")
    assert (trained.training_seconds, trained.testing_seconds) == (10.0, 3.0)
    assert trained.peak_memory_mb == 300.0
    assert only_tested == ClientCost(client=1, testing_seconds=3.0, peak_memory_mb=300.0)


@pytest.mark.parametrize(
    "changes",
    [{"costs": None}, {"state": "failed"}, {"state": "dropped"}, {"digest": "of others"}],
)
def test_what_was_not_measured_is_none(changes: dict[str, Any]) -> None:
    assert client_costs([2], [record(2, **changes)], "fedamole", "mine") == [ClientCost(client=2)]
    assert client_costs([2], [], "fedamole", "mine") == [ClientCost(client=2)]


def test_the_time_of_a_job_is_that_of_its_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "assign.tsv"
    assert job_seconds(path) is None
    path.write_text("s\th:m:s\tmax_rss\n12.5\t0:00:12\t-\n")
    assert job_seconds(path) == 12.5
    path.write_text("s\th:m:s\n")
    with pytest.raises(FedamoleError, match="assign.tsv: is no benchmark of a finished job"):
        job_seconds(path)


# The command


def gather(folder: Path, method: str = "fedit-ft") -> list[str]:
    """A finished run of two clients and two rounds, and the arguments to gather its costs."""
    config = load_config(
        read_yaml(CHECKOUT / "configs/smoke.yaml") | {"methods": [method]}, CHECKOUT / "configs"
    )
    slug = next(iter(config.scenario_seeds()))
    stage = client_stage(config, slug, "fedit")
    study = Study(score=lambda *_: 0.5, loss=lambda *_: 1.0, methods=(method,), clients=2, rounds=2)
    (metrics,) = study.write(folder / "metrics")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[0]["header"]["digest"] = digest(stage)
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for round_ in (1, 2):
        progress = RoundProgress(folder / f"progress/round_{round_:03d}", "train", digest(stage))
        for client in (0, 1):
            progress.end(progress.start(client), costs=record(client).costs)
    benchmark = folder / "benchmarks/round_001/aggregate.tsv"
    benchmark.parent.mkdir(parents=True)
    benchmark.write_text("s\n4.25\n")
    names = ["--scenario", slug, "--method", method, "--metrics", str(metrics)]
    folders = ["--progress", str(folder / "progress"), "--benchmarks", str(folder / "benchmarks")]
    settings = ["--settings", canonical_json(stage)]
    return ["gather-costs", *settings, *names, *folders, "--out", str(folder / "costs.json")]


def test_the_file_of_costs_says_what_was_measured_and_not_where(tmp_path: Path) -> None:
    assert main(gather(tmp_path)) == 0
    header, content = read_record(tmp_path / "costs.json", "costs")
    assert list(header.parents) == ["metrics"]
    costs = read_costs(tmp_path / "costs.json", header.digest)
    assert [each.round for each in costs.rounds] == [1, 2]
    assert [c.training_seconds for each in costs.rounds for c in each.clients] == [10, 11] * 2
    jobs = [(each.aggregate_seconds, each.assign_seconds) for each in costs.rounds]
    assert jobs == [(4.25, None), (None, None)]
    assert content["machines"] == [{"processor": "a processor", "gpu": None, "threads": 2}]
    text = (tmp_path / "costs.json").read_text()
    assert str(tmp_path) not in text
    assert not {"host", "process", "started", "ended", "job"} & set(json.dumps(content).split('"'))
    assert len(text) < 3000


def test_costs_of_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = gather(tmp_path)
    arguments[arguments.index("--method") + 1] = "fedamole"
    assert main(arguments) == 2
    assert "is of fedit-ft on chatterbot-dir0.5-s42; fedamole on" in capsys.readouterr().err
    assert not (tmp_path / "costs.json").exists()


# The table


def run(method: str, seed: int, factor: float = 1.0, **known: Any) -> RunCosts:
    """Two rounds of two clients, of 10, 20, 30 and 40 seconds times a factor."""
    rounds = [
        RoundCosts(
            round=number,
            clients=[
                ClientCost(
                    client=client,
                    training_seconds=factor * (20 * number + 10 * client - 10),
                    upload_bytes=2_500_000,
                    **known,
                )
                for client in (0, 1)
            ],
            assign_seconds=factor if number == 1 else None,
        )
        for number in (1, 2)
    ]
    machine = {"processor": "a processor", "gpu": None, "threads": 1}
    return RunCosts(
        scenario=f"a-s{seed}", seed=seed, method=method, machines=[machine], rounds=rounds
    )


def untrained(seed: int) -> RunCosts:
    rounds = [RoundCosts(round=0, clients=[ClientCost(client=0, testing_seconds=5.0)])]
    return RunCosts(
        scenario=f"a-s{seed}", seed=seed, method="zero-shot", machines=[], rounds=rounds
    )


COSTS: StudyCosts = {
    "a": {
        "fedamole": [run("fedamole", 1), run("fedamole", 2, factor=3.0)],
        "zero-shot": [untrained(1), untrained(2)],
    }
}


def test_costs_are_means_over_clients_and_rounds_then_over_seeds() -> None:
    first, second = overhead_rows(COSTS)
    assert (first["scenario"], first["method"], first["seeds"]) == ("a", "fedamole", 2)
    # 25 and 75 seconds: the deviation of two numbers is their distance over the root of two.
    assert first["training_s_mean"] == pytest.approx(50.0)
    assert first["training_s_std"] == pytest.approx(50.0 / 2**0.5)
    assert (first["upload_mb_mean"], first["upload_mb_std"]) == (2.5, 0.0)
    # Of the one round that has it.
    assert first["assignment_s_mean"] == 2.0
    assert first["download_mb_mean"] is None
    assert second["training_s_mean"] is None
    assert second["testing_s_mean"] == 5.0
    assert list(first) == list(second)


def test_gpu_memory_is_a_column_only_where_there_is_a_gpu() -> None:
    titles = [column.title for column in overhead_columns(COSTS)["a"]]
    assert "GPU memory (MB)" not in titles
    with_gpu = {"a": {"fedamole": [run("fedamole", 1, peak_gpu_memory_mb=4000.0)]}}
    columns = {column.title: column for column in overhead_columns(with_gpu)["a"]}
    assert columns["GPU memory (MB)"].cells["fedamole"].mean == 4000.0


def test_the_note_says_what_it_was_measured_on() -> None:
    assert overhead_notes(COSTS)["a"][0].endswith("Measured on: a processor, 1 thread.")


def test_files_of_costs_of_a_study_are_found_by_what_they_say(tmp_path: Path) -> None:
    study = Study(lambda *_: 0.0, lambda *_: 0.0, ("fedamole", "zero-shot"), {"a": [1, 2]})
    paths = []
    for number, each in enumerate([each for runs in COSTS["a"].values() for each in runs]):
        paths.append(tmp_path / f"{number}.json")
        write_costs(paths[-1], Header("costs", "0" * 64), each)
    assert read_study_costs(reversed(paths), study.settings()) == COSTS
    with pytest.raises(FedamoleError, match="no file of costs of zero-shot on a-s2 was given"):
        read_study_costs(paths[:-1], study.settings())
    with pytest.raises(FedamoleError, match="is a second file of costs of fedamole on a-s1"):
        read_study_costs([*paths, paths[0]], study.settings())
    of_others = study.settings().model_copy(update={"digests": {"a-s1": {"fedamole": "1" * 64}}})
    with pytest.raises(FedamoleError, match="was made with other settings"):
        read_study_costs(paths, of_others)


# The figure


def test_the_figure_has_a_bar_for_each_number_and_fits_one_column() -> None:
    rows = overhead_bars(COSTS)
    assert {(row["method"], row["measure"]) for row in rows} == {
        ("fedamole", "upload"),
        ("fedamole", "training"),
        ("fedamole", "assignment"),
        ("zero-shot", "testing"),
    }
    with matplotlib.style.context(["default", STYLE]):
        figure = draw_overhead(rows)
        picture = render(figure, "png")
        assert picture == render(draw_overhead(rows), "png")
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}
    assert list(panels) == ["upload (MB)", "training (s)", "testing (s)", "assignment (s/round)"]
    widths = [[bar.get_width() for bar in axes.patches] for axes in panels.values()]
    assert widths == [[2.5], [pytest.approx(50.0)], [5.0], [2.0]]
    assert int.from_bytes(picture[16:20]) == int(3.4 * PNG_DOTS_PER_INCH)


def test_a_figure_of_costs_needs_a_number_in_each_scenario() -> None:
    nothing = run("fedamole", 1).model_copy(update={"rounds": []})
    study = Study(lambda *_: 0.0, lambda *_: 0.0, ("fedamole",), {"a": [1], "b": [1]})
    costs = {"a": {"fedamole": [run("fedamole", 1)]}, "b": {"fedamole": [nothing]}}
    settings = study.settings().model_copy(update={"figures": ["overhead"]})
    drawn = DRAWN["overhead"][0](Metrics({}, costs), settings)
    assert next(drawn)
    with pytest.raises(FedamoleError, match="figure overhead: nothing was measured on b; "):
        next(drawn)


# What is trained


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("name", "pack", "factor", "gates"),
    [("fedit", 1, 1, 0), ("fedit", 3, 1, 0), ("fml", 1, 2, 0), ("fedalt", 1, 1, 2)],
)
def test_trainable_numbers_are_those_of_the_lora(
    federation: Any, tmp_path: Path, name: str, pack: int, factor: int, gates: int
) -> None:
    """FedALT does not train the rest of the world; its mixer has a row for each of the two."""
    session = federation.session(name, training={"steps": 1, "pack_clients": pack})
    (only,) = federation.rounds(session, tmp_path, count=1)
    counted = session.meter.read().counts["trainable"]
    rank, shapes = session.settings.run.adapter.rank, federation.facts.modules
    lora = sum(rank * (each.in_features + each.out_features) for each in shapes)
    assert counted == factor * lora + gates * sum(each.in_features for each in shapes)
    assert len(only.uploads) == 3
