"""Figures: the files, their bytes, and the numbers that they are drawn from."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from study import Study

from fedamole.cli import main
from fedamole.drawing import COLOURS, MARKERS, colour, marker
from fedamole.figure_data import (
    COMMON,
    assignment_rows,
    classes_rows,
    experts_rows,
    first_middle_last,
    rounds_rows,
    share_in_common,
)
from fedamole.figures import PNG_DOTS_PER_INCH, figure_files
from fedamole.records import AssignmentRecord
from fedamole.registry import METHODS
from fedamole.results import Metrics, figure_names, read_metrics
from fedamole.stages import canonical_json

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
    figures = ["rounds"] + [f"{SLUG}-{k}" for k in ("classes", "fedamole-experts")]
    figures += [f"{SLUG}-fedamole-assignment"]
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


def test_png_is_one_column_wide(files: dict[str, bytes]) -> None:
    for name, content in files.items():
        if name.endswith(".png"):
            assert content[:8] == b"\x89PNG\r\n\x1a\n"
            assert int.from_bytes(content[16:20]) == int(3.4 * PNG_DOTS_PER_INCH)


def test_pictures_hold_no_date_and_no_version(files: dict[str, bytes]) -> None:
    for name, content in files.items():
        if name.endswith(".svg"):
            assert b"<dc:date>" not in content
            assert b"Matplotlib v" not in content
        if name.endswith(".png"):
            assert b"Software" not in content


def test_csv_holds_the_rows_drawn(files: dict[str, bytes], metrics: Metrics) -> None:
    run = metrics.run(SLUG, "fedamole")
    drawn = {
        "rounds": rounds_rows(metrics, STUDY.settings()),
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
