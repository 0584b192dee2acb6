"""Routing of the HMoLE layer: which expert works on a token with which weight, and its gradients.

Three routers give the scores of the experts of a token x:

    embedding   <A_i x, P x> / sqrt(r)      arXiv:2411.19128; plugs any set of experts together
    linear      G x                         a plain trained gate, one row per expert
    given       none: the weights q come from outside, one set for each sequence

With scores, p = softmax(scores), S = top-k of p and q_i = p_i / sum_S p_j, or 0 outside of S. The
functions work on the columns of :mod:`fedamole.hmole_function`, which calls them.
"""

# Axes: B = sequences, T = tokens (of all sequences), D = d_in, R = rank, N = routed experts,
#       K = top-k, X = columns of the first product: those of A, then those of the router

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Router = Literal["embedding", "linear", "given"]
ROUTERS: tuple[Router, ...] = get_args(Router)


@dataclass
class RoutingContext:
    """What the layers of one model must know about the batch that runs through them.

    Whoever runs the model sets it before each forward pass (for the mask `hmole_peft` does so by
    itself). Gradient checkpointing reads it once more when it recomputes a layer: run the backward
    pass of a batch before the forward pass of the next.
    """

    token_mask_BT: Tensor | None = None
    """True where a token is real, one row per sequence; None when every token is."""
    expert_weights_BN: Tensor | None = None
    """Weights of the routed experts for all tokens of a sequence, read by the router "given" alone:
    one row per sequence, or one row for all. No gradient flows into them."""

    def mask_for(self, x: Tensor) -> Tensor | None:
        """Return the mask of an input of shape (T, D) or (B, ..., D) on its device.

        Raises
        ------
        ValueError
            If it does not have one value per token.
        """
        mask_BT = self.token_mask_BT
        if mask_BT is None:
            return None
        matches = mask_BT.numel() == x.shape[:-1].numel() and (
            x.dim() == 2 or mask_BT.shape[0] == x.shape[0]
        )
        if not matches:
            raise ValueError(
                f"token mask of shape {tuple(mask_BT.shape)} does not fit an input of shape "
                f"{tuple(x.shape)}; it needs one value per token"
            )
        return mask_BT.to(device=x.device, dtype=torch.bool)

    def weights_for(self, num_sequences: int, num_experts: int, like: Tensor) -> Tensor:
        """Return the weights, shape (B, N), in the dtype and on the device of `like`.

        Raises
        ------
        ValueError
            If they are missing, require a gradient, or do not have that shape.
        """
        weights_BN = self.expert_weights_BN
        if weights_BN is None:
            raise ValueError(
                'router "given" needs routing_context.expert_weights_BN, the weights of the '
                f"{num_experts} experts for each sequence; they have not been set"
            )
        if weights_BN.requires_grad:
            raise ValueError("expert_weights_BN requires a gradient, but none flows into it")
        if weights_BN.shape not in {(num_sequences, num_experts), (1, num_experts)}:
            raise ValueError(
                f"expert_weights_BN of shape {tuple(weights_BN.shape)} does not fit "
                f"{num_sequences} sequences and {num_experts} experts; allowed: "
                f"({num_sequences}, {num_experts}), or (1, {num_experts}) for all sequences"
            )
        return weights_BN.to(like).expand(num_sequences, num_experts)


class Mixture(NamedTuple):
    """Sizes and constants of one HMoLE layer."""

    num_experts: int
    """N, the routed experts."""
    rank: int
    """R, the rows of every A_i."""
    top_k: int
    """Experts a token is sent to; at most N. Of no effect on the router "given"."""
    scale: float
    """s = alpha / r."""
    router: Router = "embedding"
    """What the weights of the routed experts follow from."""
    frozen_experts: int = 0
    """How many of the routed experts, the last ones, get a gradient of zero in A and B."""

    @property
    def frozen(self) -> slice:
        """Rows of A and B that get a gradient of zero."""
        return slice(self.num_experts - self.frozen_experts, self.num_experts)


