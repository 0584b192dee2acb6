"""Figures: the files, their bytes, and the numbers that they are drawn from."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from study import Study, write_lines

from fedamole.cli import main
from fedamole.drawing_bars import bands_of_panels, draw_bars
from fedamole.drawing_heat import draw_heat
from fedamole.drawing_lines import draw_sweep
from fedamole.drawing_parts import COLOURS, MARKERS, colour, hatch, inches, marker, setting_axis
from fedamole.drawing_routing import draw_routing
from fedamole.errors import FedamoleError
from fedamole.figure_data import (
    COMMON,
    assignment_rows,
    classes_rows,
    experts_rows,
    first_middle_last,
    rounds_rows,
    share_in_common,
)
from fedamole.figure_rows_experts import routing_rows, stability_rows
from fedamole.figure_rows_scores import bars_rows, sweep_rows, swept
from fedamole.figures import PNG_DOTS_PER_INCH, figure_files
from fedamole.records import AssignmentRecord
from fedamole.registry import METHODS
from fedamole.results import Metrics, figure_names, read_metrics
from fedamole.settings import TablesSettings
from fedamole.stages import ResultsStage, SweepPoint, canonical_json

STUDY = Study(
    score=lambda slug, method, round_, client: 0.1 * client + 0.05 * round_,
    loss=lambda slug, method, round_, client: 3.0 - 0.1 * round_ + client,
    methods=("fedamole", "fedit", "zero-shot"),
    clients=3,
    rounds=2,
    modules=5,
    experts=4,
)
SLUG = "chatterbot-dir0.5-s42"


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    paths = STUDY.write(tmp_path_factory.mktemp("metrics"))
    return read_metrics(paths, STUDY.settings())


@pytest.fixture(scope="module")
def files(metrics: Metrics) -> dict[str, bytes]:
    return dict(figure_files(metrics, STUDY.settings()))


def test_names_are_known_before_drawing(files: dict[str, bytes]) -> None:
    assert list(files) == figure_names(STUDY.settings())
    figures = ["rounds", "bars", "stability"]
    figures += [f"{SLUG}-{k}" for k in ("classes", "fedamole-experts", "fedamole-assignment")]
    assert {name.rsplit(".", 1)[0] for name in files} == set(figures)


def test_same_bytes_again(files: dict[str, bytes], metrics: Metrics) -> None:
    assert dict(figure_files(metrics, STUDY.settings())) == files


def test_same_bytes_in_another_process_with_other_defaults(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nlines.linewidth: 9\n")
    paths = [str(path) for path in STUDY.write(tmp_path / "metrics")]
    arguments = ["figures", "--settings", canonical_json(STUDY.settings()), "--metrics", *paths]
    subprocess.run(
        [sys.executable, "-m", "fedamole", *arguments, "--out-dir", str(tmp_path / "figures")],
        check=True,
        cwd=tmp_path,
    )
    written = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert written == files


def test_png_is_one_or_two_columns_wide(files: dict[str, bytes]) -> None:
    for name, content in files.items():
        if name.endswith(".png"):
            assert content[:8] == b"\x89PNG\r\n\x1a\n"
            assert int.from_bytes(content[16:20]) in {
                int(3.4 * PNG_DOTS_PER_INCH),
                int(7.0 * PNG_DOTS_PER_INCH),
            }


def test_pictures_hold_no_date_and_no_version(files: dict[str, bytes]) -> None:
    for name, content in files.items():
        if name.endswith(".svg"):
            assert b"<dc:date>" not in content
            assert b"Matplotlib v" not in content
        if name.endswith(".png"):
            assert b"Software" not in content
        if name.endswith(".pdf"):
            assert b"Date" not in content
            assert b"Producer" not in content


def test_pdf_holds_its_fonts_as_outlines(files: dict[str, bytes]) -> None:
    for name, content in files.items():
        if name.endswith(".pdf"):
            assert b"/FontFile2" in content
            assert b"/Type3" not in content


def test_csv_holds_the_rows_drawn(files: dict[str, bytes], metrics: Metrics) -> None:
    run = metrics.run(SLUG, "fedamole")
    drawn = {
        "rounds": rounds_rows(metrics, STUDY.settings()),
        "bars": bars_rows(metrics, STUDY.settings()),
        "stability": stability_rows(metrics, STUDY.settings()),
        f"{SLUG}-classes": classes_rows(run),
        f"{SLUG}-fedamole-experts": experts_rows(run),
        f"{SLUG}-fedamole-assignment": assignment_rows(run),
    }
    for name, rows in drawn.items():
        read = list(csv.DictReader(files[f"{name}.csv"].decode().splitlines()))
        plain = [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
        assert read == plain


def test_rounds_are_mean_and_range_over_clients(metrics: Metrics) -> None:
    rows = rounds_rows(metrics, STUDY.settings())
    assert [(row["method"], row["round"]) for row in rows] == [
        ("fedamole", 1),
        ("fedamole", 2),
        ("fedit", 1),
        ("fedit", 2),
        ("zero-shot", 0),
    ]
    second = rows[1]  # scores 0.1, 0.2, 0.3; losses 2.8, 3.8, 4.8
    assert second["score_mean"] == pytest.approx(0.2)
    assert (second["score_lowest"], second["score_highest"]) == pytest.approx((0.1, 0.3))
    assert second["eval_loss_mean"] == pytest.approx(3.8)


def test_experts_held_and_shared() -> None:
    record = AssignmentRecord(
        round=1,
        modules=["q", "v"],
        num_experts=3,
        holders=[[[0, 1], [0, 2], [0, 1]], [[1, 2], [0, 2], [1, 2]]],
        objective=[1.0, 1.0],
    )
    assert record.held(0, 0) == {0, 1, 2}
    assert record.held(1, 0) == {1}
    assert share_in_common(record, 0, 1) == 2 / 6  # both q0, q2; either q0-2, v0-2
    assert share_in_common(record, 1, 2) == 2 / 6  # both v0, v2; either q0-2, v0-2
    assert share_in_common(record, 0, 0) == 1.0


def test_experts_add_up_to_the_choices(metrics: Metrics) -> None:
    rows = experts_rows(metrics.run(SLUG, "fedamole"))
    assert {row["round"] for row in rows} == {2}
    assert sum(row["experts"] for row in rows) == STUDY.modules * STUDY.experts * STUDY.holders


def test_assignment_shows_three_modules_and_all_pairs(metrics: Metrics) -> None:
    run = metrics.run(SLUG, "fedamole")
    rows = assignment_rows(run)
    modules = run.assignments[2].modules
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    assert panels == [modules[0], modules[2], modules[4], COMMON]
    held = {(row["row"], row["column"]) for row in rows if row["panel"] == modules[2]}
    assert len(held) == STUDY.experts * STUDY.clients
    chosen = [row for row in rows if row["panel"] == modules[2] and row["value"]]
    pairs = [(e, k) for e, clients in enumerate(run.assignments[2].holders[2]) for k in clients]
    assert [(row["row"], row["column"]) for row in chosen] == pairs


@pytest.mark.parametrize(("count", "indices"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2])])
def test_first_middle_last(count: int, indices: list[int]) -> None:
    assert first_middle_last(count) == indices


def test_methods_look_different() -> None:
    assert len(set(zip(COLOURS * 7, MARKERS * 8, strict=True))) == 56
    assert len({(colour(method), marker(method)) for method in METHODS}) == len(METHODS)
    assert len({(colour(method), hatch(method)) for method in METHODS}) == len(METHODS)


@pytest.mark.parametrize(
    "study",
    [
        Study(STUDY.score, STUDY.loss, ["fedamole"], clients=1, rounds=1, modules=1, holders=1),
        Study(STUDY.score, STUDY.loss, ["zero-shot"], classes=[f"c{k}" for k in range(60)]),
    ],
    ids=["one of everything", "many classes"],
)
def test_extreme_sizes_can_be_drawn(study: Study, tmp_path: Path) -> None:
    metrics = read_metrics(study.write(tmp_path), study.settings())
    assert [name for name, _ in figure_files(metrics, study.settings())] == figure_names(
        study.settings()
    )


def test_bars_are_means_over_clients_in_the_round_that_counts(metrics: Metrics) -> None:
    rows = bars_rows(metrics, STUDY.settings())
    # Clients have 0, 0.1, 0.2, and 0.05 more after each round.
    assert {row["method"]: row["score"] for row in rows} == pytest.approx(
        {"fedamole": 0.2, "fedit": 0.2, "zero-shot": 0.1}
    )
    assert {row["clients"] for row in rows} == {3}


def score_rows(scores: dict[tuple[str, str, int, str], float | None]) -> list[dict[str, Any]]:
    """Rows of bars from (scenario, metric, seed, method) -> score."""
    keys = ("scenario", "metric", "seed", "method")
    return [
        dict(zip(keys, key, strict=True)) | {"clients": 4, "score": score}
        for key, score in scores.items()
    ]


def test_bars_start_at_zero_and_their_error_is_the_sample_deviation() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.3, 0.5, size=(2, 3))  # methods x seeds
    rows = score_rows(
        {
            ("a", "rouge_l", seed, method): float(scores[m, seed])
            for m, method in enumerate(("fedamole", "fedit"))
            for seed in range(3)
        }
    )
    (axes,) = draw_bars(rows).axes
    assert axes.get_ylim()[0] == 0
    heights = [patch.get_height() for patch in axes.patches]
    assert heights == pytest.approx((100 * scores.mean(axis=1)).tolist())
    lines = [line for bars in axes.containers if hasattr(bars, "lines") for line in bars.lines[2]]
    spans = [np.ptp(line.get_segments()[0][:, 1]) / 2 for line in lines]
    assert spans == pytest.approx((100 * scores.std(axis=1, ddof=1)).tolist())


def test_a_metric_has_a_panel_and_an_axis_of_its_own() -> None:
    rows = score_rows(
        {
            ("a", "accuracy", 1, "fedamole"): 0.8,
            ("b", "rouge_l", 1, "fedamole"): 0.2,
            ("c", "accuracy", 1, "fedamole"): None,
        }
    )
    first, second = draw_bars(rows).axes
    assert (first.get_ylabel(), second.get_ylabel()) == ("accuracy (%)", "ROUGE-L (%)")
    assert [label.get_text() for label in first.get_xticklabels()] == ["a", "c"]
    assert first.get_ylim()[1] > 80 > 25 > second.get_ylim()[1]
    assert [text.get_text() for text in first.texts] == ["80.0", "n/a"]


@pytest.mark.parametrize("methods", [1, 3, 8, 22])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_every_scenario_has_its_place(methods: int, count: int) -> None:
    metrics = {f"scenario{i}": ("accuracy", "rouge_l")[i % 2] for i in range(count)}
    bands = bands_of_panels(metrics, methods, 7.0)
    panels = [panel for band in bands for panel in band]
    assert sorted(name for panel in panels for name in panel) == sorted(metrics)
    assert all(len({metrics[name] for name in panel}) == 1 for panel in panels)
    for band in bands:
        assert sum(inches(name, 6.5) for panel in band for name in panel) <= 7.0


def swept_study(sweep: dict[str, list[Any]]) -> tuple[Study, ResultsStage]:
    """A study of two methods over all combinations, whose names end in their numbers."""
    points: list[dict[str, Any]] = [{}]
    for key, values in sweep.items():
        points = [{**point, key: value} for point in points for value in values]
    study = Study(
        score=lambda slug, method, round_, client: int(slug[1:3]) / 100,
        loss=lambda slug, method, round_, client: 1.0,
        methods=("fedamole", "zero-shot"),
        scenarios={f"p{number:02}": [1, 2] for number in range(len(points))},
        clients=5,
        rounds=2,
        tables=TablesSettings(figures=["sweep", "routing"]),
    )
    named = dict(zip(study.scenarios, points, strict=True))
    columns = {name: SweepPoint(base="base", values=values) for name, values in named.items()}
    return study, study.settings().model_copy(update={"sweep": columns})


def test_one_swept_setting_is_an_axis_in_the_order_of_the_config(tmp_path: Path) -> None:
    study, settings = swept_study({"training.learning_rate": [5e-4, 1e-5, 1e-4]})
    rows = sweep_rows(read_metrics(study.write(tmp_path), settings), settings)
    assert swept(rows) == ["training.learning_rate"]
    (axes,) = draw_sweep(rows).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.0005", "1e-05", "0.0001"]
    assert (axes.get_title(), axes.get_xlabel()) == ("base", "learning rate")
    trained = next(line for line in axes.get_lines() if line.get_color() == colour("fedamole"))
    assert trained.get_ydata().tolist() == pytest.approx([0.0, 1.0, 2.0])


def test_two_swept_settings_are_a_matrix_whose_best_cell_is_framed(tmp_path: Path) -> None:
    study, settings = swept_study(
        {"training.learning_rate": [1e-4, 1e-5], "privacy.embeddings": [None, {"eta": 1.0}]}
    )
    rows = sweep_rows(read_metrics(study.write(tmp_path), settings), settings)
    first, second = (axes for axes in draw_heat(rows).axes if axes.get_visible())
    assert (first.get_title(), second.get_title()) == ("fedamole", "zero-shot")
    assert (first.get_xlabel(), first.get_ylabel()) == ("eta", "learning rate")
    assert [label.get_text() for label in first.get_xticklabels()] == ["none", "1"]
    written = {text.get_position(): text.get_text() for text in first.texts}
    assert written == {(0, 0): "0.0", (1, 0): "1.0", (0, 1): "2.0", (1, 1): "3.0"}
    (frame,) = first.patches
    assert frame.get_xy() == (0.5, 0.5)


def test_axis_of_partitions_says_alpha_if_all_have_one() -> None:
    key = "scenarios.partition"
    assert setting_axis(key, ["dir0.1", "dir100"]) == ("Dirichlet alpha", ["0.1", "100"])
    assert setting_axis(key, ["dir0.1", "iid"]) == ("partition", ["dir0.1", "iid"])
    assert setting_axis("training.batch_size", ["1"]) == ("batch size", ["1"])


def test_sweeps_and_maps_have_the_same_bytes_again(tmp_path: Path) -> None:
    study, settings = swept_study({"scenarios.clients": [5, 6]})
    metrics = read_metrics(study.write(tmp_path), settings)
    files = dict(figure_files(metrics, settings))
    assert list(files) == figure_names(settings)
    assert dict(figure_files(metrics, settings)) == files


def test_stability_is_the_share_of_experts_held_again(metrics: Metrics) -> None:
    first, second = stability_rows(metrics, STUDY.settings())
    assert (first["round"], first["kept"]) == (1, None)
    before, after = metrics.run(SLUG, "fedamole").assignments.values()
    shares = []
    for module in range(STUDY.modules):
        for client in range(STUDY.clients):
            old, new = before.held(module, client), after.held(module, client)
            shares.append(len(old & new) / len(old | new))
    assert second["kept"] == pytest.approx(np.mean(shares))


def test_map_shows_every_client_in_the_colour_of_its_class(metrics: Metrics) -> None:
    run = metrics.run(SLUG, "fedamole")
    rows = routing_rows(run)
    figure = draw_routing(rows)
    axes, bars = figure.axes
    assert [text.get_text() for text in axes.texts] == ["0", "1", "2"]
    (points, *_) = axes.collections
    assert points.get_offsets().tolist() == [list(place) for place in run.assignments[2].map or []]
    largest = [int(np.argmax(counts)) for counts in run.partition.counts]
    assert [row["class"] for row in rows] == [run.partition.classes[index] for index in largest]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    shades = dict(zip(names, COLOURS, strict=False))
    painted = [to_rgba(shades[row["class"]], 0.85) for row in rows]
    assert [tuple(shade) for shade in points.get_facecolor()] == painted
    held = [
        np.mean([len(run.assignments[2].held(m, k)) for m in range(STUDY.modules)])
        for k in range(STUDY.clients)
    ]
    assert [patch.get_height() for patch in bars.patches] == pytest.approx(held)


def test_a_client_that_was_not_drawn_is_not_on_the_map(metrics: Metrics) -> None:
    rows = routing_rows(metrics.run(SLUG, "fedamole"))
    axes = draw_routing([{**rows[0], "x": None, "y": None}, *rows[1:]]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1", "2"]


def test_old_metrics_have_no_map_and_the_message_says_how_to_get_one(tmp_path: Path) -> None:
    lines = STUDY.lines("chatterbot-dir0.5", 42, "fedamole")
    for line in lines:
        line.pop("map", None)
        line.pop("map_shares", None)
    settings = STUDY.settings().model_copy(update={"methods": ["fedamole"]})
    metrics = read_metrics([write_lines(tmp_path / "old.jsonl", lines)], settings)
    with pytest.raises(FedamoleError, match=f"fedamole on {SLUG} have no map.*--forcerun gather"):
        routing_rows(metrics.run(SLUG, "fedamole"))


def test_command_imports_no_plotting_until_it_runs() -> None:
    code = (
        "import sys, fedamole.cli.results, fedamole.results\n"
        "print([m for m in ('torch', 'pandas', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_command_names_the_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--settings", canonical_json(STUDY.settings()), "--out-dir", str(tmp_path)]
    assert main(["figures", *arguments, "--metrics", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: cannot be read" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
