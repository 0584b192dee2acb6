"""FedALT: who gets whose mean, and a model that mixes two adapters token by token."""

# M = modules, K = clients, D = in_features
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import CLIENTS, Federation, Round, contents
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedamole.backbone import load_backbone
from fedamole.batches import collate
from fedamole.client import Start, evaluate_client, locally_trained
from fedamole.errors import FedamoleError
from fedamole.evaluation import evaluation_loss
from fedamole.methods.building_blocks import Tensors, two_experts, with_two_experts
from fedamole.methods.fedalt import RUNS, aggregate, assign, form
from fedamole.pools import ClientGroup, ClientState, Pool, Upload, held_rows
from fedamole.stages import RunStage, with_quorum
from fedamole.training import ScoredModel

pytestmark = pytest.mark.usefixtures("group")

CPU = torch.device("cpu")
LORA = ("lora_A", "lora_B")


@pytest.fixture(scope="module")
def played(federation: Federation) -> list[Round]:
    session = federation.session("fedalt")
    return list(federation.rounds(session, federation.folder.parent / "played"))


def run_stage(federation: Federation, clients: int, **sections: Any) -> RunStage:
    stage = federation.stage("fedalt", **sections).run
    scenario = stage.scenario.model_copy(update={"clients": clients})
    part = stage.tokens.scenario.model_copy(update={"scenario": scenario})
    tokens = stage.tokens.model_copy(update={"scenario": part})
    return stage.model_copy(update={"tokens": tokens})


def trained_pool(federation: Federation, settings: RunStage) -> Pool:
    """A first pool whose means are not zero, so that those that stay can be told."""
    pool = RUNS["fedalt"].init_pool(settings, federation.facts)
    rng = np.random.default_rng(1)
    groups = {
        name: replace(
            group,
            experts={k: rng.normal(size=a.shape).astype(a.dtype) for k, a in group.experts.items()},
        )
        for name, group in pool.groups.items()
    }
    return replace(pool, groups=groups)


def make_upload(pool: Pool, settings: RunStage, client: int) -> Upload:
    rng = np.random.default_rng(100 + client)
    rows = held_rows(assign(settings, pool, 1), pool.groups, client)
    groups = {}
    for name, group in pool.groups.items():
        experts = {
            key: rng.normal(size=(len(a), *a.shape[2:])).astype(np.float32)
            for key, a in group.experts.items()
        }
        groups[name] = ClientGroup(group.modules, experts, *rows[name], shared={})
    counts = {name: np.full(len(g.modules), 7 + client) for name, g in groups.items()}
    empty = {name: np.zeros((len(g.modules), 0), np.float32) for name, g in groups.items()}
    nothing = np.zeros((0, 0), np.float32)
    return Upload(client, 1, ClientState(groups), 10 + 5 * client, nothing, empty, counts)


@pytest.mark.parametrize("reporting", [[0, 1, 2, 3, 4], [1, 3, 4], [0, 2], [3]])
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_each_client_gets_the_mean_of_the_others_that_reported(
    federation: Federation, weighting: str, reporting: list[int]
) -> None:
    made_with = run_stage(federation, clients=5, aggregation={"weighting": weighting})
    settings = with_quorum(made_with, 0.2)
    previous = trained_pool(federation, settings)
    uploads = [make_upload(previous, settings, k) for k in reporting]
    found = aggregate(settings, previous, assign(settings, previous, 1), iter(uploads))
    assert found.num_experts == 5
    for name, group in found.groups.items():
        for key, means in group.experts.items():
            for client in range(5):
                others = [upload for upload in uploads if upload.client != client]
                if not others:
                    expected = previous.groups[name].experts[key][:, client]
                else:
                    weights = [u.num_examples if weighting == "examples" else 1 for u in others]
                    arrays = [u.state.groups[name].experts[key].astype(float) for u in others]
                    expected = np.average(arrays, axis=0, weights=weights)
                np.testing.assert_allclose(means[:, client], expected, rtol=0, atol=1e-6)
    made = found.provenance
    assert made is not None and made.round == 1
    assert made.client_embeddings_MKR.shape[2] == made.expert_embeddings_MER.shape[2] == 0
    expected_K = [10 + 5 * k if k in reporting else 0 for k in range(5)]
    assert made.num_examples_K.tolist() == expected_K
    for client in reporting:
        assert (made.tokens_MEK[:, client, client] == 7 + client).all()


