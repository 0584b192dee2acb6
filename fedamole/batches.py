"""From rows of the token store to tensors: the example stream, padding, labels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedamole.randomness import stream
from fedamole.settings import TrainingSettings

# Labels that count in no loss; the value that torch's cross entropy ignores.
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward pass, padded on the right.

    Attributes
    ----------
    input_ids
        (B, T) token ids.
    attention_mask
        (B, T) 1 for tokens, 0 for padding.
    targets
        (B, P) the token that follows each of ``positions``; IGNORED where it is no response token.
    positions
        (P,) positions at which at least one sequence has a target: only there logits are needed.
    padded
        Whether there is any padding. Known on the host, so that nobody has to ask the device.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    padded: bool = True

    def to(self, device: torch.device) -> "Batch":
        """Copy of the batch on a device."""
        names = ("input_ids", "attention_mask", "targets", "positions")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)

    @property
    def mask(self) -> torch.Tensor | None:
        """What a model is to be given as attention mask: none where it would hide nothing.

        Models would otherwise look for a zero in it, and layers multiply by ones.
        """
        return self.attention_mask if self.padded else None

    @property
    def num_targets(self) -> int:
        """Number of response tokens."""
        return int((self.targets != IGNORED).sum())


def collate(sequences: Sequence[np.ndarray], prompt_lengths: Sequence[int], pad_id: int) -> Batch:
    """Pad sequences on the right and mark their response tokens.

    Parameters
    ----------
    sequences
        B arrays of token ids, prompt and response.
    prompt_lengths
        B numbers of leading tokens that are no targets.
    pad_id
        Token id of the padding; any id will do, the mask hides it.
    """
    lengths = [len(ids) for ids in sequences]
    longest = max(lengths)
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    labels = torch.full((len(sequences), longest + 1), IGNORED, dtype=torch.long)
    for row, (ids, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        tokens = torch.from_numpy(np.asarray(ids, dtype=np.int64))
        input_ids[row, : len(tokens)] = tokens
        attention_mask[row, : len(tokens)] = 1
        labels[row, prompt_length : len(tokens)] = tokens[prompt_length:]
    # The logits at position t predict token t + 1.
    shifted = labels[:, 1:]
    positions = (shifted != IGNORED).any(0).nonzero()[:, 0]
    padded = min(lengths) < longest
    return Batch(input_ids, attention_mask, shifted[:, positions], positions, padded)


@dataclass(frozen=True)
class LocalTraining:
    """Where in the study a local training stands; its randomness follows from this alone."""

    seed: int
    round: int
    client: int


def rows_of_round(
    rows: np.ndarray, num_steps: int, place: LocalTraining, settings: TrainingSettings
) -> np.ndarray:
    """Cut a client's part of its example stream for one round into steps and micro-batches.

    Parameters
    ----------
    rows
        (N,) rows of the token store that the client trains on.
    num_steps
        Steps of the round.
    place
        Seed, round and client.
    settings
        Sequences per step and per pass.

    Returns
    -------
    numpy.ndarray
        (num_steps, micro-batches, sequences) rows of the token store.
    """
    per_step, per_pass = settings.batch_size, settings.sequences_per_pass
    start, stop = (round_ * num_steps * per_step for round_ in (place.round - 1, place.round))
    examples = stream_of_examples(len(rows), start, stop, place.seed, place.client)
    return rows[examples].reshape(num_steps, -1, per_pass)


def stream_of_examples(
    num_examples: int, start: int, stop: int, seed: int, client: int
) -> np.ndarray:
    """Examples number ``start`` to ``stop`` of a client's endless shuffled stream.

    The stream is one permutation of the examples after another, each a pure function of
    (seed, client, epoch): any part of it can be made alone, by any job.

    Returns
    -------
    numpy.ndarray
        (stop - start,) int64 in [0, num_examples).
    """
    epochs = range(start // num_examples, -(-stop // num_examples))
    orders = [stream(seed, "order", client, epoch).permutation(num_examples) for epoch in epochs]
    first = epochs.start * num_examples
    return np.concatenate([*orders, np.empty(0, dtype=np.int64)])[start - first : stop - first]
