"""Prompts and answers -> token ids, with the tokenizer's special tokens under control."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedamole.datasets.loading import Corpus, Example
from fedamole.datasets.splits import Partition
from fedamole.datasets.tokens import TokenStore
from fedamole.errors import FedamoleError
from fedamole.partition import ClientSplit
from fedamole.settings import ScenarioSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_scenario(
    corpus: Corpus,
    division: Partition,
    settings: ScenarioSettings,
    tokenizer: "PreTrainedTokenizerBase",
) -> TokenStore:
    """Turn the examples of every client into token ids.

    Prompt and answer are tokenised apart, so that the border between them is a border of tokens
    whatever the tokenizer merges. Examples whose prompt has max_length or more tokens are dropped;
    longer sequences are cut to max_length.

    Parameters
    ----------
    corpus
        The examples.
    division
        Who has which.
    settings
        The scenario; gives max_length and the answers.
    tokenizer
        The backbone's tokenizer.

    Returns
    -------
    TokenStore
        In memory, rows in the order of clients and their sets.

    Raises
    ------
    FedamoleError
        If the tokenizer has no end token, or a client is left without examples in one of its sets.
    """
    encoder = Encoder(tokenizer, settings.max_length)
    sequences, clients = _encode_clients(corpus, division, encoder)
    return TokenStore(
        **_arrays(sequences),
        clients=tuple(clients),
        references=_references(sequences, clients),
        choices=encoder.answers(list(settings.dataset.answers.values())),
        eos_id=encoder.eos_id,
        pad_id=encoder.pad_id,
        dropped=[
            len(before) - len(after)
            for before, after in zip(division.clients, clients, strict=True)
        ],
        cut=[
            sum(sequences[row].cut for rows in client.parts().values() for row in rows)
            for client in clients
        ],
    )


@dataclass(frozen=True, slots=True)
class _Sequence:
    """One tokenised example."""

    ids: np.ndarray
    prompt_length: int
    cut: bool
    example: Example


def _encode_clients(
    corpus: Corpus, division: Partition, encoder: "Encoder"
) -> tuple[list[_Sequence], list[ClientSplit]]:
    """Tokenise the sets of every client, one after another; the second result says whose is what.

    Raises
    ------
    FedamoleError
        If all prompts of a set are too long.
    """
    sequences: list[_Sequence] = []
    clients: list[ClientSplit] = []
    for client, split in enumerate(division.clients):
        rows = {}
        for name, ids in split.parts().items():
            kept = encoder.encode([corpus.examples[position] for position in ids])
            if not kept:
                raise FedamoleError(
                    f"client {client} has no {name} example left: all {len(ids)} prompts have "
                    f"max_length {encoder.max_length} or more tokens"
                )
            rows[name] = np.arange(len(sequences), len(sequences) + len(kept))
            sequences += kept
        clients.append(ClientSplit(**rows))
    return sequences, clients


def _arrays(sequences: list[_Sequence]) -> dict[str, np.ndarray]:
    """Lay the sequences one after another, as :class:`TokenStore` has them."""
    return {
        "input_ids": np.concatenate([sequence.ids for sequence in sequences]),
        "offsets": np.cumsum([0, *(len(sequence.ids) for sequence in sequences)], dtype=np.int64),
        "prompt_lengths": np.array([s.prompt_length for s in sequences], dtype=np.int32),
        "labels": np.array([sequence.example.label for sequence in sequences], dtype=np.int32),
    }


def _references(sequences: list[_Sequence], clients: list[ClientSplit]) -> dict[int, str]:
    """Give the answer text of every evaluation and test row."""
    return {
        row: sequences[row].example.response
        for client in clients
        for row in [*client.eval.tolist(), *client.test.tolist()]
    }


class Encoder:
    """A tokenizer with its special tokens under control.

    Parameters
    ----------
    tokenizer
        Of the backbone.
    max_length
        Longest sequence in tokens.

    Raises
    ------
    FedamoleError
        If the tokenizer has no end token, or changes a text when it adds special tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> None:
        if tokenizer.eos_token_id is None:
            raise FedamoleError(
                f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token; answers "
                "need one to end with"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.eos_id = int(tokenizer.eos_token_id)
        self.pad_id = self.eos_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.prefix = self._find_prefix()

    def encode(self, examples: list[Example]) -> list[_Sequence]:
        """Tokenise examples; those with a too long prompt are left out."""
        prompts = self.prompts([example.prompt for example in examples])
        answers = self.answers([example.response for example in examples])
        sequences = []
        for example, prompt, answer in zip(examples, prompts, answers, strict=True):
            ids = np.array(prompt + answer, dtype=np.int32)
            if len(prompt) < self.max_length:
                is_cut = len(ids) > self.max_length
                sequences.append(_Sequence(ids[: self.max_length], len(prompt), is_cut, example))
        return sequences

    def prompts(self, texts: list[str]) -> list[list[int]]:
        """Tokenise prompts, each after what the tokenizer sets before a text by itself."""
        return [self.prefix + ids for ids in self._tokenize(texts)]

    def answers(self, texts: list[str]) -> list[list[int]]:
        """Tokenise answers and end each."""
        return [[*ids, self.eos_id] for ids in self._tokenize(texts)]

    def _tokenize(self, texts: list[str], special: bool = False) -> list[list[int]]:
        """Token ids of each text, with the tokenizer's own special tokens or without."""
        if not texts:
            return []
        # Not verbose: a text beyond the model's window is counted here, not warned about there.
        batch = self.tokenizer(
            texts,
            add_special_tokens=special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
        return [list(ids) for ids in batch["input_ids"]]

    def _find_prefix(self) -> list[int]:
        """Find the tokens that the tokenizer sets before a text by itself, such as BOS.

        Prompts get these and nothing else: an end token that the tokenizer would append to the
        prompt would tell the model that it has answered.
        """
        plain, special = self._tokenize(["a"])[0], self._tokenize(["a"], special=True)[0]
        for start in range(len(special) - len(plain) + 1):
            if special[start : start + len(plain)] == plain:
                return special[:start]
        raise FedamoleError(
            f"the tokenizer {self.tokenizer.name_or_path!r} changes a text when it adds special "
            f"tokens ({plain} becomes {special}); such a tokenizer is not supported"
        )
