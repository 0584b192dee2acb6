"""Local, centralised, FedSA-LoRA and FDLoRA against closed forms, PEFT and torch.optim."""

import copy
import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import CLIENTS, Federation, Round, contents
from peft import LoraConfig, get_peft_model
from torch import nn

from fedamole.artifacts import Header
from fedamole.backbone import load_backbone
from fedamole.batches import stream_of_examples
from fedamole.client import ClientResult, ClientSession
from fedamole.fusion import find_weights, fused
from fedamole.methods import load
from fedamole.methods.building_blocks import Tensors, shared_of, with_shared
from fedamole.methods.fdlora import is_due, outer_step
from fedamole.partition import ClientSplit
from fedamole.pool_files import read_pool, write_kept, write_pool, write_upload
from fedamole.pools import ClientGroup, ClientState, KeptState, PoolGroup
from fedamole.settings import FdloraSettings

pytestmark = pytest.mark.usefixtures("group")

# With these, trained adapters are better than none, so that the weights of a fusion are not 0.
LEARNING = {
    "training": {"steps": 6, "batch_size": 2, "learning_rate": 2e-2},
    "fdlora": {"fusion_penalty": 0.0},
}
ZERO_3 = {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}}


@pytest.fixture(scope="module")
def played(federation: Federation) -> dict[str, list[Round]]:
    """Three rounds of FDLoRA, two of the others."""
    folder = federation.folder.parent
    counts = {"local": 2, "centralised": 2, "fedsa-lora": 2, "fdlora": 3}
    return {
        run: list(federation.rounds(federation.session(run, **LEARNING), folder / run, count))
        for run, count in counts.items()
    }


def equal(one: Tensors, other: Tensors) -> bool:
    """Whether tensors are the same in names, groups and all bits."""
    return one.keys() == other.keys() and all(
        one[name].keys() == other[name].keys()
        and all(np.array_equal(one[name][key], other[name][key]) for key in one[name])
        for name in one
    )


def pool_tensors(groups: dict[str, PoolGroup]) -> Tensors:
    return {name: group.shared for name, group in groups.items()}


def uploaded(round_: Round, client: int) -> Tensors:
    return shared_of(round_.uploads[client].state)


def kept(round_: Round, client: int) -> KeptState:
    state = round_.results[client].kept
    assert state is not None and (state.client, state.round) == (client, round_.number)
    return state


def plain_lora(session: ClientSession, tensors: Tensors) -> nn.Module:
    """PEFT's LoRA with these tensors, without dropout."""
    backbone = load_backbone(session.folder, session.settings.run.backbone)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(backbone, config)
    for name, by_key in tensors.items():
        for key, value in by_key.items():
            for index in (0, 1):
                weight_of(model, name, index, key).data = torch.from_numpy(value[index].copy())
    return model


def weight_of(model: nn.Module, name: str, index: int, key: str) -> nn.Parameter:
    """A of PEFT's LoRA at one layer, or B."""
    module = model.get_submodule(f"base_model.model.model.layers.{index}.self_attn.{name}")
    weight: nn.Parameter = getattr(module, key)["default"].weight
    return weight


def loss_of(model: nn.Module, session: ClientSession, rows: np.ndarray) -> torch.Tensor:
    """Mean cross entropy of all response tokens, sequence by sequence."""
    losses = []
    for row in rows:
        ids = torch.from_numpy(session.store.ids(row).astype(np.int64))
        start = session.store.prompt_length(row)
        logits_TV = model(input_ids=ids[None]).logits[0, start - 1 : -1]
        losses.append(nn.functional.cross_entropy(logits_TV, ids[start:], reduction="none"))
    return torch.cat(losses).mean()


# Local


def test_local_leaves_the_pool_as_it_is_while_its_round_advances(
    played: dict[str, list[Round]],
) -> None:
    first, second = played["local"]
    assert [first.pool.round, second.pool.round] == [1, 2]
    assert equal(pool_tensors(first.previous.groups), pool_tensors(second.pool.groups))
    assert {key for g in second.pool.groups.values() for key in g.shared} == {"lora_A", "lora_B"}
    assert second.pool.provenance.num_examples_K.tolist() == [11] * CLIENTS


