"""What only single methods depend on."""

from pydantic import Field

from fedamole.settings.section import Section


class PromptSettings(Section):
    """Soft prompts (fedprompt, fedptuning)."""

    text: str = Field(default="Follow the instruction and give the answer:", min_length=1)
    """Task text whose token embeddings the soft prompt of fedprompt starts from; it has as many
    virtual tokens as this text has tokens."""
    virtual_tokens: int = Field(default=20, ge=1)
    """Virtual tokens of fedptuning."""
    encoder_width: int = Field(default=1024, ge=1)
    """Width of the hidden layers of the prompt encoder of fedptuning."""


class FdloraSettings(Section):
    """FDLoRA (arXiv:2406.07925)."""

    outer_learning_rate: float = Field(default=1.0, gt=0)
    """Step size of the server's SGD on the mean pseudo-gradient."""
    outer_momentum: float = Field(default=0.5, ge=0, lt=1)
    """Nesterov momentum of the server's SGD."""
    sync_every: int = Field(default=5, ge=1)
    """Rounds between two copies of the locally trained adapter into the personal one: after rounds
    whose number is a multiple of this."""
    fusion_budget: int = Field(default=5, ge=2, le=100)
    """Pairs of fusion weights that AdaFusion tries, the first of them (0, 0). Up to 100,
    nevergrad's NGOpt is COBYLA."""
    fusion_batches: int = Field(default=5, ge=1)
    """Batches of the embedding set on which a pair is tried, of training: batch_size sequences. At
    the authors' batch size of 1 these are as many examples."""
    fusion_bound: float = Field(default=1.5, gt=0)
    """Largest absolute value of a fusion weight."""
    fusion_penalty: float = Field(default=0.05, ge=0)
    """Factor of the mean absolute fusion weight in what AdaFusion minimises, in nats."""


class FedapenSettings(Section):
    """FedAPEN (Qin et al., KDD 2023)."""

    initial_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of the private model in the ensemble before it is learned."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Adam step size of the ensemble weight."""
    passes: int = Field(default=10, ge=1)
    """Passes over the embedding set to learn the ensemble weight."""
