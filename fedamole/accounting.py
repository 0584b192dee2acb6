"""Epsilon of a client that trained by DP-SGD: the Poisson-subsampled Gaussian mechanism, composed.

Two data sets are neighbours if one has one example more. opacus does the numbers; importing it
takes torch with it, so that is left to the functions.
"""

import math
import warnings
from functools import cache

from fedamole.errors import FedamoleError
from fedamole.settings import DpSgdSettings
from fedamole.stages import RunStage

# Beyond the orders that opacus looks at by itself: best where the noise is large.
LARGE_ORDERS = [72, 96, 128, 256, 512, 1024]
# The numerical composition takes minutes and gigabytes where it would give a meaningless number.
LARGEST_COMPOSED = 50.0
DECIMALS = 4


def sample_rate(batch_size: int, num_examples: int) -> float:
    """Probability with which an example takes part in a step: batch_size / n, at most 1."""
    return min(1.0, batch_size / num_examples)


def epsilon(settings: DpSgdSettings, batch_size: int, num_examples: int, steps: int) -> float:
    """Bound what the trained tensors reveal of one example after all steps so far.

    Parameters
    ----------
    settings
        Noise, delta, accountant.
    batch_size
        Expected examples per step.
    num_examples
        Training examples of the client.
    steps
        Optimizer steps of all rounds in which it took part, including this one.

    Returns
    -------
    float
        Epsilon at ``settings.delta``, rounded up to four decimals.

    Raises
    ------
    FedamoleError
        If delta is not below 1 / num_examples: publishing one example would then count as private.
    """
    if not settings.covers(num_examples):
        raise FedamoleError(
            f"privacy: dp_sgd: delta {settings.delta} must be below 1 / training examples = "
            f"1 / {num_examples}"
        )
    if not steps:
        return 0.0
    rate = sample_rate(batch_size, num_examples)
    bound = _epsilon(settings, rate, steps)
    # Up, and to few decimals: the last bits of a Fourier transform differ between machines.
    return math.ceil(bound * 10**DECIMALS) / 10**DECIMALS


def epsilon_after(run: RunStage, client: int, round_: int, num_examples: int) -> float | None:
    """Epsilon of a client after a round, over all rounds in which it took part so far.

    Parameters
    ----------
    run
        Privacy, batch size, and who takes part.
    client
        Index of the client; where data are pooled, client 0 trains on those of all.
    round_
        Round, from 1; nothing is spent before.
    num_examples
        Training examples of the client.

    Returns
    -------
    float or None
        See :func:`epsilon`; None if the run trains without differential privacy.

    Raises
    ------
    FedamoleError
        If delta is too large for the client.
    """
    if run.privacy.dp_sgd is None:
        return None
    trained = 0 if run.population.pooled else client
    rounds = sum(trained in run.population.reporting(t) for t in range(1, round_ + 1))
    sizes = (run.training.batch_size, num_examples, rounds * run.steps_of(client, num_examples))
    try:
        return epsilon(run.privacy.dp_sgd, *sizes)
    except FedamoleError as error:
        raise FedamoleError(f"{run.label} round {round_} client {client}: {error}") from error


@cache
def _epsilon(settings: DpSgdSettings, rate: float, steps: int) -> float:
    """The smaller one of the bounds that the accountant gives."""
    from opacus.accountants import PRVAccountant, RDPAccountant

    renyi, composed = RDPAccountant(), PRVAccountant()
    renyi.history = composed.history = [(settings.noise_multiplier, rate, steps)]
    orders = [*RDPAccountant.DEFAULT_ALPHAS, *LARGE_ORDERS]
    with warnings.catch_warnings():
        # The bound holds at every order, also at the ends of the list; log(0) stands for rate 1.
        warnings.simplefilter("ignore")
        bound = renyi.get_epsilon(settings.delta, alphas=orders)
        if settings.accountant == "prv" and bound <= LARGEST_COMPOSED:
            bound = min(bound, float(composed.get_epsilon(settings.delta)))
    return max(0.0, bound)