class Routing(NamedTuple):
    """What the backward pass needs of a routing."""

    q_NT: Tensor
    """Weights of the experts; 0 where an expert does not work on a token."""
    p_NT: Tensor | None
    """Probabilities of the experts; None where q was given."""
    slope_NB: Tensor | None
    """Slope of the balance loss in p at a real token; None where q was given."""


def route(
    projected_XT: Tensor,
    expert_weights_BN: Tensor | None,
    token_mask_T: Tensor | None,
    num_sequences: int,
    mixture: Mixture,
    held_B: Tensor | None = None,
) -> tuple[Routing, Tensor, Tensor]:
    """Weigh the experts of every token.

    Parameters
    ----------
    projected_XT
        Columns of the first product, those of the router last.
    expert_weights_BN
        The weights themselves, for the router "given"; otherwise None.
    token_mask_T
        True where a token is real; None when every token is.
    num_sequences
        B; the tokens of a sequence are contiguous and all sequences have T / B tokens.
    mixture
        Sizes of the layer.
    held_B
        How many of the experts each sequence has, the first ones, int64; None for all. The others
        get a probability of 0.

    Returns
    -------
    routing
        Weights, and what `route_backward` needs.
    balance_loss_B
        N * sum_i mean_t(p_i) * f_i per sequence over its real tokens; 0 for a sequence without one
        and for given weights. No gradient flows through f, the fraction of (token, slot) pairs
        routed to expert i.
    routed_tokens_NB
        Real tokens of each sequence sent to each expert, int64; 0 for given weights.
    """
    if expert_weights_BN is not None:
        tokens = projected_XT.shape[1] // num_sequences
        q_NT = expert_weights_BN.T.repeat_interleave(tokens, dim=1)
        nothing_NB = torch.zeros_like(expert_weights_BN.T, dtype=torch.int64)
        return Routing(q_NT, None, None), q_NT.new_zeros(num_sequences), nothing_NB
    p_NT, selected_NT = _select(projected_XT, mixture, held_B)
    q_NT = p_NT * selected_NT
    q_NT /= q_NT.sum(0)
    loss_B, slope_NB, routed_NB = _balance(
        p_NT, selected_NT, token_mask_T, num_sequences, mixture.top_k, held_B
    )
    return Routing(q_NT, p_NT, slope_NB), loss_B, routed_NB


