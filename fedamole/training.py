"""Local training of one client through DeepSpeed, on one rank or several."""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import deepspeed
import deepspeed.ops
import numpy as np
import torch
from deepspeed.utils import logger as deepspeed_logger
from torch import nn
from tqdm import tqdm

from fedamole import distributed
from fedamole.batches import IGNORED, Batch, LocalTraining
from fedamole.errors import ClientError
from fedamole.hmole_peft import balance_loss, hmole_layers, routed_tokens
from fedamole.randomness import derive_seed
from fedamole.settings import TrainingSettings

# DeepSpeed would compile a shared-memory collective with g++ at the first start (a minute or two);
# gloo does the same work here.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed_logger.setLevel(logging.WARNING)

StepT = TypeVar("StepT")
# torch's Adam in one pass over the parameters.
FUSED_ADAM = functools.partial(torch.optim.Adam, fused=True)


class ScoredModel(nn.Module):
    """A causal language model whose forward pass gives loss sums instead of logits.

    Logits are made only where a response token is predicted: with a vocabulary of 49k that is a
    third of the time of a training step.
    """

    def __init__(self, model: nn.Module, balance_weight: float) -> None:
        super().__init__()
        self.model = model
        self.balance_weight = balance_weight if hmole_layers(model) else 0.0

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the token losses of each sequence.

        Returns
        -------
        tuple of torch.Tensor
            (B,) sum of the cross entropies of the response tokens in nats, and (B,) weighted load
            balancing loss; both float32.
        """
        # One row per token: with the vocabulary in the middle, the loss takes four times as long.
        losses = nn.functional.cross_entropy(
            self.logits(batch).float().flatten(0, 1),
            batch.targets.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        token_B = losses.view_as(batch.targets).sum(1)
        if not (self.balance_weight and self.training):
            return token_B, torch.zeros_like(token_B)
        return token_B, self.balance_weight * balance_loss(self.model)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits (B, P, V) at the positions of a batch."""
        logits_BPV: torch.Tensor = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.mask,
            logits_to_keep=batch.positions,
            use_cache=False,
        ).logits
        return logits_BPV


@dataclass(frozen=True)
class TrainingRecord:
    """What a local training reports.

    Attributes
    ----------
    steps
        Optimizer steps.
    loss_first, loss_last
        Mean token loss of the first and the last step that had examples, in nats; None if none had.
    seconds
        Wall time of the steps; in a pack of those of all its clients.
    routed_tokens
        Module -> (n,) tokens that were routed to each of its domain experts.
    """

    steps: int
    loss_first: float | None
    loss_last: float | None
    seconds: float
    routed_tokens: dict[str, np.ndarray]


def learning_rate(settings: TrainingSettings, round_: int) -> float:
    """Step size of a round: learning_rate * decay^(round - 1)."""
    return settings.learning_rate * settings.learning_rate_decay ** (round_ - 1)


