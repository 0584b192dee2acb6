"""A tiny language model and a token store, made on the spot."""

from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedamole.datasets.tokens import TokenStore
from fedamole.partition import ClientSplit

EOS = 2


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """Two layers of width 32 over 40 tokens, with seeded random weights."""
    torch.manual_seed(1)
    settings = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": EOS,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def make_store(
    sequences: list[list[int]], prompts: list[int], choices: list[list[int]]
) -> TokenStore:
    rows = np.arange(len(sequences))
    return TokenStore(
        input_ids=np.concatenate([np.array(ids, dtype=np.int32) for ids in sequences]),
        offsets=np.cumsum([0, *(len(ids) for ids in sequences)]),
        prompt_lengths=np.array(prompts, dtype=np.int32),
        labels=np.array([index % max(len(choices), 1) for index in range(len(sequences))]),
        clients=(ClientSplit(rows, rows, rows, rows),),
        references={},
        choices=choices,
        eos_id=EOS,
        pad_id=EOS,
        dropped=[0],
        cut=[0],
    )
