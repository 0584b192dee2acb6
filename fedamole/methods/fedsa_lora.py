"""FedSA-LoRA: A is averaged, B stays with the client (Guo et al. 2024, arXiv:2410.01463).

A learns what is common to all, B what is the client's own. All start from the same A, and B = 0.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedamole.artifacts import read_record
from fedamole.methods.building_blocks import (
    Tensors,
    adapter_method,
    init_lora,
    only_shared,
    shared_of,
    with_shared,
)
from fedamole.pools import ClientState, KeptState, Pool
from fedamole.stages import RunStage
from fedamole.targets import BackboneFacts, target_modules

if TYPE_CHECKING:
    from fedamole.client import ClientResult, ClientSession, Start


def init_pool(settings: RunStage, backbone: BackboneFacts) -> Pool:
    """Make the A of one LoRA per module."""
    pool = init_lora(settings, backbone)
    groups = {
        name: replace(group, shared={"lora_A": group.shared["lora_A"]})
        for name, group in pool.groups.items()
    }
    return replace(pool, groups=groups)


def start(
    session: "ClientSession",
    client: int,
    round_: int,
    state: ClientState,
    kept: KeptState | None = None,
) -> "Start":
    """Put the averaged A beside the client's own B; see :class:`fedamole.methods.Method`."""
    from fedamole.client import Start

    own = kept.groups if kept else _first_lora_b(session, state)
    return Start(with_shared(state, own), with_embedding_set=True)


def train_client(
    session: "ClientSession",
    client: int,
    round_: int,
    state: ClientState,
    kept: KeptState | None = None,
) -> "ClientResult":
    """Train the averaged A with the client's own B; see :class:`fedamole.methods.Method`."""
    from fedamole.client import ClientResult, locally_trained, report_of, upload_of

    begin = start(session, client, round_, state, kept)
    with locally_trained(session, client, round_, begin) as trained:
        return ClientResult(
            upload_of(trained, state=only_shared(trained.state, ["lora_A"])),
            report_of(session, trained),
            KeptState(client, round_, shared_of(only_shared(trained.state, ["lora_B"])), {}),
        )


def _first_lora_b(session: "ClientSession", state: ClientState) -> Tensors:
    """B before a client's first training: zeros, as high as the layers of the backbone."""
    record = read_record(session.folder / "backbone.json", "backbone")[1]
    modules = target_modules(record, session.settings.run.adapter.target_modules)
    height = {module.name: module.out_features for module in modules}
    rank = session.settings.run.adapter.rank
    return {
        name: {"lora_B": np.zeros((len(group.modules), height[group.modules[0]], rank), np.float32)}
        for name, group in state.groups.items()
    }


RUNS = {"fedsa-lora": replace(adapter_method(init_pool), train_client=train_client, start=start)}
