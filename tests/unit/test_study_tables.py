"""Tables of the spread, of sweeps and of published numbers against numbers computed by hand."""

import csv
import itertools
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import yaml
from study import Study

from fedamole.errors import FedamoleError
from fedamole.rendering import Cell, Column, Listing, html_table, latex, markdown
from fedamole.results import read_metrics
from fedamole.settings import TablesSettings
from fedamole.settings.output import PublishedSettings
from fedamole.shown import check_shown
from fedamole.stages import SweepPoint
from fedamole.tables import table_files

CONFIGS = Path(__file__).parents[2] / "configs"
METHODS = ("fedamole", "fedit")
# Scores by slug and method, client by client.
SCORES = {
    ("a-s1", "fedamole"): (0.40, 0.60, 0.80),
    ("a-s2", "fedamole"): (0.50, 0.60, 0.70),
    ("a-s1", "fedit"): (0.45, 0.50, 0.55),
    ("a-s2", "fedit"): (0.50, 0.50, 0.50),
}


def score(slug: str, method: str, round_: int, client: int) -> float:
    return SCORES[slug, method][client]


STUDY = Study(
    score, lambda *_: 1.0, METHODS, scenarios={"a": [1, 2]}, clients=3, rounds=1, holders=1
)


def files_of(study: Study, folder: Path) -> dict[str, str]:
    return table_files(read_metrics(study.write(folder), study.settings()), study.settings())


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


# Spread over clients


def test_spread_is_that_of_each_seed_averaged_over_seeds(tmp_path: Path) -> None:
    files = files_of(STUDY, tmp_path)
    for row in rows(files["spread.csv"]):
        seeds = [SCORES[slug, row["method"]] for slug in ("a-s1", "a-s2")]
        for what, measure in {"mean": mean, "worst": min, "std": stdev}.items():
            values = [measure(scores) for scores in seeds]
            assert float(row[f"{what}_mean"]) == pytest.approx(mean(values))
            assert float(row[f"{what}_std"]) == pytest.approx(stdev(values), abs=1e-12)
        assert (row["seeds"], row["clients"], row["clients_total"]) == ("2", "3", "3")


def test_spread_as_it_is_printed(tmp_path: Path) -> None:
    assert files_of(STUDY, tmp_path)["spread.md"].splitlines() == [
        "**a: ROUGE-L (%)**",
        "",
        "| method | mean (%) | worst client (%) | std over clients (points) |",
        "| :--- | ---: | ---: | ---: |",
        "| fedamole | **60.00** ± 0.00 | <ins>45.00</ins> ± 7.07 | 15.00 ± 7.07 |",
        "| fedit | <ins>50.00</ins> ± 0.00 | **47.50** ± 3.54 | 2.50 ± 3.54 |",
    ]


def test_one_client_has_no_spread(tmp_path: Path) -> None:
    files = files_of(replace(STUDY, scenarios={"a": [1]}, clients=1), tmp_path)
    assert "| fedamole | <ins>40.00</ins> | <ins>40.00</ins> | n/a |" in files["spread.md"]
    assert rows(files["spread.csv"])[0]["std_mean"] == ""


# Sweeps

RATES, EXPERTS = (1e-4, 5e-4), (2, None)


def swept(keys: int) -> Study:
    """Scenarios `a` and `b` under one or two settings, each of which adds to the scores."""
    points = {}
    for base, rate, experts in itertools.product("ab", RATES, EXPERTS[:keys]):
        values: dict[str, Any] = {"training.learning_rate": rate}
        values |= {"adapter.experts": experts} if keys == 2 else {}
        points[f"{base}-{rate:g}-{experts}"] = SweepPoint(base=base, values=values)

    def score(slug: str, method: str, round_: int, client: int) -> float:
        base, rate, experts, seed = slug.split("-")
        parts = (method == "fedit", float(rate) == RATES[1], experts == "None", base == "b")
        weights = (0.1, 0.01, 0.02, 0.2)
        return (
            0.1 + (seed == "s2") / 1000 + sum(w for w, on in zip(weights, parts, strict=True) if on)
        )

    return replace(STUDY, score=score, scenarios={name: [1, 2] for name in points}, sweep=points)