def test_local_sends_no_tensor(played: dict[str, list[Round]], federation: Federation) -> None:
    for round_ in played["local"]:
        for upload in round_.uploads:
            assert upload.state.modules == round_.previous.modules
            assert shared_of(upload.state) == {"q_proj": {}, "v_proj": {}}


def test_local_is_fedit_with_one_client(
    federation: Federation, played: dict[str, list[Round]], tmp_path: Path
) -> None:
    """The mean over one client is that client, which then goes on from its own tensors."""
    session = federation.session("fedit", **LEARNING)
    method = load("fedit")
    for client in range(CLIENTS):
        state = played["local"][0].states[client]
        for round_ in played["local"]:
            alone = method.train_client(session, client, round_.number, state, None)
            state = alone.upload.state
            assert equal(kept(round_, client).groups, shared_of(state))
            assert round_.results[client].report.eval_loss == alone.report.eval_loss


# Centralised


def test_centralised_is_fedit_with_one_client_that_has_all_data(
    federation: Federation, played: dict[str, list[Round]], tmp_path: Path
) -> None:
    one_place = copy.copy(federation)
    splits = federation.store.clients
    merged = ClientSplit(
        *(
            np.concatenate([np.concatenate([s.train, s.embedding]) for s in splits]),
            np.empty(0, np.int64),
            splits[0].eval,
            splits[0].test,
        )
    )
    one_place.store = dataclasses.replace(federation.store, clients=(merged,))
    one_place.raw = federation.raw | {
        "scenarios": [federation.raw["scenarios"][0] | {"clients": 1}]
    }
    training = LEARNING["training"] | {"steps": CLIENTS * LEARNING["training"]["steps"]}
    alone = one_place.rounds(one_place.session("fedit", training=training), tmp_path)
    for found, expected in zip(played["centralised"], alone, strict=True):
        assert found.results.keys() == {0}
        assert equal(uploaded(found, 0), uploaded(expected, 0))
        assert found.results[0].report.eval_loss == expected.results[0].report.eval_loss
        assert found.results[0].report.num_train == 11 * CLIENTS
        # The aggregate of one upload is that upload.
        assert equal(pool_tensors(found.pool.groups), uploaded(found, 0))


def test_centralised_does_the_steps_of_all_clients(federation: Federation) -> None:
    session = federation.session("centralised", training={"steps": 6, "min_steps": 2})
    alone = federation.session("fedit", training={"steps": 6, "min_steps": 2})
    of_clients = [alone.settings.run.steps_of(client, 11) for client in range(CLIENTS)]
    assert len(set(of_clients)) > 1
    assert session.settings.run.steps_of(0, 33) == sum(of_clients)
    rows = session.training_rows(0, with_embedding_set=True)
    splits = session.store.clients
    assert sorted(rows) == sorted(np.concatenate([[*s.train, *s.embedding] for s in splits]))


def test_centralised_is_tested_on_every_client(
    federation: Federation, played: dict[str, list[Round]]
) -> None:
    session = federation.session("centralised", **LEARNING)
    last = played["centralised"][-1]
    model = plain_lora(session, uploaded(last, 0)).eval()
    state = last.uploads[0].state
    for client in range(CLIENTS):
        report = load("centralised").evaluate_client(session, client, 2, state)
        with torch.no_grad():
            expected = float(loss_of(model, session, session.store.clients[client].eval))
        assert report.eval_loss == pytest.approx(expected, abs=1e-5)


# FedSA-LoRA


def test_fedsa_averages_a_and_sends_nothing_else(played: dict[str, list[Round]]) -> None:
    for round_ in played["fedsa-lora"]:
        assert round_.pool.round == round_.number
        for name, group in round_.pool.groups.items():
            sent = [uploaded(round_, client)[name] for client in range(CLIENTS)]
            assert all(tensors.keys() == {"lora_A"} for tensors in (*sent, group.shared))
            mean = np.mean([tensors["lora_A"].astype(np.float64) for tensors in sent], axis=0)
            np.testing.assert_allclose(group.shared["lora_A"], mean, atol=1e-7)
            assert not np.array_equal(sent[0]["lora_A"], sent[1]["lora_A"])


