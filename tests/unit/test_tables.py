"""Tables against numbers computed by hand."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study import Study, write_lines

from fedamole.assignment_measures import measure
from fedamole.assignment_table import TITLES
from fedamole.cli import main
from fedamole.errors import FedamoleError
from fedamole.main_table import gain, loss_columns, score_columns
from fedamole.rendering import Cell, Column, html_page, html_table, latex, markdown, number
from fedamole.results import Metrics, Run, read_metrics, read_run, table_names
from fedamole.settings import TablesSettings
from fedamole.stages import canonical_json
from fedamole.tables import table_files

# Mean over clients in the last round by (scenario, seed, method); client 1 is 0.2 above client 0.
MEANS = {
    ("a-s1", "fedamole"): 0.50,
    ("a-s2", "fedamole"): 0.54,
    ("a-s1", "fedit"): 0.40,
    ("a-s2", "fedit"): 0.40,
    ("a-s1", "zero-shot"): 0.30,
    ("a-s2", "zero-shot"): 0.20,
}
METHODS = ("fedamole", "fedit", "zero-shot")


def score(slug: str, method: str, round_: int, client: int) -> float:
    early = 0.1 if method != "zero-shot" and round_ == 1 else 0.0
    return MEANS["a" + slug[1:], method] - early - 0.1 + 0.2 * client


def loss(slug: str, method: str, round_: int, client: int) -> float:
    return 2.0 + round_ + client


STUDY = Study(
    score, loss, METHODS, scenarios={"a": [1, 2]}, clients=2, rounds=2, modules=2, experts=4
)


def read(study: Study, folder: Path) -> Metrics:
    return read_metrics(study.write(folder), study.settings())


def tables(study: Study, folder: Path) -> dict[str, str]:
    return table_files(read(study, folder), study.settings())


def unmarked(text: str) -> str:
    """Markdown without the marks of the best numbers."""
    return text.replace("**", "").replace("<ins>", "").replace("</ins>", "")


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def test_score_is_mean_over_clients_then_mean_and_std_over_seeds(tmp_path: Path) -> None:
    metrics = read(STUDY, tmp_path)
    (column,) = score_columns(metrics, STUDY.settings())
    assert column.title == "a\nROUGE-L (%)"
    assert column.cells["fedamole"].mean == pytest.approx(52)
    assert column.cells["fedamole"].std == pytest.approx(2.8284271, rel=1e-6)  # |54 - 50| / sqrt(2)
    assert column.cells["fedit"].std == pytest.approx(0, abs=1e-12)
    assert column.gain == pytest.approx((52 - 40) / 40)
    (losses,) = loss_columns(metrics, STUDY.settings())
    assert losses.cells["fedamole"].mean == 4.5  # round 2, clients 0 and 1
    assert losses.cells["zero-shot"].mean == 2.5


def test_markdown_of_the_main_table(tmp_path: Path) -> None:
    assert tables(STUDY, tmp_path)["main.md"].splitlines() == [
        "| method | a ROUGE-L (%) | a eval loss |",
        "| :--- | ---: | ---: |",
        "| fedamole | **52.00** ± 2.83 | <ins>4.50</ins> ± 0.00 |",
        "| fedit | <ins>40.00</ins> ± 0.00 | <ins>4.50</ins> ± 0.00 |",
        "| zero-shot | 25.00 ± 7.07 | **2.50** ± 0.00 |",
        "| gain of fedamole over the best other | +30.00 % |  |",
    ]


def test_one_seed_shows_no_spread(tmp_path: Path) -> None:
    files = tables(replace(STUDY, scenarios={"a": [1]}), tmp_path)
    assert "| fedamole | **50.00** | <ins>4.50</ins> |" in files["main.md"]
    assert rows(files["main.csv"])[0]["score_std"] == ""


def test_best_round_is_that_of_the_lowest_mean_loss(tmp_path: Path) -> None:
    # The loss grows with the round, so the best is round 1, whose scores are 10 points lower.
    best = replace(STUDY, tables=TablesSettings(round="best", decimals=1))
    files = tables(best, tmp_path)
    assert "| fedamole | **42.0** ± 2.8 | <ins>3.5</ins> ± 0.0 |" in files["main.md"]
    assert {row["round"] for row in rows(files["clients.csv"]) if row["method"] == "fedit"} == {"1"}


def two_scenarios() -> Study:
    """Scenario b has the scores of a with the seeds exchanged."""
    exchanged = {"a": {1: 1, 2: 2}, "b": {1: 2, 2: 1}}

    def score_of(slug: str, method: str, round_: int, client: int) -> float:
        seed = exchanged[slug[0]][int(slug[-1])]
        return score(f"a-s{seed}", method, round_, client)

    return replace(STUDY, score=score_of, scenarios={"a": [1, 2], "b": [1, 2]})


def test_the_average_is_taken_seed_by_seed(tmp_path: Path) -> None:
    files = tables(two_scenarios(), tmp_path)
    # Each scenario has a spread over seeds; their average has none.
    assert "| **52.00** ± 2.83 | **52.00** ± 2.83 | **52.00** ± 0.00 |" in files["main.md"]
    *_, ours, _, _ = rows(files["main.csv"])
    assert (ours["scenario"], ours["method"], ours["metric"]) == ("average", "fedamole", "")
    assert float(ours["score_mean"]) == pytest.approx(0.52)
    assert float(ours["score_std"]) == pytest.approx(0, abs=1e-12)
    assert float(ours["gain"]) == pytest.approx(0.3)


def test_the_gain_may_be_over_some_rivals_only(tmp_path: Path) -> None:
    study = replace(STUDY, tables=TablesSettings(rivals=["zero-shot"]))
    files = tables(study, tmp_path)
    # Over 25, not over the 40 of fedit.
    assert "| gain of fedamole over the best other | +108.00 % |  |" in files["main.md"]
    assert "best other: of zero-shot" in files["main.md"]


def test_latex_marks_best_and_second_and_escapes(tmp_path: Path) -> None:
    text = tables(STUDY, tmp_path)["main.tex"]
    assert r"method & \shortstack[r]{a\\ROUGE-L (\%)} \\" + "\n\\midrule\n" in text
    assert r"fedamole & \textbf{52.00} $\pm$ 2.83 \\" in text
    assert r"fedit & \underline{40.00} $\pm$ 0.00 \\" in text
    assert text.startswith("\\begin{tabular}{lr}\n\\toprule\n")
    assert r"gain of fedamole\\over the best other} & $+30.00$\,\% \\" in text
    column = Column("x_y & 100%", {"a#b": Cell(1.0)}, "highest")
    assert r"method & x\_y \& 100\% \\" in latex([column], "none", 2)
    assert r"a\#b & 1.00 \\" in latex([column], "none", 2)


def test_csv_is_tidy_and_loses_no_digit(tmp_path: Path) -> None:
    files = tables(STUDY, tmp_path)
    first, *_ = main = rows(files["main.csv"])
    assert [row["method"] for row in main] == list(METHODS)
    assert (first["scenario"], first["metric"], first["seeds"]) == ("a", "rouge_l", "2")
    assert float(first["score_mean"]) == pytest.approx(0.52, rel=1e-12)
    assert [row["gain"] for row in main[1:]] == ["", ""]
    clients = rows(files["clients.csv"])
    assert len(clients) == 2 * 3 * 2  # seeds x methods x clients
    assert float(clients[1]["score"]) == score("a-s1", "fedamole", 2, 1)


def test_clients_table_has_mean_worst_and_spread(tmp_path: Path) -> None:
    lines = tables(STUDY, tmp_path)["clients.md"].splitlines()
    assert lines[0] == "**a-s1: ROUGE-L (%)**"
    assert lines[2] == "| method | client 0 | client 1 | mean | worst | std |"
    assert lines[4] == "| fedamole | **40.00** | **60.00** | **50.00** | **40.00** | 14.14 |"


def without(path: Path, clients: set[int]) -> None:
    """Take clients out of a metrics file, as if they had never been drawn."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [line for line in lines if line.get("client") not in clients]
    present = [k for k in range(kept[1]["clients"]) if k not in clients]
    kept[1]["took_part"] = {str(t): present for t in range(1, kept[1]["rounds"] + 1)}
    write_lines(path, kept)


