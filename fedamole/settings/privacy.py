"""What hides a client's data in its uploads."""

from typing import Literal

from pydantic import Field

from fedamole.settings.federation import AggregationSettings
from fedamole.settings.section import Section
from fedamole.settings.training import TrainingSettings


class EmbeddingPrivacy(Section):
    """Noise on the mean embeddings that a client uploads (metric differential privacy)."""

    mechanism: Literal["dchi", "paper"] = "dchi"
    """`dchi` adds a vector of density proportional to exp(-eta * length), which keeps the guarantee
    of the metric; `paper` adds what the authors' code adds, for which it does not hold."""
    eta: float = Field(gt=0)
    """Privacy parameter, in 1 / length of an embedding: the smaller, the more noise. The mean
    length of the noise is rank / eta."""


class DpSgdSettings(Section):
    """Local training by DP-SGD: (epsilon, delta) differential privacy of the trained tensors."""

    noise_multiplier: float = Field(gt=0)
    """Standard deviation of the noise on the sum of clipped gradients, as a multiple of
    max_grad_norm."""
    max_grad_norm: float = Field(gt=0)
    """Length to which the gradient of each example, over all trained tensors, is clipped."""
    delta: float = Field(default=1e-5, gt=0, lt=0.1)
    """Probability with which the bound epsilon may fail; it must be below 1 / training examples of
    every client, so that to publish one example does not count as private."""
    accountant: Literal["prv", "rdp"] = "prv"
    """How epsilon is computed: `rdp` by Renyi divergences, as in most papers; `prv` also by
    numerical composition, which is tighter. Both give upper bounds."""

    def covers(self, num_examples: int) -> bool:
        """Whether delta is small enough for a client: one example made public must not count."""
        return self.delta * num_examples < 1


class PrivacySettings(Section):
    """What hides a client's data in its uploads; nothing by default."""

    embeddings: EmbeddingPrivacy | None = None
    """Noise on the uploaded embeddings of methods with domain experts."""
    dp_sgd: DpSgdSettings | None = None
    """Differentially private local training."""

    def conflict(self, training: TrainingSettings, aggregation: AggregationSettings) -> str | None:
        """Name the setting that cannot go together with DP-SGD, and what would be allowed.

        ZeRO-3 gives no rank a whole gradient to clip; a clipping of the private sum, and passes of
        several examples, would promise what DP-SGD does by itself or not at all; token counts would
        reveal what the noise hides.
        """
        if self.dp_sgd is None:
            return None
        checks = [
            (
                training.zero_stage < 3,
                f"training: deepspeed zero_optimization stage {training.zero_stage} must be 0 to 2",
            ),
            (
                not training.gradient_clipping,
                f"training: gradient_clipping {training.gradient_clipping} must be 0; max_grad_norm"
                " clips each example",
            ),
            (
                training.micro_batch_size is None,
                f"training: micro_batch_size {training.micro_batch_size} must be left out; each "
                "example has a pass of its own",
            ),
            (
                aggregation.weighting != "tokens",
                "aggregation: weighting 'tokens' must be 'uniform' or 'examples'; the tokens per "
                "expert are not uploaded",
            ),
        ]
        failing = next((text for holds, text in checks if not holds), None)
        return failing and f"with privacy: dp_sgd, {failing}"
