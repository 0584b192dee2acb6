"""All families of models train, test, generate and are stored as the tiny Llama of other tests."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CONFIGS, POSITIONS, make_backbone, settings_of
from naive import check_choices
from peft import PeftModel, get_peft_model
from tiny import EOS, make_store
from transformers import PreTrainedModel

from fedamole.adapters import extract_state, insert_adapters, remove_adapters
from fedamole.artifacts import Header
from fedamole.backbone import load_backbone, load_tokenizer
from fedamole.backbone_limits import check_length, check_loading
from fedamole.batches import collate
from fedamole.client import _check_no_dropout
from fedamole.errors import FedamoleError
from fedamole.generation import generate
from fedamole.hmole_peft import HMoLEConfig, balance_loss, hmole_layers
from fedamole.packed_layer import packed_adapters
from fedamole.packing import PackedModel, make_unit, pack_batch
from fedamole.pool_files import (
    read_client_state,
    read_upload,
    write_assignment,
    write_pool,
    write_upload,
)
from fedamole.pools import (
    Assignment,
    ClientState,
    Pool,
    PoolGroup,
    Upload,
    group_modules,
)
from fedamole.settings import AdapterSettings, EvaluationSettings, TrainingSettings
from fedamole.targets import target_modules
from fedamole.training import LocalTraining, ScoredModel, engine_for, train, trained_tensors

pytestmark = pytest.mark.usefixtures("group")

TARGETS = {family: ["q_proj", "v_proj"] for family in CONFIGS} | {"falcon": ["query_key_value"]}
ADAPTER = AdapterSettings(rank=4, alpha=8, top_k=2)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Tiny:
    """A prepared backbone with random experts for one client."""

    family: str
    folder: Path
    facts: dict[str, Any]
    state: ClientState

    def load(self, **changes: Any) -> PreTrainedModel:
        settings = settings_of(self.family, self.folder / "model", **changes)
        return load_backbone(self.folder / "prepared", settings)


@pytest.fixture(scope="module", params=list(CONFIGS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp(request.param)
    facts = make_backbone(folder, request.param)
    return Tiny(request.param, folder, facts, stored_state(folder, facts))


def stored_state(folder: Path, facts: dict[str, Any]) -> ClientState:
    """Two to four of five experts per module, by way of the files of a round."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(scale=0.3, size=shape).astype(np.float32)

    groups = {}
    for name, shapes in group_modules(target_modules(facts, None)).items():
        count, width, height = len(shapes), shapes[0].in_features, shapes[0].out_features
        experts = {"lora_A": draw(count, 5, 4, width), "lora_B": draw(count, 5, height, 4)}
        shared = {"lora_A": draw(count, 4, width), "lora_B": draw(count, height, 4)}
        shared["token_proj"] = draw(count, 4, width)
        groups[name] = PoolGroup(tuple(shape.name for shape in shapes), experts, shared)
    pool = Pool(groups=groups, num_experts=5, provenance=None)
    held = np.arange(5) < rng.integers(2, 5, size=(len(pool.modules), 1))
    assignment = Assignment(
        modules=pool.modules,
        holders_MEK=held[:, :, None],
        scores_MEK=np.zeros((len(pool.modules), 5, 1), dtype=np.float32),
        objective_M=np.zeros(len(pool.modules)),
        solver="none",
        round=1,
    )
    write_pool(folder / "pool.h5", Header("pool", "0" * 64), pool)
    write_assignment(folder / "assignment.h5", Header("assignment", "0" * 64), assignment)
    return read_client_state(folder / "pool.h5", assignment, 0)


def without_effect(state: ClientState) -> ClientState:
    """The same experts with B = 0."""
    groups = {
        name: replace(
            group,
            experts={**group.experts, "lora_B": np.zeros_like(group.experts["lora_B"])},
            shared={**group.shared, "lora_B": np.zeros_like(group.shared["lora_B"])},
        )
        for name, group in state.groups.items()
    }
    return ClientState(groups)


def sequences(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(EOS + 1, 300, size=length) for length in lengths]


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    batch = collate(sequences(7, 12, 9), [3, 3, 3], 0)
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        return model.eval()(**inputs, use_cache=False).logits


def test_the_default_targets_of_the_family_are_linear_layers_of_the_model(tiny: Tiny) -> None:
    leaves = {module.name.rpartition(".")[2] for module in target_modules(tiny.facts, None)}
    assert sorted(leaves) == sorted(tiny.facts["default_targets"]) == TARGETS[tiny.family]
    model = get_peft_model(tiny.load(), HMoLEConfig(num_experts=2))
    assert set(hmole_layers(model)) == {m.name for m in target_modules(tiny.facts, None)}


def test_targets_of_another_family_are_refused_by_name(tiny: Tiny) -> None:
    wrong = "q_proj" if tiny.family == "falcon" else "query_key_value"
    with pytest.raises(FedamoleError) as raised:
        target_modules(tiny.facts, [wrong])
    assert f"target_modules ['{wrong}'] match no linear layer; the model has [" in str(raised.value)
    assert f"'{TARGETS[tiny.family][0]}'" in str(raised.value)


