"""FedPrompt and federated p-tuning: FedAvg of a soft prompt (Zhao et al. 2022, arXiv:2208.12268).

Run ``fedprompt`` trains the embeddings of virtual tokens, which start as those of a task text
(Lester et al. 2021, arXiv:2104.08691). Run ``fedptuning`` trains an embedding table and an MLP with
ReLU that makes the prompt from it (Liu et al. 2021, arXiv:2103.10385). These are what clients
upload and the server averages: not the prompt that comes out of the MLP, since the next round
trains table and MLP again.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedamole.artifacts import read_record
from fedamole.backbone_limits import check_length
from fedamole.errors import FedamoleError
from fedamole.methods import Method
from fedamole.methods.building_blocks import (
    assign_nothing,
    average,
    evaluate_adapters,
    train_adapters,
)
from fedamole.pools import ClientState, KeptState, Pool, PoolGroup
from fedamole.randomness import stream
from fedamole.stages import RunStage
from fedamole.targets import BackboneFacts

if TYPE_CHECKING:
    from fedamole.client import ClientReport, ClientResult, ClientSession

# The only group and module of a pool; its tensors are named as in PEFT's modules.
PROMPT, EMBEDDING = "prompt", "embedding.weight"


def init_prompt(settings: RunStage, backbone: BackboneFacts) -> Pool:
    """Make a prompt of the token embeddings of the task text.

    The text is tokenised as the prompts of the data are, with the BOS token where they have one.

    Raises
    ------
    FedamoleError
        If the text has no token, or the model no position left for it.
    """
    from fedamole.backbone import load_tokenizer
    from fedamole.datasets.tokenize import Encoder
    from fedamole.token_embeddings import embeddings_of

    tokenizer = load_tokenizer(backbone.folder, settings.backbone)
    encoder = Encoder(tokenizer, settings.scenario.max_length)
    token_ids = encoder.prompts([settings.prompt.text])[0]
    if len(token_ids) == len(encoder.prefix):
        raise FedamoleError(
            f"prompt: text {settings.prompt.text!r} has no token; a soft prompt needs one at least"
        )
    _check_positions(settings, backbone.folder, len(token_ids))
    return _pool({EMBEDDING: embeddings_of(backbone.folder, settings.backbone, token_ids)})


def init_encoder(settings: RunStage, backbone: BackboneFacts) -> Pool:
    """Draw an embedding table from N(0, 1) and an MLP of three layers as torch.nn.Linear does.

    Every tensor draws from a stream of its own.

    Raises
    ------
    FedamoleError
        If the model has no position left for the prompt.
    """
    from fedamole.token_embeddings import embedding_width

    size, hidden = settings.prompt.virtual_tokens, settings.prompt.encoder_width
    _check_positions(settings, backbone.folder, size)
    width = embedding_width(backbone.folder, settings.backbone)
    rng = stream(settings.seed, "pool", PROMPT, EMBEDDING)
    return _pool(
        {
            EMBEDDING: rng.standard_normal((size, width), dtype=np.float32),
            # Numbers 1 and 3 are the ReLUs between.
            **_linear(settings, "mlp_head.0", width, hidden),
            **_linear(settings, "mlp_head.2", hidden, hidden),
            **_linear(settings, "mlp_head.4", hidden, width),
        }
    )


def train_client(
    session: "ClientSession",
    client: int,
    round_: int,
    state: ClientState,
    kept: KeptState | None = None,
) -> "ClientResult":
    """Train the prompt and nothing else; see :class:`fedamole.methods.Method`."""
    from fedamole.soft_prompts import SOFT_PROMPT

    return train_adapters(session, client, round_, state, kept, SOFT_PROMPT)


def evaluate_client(
    session: "ClientSession", client: int, round_: int, state: ClientState
) -> "ClientReport":
    """Test with the averaged prompt; see :class:`fedamole.methods.Method`."""
    from fedamole.soft_prompts import SOFT_PROMPT

    return evaluate_adapters(session, client, round_, state, SOFT_PROMPT)


def _linear(settings: RunStage, name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    """Draw weight and bias like torch.nn.Linear: uniform within 1 / sqrt(inputs)."""
    bound, tensors = 1.0 / np.sqrt(inputs), {}
    for key, shape in ((f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,))):
        rng = stream(settings.seed, "pool", PROMPT, key)
        tensors[key] = rng.uniform(-bound, bound, size=shape).astype(np.float32)
    return tensors


def _pool(tensors: dict[str, np.ndarray]) -> Pool:
    """Make a pool of one module that every client gets."""
    shared = {name: tensor[None] for name, tensor in tensors.items()}
    return Pool({PROMPT: PoolGroup((PROMPT,), {}, shared)}, num_experts=0, provenance=None)


def _check_positions(settings: RunStage, folder: Path, virtual_tokens: int) -> None:
    """Refuse sequences that the model has no positions for when a prompt stands before them."""
    positions = read_record(folder / "backbone.json", "backbone")[1].get("positions")
    length = settings.scenario.max_length
    check_length(settings.backbone.name, positions, length, virtual_tokens=virtual_tokens)


FEDPROMPT = Method(
    init_pool=init_prompt,
    assign=assign_nothing,
    aggregate=average,
    train_client=train_client,
    evaluate_client=evaluate_client,
)
RUNS = {"fedprompt": FEDPROMPT, "fedptuning": replace(FEDPROMPT, init_pool=init_encoder)}