def test_too_few_uploads_and_foreign_ones_are_errors(federation: Federation) -> None:
    settings = run_stage(federation, clients=5)
    pool = trained_pool(federation, settings)
    uploads = [make_upload(pool, settings, k) for k in range(5)]
    assignment = assign(settings, pool, 1)
    with pytest.raises(FedamoleError, match=r"no upload of clients \[2\]"):
        aggregate(settings, pool, assignment, iter(uploads[:2] + uploads[3:]))
    with pytest.raises(FedamoleError, match="client 0, round 1: is there twice"):
        aggregate(settings, pool, assignment, iter([*uploads, uploads[0]]))
    other = replace(uploads[4], client=3)
    with pytest.raises(FedamoleError, match="does not hold the experts assigned to it"):
        aggregate(settings, pool, assignment, iter([*uploads[:3], other]))


def test_a_mean_of_many_clients_keeps_its_digits(federation: Federation) -> None:
    """A difference of float32 sums would be off by the size of the sum."""
    settings = run_stage(federation, clients=40)
    pool = RUNS["fedalt"].init_pool(settings, federation.facts)
    uploads = []
    for client in range(40):
        upload = make_upload(pool, settings, client)
        groups = {
            name: replace(g, experts={k: a + np.float32(1000) for k, a in g.experts.items()})
            for name, g in upload.state.groups.items()
        }
        uploads.append(replace(upload, state=ClientState(groups)))
    found = aggregate(settings, pool, assign(settings, pool, 1), iter(uploads))
    sent = np.stack([u.state.groups["q_proj"].experts["lora_A"] for u in uploads[1:]])
    expected = sent.astype(np.float64).mean(0).astype(np.float32)
    assert np.array_equal(found.groups["q_proj"].experts["lora_A"][:, 0], expected)


def test_rounds_send_the_means_and_keep_what_is_own(played: list[Round]) -> None:
    first, second = played
    for name, group in first.previous.groups.items():
        assert not any(array.any() for array in group.experts.values())
        for client, state in second.states.items():
            received = state.groups[name].experts
            others = [u.state.groups[name].experts for u in first.uploads if u.client != client]
            assert len(others) == CLIENTS - 1
            for key in LORA:
                expected = np.mean([tensors[key] for tensors in others], axis=0)
                np.testing.assert_allclose(received[key], expected, atol=1e-7)
    for round_ in played:
        for upload, result in zip(round_.uploads, round_.results.values(), strict=True):
            assert upload.num_examples == 11
            for name, group in upload.state.groups.items():
                assert group.experts.keys() == set(LORA) and group.shared == {}
                for key in LORA:
                    assert np.array_equal(group.experts[key], result.kept.groups[name][key])
    for one, two in zip(first.results.values(), second.results.values(), strict=True):
        for name, before in one.kept.groups.items():
            for key, array in two.kept.groups[name].items():
                # Two steps of Adam are no longer than two step sizes: the next round goes on.
                assert 0 < np.abs(array - before[key]).max() < 2.1 * 5e-3


def test_clients_start_from_the_same_adapter(federation: Federation, tmp_path: Path) -> None:
    still = federation.session("fedalt", training={"learning_rate": 1e-30})
    start = next(federation.rounds(still, tmp_path))
    one, other = (result.kept.groups["v_proj"] for result in list(start.results.values())[:2])
    assert np.array_equal(one["lora_A"], other["lora_A"])
    assert np.array_equal(one["gate"], other["gate"])
    assert np.abs(one["lora_B"]).max() < 1e-20
    bound = 1 / np.sqrt(one["gate"].shape[2])
    for key in ("lora_A", "gate"):
        assert 0.9 * bound < np.abs(one[key]).max() <= bound


class Mixed(nn.Module):
    """y = W0 x + s (a_own B_own A_own + a_rest B_rest A_rest) x, written out."""

    def __init__(self, base: nn.Module, tensors: dict[str, np.ndarray], index: int) -> None:
        super().__init__()
        self.base = base
        self.A, self.B = (torch.from_numpy(tensors[key][index].copy()) for key in LORA)
        self.gate = torch.from_numpy(tensors["gate"][index].copy())

    def forward(self, x: Tensor) -> Tensor:
        own, rest = (x @ A.T @ B.T for A, B in zip(self.A, self.B, strict=True))
        a = (x @ self.gate.T).softmax(-1)
        # alpha 16 over rank 4
        return self.base(x) + 4.0 * (a[..., :1] * own + a[..., 1:] * rest)


def mixed_by_hand(
    backbone: PreTrainedModel, tensors: Tensors, state: ClientState
) -> PreTrainedModel:
    model = copy.deepcopy(backbone)
    for name, group in state.groups.items():
        for index, module in enumerate(group.modules):
            parent, _, leaf = module.rpartition(".")
            base = model.get_submodule(module)
            setattr(model.get_submodule(parent), leaf, Mixed(base, tensors[name], index))
    return model