def route_backward(
    routing: Routing,
    grad_q_NT: Tensor,
    grad_loss_B: Tensor,
    projected_XT: Tensor,
    token_mask_T: Tensor | None,
    mixture: Mixture,
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of the columns that scores come from; for routings with p only.

    Returns
    -------
    tuple of Tensor
        Of the expert embeddings A_i x, shape (N, R, T), or None where the router does not read
        them; and of the columns of the router, P x (R, T) or G x (N, T).
    """
    q_NT, p_NT, slope_NB = routing
    assert p_NT is not None
    assert slope_NB is not None
    grad_p_NT = _balance_backward(grad_loss_B, slope_NB, token_mask_T, p_NT)
    grad_scores_NT = _softmax_backward(q_NT, grad_q_NT) + _softmax_backward(p_NT, grad_p_NT)
    if mixture.router == "linear":
        return None, grad_scores_NT
    return _embedding_scores_backward(grad_scores_NT, projected_XT, mixture)


def _embeddings(projected_XT: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Return the expert embeddings e, shape (N, R, T), and the token embeddings t, (R, T)."""
    num_experts, rank = mixture.num_experts, mixture.rank
    experts_NRT = projected_XT[: num_experts * rank].unflatten(0, (num_experts, rank))
    return experts_NRT, projected_XT[-rank:]


def _scores(projected_XT: Tensor, mixture: Mixture) -> Tensor:
    """Return the scores of the experts, shape (N, T)."""
    if mixture.router == "linear":
        return projected_XT[-mixture.num_experts :]
    experts_NRT, token_RT = _embeddings(projected_XT, mixture)
    return (experts_NRT * token_RT).sum(1).mul_(mixture.rank**-0.5)


def _select(projected_XT: Tensor, mixture: Mixture, held_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return p and the 0/1 selection of the top k, both of shape (N, T)."""
    if mixture.num_experts == 0:
        nothing_NT = projected_XT.new_empty(0, projected_XT.shape[1])
        return nothing_NT, nothing_NT
    scores_NT = _scores(projected_XT, mixture)
    if held_B is not None:
        experts_N1 = torch.arange(len(scores_NT), device=scores_NT.device).unsqueeze(1)
        absent_NB1 = (experts_N1 >= held_B).unsqueeze(2)
        scores_NBT = scores_NT.unflatten(1, (len(held_B), -1))
        scores_NT = scores_NBT.masked_fill(absent_NB1, -torch.inf).flatten(1)
    top_KT = scores_NT.topk(mixture.top_k, dim=0, sorted=False).indices
    selected_NT = torch.zeros_like(scores_NT).scatter_(0, top_KT, 1.0)
    return scores_NT.softmax(0), selected_NT


def _embedding_scores_backward(
    grad_scores_NT: Tensor, projected_XT: Tensor, mixture: Mixture
) -> tuple[Tensor, Tensor]:
    """Return the gradients of e, shape (N, R, T), and of t, shape (R, T); (0, T) if N = 0."""
    if mixture.num_experts == 0:
        return grad_scores_NT.unsqueeze(1), grad_scores_NT
    experts_NRT, token_RT = _embeddings(projected_XT, mixture)
    grad_N1T = (grad_scores_NT * mixture.rank**-0.5).unsqueeze(1)
    return grad_N1T * token_RT, (grad_N1T * experts_NRT).sum(0)


def _softmax_backward(p_NT: Tensor, grad_NT: Tensor) -> Tensor:
    """Return p * (grad - <p, grad>).

    It serves q as well: q is the softmax over the selected experts, and 0 elsewhere.
    """
    weighted_NT = p_NT * grad_NT
    return weighted_NT - p_NT * weighted_NT.sum(0)


def _balance(
    p_NT: Tensor,
    selected_NT: Tensor,
    token_mask_T: Tensor | None,
    num_sequences: int,
    top_k: int,
    held_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss per sequence, its slope in p at a real token and the counts, both (N, B)."""
    num_experts, num_tokens = p_NT.shape
    held = num_experts if held_B is None else held_B
    p_NBT = p_NT.unflatten(1, (num_sequences, num_tokens // num_sequences))
    selected_NBT = selected_NT.view_as(p_NBT)
    if token_mask_T is None:
        tokens_B: Tensor | int = p_NBT.shape[2]
    else:
        mask_BT = token_mask_T.view(p_NBT.shape[1:]).to(p_NT.dtype)
        tokens_B = mask_BT.sum(1).clamp_(min=1.0)
        p_NBT, selected_NBT = p_NBT * mask_BT, selected_NBT * mask_BT
    counts_NB = selected_NBT.sum(2)
    slope_NB = counts_NB * (held / top_k) / (tokens_B * tokens_B)
    loss_B = (p_NBT.sum(2) * slope_NB).sum(0)
    return loss_B, slope_NB, counts_NB.to(torch.int64)


def _balance_backward(
    grad_loss_B: Tensor, slope_NB: Tensor, token_mask_T: Tensor | None, p_NT: Tensor
) -> Tensor:
    """Return the gradient that the balance loss sends to p, shape (N, T)."""
    num_experts, num_sequences = slope_NB.shape
    grad_NB1 = (grad_loss_B * slope_NB).unsqueeze(2)
    grad_NBT = grad_NB1.expand(num_experts, num_sequences, p_NT.shape[1] // num_sequences)
    if token_mask_T is not None:
        grad_NBT = grad_NBT * token_mask_T.view(grad_NBT.shape[1:])
    return grad_NBT.reshape_as(p_NT)
