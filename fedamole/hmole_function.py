"""The arithmetic of the HMoLE layer, as two autograd functions with hand-written backward passes.

`project` runs before the frozen base layer and `combine` after it, so that the base product itself
stays an ordinary module call (ZeRO-3 and quantised layers depend on that):

    x, h, d = project(x)          h = [A; P] x and, with dropout, d = A drop(x)
    y       = combine(W0 x, h, d)

P stands for the weight of the router: a token projection (r, d_in), a gate (N, d_in), or nothing.

Between them they keep x and activations of a few columns per token. Parameters are saved as the
leaves they are, never as stacked copies: ZeRO-3 gathers a leaf again for the backward pass.
Everything is computed in the dtype of the parameters, whatever the dtype of x or autocast says.
"""

# Axes: B = sequences, T = tokens (of all sequences), D = d_in, O = d_out, R = rank,
#       N = routed experts, M = experts held (N, and the shared one last), L = M * R,
#       S = rows of the router's weight (R, N or 0), X = columns of h: L + S without dropout;
#       with it N * R + S where the router reads A x, else S

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedamole.routing import Mixture, Routing, route, route_backward


def dropped_elements(shape: torch.Size, dropout: float, seed: int, device: torch.device) -> Tensor:
    """Return True where an element is dropped, with probability `dropout`.

    A pure function of its arguments, so that the backward pass draws the mask again instead of
    keeping one value per input element. Every element takes 16 random bits, the probability is
    therefore exact to 2^-17; drawing them by the word is six times faster than `bernoulli_`.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    words = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    threshold = round(dropout * 2**16) - 2**15
    return (words.view(torch.int16)[: shape.numel()] < threshold).view(shape)


def project(
    x_TD: Tensor,
    lora_A: Tensor,
    router_weight: Tensor | None,
    mixture: Mixture,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Project the tokens on every A and on the weight of the router in one product.

    Parameters
    ----------
    x_TD
        Tokens, any floating dtype.
    lora_A
        Shape (M, R, D), the shared expert last.
    router_weight
        P, shape (R, D), or the gate, shape (N, D); None for a router without parameters.
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
    projected_XT
        All A x and P x without dropout; with dropout only what the router reads: P x, and before
        it the routed experts' A x if it embeds. Tokens run along the last axis: everything between
        the two products is then vectorised over them.
    dropped_LT
        All A drop(x); None without dropout.
    """
    through_TD, projected_XT, dropped_LT = _Project.apply(
        x_TD, lora_A, router_weight, mixture, dropout, seed
    )
    return (through_TD if x_TD.requires_grad else x_TD), projected_XT, dropped_LT


def combine(
    base_TO: Tensor,
    projected_XT: Tensor,
    dropped_LT: Tensor | None,
    lora_B: Tensor,
    token_mask_T: Tensor | None,
    num_sequences: int,
    mixture: Mixture,
    expert_weights_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Route the tokens and add the weighted experts to the output of the base layer.

    Parameters
    ----------
    base_TO
        W0 x. Its dtype is the dtype of the output.
    projected_XT, dropped_LT
        As returned by `project`.
    lora_B
        Shape (M, O, R), the shared expert last.
    token_mask_T
        True where a token is real; None when every token is.
    num_sequences
        B; the tokens of a sequence are contiguous and all sequences have T / B tokens.
    mixture
        Sizes of the layer.
    expert_weights_BN
        Weights of the routed experts; None where they follow from scores.

    Returns
    -------
    y_TO
        The output of the layer.
    balance_loss_B, routed_tokens_N
        As :func:`fedamole.routing.route` gives them.
    """
    return _Combine.apply(
        base_TO,
        projected_XT,
        dropped_LT,
        lora_B,
        token_mask_T,
        num_sequences,
        mixture,
        expert_weights_BN,
    )


def _full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast lowers no precision on the device of `tensor`."""
    device_type = tensor.device.type
    # Entering autocast costs as much as a product of a short sequence.
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type=device_type, enabled=False)


def _stacked_projections(lora_A: Tensor, router_weight: Tensor | None) -> Tensor:
    """Return [A; P] with one row per column of the projection."""
    rows_LD = lora_A.flatten(0, 1)
    return rows_LD if router_weight is None else torch.cat((rows_LD, router_weight))


def _stacked_outputs(lora_B: Tensor) -> Tensor:
    """Return all B_i side by side and transposed, shape (L, O)."""
    return lora_B.transpose(1, 2).reshape(-1, lora_B.shape[1])