def test_rows_are_compared_on_the_clients_that_are_in_all_of_them(tmp_path: Path) -> None:
    """In seed 1 row `fedamole` has no client 3, in seed 2 `fedit-ft` no client 0."""
    study = replace(STUDY, score=lambda *at: at[3] / 10, methods=("fedamole", "fedit", "fedit-ft"))
    study = replace(study, clients=4)
    paths = study.write(tmp_path)
    without(paths[0], {3})
    without(paths[5], {0})
    files = table_files(read_metrics(paths, study.settings()), study.settings())
    for row in rows(files["main.csv"]):
        assert float(row["score_mean"]) == pytest.approx(((0 + 1 + 2) / 3 + (1 + 2 + 3) / 3) / 20)
        assert (row["clients"], row["clients_total"]) == ("3", "4")
    remark = "a: over the clients with a number in every row, 3 of 4"
    assert files["main.md"].endswith(f" |\n\n{remark}\n")
    assert f"</table>\n<p>{remark}</p>\n" in files["main.html"]
    assert f"{{\\footnotesize {remark}\\par}}" in files["main.tex"]
    first, second = unmarked(files["clients.md"]).split("a-s2")
    assert "| fedit | 0.00 | 10.00 | 20.00 | 30.00 | 10.00 | 0.00 | 10.00 |" in first
    assert "mean, worst, std: over the clients with a number in every row, 3 of 4\n" in second