@contextlib.contextmanager
def engine_for(
    model: nn.Module,
    settings: TrainingSettings,
    learning_rate: float,
    optimizer: Callable[..., torch.optim.Optimizer] = FUSED_ADAM,
) -> Iterator[deepspeed.DeepSpeedEngine]:
    """Put a model under DeepSpeed with a fresh optimizer, and take it out again."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trainable,
        optimizer=optimizer(trainable, lr=learning_rate),
        config=_deepspeed_config(settings, sum(parameter.numel() for parameter in trainable)),
        dist_init_required=False,
    )
    try:
        yield engine
    finally:
        engine.destroy()


@contextlib.contextmanager
def sharded_for_testing(model: nn.Module, settings: TrainingSettings) -> Iterator[None]:
    """Cut a model that is only tested into slices over the ranks, as ZeRO-3 does in training."""
    engine, *_ = deepspeed.initialize(
        model=model, config=_deepspeed_config(settings, num_trainable=1), dist_init_required=False
    )
    try:
        yield
    finally:
        engine.destroy()


def train(
    engine: deepspeed.DeepSpeedEngine,
    steps: Iterable[Sequence[Batch]],
    num_steps: int,
    place: LocalTraining,
    settings: TrainingSettings,
    device: torch.device,
) -> TrainingRecord:
    """Train for one round.

    The loss of a step is the mean over all response tokens of its global batch plus the mean
    balance loss of its sequences, however the batch is cut into passes and ranks.

    Parameters
    ----------
    engine
        DeepSpeed around a :class:`ScoredModel`.
    steps
        For each step its micro-batches, over all ranks: pass p of rank r is number p * ranks + r.
    num_steps
        Number of steps.
    place
        Seed, round and client; dropout depends on these, the step and the micro-batch only.
    settings
        Batch sizes and ranks.
    device
        Of this rank.
    """
    engine.train()
    losses: list[torch.Tensor] = []
    counts: dict[str, torch.Tensor] = {}
    started = time.monotonic()
    for step, batches in enumerate(with_bar(steps, num_steps)):
        num_targets = sum(batch.num_targets for batch in batches)
        loss = torch.zeros((), device=device)
        for number in range(distributed.rank(), len(batches), distributed.world_size()):
            # Dropout follows from the place of the micro-batch, whichever rank computes it.
            names = ("dropout", place.client, place.round, step, number)
            torch.manual_seed(derive_seed(place.seed, *names))
            token_B, balance_B = engine(batches[number].to(device))
            for module, tokens_N in routed_tokens(engine.module).items():
                counts[module] = tokens_N + counts.get(module, 0)
            token, balance = token_B.sum() / num_targets, balance_B.sum() / settings.batch_size
            # DeepSpeed averages over passes and ranks; the parts already add up to the mean.
            engine.backward((token + balance) * len(batches))
            engine.step()
            loss += token.detach()
        losses.append(loss)
    means = over_ranks(torch.stack(losses)).tolist()
    seconds = time.monotonic() - started
    check_finite(enumerate(means), place)
    return TrainingRecord(
        steps=num_steps,
        loss_first=means[0],
        loss_last=means[-1],
        seconds=seconds,
        routed_tokens={name: over_ranks(n).cpu().numpy() for name, n in counts.items()},
    )


def with_bar(steps: Iterable[StepT], num_steps: int) -> Iterable[StepT]:
    """Show on a terminal how far the steps are, once per client."""
    hidden = True if distributed.rank() else None
    bar: Iterable[StepT] = tqdm(steps, total=num_steps, unit="step", leave=False, disable=hidden)
    return bar


def check_finite(losses: Iterable[tuple[int, float]], place: LocalTraining) -> None:
    """Refuse a training that diverged, before its tensors spoil the mean of all clients.

    Parameters
    ----------
    losses
        Number of the step, from 0, and its loss.
    place
        Names the client.

    Raises
    ------
    ClientError
        At the first loss that is no finite number.
    """
    for step, loss in losses:
        if not math.isfinite(loss):
            raise ClientError(
                f"round {place.round} client {place.client}: the loss of step {step + 1} is "
                f"{loss}; try a lower training: learning_rate, or gradient_clipping"
            )


def over_ranks(part: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks."""
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(part)
    return part


def trained_tensors(engine: deepspeed.DeepSpeedEngine, zero_stage: int) -> dict[str, torch.Tensor]:
    """Copies of the whole trainable tensors by name, on the CPU, on all ranks.

    Under ZeRO-3 a rank holds only a slice of each; they are gathered here. A plain ``state_dict``
    would give empty tensors.
    """
    named = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    gathered: Any = contextlib.nullcontext()
    if zero_stage == 3:
        gathered = deepspeed.zero.GatheredParameters(list(named.values()))
    with gathered:
        return {name: p.detach().to("cpu", copy=True) for name, p in named.items()}


def _deepspeed_config(settings: TrainingSettings, num_trainable: int) -> dict[str, Any]:
    """DeepSpeed settings of the user plus those that follow from ours."""
    accumulation = settings.batch_size // (settings.ranks * settings.sequences_per_pass)
    given = settings.deepspeed.get("zero_optimization", {})
    # The default bucket holds 500 million numbers; adapters have a few million.
    zero = {"reduce_bucket_size": num_trainable, **given}
    if settings.ranks == 1 and settings.zero_stage < 3 and "offload_optimizer" not in given:
        # One rank has nobody to share with: flat copies and buckets would take 5 % of a step.
        zero = {"stage": 0}
    return {
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        **settings.deepspeed,
        "zero_optimization": zero,
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": settings.sequences_per_pass,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": settings.gradient_clipping,
    }
