"""Assignments against brute force, an independent MILP solver, and the constraints themselves."""

# M = modules, E = domain experts, K = clients, R = rank
import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from fedamole.assignment import assign_all, assign_experts, random_scores, score_experts
from fedamole.errors import FedamoleError
from fedamole.settings import AssignmentSettings


def all_assignments(experts, clients, choices, fewest, most):
    """Every feasible (E, K) matrix."""
    rows = [
        np.isin(np.arange(clients), chosen)
        for chosen in itertools.combinations(range(clients), choices)
    ]
    for combination in itertools.product(rows, repeat=experts):
        matrix_EK = np.array(combination)
        load_K = matrix_EK.sum(axis=0)
        if load_K.min() >= fewest and load_K.max() <= most:
            yield matrix_EK


def milp_objective(scores_EK, choices, fewest, most):
    """Compute the optimum by HiGHS (scipy's own copy)."""
    experts, clients = scores_EK.shape
    rows = np.kron(np.eye(experts), np.ones(clients))
    columns = np.kron(np.ones(experts), np.eye(clients))
    result = milp(
        -scores_EK.ravel(),
        integrality=np.ones(scores_EK.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(rows, choices, choices),
            LinearConstraint(columns, fewest, most),
        ],
    )
    assert result.success
    return (scores_EK.ravel() * np.rint(result.x)).sum()