def test_fedsa_clients_train_the_mean_of_a_with_a_b_of_their_own(
    federation: Federation, played: dict[str, list[Round]]
) -> None:
    """Made again by FedIT's training, from states put together by hand."""
    first, second = played["fedsa-lora"]
    whole = played["local"][0].states[0]
    session, method = federation.session("fedit", **LEARNING), load("fedit")
    for client in range(CLIENTS):
        # Before its first training B is 0, as in every LoRA.
        starts = {1: whole, 2: with_shared(second.states[client], kept(first, client).groups)}
        for round_ in (first, second):
            made = method.train_client(session, client, round_.number, starts[round_.number], None)
            expected = shared_of(made.upload.state)
            found = {name: {**tensors} for name, tensors in uploaded(round_, client).items()}
            for name, tensors in kept(round_, client).groups.items():
                assert tensors.keys() == {"lora_B"}
                found[name] |= tensors
            assert equal(found, expected)
            assert round_.results[client].report.eval_loss == made.report.eval_loss
    assert not equal(kept(second, 0).groups, kept(second, 1).groups)


# FDLoRA: the server


@pytest.mark.parametrize(("rate", "momentum"), [(1.0, 0.5), (0.7, 0.9)])
def test_the_outer_step_is_that_of_torch(rate: float, momentum: float) -> None:
    rng = np.random.default_rng(3)
    settings = FdloraSettings(outer_learning_rate=rate, outer_momentum=momentum)
    group = PoolGroup(("m",), {}, {"lora_A": rng.normal(size=(1, 4, 7)).astype(np.float32)})
    parameter = nn.Parameter(torch.from_numpy(group.shared["lora_A"].copy()))
    optimizer = torch.optim.SGD([parameter], lr=rate, momentum=momentum, nesterov=True)
    for _ in range(5):
        mean = rng.normal(size=(1, 4, 7)).astype(np.float32)
        parameter.grad = parameter.detach() - torch.from_numpy(mean)
        optimizer.step()
        group = outer_step(group, dataclasses.replace(group, shared={"lora_A": mean}), settings)
        assert group.shared["lora_A"].dtype == group.server["lora_A"].dtype == np.float32
        expected = parameter.detach().numpy()
        np.testing.assert_allclose(group.shared["lora_A"], expected, rtol=1e-5, atol=1e-5)


def test_fdlora_pools_follow_the_outer_optimizer(played: dict[str, list[Round]]) -> None:
    first, *later = played["fdlora"]
    for name, group in first.pool.groups.items():
        assert group.server == {}
        for key, start in group.shared.items():
            sent = [uploaded(first, client)[name][key] for client in range(CLIENTS)]
            np.testing.assert_allclose(start, np.mean(sent, axis=0, dtype=np.float64), atol=1e-7)
            parameter = nn.Parameter(torch.from_numpy(start.astype(np.float64)))
            optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.5, nesterov=True)
            for round_ in later:
                sent = [uploaded(round_, client)[name][key] for client in range(CLIENTS)]
                gradients = [parameter.detach() - torch.from_numpy(array) for array in sent]
                parameter.grad = torch.stack(gradients).mean(0)
                optimizer.step()
                found = round_.pool.groups[name]
                np.testing.assert_allclose(found.shared[key], parameter.detach(), atol=1e-6)
                np.testing.assert_allclose(
                    found.server[key], optimizer.state[parameter]["momentum_buffer"], atol=1e-6
                )


