"""Epsilon in the tables: the last round's, the largest client's, and only where there is one."""

import csv
from pathlib import Path
from typing import Any

import pytest
from study import Study, write_lines

from fedamole.results import Metrics, read_metrics
from fedamole.settings import TablesSettings
from fedamole.tables import table_files

METHODS = ("fedamole", "fedit", "zero-shot")
# Epsilon that a client spends per round, by seed and client.
PER_ROUND = {(1, 0): 0.5, (1, 1): 0.75, (2, 0): 1.25, (2, 1): 1.0}


def score(slug: str, method: str, round_: int, client: int) -> float:
    return 0.5


def loss(slug: str, method: str, round_: int, client: int) -> float:
    """Lowest in round 1, so that this is the best round."""
    return 2.0 + round_


STUDY = Study(
    score, loss, METHODS, scenarios={"a": [1, 2]}, clients=2, rounds=3, modules=2, experts=4
)


def study_with_epsilons(
    folder: Path, private: str = "fedamole", rule: Any = "last"
) -> tuple[Metrics, Any]:
    """The study, in which one method trains privately."""
    paths = []
    for seed in (1, 2):
        for method in METHODS:
            lines = STUDY.lines("a", seed, method)
            for line in lines:
                if line.get("record") == "client" and method == private:
                    line["epsilon"] = line["round"] * PER_ROUND[seed, line["client"]]
                    line["delta"] = 1e-5
            paths.append(write_lines(folder / f"a-s{seed}" / f"{method}.jsonl", lines))
    settings = STUDY.settings().model_copy(update={"tables": TablesSettings(round=rule)})
    return read_metrics(paths, settings), settings


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


@pytest.mark.parametrize("rule", ["last", "best"])
def test_main_table_has_the_largest_epsilon_of_the_last_round(tmp_path: Path, rule: str) -> None:
    texts = table_files(*study_with_epsilons(tmp_path, rule=rule))
    found = {row["method"]: (row["epsilon"], row["delta"]) for row in rows(texts["main.csv"])}
    assert found == {"fedamole": ("3.75", "1e-05"), "fedit": ("", ""), "zero-shot": ("", "")}
    head, _, first, second, *_ = (line.split(" | ") for line in texts["main.md"].splitlines())
    assert head[-1] == "a epsilon (delta 1e-05) |"
    assert (first[-1], second[-1]) == ("3.75 |", "n/a |")
    assert "epsilon" in texts["main.tex"] and "epsilon" in texts["main.html"]


def test_clients_tables_have_the_epsilon_of_each_client(tmp_path: Path) -> None:
    texts = table_files(*study_with_epsilons(tmp_path, rule="best"))
    found = {
        (int(row["seed"]), int(row["client"])): float(row["epsilon"])
        for row in rows(texts["clients.csv"])
        if row["method"] == "fedamole"
    }
    assert found == {place: 3 * spent for place, spent in PER_ROUND.items()}
    _, _, table = texts["clients.md"].partition("**a-s2: epsilon (delta 1e-05)**")
    assert "| fedamole | 3.75 | 3.00 | 3.75 |" in table
    assert "fedit" not in table


def test_without_private_training_nothing_is_said(tmp_path: Path) -> None:
    texts = table_files(*study_with_epsilons(tmp_path, private="none"))
    assert not any("epsilon" in text or "delta" in text for text in texts.values())