def test_sweep_of_one_setting_has_a_column_per_value(tmp_path: Path) -> None:
    lines = files_of(swept(1), tmp_path)["sweep.md"].splitlines()
    assert lines[:6] == [
        "**a: ROUGE-L (%)**",
        "",
        "| method | learning_rate 0.0001 | learning_rate 0.0005 |",
        "| :--- | ---: | ---: |",
        "| fedamole | <ins>10.05</ins> ± 0.07 | <ins>11.05</ins> ± 0.07 |",
        "| fedit | **20.05** ± 0.07 | **21.05** ± 0.07 |",
    ]
    assert [line for line in lines if line.startswith("**")] == [
        "**a: ROUGE-L (%)**",
        "**b: ROUGE-L (%)**",
    ]
    assert lines[-1] == "| fedit | **40.05** ± 0.07 | **41.05** ± 0.07 |"


def test_sweep_of_two_settings_is_a_grid_with_one_best_number(tmp_path: Path) -> None:
    text = files_of(swept(2), tmp_path)["sweep.md"]
    assert text.splitlines()[:7] == [
        "**a, fedamole: ROUGE-L (%)**",
        "",
        "| learning_rate | experts 2 | experts none |",
        "| :--- | ---: | ---: |",
        "| 0.0001 | 10.05 ± 0.07 | <ins>12.05</ins> ± 0.07 |",
        "| 0.0005 | 11.05 ± 0.07 | **13.05** ± 0.07 |",
        "",
    ]
    assert text.count("ROUGE-L (%)**") == 4, "two scenarios x two methods"
    assert text.count("<ins>") == 4 and "| 0.0005 | 41.05 ± 0.07 | **43.05** ± 0.07 |" in text


def test_sweep_rows_are_tidy(tmp_path: Path) -> None:
    found = rows(files_of(swept(2), tmp_path)["sweep.csv"])
    assert len(found) == 2 * 2 * 2 * 2  # scenarios x rates x experts x methods
    last = found[-1]
    assert (last["base"], last["scenario"], last["method"]) == ("b", "b-0.0005-None", "fedit")
    assert (last["training.learning_rate"], last["adapter.experts"]) == ("0.0005", "none")
    assert float(last["score_mean"]) == pytest.approx(0.4305)
    assert float(last["score_std"]) == pytest.approx(stdev([0.43, 0.431]))
    assert (last["eval_loss_mean"], last["eval_loss_std"]) == ("1.0", "0.0")


# Published numbers

PAPER = {
    "source": "a paper",
    "setting": "a model | 3 clients",
    "numbers": [
        {"what": "average gain", "method": "fedamole", "value": 15.0, "table": "Table 1"},
        {
            "what": "score",
            "method": "fedit",
            "scenario": "a",
            "value": 51.5,
            "std": 0.3,
            "table": "2",
        },
        {"what": "gain", "method": "fedamole", "scenario": "a", "value": 22.0, "table": "3"},
        {"what": "score", "method": "fdlora", "scenario": "a", "value": 40.0, "table": "4"},
        {"what": "score", "method": "fedit", "scenario": "z", "value": 40.0, "table": "5"},
    ],
}


def published(**changes: Any) -> Study:
    paper = PublishedSettings(**PAPER | changes)
    return replace(STUDY, tables=TablesSettings(published=paper, decimals=1))


def test_published_numbers_stand_beside_those_of_the_study(tmp_path: Path) -> None:
    # Means 60 and 50: a gain of 20 %.
    assert files_of(published(), tmp_path)["published.md"].splitlines()[2:] == [
        "| what | scenario | method | paper (%) | this study (%) | difference (points) | where |",
        "| :--- | :--- | :--- | ---: | ---: | ---: | :--- |",
        "| average gain |  | fedamole | 15.0 | 20.0 | 5.0 | Table 1 |",
        "| score | a | fedit | 51.5 ± 0.3 | 50.0 ± 0.0 | -1.5 | 2 |",
        "| gain | a | fedamole | 22.0 | 20.0 | -2.0 | 3 |",
        "| score | a | fdlora | 40.0 |  |  | 4 |",
        "| score | z | fedit | 40.0 |  |  | 5 |",
        "",
        "paper: a paper; a model | 3 clients",
        "",
        "average gain of this study: over a",
    ]


