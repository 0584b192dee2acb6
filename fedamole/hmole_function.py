"""The arithmetic of the HMoLE layer, as two autograd functions with hand-written backward passes.

`project` runs before the frozen base layer and `combine` after it, so that the base product itself
stays an ordinary module call (ZeRO-3 and quantised layers depend on that):

    x, h, d = project(x)          h = [A; P] x and, with dropout, d = A drop(x)
    y       = combine(W0 x, h, d)

Between them they keep x and activations of a few columns per token. Parameters are saved as the
leaves they are, never as stacked copies: ZeRO-3 gathers a leaf again for the backward pass.
Everything is computed in the dtype of the parameters, whatever the dtype of x or autocast says.
"""

# Axes: B = sequences, T = tokens (of all sequences), D = d_in, O = d_out, R = rank,
#       N = routed experts, M = experts held (N, and the shared one last), L = M * R,
#       X = columns of h: L + R without dropout; N * R + R with it

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Mixture(NamedTuple):
    """Sizes and constants of one HMoLE layer."""

    num_experts: int
    """N, the routed experts."""
    rank: int
    """R, the rows of every A_i."""
    top_k: int
    """Experts a token is sent to; at most N."""
    scale: float
    """s = alpha / r."""


def dropout_mask(shape: torch.Size, dropout: float, seed: int, like: Tensor) -> Tensor:
    """Return the mask of inverted dropout: 0 with probability `dropout`, else 1 / (1 - dropout).

    A pure function of its arguments, so that the backward pass draws the mask again instead of
    keeping one value per input element.
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    mask = torch.empty(shape, dtype=like.dtype, device=like.device)
    return mask.bernoulli_(1.0 - dropout, generator=generator).mul_(1.0 / (1.0 - dropout))


def project(
    x_TD: Tensor,
    lora_A: Tensor,
    token_proj: Tensor | None,
    mixture: Mixture,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Project the tokens on every A and on P in one product.

    Parameters
    ----------
    x_TD
        Tokens, any floating dtype.
    lora_A
        Shape (M, R, D), the shared expert last.
    token_proj
        P, shape (R, D); None for a layer without routed experts.
    mixture
        Sizes of the layer.
    dropout
        Probability of dropping an element of x on the LoRA path, in [0, 1). Routing never drops.
    seed
        Seed of the dropout mask; unused without dropout.

    Returns
    -------
    x_TD
        The input again. Give this one to the base layer: its gradient then arrives here and is
        added to inside a matrix product instead of in a pass of its own.
    projected_TX
        All A x and P x without dropout; with dropout only the routed experts' A x, and P x.
    dropped_TL
        All A drop(x); None without dropout.
    """
    through_TD, projected_TX, dropped_TL = _Project.apply(
        x_TD, lora_A, token_proj, mixture, dropout, seed
    )
    return (through_TD if x_TD.requires_grad else x_TD), projected_TX, dropped_TL


def combine(
    base_TO: Tensor,
    projected_TX: Tensor,
    dropped_TL: Tensor | None,
    lora_B: Tensor,
    token_mask_T: Tensor | None,
    num_sequences: int,
    mixture: Mixture,
) -> tuple[Tensor, Tensor, Tensor]:
    """Route the tokens and add the weighted experts to the output of the base layer.

    Parameters
    ----------
    base_TO
        W0 x. Its dtype is the dtype of the output.
    projected_TX, dropped_TL
        As returned by `project`.
    lora_B
        Shape (M, O, R), the shared expert last.
    token_mask_T
        True where a token is real; None when every token is.
    num_sequences
        B; the tokens of a sequence are contiguous and all sequences have T / B tokens.
    mixture
        Sizes of the layer.

    Returns
    -------
    y_TO
        The output of the layer.
    balance_loss_B
        N * sum_i mean_t(p_i) * f_i per sequence over its real tokens; 0 for a sequence without one.
        No gradient flows through f, the fraction of (token, slot) pairs routed to expert i.
    routed_tokens_N
        Real tokens sent to each expert, int64.
    """
    return _Combine.apply(
        base_TO, projected_TX, dropped_TL, lora_B, token_mask_T, num_sequences, mixture
    )


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Return a context in which autocast lowers no precision on the device of `tensor`."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def _stacked_projections(lora_A: Tensor, token_proj: Tensor | None) -> Tensor:
    """Return [A; P] with one row per column of the projection."""
    rows_LD = lora_A.flatten(0, 1)
    return rows_LD if token_proj is None else torch.cat((rows_LD, token_proj))


