"""The map of the clients against principal components of the raw logits, computed another way."""

from pathlib import Path

import numpy as np
import pytest
from study import Study, write_lines

from fedamole.assignment import random_scores, score_experts, similarities
from fedamole.errors import FedamoleError
from fedamole.results import read_run
from fedamole.routing_map import map_clients

RNG = np.random.default_rng(0)
EXPERTS_MER = RNG.normal(size=(3, 6, 4)).astype(np.float32)
CLIENTS_MKR = RNG.normal(size=(3, 7, 4)).astype(np.float32)


def places_of(scores_MEK: np.ndarray) -> np.ndarray:
    """Places of clients that all have some."""
    found = map_clients(scores_MEK)
    assert found is not None
    return np.array(found.places, dtype=float)


def test_it_is_the_principal_components_of_the_raw_logits_up_to_sign() -> None:
    logits_MEK = similarities(EXPERTS_MER, CLIENTS_MKR)
    logits_KX = logits_MEK.reshape(-1, 7).T
    centred_KX = logits_KX - logits_KX.mean(axis=0)
    variances, axes = np.linalg.eigh(centred_KX.T @ centred_KX)
    found = map_clients(score_experts(EXPERTS_MER, CLIENTS_MKR))
    assert found is not None
    for axis in (0, 1):
        expected = np.abs(centred_KX @ axes[:, -1 - axis])
        np.testing.assert_allclose(np.abs(np.array(found.places)[:, axis]), expected, atol=1e-4)
    assert found.shares == pytest.approx((variances[:-3:-1] / variances.sum()).tolist(), abs=1e-5)


def test_two_kinds_of_clients_lie_on_two_sides() -> None:
    kinds = np.array([1, -1, 1, 1, -1, -1])
    clients_MKR = kinds[:, None] * np.ones((3, 6, 4)) + 0.05 * RNG.normal(size=(3, 6, 4))
    found = map_clients(score_experts(EXPERTS_MER, clients_MKR.astype(np.float32)))
    assert found is not None
    assert np.sign([place[0] for place in found.places if place]).tolist() == kinds.tolist()
    assert found.shares[0] > 0.95


def test_a_factor_of_an_expert_changes_nothing() -> None:
    scores_MEK = random_scores(np.random.default_rng(1), 2, 5, 6)
    factors_ME1 = np.random.default_rng(2).uniform(0.1, 9, size=(2, 5, 1))
    np.testing.assert_allclose(
        places_of(scores_MEK * factors_ME1), places_of(scores_MEK), atol=2e-5
    )


def test_order_of_the_experts_changes_no_byte_and_the_first_client_is_on_the_positive_side() -> (
    None
):
    for seed in range(20):
        scores_MEK = random_scores(np.random.default_rng(seed), 2, 5, 6)
        found = map_clients(scores_MEK)
        assert found == map_clients(scores_MEK[::-1, ::-1])
        assert found is not None
        assert min(found.places[0] or []) > 0


def test_a_client_without_scores_has_no_place_and_moves_no_other() -> None:
    scores_MEK = random_scores(np.random.default_rng(3), 2, 5, 4)
    among_MEK = np.insert(scores_MEK, 2, 0, axis=2)
    found, alone = map_clients(among_MEK), map_clients(scores_MEK)
    assert found is not None
    assert alone is not None
    assert found.places == [*alone.places[:2], None, *alone.places[2:]]
    assert map_clients(np.zeros((2, 5, 4))) is None


def test_few_clients_have_few_dimensions() -> None:
    scores_MEK = random_scores(np.random.default_rng(4), 2, 5, 2)
    assert places_of(scores_MEK[:, :, :1]).tolist() == [[0, 0]]
    (x, y), (other_x, other_y) = places_of(scores_MEK).tolist()
    distance = np.linalg.norm(np.log(scores_MEK[:, :, 0]) - np.log(scores_MEK[:, :, 1]))
    assert (y, other_y) == (0, 0)
    assert x == -other_x == pytest.approx(distance / 2, rel=1e-5)


def test_scores_that_differ_by_rounding_only_are_alike() -> None:
    third = np.full((2, 5, 3), 1 / 3, dtype=np.float32)
    third[0, 0, 0] = np.nextafter(third[0, 0, 0], np.float32(1))
    found = map_clients(third)
    assert found is not None
    assert (found.places, found.shares) == ([[0.0, 0.0]] * 3, [0.0, 0.0])


def test_a_score_of_zero_is_far_away_but_finite() -> None:
    scores_MEK = random_scores(np.random.default_rng(5), 2, 5, 4)
    scores_MEK[0, 0, 3] = 0
    places = places_of(scores_MEK)
    assert np.isfinite(places).all()
    assert np.argmax(np.abs(places[:, 0])) == 3


@pytest.mark.parametrize("field", ["map", "map_shares"])
def test_a_map_of_other_clients_is_refused(field: str, tmp_path: Path) -> None:
    study = Study(score=lambda *_: 0.5, loss=lambda *_: 1.0, rounds=1)
    lines = study.lines("chatterbot-dir0.5", 42, "fedamole")
    lines[-1][field] = lines[-1][field][1:]
    with pytest.raises(FedamoleError, match="map of round 1 is not 4 places and shares in 2-D"):
        read_run(write_lines(tmp_path / "broken.jsonl", lines))
