"""The laws by which a data set is spread over clients, with the real generator."""

import json

import numpy as np
import pytest
from scipy import stats

from fedamole.datasets.loading import Corpus, Example
from fedamole.datasets.splits import make_partition, partition_record
from fedamole.errors import FedamoleError
from fedamole.partition import ClientSplit, partition, split_client
from fedamole.settings import DatasetSettings, PartitionSettings, ScenarioSettings

LAWS = {
    "dir0.1": PartitionSettings(kind="dirichlet", alpha=0.1),
    "dir1": PartitionSettings(kind="dirichlet", alpha=1.0),
    "dir100": PartitionSettings(kind="dirichlet", alpha=100.0),
    "pathological2": PartitionSettings(kind="pathological", classes_per_client=2),
    "meta1": PartitionSettings(kind="meta", classes_per_client=1),
    "iid": PartitionSettings(kind="iid"),
}
CLASSES = np.random.default_rng(7).permutation(np.repeat(np.arange(6), [900, 500, 300, 60, 40, 80]))


def draw(law: str, clients: int = 6, seed: int = 1, classes: np.ndarray = CLASSES) -> list:
    return partition(classes, LAWS[law], clients, 10, np.random.default_rng(seed))


def counts(shares: list[np.ndarray], classes: np.ndarray = CLASSES) -> np.ndarray:
    return np.stack([np.bincount(classes[share], minlength=classes.max() + 1) for share in shares])


@pytest.mark.parametrize("law", LAWS)
def test_every_example_goes_to_exactly_one_client(law: str) -> None:
    shares = draw(law)
    np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.arange(len(CLASSES)))
    assert min(map(len, shares)) >= 10


@pytest.mark.parametrize("law", LAWS)
def test_split_is_a_function_of_the_seed(law: str) -> None:
    first, again, other = draw(law), draw(law), draw(law, seed=2)
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    differs = any(not np.array_equal(one, two) for one, two in zip(first, other, strict=True))
    assert differs == (law != "meta1")


def test_share_of_a_client_is_beta_distributed() -> None:
    # A component of Dirichlet(a, ..., a) over K clients is Beta(a, (K - 1) a).
    clients, alpha, size = 4, 2.0, 20_000
    law = PartitionSettings(kind="dirichlet", alpha=alpha)
    rng = np.random.default_rng(3)
    draws = (partition(np.zeros(size, int), law, clients, 1, rng) for _ in range(600))
    shares = [len(shares[2]) / size for shares in draws]
    assert stats.kstest(shares, stats.beta(alpha, (clients - 1) * alpha).cdf).pvalue > 0.01


def test_small_alpha_concentrates_classes_and_large_alpha_evens_them() -> None:
    def largest_share(law: str) -> float:
        tables = [counts(draw(law, seed=seed)) for seed in range(20)]
        return float(np.mean([table.max(axis=0) / table.sum(axis=0) for table in tables]))

    concentrated, middle, even = map(largest_share, ("dir0.1", "dir1", "dir100"))
    assert concentrated > 0.6 > middle > 0.3 > even > 1 / 6
    np.testing.assert_allclose(counts(draw("dir100"))[:, 0], 900 / 6, rtol=0.5)


def tables(law: PartitionSettings, sizes: list[int], clients: int, draws: int) -> np.ndarray:
    """Examples by draw, client and class, without a least size that would choose among draws."""
    classes, rng = np.repeat(np.arange(len(sizes)), sizes), np.random.default_rng(11)
    return np.stack(
        [counts(partition(classes, law, clients, 0, rng), classes) for _ in range(draws)]
    )


def test_alpha_towards_zero_gives_every_class_to_one_client_whoever_has_the_others() -> None:
    # The last class is so large that nobody is full before it.
    law = PartitionSettings(kind="dirichlet", alpha=1e-4)
    small = tables(law, [90, 60, 80, 9000], clients=4, draws=2000)[:, :, :3]
    shares = small.max(axis=1) / [90, 60, 80]
    assert shares.mean() > 0.999
    owners = small.argmax(axis=1) @ [16, 4, 1]
    # The owners of three classes are independent and uniform: 64 equal cells.
    assert stats.chisquare(np.bincount(owners, minlength=64)).pvalue > 0.01


