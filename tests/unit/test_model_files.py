"""configs/models against the published sizes and the classes of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from fedamole.backbone_limits import check_length
from fedamole.config import parse
from fedamole.config_files import read_yaml
from fedamole.errors import FedamoleError
from fedamole.planning.model_size import ModelSize, model_size
from fedamole.settings import BackboneSettings

MODELS = Path(__file__).parents[2] / "configs" / "models"
NOWHERE = Path("nowhere")
# Parameters as the hub's pages, the papers and other libraries give them; tied weights count once.
PUBLISHED = {
    "falcon-rw-1b": 1_311_625_216,
    "gemma-2-2b": 2_614_341_888,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "opt-350m": 331_196_416,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "smollm2-1.7b": 1_711_376_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
}
CLASSES: dict[str, type[PreTrainedConfig]] = {
    "falcon": FalconConfig,
    "gemma": Gemma2Config,
    "llama": LlamaConfig,
    "opt": OPTConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "smollm2": LlamaConfig,
}
# What config.json has beside sizes, where it changes the number of parameters.
SWITCHES: dict[str, dict[str, bool]] = {
    "opt": {"do_layer_norm_before": False},
    "falcon": {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
}


def settings_of(name: str) -> BackboneSettings:
    return parse(BackboneSettings, read_yaml(MODELS / f"{name}.yaml"), name)


def real_config(name: str) -> PreTrainedConfig:
    """The config class of the model's family with the sizes of our file."""
    size = settings_of(name).size
    assert size
    sizes = size.model_dump(exclude_none=True, exclude={"family"})
    renamed = {"opt": "ffn_dim", "falcon": "ffn_hidden_size"}.get(size.family)
    if renamed:
        sizes[renamed] = sizes.pop("intermediate_size")
    family = name.partition("-")[0].partition(".")[0]
    return CLASSES[family](**sizes, **SWITCHES.get(family, {}))


def real_model(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(real_config(name))


def layers_of(model: PreTrainedModel) -> set[tuple[str, int, int]]:
    return {
        (name, layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings()
    }


def planned(name: str, **changes: Any) -> ModelSize:
    size = model_size(settings_of(name).model_copy(update=changes), NOWHERE)
    assert size
    return size


def test_every_model_has_its_published_size_here() -> None:
    assert sorted(PUBLISHED) == sorted(path.stem for path in MODELS.glob("*.yaml"))
    assert {settings_of(name).name for name in PUBLISHED} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sizes_in_the_file_make_the_published_model(name: str) -> None:
    model = real_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_planner_sees_the_model_as_it_is(name: str) -> None:
    model, size = real_model(name), planned(name)
    text = model.config
    assert set(map(tuple, size.layers)) == layers_of(model)
    assert size.num_parameters == pytest.approx(PUBLISHED[name], rel=1e-3)
    assert size.default_targets == tuple(PEFT_TARGETS[text.model_type])
    assert size.num_decoder_layers == text.num_hidden_layers
    assert size.hidden_size == text.hidden_size
    assert size.num_head == model.get_output_embeddings().weight.numel()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    assert size.key_value_width == 2 * heads * head


@pytest.mark.parametrize("name", ["llama-3.2-3b", "gemma-2-2b", "opt-350m", "falcon-rw-1b"])
def test_a_config_json_says_the_same_as_the_file(name: str, tmp_path: Path) -> None:
    real_config(name).save_pretrained(tmp_path)
    found = planned(name, hub=None, folder=str(tmp_path), size=None)
    expected = planned(name)
    assert found.layers == expected.layers
    assert found.num_parameters == expected.num_parameters
    assert found.default_targets == expected.default_targets


def test_a_falcon_with_one_head_of_keys_is_counted_as_such(tmp_path: Path) -> None:
    """Falcon-7B's own config.json, which names neither its heads of keys nor its MLP."""
    sizes = {"hidden_size": 4544, "num_hidden_layers": 2, "num_attention_heads": 71}
    content = {"model_type": "falcon", "vocab_size": 65024, "multi_query": True, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(content))
    found = planned("falcon-rw-1b", hub=None, folder=str(tmp_path), size=None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FalconConfig(**sizes))
    assert set(map(tuple, found.layers)) == layers_of(model)
    assert found.key_value_width == 2 * 64


def test_gemma_asks_for_an_attention_that_caps_its_scores() -> None:
    model = real_model("gemma-2-2b")
    assert model.config.attn_logit_softcapping
    assert model.config._attn_implementation == settings_of("gemma-2-2b").attention == "eager"


@pytest.mark.parametrize(("name", "positions"), [("opt-350m", 2048), ("falcon-rw-1b", None)])
def test_too_long_sequences_are_known_from_the_file(name: str, positions: int | None) -> None:
    size = settings_of(name).size
    assert size
    assert size.max_position_embeddings == positions
    if positions:
        with pytest.raises(FedamoleError, match="opt-350m: has positions for 2048 tokens, and max"):
            check_length(name, positions, 2048, new_tokens=1)