def test_rows_without_a_client_in_common_have_no_mean(tmp_path: Path) -> None:
    study = replace(STUDY, scenarios={"a": [1]}, methods=("fedamole", "fedit-ft"))
    study = replace(study, score=lambda *_: 0.5)
    paths = study.write(tmp_path)
    without(paths[0], {0})
    without(paths[1], {1})
    files = table_files(read_metrics(paths, study.settings()), study.settings())
    assert [row["score_mean"] for row in rows(files["main.csv"])] == ["", ""]
    assert "| fedamole | n/a | n/a |" in files["main.md"] and "0 of 2" in files["main.md"]
    assert "| fedamole | n/a | 50.00 | n/a | n/a | n/a |" in unmarked(files["clients.md"])


def test_where_all_take_part_nothing_is_said_of_it(tmp_path: Path) -> None:
    files = tables(STUDY, tmp_path)
    assert not any("every row" in text for text in files.values())
    assert {(row["clients"], row["clients_total"]) for row in rows(files["main.csv"])} == {
        ("2",) * 2
    }


def test_average_over_scenarios(tmp_path: Path) -> None:
    study = replace(STUDY, scenarios={"a": [1, 2], "b": [1]})
    *_, average = score_columns(read(study, tmp_path), study.settings())
    assert average.cells["fedamole"].mean == pytest.approx((52 + 50) / 2)
    assert average.cells["fedamole"].std is None
    assert average.gain == pytest.approx((12 / 40 + 10 / 40) / 2)


def test_gain_needs_a_reference_and_a_baseline() -> None:
    cells = {"ours": Cell(3.0), "theirs": Cell(2.0), "worse": Cell(1.0)}
    assert gain(cells, "ours") == 0.5
    assert gain(cells, "worse") == pytest.approx(-2 / 3)
    assert gain(cells, "absent") is None
    assert gain({"ours": Cell(3.0)}, "ours") is None


def test_gain_over_zero_is_said_to_be_unknown() -> None:
    cells = {"ours": Cell(3.0), "theirs": Cell(0.0)}
    column = Column("x", cells, "highest", gain(cells, "ours"))
    assert markdown([column], "ours", 2).endswith("| gain of ours over the best other | n/a |\n")


def test_equal_as_printed_is_marked_equally() -> None:
    cells = {"a": Cell(1.001), "b": Cell(1.004), "c": Cell(0.5), "d": Cell(0.5)}
    text = latex([Column("x", cells, "highest")], "none", 2)
    assert text.count(r"\textbf{1.00}") == 2
    assert text.count(r"\underline{0.50}") == 2


