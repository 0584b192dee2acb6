"""The arithmetic of the HMoLE layer, as two autograd functions with hand-written backward passes.

`project` runs before the frozen base layer and `combine` after it, so that the base product itself
stays an ordinary module call (ZeRO-3 and quantised layers depend on that):

    x, h, d = project(x)          h = [A; P] x and, with dropout, d = A drop(x)
    y       = combine(W0 x, h, d)

P stands for the weight of the router: a token projection (r, d_in), a gate (N, d_in), or nothing.

Between them they keep x and activations of a few columns per token. Parameters are saved as the
leaves they are, never as stacked copies: ZeRO-3 gathers a leaf again for the backward pass.
Everything is computed in the dtype of the parameters, whatever the dtype of x or autocast says.

Packed clients (:mod:`fedamole.packed_layer`) give every parameter one more axis in front, K: the
tokens are then those of U units of equal length one after another, and each unit meets the
parameters of its client. All that lies between the products works on single tokens and does not see
the difference.
"""

# Axes: K = packed clients, U = units of them; no such axes otherwise.
#       B = sequences, T = tokens (of all sequences), D = d_in, O = d_out, R = rank,
#       N = routed experts, M = experts held (N, and the shared one last), L = M * R,
#       S = rows of the router's weight (R, N or 0), X = columns of h: L + S without dropout;
#       with it N * R + S where the router reads A x, else S.
#       In `_columns`, `_add_rows` and `_weight_gradient`: C = columns, F = features (D or O)

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedamole.routing import Mixture, Routing, route, route_backward


@dataclass(frozen=True)
class Dropout:
    """Which elements of x the LoRA path does not see.

    Attributes
    ----------
    probability
        Of dropping an element, in (0, 1).
    seeds
        One for all tokens, or one per unit.
    lengths
        For units: tokens of each sequence that its own batch would have; its mask is drawn for
        these alone, so that it does not depend on what it is packed with.
    sequences
        For units: sequences of each.
    """

    probability: float
    seeds: tuple[int, ...]
    lengths: tuple[int, ...] | None = None
    sequences: int = 1

    def elements(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return True where an element of tokens of this shape (T, D) is dropped."""
        if self.lengths is None:
            return dropped_elements(shape, self.probability, self.seeds[0], device)
        units, width = len(self.seeds), shape[-1]
        drop_UBTD = torch.zeros(
            units,
            self.sequences,
            shape[0] // (units * self.sequences),
            width,
            dtype=torch.bool,
            device=device,
        )
        for drop_BTD, seed, length in zip(drop_UBTD, self.seeds, self.lengths, strict=True):
            own = torch.Size((self.sequences, length, width))
            drop_BTD[:, :length] = dropped_elements(own, self.probability, seed, device)
        return drop_UBTD.view(shape)


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
    dropout: Dropout | None = None,
    client_U: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Project the tokens on every A and on the weight of the router in one product.

    Parameters
    ----------
    x_TD
        Tokens, any floating dtype.
    lora_A
        Shape (M, R, D), the shared expert last; of packed clients (K, M, R, D).
    router_weight
        P, shape (R, D), or the gate, shape (N, D), of packed clients with K in front; None for a
        router without parameters.
    mixture
        Sizes of the layer.
    dropout
        What is dropped on the LoRA path; None for nothing. Routing never drops.
    client_U
        Packed client of each unit; None if there is one unit of each, in order.

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
        x_TD, lora_A, router_weight, mixture, dropout, client_U
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
    held_B: Tensor | None = None,
    client_U: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Route the tokens and add the weighted experts to the output of the base layer.

    Parameters
    ----------
    base_TO
        W0 x. Its dtype is the dtype of the output.
    projected_XT, dropped_LT
        As returned by `project`.
    lora_B
        Shape (M, O, R), the shared expert last; of packed clients (K, M, O, R).
    token_mask_T
        True where a token is real; None when every token is.
    num_sequences
        B; the tokens of a sequence are contiguous and all sequences have T / B tokens.
    mixture
        Sizes of the layer.
    expert_weights_BN
        Weights of the routed experts; None where they follow from scores.
    held_B
        How many of the routed experts each sequence has, the first ones; None for all.
    client_U
        As for `project`.

    Returns
    -------
    y_TO
        The output of the layer.
    balance_loss_B, routed_tokens_NB
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
        held_B,
        client_U,
    )


def _full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast lowers no precision on the device of `tensor`."""
    device_type = tensor.device.type
    # Entering autocast costs as much as a product of a short sequence.
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type=device_type, enabled=False)


def _of_units(parameter: Tensor, client_U: Tensor | None) -> Tensor:
    """Return the parameter of each unit: its client's."""
    return parameter if client_U is None else parameter.index_select(0, client_U)


def _to_clients(
    gradient: Tensor | None, like: Tensor | None, client_U: Tensor | None
) -> Tensor | None:
    """Return the gradient of the parameter itself: the sum over the units of each client."""
    if gradient is None or like is None or client_U is None:
        return gradient
    return torch.zeros_like(like).index_add_(0, client_U, gradient)