def _stacked_outputs(lora_B: Tensor) -> Tensor:
    """Return all B_i side by side and transposed, shape (L, O)."""
    return lora_B.transpose(1, 2).reshape(-1, lora_B.shape[1])


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        lora_A: Tensor,
        token_proj: Tensor | None,
        mixture: Mixture,
        dropout: float,
        seed: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.save_for_backward(x_TD, lora_A, token_proj)
        ctx.set_materialize_grads(False)
        ctx.routed_A = mixture.num_experts if dropout else lora_A.shape[0]
        ctx.dropout, ctx.seed = dropout, seed
        with _full_precision(x_TD):
            tokens_TD = x_TD.to(lora_A.dtype)
            projected_TX = tokens_TD @ _stacked_projections(lora_A[: ctx.routed_A], token_proj).T
            dropped_TL = None
            if dropout:
                mask_TD = dropout_mask(tokens_TD.shape, dropout, seed, tokens_TD)
                dropped_TL = mask_TD.mul_(tokens_TD) @ lora_A.flatten(0, 1).T
        return x_TD.view_as(x_TD), projected_TX, dropped_TL

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_TD: Tensor | None, grad_TX: Tensor | None, grad_TL: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_TD, lora_A, token_proj = ctx.saved_tensors
        with _full_precision(x_TD):
            grads = _project_backward(ctx, x_TD, lora_A, token_proj, grad_TD, grad_TX, grad_TL)
        return (*grads, None, None, None)


