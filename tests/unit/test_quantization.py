"""Frozen weights in 4 bits: what they are, what they compute and train, and what is refused.

bitsandbytes computes them on a CPU too; where there is a GPU, all tests run there.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CONFIGS, make_backbone, settings_of
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedamole.backbone import load_backbone
from fedamole.backbone_limits import check_loading
from fedamole.batches import collate
from fedamole.config import load_config
from fedamole.config_files import read_yaml
from fedamole.errors import FedamoleError
from fedamole.hmole_peft import HMoLEConfig, hmole_layers
from fedamole.planning.memory import weight_bytes
from fedamole.planning.model_size import model_size
from fedamole.settings import BackboneLoading, TrainingSettings
from fedamole.training import LocalTraining, ScoredModel, engine_for, train

pytestmark = pytest.mark.usefixtures("group")

bitsandbytes = pytest.importorskip("bitsandbytes")

# The 16 values of NormalFloat (Dettmers et al. 2023, arXiv:2305.14314, appendix E).
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=np.float32,
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A GPU multiplies in another order, and not with all bits.
CLOSE = {"rtol": 1e-2, "atol": 1e-2} if DEVICE.type == "cuda" else {"rtol": 1e-5, "atol": 1e-6}
BATCH = collate([np.arange(3, 12), np.arange(40, 54)], [3, 4], 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for family in CONFIGS:
        folders[family] = tmp_path_factory.mktemp(family)
        make_backbone(folders[family], family)
    return folders


def load(folder: Path, family: str, **changes: Any) -> PreTrainedModel:
    settings = settings_of(family, folder / "model", **changes)
    return load_backbone(folder / "prepared", settings).to(DEVICE)


def unpacked(layer: Any) -> torch.Tensor:
    """The weights that a layer in 4 bits stands for."""
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def packed_layers(model: torch.nn.Module) -> dict[str, Any]:
    kind = bitsandbytes.nn.Linear4bit
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kind)}


def gradients(backbone: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token losses of a batch, and gradients of adapters that are drawn the same way each time."""
    torch.manual_seed(1)
    model = get_peft_model(backbone, HMoLEConfig(num_experts=3, dropout=0.0))
    for layer in hmole_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    scored = ScoredModel(model, 0.001).train()
    torch.manual_seed(2)
    token_B, balance_B = scored(BATCH.to(DEVICE))
    (token_B.sum() + balance_B.sum()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.unload()
    return token_B.detach(), found


def test_weights_are_the_nearest_normal_floats_of_their_block(folders: dict[str, Path]) -> None:
    name = "model.layers.1.mlp.down_proj"
    plain = load(folders["llama"], "llama").get_submodule(name).weight
    found = unpacked(load(folders["llama"], "llama", quantization="nf4").get_submodule(name))
    blocks = plain.cpu().numpy().reshape(-1, 64)
    scale = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs((blocks / scale)[..., None] - NF4).argmin(-1)
    np.testing.assert_allclose(found.cpu().numpy().reshape(-1, 64), scale * NF4[nearest], atol=1e-6)


def test_scales_in_8_bits_change_little_more(folders: dict[str, Path]) -> None:
    def weights(**changes: Any) -> torch.Tensor:
        layer: Any = load(folders["llama"], "llama", **changes).get_submodule("model.layers.0.mlp")
        return unpacked(layer.up_proj) if changes else layer.up_proj.weight

    plain, single = weights(), weights(quantization="nf4")
    double = weights(quantization="nf4-double")
    error = (single - plain).norm() / plain.norm()
    assert 0 < (double - single).norm() / plain.norm() < 0.1 * error


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "opt"])
def test_adapters_train_as_on_the_weights_that_the_4_bits_stand_for(
    family: str, folders: dict[str, Path]
) -> None:
    backbone = load(folders[family], family, quantization="nf4")
    layers = packed_layers(backbone)
    reference = load(folders[family], family)
    for name, layer in layers.items():
        reference.get_submodule(name).weight.data = unpacked(layer)
    plain = {n for n, m in reference.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(layers) == plain - {"lm_head"}
    losses, found = gradients(backbone)
    expected_losses, expected = gradients(reference)
    torch.testing.assert_close(losses, expected_losses, **CLOSE)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_checkpointed_activations_give_the_same_gradients(folders: dict[str, Path]) -> None:
    llama = folders["llama"]
    _, expected = gradients(load(llama, "llama", quantization="nf4"))
    backbone = load(llama, "llama", quantization="nf4", gradient_checkpointing=True)
    torch.testing.assert_close(gradients(backbone)[1], expected, **CLOSE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_client_trains_the_same_after_another_was_tested(
    dtype: str, folders: dict[str, Path]
) -> None:
    """bitsandbytes would pack the weights anew in a test, without gradients from then on."""
    backbone = load(folders["llama"], "llama", dtype=dtype, quantization="nf4")
    expected_losses, expected = gradients(backbone)
    with torch.no_grad():
        backbone.eval()(input_ids=BATCH.input_ids.to(DEVICE))
    losses, found = gradients(backbone)
    assert torch.equal(losses, expected_losses)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stage", range(4))
def test_local_training_changes_no_bit_of_the_backbone(
    stage: int, folders: dict[str, Path]
) -> None:
    backbone = load(folders["llama"], "llama", quantization="nf4-double")
    before = {name: parameter.clone() for name, parameter in backbone.named_parameters()}
    model = get_peft_model(backbone, HMoLEConfig(num_experts=3))
    deepspeed = {"zero_optimization": {"stage": stage}}
    settings = TrainingSettings(steps=8, batch_size=2, deepspeed=deepspeed)
    with engine_for(ScoredModel(model, 0.001), settings, 1e-2) as engine:
        place = LocalTraining(seed=1, round=1, client=0)
        record = train(engine, iter([[BATCH]] * 8), 8, place, settings, DEVICE)
    model.unload()
    assert record.loss_last < 0.95 * record.loss_first
    assert all(torch.equal(p, before[name]) for name, p in backbone.named_parameters())


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_bytes_are_those_of_the_loaded_weights(
    quantization: str, dtype: str, tmp_path: Path, configs: Path
) -> None:
    # Sides that are multiples of 128 fill all blocks, and all blocks of blocks.
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=300)
    ).save_pretrained(tmp_path / "model")
    changes = {"dtype": dtype, "quantization": quantization}
    settings = settings_of("llama", tmp_path / "model", **changes)
    model = load_backbone(tmp_path / "model", settings)
    real = sum(p.numel() * p.element_size() for p in model.parameters())
    for layer in packed_layers(model).values():
        state = layer.weight.quant_state
        real += state.absmax.numel() * state.absmax.element_size()
        real += 4 * state.state2.absmax.numel() if state.nested else 0
    raw = {**read_yaml(configs / "demo.yaml"), "backbone": settings.model_dump(exclude_none=True)}
    size = model_size(settings, tmp_path / "nowhere")
    assert size
    assert weight_bytes(load_config(raw, configs), size) == pytest.approx(real, rel=1e-4)


