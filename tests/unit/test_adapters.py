"""A client's state goes into the backbone and comes out again; embeddings are true means."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import make_store, tiny_llama
from transformers import LlamaForCausalLM

from fedamole.adapters import extract_state, insert_adapters, load_state, remove_adapters
from fedamole.embeddings import embed_client
from fedamole.hmole_peft import hmole_layers, set_expert_weights
from fedamole.pools import ClientGroup, ClientState
from fedamole.routing import Router
from fedamole.settings import AdapterSettings, TrainingSettings
from fedamole.training import ScoredModel, engine_for, trained_tensors

pytestmark = pytest.mark.usefixtures("group")

SETTINGS = AdapterSettings(rank=3, alpha=6, top_k=2, target_modules=["q_proj", "v_proj"])
CPU = torch.device("cpu")


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


def changed(state: ClientState, seed: int, *added: str) -> ClientState:
    """Draw all arrays anew, and a gate if it is added."""
    rng = np.random.default_rng(seed)

    def draw(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key: rng.normal(size=a.shape).astype(np.float32) for key, a in arrays.items()}

    groups = {}
    for name, group in state.groups.items():
        gate = {key: group.experts["lora_A"][:, 0] for key in added}
        groups[name] = replace(
            group, experts=draw({**group.experts, **gate}), shared=draw(group.shared)
        )
    return ClientState(groups)


def without_projection(state: ClientState) -> ClientState:
    groups = {
        name: replace(
            group, shared={key: a for key, a in group.shared.items() if key != "token_proj"}
        )
        for name, group in state.groups.items()
    }
    return ClientState(groups)


def trainable_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_equal(found: ClientState, expected: ClientState) -> None:
    assert found.groups.keys() == expected.groups.keys()
    for name, group in expected.groups.items():
        assert found.groups[name].experts.keys() == group.experts.keys()
        assert found.groups[name].shared.keys() == group.shared.keys()
        for key, array in group.experts.items():
            assert np.array_equal(found.groups[name].experts[key], array)
        for key, array in group.shared.items():
            assert np.array_equal(found.groups[name].shared[key], array)


def test_a_state_survives_the_model(backbone: LlamaForCausalLM, state: ClientState) -> None:
    model = insert_adapters(backbone, state, SETTINGS)
    assert [layer.num_experts for layer in hmole_layers(model).values()] == [2, 3, 4, 2]
    assert_equal(extract_state(trainable_of(model), state), state)


@pytest.mark.parametrize("projection", [True, False])
def test_a_state_with_a_gate_routes_by_it_and_survives_with_all_it_has(
    backbone: LlamaForCausalLM, state: ClientState, projection: bool
) -> None:
    gated = changed(state, 1, "gate")
    gated = gated if projection else without_projection(gated)
    model = insert_adapters(backbone, gated, SETTINGS)
    trained = trainable_of(model)
    assert {name.rpartition(".")[2] for name in trained} == {"lora_A", "lora_B", "gate"}
    assert_equal(extract_state(trained, gated), gated)
    group = gated.groups["v_proj"]
    x = np.random.default_rng(2).normal(size=32).astype(np.float32)
    layer = hmole_layers(model)["model.layers.1.self_attn.v_proj"].eval()
    layer(torch.from_numpy(x)[None])
    scores = group.experts["gate"][group.module_N == 1] @ x
    assert layer.routed_tokens_N.tolist() == [int(s in np.sort(scores)[-2:]) for s in scores]


def test_the_router_can_be_chosen_against_what_a_state_has(
    backbone: LlamaForCausalLM, state: ClientState
) -> None:
    gated = changed(state, 1, "gate")
    model = insert_adapters(backbone, gated, SETTINGS, router="embedding")
    assert all(layer.gate is None for layer in hmole_layers(model).values())
    assert_equal(extract_state(trainable_of(model), gated), gated)


def test_given_weights_need_no_router_in_the_state(
    backbone: LlamaForCausalLM, state: ClientState
) -> None:
    even = without_projection(
        ClientState({"v_proj": cut_to_two_experts(state.groups["v_proj"], shared=False)})
    )
    model = insert_adapters(backbone, even, SETTINGS.model_copy(update={"top_k": 5}), "given")
    assert_equal(extract_state(trainable_of(model), even), even)
    ids = torch.arange(3, 12)[None]
    set_expert_weights(model, torch.zeros(1, 2))
    off = model(input_ids=ids).logits
    remove_adapters(model)
    torch.testing.assert_close(off, backbone(input_ids=ids).logits)


def cut_to_two_experts(group: ClientGroup, shared: bool) -> ClientGroup:
    rows = np.concatenate([np.flatnonzero(group.module_N == index)[:2] for index in (0, 1)])
    return replace(
        group,
        experts={key: array[rows] for key, array in group.experts.items()},
        module_N=group.module_N[rows],
        expert_N=group.expert_N[rows],
        shared=group.shared if shared else {},
    )


@pytest.mark.parametrize(("router", "name"), [("linear", "gate"), ("embedding", "token_proj")])
def test_a_state_that_lacks_what_the_router_reads_is_an_error(
    backbone: LlamaForCausalLM, state: ClientState, router: Router, name: str
) -> None:
    with pytest.raises(ValueError, match=f"q_proj.{name} is missing in the state; the model has"):
        insert_adapters(backbone, without_projection(state), SETTINGS, router)


def test_a_state_of_another_shape_is_not_broadcast(
    backbone: LlamaForCausalLM, state: ClientState
) -> None:
    model = insert_adapters(backbone, state, SETTINGS)
    group = state.groups["q_proj"]
    one_row = {**group.shared, "token_proj": group.shared["token_proj"][:, :1]}
    other = ClientState({**state.groups, "q_proj": replace(group, shared=one_row)})
    with pytest.raises(ValueError, match=r"token_proj is \(1, 32\) in the state; the model has"):
        load_state(model, other)


def zero(stage: int) -> TrainingSettings:
    # The threshold cuts even the smallest tensor.
    optimization = {"stage": stage}
    if stage == 3:
        optimization["stage3_param_persistence_threshold"] = 0
    return TrainingSettings(deepspeed={"zero_optimization": optimization})


@pytest.mark.parametrize("stage", range(4))
def test_loading_other_weights_gives_the_model_of_those_weights(
    backbone: LlamaForCausalLM, state: ClientState, stage: int
) -> None:
    ids = torch.arange(3, 12)[None]
    other = changed(state, 3)
    expected = insert_adapters(tiny_llama(), other, SETTINGS).eval()(input_ids=ids).logits
    model = insert_adapters(backbone, state, SETTINGS)
    with engine_for(model, zero(stage), learning_rate=1e-3) as engine, torch.no_grad():
        engine.eval()
        assert not torch.equal(engine(input_ids=ids).logits, expected)
        load_state(engine, other)
        assert torch.equal(engine(input_ids=ids).logits, expected)
        assert_equal(extract_state(trained_tensors(engine, stage), state), other)


@pytest.mark.parametrize("stage", range(4))
def test_frozen_experts_keep_every_bit_while_the_gate_learns(
    backbone: LlamaForCausalLM, state: ClientState, stage: int
) -> None:
    start = changed(
        ClientState(
            {name: cut_to_two_experts(group, False) for name, group in state.groups.items()}
        ),
        1,
        "gate",
    )
    model = insert_adapters(backbone, start, SETTINGS, frozen_experts=1)
    ids = torch.arange(3, 12)[None]
    with engine_for(model, zero(stage), learning_rate=1e-2) as engine:
        engine.train()
        for _ in range(3):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        trained = extract_state(trained_tensors(engine, stage), start)
    for name, group in start.groups.items():
        found = trained.groups[name].experts
        own, frozen = slice(0, None, 2), slice(1, None, 2)
        for key in ("lora_A", "lora_B"):
            assert np.array_equal(found[key][frozen], group.experts[key][frozen])
            assert (found[key][own] != group.experts[key][own]).all()
        assert (found["gate"] != group.experts["gate"]).all()


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
