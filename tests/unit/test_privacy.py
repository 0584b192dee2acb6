"""The noise on embeddings has the law that the guarantee needs, vector by vector."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedamole.config import load_config, parse
from fedamole.config_files import read_yaml
from fedamole.embeddings import Embedded
from fedamole.errors import FedamoleError
from fedamole.pools import ClientGroup, ClientState
from fedamole.privacy import perturb, perturb_embedded
from fedamole.settings import (
    AggregationSettings,
    DpSgdSettings,
    EmbeddingPrivacy,
    PrivacySettings,
    TrainingSettings,
)
from fedamole.stages import canonical_json, run_stage

CHECKOUT = Path(__file__).parents[2]

# Seeds are fixed, so a test that passes once always does; the thresholds leave room for any seed.
ACCEPT, REJECT = 1e-6, 1e-12
DRAWS = 20_000


def dchi(eta: float) -> EmbeddingPrivacy:
    return EmbeddingPrivacy(eta=eta)


def paper(eta: float) -> EmbeddingPrivacy:
    return EmbeddingPrivacy(mechanism="paper", eta=eta)


def noise(rank: int, eta: float, draws: int = DRAWS) -> np.ndarray:
    clean_NR = np.zeros((draws, rank), dtype=np.float32)
    return perturb(clean_NR, dchi(eta), np.random.default_rng(rank)).astype(np.float64)


def length_p_value(noise_NR: np.ndarray, eta: float) -> float:
    """Kolmogorov-Smirnov: is the length Gamma(rank, 1 / eta)?"""
    law = stats.gamma(a=noise_NR.shape[1], scale=1 / eta)
    return float(stats.kstest(np.linalg.norm(noise_NR, axis=1), law.cdf).pvalue)


def direction_p_value(noise_NR: np.ndarray) -> float:
    """Kolmogorov-Smirnov: a coordinate u of a uniform direction has (u + 1) / 2 ~ Beta."""
    rank = noise_NR.shape[1]
    axes = np.random.default_rng(7).standard_normal((4, rank))
    axes = np.concatenate([np.eye(rank), axes / np.linalg.norm(axes, axis=1, keepdims=True)])
    directions = noise_NR / np.linalg.norm(noise_NR, axis=1, keepdims=True)
    law = stats.beta((rank - 1) / 2, (rank - 1) / 2)
    return min(float(stats.kstest((directions @ axis + 1) / 2, law.cdf).pvalue) for axis in axes)


def independence_p_value(noise_NR: np.ndarray) -> float:
    """Spearman: has the length to do with how far the direction lies between the axes?"""
    lengths = np.linalg.norm(noise_NR, axis=1)
    spread = np.abs(noise_NR / lengths[:, None]).sum(1)
    return float(stats.spearmanr(lengths, spread).pvalue)


@pytest.mark.parametrize(("rank", "eta"), [(8, 1.0), (8, 50.0), (4, 100.0), (2, 0.3), (64, 1.0)])
def test_length_is_gamma_and_direction_uniform_and_independent(rank: int, eta: float) -> None:
    noise_NR = noise(rank, eta)
    assert length_p_value(noise_NR, eta) > ACCEPT
    assert direction_p_value(noise_NR) > ACCEPT
    assert independence_p_value(noise_NR) > ACCEPT
    directions = noise_NR / np.linalg.norm(noise_NR, axis=1, keepdims=True)
    # A coordinate of a direction has mean 0 and variance 1 / rank; a product has less.
    assert np.abs(directions.mean(0)).max() < 6 / np.sqrt(rank * DRAWS)
    covariance = directions.T @ directions / DRAWS
    assert np.abs(covariance - np.eye(rank) / rank).max() < 6 / np.sqrt(rank * DRAWS)


def wrong_laws(rank: int, eta: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    normal_NR = rng.standard_normal((DRAWS, rank))
    directions_NR = normal_NR / np.linalg.norm(normal_NR, axis=1, keepdims=True)
    signs_NR = rng.uniform(-1, 1, (DRAWS, rank))
    signs_NR /= np.linalg.norm(signs_NR, axis=1, keepdims=True)
    lengths_N1 = rng.gamma(rank, 1 / eta, (DRAWS, 1))
    return {
        "exponential length": rng.gamma(1, 1 / eta, (DRAWS, 1)) * directions_NR,
        "scale eta": rng.gamma(rank, eta, (DRAWS, 1)) * directions_NR,
        "one dimension less": rng.gamma(rank - 1, 1 / eta, (DRAWS, 1)) * directions_NR,
        "Laplace per coordinate": rng.laplace(scale=1 / eta, size=(DRAWS, rank)),
        "Gauss of equal variance": normal_NR * np.sqrt((rank + 1) / eta**2),
        "direction from a cube": lengths_N1 * signs_NR,
        "Gamma and sign-scale per coordinate": rng.gamma(rank, 1 / eta, (DRAWS, rank))
        * rng.uniform(-1, 1, (DRAWS, rank)),
        "half of the space": lengths_N1 * np.abs(directions_NR),
    }


@pytest.mark.parametrize("name", wrong_laws(8, 3.0))
def test_the_tests_reject_other_laws(name: str) -> None:
    wrong_NR = wrong_laws(8, 3.0)[name]
    assert min(length_p_value(wrong_NR, 3.0), direction_p_value(wrong_NR)) < REJECT


def test_the_test_of_independence_rejects_laplace_per_coordinate() -> None:
    assert independence_p_value(wrong_laws(8, 3.0)["Laplace per coordinate"]) < REJECT


# The inequality itself, in the plane: cells of a grid, from two embeddings a distance apart.
CLEAN = np.array([[0.0, 0.0], [0.8, 0.0]])
GRID = [np.linspace(-1.9, 2.7, 24), np.linspace(-2.3, 2.3, 24)]


def cell_counts(outputs_NR: np.ndarray) -> np.ndarray:
    return np.histogram2d(outputs_NR[:, 0], outputs_NR[:, 1], bins=GRID)[0]


def excess(first: np.ndarray, second: np.ndarray, factor: float) -> float:
    """Largest violation of first <= factor * second over the cells, in standard deviations."""
    deviation = np.sqrt(first + factor**2 * second + 1)
    return float(((first - factor * second) / deviation).max())


def outputs(settings: EmbeddingPrivacy, draws: int = 400_000) -> list[np.ndarray]:
    return [
        cell_counts(
            perturb(np.tile(clean, (draws, 1)), settings, np.random.default_rng([11, index]))
        )
        for index, clean in enumerate(CLEAN)
    ]


def test_no_output_is_likelier_by_more_than_the_metric_allows() -> None:
    eta, distance = 1.5, 0.8
    first, second = outputs(dchi(eta))
    factor = np.exp(eta * distance)
    assert excess(first, second, factor) < 6
    assert excess(second, first, factor) < 6
    # The bound is tight: behind the first embedding, seen from the second, it is attained.
    row = np.searchsorted(GRID[1], 0.0) - 1
    behind = (slice(0, 6), slice(row, row + 1))
    assert first[behind].sum() / second[behind].sum() == pytest.approx(factor, rel=0.05)
    # With less noise than eta asks for the same counts would not do.
    assert excess(first, second, np.exp(eta * distance / 2)) > 12


def test_the_papers_mechanism_breaks_the_inequality() -> None:
    eta, distance = 1.5, 0.8
    first, second = outputs(paper(eta))
    # An embedding of length 0 stays where it is: its length is revealed.
    assert excess(first, second, np.exp(eta * distance)) > 100


@pytest.mark.parametrize("eta", [0.5, 5.0, 500.0])
def test_the_papers_mechanism_never_lengthens_a_vector(eta: float) -> None:
    rng = np.random.default_rng(3)
    clean_NR = rng.standard_normal((2000, 8)).astype(np.float32)
    noisy_NR = perturb(clean_NR, paper(eta), rng)
    clean_N, noisy_N = (np.linalg.norm(x_NR, axis=1) for x_NR in (clean_NR, noisy_NR))
    assert (noisy_N <= clean_N * (1 + 1e-6)).all()
    # Where the noise is far longer than the vector, nothing but its length is left of it.
    assert np.isclose(noisy_N, clean_N, rtol=1e-5).mean() > (0.99 if eta < 1 else 0.1)
    assert not np.isclose(noisy_NR, clean_NR, rtol=1e-5).all(1).any()


def test_the_papers_noise_is_a_gamma_times_a_uniform_number() -> None:
    rank, eta = 8, 2.0
    clean_NR = np.zeros((DRAWS, rank), dtype=np.float32)
    # So long that the clipping moves the other coordinates by less than a millionth.
    clean_NR[:, 0] = 1e8
    noise_N = perturb(clean_NR, paper(eta), np.random.default_rng(1))[:, 3].astype(np.float64)

    def cdf(t: np.ndarray) -> np.ndarray:
        """P(G U <= t) = 1/2 + sign(t) / 2 * E[min(1, |t| / G)]."""
        beyond = eta / (rank - 1) * stats.gamma(rank - 1, scale=1 / eta).sf(np.abs(t))
        share = stats.gamma(rank, scale=1 / eta).cdf(np.abs(t)) + np.abs(t) * beyond
        return 0.5 + 0.5 * np.sign(t) * share

    assert stats.kstest(noise_N, cdf).pvalue > ACCEPT


def state_and_embeddings(held: list[tuple[int, int]]) -> tuple[ClientState, Embedded]:
    """Two modules of one group, a third in another; the embeddings follow from the names."""
    modules = ("layers.0.q_proj", "layers.1.q_proj")
    module_N, expert_N = (np.array(column) for column in zip(*sorted(held), strict=True))
    groups = {
        "q_proj": ClientGroup(modules, {}, module_N, expert_N, {}),
        "v_proj": ClientGroup(("layers.0.v_proj",), {}, np.array([0]), np.array([4]), {}),
    }
    experts = {
        "q_proj": np.outer(1 + module_N + 10 * expert_N, np.ones(4)).astype(np.float32),
        "v_proj": np.full((1, 4), 7, dtype=np.float32),
    }
    client_MR = np.outer([1, 2, 3], np.ones(4)).astype(np.float32)
    return ClientState(groups), Embedded(client_MR, experts)


def test_noise_of_a_vector_follows_from_its_name_alone() -> None:
    few, many = [(0, 5), (1, 2)], [(0, 1), (0, 5), (1, 0), (1, 2), (1, 3)]
    noisy = []
    for held in (few, many):
        state, clean = state_and_embeddings(held)
        noisy.append(perturb_embedded(clean, state, dchi(2.0), seed=1, round_=3, client=0))
    assert np.array_equal(noisy[0].client_MR, noisy[1].client_MR)
    assert np.array_equal(noisy[0].experts["v_proj"], noisy[1].experts["v_proj"])
    same = [many.index(name) for name in few]
    assert np.array_equal(noisy[0].experts["q_proj"], noisy[1].experts["q_proj"][same])


def test_every_vector_of_every_round_and_client_has_noise_of_its_own() -> None:
    state, clean = state_and_embeddings([(m, e) for m in range(2) for e in range(6)])
    noises = []
    for seed, round_, client in [(1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 2)]:
        noisy = perturb_embedded(clean, state, dchi(2.0), seed, round_, client)
        noises += [noisy.client_MR - clean.client_MR]
        noises += [noisy.experts[name] - clean.experts[name] for name in clean.experts]
        assert noisy.client_MR.dtype == noisy.experts["q_proj"].dtype == np.float32
    all_NR = np.concatenate(noises)
    assert len(all_NR) == 4 * (3 + 12 + 1)
    distances = np.linalg.norm(all_NR[:, None] - all_NR, axis=2) + np.eye(len(all_NR))
    assert distances.min() > 1e-3
    assert length_p_value(all_NR.astype(np.float64), 2.0) > ACCEPT


# Settings


def test_eta_and_the_parameters_of_dp_sgd_must_be_positive() -> None:
    with pytest.raises(FedamoleError, match="eta: 0 is not allowed"):
        parse(EmbeddingPrivacy, {"eta": 0}, "privacy")
    for wrong in ({"noise_multiplier": 0}, {"max_grad_norm": -1}, {"delta": 0.5}):
        with pytest.raises(FedamoleError, match=f"{next(iter(wrong))}: .* is not allowed"):
            parse(DpSgdSettings, {"noise_multiplier": 1, "max_grad_norm": 1, **wrong}, "privacy")


def zero(stage: int) -> dict[str, object]:
    return {"deepspeed": {"zero_optimization": {"stage": stage}}}


@pytest.mark.parametrize(
    ("training", "weighting", "message"),
    [
        (zero(3), "uniform", "zero_optimization stage 3 must be 0 to 2"),
        ({"gradient_clipping": 0.5}, "uniform", "gradient_clipping 0.5 must be 0"),
        ({"batch_size": 4, "micro_batch_size": 2}, "uniform", "micro_batch_size 2 must be left"),
        ({}, "tokens", "weighting 'tokens' must be 'uniform' or 'examples'"),
    ],
)
def test_what_cannot_go_with_dp_sgd_is_named(
    training: dict[str, object], weighting: str, message: str
) -> None:
    sections = TrainingSettings(**training), AggregationSettings(weighting=weighting)
    on = PrivacySettings(dp_sgd=DpSgdSettings(noise_multiplier=1, max_grad_norm=1))
    found = on.conflict(*sections)
    assert found and message in found
    assert PrivacySettings(embeddings=dchi(1.0)).conflict(*sections) is None
    assert on.conflict(TrainingSettings(**zero(2)), AggregationSettings()) is None


def test_a_run_keeps_the_default_of_the_privacy_that_it_does_not_use() -> None:
    privacy = {
        "embeddings": {"eta": 2.0},
        "dp_sgd": {"noise_multiplier": 1.0, "max_grad_norm": 1.0},
    }
    raw = read_yaml(CHECKOUT / "configs/smoke.yaml")
    plain, private = (
        load_config(raw | changes, CHECKOUT / "configs") for changes in ({}, {"privacy": privacy})
    )
    scenario = next(iter(plain.scenario_seeds()))
    found = {name: run_stage(private, scenario, name).privacy for name in plain.runs()}
    assert found["fedamole"] == private.privacy
    assert found["fedit"].embeddings is None and found["fedit"].dp_sgd == private.privacy.dp_sgd
    assert found["zero-shot"] == PrivacySettings()
    assert "privacy" not in canonical_json(run_stage(plain, scenario, "fedamole"))


def test_a_config_with_dp_sgd_and_zero_3_is_refused() -> None:
    raw = read_yaml(CHECKOUT / "configs/smoke.yaml") | {
        "privacy": {"dp_sgd": {"noise_multiplier": 1.0, "max_grad_norm": 1.0}},
        "training": {"deepspeed": "zero3"},
    }
    with pytest.raises(FedamoleError, match="with privacy: dp_sgd, .* stage 3 must be 0 to 2"):
        load_config(raw, CHECKOUT / "configs")