@st.composite
def capacities(draw, max_experts=14, max_clients=8):
    """Draw E, K, choices and bounds for which an assignment exists."""
    experts = draw(st.integers(1, max_experts))
    choices = draw(st.integers(1, max_clients))
    clients = draw(st.integers(choices, min(max_clients, experts * choices)))
    total = experts * choices
    fewest = draw(st.integers(1, total // clients))
    most = draw(st.integers(-(-total // clients), experts + 2))
    return experts, clients, choices, fewest, most


@pytest.mark.parametrize("levels", [1, 2, 3, 1000])
def test_finds_the_best_of_all_assignments_and_breaks_ties_as_documented(levels):
    rng = np.random.default_rng(levels)
    everything = np.array(list(all_assignments(4, 4, 2, 1, 3)))
    distance_EK = (np.arange(4) - 2 * np.arange(4)[:, None]) % 4
    for _ in range(25):
        scores_EK = rng.integers(0, levels, (4, 4)).astype(np.float32)
        objectives = (everything * scores_EK).sum(axis=(1, 2))
        best = everything[objectives == objectives.max()]
        distances = (best * distance_EK**2).sum(axis=(1, 2))
        winners = best[distances == distances.min()]
        found_EK = assign_experts(scores_EK, choices=2, min_experts=1, max_experts=3)
        assert (winners == found_EK).all(axis=(1, 2)).any()


def test_agrees_with_a_mixed_integer_solver_also_where_scores_nearly_tie():
    rng = np.random.default_rng(7)
    for index in range(200):
        experts, clients, choices = rng.integers(4, 21), rng.integers(2, 9), 2
        total = experts * choices
        fewest, most = max(1, total // clients - 1), -(-total // clients) + 1
        # The MILP sees integers, hence is exact; we see them as differences of 2^-24 to 2^-40.
        steps_EK = rng.integers(0, 1000, (experts, clients))
        scale = 2.0 ** -(24 + index % 17)
        scores_EK = (0.25 if index % 2 else 0.0) + steps_EK * scale
        found_EK = assign_experts(scores_EK, choices, fewest, most)
        expected = milp_objective(steps_EK.astype(float), choices, fewest, most)
        assert steps_EK[found_EK].sum() == expected


@settings(max_examples=150, deadline=None)
@given(capacities(), st.integers(0, 2**32 - 1), st.sampled_from(["random", "equal", "few", "huge"]))
def test_every_assignment_respects_all_capacities(capacity, seed, law):
    experts, clients, choices, fewest, most = capacity
    rng = np.random.default_rng(seed)
    scores_EK = {
        "random": rng.standard_normal((experts, clients)),
        "equal": np.zeros((experts, clients)),
        "few": rng.integers(0, 2, (experts, clients)).astype(float),
        "huge": 1e30 * rng.standard_normal((experts, clients)),
    }[law]
    most = min(most, experts) if fewest <= min(most, experts) else most
    found_EK = assign_experts(scores_EK, choices, fewest, most)
    assert found_EK.dtype == bool
    assert (found_EK.sum(axis=1) == choices).all()
    assert found_EK.sum(axis=0).min() >= fewest
    assert found_EK.sum(axis=0).max() <= most


def test_equal_scores_are_dealt_like_cards():
    found_EK = assign_experts(np.ones((5, 4)), choices=2, min_experts=1, max_experts=4)
    assert [tuple(row.nonzero()[0]) for row in found_EK] == [(0, 1), (2, 3), (0, 1), (2, 3), (0, 1)]


def test_slack_capacities_leave_every_expert_its_favourites():
    scores_EK = np.random.default_rng(0).random((12, 6))
    found_EK = assign_experts(scores_EK, choices=2, min_experts=1, max_experts=12)
    favourites_EK = np.argsort(np.argsort(-scores_EK, axis=1), axis=1) < 2
    assert (favourites_EK.sum(axis=0) >= 1).all(), "the bounds must not bind for this test"
    np.testing.assert_array_equal(found_EK, favourites_EK)


def test_clients_have_no_rank_among_them_where_scores_do_not_tie():
    rng = np.random.default_rng(3)
    scores_EK, order = rng.random((30, 10)), rng.permutation(10)
    once_EK = assign_experts(scores_EK, 2, 2, 8)
    np.testing.assert_array_equal(assign_experts(scores_EK[:, order], 2, 2, 8), once_EK[:, order])


@pytest.mark.parametrize(
    ("capacity", "inequality"),
    [
        ((6, 4, 5, 1, 6), "choices 5 <= clients 4"),
        ((6, 4, 2, 5, 4), "min_experts 5 <= max_experts 4"),
        ((6, 4, 2, 4, 6), "clients * min_experts = 4 * 4 = 16 <= "),
        ((6, 4, 2, 1, 2), "num_experts * choices = 6 * 2 = 12 <= clients * max_experts"),
        ((2, 4, 4, 3, 6), "min_experts 3 <= num_experts 2"),
        ((6, 4, 0, 1, 6), "choices 0"),
    ],
)
def test_infeasible_capacities_name_the_inequality(capacity, inequality):
    experts, clients, *bounds = capacity
    with pytest.raises(FedamoleError) as caught:
        assign_experts(np.zeros((experts, clients)), *bounds)
    assert inequality in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(value):
    scores_EK = np.zeros((6, 4))
    scores_EK[2, 3] = value
    with pytest.raises(FedamoleError, match=r"score of expert 2 for client 3 is -?(nan|inf)"):
        assign_experts(scores_EK, 2, 2, 4)


def test_scores_of_two_clients_are_the_logistic_function():
    rng = np.random.default_rng(0)
    experts_MER, clients_MKR = rng.standard_normal((3, 5, 4)), rng.standard_normal((3, 2, 4))
    scores_MEK = score_experts(experts_MER, clients_MKR)
    difference_MR = clients_MKR[:, 0] - clients_MKR[:, 1]
    for m, e in np.ndindex(3, 5):
        logit = experts_MER[m, e] @ difference_MR[m] / 2.0
        assert scores_MEK[m, e, 0] == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-6)
    assert scores_MEK.dtype == np.float32
    np.testing.assert_allclose(scores_MEK.sum(axis=2), 1.0, rtol=1e-6)


def test_large_embeddings_do_not_overflow():
    scores_MEK = score_experts(np.full((1, 1, 1), 1e4), np.array([[[1e4], [0.0]]]))
    np.testing.assert_array_equal(scores_MEK, [[[1.0, 0.0]]])


def test_an_embedding_that_is_not_finite_is_refused():
    clients_MKR = np.zeros((2, 3, 4), dtype=np.float32)
    clients_MKR[1, 2, 0] = np.nan
    with pytest.raises(FedamoleError, match="embedding of client 2 in module 1 is not finite"):
        score_experts(np.zeros((2, 5, 4), dtype=np.float32), clients_MKR)


def test_threads_change_no_bit():
    code = (
        "import numpy as np, hashlib\n"
        "from fedamole.assignment import assign_experts, score_experts\n"
        "rng = np.random.default_rng(0)\n"
        "scores = score_experts(rng.random((4, 64, 256)), rng.random((4, 48, 256)))\n"
        "holders = assign_experts(scores[0], 2, 2, 8)\n"
        "print(hashlib.sha256(scores.tobytes() + holders.tobytes()).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(digests) == 1


def test_all_modules_are_assigned_on_their_own_with_the_sum_of_scores_as_objective():
    scores_MEK = random_scores(np.random.default_rng(1), 3, 12, 4)
    capacity = AssignmentSettings(num_experts=12, choices=2, max_experts=8)
    names = ("a.q", "b.q", "c.q")
    assignment = assign_all(scores_MEK, capacity, top_k=3, modules=names, round_=5)
    assert (assignment.modules, assignment.round) == (names, 5)
    assert assignment.holders_MEK.sum(axis=1).min() >= 3, "b_min is max(2, top_k)"
    for m in range(3):
        expected_EK = assign_experts(scores_MEK[m], 2, 3, 8)
        np.testing.assert_array_equal(assignment.holders_MEK[m], expected_EK)
        exact = sum(float(score) for score in scores_MEK[m][expected_EK])
        assert assignment.objective_M[m] == pytest.approx(exact, rel=1e-14)


def test_those_who_take_part_are_scored_and_assigned_as_if_there_were_no_others():
    rng = np.random.default_rng(2)
    experts_MER, clients_MKR = rng.standard_normal((2, 12, 4)), rng.standard_normal((2, 7, 4))
    capacity, drawn = AssignmentSettings(num_experts=12, choices=2, max_experts=8), [0, 2, 3, 6]
    scores_MEK = score_experts(experts_MER, clients_MKR, clients=drawn)
    found = assign_all(scores_MEK, capacity, 2, ("q", "v"), 1, clients=drawn)
    alone_MEK = score_experts(experts_MER, clients_MKR[:, drawn])
    alone = assign_all(alone_MEK, capacity, 2, ("q", "v"), 1)
    np.testing.assert_array_equal(found.scores_MEK[:, :, drawn], alone.scores_MEK)
    np.testing.assert_array_equal(found.holders_MEK[:, :, drawn], alone.holders_MEK)
    np.testing.assert_array_equal(found.objective_M, alone.objective_M)
    assert not found.scores_MEK[:, :, [1, 4, 5]].any()
    assert not found.holders_MEK[:, :, [1, 4, 5]].any()


def test_capacities_that_do_not_suffice_for_those_who_take_part_are_refused():
    capacity = AssignmentSettings(num_experts=12, choices=2, max_experts=8)
    with pytest.raises(
        FedamoleError, match="= 24 <= clients \\* max_experts = 2 \\* 8 = 16 does not"
    ):
        assign_all(np.ones((1, 12, 7)), capacity, 2, ("q",), 1, clients=[1, 5])


def test_to_name_all_clients_changes_no_bit():
    rng = np.random.default_rng(4)
    experts_MER, clients_MKR = rng.standard_normal((3, 31, 8)), rng.standard_normal((3, 13, 8))
    known_K = np.ones(13, dtype=bool)
    named = score_experts(experts_MER, clients_MKR, clients=range(13), known_K=known_K)
    assert named.tobytes() == score_experts(experts_MER, clients_MKR).tobytes()


def test_random_scores_are_uniform():
    scores = random_scores(np.random.default_rng(0), 10, 100, 20)
    assert scores.dtype == np.float32
    assert (scores >= 0).all() and (scores < 1).all()
    # Mean and variance of U(0, 1), within five standard errors of 20,000 draws.
    assert scores.mean() == pytest.approx(1 / 2, abs=5 * np.sqrt(1 / 12 / scores.size))
    assert scores.var() == pytest.approx(1 / 12, abs=5 * np.sqrt(1 / 180 / scores.size))