def test_alpha_towards_infinity_cuts_every_class_into_equal_parts() -> None:
    law = PartitionSettings(kind="dirichlet", alpha=1e9)
    sizes = [900, 500, 300, 60, 40, 80]
    even = tables(law, sizes, clients=6, draws=20) - np.array(sizes) / 6
    assert np.abs(even).max() < 1


def test_share_of_a_client_is_beta_distributed_also_once_another_is_full() -> None:
    # Dirichlet(a, a, a) without one component, renormalised, is Dirichlet(a, a): Beta(a, a).
    law = PartitionSettings(kind="dirichlet", alpha=1.5)
    drawn = tables(law, [9000, 6000], clients=3, draws=1500)
    full = drawn[:, :, 0] >= 5000
    one = full.sum(axis=1) == 1
    shares = [table[~who][0, 1] / 6000 for table, who in zip(drawn[one], full[one], strict=True)]
    assert len(shares) > 300
    assert stats.kstest(shares, stats.beta(1.5, 1.5).cdf).pvalue > 0.01


def test_iid_counts_of_a_class_are_hypergeometric() -> None:
    drawn = tables(PartitionSettings(kind="iid"), [80, 120], clients=5, draws=2000)
    assert (drawn.sum(axis=2) == 40).all()
    # 40 of 200 without replacement; the rare ends are pooled.
    law = stats.hypergeom(200, 80, 40)
    ends = np.array([12, 13, 14, 15, 16, 17, 18, 19, 20])
    expected = np.diff(law.cdf(ends), prepend=0, append=1) * 2000
    found = np.bincount(np.searchsorted(ends, drawn[:, 2, 0]), minlength=10)
    assert stats.chisquare(found, expected).pvalue > 0.01


def test_pathological_gives_a_client_every_choice_of_classes_equally_often() -> None:
    law = PartitionSettings(kind="pathological", classes_per_client=2)
    held = tables(law, [50] * 4, clients=5, draws=1200)[:, 3] > 0
    pairs = np.bincount(held @ [8, 4, 2, 1], minlength=16)[[3, 5, 6, 9, 10, 12]]
    assert pairs.sum() == 1200
    assert stats.chisquare(pairs).pvalue > 0.01


@pytest.mark.parametrize("law", ["dir1", "pathological2", "iid"])
def test_an_example_is_as_likely_with_every_client(law: str) -> None:
    classes, rng = np.repeat([0, 1, 2], [30, 20, 40]), np.random.default_rng(4)
    owners = np.zeros(4, dtype=int)
    for _ in range(800):
        shares = partition(classes, LAWS[law], 4, 1, rng)
        owners += [int(35 in share) for share in shares]
    assert owners.sum() == 800
    assert stats.chisquare(owners).pvalue > 0.01


@pytest.mark.parametrize("least", [10, 60, 120])
def test_every_client_has_the_least_size_in_every_draw(least: int) -> None:
    law, rng = LAWS["dir0.1"], np.random.default_rng(2)
    for _ in range(10):
        shares = partition(CLASSES, law, 6, least, rng)
        assert min(map(len, shares)) >= least
        assert len(np.unique(np.concatenate(shares))) == sum(map(len, shares)) == len(CLASSES)


def test_client_that_holds_its_fair_share_gets_no_further_class() -> None:
    for seed in range(50):
        table = counts(draw("dir0.1", seed=seed))
        held_before = np.cumsum(table, axis=1) - table
        assert not table[held_before * 6 >= len(CLASSES)].any()


def test_meta_gives_consecutive_classes_whole() -> None:
    law = PartitionSettings(kind="meta", classes_per_client=2)
    shares = partition(CLASSES * 5 + 3, law, 3, 10, np.random.default_rng(0))
    assert [sorted(set(CLASSES[share])) for share in shares] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(("clients", "per_client"), [(6, 1), (3, 2), (10, 3), (7, 6)])
