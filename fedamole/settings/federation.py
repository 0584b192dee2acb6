"""What is trained, who holds it, and how the server averages it."""

from typing import Literal

from pydantic import Field

from fedamole.settings.section import Section


class AdapterSettings(Section):
    """The trainable part of a client's model."""

    rank: int = Field(default=8, ge=1)
    """LoRA rank r."""
    alpha: float = Field(default=16.0, gt=0)
    """LoRA scale numerator; the update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout probability in front of the LoRA path."""
    top_k: int = Field(default=2, ge=1)
    """Domain experts that work on a token."""
    balance_weight: float = Field(default=0.001, ge=0)
    """Weight of the load balancing loss."""
    target_modules: list[str] | None = Field(default=None, min_length=1)
    """Ends of the names of the linear layers to adapt; default: PEFT's for the model family."""


class AssignmentSettings(Section):
    """Who holds which experts (RSEA)."""

    num_experts: int = Field(default=30, ge=1)
    """Domain experts E per module."""
    choices: int = Field(default=2, ge=1)
    """Clients c that each expert chooses."""
    min_experts: int | None = Field(default=None, ge=1)
    """Fewest domain experts of a client per module; default max(2, top_k)."""
    max_experts: int = Field(default=8, ge=1)
    """Most domain experts of a client per module."""

    def bounds(self, top_k: int) -> tuple[int, int]:
        """Fewest and most domain experts of a client per module (b_min, b_max)."""
        return self.min_experts or max(2, top_k), self.max_experts

    def infeasibility(self, clients: int, top_k: int) -> str | None:
        """Name the capacity inequality that fails for K clients; None if an assignment exists.

        Feasible iff K b_min <= E c <= K b_max, c <= K and b_min <= E.
        """
        fewest, most = self.bounds(top_k)
        total = self.num_experts * self.choices
        checks = [
            (fewest >= top_k, f"min_experts {fewest} >= top_k {top_k}"),
            (fewest <= most, f"min_experts {fewest} <= max_experts {most}"),
            (self.choices <= clients, f"choices {self.choices} <= clients {clients}"),
            (fewest <= self.num_experts, f"min_experts {fewest} <= num_experts {self.num_experts}"),
            (
                clients * fewest <= total,
                f"clients * min_experts = {clients} * {fewest} = {clients * fewest} <= "
                f"num_experts * choices = {self.num_experts} * {self.choices} = {total}",
            ),
            (
                total <= clients * most,
                f"num_experts * choices = {self.num_experts} * {self.choices} = {total} <= "
                f"clients * max_experts = {clients} * {most} = {clients * most}",
            ),
        ]
        return next((text for holds, text in checks if not holds), None)


class AggregationSettings(Section):
    """How the server averages."""

    weighting: Literal["uniform", "examples", "tokens"] = "uniform"
    """Weight of a client in a mean: equal (the paper), its training examples, or the tokens that it
    routed to the expert; of what is no domain expert `tokens` are its training examples, so that to
    methods without them both are the same."""