def test_experts_without_effect_leave_the_logits_bit_by_bit(tiny: Tiny) -> None:
    backbone = tiny.load()
    expected = logits_of(backbone)
    model = insert_adapters(backbone, without_effect(tiny.state), ADAPTER)
    assert torch.equal(logits_of(model), expected)
    remove_adapters(model)
    changed = insert_adapters(backbone, tiny.state, ADAPTER)
    assert not torch.allclose(logits_of(changed), expected, atol=0.1)


def test_losses_of_a_batch_are_those_of_whole_logits_one_by_one(tiny: Tiny) -> None:
    """Padding, positions and the choice of logits against one plain pass per sequence."""
    model = insert_adapters(tiny.load(), tiny.state, ADAPTER)
    prompts, alone = [2, 7, 4], []
    for ids, prompt in zip(sequences(5, 12, 9), prompts, strict=True):
        tokens = torch.from_numpy(ids)
        with torch.no_grad():
            logits = model.eval()(input_ids=tokens[None]).logits[0].double()
        chosen = logits.log_softmax(-1)[torch.arange(len(ids) - 1), tokens[1:]]
        alone.append(-chosen[prompt - 1 :].sum())
    scored = ScoredModel(model, 0.001).eval()
    with torch.no_grad():
        together, _ = scored(collate(sequences(5, 12, 9), prompts, 0))
    torch.testing.assert_close(together.double(), torch.stack(alone), rtol=1e-5, atol=1e-5)


def trained(tiny: Tiny, backbone: PreTrainedModel) -> tuple[ClientState, float, float]:
    """Eight steps on one batch; the trained state, first and last loss."""
    model = insert_adapters(backbone, tiny.state, ADAPTER)
    settings = TrainingSettings(steps=8, batch_size=3)
    batch = collate(sequences(5, 12, 9), [2, 7, 4], 0)
    with engine_for(ScoredModel(model, 0.001), settings, 1e-2) as engine:
        place = LocalTraining(seed=1, round=1, client=0)
        record = train(engine, iter([[batch]] * 8), 8, place, settings, CPU)
        state = extract_state(trained_tensors(engine, settings.zero_stage), tiny.state)
    remove_adapters(model)
    return state, record.loss_first, record.loss_last


def test_training_lowers_the_loss_and_leaves_the_backbone_alone(tiny: Tiny) -> None:
    backbone = tiny.load()
    state, first, last = trained(tiny, backbone)
    assert last < 0.9 * first
    before = tiny.load().state_dict()
    after = backbone.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for name, found in state.groups.items():
        started = tiny.state.groups[name]
        for key in ("lora_A", "lora_B"):
            assert not np.array_equal(found.experts[key], started.experts[key])
            assert not np.array_equal(found.shared[key], started.shared[key])
        assert not np.array_equal(found.shared["token_proj"], started.shared["token_proj"])


def test_checkpointed_activations_give_the_same_gradients(tiny: Tiny) -> None:
    batch = collate(sequences(5, 12), [2, 4], 0)
    gradients = []
    for checkpointing in (False, True):
        backbone = tiny.load(gradient_checkpointing=checkpointing)
        scored = ScoredModel(insert_adapters(backbone, tiny.state, ADAPTER), 0.001).train()
        torch.manual_seed(5)
        token_B, balance_B = scored(batch)
        (token_B.sum() + balance_B.sum()).backward()
        gradients.append({n: p.grad for n, p in scored.named_parameters() if p.requires_grad})
    assert all(torch.count_nonzero(gradient) for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_answers_in_a_padded_batch_are_those_of_argmax_token_by_token(tiny: Tiny) -> None:
    """No cache, no padding, no generate(): the whole sequence again for every new token."""
    prompts = sequences(4, 13, 9, 17)
    store = make_store([ids.tolist() for ids in prompts], [1] * 4, choices=[])
    model = insert_adapters(tiny.load(), tiny.state, ADAPTER).eval()
    settings = EvaluationSettings(batch_size=4, max_new_tokens=8)
    expected = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt)
        while len(ids) < len(prompt) + 8 and EOS not in ids:
            with torch.no_grad():
                following = model(input_ids=ids[None], use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, following[None]])
        expected.append([token for token in ids[len(prompt) :].tolist() if token != EOS])
    assert len({tuple(answer) for answer in expected}) == 4
    assert generate(model, prompts, store, settings, CPU) == expected


def test_choices_after_one_prompt_have_the_losses_of_each_alone(tiny: Tiny) -> None:
    model = insert_adapters(tiny.load(), tiny.state, ADAPTER).eval()
    prompts = sequences(4, 13, 9, 17, 9, 1)
    check_choices(model, lambda ids: model(input_ids=ids[None], use_cache=False).logits[0], prompts)


