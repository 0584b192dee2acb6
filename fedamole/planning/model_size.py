"""How large the language model is, from the best source there is (torch-free, NumPy-free).

The Snakefile asks at parse time, in every job: memory and run time of the jobs follow from it.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fedamole.artifacts import read_record
from fedamole.errors import FedamoleError
from fedamole.settings import BackboneSettings, BackboneSize, GeneratedBackbone

# Names that ``config.json`` has for the sizes, by model family: Llama and most others first.
NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "tie_word_embeddings": ("tie_word_embeddings",),
}
# PEFT's default for Llama, Qwen, Gemma and most others.
DEFAULT_TARGETS = ("q_proj", "v_proj")


class LinearLayer(NamedTuple):
    """A linear layer of the model."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a language model that memory, time and volumes follow from.

    Attributes
    ----------
    num_parameters
        All parameters.
    layers
        Linear layers that every token passes: all but the output layer.
    default_targets
        Ends of the names of the layers that are adapted unless the config says which.
    vocab_size
        Tokens of the vocabulary.
    exact
        Counted in the prepared model, not by the formula of a decoder with gated MLPs.
    source
        Where the sizes come from, for people.
    """

    num_parameters: int
    layers: tuple[LinearLayer, ...]
    default_targets: tuple[str, ...]
    vocab_size: int
    exact: bool
    source: str

    @cached_property
    def num_linear(self) -> int:
        """Parameters that every token is multiplied with: those of the linear layers."""
        return sum(layer.in_features * layer.out_features for layer in self.layers)

    @cached_property
    def num_decoder_layers(self) -> int:
        """Number of decoder layers: as often as a linear layer of one role stands in the model."""
        roles = Counter(layer.name.rpartition(".")[2] for layer in self.layers)
        return max(roles.values(), default=1)

    @cached_property
    def hidden_size(self) -> int:
        """Width of the residual stream: what most linear layers read."""
        widths = Counter(layer.in_features for layer in self.layers)
        return widths.most_common(1)[0][0] if widths else 1

    @cached_property
    def key_value_width(self) -> int:
        """Numbers that keys and values of one token and decoder layer have together."""
        keys = [layer.out_features for layer in self.layers if layer.name.endswith(".k_proj")]
        return 2 * max(keys, default=self.hidden_size)

    @property
    def num_head(self) -> int:
        """Parameters of the output layer."""
        return self.hidden_size * self.vocab_size

    def adapted(self, targets: list[str] | None) -> list[LinearLayer]:
        """Layers that get adapters; what :func:`fedamole.targets.target_modules` chooses."""
        wanted = targets or self.default_targets
        return [
            layer
            for layer in self.layers
            if any(layer.name == end or layer.name.endswith(f".{end}") for end in wanted)
        ]


def model_size(backbone: BackboneSettings, prepared: Path) -> ModelSize | None:
    """Find out how large a backbone is.

    Parameters
    ----------
    backbone
        Where the model comes from.
    prepared
        Folder of the prepared backbone; need not exist.

    Returns
    -------
    ModelSize or None
        From the first of: the prepared model, ``generate``, the ``config.json`` of a local
        ``folder``, ``size``. None if there is none of these.
    """
    if exact := _of_prepared(prepared):
        return exact
    if backbone.generate:
        return of_dimensions(_generated(backbone.generate), "backbone: generate")
    if backbone.folder:
        path = Path(backbone.folder).expanduser() / "config.json"
        if size := _read_dimensions(path):
            return of_dimensions(size, str(path))
    return of_dimensions(backbone.size, "backbone: size") if backbone.size else None


def of_dimensions(size: BackboneSize, source: str) -> ModelSize:
    """Count the parameters of a decoder with gated MLPs, RMS norms and no biases, as Llama is."""
    layers = tuple(_decoder_layers(size))
    linear = sum(layer.in_features * layer.out_features for layer in layers)
    norms = (2 * size.num_hidden_layers + 1) * size.hidden_size
    embeddings = (1 if size.tie_word_embeddings else 2) * size.vocab_size * size.hidden_size
    return ModelSize(
        num_parameters=linear + norms + embeddings,
        layers=layers,
        default_targets=DEFAULT_TARGETS,
        vocab_size=size.vocab_size,
        exact=False,
        source=source,
    )


def _decoder_layers(size: BackboneSize) -> Iterator[LinearLayer]:
    """List the linear layers in the order and with the names of Llama."""
    hidden, middle, heads = size.hidden_size, size.intermediate_size, size.num_attention_heads
    head = size.head_dim or hidden // heads
    queries, keys = heads * head, (size.num_key_value_heads or heads) * head
    shapes = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, middle),
        "mlp.up_proj": (hidden, middle),
        "mlp.down_proj": (middle, hidden),
    }
    for number in range(size.num_hidden_layers):
        for name, shape in shapes.items():
            yield LinearLayer(f"model.layers.{number}.{name}", *shape)


def _generated(model: GeneratedBackbone) -> BackboneSize:
    """Sizes of a generated model; its tokenizer may find fewer tokens than it may have."""
    return BackboneSize(
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        intermediate_size=model.intermediate_size,
        num_attention_heads=model.num_heads,
        vocab_size=model.vocab_size,
        tie_word_embeddings=False,
    )


def _of_prepared(folder: Path) -> ModelSize | None:
    """Read the facts of a prepared backbone; None if it is not there, or no longer readable."""
    try:
        _, facts = read_record(folder / "backbone.json", "backbone")
        size = ModelSize(
            num_parameters=facts["num_parameters"],
            layers=tuple(LinearLayer(**layer) for layer in facts["modules"]),
            default_targets=tuple(facts["default_targets"]),
            vocab_size=0,
            exact=True,
            source=str(folder / "backbone.json"),
        )
    except (FedamoleError, LookupError, TypeError):
        # The workflow will make it again, and says then what is wrong.
        return None
    vocab_size = _config(folder / "config.json").get("vocab_size")
    if not isinstance(vocab_size, int):
        # What is no linear layer is mostly the embedding.
        vocab_size = (size.num_parameters - size.num_linear) // size.hidden_size
    return replace(size, vocab_size=vocab_size)


def _read_dimensions(path: Path) -> BackboneSize | None:
    """Read the sizes in a ``config.json``; None where one is missing."""
    config = _config(path)
    found = {
        name: next((config[key] for key in keys if config.get(key) is not None), None)
        for name, keys in NAMES.items()
    }
    try:
        return BackboneSize(**{name: value for name, value in found.items() if value is not None})
    except ValueError:
        return None


def _config(path: Path) -> Mapping[str, Any]:
    """Read a ``config.json``; that of the language model where it is a part of a larger one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    part = content.get("text_config")
    return {**content, **part} if isinstance(part, dict) else content
