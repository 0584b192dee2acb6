"""What settings ask of data and backbone, checked by a job before any of its clients starts.

A mistake in the config is none of a client's: no client may drop out of a round by it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedamole.backbone_limits import check_length
from fedamole.errors import FedamoleError
from fedamole.planning.contents import contents_of
from fedamole.registry import RUNS
from fedamole.stages import ClientStage, RunStage, digest

if TYPE_CHECKING:
    from fedamole.datasets.tokens import TokenStore


def check_session(
    settings: ClientStage, facts: Mapping[str, Any], store: "TokenStore", virtual_tokens: int = 0
) -> None:
    """Refuse settings that fail for every client, or for the first that is large enough.

    Parameters
    ----------
    settings
        Of the run and the evaluation.
    facts
        Content of ``backbone.json``.
    store
        Tokens of the scenario.
    virtual_tokens
        Length of the soft prompt; 0 without one.

    Raises
    ------
    FedamoleError
        If sequences are longer than the backbone takes, or delta is too large for a client.
    """
    # A test adds one choice, or a whole generated answer, to a prompt shorter than max_length.
    answer = max(map(len, store.choices), default=settings.evaluation.max_new_tokens + 1) - 1
    max_length = settings.run.scenario.max_length
    check_length(facts["name"], facts.get("positions"), max_length, answer, virtual_tokens)
    _check_delta(settings.run, store)


def prompt_length(run: RunStage, pool: Path) -> int:
    """Virtual tokens of a run, as its pool has them; 0 for a run without a soft prompt."""
    if not RUNS[run.run].depends_on("prompt"):
        return 0
    from fedamole.methods.soft_prompts import EMBEDDING, PROMPT
    from fedamole.pool_files import read_client_state

    state = read_client_state(pool, None, 0, digest(run))
    return int(state.groups[PROMPT].shared[EMBEDDING].shape[1])


def _check_delta(run: RunStage, store: "TokenStore") -> None:
    """Refuse a delta that is too large for a client of the scenario."""
    private = run.privacy.dp_sgd
    if private is None:
        return
    whole = contents_of(run.run).embedding_set == "train"
    sizes = [len(rows.train) + whole * len(rows.embedding) for rows in store.clients]
    if run.population.pooled:
        sizes = [sum(sizes)]
    if not private.covers(max(sizes)):
        raise FedamoleError(
            f"privacy: dp_sgd: delta {private.delta} must be below 1 / training examples of every "
            f"client; client {sizes.index(max(sizes))} has {max(sizes)}"
        )
