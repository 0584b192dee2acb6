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
    "word_embed_proj_dim": ("word_embed_proj_dim",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "tie_word_embeddings": ("tie_word_embeddings",),
}
# PEFT's defaults, by family.
DEFAULT_TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "opt": ("q_proj", "v_proj"),
    "falcon": ("query_key_value",),
}


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
    num_attention_heads
        Heads of a decoder layer.
    exact
        Counted in the prepared model, not by the formula of its family.
    source
        Where the sizes come from, for people.
    """

    num_parameters: int
    layers: tuple[LinearLayer, ...]
    default_targets: tuple[str, ...]
    vocab_size: int
    num_attention_heads: int
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
        if fused := self._widths("query_key_value"):
            # What is left of them when the queries are taken away, which are as wide as the input.
            return max(fused) - self.hidden_size
        return 2 * max(self._widths("k_proj"), default=self.hidden_size)

    @cached_property
    def gate_width(self) -> int:
        """Width of the gate of the MLP; 0 without one."""
        return max(self._widths("gate_proj") + self._widths("gate_up_proj"), default=0)

    @property
    def embedding_width(self) -> int:
        """Width of the token embeddings, narrower than the residual stream in OPT-350M."""
        return max(self._widths("project_out"), default=self.hidden_size)

    @property
    def num_head(self) -> int:
        """Parameters of the output layer, which reads what is as wide as an embedding."""
        return self.embedding_width * self.vocab_size

    def _widths(self, name: str) -> list[int]:
        """Outputs of all layers whose name ends so."""
        return [layer.out_features for layer in self.layers if layer.name.endswith(f".{name}")]

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
    """Count the parameters of a decoder.

    Exact for Llama; for other families biases and a few norms are left out, which are less than a
    thousandth of the model.
    """
    layers = tuple(_linear_layers(size))
    linear = sum(layer.in_features * layer.out_features for layer in layers)
    norms = (2 * size.num_hidden_layers + 1) * size.hidden_size
    embeddings = (1 if size.tie_word_embeddings else 2) * size.vocab_size
    embeddings *= size.word_embed_proj_dim or size.hidden_size
    if size.family == "opt":
        # Positions are learned, and numbered from 2.
        embeddings += ((size.max_position_embeddings or 0) + 2) * size.hidden_size
    return ModelSize(
        num_parameters=linear + norms + embeddings,
        layers=layers,
        default_targets=DEFAULT_TARGETS[size.family],
        vocab_size=size.vocab_size,
        num_attention_heads=size.num_attention_heads,
        exact=False,
        source=source,
    )


def _linear_layers(size: BackboneSize) -> Iterator[LinearLayer]:
    """List the linear layers with the names that transformers gives them."""
    shapes = {"llama": _of_llama, "opt": _of_opt, "falcon": _of_falcon}[size.family](size)
    prefix = {"llama": "model.layers", "opt": "model.decoder.layers", "falcon": "transformer.h"}
    for number in range(size.num_hidden_layers):
        for name, shape in shapes.items():
            yield LinearLayer(f"{prefix[size.family]}.{number}.{name}", *shape)
    if size.word_embed_proj_dim and size.word_embed_proj_dim != size.hidden_size:
        yield LinearLayer("model.decoder.project_out", size.hidden_size, size.word_embed_proj_dim)
        yield LinearLayer("model.decoder.project_in", size.word_embed_proj_dim, size.hidden_size)


def _widths_of_heads(size: BackboneSize) -> tuple[int, int]:
    """Width of all queries of a token, and of its keys or values."""
    heads = size.num_attention_heads
    head = size.head_dim or size.hidden_size // heads
    return heads * head, (size.num_key_value_heads or heads) * head


def _of_llama(size: BackboneSize) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear layers of a decoder layer, in the order of the model."""
    hidden, middle = size.hidden_size, size.intermediate_size
    queries, keys = _widths_of_heads(size)
    return {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, middle),
        "mlp.up_proj": (hidden, middle),
        "mlp.down_proj": (middle, hidden),
    }


def _of_opt(size: BackboneSize) -> dict[str, tuple[int, int]]:
    """As :func:`_of_llama`."""
    hidden, middle = size.hidden_size, size.intermediate_size
    attention = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("k", "v", "q", "out")}
    return attention | {"fc1": (hidden, middle), "fc2": (middle, hidden)}


def _of_falcon(size: BackboneSize) -> dict[str, tuple[int, int]]:
    """As :func:`_of_llama`."""
    hidden, middle = size.hidden_size, size.intermediate_size
    queries, keys = _widths_of_heads(size)
    return {
        "self_attention.query_key_value": (hidden, queries + 2 * keys),
        "self_attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (hidden, middle),
        "mlp.dense_4h_to_h": (middle, hidden),
    }


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
            num_attention_heads=1,
            exact=True,
            source=str(folder / "backbone.json"),
        )
    except (FedamoleError, LookupError, TypeError):
        # The workflow will make it again, and says then what is wrong.
        return None
    named = _named(_config(folder / "config.json"))
    # What is no linear layer is mostly the embedding.
    vocab_size = (size.num_parameters - size.num_linear) // size.hidden_size
    return replace(
        size,
        vocab_size=named.get("vocab_size", vocab_size),
        num_attention_heads=named.get("num_attention_heads", 1),
    )


def _read_dimensions(path: Path) -> BackboneSize | None:
    """Read the sizes in a ``config.json``; None where one is missing."""
    config = _config(path)
    found = _named(config)
    model_type = config.get("model_type")
    if model_type in DEFAULT_TARGETS:
        found["family"] = model_type
    if model_type == "falcon":
        if config.get("multi_query", True) and not config.get("new_decoder_architecture"):
            found["num_key_value_heads"] = 1
        if "hidden_size" in found:
            found.setdefault("intermediate_size", 4 * found["hidden_size"])
    try:
        return BackboneSize(**found)
    except ValueError:
        return None


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``config.json`` says of the sizes, by our names."""
    found = {
        name: next((config[key] for key in keys if config.get(key) is not None), None)
        for name, keys in NAMES.items()
    }
    return {name: value for name, value in found.items() if value is not None}


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
