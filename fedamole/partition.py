"""Labels -> client indices: how one data set is spread over clients (pure NumPy).

Axes: N examples, C classes, K clients.
"""

import math
from dataclasses import dataclass

import numpy as np

from fedamole.errors import FedamoleError
from fedamole.settings import PartitionSettings

MAX_REDRAWS = 10_000
EMBEDDING_FRACTION = 0.05


@dataclass(frozen=True)
class ClientSplit:
    """Disjoint sets of one client, each an array of indices in random order.

    Attributes
    ----------
    train
        Local training.
    embedding
        Embeddings for the assignment; a method without them trains on these as well.
    eval
        Evaluation after every round.
    test
        The reported number.
    """

    train: np.ndarray
    embedding: np.ndarray
    eval: np.ndarray
    test: np.ndarray

    def __len__(self) -> int:
        """Count the examples of all four sets."""
        return sum(map(len, self.parts().values()))

    def parts(self) -> dict[str, np.ndarray]:
        """Give the four sets by name, in the order of the fields."""
        return {
            "train": self.train,
            "embedding": self.embedding,
            "eval": self.eval,
            "test": self.test,
        }


def partition(
    classes: np.ndarray,
    settings: PartitionSettings,
    clients: int,
    min_examples: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Spread examples over clients.

    ``dirichlet`` follows Hsu et al. 2019 (arXiv:1909.06335) with the balancing rule of Li et al.
    2022 (NIID-Bench, arXiv:2102.02079), ``pathological`` McMahan et al. 2017 (arXiv:1602.05629).

    Parameters
    ----------
    classes
        Class of each example, (N,) integers.
    settings
        The law.
    clients
        Number of clients K.
    min_examples
        Fewest examples of a client.
    rng
        Source of all randomness.

    Returns
    -------
    list of numpy.ndarray
        For each client the sorted indices of its examples. They are disjoint; together they cover
        all examples, except that ``meta`` uses the first K * classes_per_client classes only.

    Raises
    ------
    FedamoleError
        If the data cannot feed the clients, or no draw of ``MAX_REDRAWS`` gave each its minimum.
    """
    if len(classes) < clients * min_examples:
        raise FedamoleError(
            f"{len(classes)} examples cannot feed {clients} clients with at least {min_examples} "
            f"each ({clients * min_examples}); take fewer clients, a smaller min_examples or more "
            "data"
        )
    codes = np.unique(classes, return_inverse=True)[1]
    sizes_C = np.bincount(codes)
    if settings.kind == "iid":
        parts = np.array_split(rng.permutation(len(classes)), clients)
        return [np.sort(part) for part in parts]
    if settings.kind == "meta":
        assert settings.classes_per_client is not None  # PartitionSettings requires it.
        counts_KC = _meta(sizes_C, clients, settings.classes_per_client)
        _require(counts_KC, settings, min_examples)
    else:
        counts_KC = _redraw(sizes_C, settings, clients, min_examples, rng)
    return _deal(codes, counts_KC, rng)


def split_client(
    indices: np.ndarray,
    rng: np.random.Generator,
    *,
    client: int,
    eval_fraction: float,
    test_fraction: float,
    max_embedding: int,
    max_eval: int,
    max_test: int,
) -> ClientSplit:
    """Split a client's examples into its four sets, after a shuffle.

    The remainder after evaluation and test is cut 0.95 : 0.05 into training and embedding set. What
    a cap leaves over is not used, so that a cap on a test set does not change training.

    Parameters
    ----------
    indices
        The client's examples.
    rng
        Source of the shuffle.
    client
        Number of the client, for the error.
    eval_fraction, test_fraction
        Shares of all the client's examples; at least one example each.
    max_embedding, max_eval, max_test
        Caps in examples.

    Raises
    ------
    FedamoleError
        If a set would stay empty; with the client and its size.
    """
    total = len(indices)
    num_eval, num_test = _share(total, eval_fraction), _share(total, test_fraction)
    rest = total - num_eval - num_test
    num_embedding = _share(rest, EMBEDDING_FRACTION)
    if rest - num_embedding < 1:
        raise FedamoleError(
            f"client {client} has {total} examples: too few for a training, embedding, evaluation "
            "and test set (at least 4 are needed); raise min_examples or take fewer clients"
        )
    ends = np.cumsum([num_eval, num_test, num_embedding])
    evaluation, test, embedding, train = np.split(rng.permutation(indices), ends)
    return ClientSplit(train, embedding[:max_embedding], evaluation[:max_eval], test[:max_test])


def _share(total: int, fraction: float) -> int:
    """Count a fraction of the examples, rounded down, but at least one."""
    # 100 * 0.29 is 28.999999999999996: without the allowance a whole share loses an example.
    return max(1, math.floor(total * fraction + 1e-9))


def _redraw(
    sizes_C: np.ndarray,
    settings: PartitionSettings,
    clients: int,
    min_examples: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw counts, (K, C), until every client has enough examples."""
    fewest = 0
    for _ in range(MAX_REDRAWS):
        if settings.kind == "dirichlet":
            assert settings.alpha is not None  # PartitionSettings requires it.
            counts_KC = _dirichlet(sizes_C, clients, settings.alpha, rng)
        else:
            assert settings.classes_per_client is not None  # As above.
            counts_KC = _pathological(sizes_C, clients, settings.classes_per_client, rng)
        fewest = max(fewest, int(counts_KC.sum(axis=1).min()))
        if fewest >= min_examples:
            return counts_KC
    raise FedamoleError(
        f"partition {settings.slug} of {sizes_C.sum()} examples over {clients} clients: none of "
        f"{MAX_REDRAWS} draws gave every client at least {min_examples} examples (the best gave "
        f"{fewest}); take fewer clients, a smaller min_examples or a more even law"
    )


def _dirichlet(
    sizes_C: np.ndarray, clients: int, alpha: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw, class by class, how many of its examples go to each client, (K, C)."""
    counts_KC = np.zeros((clients, len(sizes_C)), dtype=np.int64)
    for column, size in enumerate(sizes_C):
        open_K = counts_KC.sum(axis=1) * clients < sizes_C.sum()
        share_K = rng.dirichlet(np.full(clients, alpha)) * open_K
        # For a tiny alpha all the mass may lie on one full client; nobody gets the class then, and
        # an all-zero matrix makes the caller draw again.
        if not share_K.sum() > 0:
            return np.zeros_like(counts_KC)
        bounds = np.rint(np.cumsum(share_K / share_K.sum())[:-1] * size).astype(np.int64)
        counts_KC[:, column] = np.diff(bounds, prepend=0, append=size)
    return counts_KC


def _meta(sizes_C: np.ndarray, clients: int, per_client: int) -> np.ndarray:
    """Give client i all of classes i*m .. (i+1)*m - 1 in sorted order, (K, C)."""
    if clients * per_client > len(sizes_C):
        raise FedamoleError(
            f"partition meta{per_client} over {clients} clients needs {clients * per_client} "
            f"classes; the data have {len(sizes_C)}"
        )
    counts_KC = np.zeros((clients, len(sizes_C)), dtype=np.int64)
    for column in range(clients * per_client):
        counts_KC[column // per_client, column] = sizes_C[column]
    return counts_KC


def _pathological(
    sizes_C: np.ndarray, clients: int, per_client: int, rng: np.random.Generator
) -> np.ndarray:
    """Give every client m different classes, every class to someone, in equal shares, (K, C)."""
    num_classes = len(sizes_C)
    if not per_client <= num_classes <= clients * per_client:
        raise FedamoleError(
            f"partition pathological{per_client} over {clients} clients needs {per_client} to "
            f"{clients * per_client} classes; the data have {num_classes}"
        )
    held_KC = _hands(num_classes, clients, per_client, rng)
    counts_KC = np.zeros((clients, num_classes), dtype=np.int64)
    for column, size in enumerate(sizes_C):
        holders = rng.permutation(np.flatnonzero(held_KC[:, column]))
        share, surplus = divmod(int(size), len(holders))
        counts_KC[holders, column] = share + (np.arange(len(holders)) < surplus)
    return counts_KC


def _hands(num_classes: int, clients: int, per_client: int, rng: np.random.Generator) -> np.ndarray:
    """Deal classes like cards: which client holds which, (K, C) bool.

    Every class lies in the deck once, and a new deck is opened only when the last is used up, so
    all classes are held, and about equally often.
    """
    held_KC = np.zeros((clients, num_classes), dtype=bool)
    deck: list[int] = []
    for client in range(clients):
        for _ in range(per_client):
            deck = deck or rng.permutation(num_classes).tolist()
            card = next(card for card in deck if not held_KC[client, card])
            deck.remove(card)
            held_KC[client, card] = True
    return held_KC


def _require(counts_KC: np.ndarray, settings: PartitionSettings, min_examples: int) -> None:
    """Refuse a law without randomness that starves a client."""
    sizes_K = counts_KC.sum(axis=1)
    client = int(sizes_K.argmin())
    if sizes_K[client] < min_examples:
        raise FedamoleError(
            f"partition {settings.slug} gives client {client} {sizes_K[client]} examples; "
            f"min_examples is {min_examples}"
        )


def _deal(codes: np.ndarray, counts_KC: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Give each client its number of random examples of every class."""
    shares: list[list[np.ndarray]] = [[] for _ in counts_KC]
    for column, counts_K in enumerate(counts_KC.T):
        members = rng.permutation(np.flatnonzero(codes == column))
        for client, part in enumerate(np.split(members, np.cumsum(counts_K))[:-1]):
            shares[client].append(part)
    return [np.sort(np.concatenate(parts)) for parts in shares]
