"""How good, how stable and how even the assignments of a run are: the numbers of the table of them.

All are of one run and free of labels. The client k of another seed has other data, and the expert e
other first values, so no holder of one seed can be compared with a holder of another: how stable an
assignment is over seeds shows in the spread of these numbers.

Round 1 does not count: its scores are random for every strategy.
"""

# M = modules, E = domain experts of one module, K = clients, C = classes,
# X = experts of all modules, N = holders of all experts
import math
from collections.abc import Sequence
from itertools import chain
from statistics import correlation

import numpy as np

from fedamole.records import AssignmentRecord, PartitionRecord
from fedamole.results import Run

FIRST_ROUND = 2
# What differs by less is equal but for rounding.
SAME = 1e-12


def measure(run: Run) -> dict[str, float]:
    """All measures of a run by name; not a number where there is none, as after a single round."""
    records = [run.assignments[t] for t in sorted(run.assignments) if t >= FIRST_ROUND]
    rounds = [holders(record, run.info.clients) for record in records]
    loads = [held_MEK.sum(axis=1)[:, take_part(held_MEK)] for held_MEK in rounds]
    return {
        "quality": quality(records),
        "above_chance": above_chance(records),
        "stability": stability(rounds),
        "follows_data": follows_data(rounds, run.partition),
        "fewest_experts": _mean([low for load_MK in loads for low in load_MK.min(axis=1)]),
        "most_experts": _mean([high for load_MK in loads for high in load_MK.max(axis=1)]),
        "without_holder": _mean(
            [count for held_MEK in rounds for count in (~held_MEK.any(axis=2)).sum(axis=1)]
        ),
    }


def holders(record: AssignmentRecord, clients: int) -> np.ndarray:
    """Who holds what, (M, E, K) bool."""
    lists = list(chain.from_iterable(record.holders))
    held_XK = np.zeros((len(lists), clients), dtype=bool)
    expert_N = np.repeat(np.arange(len(lists)), [len(held) for held in lists])
    held_XK[expert_N, list(chain.from_iterable(lists))] = True
    return held_XK.reshape(len(record.modules), record.num_experts, clients)


def take_part(held_MEK: np.ndarray) -> np.ndarray:
    """Tell which clients take part, (K,) bool: no strategy leaves one of them without experts."""
    return np.asarray(held_MEK.any(axis=(0, 1)))


def quality(records: Sequence[AssignmentRecord]) -> float:
    """Sum of the scores of the held experts over the largest that the capacities allow.

    Mean over rounds and modules. Scores are those of RSEA, whatever the strategy went by. RSEA has
    1; more is possible where clients choose, since then an expert may have any number of clients.
    """
    ratios = [
        value / best
        for record in records
        for value, best in zip(record.objective, record.optimum or [], strict=False)
        if value is not None and best
    ]
    return _mean(ratios)


def above_chance(records: Sequence[AssignmentRecord]) -> float:
    """How far the sum of scores lies from what chance gives (0) to the optimum (1).

    The scores of small models hardly differ between clients, so that any assignment comes close to
    the optimum; this share tells the strategies apart. Sums run over rounds and modules. Not a
    number where all scores are alike.
    """
    sums = [
        (value - chance, best - chance)
        for record in records
        for value, best, chance in zip(
            record.objective, record.optimum or [], record.chance or [], strict=False
        )
        if value is not None
    ]
    reached = math.fsum(above for above, _ in sums)
    possible = math.fsum(most for _, most in sums)
    return reached / possible if possible > SAME else math.nan


def stability(rounds: Sequence[np.ndarray]) -> float:
    """Share of experts that a client keeps: those held in both of two rounds, of those in either.

    Mean over clients, modules and pairs of consecutive rounds (Jaccard index). Where clients are
    sampled, a client's consecutive rounds are those it takes part in.

    Parameters
    ----------
    rounds
        Who holds what, (M, E, K) bool each.
    """
    shares: list[float] = []
    for kept in kept_by_round(rounds):
        shares += kept
    return _mean(shares)


def kept_by_round(rounds: Sequence[np.ndarray]) -> list[list[float]]:
    """Share of experts that a client keeps, for each round, client and module.

    Parameters
    ----------
    rounds
        Who holds what, (M, E, K) bool each.

    Returns
    -------
    list[list[float]]
        One list per round: a number for each module and each client that takes part and took part
        before, compared with the last round in which it did. Empty for the first round.
    """
    shares: list[list[float]] = []
    last_MEK = np.zeros_like(rounds[0]) if rounds else np.zeros(0)
    for held_MEK in rounds:
        again_K = take_part(last_MEK) & take_part(held_MEK)
        both_MK = (last_MEK & held_MEK).sum(axis=1)[:, again_K]
        either_MK = (last_MEK | held_MEK).sum(axis=1)[:, again_K]
        shares.append((both_MK[either_MK > 0] / either_MK[either_MK > 0]).tolist())
        last_MEK = np.where(take_part(held_MEK), held_MEK, last_MEK)
    return shares


def follows_data(rounds: Sequence[np.ndarray], partition: PartitionRecord) -> float:
    """Correlation, over pairs of clients, of the experts in common with the likeness of the data.

    Experts in common: those that both hold, of those that either holds, summed over modules; mean
    over the rounds in which both take part. Likeness: what the class shares of two clients have in
    common, sum of the smaller ones. Pearson's r in [-1, 1]; about 0 by chance. Not a number where
    all pairs are alike, or if there are fewer than two pairs.

    Parameters
    ----------
    rounds
        Who holds what, (M, E, K) bool each.
    partition
        How many examples of each class each client has.
    """
    shares_KC = np.array(partition.counts, dtype=np.float64)
    shares_KC /= np.maximum(shares_KC.sum(axis=1, keepdims=True), 1)
    clients = len(shares_KC)
    common_KK, rounds_KK = np.zeros((clients, clients)), np.zeros((clients, clients))
    for held_MEK in rounds:
        rounds_KK += np.outer(take_part(held_MEK), take_part(held_MEK))
        common_KK += _experts_in_common(held_MEK)
    pairs = [(k, other) for k in range(clients) for other in range(k) if rounds_KK[k, other]]
    common = [float(common_KK[pair] / rounds_KK[pair]) for pair in pairs]
    alike = [math.fsum(np.minimum(shares_KC[k], shares_KC[other])) for k, other in pairs]
    if not pairs or min(np.ptp(common), np.ptp(alike)) < SAME:
        return math.nan
    return correlation(common, alike)


def _experts_in_common(held_MEK: np.ndarray) -> np.ndarray:
    """Jaccard index of the experts of two clients over all modules, (K, K); 0 without experts."""
    held_KX = held_MEK.reshape(-1, held_MEK.shape[2]).T.astype(np.float64)
    # Sums of ones: exact in any order, so on any number of threads.
    both_KK, load_K = held_KX @ held_KX.T, held_KX.sum(axis=1)
    either_KK = load_K[:, None] + load_K - both_KK
    return np.asarray(both_KK / np.maximum(either_KK, 1))


def _mean(values: Sequence[float]) -> float:
    """Mean; not a number if there is nothing to average."""
    return math.fsum(values) / len(values) if values else math.nan
