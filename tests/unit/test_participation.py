"""Who takes part in a round: sampling, simulated dropouts, quorum."""

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from fedamole.participation import Participation
from fedamole.settings import ParticipationSettings


def population(clients=20, seed=5, pooled=False, **settings):
    return Participation(ParticipationSettings(**settings), clients, seed, pooled)


def test_by_default_everyone_takes_part_in_every_round():
    who = population()
    assert who.everyone and who.size == who.fewest == 20
    assert all(who.drawn(t) == who.reporting(t) == list(range(20)) for t in (1, 2, 900))


def test_a_round_is_drawn_without_repetition_and_does_not_depend_on_other_rounds():
    who = population(fraction=0.31)
    assert who.size == 7
    later = who.drawn(9)
    for round_ in range(1, 9):
        drawn = who.drawn(round_)
        assert len(set(drawn)) == 7 and drawn == sorted(drawn) and set(drawn) <= set(range(20))
    assert population(fraction=0.31).drawn(9) == later
    assert population(fraction=0.31, seed=6).drawn(9) != later


def test_all_clients_are_drawn_equally_often():
    who = population(fraction=0.25)
    counts = np.bincount([k for t in range(1, 2001) for k in who.drawn(t)], minlength=20)
    # Without repetition counts vary less than the multinomial of this test: it is conservative.
    assert stats.chisquare(counts).pvalue > 1e-6
    assert counts.sum() == 2000 * 5


def test_a_fraction_is_rounded_up_and_not_beyond_by_rounding_errors():
    assert population(clients=10, fraction=0.3).size == 3
    assert population(clients=10, fraction=0.01).size == 1
    assert population(clients=100, fraction=0.29).size == 29


def test_dropouts_have_their_rate_where_the_quorum_allows_it():
    who = population(clients=50, dropout_rate=0.2, quorum=0.02)
    lost = [50 - len(who.reporting(t)) for t in range(1, 401)]
    assert np.mean(lost) == pytest.approx(10, abs=5 * np.sqrt(50 * 0.2 * 0.8 / 400))


def test_dropouts_never_break_the_quorum():
    who = population(clients=10, dropout_rate=0.9, quorum=0.7)
    sizes = {len(who.reporting(t)) for t in range(1, 200)}
    assert min(sizes) == who.fewest == 7
    # Who is saved is random, not always the same clients.
    assert len({tuple(who.reporting(t)) for t in range(1, 60)}) > 20


def test_those_who_report_were_drawn():
    who = population(fraction=0.5, dropout_rate=0.3, quorum=0.5)
    assert not who.everyone
    assert all(set(who.reporting(t)) <= set(who.drawn(t)) for t in range(1, 50))


def test_the_last_round_before_is_the_latest_in_which_a_client_worked():
    who = population(clients=6, fraction=0.34, dropout_rate=0.2, quorum=0.5)
    for client in range(6):
        rounds = [t for t in range(1, 30) if client in who.reporting(t)]
        assert who.last_before(client, 30) == rounds[-1]
        assert who.last_before(client, rounds[-1]) == rounds[-2]
        assert who.last_before(client, rounds[0]) is None


def test_pooled_data_have_one_worker():
    who = population(pooled=True)
    assert who.drawn(3) == who.reporting(3) == [0] and who.size == who.fewest == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0}, "greater than 0"),
        ({"fraction": 1.2}, "less than or equal to 1"),
        ({"quorum": 0}, "greater than 0"),
        ({"dropout_rate": 0.1}, "dropout_rate 0.1 needs a quorum below 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        ParticipationSettings(**settings)
