"""Measures of assignments against numbers computed by hand, and what they say of real ones."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedamole.artifacts import Header, write_record
from fedamole.assignment import assign_all, random_scores, score_experts
from fedamole.assignment_measures import measure
from fedamole.cli import main
from fedamole.config import load_config
from fedamole.config_files import read_yaml
from fedamole.pool_files import write_assignment
from fedamole.records import AssignmentRecord, PartitionRecord, RunRecord
from fedamole.results import Run, read_run
from fedamole.routing_map import map_clients
from fedamole.settings import AssignmentSettings
from fedamole.stages import canonical_json, client_stage, digest

Holders = list[list[list[int]]]

# Round 1 is random: whatever stands there must not count.
RANDOM: Holders = [[[0], [0], [0], [0], [0]]]
# Clients hold {0, 1}, {0, 1}, {2, 3}; nobody holds 4.
SECOND: Holders = [[[0, 1], [0, 1], [2], [2], []]]
# Clients hold {0, 1, 4}, {0, 2}, {1, 3}.
THIRD: Holders = [[[0, 1], [0, 2], [1], [2], [0]]]
TWO_ALIKE = [[10, 0], [5, 0], [0, 3]]


def make_run(
    *rounds: Holders,
    counts: list[list[int]] = TWO_ALIKE,
    objective: Sequence[float] = (),
    optimum: Sequence[float] | None = None,
    chance: Sequence[float] | None = None,
) -> Run:
    clients = len(counts)
    info = RunRecord(
        scenario="a-s1",
        seed=1,
        method="fedamole",
        metric="accuracy",
        clients=clients,
        rounds=len(rounds),
        evaluated="local",
    )
    records = {
        number: AssignmentRecord(
            round=number,
            modules=[f"m{i}" for i in range(len(holders))],
            num_experts=len(holders[0]),
            holders=holders,
            objective=[objective[number - 1] if objective else None] * len(holders),
            optimum=[optimum[number - 1]] * len(holders) if optimum else None,
            chance=[chance[number - 1]] * len(holders) if chance else None,
        )
        for number, holders in enumerate(rounds, start=1)
    }
    classes = [f"class {i}" for i in range(len(counts[0]))]
    return Run(info, PartitionRecord(classes=classes, counts=counts), {}, records)


def of(what: str, *rounds: Holders, **facts: Any) -> float:
    """One measure of a run whose first round is random."""
    return measure(make_run(RANDOM, *rounds, **facts))[what]


def test_quality_is_the_share_of_the_optimum_without_the_first_round() -> None:
    sums = {"objective": (0.1, 1.5, 3.0), "optimum": (9.0, 2.0, 3.0)}
    assert of("quality", SECOND, THIRD, **sums) == pytest.approx((1.5 / 2 + 3 / 3) / 2)
    assert math.isnan(of("quality", SECOND, objective=(0.1, 1.5)))


def test_above_chance_is_the_share_of_what_could_be_gained() -> None:
    # Of 1.0 + 0.5 that could be gained over chance, 0.5 + 0.5 are.
    sums = {"objective": (0.1, 1.5, 3.0), "optimum": (9.0, 2.0, 3.0), "chance": (5.0, 1.0, 2.5)}
    assert of("above_chance", SECOND, THIRD, **sums) == pytest.approx(1.0 / 1.5)
    alike = {"objective": (1.0, 1.0), "optimum": (1.0, 1.0), "chance": (1.0, 1.0)}
    assert math.isnan(of("above_chance", SECOND, **alike))
    assert math.isnan(of("above_chance", SECOND, objective=(0.1, 1.5)))


def test_stability_is_the_share_of_experts_kept() -> None:
    # {0, 1} -> {0, 1, 4}: 2 of 3; {0, 1} -> {0, 2}: 1 of 3; {2, 3} -> {1, 3}: 1 of 3.
    assert of("stability", SECOND, THIRD) == pytest.approx((2 + 1 + 1) / 3 / 3)
    assert of("stability", SECOND, SECOND) == 1
    assert math.isnan(of("stability", SECOND))


def test_stability_averages_over_modules_rounds_and_clients() -> None:
    two = make_run(RANDOM * 2, SECOND * 2, SECOND + THIRD, THIRD * 2)
    changed = (2 + 1 + 1) / 3 / 3
    assert measure(two)["stability"] == pytest.approx((1 + changed + changed + 1) / 4)


def test_stability_of_a_client_that_was_away_is_that_since_it_last_took_part() -> None:
    away: Holders = [[[0], [0], [2], [2], [0]]]  # {0, 1, 4}, nothing, {2, 3}
    first = [2 / 3, 1]  # round 2 -> 3, clients 0 and 2
    # Round 3 -> 4, clients 0 and 2; client 1 has {0, 1} in round 2 and {0, 2} in round 4.
    then = [1, 1 / 3, 1 / 3]
    assert of("stability", SECOND, away, THIRD) == pytest.approx(sum(first + then) / 5)
    assert of("fewest_experts", SECOND, away, THIRD) == 2, "to be away is not to hold none"


def test_loads_and_experts_without_holder() -> None:
    assert of("fewest_experts", SECOND, THIRD) == (2 + 2) / 2
    assert of("most_experts", SECOND, THIRD) == (2 + 3) / 2
    assert of("without_holder", SECOND, THIRD) == (1 + 0) / 2


def test_assignments_that_follow_the_data_correlate_with_it() -> None:
    # Clients 0 and 1 have the same class, client 2 another one.
    assert of("follows_data", SECOND) == pytest.approx(1)
    against: Holders = [[[0, 2], [0], [1, 2], [1], []]]  # only 0 and 2, 1 and 2 have one in common
    assert of("follows_data", against) == pytest.approx(-1)
    # In common over both rounds, pairs 01, 02, 12: (1 + 1/4) / 2, 1/8, 0; alike: 1, 0, 0.
    expected = np.corrcoef([(1 + 1 / 4) / 2, (0 + 1 / 4) / 2, 0], [1, 0, 0])[0, 1]
    assert of("follows_data", SECOND, THIRD) == pytest.approx(expected)


def test_likeness_of_data_is_that_of_shares_not_of_sizes() -> None:
    counts = [[80, 20], [4, 1], [50, 50]]
    # Alike, pairs 01, 02, 12: 1, 0.7, 0.7.
    in_common = [(1 + 1 / 4) / 2, (0 + 1 / 4) / 2, 0]
    expected = np.corrcoef(in_common, [1, 0.7, 0.7])[0, 1]
    assert of("follows_data", SECOND, THIRD, counts=counts) == pytest.approx(expected)


def test_where_all_pairs_are_alike_nothing_can_follow() -> None:
    assert math.isnan(of("follows_data", SECOND, counts=[[3, 1], [6, 2], [9, 3]]))
    assert math.isnan(of("follows_data", [[[0], [1], [0]]], counts=[[1, 0], [0, 1]]))


def test_rsea_is_optimal_and_follows_the_data_while_random_is_neither() -> None:
    rng = np.random.default_rng(0)
    clients, experts, rank = 8, 24, 8
    counts = [[9, 1], [1, 9]] * (clients // 2)
    centres = rng.standard_normal((2, rank))
    clients_MKR = centres[np.arange(clients) % 2] + 0.3 * rng.standard_normal((3, clients, rank))
    experts_MER = centres[np.arange(experts) % 2] + 0.3 * rng.standard_normal((3, experts, rank))
    scores_MEK = score_experts(experts_MER, clients_MKR)
    capacity = AssignmentSettings(num_experts=experts, choices=2, max_experts=8)
    best = assign_all(scores_MEK, capacity, 2, ("a", "b", "c"), 2)
    by_chance = assign_all(
        scores_MEK,
        capacity,
        2,
        ("a", "b", "c"),
        2,
        by_MEK=random_scores(rng, 3, experts, clients),
    )
    found = {}
    for name, assignment in (("rsea", best), ("random", by_chance)):
        holders = [
            [row_K.nonzero()[0].tolist() for row_K in module_EK]
            for module_EK in assignment.holders_MEK
        ]
        record = AssignmentRecord(
            round=2,
            modules=list(assignment.modules),
            num_experts=experts,
            holders=holders,
            objective=assignment.objective_M.tolist(),
            optimum=best.objective_M.tolist(),
            chance=(scores_MEK.sum(axis=(1, 2)) * 2 / clients).tolist(),
        )
        run = make_run(RANDOM, counts=counts)
        found[name] = Run(run.info, run.partition, {}, {2: record})
    rsea, chance = measure(found["rsea"]), measure(found["random"])
    assert rsea["quality"] == rsea["above_chance"] == 1
    assert chance["quality"] < 0.9
    assert abs(chance["above_chance"]) < 0.25
    assert rsea["follows_data"] > 0.7
    # 28 pairs: chance stays within three standard errors.
    assert abs(chance["follows_data"]) < 3 / np.sqrt(28)


def objective_of_chance(
    scores_MEK: np.ndarray, capacity: AssignmentSettings, seed: int
) -> np.ndarray:
    by_MEK = random_scores(np.random.default_rng([2, seed]), *scores_MEK.shape)
    return assign_all(scores_MEK, capacity, 2, ("a", "b"), 1, by_MEK=by_MEK).objective_M


def test_gather_records_the_optimum_whatever_made_the_assignment(
    configs: Path, tmp_path: Path
) -> None:
    config = load_config(read_yaml(configs / "smoke.yaml"), configs)
    (slug,) = config.scenario_seeds()
    settings = client_stage(config, slug, "fedamole")
    scores_MEK = random_scores(np.random.default_rng(0), 2, 6, 3)
    by_MEK = random_scores(np.random.default_rng(1), 2, 6, 3)
    capacity, modules = settings.run.assignment, ("a", "b")
    by_chance = assign_all(scores_MEK, capacity, 2, modules, 1, by_MEK=by_MEK)
    best = assign_all(scores_MEK, capacity, 2, modules, 1)
    assert (best.objective_M > by_chance.objective_M).all(), "otherwise the test shows nothing"
    paths = {name: tmp_path / name for name in ("partition.json", "assignment.h5", "out.jsonl")}
    partition = Header("partition", digest(settings.run.tokens.scenario))
    write_record(paths["partition.json"], partition, {"classes": ["x"], "counts": [[1]] * 3})
    assignment = Header("assignment", digest(settings.run))
    write_assignment(paths["assignment.h5"], assignment, by_chance)
    metrics = [tmp_path / f"metrics_{client:03}.json" for client in range(3)]
    for client, path in enumerate(metrics):
        numbers = {"round": 1, "client": client, "eval_loss": 1.0, "score": 0.5, "num_train": 9}
        numbers |= {"num_eval": 1, "num_test": 1, "steps": 3}
        numbers |= {"train_loss_first": 2.0, "train_loss_last": 1.5}
        write_record(path, Header("metrics", digest(settings)), numbers)
    arguments = ["--settings", canonical_json(settings), "--scenario", slug, "--method", "fedamole"]
    arguments += ["--partition", str(paths["partition.json"]), "--metrics", *map(str, metrics)]
    arguments += ["--assignments", str(paths["assignment.h5"]), "--out", str(paths["out.jsonl"])]
    assert main(["gather", *arguments]) == 0
    listed, text = tmp_path / "metrics.txt", paths["out.jsonl"].read_bytes()
    listed.write_text("".join(f"{path}\n" for path in metrics))
    place = arguments.index("--metrics")
    arguments[place : place + 1 + len(metrics)] = ["--metrics-list", str(listed)]
    paths["out.jsonl"].unlink()
    assert main(["gather", *arguments]) == 0
    assert paths["out.jsonl"].read_bytes() == text
    record = read_run(paths["out.jsonl"]).assignments[1]
    assert record.objective == by_chance.objective_M.tolist()
    assert record.optimum == best.objective_M.tolist()
    drawn = np.mean(
        [objective_of_chance(scores_MEK, capacity, seed) for seed in range(400)], axis=0
    )
    np.testing.assert_allclose(record.chance, drawn, rtol=0.02)
    assert record.held(0, 1) == set(by_chance.holders_MEK[0, :, 1].nonzero()[0])
    found = map_clients(scores_MEK)
    assert found is not None
    assert (record.map, record.map_shares) == (found.places, found.shares)
