"""DP-SGD: each example's part is bounded, the noise has its law, and nothing depends on ranks."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from scipy import stats
from tiny import make_store, tiny_llama
from torch import nn

from fedamole.batches import Batch, collate
from fedamole.dp_sgd import (
    GivenGradients,
    clipped,
    poisson_batches,
    privacy_noise,
    sum_of_clipped,
    train_privately,
)
from fedamole.errors import ClientError
from fedamole.hmole_peft import HMoLEConfig, routed_tokens
from fedamole.settings import DpSgdSettings, TrainingSettings
from fedamole.training import LocalTraining, ScoredModel, TrainingRecord, engine_for

pytestmark = pytest.mark.usefixtures("group")

CPU = torch.device("cpu")
NUM_EXAMPLES = 7
PLACE = LocalTraining(seed=3, round=2, client=5)
# Seeds are fixed, so a test that passes once always does.
ACCEPT = 1e-6


def example(index: int) -> Batch:
    """One of seven sequences of 8 to 14 tokens."""
    sequences = [
        np.random.default_rng(i).integers(3, 40, size=8 + i).tolist() for i in range(NUM_EXAMPLES)
    ]
    store = make_store(sequences, [3] * NUM_EXAMPLES, choices=[])
    return collate([store.ids(index)], [store.prompt_length(index)], store.pad_id)


def scored_model(
    dropout: float = 0.1, checkpointing: bool = False, frozen_experts: int = 0
) -> ScoredModel:
    backbone = tiny_llama(initializer_range=0.3)
    if checkpointing:
        backbone.activation_checkpointing_enable({"use_reentrant": False})
        backbone.enable_input_require_grads()
    config = HMoLEConfig(
        r=4,
        num_experts=3,
        top_k=2,
        dropout=dropout,
        target_modules=["q_proj", "v_proj"],
        frozen_experts=frozen_experts,
    )
    model = get_peft_model(backbone, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.2)
    return ScoredModel(model, balance_weight=0.01).train()


def dp_sgd(sigma: float, norm: float) -> DpSgdSettings:
    return DpSgdSettings(noise_multiplier=sigma, max_grad_norm=norm)


def without_noise_and_clipping() -> DpSgdSettings:
    return dp_sgd(1e-25, 1e10)


def train(
    privacy: DpSgdSettings,
    stage: int = 1,
    place: LocalTraining = PLACE,
    num_steps: int = 4,
    batch_size: int = 4,
    ranks: int = 1,
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
    learning_rate: float = 1e-2,
) -> tuple[dict[str, np.ndarray], TrainingRecord]:
    """All tensors of the model after one round, and the record."""
    settings = TrainingSettings(
        batch_size=batch_size, ranks=ranks, deepspeed={"zero_optimization": {"stage": stage}}
    )
    scored = scored_model()
    with engine_for(GivenGradients(scored), settings, learning_rate, optimizer) as engine:
        record = train_privately(
            engine, example, NUM_EXAMPLES, num_steps, place, settings, privacy, CPU
        )
        return {name: p.detach().numpy().copy() for name, p in scored.named_parameters()}, record


def trainable(scored: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in scored.named_parameters() if p.requires_grad}


def gradient_by_hand(scored: ScoredModel, index: int, step: int) -> tuple[float, torch.Tensor]:
    """Loss of one example and its flat gradient, by a plain backward pass."""
    from fedamole.randomness import derive_seed

    scored.zero_grad()
    names = ("dropout", PLACE.client, PLACE.round, step, index)
    torch.manual_seed(derive_seed(PLACE.seed, *names))
    batch = example(index)
    token_B, balance_B = scored(batch)
    (token_B / batch.num_targets + balance_B).sum().backward()
    flat = [p.grad.flatten() for p in trainable(scored).values() if p.grad is not None]
    return token_B.item() / batch.num_targets, torch.cat(flat)


# One step


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sum_is_that_of_gradients_taken_and_clipped_one_by_one(checkpointing: bool) -> None:
    scored, plain = scored_model(checkpointing=checkpointing), scored_model()
    by_hand = [gradient_by_hand(plain, index, step=1) for index in range(NUM_EXAMPLES)]
    norms = sorted(float(gradient_P.norm()) for _, gradient_P in by_hand)
    # Half of the examples are clipped.
    limit = norms[NUM_EXAMPLES // 2]
    expected_P = sum(g * min(1.0, limit / float(g.norm())) for _, g in by_hand)
    loss, sum_P = sum_of_clipped(
        GivenGradients(scored), example, range(NUM_EXAMPLES), 1, PLACE, limit, CPU
    )
    torch.testing.assert_close(sum_P, expected_P, rtol=1e-5, atol=1e-6 * limit)
    assert float(loss) == pytest.approx(sum(loss for loss, _ in by_hand), rel=1e-5)
    assert all(parameter.grad is None for parameter in scored.parameters())


@pytest.mark.parametrize("limit", [0.01, 1.0, 1e6])
def test_one_example_more_changes_the_sum_by_at_most_the_limit(limit: float) -> None:
    """Whichever it is, first or last in the batch, and also under dropout."""
    model = GivenGradients(scored_model(dropout=0.5))
    _, whole_P = sum_of_clipped(model, example, range(NUM_EXAMPLES), 0, PLACE, limit, CPU)
    for left_out in range(NUM_EXAMPLES):
        others = [index for index in range(NUM_EXAMPLES) if index != left_out]
        _, rest_P = sum_of_clipped(model, example, others, 0, PLACE, limit, CPU)
        _, alone_P = sum_of_clipped(model, example, [left_out], 0, PLACE, limit, CPU)
        assert float((whole_P - rest_P).norm()) <= limit * (1 + 1e-4)
        torch.testing.assert_close(whole_P - rest_P, alone_P, rtol=1e-3, atol=1e-4)


def test_clipping_keeps_short_gradients_and_shortens_long_ones() -> None:
    gradient_P = torch.tensor([3.0, 4.0])
    assert torch.equal(clipped(gradient_P, 5.0), gradient_P)
    torch.testing.assert_close(clipped(gradient_P, 1.0), torch.tensor([0.6, 0.8]))
    assert torch.equal(clipped(torch.zeros(2), 1.0), torch.zeros(2))


def test_given_gradient_is_the_gradient() -> None:
    model = GivenGradients(scored_model())
    size = sum(parameter.numel() for parameter in model.trainable())
    gradient_P = torch.randn(size, generator=torch.Generator().manual_seed(0))
    model(gradient_P).backward()
    assert torch.equal(torch.cat([p.grad.flatten() for p in model.trainable()]), gradient_P)


# Noise and batches


def test_noise_is_normal_with_deviation_sigma_times_the_limit() -> None:
    noise_P = privacy_noise(50_000, 1, PLACE, dp_sgd(0.8, 3.0))
    assert stats.kstest(noise_P, stats.norm(0, 0.8 * 3.0).cdf).pvalue > ACCEPT
    assert stats.kstest(noise_P, stats.norm(0, 0.8).cdf).pvalue < 1e-12
    other_P = privacy_noise(50_000, 2, PLACE, dp_sgd(0.8, 3.0))
    assert abs(np.corrcoef(noise_P, other_P)[0, 1]) < 6 / np.sqrt(50_000)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_optimizer_gets_the_clipped_sum_and_the_noise_over_the_expected_batch(stage: int) -> None:
    """Adam's first step has the sign of the gradient; its size follows where that is tiny."""
    sigma, limit, batch_size = 1.5, 1e-8, 4
    before = scored_model()
    after, _ = train(dp_sgd(sigma, limit), stage, num_steps=1, batch_size=batch_size)
    indices = next(poisson_batches(NUM_EXAMPLES, 1, batch_size, PLACE))
    _, sum_P = sum_of_clipped(GivenGradients(before), example, indices, 0, PLACE, limit, CPU)
    # Adam: lr g / (|g| + 1e-8).
    moved_P = np.concatenate(
        [(p.detach().numpy() - after[name]).ravel() for name, p in trainable(before).items()]
    ).astype(np.float64)
    share_P = moved_P / 1e-2
    gradient_P = 1e-8 * share_P / (1 - np.abs(share_P))
    noise_P = gradient_P - sum_P.numpy() / batch_size
    deviation = sigma * limit / batch_size
    assert noise_P.std() == pytest.approx(deviation, rel=5 / np.sqrt(2 * len(noise_P)))
    assert stats.kstest(noise_P, stats.norm(0, deviation).cdf).pvalue > ACCEPT


