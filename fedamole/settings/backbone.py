"""The frozen language model."""

from typing import Literal

from pydantic import Field, model_validator

from fedamole.settings.section import Section, Slug

# Longest sequence of a generated model, in tokens.
GENERATED_POSITIONS = 2048


class GeneratedBackbone(Section):
    """A tiny Llama with random weights and a tokenizer trained on the data; for tests."""

    vocab_size: int = Field(default=512, ge=300, le=65536)
    """Size of the byte-level BPE vocabulary."""
    hidden_size: int = Field(default=32, ge=8)
    """Width of the residual stream."""
    num_layers: int = Field(default=2, ge=1)
    """Number of decoder layers."""
    num_heads: int = Field(default=4, ge=1)
    """Number of attention heads; divides hidden_size."""
    intermediate_size: int = Field(default=64, ge=8)
    """Width of the feed-forward layers."""
    seed: int = Field(default=0, ge=0)
    """Seed of the weights."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "GeneratedBackbone":
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 * num_heads "
                f"({2 * self.num_heads}): rotary embeddings need an even head width"
            )
        return self


class BackboneSource(Section):
    """Where the language model comes from: exactly one of hub, folder, gguf, generate."""

    name: Slug
    """Name of the backbone; names its folder under results/backbones."""
    hub: str | None = None
    """Model id on the Hugging Face hub, for example ``meta-llama/Llama-3.2-1B``."""
    revision: str | None = None
    """Commit, tag or branch of the hub model; only with hub."""
    folder: str | None = None
    """Local folder in the layout of ``save_pretrained``."""
    gguf: str | None = None
    """GGUF file; converted once to safetensors."""
    package: str | None = None
    """Installed Python package that the gguf path is relative to."""
    generate: GeneratedBackbone | None = None
    """A tiny random model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off, unless you read that code."""

    @model_validator(mode="after")
    def _one_source(self) -> "BackboneSource":
        given = [key for key in ("hub", "folder", "gguf", "generate") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(
                f"needs exactly one of hub, folder, gguf, generate; given: {given or 'none'}"
            )
        if self.revision and not self.hub:
            raise ValueError("revision goes with hub only")
        if self.package and not self.gguf:
            raise ValueError("package goes with gguf only")
        return self


class BackboneLoading(Section):
    """How a job loads the prepared model."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the frozen weights. Adapters are float32 whatever this says."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers. Gemma 2 caps its attention scores, which sdpa does
    not do: it needs one of the others."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    quantization: Literal["nf4", "nf4-double"] | None = None
    """Keep the frozen linear layers in 4 bits (NormalFloat of QLoRA, by bitsandbytes) and compute
    in dtype. Each block of 64 weights has a scale in float32; nf4-double keeps these in 8 bits.
    Needs ``pip install 'fedamole[quantization]'``. For GPUs: a CPU saves memory and loses time."""

    @model_validator(mode="after")
    def _attention_knows_the_dtype(self) -> "BackboneLoading":
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            raise ValueError("attention flash_attention_2 needs dtype bfloat16")
        return self


class BackboneSize(Section):
    """Sizes of the model, by the names of its ``config.json``; they change no number.

    Estimates follow from them, and sequences that are too long are refused before anything runs.
    """

    family: Literal["llama", "opt", "falcon"] = "llama"
    """Which linear layers a decoder layer has. ``llama`` stands for all models with separate
    projections of queries, keys and values and a gated MLP: also Qwen, Gemma, Mistral, SmolLM."""
    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
    num_hidden_layers: int = Field(ge=1)
    """Number of decoder layers."""
    intermediate_size: int = Field(ge=1)
    """Width of the feed-forward layers."""
    num_attention_heads: int = Field(ge=1)
    """Number of attention heads."""
    num_key_value_heads: int | None = Field(default=None, ge=1)
    """Number of heads of keys and values; default: num_attention_heads."""
    head_dim: int | None = Field(default=None, ge=1)
    """Width of a head; default: hidden_size / num_attention_heads."""
    vocab_size: int = Field(ge=1)
    """Size of the vocabulary."""
    word_embed_proj_dim: int | None = Field(default=None, ge=1)
    """Width of the embeddings where two layers project them to hidden_size and back (OPT-350M)."""
    max_position_embeddings: int | None = Field(default=None, ge=1)
    """Longest sequence that the model has positions for, in tokens; leave it out for models without
    such a limit (ALiBi)."""
    tie_word_embeddings: bool = True
    """Whether the output layer shares the weights of the input embedding."""


class BackboneSettings(BackboneLoading, BackboneSource):
    """The frozen language model: where it comes from, and how it is loaded."""

    size: BackboneSize | None = None
    """How large it is. Memory and time of the jobs, and ``fedamole plan``, follow from it until the
    model is prepared. It changes no number; not needed for folder and generate."""
