"""Epsilon against closed forms and another library."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from fedamole.accounting import LARGEST_COMPOSED, epsilon, epsilon_after
from fedamole.config import load_config
from fedamole.config_files import read_yaml
from fedamole.errors import FedamoleError
from fedamole.settings import DpSgdSettings
from fedamole.stages import RunStage, run_stage

CHECKOUT = Path(__file__).parents[2]

# What the numerical composition adds to the exact epsilon, in epsilon and by its error in delta.
PRV_ERROR = 0.0115


def dp_sgd(sigma: float, accountant: str = "prv", delta: float = 1e-5) -> DpSgdSettings:
    return DpSgdSettings(
        noise_multiplier=sigma, max_grad_norm=1.0, delta=delta, accountant=accountant
    )


@pytest.mark.parametrize(
    ("batch_size", "num_examples", "sigma", "steps", "renyi", "composed"),
    [
        # The MNIST example of TensorFlow Privacy: 60 epochs in batches of 256.
        (256, 60_000, 1.1, 14_062, 2.5966, 2.3817),
        # Thirty rounds of 200 steps at batch size 1, the sizes of the paper.
        (1, 500, 1.0, 6000, 1.0566, 0.7769),
        (1, 500, 0.5, 6000, 8.7485, 7.3484),
        (4, 500, 0.7, 6000, 9.3237, 8.4035),
        (1, 5, 0.8, 10, 8.6107, 7.4662),
    ],
)
def test_epsilon_agrees_with_googles_library(
    batch_size: int, num_examples: int, sigma: float, steps: int, renyi: float, composed: float
) -> None:
    """Numbers of dp-accounting 0.6.0: RdpAccountant; PLDAccountant, both kinds of neighbours."""
    sizes = (batch_size, num_examples, steps)
    assert epsilon(dp_sgd(sigma, "rdp"), *sizes) == pytest.approx(renyi, rel=0.01)
    assert composed - 1e-4 <= epsilon(dp_sgd(sigma), *sizes) <= composed + PRV_ERROR


def gauss_delta(mu: float, eps: float) -> float:
    """Delta of a Gaussian mechanism of sensitivity mu and deviation 1 (Balle and Wang 2018)."""
    norm = stats.norm
    return float(norm.cdf(mu / 2 - eps / mu) - np.exp(eps) * norm.cdf(-mu / 2 - eps / mu))


@pytest.mark.parametrize(("sigma", "steps"), [(10.0, 100), (3.0, 1), (1.0, 2), (40.0, 900)])
def test_without_sampling_epsilon_is_that_of_the_gaussian_mechanism(
    sigma: float, steps: int
) -> None:
    mu = np.sqrt(steps) / sigma
    exact = optimize.brentq(lambda eps: gauss_delta(mu, eps) - 1e-5, 0, 100)
    # Batches larger than the data take every example in every step.
    assert exact <= epsilon(dp_sgd(sigma), 64, 50, steps) <= exact + PRV_ERROR
    order_free = mu**2 / 2 + mu * np.sqrt(2 * np.log(1e5))  # The classical conversion of Renyi DP.
    assert exact <= epsilon(dp_sgd(sigma, "rdp"), 64, 50, steps) <= order_free


def sampled_delta(rate: float, sigma: float, eps: float) -> float:
    """Delta of one sampled step, in closed form: the larger one of removing and adding an example.

    The mixture (1 - q) N(0, s^2) + q N(1, s^2) against N(0, s^2): the ratio of the densities is
    1 - q + q exp((2 x - 1) / (2 s^2)), which grows with x.
    """
    null, shifted = stats.norm(0, sigma), stats.norm(1, sigma)

    def border(ratio: float) -> float:
        grown = (ratio - 1 + rate) / rate
        return sigma**2 * np.log(grown) + 0.5 if grown > 0 else -np.inf

    at = border(np.exp(eps))
    remove = (1 - rate) * null.sf(at) + rate * shifted.sf(at) - np.exp(eps) * null.sf(at)
    at = border(np.exp(-eps))
    add = null.cdf(at) - np.exp(eps) * ((1 - rate) * null.cdf(at) + rate * shifted.cdf(at))
    return float(max(remove, add))


@pytest.mark.parametrize(("num_examples", "sigma"), [(3, 0.7), (10, 0.5), (2, 1.5)])
def test_one_sampled_step_agrees_with_the_closed_form(num_examples: int, sigma: float) -> None:
    rate = 1 / num_examples
    exact = optimize.brentq(lambda eps: sampled_delta(rate, sigma, eps) - 1e-5, 0, 50)
    assert exact <= epsilon(dp_sgd(sigma), 1, num_examples, 1) <= exact + PRV_ERROR
    assert exact <= epsilon(dp_sgd(sigma, "rdp"), 1, num_examples, 1)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_epsilon_grows_with_what_is_seen_and_falls_with_the_noise(accountant: str) -> None:
    def by(sigma: float = 1.0, batch: int = 2, n: int = 300, steps: int = 400) -> float:
        return epsilon(dp_sgd(sigma, accountant), batch, n, steps)

    assert by(sigma=2.0) < by(sigma=1.0) < by(sigma=0.7)
    assert by(steps=200) < by(steps=400) < by(steps=800)
    assert by(n=600) < by(n=300) < by(n=100)
    assert by(batch=1) < by(batch=2) < by(batch=4)
    assert by(steps=0) == 0


def test_the_default_is_never_above_the_renyi_bound() -> None:
    for sigma in (0.6, 1.0, 20.0, 100.0):
        assert epsilon(dp_sgd(sigma), 1, 500, 600) <= epsilon(dp_sgd(sigma, "rdp"), 1, 500, 600)


def test_hardly_any_noise_gives_a_large_number_at_once() -> None:
    """The numerical composition alone would take a minute and give infinity."""
    assert LARGEST_COMPOSED < epsilon(dp_sgd(1.0), 1, 2, 6000) < np.inf


def test_epsilon_has_four_decimals() -> None:
    found = epsilon(dp_sgd(1.0), 1, 500, 6000)
    assert found == round(found, 4)


def test_delta_must_be_below_one_over_the_examples() -> None:
    assert epsilon(dp_sgd(1.0, delta=1e-3), 1, 999, 10) > 0
    with pytest.raises(FedamoleError, match=r"delta 0.001 must be below 1 / training .* 1 / 1000"):
        epsilon(dp_sgd(1.0, delta=1e-3), 1, 1000, 10)


def run(name: str = "fedit", **sections: Any) -> RunStage:
    raw = read_yaml(CHECKOUT / "configs/smoke.yaml") | sections
    config = load_config(raw, CHECKOUT / "configs")
    return run_stage(config, next(iter(config.scenario_seeds())), name)


def test_a_client_spends_only_in_the_rounds_in_which_it_takes_part() -> None:
    stage = run(
        privacy={"dp_sgd": dp_sgd(1.0).model_dump()},
        participation={"fraction": 0.5},
        methods=["fedit"],
    )
    settings, batch = stage.privacy.dp_sgd, stage.training.batch_size
    assert settings is not None and stage.training.steps == 3
    for client in range(3):
        taken = 0
        for round_ in range(1, 8):
            taken += client in stage.population.reporting(round_)
            expected = epsilon(settings, batch, 120, 3 * taken)
            assert epsilon_after(stage, client, round_, 120) == expected
        assert 0 < taken < 7
    assert epsilon_after(stage, client=0, round_=0, num_examples=120) == 0


def test_without_dp_sgd_there_is_no_epsilon() -> None:
    assert epsilon_after(run(), client=0, round_=3, num_examples=120) is None


def test_a_client_with_too_many_examples_for_delta_is_named() -> None:
    stage = run(privacy={"dp_sgd": dp_sgd(1.0, delta=0.05).model_dump()})
    message = "fedit round 2 client 1: privacy: dp_sgd: delta 0.05 must be below 1 / training"
    with pytest.raises(FedamoleError, match=message):
        epsilon_after(stage, client=1, round_=2, num_examples=120)