def test_a_trained_state_survives_its_file(tiny: Tiny, tmp_path: Path) -> None:
    backbone = tiny.load()
    state, _, _ = trained(tiny, backbone)
    model = insert_adapters(backbone, state, ADAPTER)
    expected = logits_of(model)
    nothing = np.zeros((len(state.modules), 4), dtype=np.float32)
    upload = Upload(0, 1, state, 3, nothing, expert_embeddings={}, tokens={})
    write_upload(tmp_path / "client.h5", Header("upload", "0" * 64), upload)
    read = read_upload(tmp_path / "client.h5").state
    assert torch.equal(logits_of(insert_adapters(tiny.load(), read, ADAPTER)), expected)

    model.save_pretrained(tmp_path / "peft")
    loaded = PeftModel.from_pretrained(tiny.load(), tmp_path / "peft")
    assert torch.equal(logits_of(loaded), expected)


def test_a_tokenizer_comes_with_the_model(tiny: Tiny) -> None:
    tokenizer = load_tokenizer(tiny.folder / "prepared", settings_of(tiny.family, tiny.folder))
    assert len(tokenizer) <= 300
    assert tokenizer.decode(tokenizer("Who are you?").input_ids) == "Who are you?"


def test_positions_are_those_that_the_model_takes(tiny: Tiny) -> None:
    expected = {"opt": POSITIONS, "gemma2": 8192, "falcon": None}
    config = CONFIGS[tiny.family]
    assert tiny.facts["positions"] == expected.get(tiny.family, config.max_position_embeddings)


def test_sdpa_is_refused_where_the_model_has_none(tiny: Tiny) -> None:
    sdpa = settings_of(tiny.family, tiny.folder, attention="sdpa")
    if tiny.family != "gemma2":
        check_loading(tiny.facts, sdpa)
        return
    with pytest.raises(FedamoleError, match="gemma2: attention sdpa is not offered for gemma2"):
        check_loading(tiny.facts, sdpa)
    with pytest.raises(FedamoleError, match="cannot be loaded as a causal language model"):
        tiny.load(attention="sdpa")
    check_loading(tiny.facts, settings_of(tiny.family, tiny.folder))


def test_a_sequence_beyond_the_positions_is_refused_before_it_breaks_the_model(
    tmp_path: Path,
) -> None:
    facts = make_backbone(tmp_path, "opt")
    model = load_backbone(tmp_path / "prepared", settings_of("opt", tmp_path / "model"))
    (whole,) = sequences(POSITIONS)
    ids = torch.from_numpy(whole)[None]
    model(input_ids=ids)
    with pytest.raises(IndexError):
        model(input_ids=torch.cat([ids, ids[:, :1]], 1))
    positions = facts["positions"]
    check_length("opt", positions, POSITIONS)
    check_length("opt", positions, POSITIONS - 8, new_tokens=8)
    check_length("falcon", None, 10**6)
    with pytest.raises(FedamoleError) as raised:
        check_length("opt", positions, POSITIONS - 8, new_tokens=9)
    assert str(raised.value) == (
        "backbone opt: has positions for 48 tokens, and max_length 40 and answers of 9 tokens need "
        "49; lower max_length or evaluation: max_new_tokens"
    )


def test_packed_clients_get_the_losses_that_they_get_alone(tiny: Tiny) -> None:
    """Of sequences of unequal length: padding behind them is seen by nobody, with no mask."""
    lengths, prompt = (7, 12, 9, 5), 3
    rows = sequences(*lengths)
    store = make_store([list(ids) for ids in rows], [prompt] * len(rows), [])
    other = without_effect(tiny.state)
    adapter = ADAPTER.model_copy(update={"dropout": 0.0})
    backbone = tiny.load()
    units = [make_unit(*unit, store) for unit in ((0, 0, [0, 3]), (1, 0, [1, 2]), (0, 1, [2, 1]))]
    with packed_adapters(backbone, [tiny.state, other], adapter) as adapters:
        # Dropout of the backbone itself would be drawn for all together; packs refuse it.
        packed = PackedModel(backbone, adapters).eval()
        token_U, balance_U = packed(pack_batch(units, store), [0] * len(units))
    for unit, token, balance in zip(units, token_U, balance_U, strict=True):
        state = (tiny.state, other)[unit.place]
        model = insert_adapters(backbone, state, adapter)
        scored = ScoredModel(model, 1.0).eval()
        batch = collate([rows[row] for row in unit.rows], [prompt] * 2, 0)
        expected, _ = scored(batch)
        torch.testing.assert_close(token, expected.sum(), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(balance, balance_loss(model).sum(), atol=1e-5, rtol=1e-5)
        remove_adapters(model)


def test_packs_refuse_a_backbone_with_dropout_of_its_own(tiny: Tiny) -> None:
    backbone = tiny.load()
    if tiny.family == "opt":
        with pytest.raises(FedamoleError, match=r"dropout of its own \(0.1\).*must be 1"):
            _check_no_dropout(backbone, tiny.family)
    else:
        _check_no_dropout(backbone, tiny.family)