def _num_projected(lora_A: Tensor, mixture: Mixture, dropout: float) -> int:
    """Return how many A the first product takes: with dropout only those that the router reads."""
    if not dropout:
        return lora_A.shape[0]
    return mixture.num_experts if mixture.router == "embedding" else 0


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        lora_A: Tensor,
        router_weight: Tensor | None,
        mixture: Mixture,
        dropout: float,
        seed: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.save_for_backward(x_TD, lora_A, router_weight)
        ctx.set_materialize_grads(False)
        ctx.num_projected = _num_projected(lora_A, mixture, dropout)
        ctx.frozen = mixture.frozen if mixture.frozen_experts else None
        ctx.dropout, ctx.seed = dropout, seed
        with _full_precision(x_TD):
            tokens_TD = x_TD.to(lora_A.dtype)
            stacked_XD = _stacked_projections(lora_A[: ctx.num_projected], router_weight)
            projected_XT = _transposed(tokens_TD @ stacked_XD.T)
            dropped_LT = None
            if dropout:
                drop_TD = dropped_elements(x_TD.shape, dropout, seed, x_TD.device)
                kept_TD = torch.where(drop_TD, tokens_TD.new_zeros(()), tokens_TD)
                dropped_LT = _transposed(kept_TD @ lora_A.flatten(0, 1).T)
                dropped_LT /= 1.0 - dropout
        return x_TD.view_as(x_TD), projected_XT, dropped_LT

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_TD: Tensor | None, grad_XT: Tensor | None, grad_LT: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # Gradient checkpointing lets the saved tensors be unpacked once.
        saved = ctx.saved_tensors
        with _full_precision(saved[0]):
            grads = _project_backward(ctx, saved, grad_TD, grad_XT, grad_LT)
        return (*grads, None, None, None)