@pytest.mark.parametrize(
    ("value", "decimals", "text"), [(1.005, 1, "1.0"), (-0.001, 2, "0.00"), (12.5, 0, "12")]
)
def test_number(value: float, decimals: int, text: str) -> None:
    assert number(value, decimals) == text


def test_same_bytes_again_and_from_files_in_another_order(tmp_path: Path) -> None:
    paths, settings = STUDY.write(tmp_path), STUDY.settings()
    first = table_files(read_metrics(paths, settings), settings)
    assert first == table_files(read_metrics(reversed(paths), settings), settings)


def test_command_writes_the_files_it_names(tmp_path: Path) -> None:
    paths = [str(path) for path in STUDY.write(tmp_path / "metrics")]
    out = tmp_path / "tables"
    arguments = ["--settings", canonical_json(STUDY.settings()), "--out-dir", str(out)]
    assert main(["tables", *arguments, "--metrics", *paths]) == 0
    assert {path.name for path in out.iterdir()} == set(table_names(STUDY.settings()))


# Assignments


def test_assignments_table_has_the_methods_with_experts_and_their_spread(tmp_path: Path) -> None:
    study = replace(STUDY, rounds=3, clients=3)
    files = tables(study, tmp_path)
    lines = files["assignments.md"].splitlines()
    assert lines[0] == "**a**"
    assert lines[2] == (
        "| method | quality (%) | above chance (%) | stability (%) | follows the data (r) "
        "| fewest experts | most experts | experts without holder |"
    )
    assert len(lines) == 5, "fedit and zero-shot hand out no experts"
    # The made-up study has sums of 1.5, where 2.0 is optimal and 1.0 chance.
    assert lines[4].startswith("| fedamole | 75.00 ± 0.00 | 50.00 ± 0.00 | ")
    assert lines[4].endswith(" | 0.00 ± 0.00 |")
    (row,) = rows(files["assignments.csv"])
    metrics = read(study, tmp_path)
    runs = [metrics.run(slug, "fedamole") for slug in ("a-s1", "a-s2")]
    for what in TITLES:
        values = [measure(run)[what] for run in runs]
        assert float(row[f"{what}_mean"]) == pytest.approx(np.mean(values), rel=1e-12)
        assert float(row[f"{what}_std"]) == pytest.approx(np.std(values, ddof=1), abs=1e-12)


def test_one_round_says_nothing_of_assignments(tmp_path: Path) -> None:
    files = tables(replace(STUDY, rounds=1), tmp_path)
    assert files["assignments.md"].splitlines()[4] == "| fedamole |" + " n/a |" * 7
    (row,) = rows(files["assignments.csv"])
    assert {row[f"{what}_mean"] for what in TITLES} == {""}


def test_without_methods_with_experts_there_is_no_table_of_assignments(tmp_path: Path) -> None:
    baselines = replace(STUDY, methods=("fedit", "zero-shot"))
    files = tables(baselines, tmp_path)
    assert set(files) == set(table_names(baselines.settings()))
    assert not any(name.startswith("assignments") for name in files)


def test_a_metrics_file_from_before_the_optimum_has_no_quality(tmp_path: Path) -> None:
    study = replace(STUDY, rounds=3, clients=3)
    paths = study.write(tmp_path)
    for path in paths:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line.pop("optimum", None)
            line.pop("chance", None)
        write_lines(path, lines)
    settings = study.settings()
    line = table_files(read_metrics(paths, settings), settings)["assignments.md"].splitlines()[4]
    assert line.startswith("| fedamole | n/a | n/a | ") and line.count("n/a") == 2


# Bad input