def test_every_example_is_drawn_independently_with_the_accountants_rate() -> None:
    num_examples, batch_size, steps = 40, 6, 4000
    drawn_TN = np.zeros((steps, num_examples))
    for step, indices in enumerate(poisson_batches(num_examples, steps, batch_size, PLACE)):
        assert (np.diff(indices) > 0).all()
        drawn_TN[step, indices] = 1
    rate = batch_size / num_examples
    deviation = np.sqrt(rate * (1 - rate) / steps)
    assert np.abs(drawn_TN.mean(0) - rate).max() < 6 * deviation
    # A shuffled stream would give batches of one size, and examples that avoid each other.
    sizes = drawn_TN.sum(1)
    law = stats.binom(num_examples, rate)
    counts = [(sizes == size).sum() for size in range(2, 12)]
    expected = steps * law.pmf(range(2, 12))
    rest = (steps - sum(counts), steps - expected.sum())
    assert stats.chisquare([*counts, rest[0]], [*expected, rest[1]]).pvalue > ACCEPT
    correlation_NN = np.corrcoef(drawn_TN.T) - np.eye(num_examples)
    assert np.abs(correlation_NN).max() < 6 / np.sqrt(steps)


def test_a_batch_follows_from_its_place_alone() -> None:
    few, many = (list(poisson_batches(50, steps, 10, PLACE)) for steps in (3, 6))
    assert all(np.array_equal(a, b) for a, b in zip(few, many, strict=False))
    assert len({tuple(indices) for indices in many}) == 6
    for other in (LocalTraining(4, 2, 5), LocalTraining(3, 1, 5), LocalTraining(3, 2, 6)):
        assert not np.array_equal(next(poisson_batches(50, 1, 10, other)), few[0])


