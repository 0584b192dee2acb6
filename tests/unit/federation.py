"""A federation of three clients over a tiny generated Llama, round by round through its files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedamole.artifacts import Header
from fedamole.backbone import describe, prepare_backbone
from fedamole.client import ClientResult, ClientSession, train_packed
from fedamole.config import load_config
from fedamole.config_files import read_yaml
from fedamole.datasets.tokens import TokenStore
from fedamole.methods import load
from fedamole.partition import ClientSplit
from fedamole.pool_files import (
    read_client_state,
    read_kept,
    read_pool,
    read_upload,
    write_kept,
    write_pool,
    write_upload,
)
from fedamole.pools import Assignment, ClientState, KeptState, Pool, Upload
from fedamole.stages import ClientStage, client_stage
from fedamole.targets import BackboneFacts, target_modules

CHECKOUT = Path(__file__).parents[2]
CLIENTS = 3
# Rows of each client's four sets.
SIZES = {"train": 6, "embedding": 5, "eval": 3, "test": 2}
TEXTS = ["What is a robot?", "A robot is a machine.", "Who are you? I am a program."] * 20


@dataclass(frozen=True)
class Round:
    """What a round made. Everything but the report has been in a file."""

    number: int
    previous: Pool
    assignment: Assignment
    states: dict[int, ClientState]
    results: dict[int, ClientResult]
    uploads: list[Upload]
    pool: Pool


@dataclass
class Federation:
    """A backbone and the tokens of its clients, made on the spot."""

    folder: Path
    raw: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.raw = read_yaml(CHECKOUT / "configs/smoke.yaml")
        self.raw["training"] = {"steps": 2, "batch_size": 2, "learning_rate": 5e-3}
        self.raw["evaluation"] = {"max_new_tokens": 4, "batch_size": 4}
        self.raw["backbone"]["generate"] |= {"vocab_size": 300, "intermediate_size": 48}
        source = self.stage("fedit").run.backbone
        prepare_backbone(self.folder, source, TEXTS)
        record = describe(self.folder, source)
        self.facts = BackboneFacts(target_modules(record, None), self.folder)
        self.store = made_up_tokens()

    def stage(self, run: str, **sections: Mapping[str, Any]) -> ClientStage:
        """Settings of a run; sections replace entries of the config's."""
        raw = self.raw | {"methods": [run]}
        raw |= {key: raw.get(key, {}) | dict(value) for key, value in sections.items()}
        config = load_config(raw, CHECKOUT / "configs")
        return client_stage(config, next(iter(config.scenario_seeds())), run)

    def session(self, run: str, **sections: Mapping[str, Any]) -> ClientSession:
        """What a job of this run shares."""
        stage = self.stage(run, **sections)
        return ClientSession(stage, self.folder, self.store, torch.device("cpu"))

    def rounds(self, session: ClientSession, folder: Path, count: int = 2) -> Iterator[Round]:
        """Train, round after round."""
        folder.mkdir(parents=True, exist_ok=True)
        run = session.settings.run
        method, kept = load(run.run), dict[int, KeptState]()
        pool = method.init_pool(run, self.facts)
        for number in range(1, count + 1):
            assignment = method.assign(run, pool, number)
            pool_file = folder / f"pool_{number}.h5"
            write_pool(pool_file, Header("pool", "0" * 64), pool)
            reporting = run.population.reporting(number)
            states = {k: read_client_state(pool_file, assignment, k) for k in reporting}
            results, uploads = {}, []
            for client in reporting:
                if client % run.training.pack_clients == 0 and run.training.pack_clients > 1:
                    pack = reporting[client : client + run.training.pack_clients]
                    starts = {
                        k: method.start(session, k, number, states[k], kept.get(k)) for k in pack
                    }
                    train_packed(session, number, starts)
                state = read_client_state(pool_file, assignment, client)
                result = method.train_client(session, client, number, state, kept.get(client))
                results[client] = result
                path = folder / f"client_{number}_{client}.h5"
                write_upload(path, Header("upload", "0" * 64), result.upload)
                uploads.append(read_upload(path))
                if result.kept:
                    path = folder / f"kept_{number}_{client}.h5"
                    write_kept(path, Header("kept", "0" * 64), result.kept)
                    kept[client] = read_kept(path)
            previous = read_pool(pool_file)
            pool = method.aggregate(run, previous, assignment, iter(uploads))
            yield Round(number, previous, assignment, states, results, uploads, pool)


def made_up_tokens() -> TokenStore:
    """Random sequences of 6 to 14 tokens; each client has its own part of the vocabulary."""
    rng = np.random.default_rng(5)
    sequences, clients, references = [], [], {}
    for client in range(CLIENTS):
        parts = {}
        for name, size in SIZES.items():
            first = len(sequences)
            parts[name] = np.arange(first, first + size)
            for row in parts[name]:
                low = 20 + 90 * client
                ids = rng.integers(low, low + 90, size=rng.integers(6, 15))
                sequences.append(np.append(ids, 2))
                references[int(row)] = "a machine"
        clients.append(ClientSplit(**parts))
    return TokenStore(
        input_ids=np.concatenate(sequences).astype(np.int32),
        offsets=np.cumsum([0, *map(len, sequences)]),
        prompt_lengths=np.full(len(sequences), 3, dtype=np.int32),
        labels=np.full(len(sequences), -1, dtype=np.int32),
        clients=tuple(clients),
        references=references,
        choices=[],
        eos_id=2,
        pad_id=0,
        dropped=[0] * CLIENTS,
        cut=[0] * CLIENTS,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of all files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