def _project_backward(
    ctx: Any,
    saved: tuple[Tensor, ...],
    grad_TD: Tensor | None,
    grad_XT: Tensor | None,
    grad_LT: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, A and the weight of the router."""
    x_TD, lora_A, router_weight = saved
    needs_x, needs_parameters = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    tokens_TD = x_TD.to(lora_A.dtype)
    grad_A = grad_P = None
    if grad_XT is not None:
        if needs_x:
            stacked_XD = _stacked_projections(lora_A[: ctx.num_projected], router_weight)
            grad_TD = _add_product(grad_TD, _transposed(grad_XT), stacked_XD)
        if needs_parameters:
            rows = ctx.num_projected * lora_A.shape[1]
            grad_XD = grad_XT @ tokens_TD
            grad_A = grad_XD[:rows].view(ctx.num_projected, *lora_A.shape[1:])
            grad_P = grad_XD[rows:] if router_weight is not None else None
    if grad_LT is not None:
        grad_LT = grad_LT / (1.0 - ctx.dropout)
        drop_TD = dropped_elements(x_TD.shape, ctx.dropout, ctx.seed, x_TD.device)
        if needs_x:
            path_TD = _transposed(grad_LT) @ lora_A.flatten(0, 1)
            path_TD.masked_fill_(drop_TD, 0.0)
            grad_TD = path_TD if grad_TD is None else path_TD.add_(grad_TD)
        if needs_parameters:
            kept_TD = torch.where(drop_TD, tokens_TD.new_zeros(()), tokens_TD)
            path_MRD = (grad_LT @ kept_TD).view_as(lora_A)
            if grad_A is not None:
                path_MRD[: ctx.num_projected] += grad_A
            grad_A = path_MRD
    if grad_A is not None and ctx.frozen is not None:
        grad_A[ctx.frozen] = 0.0
    if grad_TD is not None:
        grad_TD = grad_TD.to(x_TD.dtype)
    return grad_TD if needs_x else None, grad_A, grad_P


def _transposed(matrix: Tensor) -> Tensor:
    # The products with few columns run a quarter faster on rows of tokens, a copy included.
    return matrix.T.contiguous()


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return total + left @ right in the dtype of the factors, in the memory of `total`.

    Only for tensors that nn.Linear has just made, its output or the gradient of its input: they
    are held by nobody else, and a copy would cost as much as the product.
    """
    if total is None:
        return left @ right
    return total.detach().to(left.dtype).addmm_(left, right)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base_TO: Tensor,
        projected_XT: Tensor,
        dropped_LT: Tensor | None,
        lora_B: Tensor,
        token_mask_T: Tensor | None,
        num_sequences: int,
        mixture: Mixture,
        expert_weights_BN: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with _full_precision(projected_XT):
            routing, loss_B, routed_N = route(
                projected_XT, expert_weights_BN, token_mask_T, num_sequences, mixture
            )
            lora_MRT = _lora_activations(projected_XT, dropped_LT, lora_B)
            weighted_LT = (lora_MRT * _weights(routing.q_NT, lora_B, mixture.scale)).flatten(0, 1)
            y_TO = _add_product(base_TO, _transposed(weighted_LT), _stacked_outputs(lora_B))
        ctx.mixture = mixture
        ctx.save_for_backward(projected_XT, dropped_LT, lora_B, token_mask_T, *routing)
        ctx.mark_non_differentiable(routed_N)
        return y_TO.to(base_TO.dtype), loss_B, routed_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_TO: Tensor, grad_loss_B: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        with _full_precision(grad_TO):
            grads = _combine_backward(ctx.mixture, ctx.saved_tensors, grad_TO, grad_loss_B)
        return (grad_TO, *grads, None, None, None, None)


def _combine_backward(
    mixture: Mixture, saved: tuple[Tensor, ...], grad_TO: Tensor, grad_loss_B: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return the gradients of `projected_XT`, `dropped_LT` and `lora_B`."""
    projected_XT, dropped_LT, lora_B, token_mask_T = saved[:4]
    routing = Routing(*saved[4:])
    grad_TO = grad_TO.to(lora_B.dtype)
    num_experts = mixture.num_experts
    lora_MRT = _lora_activations(projected_XT, dropped_LT, lora_B)
    weights_M1T = _weights(routing.q_NT, lora_B, mixture.scale)
    grad_LO = (lora_MRT * weights_M1T).flatten(0, 1) @ grad_TO
    grad_B = grad_LO.view(*lora_MRT.shape[:2], -1).transpose(1, 2).contiguous()
    if mixture.frozen_experts:
        grad_B[mixture.frozen] = 0.0
    grad_MRT = _transposed(grad_TO @ _stacked_outputs(lora_B).T).view_as(lora_MRT)
    grad_read = None
    if routing.p_NT is not None:
        grad_q_NT = (grad_MRT[:num_experts] * lora_MRT[:num_experts]).sum(1).mul_(mixture.scale)
        grad_read = route_backward(
            routing, grad_q_NT, grad_loss_B, projected_XT, token_mask_T, mixture
        )
    grad_MRT *= weights_M1T
    return (*_column_gradients(grad_MRT, grad_read, dropped_LT is None), grad_B)


def _column_gradients(
    grad_MRT: Tensor, grad_read: tuple[Tensor | None, Tensor] | None, together: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `projected_XT` and `dropped_LT`.

    Parameters
    ----------
    grad_MRT
        Gradient of the activations of the LoRA path.
    grad_read
        What `route_backward` gives; None where no router has read anything.
    together
        Whether the router and the LoRA path share the columns of A: without dropout.
    """
    if grad_read is None:
        grad_LT = grad_MRT.flatten(0, 1)
        return (grad_LT, None) if together else (None, grad_LT)
    grad_experts_NRT, grad_ST = grad_read
    if together:
        if grad_experts_NRT is not None:
            grad_MRT[: len(grad_experts_NRT)] += grad_experts_NRT
        return torch.cat((grad_MRT.flatten(0, 1), grad_ST)), None
    if grad_experts_NRT is not None:
        grad_ST = torch.cat((grad_experts_NRT.flatten(0, 1), grad_ST))
    return grad_ST, grad_MRT.flatten(0, 1)


def _lora_activations(projected_XT: Tensor, dropped_LT: Tensor | None, lora_B: Tensor) -> Tensor:
    """Return A_i drop(x) of every expert held, shape (M, R, T)."""
    num_held, _, rank = lora_B.shape
    if dropped_LT is None:
        dropped_LT = projected_XT[: num_held * rank]
    return dropped_LT.unflatten(0, (num_held, rank))


def _weights(q_NT: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Return s q for the routed experts and s for the shared one, shape (M, 1, T)."""
    num_shared = lora_B.shape[0] - q_NT.shape[0]
    weights_MT = torch.cat((q_NT, q_NT.new_ones(num_shared, q_NT.shape[1])))
    return weights_MT.mul_(scale).unsqueeze(1)
