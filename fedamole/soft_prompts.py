"""A soft prompt in front of every sequence: virtual tokens whose embeddings are trained.

Prompt tuning (Lester et al. 2021, arXiv:2104.08691) trains these embeddings themselves. P-tuning
(Liu et al. 2021, arXiv:2103.10385) trains an embedding table and an MLP that makes the prompt from
it. The modules that make a prompt are PEFT's. Its model around them is not used: in a batch that is
padded on the left it sets the prompt in front of the padding and counts positions over it, so that
an answer would depend on the prompts beside it.
"""

# B = sequences, T = their tokens, V = virtual tokens, D = width of the token embeddings

from dataclasses import replace
from typing import Any, cast

import torch
from peft import PromptEmbedding, PromptEncoder, PromptEncoderConfig, PromptTuningConfig
from torch import nn
from transformers import Cache, PreTrainedModel

from fedamole.forms import Form
from fedamole.pools import ClientState
from fedamole.settings import AdapterSettings

# What stands in the model before the names of the trained tensors, which are PEFT's.
PREFIX = "prompt_encoder."


class SoftPromptModel(nn.Module):
    """A frozen causal language model behind a soft prompt.

    The prompt is computed in float32 and then rounded to the dtype of the backbone.

    Parameters
    ----------
    backbone
        Is not changed.
    prompt_encoder
        Makes the embeddings of virtual tokens, (1, V, D), from their numbers; PEFT's
        ``PromptEmbedding`` or ``PromptEncoder``.
    """

    def __init__(self, backbone: PreTrainedModel, prompt_encoder: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.prompt_encoder = prompt_encoder

    @property
    def num_virtual_tokens(self) -> int:
        """V."""
        return int(cast(nn.Embedding, self.prompt_encoder.embedding).num_embeddings)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        logits_to_keep: torch.Tensor,
        use_cache: bool = False,
        past_key_values: Cache | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> Any:
        """Predict tokens.

        Parameters
        ----------
        input_ids
            (B, T) tokens; behind those in the cache, if it has any.
        attention_mask
            (B, T), or of all tokens so far, without the virtual ones; padding is in front of the
            tokens, behind them, or both. None where there is neither padding nor a cache.
        logits_to_keep
            (P,) positions in ``input_ids`` whose logits are given, (B, P, vocabulary).
        use_cache, past_key_values
            As in transformers.
        position_ids
            Given if the backbone takes positions; they follow from the mask.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeddings_BTD, mask_BT = self._behind_prompt(input_ids, attention_mask)
        inputs: dict[str, Any] = {"use_cache": use_cache}
        behind = self.num_virtual_tokens
        if past_key_values is not None:
            inputs["past_key_values"] = past_key_values
            order_BT = self._padding_first(attention_mask)
            mask_BT = mask_BT.gather(1, order_BT)
            if past_key_values.get_seq_length():
                embeddings_BTD, behind = embeddings_BTD[:, behind:], 0
            else:
                rows_B1 = torch.arange(len(order_BT), device=order_BT.device)[:, None]
                embeddings_BTD = embeddings_BTD[rows_B1, order_BT]
        if position_ids is not None:
            numbers_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
            inputs["position_ids"] = numbers_BT[:, -embeddings_BTD.shape[1] :]
        return self.backbone(
            inputs_embeds=embeddings_BTD,
            attention_mask=mask_BT,
            logits_to_keep=logits_to_keep + behind,
            **inputs,
        )

    def _behind_prompt(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed V + T tokens, the virtual ones first; give the mask that belongs to them.

        Both are embedded in every pass: under ZeRO-3 that is a collective operation, and a rank
        that reads a prompt may meet one that goes on from a cache.
        """
        number_V = torch.arange(self.num_virtual_tokens, device=input_ids.device)
        prompt_1VD = self.prompt_encoder(number_V[None])
        # Called as a module: under ZeRO-3 that gathers its slices. Not kept as an attribute, since
        # DeepSpeed would find it twice.
        tokens_BTD = self.backbone.get_input_embeddings()(input_ids)
        prompt_BVD = prompt_1VD.to(tokens_BTD.dtype).expand(len(input_ids), -1, -1)
        seen_BV = attention_mask.new_ones(prompt_BVD.shape[:2])
        return (
            torch.cat([prompt_BVD, tokens_BTD], dim=1),
            torch.cat([seen_BV, attention_mask], dim=1),
        )

    def _padding_first(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Order in which V + T tokens are padding, prompt, sequence, as (B, V + T) indices.

        A sliding window counts slots: no padding may stand between a prompt and its sequence.
        """
        padding_B1 = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)
        length = self.num_virtual_tokens + attention_mask.shape[1]
        place_T = torch.arange(length, device=attention_mask.device)
        behind_padding = torch.where(
            place_T < padding_B1 + self.num_virtual_tokens, place_T - padding_B1, place_T
        )
        return torch.where(place_T < padding_B1, place_T + self.num_virtual_tokens, behind_padding)


def insert_prompt(
    backbone: PreTrainedModel, state: ClientState, settings: AdapterSettings
) -> SoftPromptModel:
    """Set a soft prompt in front of a backbone; see :attr:`fedamole.forms.Form.insert`."""
    (group,) = state.groups.values()
    tensors = {name: torch.from_numpy(array[0]) for name, array in group.shared.items()}
    num_virtual_tokens, width = tensors["embedding.weight"].shape
    sizes: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": num_virtual_tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
    }
    encoder: nn.Module
    if "mlp_head.0.weight" in tensors:
        sizes["encoder_hidden_size"] = len(tensors["mlp_head.0.weight"])
        encoder = PromptEncoder(PromptEncoderConfig(encoder_reparameterization_type="MLP", **sizes))
    else:
        config = PromptTuningConfig(prompt_tuning_init="RANDOM", **sizes)
        encoder = PromptEmbedding(config, word_embeddings=None)
    encoder.load_state_dict(tensors)
    return SoftPromptModel(backbone, encoder)


def remove_prompt(model: nn.Module) -> None:
    """Give the backbone back as it was loaded: training has switched its dropout on."""
    cast(SoftPromptModel, model).backbone.eval()


def extract_prompt(tensors: dict[str, torch.Tensor], state: ClientState) -> ClientState:
    """Bring trained tensors into the form of a state; see :attr:`fedamole.forms.Form.extract`."""
    found = {name.rpartition(PREFIX)[2]: tensor.numpy()[None] for name, tensor in tensors.items()}
    groups = {
        name: replace(group, shared={key: found[key] for key in group.shared})
        for name, group in state.groups.items()
    }
    return ClientState(groups)


SOFT_PROMPT = Form(insert=insert_prompt, remove=remove_prompt, extract=extract_prompt)
