"""Tests of the reference method against all signs of the differences, and known numbers."""

import csv
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata
from study import Study

from fedamole.errors import FedamoleError
from fedamole.results import read_metrics, table_names
from fedamole.settings import TablesSettings
from fedamole.shown import check_shown
from fedamole.significance import EXACT_PAIRS_WITH_TIES, compare, holm, wilcoxon_p
from fedamole.tables import table_files

CLIENTS = 6
# Score in percent by method and client; the same for both seeds but for the one point of `bump`.
SCORES = {
    "fedamole": (50, 52, 55, 60, 61, 70),
    "fedit": (49, 50, 50, 50, 50, 50),
    "fedit-ft": (50, 52, 55, 60, 61, 70),
}


def bump(slug: str, method: str) -> float:
    return 1.0 if slug == "a-s2" and method == "fedit" else 0.0


def score(slug: str, method: str, round_: int, client: int) -> float:
    return (SCORES[method][client] - bump(slug, method)) / 100


STUDY = Study(
    score, lambda *_: 1.0, tuple(SCORES), scenarios={"a": [1, 2]}, clients=CLIENTS, rounds=1
)


def files_of(study: Study, folder: Path) -> dict[str, str]:
    return table_files(read_metrics(study.write(folder), study.settings()), study.settings())


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def over_all_signs(differences: Sequence[float]) -> float:
    """Share of all signs whose rank sum is at least as far from its mean as the one found."""
    ranks = rankdata(np.abs(differences))
    found = abs(float(np.sign(differences) @ ranks))
    signs = np.array(list(itertools.product((-1, 1), repeat=len(ranks))))
    return float(np.mean(np.abs(signs @ ranks) >= found - 1e-9))


@pytest.mark.parametrize(
    "differences",
    [
        [0.3],
        [0.1, -0.2, 0.3, 0.4],
        [0.11, 0.07, -0.02, 0.05, 0.19, -0.01, 0.23, 0.31, 0.13, 0.17],
        [0.1, 0.1, 0.1, -0.1],
        [0.01, 0.01, 0.02, 0.02, -0.02, 0.05, 0.05, 0.03, -0.04, 0.04, 0.06, 0.01],
    ],
)
def test_p_is_the_share_of_signs_that_are_as_extreme(differences: list[float]) -> None:
    p, kind = wilcoxon_p(differences)
    assert (p, kind) == (pytest.approx(over_all_signs(differences), rel=1e-12), "exact")


def test_what_is_too_large_for_all_signs_is_close_to_what_they_give() -> None:
    rng = np.random.default_rng(3)
    tied = (rng.integers(1, 5, size=EXACT_PAIRS_WITH_TIES + 4) * rng.choice([1, 1, -1], 16)) / 100
    p, kind = wilcoxon_p(tied.tolist())
    assert (p, kind) == (pytest.approx(over_all_signs(tied.tolist()), abs=0.01), "normal")
    many = rng.normal(0.3, 1, size=60).tolist()
    assert wilcoxon_p(many)[1] == "normal"
    assert wilcoxon_p(many[:50])[1] == "exact"


def test_the_test_rejects_as_often_as_it_says() -> None:
    """Under the null hypothesis p < 0.05 happens in at most one of twenty studies."""
    rng = np.random.default_rng(0)
    values = [wilcoxon_p(rng.normal(size=9).tolist())[0] for _ in range(400)]
    assert 0.01 < np.mean(np.array(values) <= 0.05) < 0.07


def test_holm_multiplies_the_smallest_most_and_never_goes_down() -> None:
    # 4 x 0.01, 3 x 0.02, 2 x 0.03, and 0.04, which may not be below its predecessor.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_does_not_count_what_was_not_tested() -> None:
    first, second, third = holm([0.01, math.nan, 0.04])
    assert (first, third) == (pytest.approx(0.02), pytest.approx(0.04))
    assert math.isnan(second)


def test_equal_pairs_are_left_out_and_rounding_errors_are_equal() -> None:
    found = compare({"x": [0.0, 0.1 + 0.2 - 0.3, 0.05, -0.02, 0.01]})["x"]
    assert (found.pairs, found.unequal) == (5, 3)
    assert found.p == pytest.approx(over_all_signs([0.05, -0.02, 0.01]))
    # Ranks 3 and 1 in favour, 2 against.
    assert found.effect == pytest.approx((3 + 1 - 2) / 6)
    # 0.4 - 0.3 and 0.3 - 0.2 differ in their last bits: they are ties all the same.
    assert compare({"x": [0.4 - 0.3, -(0.3 - 0.2)]})["x"].effect == 0


def test_table_pairs_clients_and_seeds(tmp_path: Path) -> None:
    files = files_of(STUDY, tmp_path)
    fedit, same = rows(files["significance.csv"])
    assert (fedit["scenario"], fedit["reference"], fedit["method"]) == ("a", "fedamole", "fedit")
    differences = [
        (SCORES["fedamole"][k] - SCORES["fedit"][k] + bump_) / 100
        for bump_ in (0, 1)
        for k in range(CLIENTS)
    ]
    assert (fedit["pairs"], fedit["unequal_pairs"], fedit["test"]) == ("12", "12", "exact")
    assert float(fedit["mean_difference"]) == pytest.approx(np.mean(differences))
    assert float(fedit["median_difference"]) == pytest.approx(np.median(differences))
    assert float(fedit["p"]) == pytest.approx(2 / 2**12)
    assert fedit["rank_biserial"] == "1.0"
    assert (same["unequal_pairs"], same["p"], same["p_holm"], same["test"]) == ("0", "", "", "")


def test_equal_methods_have_no_p(tmp_path: Path) -> None:
    text = files_of(STUDY, tmp_path)["significance.md"]
    assert "| fedit-ft | 12 | 0 | +0.00 | +0.00 | n/a | n/a | n/a |\n" in text
    assert "| fedit | 12 | 12 | +8.67 | +8.00 | +1.00 | 0.00049 | 0.00049 |\n" in text
    assert "not independent" in text


def test_scenarios_are_pooled_and_each_is_adjusted_for_itself(tmp_path: Path) -> None:
    study = replace(STUDY, scenarios={"a": [1, 2], "b": [1]})
    found = rows(files_of(study, tmp_path)["significance.csv"])
    assert [row["scenario"] for row in found] == ["a", "a", "b", "b", *["all scenarios"] * 2]
    assert [row["pairs"] for row in found[::2]] == ["12", "6", "18"]
    assert all(row["p"] == row["p_holm"] for row in found)


def test_scores_of_several_kinds_that_are_pooled_are_named(tmp_path: Path) -> None:
    study = replace(STUDY, scenarios={"a": [1], "b": [1]})
    paths = study.write(tmp_path)
    for path in paths[3:]:
        path.write_text(path.read_text().replace("rouge_l", "accuracy"))
    settings = study.settings().model_copy(update={"metrics": {"a": "rouge_l", "b": "accuracy"}})
    text = table_files(read_metrics(paths, settings), settings)["significance.md"]
    assert text.count("Differences of ROUGE-L and accuracy are ranked together.") == 1


def test_without_a_reference_there_is_no_table(tmp_path: Path) -> None:
    alone = replace(STUDY, methods=("fedit", "fedit-ft"))
    assert not any(name.startswith("significance") for name in table_names(alone.settings()))
    asked = replace(alone, tables=TablesSettings(show=["significance"]))
    with pytest.raises(FedamoleError, match="show: significance needs the reference method"):
        check_shown(asked.settings())