def change(path: Path, record: str, index: int, values: dict[str, Any] | None) -> None:
    """Change the ``index``-th record of a kind; None removes it."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    line = [line for line in lines if line.get("record") == record][index]
    lines.remove(line)
    write_lines(path, lines if values is None else [*lines, {**line, **values}])


@pytest.mark.parametrize(
    ("record", "values", "message"),
    [
        ("client", None, r"round 2 has clients \[0\]; each of 0 to 1 is needed once"),
        ("client", {"round": 3}, r"client records of rounds \[1, 2, 3\]; \[1, 2\] are needed"),
        ("client", {"score": 1.5}, r":\d+: score: 1.5 is not allowed"),
        ("client", {"eval_loss": None}, r":\d+: eval_loss: None is not allowed"),
        ("client", {"record": "guest"}, r":\d+: record 'guest' is unknown"),
        ("assignment", None, r"assignment records of rounds \[1\]; \[1, 2\] are needed"),
        ("assignment", {"round": 1}, r"assignment records of rounds \[1, 1\]"),
        ("assignment", {"num_experts": 5}, "assignment of round 2 is not 2 modules x 5 experts"),
        ("assignment", {"optimum": [1.0]}, "assignment of round 2 is not 2 modules x 4 experts"),
        ("assignment", {"chance": [1.0]}, "assignment of round 2 is not 2 modules x 4 experts"),
        ("partition", {"counts": [[1, 2, 3]]}, "partition is not 2 clients x its classes"),
        ("partition", {"classes": ["x", "y", "z"]}, "the partition of a-s1 differs from that in"),
        ("run", None, "has 0 run records; needs one"),
        ("run", {"scenario": "c-s1"}, "fedamole on c-s1 is not in the settings"),
        ("run", {"metric": "accuracy"}, "has metric accuracy; the settings say rouge_l"),
        ("run", {"method": "magic"}, "method 'magic' is unknown"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, record: str, values: dict[str, Any] | None, message: str
) -> None:
    paths = STUDY.write(tmp_path)
    change(paths[0], record, -1, values)
    with pytest.raises(FedamoleError, match=message):
        read_metrics(paths, STUDY.settings())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: "", "is empty"),
        (lambda text: text[:-20], r":\d+: is not a whole JSON line"),
        (
            lambda text: text.replace("metrics-table", "pool", 1),
            "holds pool; metrics-table is needed",
        ),
        (lambda text: "{}\n" + text, "is not a file of fedamole"),
        (lambda text: "[1]\n", ":1: is not a JSON object"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, spoil: Callable[[str], str], message: str) -> None:
    path = STUDY.write(tmp_path)[0]
    path.write_text(spoil(path.read_text()))
    with pytest.raises(FedamoleError, match=message) as caught:
        read_run(path)
    assert str(path) in str(caught.value)


def test_missing_and_double_files_are_named(tmp_path: Path) -> None:
    paths, settings = STUDY.write(tmp_path), STUDY.settings()
    with pytest.raises(FedamoleError, match="no metrics file of zero-shot on a-s2 was given"):
        read_metrics(paths[:-1], settings)
    with pytest.raises(FedamoleError, match="is a second file of fedamole on a-s1"):
        read_metrics([*paths, paths[0]], settings)
    with pytest.raises(FedamoleError, match=r"nowhere\.jsonl: cannot be read"):
        read_metrics([tmp_path / "nowhere.jsonl"], settings)


def test_other_number_of_rounds_is_refused(tmp_path: Path) -> None:
    paths = STUDY.write(tmp_path / "two")
    longer = replace(STUDY, rounds=3).write(tmp_path / "three")
    with pytest.raises(FedamoleError, match="the number of rounds differs from that in"):
        read_metrics([longer[0], *paths[1:]], STUDY.settings())


def test_earliest_of_equally_good_rounds_counts(tmp_path: Path) -> None:
    flat = replace(STUDY, loss=lambda *_: 1.0)
    run: Run = read(flat, tmp_path).run("a-s1", "fedit")
    assert {record.round for record in run.counted("best")} == {1}
    assert {record.round for record in run.counted("last")} == {2}


def test_html_has_the_numbers_of_the_markdown() -> None:
    columns = [
        Column("a <b>", {"fedamole": Cell(31.0, 1.5), "fedit": Cell(29.5)}, "highest", gain=0.05),
        Column("loss", {"fedamole": Cell(2.0), "fedit": Cell(1.0)}, "lowest"),
    ]
    text = html_table(columns, "fedamole", 1)
    assert "<th>a &lt;b&gt;</th>" in text
    assert "<td>fedamole</td><td><b>31.0</b> &plusmn; 1.5</td><td><u>2.0</u></td>" in text
    assert "<td>+5.0 %</td><td></td>" in text
    assert html_page("t", {"x": text}).count("<table>") == 1