def test_published_rows_are_in_percent_and_invent_nothing(tmp_path: Path) -> None:
    found = rows(files_of(published(), tmp_path)["published.csv"])
    assert [row["paper_percent"] for row in found] == ["15.0", "51.5", "22.0", "40.0", "40.0"]
    assert [row["study_percent"] != "" for row in found] == [True, True, True, False, False]
    assert float(found[2]["difference_points"]) == pytest.approx(-2.0)
    assert {row["source"] for row in found} == {"a paper"}


def test_average_gain_is_the_mean_of_the_gains_not_the_gain_of_the_means(tmp_path: Path) -> None:
    scores = {
        ("a", "fedamole"): 0.6,
        ("a", "fedit"): 0.5,
        ("b", "fedamole"): 0.1,
        ("b", "fedit"): 0.2,
    }
    study = replace(
        published(),
        scenarios={"a": [1], "b": [1]},
        score=lambda slug, method, *_: scores[slug[0], method],
    )
    average, *_ = rows(files_of(study, tmp_path)["published.csv"])
    assert float(average["study_percent"]) == pytest.approx(100 * (0.1 / 0.5 - 0.1 / 0.2) / 2)


def test_main_table_has_the_published_gains_where_they_are_known(tmp_path: Path) -> None:
    study = replace(published(), scenarios={"a": [1], "b": [1]}, score=lambda *_: 0.5)
    files = files_of(study, tmp_path)
    *_, ours, paper = files["main.md"].splitlines()
    assert ours == "| gain of fedamole over the best other | +0.0 % | +0.0 % | +0.0 % |  |  |"
    assert paper == "| gain in the paper: a paper | +22.0 % |  | +15.0 % |  |  |"
    assert (
        r"\shortstack[l]{gain in the paper:\\a paper} & $+22.0$\,\% &  & $+15.0$\,\% \\"
        in (files["main.tex"])
    )


def test_without_a_paper_there_is_no_table_and_no_line(tmp_path: Path) -> None:
    files = files_of(STUDY, tmp_path)
    assert "published.md" not in files and "paper" not in files["main.md"]


@pytest.mark.parametrize(
    ("name", "need"), [("sweep", "a sweep"), ("published", "numbers of a paper")]
)
def test_a_table_without_numbers_is_refused(name: Any, need: str) -> None:
    study = replace(STUDY, tables=TablesSettings(show=["main", name]))
    with pytest.raises(FedamoleError, match=f"tables: show: {name} needs {need}"):
        check_shown(study.settings())


def test_the_published_numbers_of_the_library_are_those_of_the_abstract() -> None:
    found = PublishedSettings(**yaml.safe_load((CONFIGS / "paper/published.yaml").read_text()))
    (number,) = found.numbers
    assert (number.what, number.method, number.value) == ("average gain", "fedamole", 5.97)
    assert "2411.19128" in found.source


# Rendering


def test_seven_scenarios_in_latex_are_set_small_under_two_lines_of_titles(tmp_path: Path) -> None:
    study = replace(STUDY, score=lambda *_: 0.5, scenarios={f"s{k}": [1] for k in range(7)})
    text = files_of(study, tmp_path)["main.tex"]
    assert text.startswith(
        "{\\footnotesize\\setlength{\\tabcolsep}{3pt}%\n\\begin{tabular}{lrrrrrrrr}"
    )
    assert text.count(r"\shortstack[r]{s3\\ROUGE-L (\%)}") == 1
    assert text.count("{") == text.count("}")
    tabular = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    cells = [line.count("&") for line in tabular.splitlines() if line.endswith(r"\\")]
    assert set(cells) == {8}


def test_minus_in_latex_is_no_hyphen() -> None:
    column = Column("x", {"a": Cell(-1.0), "b": Cell(-0.001)}, spec="+.2f")
    assert "a & $-$1.00 " in latex([column], "none", 2) and "b & +0.00 " in latex(
        [column], "none", 2
    )


def test_listing_escapes_texts_and_leaves_gaps() -> None:
    listing = Listing(("a|b", "n"), [("x_<y>", Cell(1.0, 0.5)), ("z", None)])
    assert markdown(listing, "none", 1).splitlines() == [
        r"| a\|b | n |",
        "| :--- | ---: |",
        "| x_<y> | 1.0 ± 0.5 |",
        "| z |  |",
    ]
    assert r"x\_$<$y$>$ & 1.0 $\pm$ 0.5 \\" in latex(listing, "none", 1)
    assert "<td>x_&lt;y&gt;</td><td>1.0 &plusmn; 0.5</td>" in html_table(listing, "none", 1)
