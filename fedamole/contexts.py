"""Sequences that a language model has read, and goes on reading: a cache of keys and values.

Padding is in front of the prompts, so that whatever follows stands right behind them: a sliding
window counts slots of the cache, not positions. Positions are given to the model by number.
"""

# Axes: B = sequences, S = slots of a sequence, padding and tokens, T = new tokens of a pass,
#       P = positions with logits, V = vocabulary, M = copies of the batch that the model makes

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from fedamole.errors import FedamoleError


class Context:
    """A batch of sequences that a model has read.

    A model that doubles its batches (:mod:`fedamole.mutual`) has M times as many rows in its cache,
    copy after copy; slots of its own that it puts in front (:mod:`fedamole.soft_prompts`) are in
    the cache, behind the padding, and not in the mask. Neither matters here.

    Parameters
    ----------
    model
        A causal language model, or what behaves as one, in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._takes_positions = _takes_positions(model)
        # All slots are kept, of sliding windows too: the masks hide them, and rows can be joined.
        self._cache = DynamicCache()
        self._mask_BS = torch.zeros(0, 0, dtype=torch.long)

    def __len__(self) -> int:
        """B."""
        return len(self._mask_BS)

    def read(self, ids_BT: Tensor, mask_BT: Tensor, positions_P: Tensor) -> Tensor:
        """Read on.

        Parameters
        ----------
        ids_BT, mask_BT
            New tokens and 1 where they are real. Padding is on the left of the first tokens; it may
            be on the right of the last.
        positions_P
            Of the new tokens those whose logits are wanted, in [0, T).

        Returns
        -------
        Tensor
            (B, P, V) logits, float32.

        Raises
        ------
        FedamoleError
            If the model keeps no keys and values.
        """
        if len(self):
            mask_BT = torch.cat([self._mask_BS, mask_BT], dim=1)
        numbers_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        logits_BPV: Tensor = self._model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=positions_P,
            **({"position_ids": numbers_BT} if self._takes_positions else {}),
        ).logits
        self._mask_BS = mask_BT
        if self._cache.get_seq_length() < mask_BT.shape[1]:
            raise FedamoleError(
                f"{type(_backbone(self._model)).__name__} keeps no cache of keys and values; "
                "choices and generated answers need one"
            )
        return logits_BPV.float()

    def repeated(self, times: int) -> "Context":
        """Copy of the context in which each sequence stands ``times`` times, one after another."""
        repeated = Context(self._model)
        repeated._mask_BS = self._mask_BS.repeat_interleave(times, dim=0)
        repeated._cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        repeated._change(len(self), lambda rows: rows.repeat_interleave(times, dim=1))
        return repeated

    def keep(self, rows: Tensor) -> None:
        """Forget all sequences but these, and slots that are padding for all of them."""
        count = len(self)
        mask_BS = self._mask_BS[rows]
        first = int(mask_BS.any(0).long().argmax()) if len(rows) else 0
        self._mask_BS = mask_BS[:, first:]
        self._change(count, lambda parts: parts[:, rows, :, first:])

    def join(self, other: "Context") -> None:
        """Take over the sequences of another context of the same model, behind the own."""
        if not len(other):
            return
        if not len(self):
            self._cache, self._mask_BS = other._cache, other._mask_BS
            return
        slots = max(self._mask_BS.shape[1], other._mask_BS.shape[1])
        for context in (self, other):
            # Zeros, since what is masked is still multiplied, by 0.
            missing = slots - context._mask_BS.shape[1]
            context._mask_BS = functional.pad(context._mask_BS, (missing, 0))
            context._change(len(context), partial(functional.pad, pad=(0, 0, missing, 0)))
        theirs = iter([t.unflatten(0, (-1, len(other))) for t in other._tensors()])
        self._change(len(self), lambda rows: torch.cat([rows, next(theirs)], dim=1))
        self._mask_BS = torch.cat([self._mask_BS, other._mask_BS])

    def _tensors(self) -> list[Tensor]:
        """Keys and values of the layers, (M * B, heads, S, width)."""
        layers: list[Any] = self._cache.layers
        return [tensor for layer in layers for tensor in (layer.keys, layer.values)]

    def _change(self, count: int, change: Callable[[Tensor], Tensor]) -> None:
        """Replace all keys and values, which come as (M, B, heads, S, width) of ``count`` = B."""
        layers: list[Any] = self._cache.layers
        for layer in layers:
            layer.keys = change(layer.keys.unflatten(0, (-1, count))).flatten(0, 1)
            layer.values = change(layer.values.unflatten(0, (-1, count))).flatten(0, 1)


def read_prompts(
    model: nn.Module, prompts: Sequence[np.ndarray], pad_id: int, device: torch.device
) -> tuple[Context, Tensor]:
    """Read B prompts.

    Parameters
    ----------
    model
        See :class:`Context`.
    prompts
        Token ids.
    pad_id
        Token id of the padding; any id will do, the mask hides it.
    device
        Where to compute.

    Returns
    -------
    context
        What has been read.
    logits_BV
        (B, V) float32 logits of the token behind each prompt.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask_BT[row, longest - len(prompt) :] = 1
    context = Context(model)
    last_P = torch.tensor([longest - 1], device=device)
    return context, context.read(ids_BT.to(device), mask_BT.to(device), last_P)[:, 0]


def _backbone(model: nn.Module) -> nn.Module:
    """The language model inside of what is trained."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def _takes_positions(model: nn.Module) -> bool:
    """Whether positions can be given; other models derive them from the mask."""
    return "position_ids" in inspect.signature(_backbone(model).forward).parameters