def _project_backward(
    ctx: Any,
    x_TD: Tensor,
    lora_A: Tensor,
    token_proj: Tensor | None,
    grad_TD: Tensor | None,
    grad_TX: Tensor | None,
    grad_TL: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_x, needs_A, needs_P = ctx.needs_input_grad[:3]
    tokens_TD = x_TD.to(lora_A.dtype)
    grad_x, grad_A, grad_P = grad_TD, None, None
    if grad_TX is not None:
        if needs_x:
            stacked_XD = _stacked_projections(lora_A[: ctx.routed_A], token_proj)
            grad_x = _add_product(grad_x, grad_TX, stacked_XD)
        if needs_A or needs_P:
            grad_XD = grad_TX.T @ tokens_TD
            rows = ctx.routed_A * lora_A.shape[1]
            grad_A = grad_XD[:rows].unflatten(0, (ctx.routed_A, -1)) if ctx.routed_A else None
            grad_P = grad_XD[rows:] if token_proj is not None else None
    if grad_TL is not None:
        mask_TD = dropout_mask(tokens_TD.shape, ctx.dropout, ctx.seed, tokens_TD)
        if needs_x:
            through_TD = (grad_TL @ lora_A.flatten(0, 1)).mul_(mask_TD)
            grad_x = through_TD if grad_x is None else through_TD.add_(grad_x)
        if needs_A:
            routed_NRD = grad_A
            grad_A = (grad_TL.T @ mask_TD.mul_(tokens_TD)).view_as(lora_A)
            if routed_NRD is not None:
                grad_A[: ctx.routed_A] += routed_NRD
    return grad_x.to(x_TD.dtype) if needs_x and grad_x is not None else None, grad_A, grad_P


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return total + left @ right in the dtype of the factors."""
    return left @ right if total is None else torch.addmm(total.to(left.dtype), left, right)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base_TO: Tensor,
        projected_TX: Tensor,
        dropped_TL: Tensor | None,
        lora_B: Tensor,
        token_mask_T: Tensor | None,
        num_sequences: int,
        mixture: Mixture,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with _full_precision(projected_TX):
            p_TN, selected_TN = _route(projected_TX, mixture)
            q_TN = p_TN * selected_TN
            q_TN /= q_TN.sum(1, keepdim=True)
            loss_B, slope_BN, routed_N = _balance(
                p_TN, selected_TN, token_mask_T, num_sequences, mixture.top_k
            )
            lora_TMR = _lora_activations(projected_TX, dropped_TL, lora_B)
            weighted_TMR = lora_TMR * _weights(q_TN, lora_B, mixture.scale)
            y_TO = torch.addmm(
                base_TO.to(lora_B.dtype), weighted_TMR.flatten(1), _stacked_outputs(lora_B)
            ).to(base_TO.dtype)
        ctx.mixture = mixture
        ctx.save_for_backward(projected_TX, dropped_TL, lora_B, p_TN, q_TN, slope_BN, token_mask_T)
        ctx.mark_non_differentiable(routed_N)
        return y_TO, loss_B, routed_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_TO: Tensor, grad_loss_B: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        with _full_precision(grad_TO):
            grads = _combine_backward(ctx.mixture, ctx.saved_tensors, grad_TO, grad_loss_B)
        return (grad_TO, *grads, None, None, None)


def _combine_backward(
    mixture: Mixture, saved: tuple[Tensor, ...], grad_TO: Tensor, grad_loss_B: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradients of `projected_TX`, `dropped_TL` and `lora_B`."""
    projected_TX, dropped_TL, lora_B, p_TN, q_TN, slope_BN, token_mask_T = saved
    grad_TO = grad_TO.to(lora_B.dtype)
    num_experts = mixture.num_experts
    lora_TMR = _lora_activations(projected_TX, dropped_TL, lora_B)
    weights_TM1 = _weights(q_TN, lora_B, mixture.scale)
    grad_OL = grad_TO.T @ (lora_TMR * weights_TM1).flatten(1)
    grad_B = grad_OL.view(-1, *lora_TMR.shape[1:]).transpose(0, 1).contiguous()
    grad_TMR = (grad_TO @ _stacked_outputs(lora_B).T).view_as(lora_TMR)
    grad_q_TN = (grad_TMR[:, :num_experts] * lora_TMR[:, :num_experts]).sum(2) * mixture.scale
    grad_TMR *= weights_TM1

    grad_p_TN = _balance_backward(grad_loss_B, slope_BN, token_mask_T, p_TN)
    grad_scores_TN = _softmax_backward(q_TN, grad_q_TN) + _softmax_backward(p_TN, grad_p_TN)
    grad_routing = _scores_backward(grad_scores_TN, projected_TX, mixture)
    if dropped_TL is not None:
        return torch.cat(grad_routing, 1), grad_TMR.flatten(1), grad_B
    grad_TL = grad_TMR.flatten(1)
    grad_TL[:, : num_experts * mixture.rank] += grad_routing[0]
    return torch.cat((grad_TL, grad_routing[1]), 1), None, grad_B


def _lora_activations(projected_TX: Tensor, dropped_TL: Tensor | None, lora_B: Tensor) -> Tensor:
    """Return A_i drop(x) of every expert held, shape (T, M, R)."""
    num_held, _, rank = lora_B.shape
    if dropped_TL is None:
        dropped_TL = projected_TX[:, : num_held * rank]
    return dropped_TL.unflatten(1, (num_held, rank))


def _weights(q_TN: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Return s q for the routed experts and s for the shared one, shape (T, M, 1)."""
    num_shared = lora_B.shape[0] - q_TN.shape[1]
    return nn.functional.pad(q_TN, (0, num_shared), value=1.0).mul_(scale).unsqueeze(2)


def _embeddings(projected_TX: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Return the expert embeddings e, shape (T, N, R), and the token embeddings t, (T, 1, R)."""
    num_experts, rank = mixture.num_experts, mixture.rank
    experts_TNR = projected_TX[:, : num_experts * rank].unflatten(1, (num_experts, rank))
    return experts_TNR, projected_TX[:, -rank:].unsqueeze(1)


def _route(projected_TX: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Return p and the 0/1 selection of the top k, both of shape (T, N)."""
    if mixture.num_experts == 0:
        nothing_TN = projected_TX[:, :0]
        return nothing_TN, nothing_TN
    experts_TNR, token_T1R = _embeddings(projected_TX, mixture)
    scores_TN = (experts_TNR * token_T1R).sum(2).mul_(mixture.rank**-0.5)
    top_TK = scores_TN.topk(mixture.top_k, dim=1, sorted=False).indices
    selected_TN = torch.zeros_like(scores_TN).scatter_(1, top_TK, 1.0)
    return scores_TN.softmax(1), selected_TN


def _scores_backward(
    grad_scores_TN: Tensor, projected_TX: Tensor, mixture: Mixture
) -> tuple[Tensor, Tensor]:
    """Return the gradients of e, shape (T, N * R), and of t, shape (T, R) or (T, 0) if N = 0."""
    if mixture.num_experts == 0:
        return grad_scores_TN, grad_scores_TN
    experts_TNR, token_T1R = _embeddings(projected_TX, mixture)
    grad_TN1 = (grad_scores_TN * mixture.rank**-0.5).unsqueeze(2)
    return (grad_TN1 * token_T1R).flatten(1), (grad_TN1 * experts_TNR).sum(1)


def _softmax_backward(p_TN: Tensor, grad_TN: Tensor) -> Tensor:
    """Return p * (grad - <p, grad>).

    It serves q as well: q is the softmax over the selected experts, and 0 elsewhere.
    """
    weighted_TN = p_TN * grad_TN
    return weighted_TN - p_TN * weighted_TN.sum(1, keepdim=True)


def _balance(
    p_TN: Tensor, selected_TN: Tensor, token_mask_T: Tensor | None, num_sequences: int, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss per sequence, its slope in p at a real token (B, N), and the counts (N)."""
    num_tokens, num_experts = p_TN.shape
    p_BTN = p_TN.unflatten(0, (num_sequences, num_tokens // num_sequences))
    selected_BTN = selected_TN.view_as(p_BTN)
    if token_mask_T is None:
        tokens_B1: Tensor | int = p_BTN.shape[1]
    else:
        mask_BT1 = token_mask_T.view(num_sequences, -1, 1).to(p_TN.dtype)
        tokens_B1 = mask_BT1.sum(1).clamp_(min=1.0)
        p_BTN, selected_BTN = p_BTN * mask_BT1, selected_BTN * mask_BT1
    counts_BN = selected_BTN.sum(1)
    slope_BN = counts_BN * (num_experts / top_k) / (tokens_B1 * tokens_B1)
    loss_B = (p_BTN.sum(1) * slope_BN).sum(1)
    return loss_B, slope_BN, counts_BN.sum(0).to(torch.int64)


def _balance_backward(
    grad_loss_B: Tensor, slope_BN: Tensor, token_mask_T: Tensor | None, p_TN: Tensor
) -> Tensor:
    """Return the gradient that the balance loss sends to p, shape (T, N)."""
    num_sequences, num_experts = slope_BN.shape
    grad_B1N = (grad_loss_B.unsqueeze(1) * slope_BN).unsqueeze(1)
    grad_BTN = grad_B1N.expand(num_sequences, p_TN.shape[0] // num_sequences, num_experts)
    if token_mask_T is not None:
        grad_BTN = grad_BTN * token_mask_T.view(num_sequences, -1, 1)
    return grad_BTN.reshape_as(p_TN)
