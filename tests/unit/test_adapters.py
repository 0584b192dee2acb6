"""A client's state goes into the backbone and comes out again; embeddings are true means."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tiny import make_store, tiny_llama
from transformers import LlamaForCausalLM

from fedamole.adapters import extract_state, insert_adapters, remove_adapters
from fedamole.distributed import process_group
from fedamole.embeddings import embed_client
from fedamole.hmole_peft import hmole_layers
from fedamole.launching import Layout
from fedamole.pools import ClientGroup, ClientState
from fedamole.settings import AdapterSettings
from fedamole.training import ScoredModel

SETTINGS = AdapterSettings(rank=3, alpha=6, top_k=2, target_modules=["q_proj", "v_proj"])
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    with process_group(Layout()):
        yield


@pytest.fixture
def backbone() -> LlamaForCausalLM:
    return tiny_llama().requires_grad_(False)


@pytest.fixture
def state() -> ClientState:
    """Two to four domain experts per module, different in every module."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    def group(leaf: str, width: int, counts: tuple[int, int]) -> ClientGroup:
        module_N = np.repeat([0, 1], counts)
        rows = len(module_N)
        return ClientGroup(
            modules=tuple(f"model.layers.{layer}.self_attn.{leaf}" for layer in (0, 1)),
            experts={"lora_A": draw(rows, 3, 32), "lora_B": draw(rows, width, 3)},
            module_N=module_N,
            expert_N=np.concatenate([np.sort(rng.permutation(9)[:n]) for n in counts]),
            shared={
                "lora_A": draw(2, 3, 32),
                "lora_B": draw(2, width, 3),
                "token_proj": draw(2, 3, 32),
            },
        )

    return ClientState(
        {"q_proj": group("q_proj", 32, (2, 4)), "v_proj": group("v_proj", 16, (3, 2))}
    )


def test_a_state_survives_the_model(backbone: LlamaForCausalLM, state: ClientState) -> None:
    model = insert_adapters(backbone, state, SETTINGS)
    assert [layer.num_experts for layer in hmole_layers(model).values()] == [2, 3, 4, 2]
    trainable = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    found = extract_state(trainable, state)
    for name, group in state.groups.items():
        for key, array in group.experts.items():
            assert np.array_equal(found.groups[name].experts[key], array)
        for key, array in group.shared.items():
            assert np.array_equal(found.groups[name].shared[key], array)


def test_the_model_computes_the_formula(backbone: LlamaForCausalLM, state: ClientState) -> None:
    """algorithm section 1 for one token of one layer, written out with the state's own arrays."""
    plain = backbone.model.layers[1].self_attn.q_proj
    layer = hmole_layers(insert_adapters(backbone, state, SETTINGS))
    x = np.random.default_rng(1).normal(size=32)
    group = state.groups["q_proj"]
    lora_A = group.experts["lora_A"][group.module_N == 1].astype(np.float64)
    lora_B = group.experts["lora_B"][group.module_N == 1].astype(np.float64)
    shared = {key: array[1].astype(np.float64) for key, array in group.shared.items()}
    scores = lora_A @ x @ (shared["token_proj"] @ x) / np.sqrt(3)
    p = np.exp(scores - scores.max())
    p /= p.sum()
    top = np.argsort(p)[-2:]
    y = plain.weight.double().numpy() @ x + 2.0 * shared["lora_B"] @ (shared["lora_A"] @ x)
    for i in top:
        y += p[i] / p[top].sum() * 2.0 * lora_B[i] @ (lora_A[i] @ x)
    with torch.no_grad():
        found = layer["model.layers.1.self_attn.q_proj"].eval()(
            torch.from_numpy(x).float()[None, None]
        )
    np.testing.assert_allclose(found[0, 0].numpy(), y, atol=1e-4)


def test_removing_adapters_gives_the_backbone_back(
    backbone: LlamaForCausalLM, state: ClientState
) -> None:
    ids = torch.arange(3, 12)[None]
    before = backbone(input_ids=ids).logits
    model = insert_adapters(backbone, state, SETTINGS)
    assert not torch.equal(model(input_ids=ids).logits, before)
    remove_adapters(model)
    assert torch.equal(backbone(input_ids=ids).logits, before)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_a_state_without_modules_is_the_backbone(backbone: LlamaForCausalLM) -> None:
    assert insert_adapters(backbone, ClientState({}), SETTINGS) is backbone


def test_embeddings_are_means_over_all_tokens(
    backbone: LlamaForCausalLM, state: ClientState
) -> None:
    rng = np.random.default_rng(2)
    sequences = [rng.integers(3, 40, size=n).tolist() for n in (4, 9, 6, 11, 5)]
    store = make_store(sequences, [1] * 5, choices=[])
    model = insert_adapters(backbone, state, SETTINGS)
    scored = ScoredModel(model, 0.0)
    found = embed_client(scored, store, np.arange(5), state, batch_size=2, device=CPU)

    inputs: dict[str, list[np.ndarray]] = {}
    layers = hmole_layers(model)
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0].numpy())
        )
        for name, layer in layers.items()
    ]
    model.eval()
    with torch.no_grad():
        for ids in sequences:
            model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    row = 0
    for name, group in state.groups.items():
        for index, module in enumerate(group.modules):
            tokens_TD = np.concatenate(inputs[module]).astype(np.float64)
            client_R = (tokens_TD @ group.shared["token_proj"][index].T).mean(0)
            np.testing.assert_allclose(found.client_MR[row], client_R, atol=1e-5)
            held = group.module_N == index
            for expert, embedding in zip(
                group.experts["lora_A"][held], found.experts[name][held], strict=True
            ):
                np.testing.assert_allclose(embedding, (tokens_TD @ expert.T).mean(0), atol=1e-5)
            row += 1
