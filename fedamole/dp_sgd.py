"""Local training by DP-SGD, on one rank or several (Abadi et al. 2016, arXiv:1607.00133, Alg. 1).

Each step: every example takes part with probability q = batch_size / n, independently; its gradient
over all trainable tensors is clipped to length C; the sum gets Gaussian noise of standard deviation
sigma C and is divided by the expected number of examples, q n; Adam gets the result.
"""

# P = trainable numbers

import time
from collections.abc import Callable, Iterator, Sequence

import deepspeed
import numpy as np
import torch
from torch import nn

from fedamole import distributed
from fedamole.accounting import sample_rate
from fedamole.batches import Batch, LocalTraining
from fedamole.hmole_peft import hmole_layers
from fedamole.randomness import derive_seed, stream
from fedamole.settings import DpSgdSettings, TrainingSettings
from fedamole.training import (
    TrainingRecord,
    check_finite,
    over_ranks,
    with_bar,
)


class GivenGradients(nn.Module):
    """A model whose forward pass takes the gradient that DeepSpeed is to step along.

    The gradient of sum_i p_i g_i by p is g. A gradient that was made elsewhere thereby reaches the
    optimizer of every ZeRO stage by the same calls as any other.

    Parameters
    ----------
    scored
        Gives the loss sums of a batch, as :class:`fedamole.training.ScoredModel`.
    """

    def __init__(self, scored: nn.Module) -> None:
        super().__init__()
        self.scored = scored

    def trainable(self) -> list[nn.Parameter]:
        """Give the parameters whose gradients are clipped together, in the order of the model."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def trained(self) -> torch.Tensor:
        """1 for the numbers that are trained, 0 for those of frozen experts, (P,) float32.

        A frozen expert is a row of a parameter that is trained: noise would move it.
        """
        marks = {id(p): torch.ones_like(p, requires_grad=False) for p in self.trainable()}
        for layer in hmole_layers(self).values():
            for parameter in (layer.lora_A, layer.lora_B):
                marks[id(parameter)][layer.mixture.frozen] = 0
        return torch.cat([marks[id(parameter)].flatten() for parameter in self.trainable()])

    def forward(self, gradient_P: torch.Tensor) -> torch.Tensor:
        """Scalar whose gradient by the trainable parameters is the one given."""
        parameters = self.trainable()
        parts = gradient_P.split([parameter.numel() for parameter in parameters])
        products = [p.flatten() @ g.to(p.dtype) for p, g in zip(parameters, parts, strict=True)]
        return torch.stack(products).sum()


def train_privately(
    engine: deepspeed.DeepSpeedEngine,
    example: Callable[[int], Batch],
    num_examples: int,
    num_steps: int,
    place: LocalTraining,
    settings: TrainingSettings,
    privacy: DpSgdSettings,
    device: torch.device,
) -> TrainingRecord:
    """Train for one round by DP-SGD, in passes of one example.

    The loss of an example is the mean over its response tokens plus its balance loss: unlike in
    :func:`fedamole.training.train` it does not depend on the examples beside it. The tokens that
    each expert was given are not counted, since the record of them is uploaded.

    Parameters
    ----------
    engine
        DeepSpeed around :class:`GivenGradients`, at ZeRO stage 0, 1 or 2.
    example
        Index of a training example -> the batch of this example alone.
    num_examples
        Training examples n of the client.
    num_steps
        Number of steps.
    place
        Seed, round and client; batches, dropout and noise depend on these, the step and the example
        only.
    settings
        Expected batch size.
    privacy
        Noise and clipping.
    device
        Of this rank.

    Returns
    -------
    TrainingRecord
        The losses are means over the examples of a step.
    """
    engine.train()
    model: GivenGradients = engine.module
    expected = sample_rate(settings.batch_size, num_examples) * num_examples
    batches = poisson_batches(num_examples, num_steps, settings.batch_size, place)
    trained_P = model.trained().to(device)
    losses: dict[int, torch.Tensor] = {}
    started = time.monotonic()
    for step, indices in enumerate(with_bar(batches, num_steps)):
        loss, sum_P = sum_of_clipped(
            model, example, indices, step, place, privacy.max_grad_norm, device
        )
        if len(indices):
            losses[step] = loss / len(indices)
        noise_P = torch.from_numpy(privacy_noise(len(sum_P), step, place, privacy)).to(device)
        engine.backward(engine((sum_P + noise_P * trained_P) / expected))
        engine.step()
    means = {step: float(loss) for step, loss in losses.items()}
    seconds = time.monotonic() - started
    check_finite(means.items(), place)
    return TrainingRecord(
        steps=num_steps,
        loss_first=means[min(means)] if means else None,
        loss_last=means[max(means)] if means else None,
        seconds=seconds,
        routed_tokens={
            name: np.zeros(layer.num_experts, dtype=np.int64)
            for name, layer in hmole_layers(model).items()
        },
    )


def poisson_batches(
    num_examples: int, num_steps: int, batch_size: int, place: LocalTraining
) -> Iterator[np.ndarray]:
    """Draw the examples of each step: each one with probability batch_size / n, independently.

    The privacy of a step is amplified by this sampling (Mironov et al. 2019, arXiv:1908.10530); a
    shuffled stream of examples has another law. A batch may be empty.

    Yields
    ------
    numpy.ndarray
        Sorted indices in [0, num_examples), int64.
    """
    rate = sample_rate(batch_size, num_examples)
    for step in range(num_steps):
        rng = stream(place.seed, "poisson", place.client, place.round, step)
        yield (rng.random(num_examples) < rate).nonzero()[0]


def sum_of_clipped(
    model: GivenGradients,
    example: Callable[[int], Batch],
    indices: Sequence[int] | np.ndarray,
    step: int,
    place: LocalTraining,
    max_grad_norm: float,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up the clipped gradients of the examples of a step, over all ranks.

    Returns
    -------
    tuple of torch.Tensor
        Sum of the mean token losses, in nats, and (P,) sum of the clipped gradients; float32.
    """
    parameters = model.trainable()
    sum_P = torch.zeros(sum(parameter.numel() for parameter in parameters), device=device)
    losses = torch.zeros((), device=device)
    for index in indices[distributed.rank() :: distributed.world_size()]:
        # Named by the example, not by its place in the batch: its gradient is then the same
        # whichever examples are drawn with it, and one example more changes the sum by C at most.
        names = ("dropout", place.client, place.round, step, int(index))
        torch.manual_seed(derive_seed(place.seed, *names))
        batch = example(int(index))
        token_B, balance_B = model.scored(batch.to(device))
        loss = token_B.sum() / batch.num_targets
        gradients = torch.autograd.grad(
            loss + balance_B.sum(), parameters, allow_unused=True, materialize_grads=True
        )
        sum_P += clipped(torch.cat([gradient.flatten() for gradient in gradients]), max_grad_norm)
        losses += loss.detach()
    return over_ranks(losses), over_ranks(sum_P)


def clipped(gradient_P: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
    """Shorten a gradient to a length where it is longer."""
    norm = torch.linalg.vector_norm(gradient_P, dtype=torch.float64)
    return gradient_P * (max_grad_norm / norm.clamp(min=max_grad_norm)).to(gradient_P.dtype)


def privacy_noise(size: int, step: int, place: LocalTraining, privacy: DpSgdSettings) -> np.ndarray:
    """Draw the noise on the sum of clipped gradients, the same on all ranks; (size,) float32."""
    rng = stream(place.seed, "dp-noise", place.client, place.round, step)
    noise_P = rng.standard_normal(size, dtype=np.float32)
    return noise_P * np.float32(privacy.noise_multiplier * privacy.max_grad_norm)