def _stacked_projections(lora_A: Tensor, router_weight: Tensor | None) -> Tensor:
    """Return [A; P] with one row per column of the projection."""
    rows_LD = lora_A.flatten(-3, -2)
    return rows_LD if router_weight is None else torch.cat((rows_LD, router_weight), dim=-2)


def _stacked_outputs(lora_B: Tensor) -> Tensor:
    """Return all B_i side by side and transposed, shape (L, O)."""
    return lora_B.transpose(-1, -2).flatten(-3, -2)


def _num_projected(lora_A: Tensor, mixture: Mixture, dropout: Dropout | None) -> int:
    """Return how many A the first product takes: with dropout only those that the router reads."""
    if dropout is None:
        return lora_A.shape[-3]
    return mixture.num_experts if mixture.router == "embedding" else 0


def _columns(tokens_TF: Tensor, weights_CF: Tensor) -> Tensor:
    """Return the products of every token with every row of its weights, shape (C, T)."""
    if weights_CF.dim() == 2:
        # The products with few columns run a quarter faster on rows of tokens, a copy included.
        return _transposed(tokens_TF @ weights_CF.T)
    products_UCT = weights_CF @ _by_unit(tokens_TF, weights_CF).transpose(1, 2)
    return products_UCT.transpose(0, 1).flatten(1)


def _add_rows(total_TF: Tensor | None, columns_CT: Tensor, weights_CF: Tensor) -> Tensor:
    """Return total + columns^T @ weights in the dtype of the factors, in the memory of `total`.

    Only for tensors that nn.Linear has just made, its output or the gradient of its input: they
    are held by nobody else, and a copy would cost as much as the product.
    """
    if weights_CF.dim() == 2:
        rows_TC = _transposed(columns_CT)
        if total_TF is None:
            return rows_TC @ weights_CF
        return total_TF.detach().to(rows_TC.dtype).addmm_(rows_TC, weights_CF)
    rows_UTC = columns_CT.unflatten(1, (len(weights_CF), -1)).permute(1, 2, 0)
    if total_TF is None:
        return (rows_UTC @ weights_CF).flatten(0, 1)
    total_TF = total_TF.detach().to(columns_CT.dtype)
    _by_unit(total_TF, weights_CF).baddbmm_(rows_UTC, weights_CF)
    return total_TF


def _weight_gradient(columns_CT: Tensor, tokens_TF: Tensor, weights: Tensor) -> Tensor:
    """Return columns @ tokens, shape (C, F), or per unit if `weights` are."""
    if weights.dim() == 3:
        return columns_CT @ tokens_TF
    columns_UCT = columns_CT.unflatten(1, (len(weights), -1)).transpose(0, 1)
    return columns_UCT @ _by_unit(tokens_TF, weights)


def _by_unit(tokens_TF: Tensor, weights: Tensor) -> Tensor:
    """Return the tokens of each unit, shape (U, T / U, F)."""
    return tokens_TF.unflatten(0, (len(weights), -1))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        lora_A: Tensor,
        router_weight: Tensor | None,
        mixture: Mixture,
        dropout: Dropout | None,
        client_U: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # The parameters are saved, not what units take of them: that is one copy per unit.
        ctx.save_for_backward(x_TD, lora_A, router_weight, client_U)
        lora_A = _of_units(lora_A, client_U)
        if router_weight is not None:
            router_weight = _of_units(router_weight, client_U)
        ctx.set_materialize_grads(False)
        ctx.num_projected = _num_projected(lora_A, mixture, dropout)
        ctx.frozen = mixture.frozen if mixture.frozen_experts else None
        ctx.dropout = dropout
        with _full_precision(x_TD):
            tokens_TD = x_TD.to(lora_A.dtype)
            read_A = lora_A[..., : ctx.num_projected, :, :]
            projected_XT = _columns(tokens_TD, _stacked_projections(read_A, router_weight))
            dropped_LT = None
            if dropout:
                drop_TD = dropout.elements(x_TD.shape, x_TD.device)
                kept_TD = torch.where(drop_TD, tokens_TD.new_zeros(()), tokens_TD)
                dropped_LT = _columns(kept_TD, lora_A.flatten(-3, -2))
                dropped_LT /= 1.0 - dropout.probability
        return x_TD.view_as(x_TD), projected_XT, dropped_LT

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_TD: Tensor | None, grad_XT: Tensor | None, grad_LT: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # Gradient checkpointing lets the saved tensors be unpacked once.
        x_TD, lora_A, router_weight, client_U = ctx.saved_tensors
        own_A = _of_units(lora_A, client_U)
        own_P = None if router_weight is None else _of_units(router_weight, client_U)
        with _full_precision(x_TD):
            saved = (x_TD, own_A, own_P)
            grad_x, grad_A, grad_P = _project_backward(ctx, saved, grad_TD, grad_XT, grad_LT)
        grad_A = _to_clients(grad_A, lora_A, client_U)
        return grad_x, grad_A, _to_clients(grad_P, router_weight, client_U), None, None, None


