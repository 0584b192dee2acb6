"""FedAMoLE-H: gates travel with their experts, and P stays what it was drawn as."""

# M = modules, E = experts, K = clients, D = in_features
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import Federation, Round, contents
from torch import Tensor, nn

from fedamole.assignment import assign_all, score_experts
from fedamole.backbone import load_backbone
from fedamole.client import ClientSession
from fedamole.evaluation import evaluation_loss
from fedamole.methods import load
from fedamole.pools import ClientGroup, group_slices
from fedamole.training import ScoredModel

pytestmark = pytest.mark.usefixtures("group")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def played(federation: Federation) -> list[Round]:
    session = federation.session("fedamole-linear-router")
    return list(federation.rounds(session, federation.folder.parent / "played", count=3))


def test_the_pool_is_that_of_fedamole_with_a_gate(federation: Federation) -> None:
    gated, plain = (
        load(run).init_pool(federation.stage(run).run, federation.facts)
        for run in ("fedamole-linear-router", "fedamole")
    )
    assert gated.num_experts == plain.num_experts == 6
    for name, group in plain.groups.items():
        experts = dict(gated.groups[name].experts)
        gate_MED = experts.pop("gate")
        assert gate_MED.shape == (2, 6, 32) and gate_MED.dtype == np.float32
        bound = 1 / np.sqrt(32)
        assert 0.95 * bound < np.abs(gate_MED).max() <= bound
        assert np.abs(np.corrcoef(gate_MED.reshape(12, 32)) - np.eye(12)).max() < 0.8
        for key, array in group.experts.items():
            assert np.array_equal(experts[key], array)
        for key, array in group.shared.items():
            assert np.array_equal(gated.groups[name].shared[key], array)


def test_a_gate_is_averaged_over_the_holders_of_its_expert(played: list[Round]) -> None:
    parts = group_slices(played[0].pool.groups)
    for round_ in played:
        for name, group in round_.pool.groups.items():
            holders_MEK = round_.assignment.holders_MEK[parts[name]]
            for module, expert in np.ndindex(*holders_MEK.shape[:2]):
                sent = []
                for upload in round_.uploads:
                    held = upload.state.groups[name]
                    here = (held.module_N == module) & (held.expert_N == expert)
                    assert here.sum() == holders_MEK[module, expert, upload.client]
                    sent += list(held.experts["gate"][here].astype(np.float64))
                before = round_.previous.groups[name].experts["gate"][module, expert]
                assert all((gate != before).any() for gate in sent)
                expected = np.mean(sent, axis=0)
                np.testing.assert_allclose(
                    group.experts["gate"][module, expert], expected, atol=1e-7
                )


def test_the_projection_keeps_every_bit(federation: Federation, played: list[Round]) -> None:
    """Three times a third of it would not, in float32."""
    settings = federation.stage("fedamole-linear-router").run
    first = load("fedamole-linear-router").init_pool(settings, federation.facts)
    naive = 0
    for round_ in played:
        for name, group in first.groups.items():
            projection = group.shared["token_proj"]
            assert np.array_equal(round_.pool.groups[name].shared["token_proj"], projection)
            sent = [u.state.groups[name].shared["token_proj"] for u in round_.uploads]
            assert all(np.array_equal(array, projection) for array in sent)
            naive += (sum(sent, np.float32(0)) / np.float32(3) != projection).sum()
    assert naive, "where the mean is exact, this test shows nothing"


