"""A round as the server sees it: files of any size, and commands run and measured in a process.

The tensors are those of the paper's setting unless a size says otherwise: q and v of Llama-3.2-1B,
32 modules, rank 8. What they hold is random; the server does not care.
"""

# M = modules, E = domain experts of one module, K = clients, R = rank, N = rows a client holds

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedamole.artifacts import Header
from fedamole.assignment import assign_all, random_scores
from fedamole.pool_files import write_assignment, write_pool, write_upload
from fedamole.pools import (
    Assignment,
    ClientGroup,
    ClientState,
    Pool,
    PoolGroup,
    Upload,
    held_rows,
)
from fedamole.stages import RunStage, canonical_json, digest

DATASET = {
    "name": "none",
    "source": {"files": ["none.jsonl"]},
    "task": "generation",
    "template": "alpaca",
    "response": "answer",
    "category": "topic",
}
TOP_K = 2


@dataclass(frozen=True)
class Size:
    """A federation of one run."""

    clients: int = 10
    """Clients K."""
    experts: int = 30
    """Domain experts E of a module."""
    choices: int = 2
    """Clients c per expert."""
    rank: int = 8
    """LoRA rank R."""
    layers: int = 16
    """Transformer layers; each has two modules, q and v."""
    width: int = 2048
    """Inputs of both, outputs of q."""
    value_width: int = 512
    """Outputs of v."""
    max_experts: int = 8
    """Most experts of a client."""

    @property
    def stage(self) -> RunStage:
        """Settings of the run."""
        scenario = {"dataset": DATASET, "partition": "iid", "clients": self.clients}
        backbone = {"backbone": {"name": "tiny", "generate": {}}}
        return RunStage.model_validate(
            {
                "run": "fedamole",
                "tokens": {"scenario": {"scenario": scenario, "seed": 1}, "backbone": backbone},
                "adapter": {"rank": self.rank, "top_k": TOP_K},
                "assignment": {
                    "num_experts": self.experts,
                    "choices": self.choices,
                    "max_experts": self.max_experts,
                },
                "aggregation": {},
                "training": {},
            }
        )


@dataclass(frozen=True)
class RoundFiles:
    """What a round leaves for the server, and where its pool goes."""

    settings: str
    pool: Path
    assignment: Path
    uploads: list[Path]
    out_pool: Path
    out_assignment: Path

    @property
    def aggregate(self) -> list[str]:
        """The command that averages."""
        return [
            *("aggregate", "--settings", self.settings, "--pool", str(self.pool)),
            *("--assignment", str(self.assignment), "--out-pool", str(self.out_pool)),
            *("--uploads", *map(str, self.uploads)),
        ]

    @property
    def assign(self) -> list[str]:
        """The command that hands out the averaged pool."""
        return [
            *("assign", "--settings", self.settings, "--pool", str(self.out_pool)),
            *("--out-assignment", str(self.out_assignment)),
        ]


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw float32 numbers fast: a block of normal ones, over and over."""
    block = rng.standard_normal(min(2**20, int(np.prod(shape))), dtype=np.float32)
    return np.resize(block, shape)


def make_pool(size: Size, rng: np.random.Generator) -> Pool:
    """Make a pool before training."""
    groups = {}
    for name, height in (("q_proj", size.width), ("v_proj", size.value_width)):
        lead, rank = (size.layers, size.experts), size.rank
        groups[name] = PoolGroup(
            modules=tuple(f"model.layers.{i}.self_attn.{name}" for i in range(size.layers)),
            experts={
                "lora_A": noise(rng, *lead, rank, size.width),
                "lora_B": noise(rng, *lead, height, rank),
            },
            shared={
                "lora_A": noise(rng, size.layers, rank, size.width),
                "lora_B": noise(rng, size.layers, height, rank),
                "token_proj": noise(rng, size.layers, rank, size.width),
            },
        )
    return Pool(groups, size.experts, None)


def make_assignment(size: Size, pool: Pool, rng: np.random.Generator) -> Assignment:
    """Assign for round 1, by random scores."""
    scores = random_scores(rng, len(pool.modules), size.experts, size.clients)
    return assign_all(scores, size.stage.assignment, TOP_K, pool.modules, 1)


def make_upload(size: Size, pool: Pool, assignment: Assignment, client: int) -> Upload:
    """Make what a client sends."""
    rng = np.random.default_rng(client)
    groups, embeddings, tokens = {}, {}, {}
    for name, (module_N, expert_N) in held_rows(assignment, pool.groups, client).items():
        group, count = pool.groups[name], len(module_N)
        groups[name] = ClientGroup(
            modules=group.modules,
            experts={k: noise(rng, count, *v.shape[2:]) for k, v in group.experts.items()},
            module_N=module_N,
            expert_N=expert_N,
            shared={key: noise(rng, *value.shape) for key, value in group.shared.items()},
        )
        embeddings[name] = noise(rng, count, size.rank)
        tokens[name] = rng.integers(1, 1000, count)
    return Upload(
        client=client,
        round=1,
        state=ClientState(groups),
        num_examples=100,
        client_embeddings_MR=noise(rng, len(pool.modules), size.rank),
        expert_embeddings=embeddings,
        tokens=tokens,
    )


def write_round(folder: Path, size: Size) -> RoundFiles:
    """Write a round's files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stage, rng = size.stage, np.random.default_rng(0)
    pool = make_pool(size, rng)
    assignment = make_assignment(size, pool, rng)
    write_pool(folder / "pool.h5", Header("pool", digest(stage)), pool)
    write_assignment(folder / "assignment.h5", Header("assignment", digest(stage)), assignment)
    uploads = [folder / f"client_{client:03}.h5" for client in range(size.clients)]
    for client, path in enumerate(uploads):
        upload = make_upload(size, pool, assignment, client)
        write_upload(path, Header("upload", digest(stage)), upload)
    return RoundFiles(
        settings=canonical_json(stage),
        pool=folder / "pool.h5",
        assignment=folder / "assignment.h5",
        uploads=uploads,
        out_pool=folder / "next" / "pool.h5",
        out_assignment=folder / "next" / "assignment.h5",
    )


@dataclass(frozen=True)
class Cost:
    """What a process took."""

    cpu_s: float
    """CPU time, user and system."""
    peak_gb: float
    """Most resident memory, in 10^9 bytes."""


# A program that runs another one and says what it took: exec would keep the most memory of before.
MEASURED = """
import sys, time
sys.argv = sys.argv[1:]
code = 0
{body}
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("cost", time.process_time(), peak.split()[1])
sys.exit(code)
"""
COMMAND = """
import fedamole.cli
try:
    code = fedamole.cli.main(sys.argv)
except SystemExit as ended:
    code = ended.code
"""


def run_command(arguments: Sequence[str]) -> Cost:
    """Run a command of fedamole in a process of its own and measure it, start-up included."""
    return run_python(COMMAND, *arguments)


def run_python(body: str, *arguments: str) -> Cost:
    """Run Python code in a process of its own and measure it.

    Raises
    ------
    RuntimeError
        If it fails.
    """
    command = [sys.executable, "-c", MEASURED.format(body=body), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FEDAMOLE_LOG": "ERROR"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[:2])} ended with {done.returncode}: {done.stderr}")
    _, cpu_s, kilobytes = done.stdout.splitlines()[-1].split()
    return Cost(float(cpu_s), int(kilobytes) * 1024 / 1e9)
