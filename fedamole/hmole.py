"""HMoLE: a linear layer with a heterogeneous mixture of LoRA experts.

Source: Zhang et al., "Personalized Federated Fine-Tuning for LLMs via Data-Driven Heterogeneous
Model Architectures", arXiv:2411.19128. Per token x of a frozen linear layer W0:

    t = P x,  e_i = A_i x,  p = softmax_i(<e_i, t> / sqrt(r)),  S = top-k of p,  q_i = p_i / sum_S p
    y = W0 x + s B_sh A_sh drop(x) + sum_{i in S} q_i s B_i A_i drop(x),        s = alpha / r

Dense formulation: one product with all A and P stacked, one with all B stacked, weights in between.
No loop over experts and no shape that depends on data, so every parameter takes part in every step:
ZeRO-3 gathers the same tensors on all ranks whatever the routing is.

For ablations and rival methods there are two other routers, a linear gate and weights from outside
(:mod:`fedamole.routing`), and the last routed experts may be frozen.
"""

# Axes: B = sequences, T = tokens, D = d_in, O = d_out, R = rank,
#       N = routed experts, M = experts held (N, and the shared one last)

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedamole.errors import FedamoleError
from fedamole.hmole_function import Dropout, combine, project
from fedamole.routing import ROUTERS, Mixture, Router, RoutingContext