def test_a_batch_size_beyond_the_examples_takes_all_of_them() -> None:
    assert all(np.array_equal(b, np.arange(5)) for b in poisson_batches(5, 3, 8, PLACE))


# A round


def adam_by_hand(num_steps: int, batch_size: int) -> dict[str, np.ndarray]:
    """Adam along the sum of the gradients over the expected batch size, without DeepSpeed."""
    scored = scored_model()
    parameters = trainable(scored)
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-2)
    sizes = [parameter.numel() for parameter in parameters.values()]
    for step, indices in enumerate(poisson_batches(NUM_EXAMPLES, num_steps, batch_size, PLACE)):
        sum_P = sum(gradient_by_hand(scored, int(i), step)[1] for i in indices)
        assert len(indices)
        for p, part in zip(parameters.values(), (sum_P / batch_size).split(sizes), strict=True):
            p.grad = part.view_as(p).clone()
        optimizer.step()
    return {name: p.detach().numpy() for name, p in scored.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_without_noise_and_clipping_it_is_adam_on_the_mean_gradient(stage: int) -> None:
    expected = adam_by_hand(num_steps=4, batch_size=4)
    found, record = train(without_noise_and_clipping(), stage)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-6, err_msg=name)
    assert record.steps == 4
    indices = next(poisson_batches(NUM_EXAMPLES, 1, 4, PLACE))
    losses = [gradient_by_hand(scored_model(), int(index), 0)[0] for index in indices]
    assert record.loss_first == pytest.approx(np.mean(losses), rel=1e-5)


