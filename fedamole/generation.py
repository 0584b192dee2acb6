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
    """Answers to prompts in growing order of length: finished, under way, and to come.

    A pass either lets the answers under way grow by a token, or starts others in the places of
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
        self._finished: set[int] = set()
        # The answer of each row of the context; a finished one stays until rows are taken out.
        self._context = Context(model)
        self._rows: list[int] = []

    @property
    def unfinished(self) -> bool:
        """Whether there is anything left to do."""
        return len(self._finished) < len(self._prompts)

    def advance(self) -> None:
        """Run the model once."""
        waiting = len(self._prompts) - self._started
        free = self._settings.batch_size - sum(self._open())
        if not self.unfinished:
            self._read(0, 1)
        # A quarter of a batch: to read prompts one by one would cost a pass each.
        elif waiting and 4 * free >= self._settings.batch_size:
            self._start(min(free, waiting))
        else:
            # A pass over 5 rows takes no less time than one over 8; its time falls in such steps.
            if 2 * sum(self._open()) <= len(self._rows):
                self._forget_finished()
            self._go_on()

    def _open(self) -> list[bool]:
        """For each row of the context whether its answer is under way."""
        return [number not in self._finished for number in self._rows]

    def _start(self, count: int) -> None:
        """Read the next prompts and give their answers a first token."""
        self._forget_finished()
        context, logits_BV = self._read(self._started, count)
        numbers = list(range(self._started, self._started + count))
        self._append(numbers, logits_BV)
        self._context.join(context)
        self._rows += numbers
        self._started += count

    def _go_on(self) -> None:
        """Give all answers under way another token."""
        last = [
            self.tokens[number][-1] if self.tokens[number] else self._store.eos_id
            for number in self._rows
        ]
        ids_B1 = torch.tensor(last, device=self._device)[:, None]
        mask_B1 = torch.tensor(self._open(), dtype=torch.long, device=self._device)[:, None]
        here_P = torch.zeros(1, dtype=torch.long, device=self._device)
        self._append(self._rows, self._context.read(ids_B1, mask_B1, here_P)[:, 0])

    def _read(self, start: int, count: int) -> tuple[Context, Tensor]:
        prompts = self._prompts[start : start + count]
        return read_prompts(self._model, prompts, self._store.pad_id, self._device)

    def _append(self, numbers: Sequence[int], logits_BV: Tensor) -> None:
        """Append the likeliest token to the answers of these numbers that are not finished."""
        for number, token in zip(numbers, logits_BV.argmax(1).tolist(), strict=True):
            if number in self._finished:
                continue
            if token != self._store.eos_id:
                self.tokens[number].append(token)
            if (
                token == self._store.eos_id
                or len(self.tokens[number]) == self._settings.max_new_tokens
            ):
                self._finished.add(number)

    def _forget_finished(self) -> None:
        """Take the rows of finished answers out of the context."""
        rows = [row for row, is_open in enumerate(self._open()) if is_open]
        if len(rows) < len(self._rows):
            self._context.keep(torch.tensor(rows, dtype=torch.long, device=self._device))
            self._rows = [self._rows[row] for row in rows]