def test_experts_choose_clients_by_the_embeddings(
    federation: Federation, played: list[Round]
) -> None:
    first, second = played[:2]
    made, settings = first.pool.provenance, federation.stage("fedamole-linear-router").run
    assert made is not None and made.client_embeddings_MKR.shape[2] == 4
    expected = assign_all(
        score_experts(made.expert_embeddings_MER, made.client_embeddings_MKR),
        settings.assignment,
        settings.adapter.top_k,
        first.pool.modules,
        2,
    )
    assert np.array_equal(second.assignment.holders_MEK, expected.holders_MEK)
    # P x and A_i x of the first module see the same x: of the embedding set, the layer norm's.
    upload = first.uploads[0]
    mean_D = mean_input(federation, upload.client)
    held, part = upload.state.groups["q_proj"], group_slices(first.pool.groups)["q_proj"]
    projection = held.shared["token_proj"][0].astype(np.float64)
    client_R = upload.client_embeddings_MR[part][0]
    np.testing.assert_allclose(client_R, projection @ mean_D, atol=1e-5)
    for row in np.flatnonzero(held.module_N == 0):
        expert_R = held.experts["lora_A"][row].astype(np.float64) @ mean_D
        np.testing.assert_allclose(upload.expert_embeddings["q_proj"][row], expert_R, atol=1e-5)


def mean_input(federation: Federation, client: int) -> np.ndarray:
    """Mean of what the first layer's attention sees, which no adapter has touched."""
    backbone = load_backbone(federation.folder, federation.stage("fedit").run.backbone)
    layer, sums, count = backbone.model.layers[0], np.zeros(32), 0
    for row in federation.store.clients[client].embedding:
        ids = torch.from_numpy(federation.store.ids(row).astype(np.int64))
        x_TD = layer.input_layernorm(backbone.model.embed_tokens(ids))
        sums, count = sums + x_TD.double().numpy().sum(0), count + len(ids)
    mean: np.ndarray = sums / count
    return mean


class Gated(nn.Module):
    """y = W0 x + s B_sh A_sh x + s sum of q_i B_i A_i x over the best two, p = softmax(G x)."""

    def __init__(self, base: nn.Module, group: ClientGroup, index: int) -> None:
        super().__init__()
        held = group.module_N == index
        self.base = base
        self.experts = {k: torch.from_numpy(a[held]) for k, a in group.experts.items()}
        self.shared = {k: torch.from_numpy(a[index]) for k, a in group.shared.items()}

    def forward(self, x: Tensor) -> Tensor:
        p = (x @ self.experts["gate"].T).softmax(-1)
        worst_of_best = p.topk(2).values[..., -1:]
        q = torch.where(p >= worst_of_best, p, 0.0)
        q = q / q.sum(-1, keepdim=True)
        y = self.base(x) + 4.0 * x @ self.shared["lora_A"].T @ self.shared["lora_B"].T
        for i, (A, B) in enumerate(
            zip(self.experts["lora_A"], self.experts["lora_B"], strict=True)
        ):
            y = y + 4.0 * q[..., i : i + 1] * (x @ A.T @ B.T)
        return y


def test_the_tested_model_routes_by_its_gate(federation: Federation, played: list[Round]) -> None:
    session = federation.session("fedamole-linear-router")
    for round_ in played:
        expected = loss_by_hand(federation, session, round_, client=1)
        assert round_.results[1].report.eval_loss == pytest.approx(expected, abs=2e-6)


def loss_by_hand(
    federation: Federation, session: ClientSession, round_: Round, client: int
) -> float:
    model = copy.deepcopy(load_backbone(federation.folder, session.settings.run.backbone))
    for group in round_.uploads[client].state.groups.values():
        for index, module in enumerate(group.modules):
            parent, _, leaf = module.rpartition(".")
            layer = Gated(model.get_submodule(module), group, index)
            setattr(model.get_submodule(parent), leaf, layer)
    rows = federation.store.clients[client].eval
    return evaluation_loss(ScoredModel(model, 0.0), federation.store, rows, 2, CPU)


def test_rounds_give_the_same_bytes_again(
    federation: Federation, played: list[Round], tmp_path: Path
) -> None:
    session = federation.session("fedamole-linear-router")
    list(federation.rounds(session, tmp_path, count=3))
    assert contents(tmp_path) == contents(federation.folder.parent / "played")
