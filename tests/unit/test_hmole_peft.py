"""The HMoLE tuner inside PEFT and transformers, on a tiny Llama."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedamole.errors import FedamoleError
from fedamole.hmole import HMoLELinear
from fedamole.hmole_peft import (
    HMoLEConfig,
    balance_loss,
    collecting_embeddings,
    hmole_layers,
    routed_tokens,
    set_expert_weights,
)

Q_PROJ = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
V_PROJ = [f"model.layers.{layer}.self_attn.v_proj" for layer in range(2)]
NO_MATCH = (
    "match no linear layer; the model has "
    "['down_proj', 'gate_proj', 'k_proj', 'lm_head', 'o_proj', 'q_proj', 'up_proj', 'v_proj']"
)

# PEFT 0.21 itself asks transformers 5.23 for this property.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def make_backbone() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=63,
    )
    return LlamaForCausalLM(config)


def make_model(backbone: nn.Module | None = None, **settings) -> PeftModel:
    settings = {"num_experts": 3, "dropout": 0.0, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(
        make_backbone() if backbone is None else backbone, HMoLEConfig(**settings)
    )
    for layer in hmole_layers(model).values():
        nn.init.normal_(layer.lora_B)
    return model


def make_batch() -> dict[str, Tensor]:
    """Two sequences of 7 and 4 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, 63, (2, 7), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


