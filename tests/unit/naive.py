"""The slow and obvious way: one sequence at a time, no cache, no padding, all logits."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from tiny import EOS, make_store
from torch import Tensor

from fedamole.datasets.tokens import TokenStore
from fedamole.evaluation import choice_losses

# More than go through one pass, of different lengths, and one of a single token.
CHOICES = [[5, EOS], [6, 7, 8, EOS], [9], [5, 10, EOS], [11, EOS]]
Logits = Callable[[Tensor], Tensor]


def check_choices(model: torch.nn.Module, logits_of: Logits, prompts: Sequence[np.ndarray]) -> None:
    """Compare the losses of all choices with those of each choice alone.

    ``logits_of`` gives the logits (T, V), or log-probabilities, of one sequence (T).
    """
    store = store_of(prompts)
    expected = np.array(
        [[loss_alone(logits_of, prompt, choice) for choice in CHOICES] for prompt in prompts]
    )
    for batch_size in (1, 3, 100):
        rows, device = np.arange(len(prompts)), torch.device("cpu")
        found = choice_losses(model, store, rows, batch_size, device)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    lengths = [len(choice) for choice in CHOICES]
    assert (found / lengths).argmin(1).tolist() == (expected / lengths).argmin(1).tolist()


def store_of(prompts: Sequence[np.ndarray]) -> TokenStore:
    """Prompts with the first choice as the response."""
    sequences = [[*map(int, prompt), *CHOICES[0]] for prompt in prompts]
    return make_store(sequences, [len(prompt) for prompt in prompts], CHOICES)


def loss_alone(logits_of: Logits, prompt: np.ndarray, choice: Sequence[int]) -> float:
    """Sum of the token losses of one response."""
    ids = torch.tensor([*map(int, prompt), *choice])
    with torch.no_grad():
        log_probs = logits_of(ids).double().log_softmax(-1)
    return -float(sum(log_probs[t - 1, ids[t]] for t in range(len(prompt), len(ids))))
