"""Testing a model on one client: evaluation loss, ROUGE-L of generated answers, accuracy."""

# Axes: N = rows, B = prompts of a batch, C = choices, T = tokens, V = vocabulary,
#       R = choices after prompts, B * C

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from fedamole import distributed
from fedamole.batches import IGNORED, collate
from fedamole.contexts import Context, read_prompts
from fedamole.datasets.tokens import TokenStore
from fedamole.generation import generate
from fedamole.settings import CHOICES_AT_ONCE, EvaluationSettings
from fedamole.training import ScoredModel

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Score:
    """Result of a test set.

    Attributes
    ----------
    value
        Mean ROUGE-L F1 or accuracy, in [0, 1].
    answers
        What the model answered, example by example: its text, or the number of its choice.
    """

    value: float
    answers: list[str] | list[int]


def evaluation_loss(
    scored: nn.Module, store: TokenStore, rows: np.ndarray, batch_size: int, device: torch.device
) -> float:
    """Mean cross entropy of all response tokens of the given rows, in nats.

    Parameters
    ----------
    scored
        A :class:`fedamole.training.ScoredModel` in evaluation mode.
    store
        Tokens of the scenario.
    rows
        (N,) rows of the store.
    batch_size
        Sequences per forward pass.
    device
        Where to compute.
    """
    sequences = [store.ids(row) for row in rows]
    prompts = [store.prompt_length(row) for row in rows]
    losses = _sequence_losses(scored, sequences, prompts, store, batch_size, device)
    num_targets = sum(len(ids) - n for ids, n in zip(sequences, prompts, strict=True))
    return float(np.sum(losses, dtype=np.float64) / num_targets)


def accuracy(
    scored: ScoredModel, store: TokenStore, rows: np.ndarray, batch_size: int, device: torch.device
) -> Score:
    """Share of rows whose right answer has the lowest mean token loss of all choices.

    The parameters are those of :func:`evaluation_loss`; a forward pass has ``batch_size`` prompts,
    or :data:`CHOICES_AT_ONCE` times as many choices. Equal losses count for the first choice.
    """
    losses_NC = choice_losses(scored.model, store, rows, batch_size, device)
    lengths_C = np.array([len(choice) for choice in store.choices])
    chosen_N = (losses_NC / lengths_C).argmin(1)
    return Score(float(np.mean(chosen_N == store.labels[rows])), chosen_N.tolist())


@torch.no_grad()
def choice_losses(
    model: nn.Module, store: TokenStore, rows: np.ndarray, batch_size: int, device: torch.device
) -> np.ndarray:
    """Sum of the token losses of each choice after each prompt, (N, C) float32, on all ranks.

    A prompt runs through the model once, and all choices after it.

    Parameters
    ----------
    model
        The language model, in evaluation mode.
    store, rows, device
        See :func:`evaluation_loss`.
    batch_size
        Prompts per forward pass.
    """
    prompts = [store.ids(row)[: store.prompt_length(row)] for row in rows]
    batches = _by_length([len(prompt) for prompt in prompts], batch_size)
    choices = [np.asarray(choice, dtype=np.int64) for choice in store.choices]
    losses = []
    for batch in distributed.share_of_rank(batches):
        context, logits_BV = read_prompts(
            model, [prompts[index] for index in batch], store.pad_id, device
        )
        parts = [
            _losses_after(context, logits_BV, choices[start : start + CHOICES_AT_ONCE])
            for start in range(0, len(choices), CHOICES_AT_ONCE)
        ]
        losses.append(torch.cat(parts, dim=1).cpu().numpy())
    return np.asarray(_in_order(batches, distributed.collect(losses, len(batches))))


def _losses_after(
    context: Context, logits_BV: torch.Tensor, choices: Sequence[np.ndarray]
) -> torch.Tensor:
    """Sum of the token losses of each choice after each sequence of a context, (B, C)."""
    batch = collate(choices, [0] * len(choices), pad_id=0).to(logits_BV.device)
    ids_CT, mask_CT = batch.input_ids, batch.attention_mask
    losses_BC = -logits_BV.log_softmax(-1)[:, ids_CT[:, 0]]
    if ids_CT.shape[1] == 1:
        return losses_BC
    count, num_choices = losses_BC.shape
    ids_RT, mask_RT = ids_CT.repeat(count, 1), mask_CT.repeat(count, 1)
    logits_RTV = context.repeated(num_choices).read(
        ids_RT[:, :-1], mask_RT[:, :-1], torch.arange(ids_RT.shape[1] - 1, device=ids_RT.device)
    )
    targets_RT = ids_RT[:, 1:].masked_fill(mask_RT[:, 1:] == 0, IGNORED)
    losses_RT = functional.cross_entropy(
        logits_RTV.transpose(1, 2), targets_RT, ignore_index=IGNORED, reduction="none"
    )
    return losses_BC + losses_RT.sum(1).view(count, num_choices)


def rouge_of_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    store: TokenStore,
    rows: np.ndarray,
    settings: EvaluationSettings,
    device: torch.device,
) -> Score:
    """Mean ROUGE-L F1 of greedily generated answers.

    Parameters
    ----------
    model
        The language model, in evaluation mode.
    tokenizer
        Turns tokens into text.
    store, rows, device
        See :func:`evaluation_loss`.
    settings
        Batch size and longest answer.
    """
    prompts = [store.ids(row)[: store.prompt_length(row)] for row in rows]
    tokens = generate(model, prompts, store, settings, device)
    answers = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in tokens]
    scores = [rouge_l(text, store.reference(row)) for text, row in zip(answers, rows, strict=True)]
    return Score(float(np.mean(scores)), answers)


def rouge_l(hypothesis: str, reference: str) -> float:
    """ROUGE-L F1 of the ``rouge`` package; 0 where either side has no words."""
    from rouge import Rouge

    # The package splits sentences at full stops and cannot score a text that is empty after that.
    if not hypothesis.replace(".", "").split() or not reference.replace(".", "").split():
        return 0.0
    # Its longest common subsequence recurses once per word.
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 20_000))
    return float(Rouge(metrics=["rouge-l"]).get_scores(hypothesis, reference)[0]["rouge-l"]["f"])


@torch.no_grad()
def _sequence_losses(
    scored: nn.Module,
    sequences: Sequence[np.ndarray],
    prompts: Sequence[int],
    store: TokenStore,
    batch_size: int,
    device: torch.device,
) -> np.ndarray:
    """Sum of the response token losses of each sequence, (N,) float32, on all ranks."""
    batches = _by_length([len(ids) for ids in sequences], batch_size)
    losses = []
    for batch in distributed.share_of_rank(batches):
        tensors = collate([sequences[i] for i in batch], [prompts[i] for i in batch], store.pad_id)
        token_B, _ = scored(tensors.to(device))
        losses.append(token_B.cpu().numpy())
    return np.asarray(_in_order(batches, distributed.collect(losses, len(batches))))


def _by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cut indices into batches of similar length: less padding."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _in_order(batches: Sequence[Sequence[int]], results: Sequence[Sequence[ItemT]]) -> list[ItemT]:
    """Undo :func:`_by_length`."""
    found = {
        index: item
        for batch, items in zip(batches, results, strict=True)
        for index, item in zip(batch, items, strict=True)
    }
    return [found[index] for index in range(len(found))]
