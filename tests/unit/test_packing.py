"""Packed clients: the numbers of separate training, whoever trains beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation
from hypothesis import given, settings
from hypothesis import strategies as st

from fedamole import distributed
from fedamole.artifacts import Header, write_record
from fedamole.backbone import describe
from fedamole.client import ClientSession, train_packed
from fedamole.errors import ClientError, FedamoleError
from fedamole.launching import Layout
from fedamole.methods import load
from fedamole.packed_layer import packed_adapters
from fedamole.packing import (
    PackedModel,
    clip_by_client,
    layer_seeds,
    make_unit,
    pack_batch,
    plan_passes,
)
from fedamole.planning.memory import pack_tokens
from fedamole.planning.model_size import model_size
from fedamole.pools import ClientState
from fedamole.registry import RUNS

TRAINING = {"steps": 3, "batch_size": 2, "learning_rate": 2e-4}
PACKING = [run for run, facts in RUNS.items() if facts.packs]


@pytest.fixture(scope="module", autouse=True)
def group() -> Any:
    with distributed.process_group(Layout()):
        yield


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    made = Federation(tmp_path_factory.mktemp("federation") / "backbone")
    facts = describe(made.folder, made.stage("fedit").run.backbone)
    write_record(made.folder / "backbone.json", Header("backbone", "0" * 64), facts)
    return made


def packs(size: int = 3, **training: Any) -> dict[str, Mapping[str, Any]]:
    return {"training": TRAINING | {"pack_clients": size} | training}


def arrays(state: ClientState) -> dict[str, np.ndarray]:
    return {
        f"{name} {part} {key}": array
        for name, group in state.groups.items()
        for part in ("experts", "shared")
        for key, array in getattr(group, part).items()
    }


def assert_close(one: ClientState, other: ClientState) -> None:
    left, right = arrays(one), arrays(other)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], atol=1e-5, err_msg=name)


def train_round(
    federation: Federation, folder: Path, run: str, sections: Mapping[str, Any], round_: int = 1
) -> list[Any]:
    """Results of all clients of a round, trained in packs where the settings say so."""
    session = federation.session(run, **sections)
    rounds = federation.rounds(session, folder, round_)
    for _ in range(round_):
        done = next(rounds)
    return [done.results[client] for client in sorted(done.results)]


@pytest.mark.parametrize("run", PACKING)
def test_clients_of_a_pack_train_as_alone(federation: Federation, tmp_path: Path, run: str) -> None:
    alone = train_round(federation, tmp_path / "alone", run, {"training": TRAINING}, round_=2)
    packed = train_round(federation, tmp_path / "packed", run, packs(), round_=2)
    for one, other in zip(packed, alone, strict=True):
        assert_close(one.upload.state, other.upload.state)
        assert one.report.eval_loss == pytest.approx(other.report.eval_loss, abs=1e-5)
        first = one.report.training.loss_first
        assert first == pytest.approx(other.report.training.loss_first, abs=1e-5)
        assert one.report.training.steps == other.report.training.steps
        assert one.upload.tokens.keys() == other.upload.tokens.keys()
        for name, tokens in one.upload.tokens.items():
            np.testing.assert_array_equal(tokens, other.upload.tokens[name])


@pytest.mark.parametrize(
    "training",
    [
        {"gradient_clipping": 0.01},
        {"micro_batch_size": 1},
        {"batch_size": 4, "micro_batch_size": 2},
        {"steps": 5, "min_steps": 1},
        {"steps": None, "local_epochs": 1},
        {"pack_tokens": 20},
        {"pack_tokens": 1},
        {"pack_clients": 2},
    ],
    ids=str,
)
def test_settings_of_training_mean_the_same_in_a_pack(
    federation: Federation, tmp_path: Path, training: dict[str, Any]
) -> None:
    plain = TRAINING | {k: v for k, v in training.items() if not k.startswith("pack")}
    alone = train_round(federation, tmp_path / "alone", "fedamole", {"training": plain})
    packed = train_round(federation, tmp_path / "packed", "fedamole", packs(**training))
    for one, other in zip(packed, alone, strict=True):
        assert_close(one.upload.state, other.upload.state)


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"dropout": 0.0}},
        {"adapter": {"balance_weight": 1.0}},
        {"assignment": {"num_experts": 7, "choices": 2, "min_experts": 2, "max_experts": 7}},
        {"backbone": {"gradient_checkpointing": True}},
    ],
    ids=str,
)
def test_any_mix_of_experts_trains_as_alone(
    federation: Federation, tmp_path: Path, sections: dict[str, Any]
) -> None:
    alone = train_round(
        federation, tmp_path / "alone", "fedamole", {"training": TRAINING} | sections
    )
    packed = train_round(federation, tmp_path / "packed", "fedamole", packs() | sections)
    held = {tuple(len(g.module_N) for g in r.upload.state.groups.values()) for r in packed}
    assert len(held) > 1, "clients hold equally many experts, which shows nothing of the padding"
    for one, other in zip(packed, alone, strict=True):
        assert_close(one.upload.state, other.upload.state)
        for name, tokens in one.upload.tokens.items():
            np.testing.assert_array_equal(tokens, other.upload.tokens[name])


def test_equal_packs_give_equal_bits(federation: Federation, tmp_path: Path) -> None:
    one, other = (
        train_round(federation, tmp_path / name, "fedamole", packs()) for name in ("one", "other")
    )
    for left, right in zip(one, other, strict=True):
        for name, array in arrays(left.upload.state).items():
            np.testing.assert_array_equal(array, arrays(right.upload.state)[name])
        assert left.report.to_mapping() == right.report.to_mapping()


def start_pack(session: ClientSession, federation: Federation, folder: Path) -> dict[int, Any]:
    """What the clients of round 1 start from."""
    plain = federation.session("fedamole", training=TRAINING)
    method = load("fedamole")
    states = next(federation.rounds(plain, folder, 1)).states
    assert method.start is not None
    return {k: method.start(session, k, 1, state, None) for k, state in states.items()}


def test_a_client_that_diverges_spoils_no_other(federation: Federation, tmp_path: Path) -> None:
    session = federation.session("fedamole", **packs())
    starts = start_pack(session, federation, tmp_path / "states")
    train_packed(session, 1, starts)
    whole = session.trained_in_pack
    for group in starts[1].state.groups.values():
        group.shared["lora_B"][:] = np.inf
    train_packed(session, 1, starts)
    broken = session.trained_in_pack
    assert isinstance(broken[1], ClientError)
    assert "client 1" in str(broken[1])
    for client in (0, 2):
        for name, array in arrays(broken[client].state).items():
            np.testing.assert_array_equal(array, arrays(whole[client].state)[name])


def test_the_backbone_is_as_it_was(federation: Federation, tmp_path: Path) -> None:
    session = federation.session("fedamole", **packs())
    before = {name: p.clone() for name, p in session.backbone().state_dict().items()}
    train_packed(session, 1, start_pack(session, federation, tmp_path))
    after = session.backbone().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not session.backbone().training
    assert not session.backbone().get_output_embeddings()._forward_pre_hooks


def test_layers_draw_the_seeds_that_they_draw_alone() -> None:
    torch.manual_seed(7)
    alone = [int(torch.randint(2**62, ())) for _ in range(60)]
    assert layer_seeds(7, 60) == alone


def kept_bytes(
    session: ClientSession,
    starts: dict[int, Any],
    rows: list[np.ndarray],
    places: Sequence[int] = (0, 1, 2),
) -> int:
    """Bytes that autograd keeps of one pass over these rows of each client."""
    states = [start.state for start in starts.values()]
    store, backbone = session.store, session.backbone()
    weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    units = [make_unit(place, 0, mine, store) for place, mine in zip(places, rows, strict=True)]
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with packed_adapters(backbone, states, session.settings.run.adapter) as adapters:
        weights |= {p.untyped_storage().data_ptr() for p in adapters.parameters()}
        model = PackedModel(backbone, adapters).train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = model(pack_batch(units, store), [0] * len(units))
        assert outputs
        return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


def test_a_pass_keeps_no_copies_of_adapters(federation: Federation, tmp_path: Path) -> None:
    """Also where its units are not one of each client in order."""
    session = federation.session("fedamole", **packs())
    starts = start_pack(session, federation, tmp_path / "states")
    store = session.store
    rows = [store.clients[0].train[:1]] * len(starts)
    in_order = kept_bytes(session, starts, rows)
    reversed_ = kept_bytes(session, dict(reversed(starts.items())), rows, places=[2, 1, 0])
    # The numbers of the clients themselves, and nothing that grows with the experts.
    assert reversed_ - in_order < 200


def test_a_pass_keeps_what_the_memory_of_a_pack_allows(
    federation: Federation, tmp_path: Path
) -> None:
    budget = 200_000
    session = federation.session("fedamole", **packs(pack_memory_gb=budget / 1e9))
    starts = start_pack(session, federation, tmp_path / "states")
    run, store = session.settings.run, session.store
    most = pack_tokens(run, model_size(run.backbone, federation.folder))
    assert most is not None
    once = [store.clients[client].train[:1] for client in starts]
    twice = [np.repeat(rows, 4) for rows in once]
    longest = max(len(store.ids(rows[0])) for rows in once)
    more_tokens = 3 * len(once) * longest
    per_token = (kept_bytes(session, starts, twice) - kept_bytes(session, starts, once)) / (
        more_tokens
    )
    assert most * per_token == pytest.approx(budget, rel=0.2)


# ----------------------------------------------------------------------------- passes and clipping


def cost(passes: list[list[int]], lengths: list[int], sequences: int, pass_cost: int) -> int:
    padded = sum(len(units) * max(lengths[u] for u in units) for units in passes)
    return sequences * padded + pass_cost * len(passes)


def cuts(order: list[int]) -> list[list[list[int]]]:
    """All ways to cut a list into pieces."""
    if not order:
        return [[]]
    return [[order[:n], *rest] for n in range(1, len(order) + 1) for rest in cuts(order[n:])]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    sequences=st.integers(1, 3),
    pass_cost=st.integers(0, 100),
    most=st.one_of(st.none(), st.integers(1, 200)),
)
@settings(max_examples=60, deadline=None)
def test_no_cut_of_the_units_costs_less(
    lengths: list[int], sequences: int, pass_cost: int, most: int | None
) -> None:
    passes = plan_passes(lengths, sequences, pass_cost, most)
    assert sorted(unit for units in passes for unit in units) == list(range(len(lengths)))

    def fits(units: list[int]) -> bool:
        padded = sequences * len(units) * max(lengths[unit] for unit in units)
        return len(units) == 1 or most is None or padded <= most

    assert all(fits(units) for units in passes)
    by_length = sorted(range(len(lengths)), key=lambda unit: lengths[unit])
    best = min(
        cost(cut, lengths, sequences, pass_cost) for cut in cuts(by_length) if all(map(fits, cut))
    )
    assert cost(passes, lengths, sequences, pass_cost) == best


def test_clipping_is_that_of_each_client_alone() -> None:
    torch.manual_seed(3)
    together = [torch.nn.Parameter(torch.zeros(3, *shape)) for shape in ((4, 5), (2,))]
    for parameter in together:
        parameter.grad = torch.randn_like(parameter) * torch.tensor([0.01, 1.0, 10.0]).view(
            3, *[1] * (parameter.dim() - 1)
        )
    expected = []
    for client in range(3):
        alone = [torch.nn.Parameter(torch.zeros_like(p[client])) for p in together]
        for parameter, packed in zip(alone, together, strict=True):
            parameter.grad = packed.grad[client].clone()
        torch.nn.utils.clip_grad_norm_(alone, 1.0)
        expected.append([p.grad for p in alone])
    clip_by_client(together, 1.0)
    for client in range(3):
        for packed, gradient in zip(together, expected[client], strict=True):
            torch.testing.assert_close(packed.grad[client], gradient)


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("run", "sections", "message"),
    [
        ("fedamole", {"training": {"pack_tokens": 9}}, "need pack_clients above 1"),
        (
            "fedamole",
            {"training": {"pack_clients": 2, "deepspeed": "zero3"}},
            "with ZeRO stage 3 only 1 is possible",
        ),
        (
            "fedamole",
            {"training": {"pack_clients": 2}, "execution": {"clients_per_job": 3}},
            "clients_per_job 3 must be a multiple of training: pack_clients 2",
        ),
        (
            "fml",
            {"training": {"pack_clients": 2, "batch_size": 1, "ranks": 2}},
            "clients of fml cannot be packed, and one by one batch_size 1 must be a multiple",
        ),
        (
            "fedamole",
            {
                "training": {"pack_clients": 2},
                "privacy": {"dp_sgd": {"noise_multiplier": 1.0, "max_grad_norm": 1.0}},
            },
            "pack_clients 2 must be 1 with privacy: dp_sgd",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(
    federation: Federation, run: str, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(FedamoleError, match=message):
        federation.stage(run, **sections)


def test_methods_say_the_same_of_packs_as_the_registry() -> None:
    for run, facts in RUNS.items():
        if facts.packs:
            assert load(run).start is not None, run


def test_ranks_of_a_packed_run_are_none_of_its_settings(federation: Federation) -> None:
    one, two = (
        federation.stage("fedamole", training={"pack_clients": 2, "batch_size": 1, "ranks": ranks})
        for ranks in (1, 2)
    )
    assert one == two
    assert federation.stage("fedamole", training={"batch_size": 1}) != one
    plain = {"batch_size": 2, "ranks": 2}
    for run in ("fml", "zero-shot"):
        unpacked = federation.stage(run, training=plain)
        assert federation.stage(run, training=plain | {"pack_clients": 2}) == unpacked
    # A model that is only tested needs no batch that its ranks can share.
    federation.stage("zero-shot", training={"batch_size": 1, "ranks": 2, "pack_clients": 2})


def test_deepspeed_is_no_setting_of_a_packed_run(federation: Federation) -> None:
    one, two = (
        federation.stage(
            "fedamole",
            training={"pack_clients": 2, "deepspeed": {"zero_optimization": {"stage": stage}}},
        )
        for stage in (1, 2)
    )
    assert one == two
