"""What a backbone makes of tokens, found out without loading it."""

# V = tokens, D = width of the token embeddings

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from fedamole.backbone import load_backbone
from fedamole.errors import FedamoleError
from fedamole.settings import BackboneSettings


def embedding_width(folder: Path, settings: BackboneSettings) -> int:
    """Width D of the token embeddings of a prepared backbone.

    Raises
    ------
    FedamoleError
        If the model takes tokens only, and no embeddings.
    """
    embedding = _without_weights(folder, settings).get_input_embeddings()
    return int(cast(nn.Embedding, embedding).embedding_dim)


@torch.no_grad()
def embeddings_of(folder: Path, settings: BackboneSettings, token_ids: Sequence[int]) -> np.ndarray:
    """Embed tokens as a prepared backbone does, scaled where the model scales them.

    Of the weights only these rows are read; all, if they are in no safetensors file under the name
    that they have in the model.

    Returns
    -------
    numpy.ndarray
        (V, D) float32.

    Raises
    ------
    FedamoleError
        If the model takes tokens only, and no embeddings.
    """
    model = _without_weights(folder, settings)
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    rows_VD = _stored_rows(folder, _stored_names(model), token_ids)
    if rows_VD is None:
        plain = settings.model_copy(update={"quantization": None})
        whole = load_backbone(folder, plain).get_input_embeddings()
        return np.asarray(whole(torch.tensor(token_ids)).detach().float().numpy())
    embedding.weight = nn.Parameter(rows_VD.float(), requires_grad=False)
    # The row of a token that is not among these.
    embedding.padding_idx = None
    return np.asarray(embedding(torch.arange(len(rows_VD))).numpy())


def _without_weights(folder: Path, settings: BackboneSettings) -> PreTrainedModel:
    """Make a model whose parameters have a shape only; its buffers are there."""
    trust = settings.trust_remote_code
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise FedamoleError(
            f"backbone {settings.name}: {type(model).__name__} takes no embeddings in place of "
            "tokens, so it cannot have a soft prompt; leave fedprompt and fedptuning out"
        )
    return cast(PreTrainedModel, model)


def _stored_names(model: PreTrainedModel) -> list[str]:
    """Names that the token embeddings may have in a file: tied weights have two.

    A file of the model without its output layer has no prefix.
    """
    weight = model.get_input_embeddings().weight
    names = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight
    ]
    return [*names, *(name.removeprefix(f"{model.base_model_prefix}.") for name in names)]


def _stored_rows(
    folder: Path, names: Sequence[str], token_ids: Sequence[int]
) -> torch.Tensor | None:
    """Read rows of a tensor from the safetensors files; None if no file has one of these names."""
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            if name := next((name for name in names if name in file.keys()), None):  # noqa: SIM118
                table = file.get_slice(name)
                return torch.stack([table[int(index)] for index in token_ids])
    return None


def _weight_files(folder: Path) -> list[Path]:
    """List the safetensors files that transformers would load."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return []
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]
