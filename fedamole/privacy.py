"""Noise on the mean embeddings that a client uploads: the d_chi mechanism (torch-free).

A mechanism M is d_chi-private if for all embeddings x, y and all outputs z the densities obey
M(x)(z) <= exp(eta * |x - y|) * M(y)(z), with the Euclidean length: metric differential privacy
(Chatzikokolakis et al. 2013; Feyisetan et al. 2020, arXiv:1910.08902). See docs/privacy.md.
"""

# M = modules, N = expert rows of a group, R = rank

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedamole.pools import ClientState, group_slices
from fedamole.randomness import stream
from fedamole.settings import EmbeddingPrivacy

if TYPE_CHECKING:
    from fedamole.embeddings import Embedded


def perturb(
    embeddings_NR: np.ndarray, settings: EmbeddingPrivacy, rng: np.random.Generator
) -> np.ndarray:
    """Add independent noise to each row.

    Parameters
    ----------
    embeddings_NR
        The clean vectors.
    settings
        Mechanism and eta.
    rng
        Draws the noise.

    Returns
    -------
    numpy.ndarray
        (N, R) float32.
    """
    clean_NR = embeddings_NR.astype(np.float64)
    mechanism = _exact if settings.mechanism == "dchi" else _as_in_the_paper
    noisy_NR: np.ndarray = mechanism(clean_NR, settings.eta, rng)
    return noisy_NR.astype(np.float32)


def _exact(clean_NR: np.ndarray, eta: float, rng: np.random.Generator) -> np.ndarray:
    """Add vectors of density proportional to exp(-eta * length).

    In polar coordinates the density of the length t is proportional to t^(R-1) exp(-eta t): a Gamma
    of shape R and scale 1 / eta, and the direction is uniform (Wu et al. 2017, arXiv:1606.04722).
    """
    rows, rank = clean_NR.shape
    directions_NR = rng.standard_normal((rows, rank))
    directions_NR /= np.linalg.norm(directions_NR, axis=1, keepdims=True)
    lengths_N1: np.ndarray = rng.gamma(shape=rank, scale=1 / eta, size=(rows, 1))
    return clean_NR + lengths_N1 * directions_NR


def _as_in_the_paper(clean_NR: np.ndarray, eta: float, rng: np.random.Generator) -> np.ndarray:
    """Add what the authors of FedAMoLE add: a Gamma times a uniform sign-scale, per coordinate.

    The sum is shortened to the length of the clean vector where it is longer. That length is
    thereby revealed, and the density is not that of the d_chi mechanism: no guarantee follows.
    """
    lengths_NR: np.ndarray = rng.gamma(shape=clean_NR.shape[1], scale=1 / eta, size=clean_NR.shape)
    noisy_NR = clean_NR + lengths_NR * rng.uniform(-1.0, 1.0, size=clean_NR.shape)
    allowed_N1 = np.linalg.norm(clean_NR, axis=1, keepdims=True)
    found_N1 = np.linalg.norm(noisy_NR, axis=1, keepdims=True)
    factors_N1 = np.ones_like(found_N1)
    np.divide(allowed_N1, found_N1, out=factors_N1, where=found_N1 > allowed_N1)
    return noisy_NR * factors_N1


def perturb_embedded(
    embedded: "Embedded",
    state: ClientState,
    settings: EmbeddingPrivacy,
    seed: int,
    round_: int,
    client: int,
) -> "Embedded":
    """Add noise to all that a client uploads of its embeddings.

    The noise of a vector follows from its name alone, (round, client, module, expert): it is the
    same whatever else the client holds.

    Parameters
    ----------
    embedded
        The clean embeddings.
    state
        Names the modules and experts of their rows.
    settings
        Mechanism and eta.
    seed
        Root seed.
    round_, client
        Whose, and after the training of which round.
    """
    names = (seed, "privacy", round_, client)
    client_MR, experts = np.empty_like(embedded.client_MR), {}
    for name, part in group_slices(state.groups).items():
        group, clean_NR = state.groups[name], embedded.experts[name]
        for index, module in enumerate(group.modules, start=part.start):
            rng = stream(*names, module, "client")
            client_MR[index] = perturb(embedded.client_MR[index : index + 1], settings, rng)[0]
        noisy_NR = np.empty_like(clean_NR)
        for row, (index, expert) in enumerate(zip(group.module_N, group.expert_N, strict=True)):
            rng = stream(*names, group.modules[index], "expert", int(expert))
            noisy_NR[row] = perturb(clean_NR[row : row + 1], settings, rng)[0]
        experts[name] = noisy_NR
    return replace(embedded, client_MR=client_MR, experts=experts)
