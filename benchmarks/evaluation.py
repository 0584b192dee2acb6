"""Choices and generated answers in batches, against one sequence at a time.

CPU time on one thread, a model of the shape of SmolLM2-135M with random weights:

    python benchmarks/evaluation.py [--quick]

One at a time means what a plain script does: every choice alone through the model with all its
logits, every answer alone by `generate` of transformers. In batches of 8 means the same with
padding: choices with logits of the responses only, answers again by `generate`.
"""

# Axes: N = prompts, C = choices, T = tokens, V = vocabulary

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Claim, claim, interleaved
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from fedamole.batches import collate
from fedamole.config_files import read_yaml
from fedamole.datasets.tokens import TokenStore
from fedamole.distributed import process_group
from fedamole.evaluation import choice_losses
from fedamole.generation import generate
from fedamole.launching import Layout
from fedamole.partition import ClientSplit
from fedamole.settings import EvaluationSettings
from fedamole.training import ScoredModel

BATCH_SIZE = 8
# A likeliest token that this number divides ends an answer: some soon, some never.
ENDING = 5
EOS = 2
CPU = torch.device("cpu")
MODEL = Path(__file__).parents[1] / "configs/models/smollm2-135m.yaml"


def make_model(layers: int | None) -> LlamaForCausalLM:
    """Random weights in the shape of SmolLM2-135M; its head is not tied to the embeddings.

    A tied head would answer with the last token of the prompt, again and again.
    """
    torch.manual_seed(0)
    size = read_yaml(MODEL)["size"]
    size["num_hidden_layers"] = layers or size["num_hidden_layers"]
    return LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=False)).eval()


def make_store(prompts: list[np.ndarray], choices: list[list[int]]) -> TokenStore:
    """Prompts with the first choice as the response."""
    rows = np.arange(len(prompts))
    sequences = [np.concatenate([prompt, choices[0]]) for prompt in prompts]
    return TokenStore(
        input_ids=np.concatenate(sequences).astype(np.int32),
        offsets=np.cumsum([0, *(len(ids) for ids in sequences)]),
        prompt_lengths=np.array([len(prompt) for prompt in prompts], dtype=np.int32),
        labels=np.zeros(len(prompts), dtype=np.int64),
        clients=(ClientSplit(rows, rows, rows, rows),),
        references={},
        choices=choices,
        eos_id=EOS,
        pad_id=EOS,
        dropped=[0],
        cut=[0],
    )