def without_padding(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    real = batch["attention_mask"][row].bool()
    return {name: tensor[row : row + 1, real] for name, tensor in batch.items()}


def test_the_defaults_of_the_family_are_adapted_and_nothing_else_is_trainable():
    model = make_model()
    layers = hmole_layers(model)
    assert sorted(layers) == sorted(Q_PROJ + V_PROJ)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {
        f"base_model.model.{module}.{parameter}"
        for module in layers
        for parameter in ("lora_A", "lora_B", "token_proj")
    }


def test_a_new_adapter_leaves_the_logits_bit_by_bit():
    backbone, batch = make_backbone(), make_batch()
    expected = backbone(**batch).logits
    model = get_peft_model(backbone, HMoLEConfig(num_experts=3))
    assert torch.equal(model(**batch).logits, expected)


def test_saving_and_loading_gives_the_same_bytes(tmp_path):
    model, batch = make_model(), make_batch()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_backbone(), tmp_path)
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again")
    names = ("adapter_model.safetensors", "adapter_config.json")
    for name in names:
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert json.loads((tmp_path / names[1]).read_text())["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_the_number_of_experts_may_differ_per_module(tmp_path, low_cpu_mem_usage):
    num_experts = {Q_PROJ[0]: 4, Q_PROJ[1]: 2, V_PROJ[0]: 0, V_PROJ[1]: 3}
    model, batch = make_model(num_experts=num_experts), make_batch()
    held = {name: layer.lora_A.shape[0] - 1 for name, layer in hmole_layers(model).items()}
    assert held == num_experts
    expected = model.eval()(**batch).logits
    assert {name: len(counts) for name, counts in routed_tokens(model).items()} == num_experts
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        make_backbone(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(loaded.eval()(**batch).logits, expected)
    assert hmole_layers(loaded)[Q_PROJ[0]].lora_A.requires_grad


def test_a_linear_router_survives_saving_and_loading(tmp_path):
    model, batch = make_model(router="linear", frozen_experts=1), make_batch()
    expected = model.eval()(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_backbone(), tmp_path, is_trainable=True)
    assert torch.equal(loaded.eval()(**batch).logits, expected)
    layer = hmole_layers(loaded)[Q_PROJ[0]]
    assert torch.equal(layer.gate, hmole_layers(model)[Q_PROJ[0]].gate)
    assert (layer.router, layer.frozen_experts, layer.token_proj) == ("linear", 1, None)
    trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trainable == {
        f"base_model.model.{module}.{parameter}"
        for module in Q_PROJ + V_PROJ
        for parameter in ("lora_A", "lora_B", "gate")
    }


def make_peft_lora(model: PeftModel, expert: int) -> PeftModel:
    """Make PEFT's LoRA of one expert of an HMoLE model."""
    config = LoraConfig(r=8, lora_alpha=16.0, target_modules=["q_proj", "v_proj"])
    lora = get_peft_model(make_backbone(), config)
    with torch.no_grad():
        for name, layer in hmole_layers(model).items():
            module = lora.get_base_model().get_submodule(name)
            module.lora_A["default"].weight.copy_(layer.lora_A[expert])
            module.lora_B["default"].weight.copy_(layer.lora_B[expert])
    return lora


@pytest.mark.parametrize("checkpointing", [True, False])
def test_two_experts_side_by_side_in_one_batch_are_two_lora_models(checkpointing):
    backbone = make_backbone()
    if checkpointing:
        backbone.activation_checkpointing_enable({"use_reentrant": False})
    model = make_model(backbone, num_experts=2, shared_expert=False, router="given").train()
    batch = make_batch()
    doubled = {name: torch.cat((tensor, tensor)) for name, tensor in batch.items()}
    weights_BN = torch.eye(2).repeat_interleave(2, 0)
    set_expert_weights(model, weights_BN)
    logits = model(**doubled, logits_to_keep=1).logits
    assert balance_loss(model).tolist() == [0.0] * 4
    assert not any(counts_N.any() for counts_N in routed_tokens(model).values())
    logits.sin().sum().backward()
    for expert, half in enumerate(logits.split(2)):
        lora = make_peft_lora(model, expert)
        expected = lora(**batch, logits_to_keep=1).logits
        torch.testing.assert_close(half, expected)
        expected.sin().sum().backward()
        for name, layer in hmole_layers(model).items():
            module = lora.get_base_model().get_submodule(name)
            for parameter in ("lora_A", "lora_B"):
                expected_grad = getattr(module, parameter)["default"].weight.grad
                torch.testing.assert_close(getattr(layer, parameter).grad[expert], expected_grad)


def test_disabling_the_adapter_gives_the_backbone_for_a_while():
    batch = make_batch()
    model, expected = make_model(), make_backbone()(**batch).logits
    adapted = model(**batch).logits
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, expected)
        with pytest.raises(RuntimeError, match="no forward pass"):
            balance_loss(model)
    assert torch.equal(model(**batch).logits, adapted)
    assert hmole_layers(model)[Q_PROJ[0]].lora_A.requires_grad


def test_unloading_gives_the_backbone_back():
    batch, backbone = make_batch(), make_backbone()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    unloaded = make_model(backbone).unload()
    assert unloaded is backbone
    assert not unloaded._forward_pre_hooks
    assert list(unloaded.state_dict()) == list(before)
    assert all(torch.equal(unloaded.state_dict()[name], before[name]) for name in before)
    make_model(unloaded)(**batch)


def test_a_copied_model_reads_its_own_masks():
    model, batch = make_model(), make_batch()
    model(**batch)
    copied = copy.deepcopy(model)
    copied(input_ids=batch["input_ids"])
    model(**batch)
    assert sum(counts.sum() for counts in routed_tokens(copied).values()) == 4 * 14 * 2
    assert sum(counts.sum() for counts in routed_tokens(model).values()) == 4 * 11 * 2
    assert not copied.unload()._forward_pre_hooks
    assert model.get_base_model()._forward_pre_hooks


@pytest.mark.parametrize("positional", [True, False])
def test_padding_changes_nothing(positional):
    model, batch = make_model().eval(), make_batch()
    with collecting_embeddings(model) as layers:
        logits = model.get_base_model()(*batch.values()) if positional else model(**batch)
    losses_B = balance_loss(model)
    counts = routed_tokens(model)
    embeddings = {name: layer.token_means() for name, layer in layers.items()}
    alone_counts = {name: torch.zeros_like(counts_N) for name, counts_N in counts.items()}
    with collecting_embeddings(model):
        for row in range(2):
            alone = model(**without_padding(batch, row))
            torch.testing.assert_close(logits.logits[row, -1], alone.logits[0, -1])
            torch.testing.assert_close(balance_loss(model)[0], losses_B[row])
            for name, counts_N in routed_tokens(model).items():
                alone_counts[name] += counts_N
    torch.testing.assert_close(alone_counts, counts)
    torch.testing.assert_close(
        {name: layer.token_means() for name, layer in layers.items()}, embeddings
    )


def test_a_pass_without_a_mask_forgets_the_last_one():
    model, batch = make_model(), make_batch()
    model(**batch)
    model(input_ids=batch["input_ids"])
    assert routed_tokens(model)[Q_PROJ[0]].sum() == 14 * 2


def test_batched_generation_equals_generation_one_by_one():
    model, batch = make_model().eval(), make_batch()
    settings = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(**batch, **settings)[:, 7:]
    # The last pass saw one new token per sequence, not the whole mask.
    assert routed_tokens(model)[Q_PROJ[0]].sum() == 2 * 2
    for row in range(2):
        single = without_padding(batch, row)
        alone = model.generate(**single, **settings)[0, single["input_ids"].shape[1] :]
        assert torch.equal(together[row, : len(alone)], alone)


def run_backward(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(2)
    loss = model(**batch, labels=batch["input_ids"]).loss + balance_loss(model).mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_gradient_checkpointing_gives_the_same_gradients():
    batch = make_batch()
    expected = run_backward(make_model(dropout=0.2).train(), batch)
    backbone = make_backbone()
    backbone.activation_checkpointing_enable({"use_reentrant": False})
    grads = run_backward(make_model(backbone, dropout=0.2).train(), batch)
    assert len(expected) == 12
    torch.testing.assert_close(grads, expected)


def test_the_balance_loss_is_summed_over_the_layers():
    model = make_model()
    with pytest.raises(RuntimeError, match="no forward pass"):
        balance_loss(model)
    model(**make_batch())
    expected_B = sum(layer.balance_loss_B for layer in hmole_layers(model).values())
    torch.testing.assert_close(balance_loss(model), expected_B)


def test_a_bfloat16_backbone_gets_float32_adapters():
    model = make_model(make_backbone().to(torch.bfloat16))
    assert model(**make_batch()).logits.dtype == torch.bfloat16
    for layer in hmole_layers(model).values():
        assert {parameter.dtype for parameter in layer.parameters(recurse=False)} == {torch.float32}
        assert layer.base_layer.weight.dtype == torch.bfloat16


def test_collecting_embeddings_restores_the_mode_of_the_model():
    model = make_model(dropout=0.5).train()
    with collecting_embeddings(model) as layers:
        assert not any(layer.training for layer in layers.values())
        model(**make_batch())
    assert all(layer.training for layer in layers.values())


def test_layers_are_found_in_whatever_wraps_the_model():
    model = make_model()
    assert hmole_layers(nn.ModuleDict({"engine": model})) == hmole_layers(model)
    bare = nn.Sequential(HMoLELinear(nn.Linear(4, 4), 2, 4.0, 2, 2))
    assert list(hmole_layers(bare)) == ["0"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["query"]}, f"target_modules ['query'] {NO_MATCH}"),
        ({"target_modules": ["q_proj", "query"]}, f"target_modules ['query'] {NO_MATCH}"),
        ({"target_modules": ".*query"}, f"target_modules ['.*query'] {NO_MATCH}"),
        ({"target_modules": ["self_attn"]}, "model.layers.0.self_attn is LlamaAttention"),
        ({"target_modules": []}, f"target_modules [] {NO_MATCH}"),
        (
            {"target_modules": ["q_proj"], "num_experts": {Q_PROJ[0]: 3, "head": 3}},
            f"without a number: {Q_PROJ[1:]}, not a target: ['head']",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_leave_it_whole(settings, message):
    backbone = make_backbone()
    with pytest.raises(FedamoleError) as error:
        make_model(backbone, **settings)
    assert message in str(error.value)
    assert not hmole_layers(backbone)


def test_too_few_experts_leave_the_model_whole():
    backbone = make_backbone()
    num_experts = {**dict.fromkeys(Q_PROJ, 4), V_PROJ[0]: 4, V_PROJ[1]: 1}
    with pytest.raises(ValueError, match="num_experts=1 is less than top_k=2"):
        make_model(backbone, num_experts=num_experts)
    assert not hmole_layers(backbone)


def test_an_unknown_family_needs_target_modules(monkeypatch):
    monkeypatch.setattr(LlamaConfig, "model_type", "unheard-of")
    backbone = make_backbone()
    with pytest.raises(FedamoleError, match=r"model family 'unheard-of'; the model has \['down_"):
        make_model(backbone)


def test_what_one_routed_adapter_cannot_do_is_an_error():
    model, batch = make_model(), make_batch()
    expected = model(**batch).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(FedamoleError, match="cannot be merged"):
            merge()
    with pytest.raises(FedamoleError, match="holds one adapter"):
        model.add_adapter("second", HMoLEConfig())
    assert torch.equal(model(**batch).logits, expected)
