"""Local: every client trains a LoRA of its own and shares nothing; the floor of personalisation.

All start from the same values, which the pool holds in every round.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from fedamole.methods.building_blocks import (
    adapter_method,
    average,
    init_lora,
    only_shared,
    shared_of,
    with_shared,
)
from fedamole.pools import Assignment, ClientState, KeptState, Pool, Upload
from fedamole.stages import RunStage

if TYPE_CHECKING:
    from fedamole.client import ClientResult, ClientSession, Start


def aggregate(
    settings: RunStage, previous: Pool, assignment: Assignment, uploads: Iterable[Upload]
) -> Pool:
    """Leave the pool as it is; it only says which round it is, and who has ever trained."""
    groups = {name: replace(group, shared={}) for name, group in previous.groups.items()}
    round_made = average(settings, replace(previous, groups=groups), assignment, uploads)
    return replace(previous, provenance=round_made.provenance)


def start(
    session: "ClientSession",
    client: int,
    round_: int,
    state: ClientState,
    kept: KeptState | None = None,
) -> "Start":
    """Start from what the client kept; see :class:`fedamole.methods.Method`."""
    from fedamole.client import Start

    return Start(with_shared(state, kept.groups) if kept else state, with_embedding_set=True)


def train_client(
    session: "ClientSession",
    client: int,
    round_: int,
    state: ClientState,
    kept: KeptState | None = None,
) -> "ClientResult":
    """Train on from what the client kept; see :class:`fedamole.methods.Method`.

    The upload names the modules and holds no tensor.
    """
    from fedamole.client import ClientResult, locally_trained, report_of, upload_of

    begin = start(session, client, round_, state, kept)
    with locally_trained(session, client, round_, begin) as trained:
        return ClientResult(
            upload_of(trained, state=only_shared(trained.state, ())),
            report_of(session, trained),
            KeptState(client, round_, shared_of(trained.state), {}),
        )


RUNS = {
    "local": replace(
        adapter_method(init_lora), aggregate=aggregate, train_client=train_client, start=start
    )
}