def draw(count: int, low: int, high: int) -> list[np.ndarray]:
    """Random prompts of ``low`` to ``high`` tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(low, high + 1, size=count)
    return [rng.integers(EOS + 1, 49_000, size=length) for length in lengths]


@torch.no_grad()
def choices_alone(model: LlamaForCausalLM, store: TokenStore, prompts: list[np.ndarray]) -> Any:
    """Loss sums (N, C), each from all logits of one sequence."""

    def loss(prompt: np.ndarray, choice: list[int]) -> float:
        ids = torch.tensor([*map(int, prompt), *choice])
        logits_TV = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
        return float(functional.cross_entropy(logits_TV, ids[len(prompt) :], reduction="sum"))

    return np.array([[loss(prompt, choice) for choice in store.choices] for prompt in prompts])


@torch.no_grad()
def choices_in_batches(
    model: LlamaForCausalLM, store: TokenStore, prompts: list[np.ndarray]
) -> Any:
    """Loss sums (N, C), every choice behind a prompt of its own."""
    scored = ScoredModel(model, 0.0).eval()
    sequences = [np.concatenate([prompt, c]) for prompt in prompts for c in store.choices]
    lengths = [len(prompt) for prompt in prompts for _ in store.choices]
    parts = []
    for start in range(0, len(sequences), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        parts.append(scored(collate(sequences[part], lengths[part], store.pad_id))[0])
    return torch.cat(parts).view(len(prompts), -1).numpy()


def measure_choices(
    layers: int | None, lengths: list[int], count: int, repeats: int
) -> list[Claim]:
    """Losses of some choices after prompts of one length."""
    model, claims = make_model(layers), []
    for length in lengths:
        prompts = draw(count, length, length)
        choices = [[5, 6, EOS], [7, EOS], [8, 9, 10, EOS], [11, 12, EOS], [13, EOS]]
        store = make_store(prompts, choices[: 3 if length == 128 else 5])
        rows = np.arange(len(prompts))
        steps: dict[str, Callable[[], Any]] = {
            "alone": lambda: choices_alone(model, store, prompts),  # noqa: B023
            "in batches": lambda: choices_in_batches(model, store, prompts),  # noqa: B023
            "shared": lambda: choice_losses(model, store, rows, BATCH_SIZE, CPU),  # noqa: B023
        }
        losses = [step() for step in steps.values()]
        for found in losses[1:]:
            np.testing.assert_allclose(found, losses[0], rtol=1e-5)
        seconds = interleaved(steps, repeats, warm_up=0)
        size = f"{len(store.choices)} choices after {length} tokens, {_layers(model)}"
        for name, target in (("alone", 5.0), ("in batches", None)):
            claims.append(
                claim(
                    f"choices {name} over one prompt for all: {size}",
                    seconds[name] / seconds["shared"],
                    target=target,
                    larger_is_better=True,
                    guarded=True,
                )
            )
    return claims


@contextmanager
def ending(model: LlamaForCausalLM) -> Iterator[None]:
    """Let answers of a random model end; see :data:`ENDING`."""

    def end(_module: Any, _args: Any, output: Any) -> None:
        ends = output.logits.argmax(-1) % ENDING == 0
        output.logits[..., EOS] = torch.where(ends, torch.inf, output.logits[..., EOS])

    hook = model.register_forward_hook(end)
    try:
        yield
    finally:
        hook.remove()


def generate_by_transformers(
    model: Any, prompts: list[np.ndarray], longest: int, batch_size: int
) -> list[list[int]]:
    """Answers by `generate`, in batches of similar length padded on the left."""
    greedy = GenerationConfig(
        max_new_tokens=longest, do_sample=False, eos_token_id=EOS, pad_token_id=EOS
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, list[int]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in batch)
        ids, mask = np.full((len(batch), width), EOS), np.zeros((len(batch), width), dtype=int)
        for row, index in enumerate(batch):
            ids[row, width - len(prompts[index]) :] = prompts[index]
            mask[row, width - len(prompts[index]) :] = 1
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        output = model.generate(**inputs, generation_config=greedy)[:, width:].tolist()
        for index, tokens in zip(batch, output, strict=True):
            answers[index] = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
    return [answers[index] for index in range(len(prompts))]


def measure_generation(layers: int | None, count: int, longest: int, repeats: int) -> list[Claim]:
    """Answers to prompts of mixed lengths."""
    model, prompts = make_model(layers), draw(count, 24, 64)
    store = make_store(prompts, [[EOS]])
    settings = EvaluationSettings(batch_size=BATCH_SIZE, max_new_tokens=longest)
    steps: dict[str, Callable[[], Any]] = {
        "alone": lambda: generate_by_transformers(model, prompts, longest, 1),
        "in batches": lambda: generate_by_transformers(model, prompts, longest, BATCH_SIZE),
        "refilled": lambda: generate(model, prompts, store, settings, CPU),
    }
    with ending(model):
        answers = [step() for step in steps.values()]
        if not answers[0] == answers[1] == answers[2]:
            raise AssertionError("answers depend on the way of generating them")
        seconds = interleaved(steps, repeats, warm_up=0)
    size = f"{count} answers of up to {longest} tokens, {_layers(model)}"
    return [
        claim(
            f"answers {name} over refilled batches of {BATCH_SIZE}: {size}",
            seconds[name] / seconds["refilled"],
            target=target,
            larger_is_better=True,
        )
        # Short answers leave most of the time to the prompts, where batches save little.
        for name, target in (("alone", None if layers else 3.0), ("in batches", None))
    ]


def _layers(model: LlamaForCausalLM) -> str:
    return f"{model.config.num_hidden_layers} layers"


def measure(quick: bool) -> list[Claim]:
    """Measure on one thread; quick takes a model of 4 layers and short answers."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    with process_group(Layout()):
        if quick:
            return [*measure_choices(4, [128], 2, 2), *measure_generation(4, 8, 10, 1)]
        return [
            *measure_choices(None, [128, 256], 4, 2),
            *measure_generation(None, 24, 64, 2),
        ]


def main() -> None:
    """Print the claims."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model, a few seconds")
    for line in measure(parser.parse_args().quick):
        aim = "" if line.target is None else f"   target {line.target:g}"
        print(f"{line.name:75} {line.value:6.2f} [{line.low:.2f}, {line.high:.2f}]{aim}")


if __name__ == "__main__":
    main()