def test_layers_that_would_stay_as_they_are_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    message = "falcon: quantization nf4 takes layers of class Linear, and this model has FalconLin"
    with pytest.raises(FedamoleError, match=message):
        load(folders["falcon"], "falcon", quantization="nf4")
    facts = make_backbone(tmp_path, "falcon")
    with pytest.raises(FedamoleError, match=message):
        check_loading(facts, BackboneLoading(quantization="nf4"))
    check_loading(facts, BackboneLoading())


def test_rows_that_share_a_block_need_a_gpu(tmp_path: Path) -> None:
    """The CPU kernel of bitsandbytes 0.50 gives wrong weights for them; the first test shows it."""
    LlamaForCausalLM(
        LlamaConfig(
            **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1},
            **{"num_attention_heads": 4, "vocab_size": 300},
        )
    ).save_pretrained(tmp_path)
    settings = settings_of("ragged", tmp_path, quantization="nf4")
    if torch.cuda.is_available():
        load_backbone(tmp_path, settings)
        return
    with pytest.raises(
        FedamoleError, match="ragged: quantization nf4 needs a GPU for linear layers"
    ):
        load_backbone(tmp_path, settings)


def test_a_missing_package_is_named(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "fedamole.backbone_limits.find_spec",
        lambda name: None if name == "bitsandbytes" else found(name),
    )
    with pytest.raises(FedamoleError) as raised:
        load(folders["llama"], "llama", quantization="nf4-double")
    assert str(raised.value) == (
        "backbone llama: quantization nf4-double needs bitsandbytes; "
        "pip install 'fedamole[quantization]', or leave quantization out"
    )
    load(folders["llama"], "llama")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_a_gpu_gets_the_weights_while_they_are_loaded(folders: dict[str, Path]) -> None:
    settings = settings_of("llama", folders["llama"] / "model", quantization="nf4")
    backbone = load_backbone(folders["llama"] / "prepared", settings)
    assert {parameter.device.type for parameter in backbone.parameters()} == {"cuda"}
    expected = backbone(input_ids=BATCH.input_ids.to(DEVICE)).logits
    moved = get_peft_model(backbone, HMoLEConfig(num_experts=3)).to(DEVICE)
    assert torch.equal(moved(input_ids=BATCH.input_ids.to(DEVICE)).logits, expected)
    assert all(layer.weight.dtype == torch.uint8 for layer in packed_layers(backbone).values())
