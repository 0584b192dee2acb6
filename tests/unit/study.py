"""A made-up study: metrics files as ``fedamole gather`` writes them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedamole.artifacts import Header, canonical
from fedamole.registry import lookup
from fedamole.routing_map import map_clients
from fedamole.settings import TablesSettings
from fedamole.stages import ResultsStage, SweepPoint

Score = Callable[[str, str, int, int], float]


@dataclass(frozen=True)
class Study:
    """Sizes of the study; its scores and losses by scenario slug, method, round and client."""

    score: Score
    loss: Score
    methods: Sequence[str] = ("fedamole", "fedit", "fedit-ft", "zero-shot")
    scenarios: dict[str, list[int]] = field(default_factory=lambda: {"chatterbot-dir0.5": [42]})
    clients: int = 4
    rounds: int = 4
    classes: Sequence[str] = ("ai", "food", "movies")
    modules: int = 4
    experts: int = 8
    holders: int = 2
    metric: str = "rouge_l"
    tables: TablesSettings = field(default_factory=TablesSettings)
    sweep: dict[str, SweepPoint] = field(default_factory=dict)

    def settings(self) -> ResultsStage:
        """Give the settings that a config of this study would."""
        return ResultsStage(
            tables=self.tables,
            methods=list(self.methods),
            scenarios={
                name: [f"{name}-s{seed}" for seed in seeds]
                for name, seeds in self.scenarios.items()
            },
            metrics=dict.fromkeys(self.scenarios, self.metric),
            sweep=self.sweep,
        )

    def write(self, folder: Path) -> list[Path]:
        """Write one file per scenario, seed and method."""
        return [
            write_lines(
                folder / f"{name}-s{seed}" / f"{method}.jsonl", self.lines(name, seed, method)
            )
            for name, seeds in self.scenarios.items()
            for seed in seeds
            for method in self.methods
        ]

    def lines(self, name: str, seed: int, method: str) -> list[dict[str, Any]]:
        """Lines of one metrics file."""
        slug, row = f"{name}-s{seed}", lookup(method)
        rng = np.random.default_rng(seed)
        shares = rng.dirichlet([0.5] * self.clients, size=len(self.classes)).T
        header = json.loads(Header("metrics-table", "0" * 64).to_json())
        run = {"record": "run", "scenario": slug, "seed": seed, "method": method}
        run |= {"metric": self.metric, "clients": self.clients, "evaluated": row.evaluated}
        run |= {"rounds": self.rounds if row.trains else 0}
        counts = np.round(shares * 120).astype(int).tolist()
        partition = {"record": "partition", "classes": list(self.classes), "counts": counts}
        rounds = range(1, self.rounds + 1) if row.trains else [0]
        lines = [{"header": header}, run, partition]
        for round_ in rounds:
            lines += [self._client(slug, method, round_, client) for client in range(self.clients)]
            if row.assigns:
                lines.append(self._assignment(np.random.default_rng([seed, round_]), round_))
        return lines

    def _client(self, slug: str, method: str, round_: int, client: int) -> dict[str, Any]:
        trained = lookup(method).evaluated == "local"
        return {
            "record": "client",
            "round": round_,
            "client": client,
            "score": self.score(slug, method, round_, client),
            "eval_loss": self.loss(slug, method, round_, client),
            "num_train": 120 if trained else None,
            "num_eval": 20,
            "num_test": 20,
            "train_loss_first": 3.1 if trained else None,
            "train_loss_last": 2.5 if trained else None,
            "steps": 10 if trained else None,
        }

    def _assignment(self, rng: np.random.Generator, round_: int) -> dict[str, Any]:
        projections = [
            f"model.layers.{m // 2}.self_attn.{'qv'[m % 2]}_proj" for m in range(self.modules)
        ]
        holders = [
            [
                sorted(rng.permutation(self.clients)[: self.holders].tolist())
                for _ in range(self.experts)
            ]
            for _ in projections
        ]
        places = map_clients(rng.random((2, self.experts, self.clients), dtype=np.float32))
        assert places is not None
        return {
            "record": "assignment",
            "round": round_,
            "map": places.places,
            "map_shares": places.shares,
            "modules": projections,
            "num_experts": self.experts,
            "holders": holders,
            "objective": [1.5] * len(projections),
            "optimum": [2.0] * len(projections),
            "chance": [1.0] * len(projections),
        }


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(canonical(line) + "\n" for line in lines), encoding="utf-8")
    return path
