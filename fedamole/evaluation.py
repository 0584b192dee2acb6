"""Testing a model on one client: evaluation loss, ROUGE-L of generated answers, accuracy."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fedamole import distributed
from fedamole.batches import collate
from fedamole.datasets.tokens import TokenStore
from fedamole.settings import EvaluationSettings

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
    scored: nn.Module, store: TokenStore, rows: np.ndarray, batch_size: int, device: torch.device
) -> Score:
    """Share of rows whose right answer has the lowest mean token loss of all choices.

    The parameters are those of :func:`evaluation_loss`. Equal losses count for the first choice.
    """
    sequences, prompts = [], []
    for row in rows:
        prompt = store.ids(row)[: store.prompt_length(row)]
        for choice in store.choices:
            sequences.append(np.concatenate([prompt, np.asarray(choice, dtype=prompt.dtype)]))
            prompts.append(len(prompt))
    losses = _sequence_losses(scored, sequences, prompts, store, batch_size, device)
    lengths = np.tile([len(choice) for choice in store.choices], len(rows))
    chosen = (losses / lengths).reshape(len(rows), len(store.choices)).argmin(1)
    return Score(float(np.mean(chosen == store.labels[rows])), chosen.tolist())


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


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[np.ndarray],
    store: TokenStore,
    settings: EvaluationSettings,
    device: torch.device,
) -> list[list[int]]:
    """Continue prompts greedily, in batches of similar length padded on the left.

    Returns
    -------
    list of list of int
        New tokens of each prompt, without what follows the end of the answer.
    """
    greedy = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        eos_token_id=store.eos_id,
        pad_token_id=store.pad_id,
    )
    batches = _by_length([len(prompt) for prompt in prompts], settings.batch_size)
    answers = []
    for batch in distributed.share_of_rank(batches):
        longest = max(len(prompts[index]) for index in batch)
        ids = torch.full((len(batch), longest), store.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, index in enumerate(batch):
            tokens = torch.from_numpy(np.asarray(prompts[index], dtype=np.int64))
            ids[line, longest - len(tokens) :] = tokens
            mask[line, longest - len(tokens) :] = 1
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=greedy,
            synced_gpus=distributed.world_size() > 1,
        )
        answers.append([_until(row, store.eos_id) for row in output[:, longest:].tolist()])
    return _in_order(batches, distributed.collect(answers, len(batches)))


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


def _until(tokens: list[int], end: int) -> list[int]:
    """Tokens in front of the first end token."""
    return tokens[: tokens.index(end)] if end in tokens else tokens