class HMoLELinear(nn.Module):
    """A frozen linear layer plus a shared LoRA expert and a mixture of routed ones.

    With `num_experts=0` the layer is plain LoRA: no `token_proj`, no routing, a balance loss of 0.
    All parameters are float32 whatever the dtype of the base layer, and so is everything computed
    from them, also under autocast; only the sum with the base output is rounded to its dtype.

    Parameters
    ----------
    base_layer
        The linear layer to adapt. It is called as a module and frozen by the caller.
    rank
        r, at least 1.
    alpha
        Numerator of the scale s = alpha / r, positive.
    num_experts
        N, the experts tokens are routed among; 0 for none.
    top_k
        Experts per token, 1 <= top_k <= num_experts; unused without routed experts and by the
        router "given".
    dropout
        Probability of dropping an element of x on the LoRA path while training, in [0, 1). The mask
        is drawn from a seed that comes from torch's global CPU generator.
    shared_expert
        Whether one more expert sees every token with weight 1.
    router
        What the weights of the routed experts follow from: "embedding" as above; "linear", a
        trained gate G with p = softmax(G x), and the rest as above; "given", for each sequence
        `routing_context.expert_weights_BN`, without top-k, balance loss and counts.
    frozen_experts
        The last so many routed experts get a gradient of exactly 0 in A and B, whatever their
        weights; an optimizer without weight decay then leaves every bit of them. The router is
        trained all the same. At most num_experts.

    Attributes
    ----------
    lora_A, lora_B
        Shapes (M, r, d_in) and (M, d_out, r); the shared expert is the last row.
    token_proj
        P, shape (r, d_in); None without routed experts and for the other routers.
    gate
        G, shape (N, d_in), of the router "linear"; otherwise None.
    balance_loss_B
        N * sum_i mean_t(p_i) * f_i of each sequence of the last forward pass, over its real tokens;
        0 for a sequence without any. f_i is the fraction of (token, slot) pairs routed to expert i
        and carries no gradient. 0 for given weights. None before the first pass.
    routed_tokens_N
        Real tokens the last forward pass sent to each expert, int64 on the device of the layer;
        0 for given weights.
    routing_context
        The padding mask of the batch and given weights, shared by all layers of a model.

    Raises
    ------
    ValueError
        For an argument outside the limits above; the message names the value.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        rank: int,
        alpha: float,
        num_experts: int,
        top_k: int,
        dropout: float = 0.0,
        shared_expert: bool = True,
        router: Router = "embedding",
        frozen_experts: int = 0,
    ) -> None:
        super().__init__()
        check_arguments(
            base_layer,
            rank,
            alpha,
            num_experts,
            top_k,
            dropout,
            shared_expert,
            router,
            frozen_experts,
        )
        self.base_layer = base_layer
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.num_experts, self.top_k, self.shared_expert = num_experts, top_k, shared_expert
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.router, self.frozen_experts = router, frozen_experts
        scale = alpha / rank
        self.mixture = Mixture(num_experts, rank, max(1, top_k), scale, router, frozen_experts)
        self.routing_context = RoutingContext()
        self.balance_loss_B: Tensor | None = None
        self.routed_tokens_N: Tensor | None = None
        self._collecting = False
        self._input_sum_D: Tensor | None = None
        self._input_tokens: Tensor | None = None
        self._create_parameters(base_layer.weight.device)
        self.reset_parameters()

    def _create_parameters(self, device: torch.device) -> None:
        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))

        num_held = self.num_experts + self.shared_expert
        self.lora_A = empty(num_held, self.rank, self.in_features)
        self.lora_B = empty(num_held, self.out_features, self.rank)
        self.token_proj: nn.Parameter | None = None
        self.gate: nn.Parameter | None = None
        if self.num_experts > 0 and self.router == "embedding":
            self.token_proj = empty(self.rank, self.in_features)
        if self.num_experts > 0 and self.router == "linear":
            self.gate = empty(self.num_experts, self.in_features)

    def reset_parameters(self) -> None:
        """Set B to 0, so that the layer equals its base, and draw every A_i and P or G anew.

        The law is PEFT's and `nn.Linear`'s: Kaiming uniform with a = sqrt(5), which for matrices of
        d_in columns is U(-1/sqrt(d_in), 1/sqrt(d_in)).
        """
        bound = 1.0 / math.sqrt(self.in_features)
        nn.init.uniform_(self.lora_A, -bound, bound)
        for weight in (self.token_proj, self.gate):
            if weight is not None:
                nn.init.uniform_(weight, -bound, bound)
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the base layer and the experts.

        Parameters
        ----------
        x
            Shape (T, d_in), taken as one sequence, or (B, ..., d_in), B sequences.

        Returns
        -------
        Tensor
            Shape (..., d_out), in the dtype of the base layer's output.

        Raises
        ------
        ValueError
            If the mask of the routing context does not have one value per token, or the weights of
            the router "given" are missing or of another shape.
        """
        token_mask_BT = self.routing_context.mask_for(x)
        num_sequences = x.shape[0] if x.dim() > 2 else 1
        if token_mask_BT is not None:
            num_sequences = token_mask_BT.shape[0]
        token_mask_T = None if token_mask_BT is None else token_mask_BT.flatten()
        dropout = None
        if self.dropout and self.training:
            dropout = Dropout(self.dropout, (int(torch.randint(2**62, ()).item()),))

        through_TD, projected_TX, dropped_TL = project(
            x.reshape(-1, self.in_features),
            self.lora_A,
            self.token_proj if self.gate is None else self.gate,
            self.mixture,
            dropout,
        )
        base = self.base_layer(through_TD.view_as(x))
        y_TO, balance_loss_B, routed_tokens_NB = combine(
            base.reshape(-1, self.out_features),
            projected_TX,
            dropped_TL,
            self.lora_B,
            token_mask_T,
            num_sequences,
            self.mixture,
            self._given_weights(num_sequences),
        )
        if not inside_backward():
            self.balance_loss_B, self.routed_tokens_N = balance_loss_B, routed_tokens_NB.sum(1)
            if self._collecting:
                self._collect(x.detach().reshape(-1, self.in_features), token_mask_T)
        return y_TO.view_as(base)

    @property
    def balance_loss(self) -> Tensor | None:
        """Mean of `balance_loss_B` over the sequences of the last forward pass."""
        return None if self.balance_loss_B is None else self.balance_loss_B.mean()

    def clear_statistics(self) -> None:
        """Forget the balance loss and the counts of the last forward pass."""
        self.balance_loss_B = self.routed_tokens_N = None

    def _given_weights(self, num_sequences: int) -> Tensor | None:
        if self.router != "given" or self.num_experts == 0:
            return None
        return self.routing_context.weights_for(num_sequences, self.num_experts, self.lora_A)

    def start_collecting(self) -> None:
        """Start the running mean of the input over real tokens at zero.

        The means of P x and A_i x are P and A_i times the mean of x, so this sum and a token count
        are all that embeddings need. They are kept in float64, without synchronising the device.
        """
        self._collecting = True
        self._input_sum_D = self._input_tokens = None

    def stop_collecting(self) -> None:
        """Stop adding to the mean; it stays readable until the next start."""
        self._collecting = False

    @contextmanager
    def collecting(self) -> Iterator[HMoLELinear]:
        """Collect the mean of the input over all forward passes inside the `with` block."""
        self.start_collecting()
        try:
            yield self
        finally:
            self.stop_collecting()

    def _collect(self, x_TD: Tensor, token_mask_T: Tensor | None) -> None:
        if token_mask_T is None:
            tokens = torch.tensor(x_TD.shape[0], device=x_TD.device)
        else:
            x_TD = x_TD.masked_fill(~token_mask_T.unsqueeze(1), 0.0)
            tokens = token_mask_T.sum()
        sum_D = x_TD.sum(0, dtype=torch.float64)
        if self._input_sum_D is not None and self._input_tokens is not None:
            sum_D, tokens = sum_D + self._input_sum_D, tokens + self._input_tokens
        self._input_sum_D, self._input_tokens = sum_D, tokens

    def input_mean(self) -> Tensor:
        """Return the mean of x over all real tokens collected, shape (d_in), float64.

        Raises
        ------
        FedamoleError
            If no real token has been seen since `start_collecting`.
        """
        if self._input_sum_D is None or self._input_tokens is None or not self._input_tokens.item():
            raise FedamoleError("embeddings need at least one real token; none has been collected")
        return self._input_sum_D / self._input_tokens

    def token_means(self) -> tuple[Tensor, Tensor]:
        """Return the client embedding (r) and the embeddings of its routed experts (N, r), float32.

        Under ZeRO-3 the parameters are whole only while they are gathered; there, read `input_mean`
        and call `embed` with gathered parameters.

        Raises
        ------
        FedamoleError
            If no real token has been collected, or the layer has no token projection.
        """
        if self.token_proj is None:
            raise FedamoleError(
                f"a layer of num_experts={self.num_experts} and router={self.router!r} has no "
                'embeddings; they need routed experts and the router "embedding"'
            )
        return embed(self.input_mean(), self.lora_A[: self.num_experts], self.token_proj)

    def __getstate__(self) -> dict[str, Any]:
        # The balance loss hangs on the graph of the last pass, which cannot be copied or pickled.
        return {**self.__dict__, "balance_loss_B": None, "routed_tokens_N": None}

    def extra_repr(self) -> str:
        """Return the arguments for `repr`."""
        return (
            f"rank={self.rank}, alpha={self.alpha}, num_experts={self.num_experts}, "
            f"top_k={self.top_k}, dropout={self.dropout}, shared_expert={self.shared_expert}, "
            f"router={self.router!r}, frozen_experts={self.frozen_experts}"
        )


