"""What a person wants to see of a data set: examples as the model sees them, and lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedamole.datasets.loading import Corpus, Example
from fedamole.datasets.tokenize import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_COUNTED = 5000
"""Examples whose lengths are counted; of larger data sets so many, evenly spaced."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of prompts and answers.

    Attributes
    ----------
    unit
        What was counted: tokens or words.
    prompt, answer
        Length of each counted example; special tokens count.
    too_long
        Counted examples that tokenising will drop: their prompt has max_length or more tokens.
    cut
        Counted examples whose answer will be cut.
    """

    unit: str
    prompt: np.ndarray
    answer: np.ndarray
    too_long: int = 0
    cut: int = 0


def spread_examples(corpus: Corpus, number: int) -> list[Example]:
    """Choose examples: the first of the largest class, of the second largest, and so on.

    After the last class come the second examples of all classes.
    """
    categories = corpus.categories
    members = [np.flatnonzero(categories == number) for number in range(len(corpus.classes))]
    by_size = sorted(members, key=len, reverse=True)
    longest = max(map(len, members))
    turns = (rows[turn] for turn in range(longest) for rows in by_size if turn < len(rows))
    return [corpus.examples[int(row)] for row, _ in zip(turns, range(number), strict=False)]


def text_lengths(corpus: Corpus) -> Lengths:
    """Count words, where there is no tokenizer."""
    examples = _evenly_spaced(corpus.examples)
    return Lengths(
        "words",
        np.array([len(example.prompt.split()) for example in examples]),
        np.array([len(example.response.split()) for example in examples]),
    )


def token_lengths(corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Lengths:
    """Count tokens, as :func:`~fedamole.datasets.tokenize.tokenize_scenario` makes them.

    Raises
    ------
    FedamoleError
        If the tokenizer has no end token.
    """
    encoder = Encoder(tokenizer, max_length)
    examples = _evenly_spaced(corpus.examples)
    prompt = np.array([len(ids) for ids in encoder.prompts([e.prompt for e in examples])])
    answer = np.array([len(ids) for ids in encoder.answers([e.response for e in examples])])
    fits = prompt < max_length
    return Lengths(
        "tokens",
        prompt,
        answer,
        too_long=int((~fits).sum()),
        cut=int((fits & (prompt + answer > max_length)).sum()),
    )


def as_seen(
    example: Example, tokenizer: "PreTrainedTokenizerBase | None", max_length: int
) -> tuple[str, str]:
    """Prompt and answer with the special tokens that the model gets; without a tokenizer as is."""
    if tokenizer is None:
        return example.prompt, example.response
    encoder = Encoder(tokenizer, max_length)
    (prompt,), (answer,) = encoder.prompts([example.prompt]), encoder.answers([example.response])
    return _decode(tokenizer, prompt), _decode(tokenizer, answer)


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """Text of token ids; nothing left out, nothing tidied."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


def _evenly_spaced(examples: Sequence[Example]) -> list[Example]:
    """Choose at most ``MAX_COUNTED`` examples, the first and the last among them."""
    number = min(len(examples), MAX_COUNTED)
    rows = np.linspace(0, len(examples) - 1, number).round().astype(int)
    return [examples[row] for row in rows]
