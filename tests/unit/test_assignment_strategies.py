"""Strategies against their definitions, brute force and the optimum; what methods make of them."""

# M = modules, E = domain experts, K = clients, R = rank
import itertools
from pathlib import Path

import numpy as np
import pytest

from fedamole.assignment import assign_experts
from fedamole.assignment_strategies import assign_evenly, assign_greedily, choose_as_clients
from fedamole.config import load_config
from fedamole.config_files import read_yaml
from fedamole.errors import FedamoleError
from fedamole.methods.fedamole import (
    RUNS,
    drawn_anew,
    fit,
    init_pool,
    init_without_shared_expert,
)
from fedamole.pools import ModuleShape, Pool, Provenance
from fedamole.stages import RunStage, run_stage
from fedamole.targets import BackboneFacts

CLIENTS, EXPERTS, CHOICES, RANK = 6, 12, 2, 4
MODULES = [ModuleShape(f"layers.{i}.q_proj", 8, 8) for i in range(3)]
STRATEGIES = (assign_greedily, choose_as_clients, assign_evenly)


def instances(count: int):
    """Random scores under random capacities, many of which leave no slack."""
    rng = np.random.default_rng(11)
    for index in range(count):
        clients = int(rng.integers(1, 9))
        choices = int(rng.integers(1, clients + 1))
        experts = int(rng.integers(-(-clients // choices), 15))
        even, rest = divmod(experts * choices, clients)
        fewest = even if index % 2 else int(rng.integers(1, even + 1))
        most = even + (rest > 0) + int(rng.integers(0, 3)) * (index % 3 > 0)
        levels = (2, 5, 10**6)[index % 3]
        # As after training, experts that are alike want the same clients.
        scores_EK = rng.integers(0, levels, (experts, clients)) + 3 * rng.random(clients)
        yield scores_EK, choices, fewest, max(fewest, most)


def test_greedy_keeps_all_capacities_and_never_beats_the_optimum() -> None:
    worse = 0
    for scores_EK, choices, fewest, most in instances(200):
        found_EK = assign_greedily(scores_EK, choices, fewest, most)
        assert (found_EK.sum(axis=1) == choices).all()
        load_K = found_EK.sum(axis=0)
        assert fewest <= load_K.min() and load_K.max() <= most
        best = scores_EK[assign_experts(scores_EK, choices, fewest, most)].sum()
        reached = scores_EK[found_EK].sum()
        assert reached <= best + 1e-9
        worse += reached < best - 1e-9
    assert worse > 50, "where greedy is always optimal, this test shows nothing"


def test_greedy_takes_the_best_pair_and_pays_for_it() -> None:
    scores_EK = np.array([[3.0, 2.0], [2.9, 0.0]])
    np.testing.assert_array_equal(assign_greedily(scores_EK, 1, 1, 1), np.eye(2, dtype=bool))
    np.testing.assert_array_equal(assign_experts(scores_EK, 1, 1, 1), ~np.eye(2, dtype=bool))


def test_greedy_without_bounds_that_bind_is_each_experts_favourites() -> None:
    scores_EK = np.random.default_rng(0).random((12, 6))
    favourites_EK = np.argsort(np.argsort(-scores_EK, axis=1), axis=1) < 2
    assert favourites_EK.sum(axis=0).min() >= 1
    np.testing.assert_array_equal(assign_greedily(scores_EK, 2, 1, 12), favourites_EK)


def test_greedy_keeps_choices_back_for_clients_below_the_minimum() -> None:
    # Everyone wants client 0, but of four choices three belong to the minima: 2, 1 and 1.
    scores_EK = np.array([[9.0, 1.0, 0.0]] * 4)
    found_EK = assign_greedily(scores_EK, 1, 1, 4)
    assert found_EK.sum(axis=0).tolist() == [2, 1, 1]
    assert assign_greedily(scores_EK[:2], 2, 1, 2).sum(axis=0).tolist() == [2, 1, 1]


def test_greedy_makes_up_for_a_dead_end_by_the_best_exchange() -> None:
    # 9, 8, 7, 6 and 5 are taken; expert 2 needs a second client, but only client 2 has room. Client
    # 1 can take it (4) for its expert 1 (6), which client 2 takes (2); all else loses more.
    scores_EK = np.array([[9, 8, 1], [7, 6, 2], [3, 4, 5]])
    found_EK = assign_greedily(scores_EK, 2, 2, 2)
    assert [tuple(row.nonzero()[0]) for row in found_EK] == [(0, 1), (0, 2), (1, 2)]


def test_greedy_deals_equal_scores_like_cards() -> None:
    found_EK = assign_greedily(np.ones((5, 4)), 2, 1, 4)
    dealt_EK = assign_experts(np.ones((5, 4)), 2, 1, 4)
    np.testing.assert_array_equal(found_EK[0], dealt_EK[0])
    assert (found_EK.sum(axis=1) == 2).all() and found_EK.sum(axis=0).min() >= 1


def test_equal_loads_are_the_best_of_all_with_equal_loads() -> None:
    rng = np.random.default_rng(5)
    rows = [np.isin(np.arange(4), pair) for pair in itertools.combinations(range(4), 2)]
    everything = np.array(list(itertools.product(rows, repeat=5)))
    loads = everything.sum(axis=1)
    even = everything[loads.max(axis=1) - loads.min(axis=1) <= 1]
    for _ in range(10):
        scores_EK = rng.random((5, 4))
        found_EK = assign_evenly(scores_EK, 2, 1, 5)
        best = (even * scores_EK).sum(axis=(1, 2)).max()
        assert scores_EK[found_EK].sum() == pytest.approx(best, rel=1e-9)
        assert sorted(found_EK.sum(axis=0)) == [2, 2, 3, 3]


def test_whatever_capacities_allow_equal_loads_lie_within_them() -> None:
    for scores_EK, choices, fewest, most in instances(100):
        load_K = assign_evenly(scores_EK, choices, fewest, most).sum(axis=0)
        assert fewest <= load_K.min() and load_K.max() <= min(most, load_K.min() + 1)


def test_clients_choose_what_scores_highest_for_them() -> None:
    for scores_EK, choices, fewest, most in instances(100):
        experts, clients = scores_EK.shape
        chosen_EK = choose_as_clients(scores_EK, choices, fewest, most)
        load_K = chosen_EK.sum(axis=0)
        assert load_K.sum() == experts * choices and np.ptp(load_K) <= 1
        for k in range(clients):
            by_score = sorted(range(experts), key=lambda e: (-scores_EK[e, k], e))
            assert set(chosen_EK[:, k].nonzero()[0]) == set(by_score[: load_K[k]])


def test_clients_that_agree_leave_experts_without_holder() -> None:
    scores_EK = np.array([[0.9, 0.8], [0.7, 0.6], [0.1, 0.2], [0.0, 0.1]])
    chosen_EK = choose_as_clients(scores_EK, 1, 2, 3)
    assert chosen_EK.sum(axis=1).tolist() == [2, 2, 0, 0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_has_no_solution_is_refused_by_all(strategy) -> None:
    with pytest.raises(FedamoleError, match="choices 5 <= clients 4 does not hold"):
        strategy(np.zeros((6, 4)), 5, 1, 6)
    with pytest.raises(FedamoleError, match="score of expert 1 for client 0 is nan"):
        strategy(np.array([[0.0, 1.0], [np.nan, 1.0]]), 1, 1, 1)


# Methods


@pytest.fixture(scope="module")
def settings(configs: Path) -> RunStage:
    return run_settings(configs)


def run_settings(configs: Path, **changes) -> RunStage:
    raw = read_yaml(configs / "smoke.yaml")
    raw["scenarios"][0]["clients"] = CLIENTS
    raw["assignment"] = {"num_experts": EXPERTS, "choices": CHOICES, "max_experts": EXPERTS}
    config = load_config(raw | changes, configs)
    (scenario,) = config.scenario_seeds()
    return run_stage(config, scenario, "fedamole")


def trained(settings: RunStage, known=range(CLIENTS), seed=0) -> Pool:
    """A pool whose experts and clients lie in two clusters; clients not known have sent nothing."""
    rng = np.random.default_rng(seed)
    size = (len(MODULES), EXPERTS, CLIENTS)
    centres_CR = 2 * rng.standard_normal((2, RANK))
    experts_MER = centres_CR[np.arange(EXPERTS) % 2] + rng.standard_normal((*size[:2], RANK))
    clients_MKR = centres_CR[np.arange(CLIENTS) % 2] + rng.standard_normal((3, CLIENTS, RANK))
    num_examples_K = np.isin(np.arange(CLIENTS), list(known)) * 10
    clients_MKR[:, num_examples_K == 0] = 0
    made = Provenance(
        round=1,
        tokens_MEK=np.zeros(size, dtype=np.int64),
        holders_MEK=np.zeros(size, dtype=bool),
        scores_MEK=np.zeros(size, dtype=np.float32),
        objective_M=np.zeros(len(MODULES)),
        expert_embeddings_MER=experts_MER.astype(np.float32),
        client_embeddings_MKR=clients_MKR.astype(np.float32),
        num_examples_K=num_examples_K,
    )
    untrained = init_pool(settings, BackboneFacts(MODULES, Path()))
    return Pool(untrained.groups, EXPERTS, made)


def test_a_static_assignment_stays_and_a_random_one_does_not(settings: RunStage) -> None:
    pool = trained(settings)
    untrained = Pool(pool.groups, EXPERTS, None)
    for run, stays in (("fedamole-static", True), ("fedamole-random", False)):
        first = RUNS[run].assign(settings, untrained, 1)
        later = [RUNS[run].assign(settings, pool, t) for t in (2, 3)]
        np.testing.assert_array_equal(
            first.scores_MEK, RUNS["fedamole"].assign(settings, untrained, 1).scores_MEK
        )
        for found in later:
            assert (found.holders_MEK == first.holders_MEK).all() == stays
        assert (later[0].holders_MEK == later[1].holders_MEK).all() == stays


def test_all_strategies_record_the_scores_of_rsea_and_none_under_its_rules_beats_it(
    settings: RunStage,
) -> None:
    pool = trained(settings)
    ours = RUNS["fedamole"].assign(settings, pool, 2)
    for run, method in RUNS.items():
        found = method.assign(settings, pool, 2)
        np.testing.assert_array_equal(found.scores_MEK, ours.scores_MEK)
        sums_M = [
            sum(float(score) for score in scores_EK[holders_EK])
            for scores_EK, holders_EK in zip(found.scores_MEK, found.holders_MEK, strict=True)
        ]
        np.testing.assert_allclose(found.objective_M, sums_M, rtol=1e-12)
        assert found.holders_MEK.sum() == len(MODULES) * EXPERTS * CHOICES, run
        if run != "fedamole-client-chooses":
            assert (found.holders_MEK.sum(axis=2) == CHOICES).all(), run
            assert (found.objective_M <= ours.objective_M + 1e-9).all(), run
    assert RUNS["fedamole-random"].assign(settings, pool, 2).objective_M.sum() < 0.9 * (
        ours.objective_M.sum()
    )


def test_clients_choose_by_a_softmax_over_experts(settings: RunStage) -> None:
    pool = trained(settings)
    made = pool.provenance
    chosen_MEK = RUNS["fedamole-client-chooses"].assign(settings, pool, 2).holders_MEK
    for m, k in itertools.product(range(len(MODULES)), range(CLIENTS)):
        logits_E = made.expert_embeddings_MER[m] @ made.client_embeddings_MKR[m, k] / RANK**0.5
        softmax_E = np.exp(logits_E) / np.exp(logits_E).sum()
        best = np.argsort(-softmax_E)[: EXPERTS * CHOICES // CLIENTS]
        assert set(chosen_MEK[m, :, k].nonzero()[0]) == set(best)


@pytest.mark.parametrize("run", RUNS)
def test_experts_go_to_those_who_take_part(configs: Path, run: str) -> None:
    half = run_settings(configs, participation={"fraction": 0.5})
    pool = trained(half)
    for round_ in (2, 3, 4):
        drawn = half.population.drawn(round_)
        absent = sorted(set(range(CLIENTS)) - set(drawn))
        found = RUNS[run].assign(half, pool, round_)
        load_MK = found.holders_MEK.sum(axis=1)
        assert (load_MK[:, absent] == 0).all() and (load_MK[:, drawn] >= 2).all()
        assert (found.scores_MEK[:, :, absent] == 0).all()
        np.testing.assert_allclose(found.scores_MEK.sum(axis=2), 1, rtol=1e-5)
        assert found.holders_MEK.sum() == len(MODULES) * EXPERTS * CHOICES


def test_a_client_of_which_nothing_is_known_is_like_the_mean_of_the_others(
    settings: RunStage,
) -> None:
    pool = trained(settings, known=range(CLIENTS - 1))
    made = pool.provenance
    logits_MEK = np.log(fit(settings, pool, 2).astype(np.float64))
    # Logits are linear in the client's embedding, and the softmax shifts all of an expert alike.
    known_MEK = logits_MEK[:, :, : CLIENTS - 1]
    np.testing.assert_allclose(logits_MEK[:, :, -1], known_MEK.mean(axis=2), atol=1e-5)
    assert not made.client_embeddings_MKR[:, -1].any()


def test_random_scores_of_a_round_do_not_depend_on_the_pool(settings: RunStage) -> None:
    one, other = trained(settings, seed=1), trained(settings, seed=2)
    np.testing.assert_array_equal(drawn_anew(settings, one, 3), drawn_anew(settings, other, 3))


def test_without_shared_expert_all_other_tensors_are_the_same(settings: RunStage) -> None:
    facts = BackboneFacts(MODULES, Path())
    with_one, without = init_pool(settings, facts), init_without_shared_expert(settings, facts)
    assert set(with_one.groups["q_proj"].shared) == {"lora_A", "lora_B", "token_proj"}
    assert set(without.groups["q_proj"].shared) == {"token_proj"}
    for part in ("experts", "shared"):
        ours = getattr(with_one.groups["q_proj"], part)
        for name, values in getattr(without.groups["q_proj"], part).items():
            np.testing.assert_array_equal(values, ours[name])
