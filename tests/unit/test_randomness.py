"""Random streams depend on their names only."""

import numpy as np

from fedamole.batches import stream_of_examples
from fedamole.randomness import derive_seed, stream


def test_equal_names_give_equal_draws_whatever_was_drawn_before() -> None:
    first = stream(42, "training", 1, 0).random(5)
    stream(42, "other").random(1000)
    assert np.array_equal(first, stream(42, "training", 1, 0).random(5))


def test_different_names_give_different_streams() -> None:
    names = [(1, "a"), (1, "b"), (2, "a"), (1, "a", 1), (1, "a", "1"), (1, 1), (1, "1"), (11,)]
    assert len({derive_seed(*name) for name in names}) == len(names)


def test_the_example_stream_is_one_permutation_after_another() -> None:
    whole = stream_of_examples(7, 0, 21, seed=1, client=2)
    for epoch in range(3):
        assert sorted(whole[epoch * 7 : epoch * 7 + 7]) == list(range(7))
    assert not np.array_equal(whole[:7], whole[7:14])


def test_any_part_of_the_example_stream_can_be_made_alone() -> None:
    whole = stream_of_examples(7, 0, 40, seed=1, client=2)
    for start, stop in [(0, 3), (5, 9), (6, 7), (7, 14), (13, 40), (21, 21)]:
        assert np.array_equal(whole[start:stop], stream_of_examples(7, start, stop, 1, 2))
    assert not np.array_equal(whole, stream_of_examples(7, 0, 40, seed=1, client=3))
