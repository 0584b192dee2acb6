"""AdaFusion: two adapters become one, by weights found without gradients (arXiv:2406.07925).

FDLoRA takes the search over from LoraHub (Huang et al. 2023, arXiv:2307.13269).
"""

import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fedamole.pools import ClientState
from fedamole.randomness import derive_seed
from fedamole.settings import FdloraSettings

# Warnings of SciPy's COBYLA, which does the search: nevergrad asks it for an exactness of 0, and
# for fewer points than make a simplex where the budget is so small.
HARMLESS = "COBYLA: Invalid (RHOEND|MAXFUN)"


def fused(states: tuple[ClientState, ClientState], weights: np.ndarray) -> ClientState:
    """Add two LoRAs tensor by tensor: A = w1 A1 + w2 A2 and B = w1 B1 + w2 B2.

    The update of the backbone is then B A, with cross terms, and quadratic in the weights.

    Parameters
    ----------
    states
        LoRAs of the same modules and rank, without domain experts.
    weights
        (2,) one for each.
    """
    first, second = states
    one, two = (np.float32(weight) for weight in weights)
    return ClientState(
        {
            name: replace(
                group,
                shared={
                    key: one * array + two * second.groups[name].shared[key]
                    for key, array in group.shared.items()
                },
            )
            for name, group in first.groups.items()
        }
    )


def find_weights(
    loss_at: Callable[[np.ndarray], float], settings: FdloraSettings, seed: int, *names: str | int
) -> np.ndarray:
    """Minimise loss + penalty * mean |w| over two weights within the bounds, starting from 0.

    With a small budget the best that was tried may be the start: no adapter at all.

    Parameters
    ----------
    loss_at
        Loss of the adapter that weights (2,) make; asked ``fusion_budget`` times.
    settings
        Budget, bounds and penalty.
    seed, names
        Stream of the search's draws; see :func:`fedamole.randomness.stream`.

    Returns
    -------
    numpy.ndarray
        (2,) float64: the best weights that were tried, or what the search makes of all it tried.
    """
    import nevergrad

    bound = settings.fusion_bound
    space = nevergrad.p.Array(init=[0.0, 0.0], lower=[-bound] * 2, upper=[bound] * 2)
    space.random_state = np.random.RandomState(derive_seed(seed, *names) % 2**32)
    search = nevergrad.optimizers.NGOpt(space, budget=settings.fusion_budget)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", HARMLESS, UserWarning)
            for _ in range(settings.fusion_budget):
                tried = search.ask()
                penalty = settings.fusion_penalty * np.abs(tried.value).mean()
                search.tell(tried, loss_at(tried.value) + penalty)
            weights: np.ndarray = search.provide_recommendation().value
            return weights
    finally:
        # The search waits in a thread of its own, which ends with it. The traceback of an error
        # would keep both, and the process could never exit.
        del search