@torch.no_grad()
def embed(mean_D: Tensor, lora_A: Tensor, token_proj: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean token embedding and the mean embedding of every expert given.

    mean_t(P x) = P mean_t(x) and mean_t(A_i x) = A_i mean_t(x), computed in float64.

    Parameters
    ----------
    mean_D
        Mean of x over the tokens, shape (d_in).
    lora_A
        The experts to embed, shape (N, r, d_in): without the shared one.
    token_proj
        P, shape (r, d_in).

    Returns
    -------
    tuple of Tensor
        P mean, shape (r), and A_i mean, shape (N, r), both float32.
    """
    mean_D = mean_D.to(torch.float64)
    client_R = token_proj.to(torch.float64) @ mean_D
    experts_NR = lora_A.to(torch.float64) @ mean_D
    return client_R.to(torch.float32), experts_NR.to(torch.float32)


def inside_backward() -> bool:
    """Whether gradient checkpointing is recomputing this forward pass.

    A recomputed pass must leave no trace: its balance loss would keep the recomputed activations
    alive, and its tokens would be counted twice.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def check_arguments(
    base_layer: nn.Module,
    rank: int,
    alpha: float,
    num_experts: int,
    top_k: int,
    dropout: float,
    shared_expert: bool,
    router: Router = "embedding",
    frozen_experts: int = 0,
) -> None:
    """Raise the ValueError that `HMoLELinear` raises for these arguments, if any."""
    if not isinstance(base_layer, nn.Linear):
        raise ValueError(f"base_layer must be nn.Linear, got {type(base_layer).__name__}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if num_experts < 0:
        raise ValueError(f"num_experts must not be negative, got {num_experts}")
    if num_experts == 0 and not shared_expert:
        raise ValueError("num_experts=0 without a shared expert leaves nothing to train")
    if router not in ROUTERS:
        raise ValueError(f"router must be one of {', '.join(ROUTERS)}, got {router!r}")
    if not 0 <= frozen_experts <= num_experts:
        raise ValueError(
            f"frozen_experts must be in 0 to num_experts={num_experts}, got {frozen_experts}"
        )
    if num_experts == 0 or router == "given":
        return
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if num_experts < top_k:
        raise ValueError(
            f"num_experts={num_experts} is less than top_k={top_k}; every token needs top_k experts"
        )
