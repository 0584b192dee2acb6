"""Time and quality of the strategies that hand out experts, module by module.

CPU time on one thread, the strategies taking turns on the same scores, and the sum of the scores
that each reaches, in percent of the optimum (RSEA), and from chance (0) to the optimum (100):

    python benchmarks/assignment.py [--json FILE] [--repeats 9] [--modules 5]

Scores are those of a first round: clients in clusters, random A and P, embeddings of the mean
inputs (arXiv:2411.19128). How much they differ is given by the standard deviation of the logits:
about 0.03 for SmolLM2-135M on the demo. A static assignment is a random one.
"""

# E = domain experts of one module, K = clients, R = rank, D = input width, H = clients per expert

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from measuring import RESULTS, Claim, claim, interleaved, machine, quartiles

from fedamole.assignment import assign_experts, random_scores, score_experts, similarities
from fedamole.assignment_strategies import assign_evenly, assign_greedily, choose_as_clients
from fedamole.randomness import stream
from fedamole.transport import SOLVER

RANK, WIDTH, CLUSTERS = 8, 256, 5
MIN_EXPERTS, MAX_EXPERTS = 2, 8
JSON = RESULTS / "assignment.json"


@dataclass(frozen=True)
class Size:
    """One measured case."""

    experts: int
    """Domain experts E of a module."""
    clients: int
    """Clients K."""
    choices: int = 2
    """Clients c per expert."""


SIZES = [Size(30, 10), Size(100, 50), Size(300, 100), Size(1000, 500)]


@dataclass(frozen=True)
class Module:
    """What the strategies go by in one module, each (E, K)."""

    scores: np.ndarray
    """Softmax over clients: what RSEA maximises."""
    logits: np.ndarray
    """What clients choose by."""
    random: np.ndarray
    """Uniform in [0, 1)."""


Solve = Callable[[np.ndarray, int, int, int], np.ndarray]
STRATEGIES: dict[str, tuple[Solve, str]] = {
    "rsea": (assign_experts, "scores"),
    "random, static": (assign_experts, "random"),
    "greedy": (assign_greedily, "scores"),
    "client-chooses": (choose_as_clients, "logits"),
    "load-balanced": (assign_evenly, "scores"),
}


def make_module(size: Size, sharpness: float, index: int) -> Module:
    """Draw a module: an expert's embedding is the mean of A x over its H clients of the round.

    Parameters
    ----------
    size
        Experts and clients.
    sharpness
        Standard deviation of the logits.
    index
        Names the random stream.
    """
    rng = stream(index, "benchmark", size.experts, size.clients)
    centres = rng.standard_normal((CLUSTERS, WIDTH))
    inputs_KD = centres[rng.integers(CLUSTERS, size=size.clients)]
    inputs_KD = inputs_KD + 0.5 * rng.standard_normal((size.clients, WIDTH))
    proj_RD = rng.uniform(-1, 1, (RANK, WIDTH)) / np.sqrt(WIDTH)
    lora_ERD = rng.uniform(-1, 1, (size.experts, RANK, WIDTH)) / np.sqrt(WIDTH)
    held_EH = rng.random((size.experts, size.clients)).argsort(axis=1)[:, : size.choices]
    experts_ER = np.einsum("erd,ed->er", lora_ERD, inputs_KD[held_EH].mean(axis=1))
    clients_KR = inputs_KD @ proj_RD.T
    scale = sharpness / similarities(experts_ER[None], clients_KR[None]).std()
    return Module(
        scores=score_experts(scale * experts_ER[None], clients_KR[None])[0],
        logits=scale * similarities(experts_ER[None], clients_KR[None])[0],
        random=random_scores(rng, 1, size.experts, size.clients)[0],
    )