def test_the_momentum_stays_with_the_server(played: dict[str, list[Round]], tmp_path: Path) -> None:
    second, third = played["fdlora"][1:]
    write_pool(tmp_path / "pool.h5", Header("pool", "0" * 64), second.pool)
    read = read_pool(tmp_path / "pool.h5")
    for name, group in second.pool.groups.items():
        assert equal({name: read.groups[name].server}, {name: group.server})
        assert third.states[0].groups[name].shared.keys() == {"lora_A", "lora_B"}
        assert equal(shared_of(third.states[0]), pool_tensors(second.pool.groups))


# FDLoRA: the clients


def test_the_first_round_of_fdlora_is_local(played: dict[str, list[Round]]) -> None:
    first = played["fdlora"][0]
    for client in range(CLIENTS):
        assert equal(kept(first, client).groups, uploaded(first, client))
        assert kept(first, client).numbers == {}
        # The embedding set is for the fusion.
        assert first.uploads[client].num_examples == 6


def test_fdlora_trains_with_adamw_on_the_training_set_alone(
    federation: Federation, tmp_path: Path
) -> None:
    """From tokens to upload and test against PEFT's LoRA and a plain training loop."""
    training = {"steps": 5, "batch_size": 1, "learning_rate": 1e-2}
    session = federation.session("fdlora", training=training, adapter={"dropout": 0.0})
    round_ = next(federation.rounds(session, tmp_path))
    model = plain_lora(session, pool_tensors(round_.previous.groups))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, rows = torch.optim.AdamW(trainable, lr=1e-2), session.store.clients[1]
    for number in stream_of_examples(6, 0, 5, session.settings.run.seed, 1):
        optimizer.zero_grad()
        loss_of(model, session, rows.train[[number]]).backward()
        optimizer.step()
    for name, tensors in uploaded(round_, 1).items():
        for key, value in tensors.items():
            for index in (0, 1):
                expected = weight_of(model, name, index, key).detach().numpy()
                # Without the weight decay, A would be off by 5e-4 of itself, up to 9e-5.
                np.testing.assert_allclose(value[index], expected, atol=1e-5)
    with torch.no_grad():
        expected_loss = float(loss_of(model, session, rows.eval))
    assert round_.results[1].report.eval_loss == pytest.approx(expected_loss, abs=1e-5)


@pytest.mark.parametrize("number", [2, 3])
def test_the_fused_model_is_a_lora_of_the_fused_arrays(
    federation: Federation, played: dict[str, list[Round]], number: int
) -> None:
    session = federation.session("fdlora", **LEARNING)
    first, round_ = played["fdlora"][0], played["fdlora"][number - 1]
    both = []
    for client in range(CLIENTS):
        weights = kept(round_, client).numbers
        one, two = weights["personal_weight"], weights["global_weight"]
        both.append(bool(one and two))
        personal, trained = kept(first, client).groups, uploaded(round_, client)
        by_hand = {
            name: {key: one * personal[name][key] + two * array for key, array in tensors.items()}
            for name, tensors in trained.items()
        }
        rows = session.store.clients[client]
        with torch.no_grad():
            model = plain_lora(session, as_float32(by_hand)).eval()
            tested, on_embedding_set = (
                float(loss_of(model, session, part)) for part in (rows.eval, rows.embedding)
            )
            without = float(loss_of(model.unload(), session, rows.embedding))
        assert round_.results[client].report.eval_loss == pytest.approx(tested, abs=1e-5)
        # The search starts from no adapter, and nothing worse comes out of it.
        assert on_embedding_set <= without
    # For some clients of this small model, no adapter is the best.
    assert any(both)


