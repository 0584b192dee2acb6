"""Cost of a training step of FedAMoLE against one of PEFT LoRA, and against the frozen backbone.

Random weights of the shape of SmolLM2-135M, all in one process, taking turns, one thread, CPU time:

    python benchmarks/step.py [--quick]

A FedAMoLE step is `fedamole.training.train` under DeepSpeed, six routed experts in every query and
value projection. A LoRA step is what a script around transformers does: labels passed, logits of
all positions, torch's Adam. The frozen backbone's forward and backward pass, its head only where a
target is, is the physical limit of both. A quarter of the tokens are the response.

Peak memory is that of a process which does nothing but one kind of step, less what it held before
the first one; `--quick`, with four layers and one sequence, leaves it out.
"""

# Axes: B = sequences, T = tokens

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from measuring import Claim, claim, interleaved
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fedamole.batches import IGNORED, Batch, collate
from fedamole.distributed import process_group
from fedamole.hmole_peft import HMoLEConfig
from fedamole.launching import Layout
from fedamole.settings import TrainingSettings
from fedamole.training import LocalTraining, ScoredModel, engine_for, train

VOCABULARY, LAYERS, QUICK_LAYERS = 49_152, 30, 4
TARGETS = ["q_proj", "v_proj"]
RANK, ALPHA, DROPOUT, NUM_EXPERTS, LEARNING_RATE = 8, 16, 0.05, 6, 5e-5
SHAPES = [(1, 128), (4, 128)]
MEMORY_SHAPE = (4, 128)
KINDS = ("FedAMoLE", "LoRA", "frozen")


def make_backbone(layers: int) -> LlamaForCausalLM:
    """Frozen backbone of the shape of SmolLM2-135M."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def make_batch(sequences: int, tokens: int) -> Batch:
    """Random sequences whose last quarter is the response."""
    ids_BT = np.random.default_rng(0).integers(0, VOCABULARY, (sequences, tokens))
    return collate(list(ids_BT), [tokens - tokens // 4] * sequences, pad_id=0)


@contextlib.contextmanager
def fedamole_step(layers: int, batch: Batch) -> Iterator[Callable[[], object]]:
    """Give one optimizer step of a client."""
    config = HMoLEConfig(
        r=RANK, alpha=ALPHA, dropout=DROPOUT, num_experts=NUM_EXPERTS, target_modules=TARGETS
    )
    scored = ScoredModel(get_peft_model(make_backbone(layers), config), balance_weight=0.001)
    settings = TrainingSettings(batch_size=len(batch.input_ids))
    place, device = LocalTraining(seed=42, round=1, client=0), torch.device("cpu")
    with engine_for(scored, settings, LEARNING_RATE) as engine:
        yield lambda: train(engine, [[batch]], 1, place, settings, device)


@contextlib.contextmanager
def lora_step(layers: int, batch: Batch) -> Iterator[Callable[[], object]]:
    """Give one optimizer step of plain LoRA."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=TARGETS)
    model = get_peft_model(make_backbone(layers), config).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=LEARNING_RATE)
    labels_BT = torch.full_like(batch.input_ids, IGNORED)
    labels_BT[:, batch.positions + 1] = batch.targets

    def step() -> float:
        # As a script does: our own choice of deterministic kernels fills memory before it is used.
        torch.use_deterministic_algorithms(False)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        loss = model(**inputs, labels=labels_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.use_deterministic_algorithms(True, warn_only=True)
        return float(loss.detach())

    yield step


@contextlib.contextmanager
def frozen_step(layers: int, batch: Batch) -> Iterator[Callable[[], object]]:
    """Give a forward and backward pass of the backbone down to its embeddings."""
    model = make_backbone(layers)

    def step() -> None:
        embeddings_BTD = model.get_input_embeddings()(batch.input_ids).requires_grad_()
        logits_BPV = model(
            inputs_embeds=embeddings_BTD, logits_to_keep=batch.positions, use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(logits_BPV.flatten(0, 1), batch.targets.flatten())
        loss.backward()

    yield step


MAKERS = dict(zip(KINDS, (fedamole_step, lora_step, frozen_step), strict=True))


def measure_times(layers: int, sequences: int, tokens: int, repeats: int) -> list[Claim]:
    """Compare the times of the three kinds of steps."""
    batch = make_batch(sequences, tokens)
    with contextlib.ExitStack() as stack:
        steps = {kind: stack.enter_context(make(layers, batch)) for kind, make in MAKERS.items()}
        seconds = interleaved(steps, repeats)
    shape = f"{sequences}x{tokens} tokens, {layers} layers"
    ours, lora, frozen = (seconds[kind] for kind in KINDS)
    return [
        claim(f"step: FedAMoLE / LoRA, {shape}", ours / lora, target=0.6, guarded=True),
        claim(f"step: FedAMoLE / frozen backbone, {shape}", ours / frozen, guarded=True),
        claim(f"step: frozen backbone / LoRA, {shape}", frozen / lora),
    ]


def measure_memory(layers: int) -> Claim:
    """Compare the memory that steps need beyond their model, each kind in a process of its own."""
    kilobytes = {kind: _memory_of_process(kind, layers) for kind in KINDS[:2]}
    sequences, tokens = MEMORY_SHAPE
    ratio = kilobytes["FedAMoLE"] / kilobytes["LoRA"]
    name = f"step: peak memory FedAMoLE / LoRA, {sequences}x{tokens} tokens, {layers} layers"
    return Claim(name, ratio, ratio, ratio, target=1.0, guarded=True)


def _memory_of_process(kind: str, layers: int) -> int:
    command = [sys.executable, __file__, "--memory-of", kind, "--layers", str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def memory_of_steps(kind: str, layers: int) -> int:
    """Kilobytes by which the peak of this process grows in three steps."""
    with MAKERS[kind](layers, make_batch(*MEMORY_SHAPE)) as step:
        # Making the model took more than it keeps; this makes Linux forget the peak.
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak_kilobytes()
        for _ in range(3):
            step()
        return _peak_kilobytes() - before


def _peak_kilobytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(quick: bool) -> list[Claim]:
    """Measure all claims; quick: the times of one sequence and a backbone of four layers."""
    with _alone():
        if quick:
            return measure_times(QUICK_LAYERS, *SHAPES[0], repeats=7)
        times = [one for shape in SHAPES for one in measure_times(LAYERS, *shape, repeats=9)]
    return [*times, measure_memory(LAYERS)]


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    # PEFT 0.21 asks whatever it wraps for a property that transformers deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning)
    deterministic = torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads()
    try:
        with process_group(Layout(cpu_threads=1)):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)


def main() -> None:
    """Print the claims."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="four layers instead of thirty")
    parser.add_argument("--memory-of", choices=KINDS, help="print the memory of one kind of step")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of --memory-of")
    arguments = parser.parse_args()
    if arguments.memory_of:
        with _alone():
            print(memory_of_steps(arguments.memory_of, arguments.layers))
        return
    for found in measure(arguments.quick):
        target = "" if found.target is None else f"   target {found.target:g}"
        print(f"{found.name:70} {found.value:6.3f} [{found.low:.3f}, {found.high:.3f}]{target}")


if __name__ == "__main__":
    main()
