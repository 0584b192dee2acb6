"""Tiny random models of every family that configs/models has, as prepared backbones."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from fedamole.backbone import describe, prepare_backbone
from fedamole.settings import BackboneSettings

TEXTS = ["What is a robot?", "A robot is a machine.", "Who are you? I am a program."] * 20
TOKENIZER = BackboneSettings.model_validate({"name": "t", "generate": {"vocab_size": 300}})
# The learned positions of the tiny OPT.
POSITIONS = 48

COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 128}
TOKENS = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# What sets a family apart is switched on, and small enough to matter in a short sequence.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GATED, **TOKENS),
    "qwen2": Qwen2Config(**GATED, **TOKENS, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GATED, **TOKENS, head_dim=32, tie_word_embeddings=True),
    "gemma2": Gemma2Config(
        **GATED,
        **TOKENS,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=6,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "opt": OPTConfig(
        **COMMON,
        **TOKENS,
        ffn_dim=128,
        word_embed_proj_dim=128,
        do_layer_norm_before=False,
        max_position_embeddings=POSITIONS,
    ),
    "falcon": FalconConfig(
        **COMMON,
        **TOKENS,
        alibi=True,
        bias=True,
        multi_query=False,
        parallel_attn=False,
        new_decoder_architecture=False,
    ),
}


def settings_of(family: str, folder: Path, **changes: Any) -> BackboneSettings:
    """How the tiny model of a family is loaded; as configs/models does it."""
    attention = "eager" if family == "gemma2" else "sdpa"
    return BackboneSettings(
        **{"name": family, "folder": str(folder), "attention": attention, **changes}
    )


def make_backbone(folder: Path, family: str) -> dict[str, Any]:
    """Prepare a tiny model with its tokenizer in ``folder / "prepared"``; give its facts."""
    prepare_backbone(folder / "model", TOKENIZER, TEXTS)
    (folder / "model" / "model.safetensors").unlink()
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():
        # Larger than at the start of a training: attention, caps and positions then matter.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder / "model")
    settings = settings_of(family, folder / "model")
    prepare_backbone(folder / "prepared", settings, [])
    return describe(folder / "prepared", settings)