def test_equal_seeds_give_equal_bytes_and_other_places_other_noise() -> None:
    settings = dp_sgd(1.0, 0.5)
    first, again = (train(settings, num_steps=2)[0] for _ in range(2))
    other = train(settings, num_steps=2, place=LocalTraining(3, 3, 5))[0]
    for name, array in first.items():
        assert array.tobytes() == again[name].tobytes()
        assert (array.tobytes() == other[name].tobytes()) != name.endswith(
            ("lora_A", "lora_B", "token_proj")
        ), name


def test_frozen_weights_stay_as_they_are() -> None:
    before = scored_model()
    after, _ = train(dp_sgd(5.0, 10.0))
    for name, parameter in before.named_parameters():
        same = np.array_equal(after[name], parameter.detach().numpy())
        assert same != parameter.requires_grad, name


def test_a_step_without_examples_moves_by_noise_and_has_no_loss() -> None:
    place = next(
        place
        for place in (LocalTraining(3, round_, 5) for round_ in range(1, 100))
        if not len(next(poisson_batches(NUM_EXAMPLES, 1, 1, place)))
    )
    after, record = train(dp_sgd(1.0, 1.0), place=place, num_steps=1, batch_size=1)
    assert record.loss_first is record.loss_last is None
    for name, parameter in trainable(scored_model()).items():
        assert not np.array_equal(after[name], parameter.detach().numpy())


def test_tokens_of_the_experts_are_not_counted() -> None:
    """They would be uploaded, and no noise hides them."""
    _, record = train(dp_sgd(1.0, 1.0), num_steps=1)
    scored = scored_model()
    scored(example(0))
    seen = routed_tokens(scored)
    assert record.routed_tokens.keys() == seen.keys()
    for name, counts in record.routed_tokens.items():
        assert counts.shape == seen[name].shape and not counts.any()


def test_a_training_that_diverges_names_the_step() -> None:
    with pytest.raises(ClientError, match="round 2 client 5: the loss of step [2-4] is nan"):
        train(dp_sgd(1.0, 1.0), learning_rate=1e30)


# Two ranks

CASES = [(stage, privacy) for stage in (0, 1, 2) for privacy in ("exact", "private")]


def train_all_cases(ranks: int) -> list[dict[str, np.ndarray]]:
    privacies = {"exact": without_noise_and_clipping(), "private": dp_sgd(0.5, 0.3)}
    # An expected batch of two: often one of the ranks has no example.
    return [
        train(privacies[privacy], stage, num_steps=5, batch_size=2, ranks=ranks)[0]
        for stage, privacy in CASES
    ]


def rank_of_two(rank: int, folder: str) -> None:
    """What one of two processes does."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save(train_all_cases(ranks=2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_same_weights_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank_of_two, args=(str(tmp_path),), nprocs=2)
    alone = train_all_cases(ranks=1)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for case, expected, first, second in zip(CASES, alone, *both, strict=True):
        for name, array in expected.items():
            assert np.array_equal(first[name], second[name]), (case, name)
            np.testing.assert_allclose(first[name], array, rtol=0, atol=1e-5, err_msg=f"{case}")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_noise_does_not_move_frozen_experts(stage: int) -> None:
    settings = TrainingSettings(batch_size=4, deepspeed={"zero_optimization": {"stage": stage}})
    scored = scored_model(frozen_experts=1)
    before = {name: p.detach().clone() for name, p in trainable(scored).items()}
    with engine_for(GivenGradients(scored), settings, 1e-2) as engine:
        train_privately(engine, example, NUM_EXAMPLES, 3, PLACE, settings, dp_sgd(1.0, 1.0), CPU)
    for name, after in trainable(scored).items():
        moved = (after.detach() != before[name]).flatten(1).any(1)
        if name.endswith(("lora_A", "lora_B")):
            # Three routed experts, the last of them frozen, and the shared one.
            assert moved.tolist() == [True, True, False, True]
        else:
            assert moved.all()
