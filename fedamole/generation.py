"""Greedy answers: many at a time, each until its end."""

# Axes: B = answers under way, P = positions with logits, V = vocabulary, N = prompts

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedamole import distributed
from fedamole.contexts import Context, read_prompts
from fedamole.datasets.tokens import TokenStore
from fedamole.settings import EvaluationSettings


def generate(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    store: TokenStore,
    settings: EvaluationSettings,
    device: torch.device,
) -> list[list[int]]:
    """Continue prompts greedily.

    Parameters
    ----------
    model
        The language model, in evaluation mode.
    prompts
        Token ids of N prompts.
    store
        Has the ids of the padding and of the end.
    settings
        Batch size and longest answer.
    device
        Where to compute.

    Returns
    -------
    list of list of int
        New tokens of each prompt, without the end, on all ranks.
    """
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    mine = [prompts[index] for index in distributed.share_of_rank(order)]
    answers = _Answers(model, mine, store, settings, device)
    with torch.no_grad():
        # A forward pass is a collective operation under ZeRO-3: all ranks go on till all are done.
        while distributed.any_rank(answers.unfinished, device):
            answers.advance()
    found = dict(zip(order, distributed.collect(answers.tokens, len(order)), strict=True))
    return [found[index] for index in range(len(prompts))]


class _Answers:
    """Answers to prompts in growing order of length, some finished, some under way, some to come.

    A pass either lets every answer under way grow by a token, or starts others in the place of
    those that are finished: a batch does not wait for its longest answer.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[np.ndarray],
        store: TokenStore,
        settings: EvaluationSettings,
        device: torch.device,
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self._model, self._prompts, self._store = model, prompts, store
        self._settings, self._device = settings, device
        self._started = 0
        self._context = Context(model)
        # Answers under way, in the order of the context, and the last token of each.
        self._under_way: list[int] = []
        self._last_B = torch.zeros(0, dtype=torch.long, device=device)

    @property
    def unfinished(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._under_way) or self._started < len(self._prompts)

    def advance(self) -> None:
        """Run the model once."""
        waiting = len(self._prompts) - self._started
        free = self._settings.batch_size - len(self._under_way)
        if not self.unfinished:
            self._read(self._prompts[:1])
        # Half a batch at least: to read prompts one by one would cost a pass each.
        elif waiting and 2 * free >= self._settings.batch_size:
            self._start(min(free, waiting))
        else:
            here_P = torch.zeros(1, dtype=torch.long, device=self._device)
            ids_B1 = self._last_B[:, None]
            logits_BPV = self._context.read(ids_B1, torch.ones_like(ids_B1), here_P)
            self._under_way, self._last_B = self._grow(
                self._context, self._under_way, logits_BPV[:, 0]
            )

    def _start(self, count: int) -> None:
        """Read the next prompts and give their answers a first token."""
        numbers = list(range(self._started, self._started + count))
        context, logits_BV = self._read([self._prompts[number] for number in numbers])
        numbers, last_B = self._grow(context, numbers, logits_BV)
        self._started += count
        self._context.join(context)
        self._under_way += numbers
        self._last_B = torch.cat([self._last_B, last_B])

    def _read(self, prompts: Sequence[np.ndarray]) -> tuple[Context, Tensor]:
        return read_prompts(self._model, prompts, self._store.pad_id, self._device)

    def _grow(
        self, context: Context, numbers: list[int], logits_BV: Tensor
    ) -> tuple[list[int], Tensor]:
        """Append the likeliest tokens; forget what is finished.

        Returns
        -------
        tuple
            Numbers of the answers that are still under way, and the last token of each.
        """
        last_B = logits_BV.argmax(1)
        rows = []
        for row, (number, token) in enumerate(zip(numbers, last_B.tolist(), strict=True)):
            if token == self._store.eos_id:
                continue
            self.tokens[number].append(token)
            if len(self.tokens[number]) < self._settings.max_new_tokens:
                rows.append(row)
        if len(rows) < len(numbers):
            rows_B = torch.tensor(rows, dtype=torch.long, device=self._device)
            context.keep(rows_B)
            last_B = last_B[rows_B]
        return [numbers[row] for row in rows], last_B
