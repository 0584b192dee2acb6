"""A map of the clients in two dimensions: who is alike in the eyes of the experts (torch-free).

The routing logit of expert e for client k is <mean embedding of e, embedding of k> / sqrt(R). The
server scores by its softmax over the clients, whose logarithm differs from the logit by a number of
the expert alone. Centring over the clients takes it out, so the principal components of the
logarithms of the scores are those of the logits.
"""

# M = modules, E = domain experts of one module, K = clients, S = clients with scores
from dataclasses import dataclass

import numpy as np

SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
DIGITS = 6


@dataclass(frozen=True)
class RoutingMap:
    """Where the clients lie.

    Attributes
    ----------
    places
        One [x, y] per client, in units of the logits; None for a client without scores.
    shares
        Share of the variance along x and y, in [0, 1].
    """

    places: list[list[float] | None]
    shares: list[float]


def map_clients(scores_MEK: np.ndarray) -> RoutingMap | None:
    """Project the clients onto the first two principal components of their routing logits.

    Parameters
    ----------
    scores_MEK
        (M, E, K) scores, a softmax over the clients that take part; zero for all others. A score
        that is zero in float32 counts as the smallest positive number.

    Returns
    -------
    RoutingMap or None
        None if no client has a score. Sign of an axis: the first client beside its origin lies on
        the positive side, a rule that rounding cannot upset as it can that of the largest loading.
        Numbers have so few digits that the last bits of the decomposition do not show.
    """
    scored_K = np.asarray(scores_MEK.any(axis=(0, 1)))
    if not scored_K.any():
        return None
    scores_SX = scores_MEK[:, :, scored_K].reshape(-1, scored_K.sum()).T.astype(np.float64)
    places_S2, shares = _components(np.log(np.maximum(scores_SX, SMALLEST)))
    places = iter(places_S2.tolist())
    return RoutingMap([next(places) if scored else None for scored in scored_K], shares)


def _components(values_SX: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """First two principal components (S, 2), and the share of variance of each."""
    centred_SX = values_SX - values_SX.mean(axis=0)
    left_SC, sizes_C, _ = np.linalg.svd(centred_SX, full_matrices=False)
    # Scores are float32: what varies less than they resolve is no direction.
    sizes_C[sizes_C <= np.finfo(np.float32).eps * np.sqrt(centred_SX.size)] = 0
    total = float((sizes_C**2).sum()) or 1.0
    places_S2, shares = np.zeros((len(values_SX), 2)), [0.0, 0.0]
    for axis, size in enumerate(sizes_C[:2]):
        places_S2[:, axis] = _rounded(_signed(left_SC[:, axis] * size))
        shares[axis] = round(float(size**2) / total, DIGITS)
    return places_S2, shares


def _signed(places_S: np.ndarray) -> np.ndarray:
    """Turn an axis so that the first client that is not at its origin has a positive place."""
    beside_S = np.abs(places_S) > 10.0**-DIGITS * np.abs(places_S).max()
    return places_S * (np.sign(places_S[beside_S.argmax()]) or 1.0)


def _rounded(places_S: np.ndarray) -> np.ndarray:
    """Round an axis to as many digits as its largest number may have; no negative zeros."""
    largest = float(np.abs(places_S).max())
    decimals = DIGITS - 1 - int(np.floor(np.log10(largest))) if largest else 0
    return np.round(places_S, decimals) + 0.0