def test_pathological_uses_all_classes_about_equally_often(clients: int, per_client: int) -> None:
    law = PartitionSettings(kind="pathological", classes_per_client=per_client)
    for seed in range(10):
        shares = partition(CLASSES, law, clients, 1, np.random.default_rng(seed))
        held = counts(shares) > 0
        assert (held.sum(axis=1) == per_client).all()
        assert set(held.sum(axis=0)) <= {clients * per_client // 6, -(-clients * per_client // 6)}


def test_holders_of_a_class_share_it_evenly() -> None:
    table = counts(draw("pathological2", clients=10))
    for column in table.T:
        assert np.ptp(column[column > 0]) <= 1


@pytest.mark.parametrize(
    ("law", "clients", "min_examples", "message"),
    [
        ("dir1", 189, 10, "1880 examples cannot feed 189 clients with at least 10 each (1890)"),
        ("iid", 4, 500, "1880 examples cannot feed 4 clients with at least 500 each (2000)"),
        ("meta1", 7, 10, "meta1 over 7 clients needs 7 classes; the data have 6"),
        ("meta1", 6, 50, "meta1 gives client 4 40 examples; min_examples is 50"),
        ("pathological2", 2, 10, "needs 2 to 4 classes; the data have 6"),
        ("dir0.1", 6, 313, "dir0.1 of 1880 examples over 6 clients: none of 10000 draws gave"),
    ],
)
def test_impossible_partition_says_why(
    law: str, clients: int, min_examples: int, message: str
) -> None:
    with pytest.raises(FedamoleError) as caught:
        partition(CLASSES, LAWS[law], clients, min_examples, np.random.default_rng(0))
    assert message in str(caught.value)


def split(size: int, **changes: int) -> ClientSplit:
    caps = {"max_embedding": 200, "max_eval": 200, "max_test": 50} | changes
    rng = np.random.default_rng(5)
    return split_client(
        np.arange(size) * 3, rng, client=7, eval_fraction=0.1, test_fraction=0.1, **caps
    )


def test_split_has_the_shares_of_the_paper() -> None:
    assert {k: len(v) for k, v in split(400).parts().items()} == {
        "train": 304,
        "embedding": 16,
        "eval": 40,
        "test": 40,
    }
    together = np.concatenate(list(split(400).parts().values()))
    np.testing.assert_array_equal(np.sort(together), np.arange(400) * 3)


def test_shares_are_whole_percents_of_the_size_rounded_down() -> None:
    # In whole numbers: 100 * 0.29 is less than 29 in floating point.
    caps = {"client": 0, "max_embedding": 999, "max_eval": 999, "max_test": 999}
    for percent in range(1, 50):
        for size in (37, 100, 500):
            rng, fraction = np.random.default_rng(0), percent / 100
            parts = split_client(
                np.arange(size), rng, eval_fraction=fraction, test_fraction=0.5 - fraction, **caps
            ).parts()
            assert len(parts["eval"]) == max(1, size * percent // 100), (size, percent)


@pytest.mark.parametrize("kind", ["dirichlet", "meta", "pathological"])
def test_no_value_is_made_up_for_a_law_without_its_parameter(kind: str) -> None:
    # Not by validation, which refuses it.
    law = PartitionSettings.model_construct(kind=kind)
    with pytest.raises(AssertionError):
        partition(CLASSES, law, 6, 10, np.random.default_rng(0))


@pytest.mark.parametrize("law", LAWS)
def test_the_four_sets_of_all_clients_are_a_function_of_the_seed(law: str) -> None:
    examples = tuple(Example(f"p{n}", "r", int(c), -1) for n, c in enumerate(CLASSES))
    corpus = Corpus(examples, tuple("abcdef"), {})
    source = {"files": ["x.jsonl"]}
    data = {"name": "x", "source": source, "task": "generation", "template": "{q}"}
    dataset = DatasetSettings(**data, response="a", category="c")
    settings = ScenarioSettings(dataset=dataset, partition=LAWS[law], clients=6)
    first, again, other = (
        json.dumps(partition_record(make_partition(corpus, settings, seed))) for seed in (1, 1, 2)
    )
    assert first == again != other
    sets = [part for client in json.loads(first)["clients"] for part in client.values()]
    together = np.concatenate(sets)
    assert len(np.unique(together)) == len(together)


def test_caps_cut_their_own_set_only() -> None:
    free, capped = split(400), split(400, max_embedding=5, max_eval=6, max_test=7)
    assert [len(part) for part in capped.parts().values()] == [304, 5, 6, 7]
    np.testing.assert_array_equal(free.train, capped.train)
    np.testing.assert_array_equal(free.test[:7], capped.test)


def test_four_examples_fill_four_sets_and_three_do_not() -> None:
    assert [len(part) for part in split(4).parts().values()] == [1, 1, 1, 1]
    with pytest.raises(FedamoleError, match="client 7 has 3 examples: too few"):
        split(3)