def side_by_side(own: Tensors, state: ClientState) -> Tensors:
    """The own LoRA and the rest of the world, (M, 2, ...), and the gate."""
    return {
        name: {key: np.stack([own[name][key], group.experts[key]], axis=1) for key in LORA}
        | {"gate": own[name]["gate"]}
        for name, group in state.groups.items()
    }


def test_the_model_computes_the_formula(federation: Federation, played: list[Round]) -> None:
    session, rng = federation.session("fedalt"), np.random.default_rng(2)
    tensors = {
        name: {
            key: rng.normal(scale=0.5, size=array.shape).astype(np.float32)
            for key, array in by_key.items()
        }
        for name, by_key in played[0].results[0].kept.groups.items()
    }
    state = ClientState(
        {
            name: replace(g, experts={key: 0.7 * tensors[name][key][::-1] for key in LORA})
            for name, g in played[0].states[0].groups.items()
        }
    )
    both = side_by_side(tensors, state)
    rows = session.store.clients[0].eval
    with session.personalised(with_two_experts(state, both), form()) as model:
        scored = form().scored(model, 0.1).eval()
        found = evaluation_loss(scored, session.store, rows, 2, CPU)
        # The mixer may take either side: nothing balances it.
        batch = collate([session.store.ids(rows[0])], [3], 0)
        assert scored.train()(batch)[1].tolist() == [0.0]
    by_hand = mixed_by_hand(plain_backbone(federation), both, state)
    expected = evaluation_loss(ScoredModel(by_hand, 0.0), session.store, rows, 2, CPU)
    assert found == pytest.approx(expected, rel=1e-5)
    for key in ("gate", "lora_B"):
        without = {name: t | {key: np.zeros_like(t[key])} for name, t in both.items()}
        by_hand = mixed_by_hand(plain_backbone(federation), without, state)
        loss = evaluation_loss(ScoredModel(by_hand, 0.0), session.store, rows, 2, CPU)
        assert abs(loss - expected) > 0.01


def test_a_client_is_tested_with_what_it_was_sent_and_keeps(
    federation: Federation, played: list[Round]
) -> None:
    session = federation.session("fedalt")
    rows = session.store.clients[0].eval
    for round_ in played:
        both = side_by_side(round_.results[0].kept.groups, round_.states[0])
        model = mixed_by_hand(plain_backbone(federation), both, round_.states[0])
        expected = evaluation_loss(ScoredModel(model, 0.0), session.store, rows, 2, CPU)
        assert round_.results[0].report.eval_loss == pytest.approx(expected, abs=1e-6)


def plain_backbone(federation: Federation) -> PreTrainedModel:
    return load_backbone(federation.folder, federation.stage("fedit").run.backbone)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_rest_of_the_world_keeps_every_bit(
    federation: Federation, played: list[Round], stage: int
) -> None:
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    session = federation.session("fedalt", training={"deepspeed": {"zero_optimization": zero}})
    state, own = played[1].states[1], played[0].results[1].kept.groups
    both = with_two_experts(state, side_by_side(own, state))
    with locally_trained(session, 1, 2, Start(both, True), form()) as trained:
        after = two_experts(trained.state)
    for name, group in state.groups.items():
        for key in LORA:
            assert np.array_equal(after[name][key][:, 1], group.experts[key])
            assert not np.array_equal(after[name][key][:, 0], own[name][key])
            # As the round itself had it, whatever the stage.
            expected = played[1].results[1].kept.groups[name]
            np.testing.assert_allclose(after[name][key][:, 0], expected[key], atol=1e-5)
        np.testing.assert_allclose(after[name]["gate"], expected["gate"], atol=1e-5)


def test_a_client_that_never_trained_is_tested_with_the_mean_of_the_others(
    federation: Federation, played: list[Round]
) -> None:
    session = federation.session("fedalt")
    state = played[1].states[2]
    plain = ClientState(
        {
            name: ClientGroup(
                group.modules, {}, group.module_N[:0], group.expert_N[:0], group.experts
            )
            for name, group in state.groups.items()
        }
    )
    expected = evaluate_client(federation.session("fedit"), 2, 1, plain).eval_loss
    assert RUNS["fedalt"].evaluate_client(session, 2, 1, state).eval_loss == expected
    fresh = RUNS["fedalt"].evaluate_client(session, 2, 0, played[0].states[2]).eval_loss
    rows = session.store.clients[2].eval
    backbone = ScoredModel(plain_backbone(federation), 0.0).eval()
    assert fresh == pytest.approx(evaluation_loss(backbone, session.store, rows, 4, CPU), abs=1e-6)


def test_rounds_give_the_same_bytes_again(
    federation: Federation, played: list[Round], tmp_path: Path
) -> None:
    list(federation.rounds(federation.session("fedalt"), tmp_path))
    assert contents(tmp_path) == contents(federation.folder.parent / "played")
