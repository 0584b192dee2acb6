"""Clients of a round trained at once through one frozen backbone, against one after another.

Time per client of a federated round at batch size 1, both ways taking turns in one process: the
training of all clients with their own experts, without tests. The backbone has random weights and
the shape of SmolLM2-135M; on a GPU that of a model of 1.2 billion parameters, in bfloat16.

    python benchmarks/packing.py [--quick]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measuring import Claim, claim, interleaved
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedamole import distributed
from fedamole.client import ClientSession, Start, locally_trained, train_packed
from fedamole.config import load_config
from fedamole.datasets.tokens import TokenStore
from fedamole.launching import Layout
from fedamole.methods import load
from fedamole.partition import ClientSplit
from fedamole.pools import ClientState
from fedamole.stages import client_stage
from fedamole.targets import BackboneFacts

CONFIGS = Path(__file__).parents[1] / "configs"
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Case:
    """One measured case.

    Attributes
    ----------
    name
        Of the shape.
    shape
        Of the backbone.
    dtype
        Of its weights.
    clients
        Clients of the round.
    lengths
        Shortest and longest sequence in tokens.
    steps
        Steps of each client.
    target
        Least ratio of the times.
    """

    name: str
    shape: dict[str, int]
    dtype: str
    clients: int
    lengths: tuple[int, int]
    steps: int
    target: float | None


def cases(quick: bool) -> list[Case]:
    """What is measured on this machine."""
    if torch.cuda.is_available():
        sizes = [10] if quick else [2, 5, 10, 20, 40]
        return [
            Case(
                "1B shape, bf16", LLAMA_1B, "bfloat16", k, (100, 400), 10, 4.0 if k == 10 else None
            )
            for k in sizes
        ]
    if quick:
        small = {**SMOLLM2, "num_hidden_layers": 4}
        return [Case("4 layers of SmolLM2", small, "float32", 6, (32, 96), 2, 1.0)]
    sizes = [(2, (32, 192)), (5, (32, 192)), (10, (32, 192)), (10, (128, 128))]
    return [Case("SmolLM2 shape", SMOLLM2, "float32", *size, 2, 1.0) for size in sizes]


def make_store(case: Case) -> TokenStore:
    """Random sequences; a quarter of each is the answer."""
    rng = np.random.default_rng(0)
    per_client = case.steps
    lengths = rng.integers(case.lengths[0], case.lengths[1] + 1, size=case.clients * per_client)
    rows = np.arange(len(lengths)).reshape(case.clients, per_client)
    nothing = np.zeros(0, dtype=np.int64)
    return TokenStore(
        input_ids=rng.integers(5, 1000, size=lengths.sum()).astype(np.int32),
        offsets=np.cumsum([0, *lengths]),
        prompt_lengths=(lengths * 3 // 4).astype(np.int32),
        labels=np.full(len(lengths), -1, dtype=np.int32),
        clients=tuple(ClientSplit(row, nothing, nothing, nothing) for row in rows),
        references={},
        choices=[],
        eos_id=2,
        pad_id=0,
        dropped=[0] * case.clients,
        cut=[0] * case.clients,
    )


def make_session(case: Case, folder: Path, pack: int) -> ClientSession:
    """A job that trains FedAMoLE of the paper's size on the backbone in a folder."""
    raw = {
        "backbone": {"name": "shape", "folder": str(folder), "dtype": case.dtype},
        "scenarios": [{"dataset": "chatterbot", "partition": "iid", "clients": case.clients}],
        "methods": ["fedamole"],
        "assignment": {"num_experts": 3 * case.clients, "max_experts": 8},
        "training": {"steps": case.steps, "pack_clients": pack},
    }
    config = load_config(raw, CONFIGS)
    stage = client_stage(config, next(iter(config.scenario_seeds())), "fedamole")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ClientSession(stage, folder, make_store(case), device)


def make_backbone(case: Case, folder: Path) -> BackboneFacts:
    """Write a model with random weights and a tokenizer that nobody asks."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from fedamole.backbone import describe
    from fedamole.settings import BackboneSettings
    from fedamole.targets import target_modules

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**case.shape))
    model.to(getattr(torch, case.dtype)).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({"</s>": 0}, unk_token="</s>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    source = BackboneSettings(name="shape", folder=str(folder))
    return BackboneFacts(target_modules(describe(folder, source), None), folder)


def states_of(session: ClientSession, facts: BackboneFacts, folder: Path) -> dict[int, ClientState]:
    """What the clients hold in round 1."""
    from fedamole.artifacts import Header
    from fedamole.pool_files import read_client_state, write_pool

    run, method = session.settings.run, load("fedamole")
    pool = method.init_pool(run, facts)
    write_pool(folder / "pool.h5", Header("pool", "0" * 64), pool)
    assignment = method.assign(run, pool, 1)
    clients = range(run.scenario.clients)
    return {k: read_client_state(folder / "pool.h5", assignment, k) for k in clients}


def one_by_one(session: ClientSession, starts: dict[int, Start]) -> Callable[[], None]:
    """Training of all clients, one after another."""

    def train() -> None:
        for client, start in starts.items():
            with locally_trained(session, client, 1, start):
                pass

    return train


def at_once(session: ClientSession, starts: dict[int, Start]) -> Callable[[], None]:
    """Training of all clients in one pack, until each stands ready to be tested."""

    def train() -> None:
        train_packed(session, 1, starts)
        for client, start in starts.items():
            with locally_trained(session, client, 1, start):
                pass

    return train


def measure_case(case: Case, repeats: int) -> Claim:
    """Ratio of the times of both ways."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = make_backbone(case, folder)
        alone, packed = (make_session(case, folder, pack) for pack in (1, case.clients))
        states = states_of(alone, facts, folder)
        starts = {k: Start(state, with_embedding_set=False) for k, state in states.items()}
        steps = {"alone": one_by_one(alone, starts), "packed": at_once(packed, starts)}
        # Work of a GPU is not CPU time.
        on_gpu = alone.device.type == "cuda"
        seconds = interleaved(
            steps, repeats, warm_up=1, clock=time.monotonic if on_gpu else time.process_time
        )
    low, high = case.lengths
    return claim(
        f"packing: {case.clients} clients x {low}-{high} tokens, {case.name}: as many per hour",
        seconds["alone"] / seconds["packed"],
        target=case.target,
        larger_is_better=True,
        guarded=True,
    )


def measure(quick: bool) -> list[Claim]:
    """All claims."""
    torch.set_num_threads(1)
    with distributed.process_group(Layout()):
        return [measure_case(case, repeats=3) for case in cases(quick)]


def main() -> None:
    """Print the claims."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model")
    for found in measure(parser.parse_args().quick):
        print(f"{found.name}: {found.value:.2f} [{found.low:.2f}, {found.high:.2f}]")


if __name__ == "__main__":
    main()