def test_the_batch_size_of_tests_does_not_choose_what_the_fusion_sees(
    federation: Federation, played: dict[str, list[Round]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedamole import evaluation

    exact, seen = evaluation.evaluation_loss, set[tuple[int, ...]]()

    def spy(scored: nn.Module, store: Any, rows: np.ndarray, *others: Any) -> float:
        seen.add(tuple(rows))
        return exact(scored, store, rows, *others)

    monkeypatch.setattr(evaluation, "evaluation_loss", spy)
    second = played["fdlora"][1]
    for batch_size in (1, 4):
        sections = {"evaluation": {"batch_size": batch_size}, "fdlora": {"fusion_batches": 2}}
        session = federation.session("fdlora", **{**LEARNING, **sections})
        before = kept(played["fdlora"][0], 0)
        load("fdlora").train_client(session, 0, 2, second.states[0], before)
    # Two batches of training, of two sequences each.
    assert seen == {tuple(session.store.clients[0].embedding[:4])}


def as_float32(tensors: Tensors) -> Tensors:
    return {
        name: {key: array.astype(np.float32) for key, array in by_key.items()}
        for name, by_key in tensors.items()
    }


def test_a_client_that_was_away_catches_up(
    federation: Federation, played: dict[str, list[Round]]
) -> None:
    """After round 1 it comes back in round 3; round 2 was one for copies."""
    settings = {"fdlora": {"fusion_penalty": 0.0, "sync_every": 2}}
    session = federation.session("fdlora", **{**LEARNING, **settings})
    first, *_, third = played["fdlora"]
    result = load("fdlora").train_client(session, 0, 3, third.states[0], kept(first, 0))
    assert result.kept is not None
    assert equal(result.kept.groups, shared_of(result.upload.state))
    for every in (1, 2, 5):
        # Who is always there copies after multiples; nobody copies twice for one of them.
        always = [t for t in range(2, 30) if is_due(t, t - 1, every)]
        assert always == [t for t in range(2, 30) if t % every == 0]
        for last, now in ((1, 3), (4, 9), (5, 9), (7, 22)):
            missed = any(t % every == 0 for t in range(last + 1, now + 1))
            assert is_due(now, last, every) == missed


def test_the_personal_adapter_becomes_the_local_one_every_few_rounds(
    federation: Federation, played: dict[str, list[Round]], tmp_path: Path
) -> None:
    first, *later = played["fdlora"]
    for round_ in later:
        for client in range(CLIENTS):
            assert equal(kept(round_, client).groups, kept(first, client).groups)
    often = {**LEARNING, "fdlora": {"fusion_penalty": 0.0, "sync_every": 2}}
    rounds = list(federation.rounds(federation.session("fdlora", **often), tmp_path, 3))
    for client in range(CLIENTS):
        assert equal(kept(rounds[1], client).groups, uploaded(rounds[1], client))
        assert equal(kept(rounds[2], client).groups, uploaded(rounds[1], client))
        # It is tested before it is replaced.
        expected = later[0].results[client].report.to_mapping()
        assert rounds[1].results[client].report.to_mapping() == expected


def test_a_client_that_comes_later_keeps_what_it_trains_first(
    federation: Federation, played: dict[str, list[Round]]
) -> None:
    session, second = federation.session("fdlora", **LEARNING), played["fdlora"][1]
    late = load("fdlora").train_client(session, 0, 2, second.states[0], None)
    assert equal(late.kept.groups, shared_of(late.upload.state))
    assert equal(shared_of(late.upload.state), uploaded(second, 0))


# AdaFusion


def test_a_fusion_adds_tensor_by_tensor() -> None:
    rng = np.random.default_rng(0)
    nothing = np.zeros(0, dtype=np.int64)

    def draw() -> ClientState:
        tensors = {"lora_A": rng.normal(size=(2, 3, 5)), "lora_B": rng.normal(size=(2, 4, 3))}
        shared = {key: array.astype(np.float32) for key, array in tensors.items()}
        return ClientState({"q": ClientGroup(("a", "b"), {}, nothing, nothing, shared)})

    one, two = draw(), draw()
    found = fused((one, two), np.array([0.5, -1.25])).groups["q"]
    assert found.modules == ("a", "b")
    for key, array in found.shared.items():
        first, second = one.groups["q"].shared[key], two.groups["q"].shared[key]
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, 0.5 * first - 1.25 * second, atol=1e-6)


def bowl(weights: np.ndarray) -> float:
    return float(((weights - [0.9, 0.4]) ** 2).sum())


@pytest.mark.parametrize("budget", [2, 5, 40])
def test_the_weights_are_the_best_of_those_tried(budget: int) -> None:
    tried: list[tuple[float, np.ndarray]] = []
    settings = FdloraSettings(fusion_budget=budget)

    def loss_at(weights: np.ndarray) -> float:
        tried.append((bowl(weights) + 0.05 * np.abs(weights).mean(), weights.copy()))
        return bowl(weights)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = find_weights(loss_at, settings, 7, "fusion", 0, 2)
    assert len(tried) == budget and not tried[0][1].any()
    best, at = min(tried, key=lambda pair: pair[0])
    assert weights == pytest.approx(at, abs=1e-3)
    assert best < tried[0][0]


def test_the_penalty_pulls_to_zero_and_the_bound_holds() -> None:
    far = FdloraSettings(fusion_budget=40, fusion_bound=0.7, fusion_penalty=0.0)
    assert find_weights(bowl, far, 7) == pytest.approx([0.7, 0.4], abs=0.02)
    # The gradient of the penalty is 10 / 2 each, the bowl's at most 1.8: nothing is worth it.
    dear = FdloraSettings(fusion_budget=40, fusion_penalty=10.0)
    assert find_weights(bowl, dear, 7) == pytest.approx([0.0, 0.0], abs=0.02)


def test_the_search_depends_on_no_global_generator() -> None:
    found = []
    for seed in (1, 2):
        np.random.seed(seed)
        found.append(find_weights(bowl, FdloraSettings(fusion_budget=20), 7, "fusion"))
    assert np.array_equal(*found)


def test_a_process_whose_search_fails_ends() -> None:
    """nevergrad's thread would wait for the next loss for ever."""
    code = (
        "from fedamole.fusion import find_weights; from fedamole.settings import FdloraSettings\n"
        "def loss_at(weights):\n"
        "    if weights.any(): raise ValueError('out of memory')\n"
        "    return 1.0\n"
        "find_weights(loss_at, FdloraSettings(), 7)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith("ValueError: out of memory\n")


# Files


def written(folder: Path, result: ClientResult) -> dict[str, bytes]:
    folder.mkdir()
    write_upload(folder / "upload.h5", Header("upload", "0" * 64), result.upload)
    if result.kept:
        write_kept(folder / "kept.h5", Header("kept", "0" * 64), result.kept)
    return contents(folder)


@pytest.mark.parametrize("run", ["local", "fedsa-lora", "fdlora"])
def test_a_round_from_files_is_the_round_from_memory(
    federation: Federation, played: dict[str, list[Round]], run: str, tmp_path: Path
) -> None:
    first, second = played[run][:2]
    session = federation.session(run, **LEARNING)
    nothing = np.zeros(0, dtype=np.int64)
    in_memory = ClientState(
        {
            name: ClientGroup(group.modules, {}, nothing, nothing, group.shared)
            for name, group in first.pool.groups.items()
        }
    )
    result = load(run).train_client(session, 1, 2, in_memory, first.results[1].kept)
    assert result.report.to_mapping() == second.results[1].report.to_mapping()
    from_files = written(tmp_path / "files", second.results[1])
    assert written(tmp_path / "memory", result) == from_files
    assert from_files.keys() == {"upload.h5", "kept.h5"}


def test_zero_3_fuses_the_same_adapters(
    federation: Federation, played: dict[str, list[Round]], tmp_path: Path
) -> None:
    sections: dict[str, Any] = {**LEARNING, "training": LEARNING["training"] | ZERO_3}
    rounds = federation.rounds(federation.session("fdlora", **sections), tmp_path)
    for found, expected in zip(rounds, played["fdlora"], strict=False):
        for client in range(CLIENTS):
            one, other = kept(found, client), kept(expected, client)
            assert one.numbers == pytest.approx(other.numbers, abs=1e-3)
            losses = [r.results[client].report.eval_loss for r in (found, expected)]
            assert losses[0] == pytest.approx(losses[1], abs=1e-4)
            for name, tensors in other.groups.items():
                for key, value in tensors.items():
                    np.testing.assert_allclose(one.groups[name][key], value, atol=1e-4)