def records_of(size: Size, sharpness: float, modules: int, repeats: int) -> list[dict[str, object]]:
    """Measure all strategies on the modules of one size: one record each."""
    drawn = [make_module(size, sharpness, index) for index in range(modules)]
    found = {name: [_holders(name, size, module) for module in drawn] for name in STRATEGIES}
    seconds = [_seconds(size, module, repeats) for module in drawn]
    times = {name: 1000 * np.concatenate([each[name] for each in seconds]) for name in STRATEGIES}
    return [
        {**asdict(size), "sharpness": sharpness, "strategy": name}
        | {"milliseconds": np.round(quartiles(times[name]), 4).tolist()}
        | facts(drawn, found[name], found["rsea"])
        for name in STRATEGIES
    ]


def _holders(strategy: str, size: Size, module: Module) -> np.ndarray:
    """Hand out a module: (E, K) bool."""
    solve, basis = STRATEGIES[strategy]
    return solve(getattr(module, basis), size.choices, MIN_EXPERTS, MAX_EXPERTS)


def _seconds(size: Size, module: Module, repeats: int) -> dict[str, np.ndarray]:
    """Time the strategies in turns on one module, (repeats,) each."""
    steps = {name: partial(_holders, name, size, module) for name in STRATEGIES}
    return interleaved(steps, repeats, warm_up=1)


def measure(quick: bool) -> list[Claim]:
    """Cost of the optimum over that of going through the pairs in the order of their scores."""
    claims = []
    for size in SIZES[:2] if quick else SIZES:
        seconds = _seconds(size, make_module(size, 1.0, 0), repeats=9)
        name = f"RSEA over greedy assignment, {size.experts} experts x {size.clients} clients"
        claims.append(claim(name, seconds["rsea"] / seconds["greedy"]))
    return claims


def facts(
    modules: list[Module], found: list[np.ndarray], optimal: list[np.ndarray]
) -> dict[str, float]:
    """Quality over all modules; loads and experts without holder, means over modules."""
    pairs = list(zip(modules, found, strict=True))
    reached = sum(module.scores[held].sum(dtype=float) for module, held in pairs)
    best = sum(m.scores[held].sum(dtype=float) for m, held in zip(modules, optimal, strict=True))
    # At random, every pair is chosen with the same probability.
    chance = sum(m.scores.sum(dtype=float) * held.mean() for m, held in pairs)
    return {
        "quality": reached / best,
        "above_chance": (reached - chance) / (best - chance),
        "fewest_experts": float(np.mean([held.sum(axis=0).min() for held in found])),
        "most_experts": float(np.mean([held.sum(axis=0).max() for held in found])),
        "without_holder": float(np.mean([(~held.any(axis=1)).sum() for held in found])),
    }


def format_record(record: dict) -> str:
    """Give one line of the table."""
    low, median, high = record["milliseconds"]
    cells = [
        "{experts} x {clients}, c = {choices}".format(**record),
        f"{record['sharpness']:g}",
        record["strategy"],
        f"{median:.2f} [{low:.2f}, {high:.2f}]",
        f"{100 * record['quality']:.2f}",
        f"{100 * record['above_chance']:.1f}",
        "{fewest_experts:.1f} to {most_experts:.1f}".format(**record),
        f"{record['without_holder']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure every size, print a Markdown table and write the records as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=JSON, help="file for the records")
    parser.add_argument("--repeats", type=int, default=9, help="timed passes over the modules")
    parser.add_argument("--modules", type=int, default=5, help="modules per size")
    parser.add_argument(
        "--sharpness", type=float, nargs="+", default=[0.03, 1.0], help="deviation of the logits"
    )
    arguments = parser.parse_args()
    print("| experts x clients | logits | strategy | ms per module [quartiles] ", end="")
    print("| quality (%) | above chance (%) | experts of a client | without holder |")
    print("| :--- | ---: | :--- | ---: | ---: | ---: | ---: | ---: |")
    records = []
    for sharpness in arguments.sharpness:
        for size in SIZES:
            measured = records_of(size, sharpness, arguments.modules, arguments.repeats)
            print("\n".join(map(format_record, measured)), flush=True)
            records += measured
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine() | {"solver": SOLVER},
        "modules": arguments.modules,
        "repeats": arguments.repeats,
    }
    arguments.json.write_text(json.dumps(content | {"records": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