def _project_backward(
    ctx: Any,
    saved: tuple[Tensor, Tensor, Tensor | None],
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
            read_A = lora_A[..., : ctx.num_projected, :, :]
            grad_TD = _add_rows(grad_TD, grad_XT, _stacked_projections(read_A, router_weight))
        if needs_parameters:
            rows = ctx.num_projected * lora_A.shape[-2]
            grad_XD = _weight_gradient(grad_XT, tokens_TD, lora_A)
            grad_A = grad_XD[..., :rows, :].unflatten(-2, (ctx.num_projected, lora_A.shape[-2]))
            grad_P = grad_XD[..., rows:, :] if router_weight is not None else None
    if grad_LT is not None:
        grad_LT = grad_LT / (1.0 - ctx.dropout.probability)
        drop_TD = ctx.dropout.elements(x_TD.shape, x_TD.device)
        if needs_x:
            path_TD = _add_rows(None, grad_LT, lora_A.flatten(-3, -2))
            path_TD.masked_fill_(drop_TD, 0.0)
            grad_TD = path_TD if grad_TD is None else path_TD.add_(grad_TD)
        if needs_parameters:
            kept_TD = torch.where(drop_TD, tokens_TD.new_zeros(()), tokens_TD)
            path_MRD = _weight_gradient(grad_LT, kept_TD, lora_A).view_as(lora_A)
            if grad_A is not None:
                path_MRD[..., : ctx.num_projected, :, :] += grad_A
            grad_A = path_MRD
    if grad_A is not None and ctx.frozen is not None:
        grad_A[..., ctx.frozen, :, :] = 0.0
    if grad_TD is not None:
        grad_TD = grad_TD.to(x_TD.dtype)
    return grad_TD if needs_x else None, grad_A, grad_P


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous()


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
        held_B: Tensor | None,
        client_U: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        own_B = _of_units(lora_B, client_U)
        with _full_precision(projected_XT):
            routing, loss_B, routed_NB = route(
                projected_XT, expert_weights_BN, token_mask_T, num_sequences, mixture, held_B
            )
            lora_MRT = _lora_activations(projected_XT, dropped_LT, own_B)
            weighted_LT = (lora_MRT * _weights(routing.q_NT, own_B, mixture.scale)).flatten(0, 1)
            y_TO = _add_rows(base_TO, weighted_LT, _stacked_outputs(own_B))
        ctx.mixture = mixture
        ctx.save_for_backward(client_U, lora_B, projected_XT, dropped_LT, token_mask_T, *routing)
        ctx.mark_non_differentiable(routed_NB)
        return y_TO.to(base_TO.dtype), loss_B, routed_NB

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_TO: Tensor, grad_loss_B: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        client_U, lora_B, *saved = ctx.saved_tensors
        own_B = _of_units(lora_B, client_U)
        with _full_precision(grad_TO):
            *grads, grad_B = _combine_backward(ctx.mixture, own_B, saved, grad_TO, grad_loss_B)
        grads.append(_to_clients(grad_B, lora_B, client_U))
        return (grad_TO, *grads, None, None, None, None, None, None)


def _combine_backward(
    mixture: Mixture,
    lora_B: Tensor,
    saved: Sequence[Tensor],
    grad_TO: Tensor,
    grad_loss_B: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return the gradients of `projected_XT`, `dropped_LT` and `lora_B`."""
    projected_XT, dropped_LT, token_mask_T = saved[:3]
    routing = Routing(*saved[3:])
    grad_TO = grad_TO.to(lora_B.dtype)
    num_experts = mixture.num_experts
    lora_MRT = _lora_activations(projected_XT, dropped_LT, lora_B)
    weights_M1T = _weights(routing.q_NT, lora_B, mixture.scale)
    grad_LO = _weight_gradient((lora_MRT * weights_M1T).flatten(0, 1), grad_TO, lora_B)
    grad_B = grad_LO.unflatten(-2, lora_MRT.shape[:2]).transpose(-1, -2).contiguous()
    if mixture.frozen_experts:
        grad_B[..., mixture.frozen, :, :] = 0.0
    grad_MRT = _columns(grad_TO, _stacked_outputs(lora_B)).view_as(lora_MRT)
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
    num_held, _, rank = lora_B.shape[-3:]
    if dropped_LT is None:
        dropped_LT = projected_XT[: num_held * rank]
    return dropped_LT.unflatten(0, (num_held, rank))


def _weights(q_NT: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Return s q for the routed experts and s for the shared one, shape (M, 1, T)."""
    num_shared = lora_B.shape[-3] - q_NT.shape[0]
    weights_MT = torch.cat((q_NT, q_NT.new_ones(num_shared, q_NT.shape[1])))
    return weights_MT.mul_(scale).unsqueeze(1)
