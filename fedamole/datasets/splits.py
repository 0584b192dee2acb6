"""A corpus spread over the clients of a scenario, and the record of it (partition.json)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedamole.artifacts import read_record
from fedamole.datasets.loading import Corpus
from fedamole.errors import FedamoleError
from fedamole.partition import ClientSplit, partition, split_client
from fedamole.randomness import stream
from fedamole.settings import ScenarioSettings


@dataclass(frozen=True)
class Partition:
    """Who has which examples of a corpus.

    Attributes
    ----------
    classes
        Names of the C classes.
    counts
        Examples of each client and class before the split, (K, C) int64.
    clients
        Example ids of each client's four sets.
    dropped
        Rows of the source that were left out, by reason.
    corpus
        Digest of the corpus that the ids belong to.
    """

    classes: tuple[str, ...]
    counts: np.ndarray
    clients: tuple[ClientSplit, ...]
    dropped: dict[str, int]
    corpus: str


def make_partition(corpus: Corpus, settings: ScenarioSettings, seed: int) -> Partition:
    """Spread a corpus over the clients of a scenario and split each client's share.

    Raises
    ------
    FedamoleError
        If the corpus cannot feed the clients.
    """
    categories = corpus.categories
    shares = partition(
        categories,
        settings.partition,
        settings.clients,
        settings.min_examples,
        stream(seed, "partition"),
    )
    dataset = settings.dataset
    clients = tuple(
        split_client(
            share,
            stream(seed, "split", client),
            client=client,
            eval_fraction=dataset.eval_fraction,
            test_fraction=dataset.test_fraction,
            max_embedding=settings.max_embedding,
            max_eval=settings.max_eval,
            max_test=settings.test_cap,
        )
        for client, share in enumerate(shares)
    )
    counts = [np.bincount(categories[share], minlength=len(corpus.classes)) for share in shares]
    return Partition(corpus.classes, np.stack(counts), clients, corpus.dropped, corpus.digest)


def partition_record(division: Partition) -> dict[str, Any]:
    """Give the content of partition.json."""
    return {
        "classes": list(division.classes),
        "counts": division.counts.tolist(),
        "clients": [
            {name: ids.tolist() for name, ids in client.parts().items()}
            for client in division.clients
        ],
        "dropped": division.dropped,
        "corpus": division.corpus,
    }


def read_partition(path: Path, digest: str | None = None) -> Partition:
    """Read partition.json.

    Parameters
    ----------
    path
        The file.
    digest
        Digest of the :class:`~fedamole.stages.ScenarioStage` it must come from; None accepts all.

    Raises
    ------
    FedamoleError
        If it is missing, broken, foreign or of another config.
    """
    _, content = read_record(path, "partition", digest)
    try:
        return Partition(
            tuple(content["classes"]),
            np.array(content["counts"], dtype=np.int64),
            tuple(
                ClientSplit(**{name: np.array(ids, np.int64) for name, ids in client.items()})
                for client in content["clients"]
            ),
            content["dropped"],
            content["corpus"],
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise FedamoleError(f"{path}: is not a whole partition record ({error!r})") from error


def check_corpus(division: Partition, corpus: Corpus, name: str) -> None:
    """Refuse example ids that belong to other data.

    Raises
    ------
    FedamoleError
        If the data changed after the partition was made.
    """
    if division.corpus != corpus.digest:
        raise FedamoleError(
            f"data set {name}: has changed since it was partitioned (digest {corpus.digest[:12]}, "
            f"then {division.corpus[:12]}); make the partition again"
        )
