"""Means over clients against plain loops in float64, and what may not be averaged."""

# M = modules, E = domain experts, K = clients, R = rank, N = rows that a client holds
import gc
import hashlib
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedamole.aggregation import aggregate
from fedamole.artifacts import Header, sha256
from fedamole.cli.server import run_aggregate, run_assign
from fedamole.errors import FedamoleError
from fedamole.participation import Participation
from fedamole.pool_files import (
    read_assignment,
    read_header,
    read_pool,
    read_sizes,
    write_assignment,
    write_pool,
    write_upload,
)
from fedamole.pool_parts import cut
from fedamole.pools import (
    BFLOAT16,
    Assignment,
    ClientGroup,
    ClientState,
    Pool,
    PoolGroup,
    Upload,
    cast,
    group_slices,
    held_rows,
    to_float32,
)
from fedamole.settings import ParticipationSettings
from fedamole.stages import RunStage, canonical_json, digest

CLIENTS, RANK = 4, 2


def make_pool(experts=5, modules=2, dtype=np.float32, seed=0):
    """Make a pool of two groups."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return cast(rng.standard_normal(shape).astype(np.float32), np.dtype(dtype))

    groups = {
        name: PoolGroup(
            modules=tuple(f"layers.{i}.{name}" for i in range(modules)),
            experts={
                "lora_A": draw(modules, experts, RANK, 3),
                "lora_B": draw(modules, experts, height, RANK),
            }
            if experts
            else {},
            shared={"token_proj": draw(modules, RANK, 3)},
        )
        for name, height in (("q_proj", 4), ("v_proj", 2))
    }
    return Pool(groups, experts, None)


def everyone(clients, **settings):
    return Participation(ParticipationSettings(**settings), clients, seed=7)


def make_assignment(pool, density=0.6, seed=0, clients=CLIENTS):
    """Random holders."""
    rng = np.random.default_rng(seed)
    size = (len(pool.modules), pool.num_experts, clients)
    scores = rng.random(size, dtype=np.float32)
    return Assignment(pool.modules, scores < density, scores, scores.sum(axis=(1, 2)), "random", 1)


def make_upload(pool, assignment, client, values=None):
    """Make what a client sends: random numbers, or the same value everywhere."""
    rng = np.random.default_rng(100 + client)

    def draw(shape, dtype):
        drawn = rng.standard_normal(shape) if values is None else np.full(shape, values)
        return cast(drawn.astype(np.float32), dtype)

    groups, embeddings, tokens = {}, {}, {}
    for name, (module_N, expert_N) in held_rows(assignment, pool.groups, client).items():
        group, count = pool.groups[name], len(module_N)
        groups[name] = ClientGroup(
            modules=group.modules,
            experts={
                key: draw((count, *value.shape[2:]), value.dtype)
                for key, value in group.experts.items()
            },
            module_N=module_N,
            expert_N=expert_N,
            shared={key: draw(value.shape, value.dtype) for key, value in group.shared.items()},
        )
        if pool.num_experts:
            embeddings[name] = draw((count, RANK), np.dtype(np.float32))
            tokens[name] = rng.integers(0, 5, count)
    size = (len(pool.modules), RANK) if pool.num_experts else (0, 0)
    return Upload(
        client=client,
        round=assignment.round,
        state=ClientState(groups),
        num_examples=int(rng.integers(1, 50)),
        client_embeddings_MR=draw(size, np.dtype(np.float32)),
        expert_embeddings=embeddings,
        tokens=tokens,
    )


def make_uploads(pool, assignment, **options):
    """One upload of each client."""
    return [make_upload(pool, assignment, client, **options) for client in range(CLIENTS)]


def held_by(uploads, name, module, expert):
    """(upload, row) of each client that holds an expert."""
    for upload in uploads:
        group = upload.state.groups[name]
        for row, place in enumerate(zip(group.module_N, group.expert_N, strict=True)):
            if place == (module, expert):
                yield upload, row


def weight_of(upload, name, row, weighting):
    """Weight of a client for one expert, as documented."""
    if weighting == "tokens":
        return float(upload.tokens[name][row])
    return 1.0 if weighting == "uniform" else float(upload.num_examples)


def plain_mean(values, weights):
    """Weighted mean in float64; the plain mean if all weights are zero."""
    weights = np.array(weights) if any(weights) else np.ones(len(weights))
    wide = [to_float32(np.asarray(value)).astype(np.float64) for value in values]
    return sum(w * x for w, x in zip(weights, wide, strict=True)) / weights.sum()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["uniform", "examples", "tokens"]),
    st.integers(0, 1000),
    st.sampled_from([0.2, 0.6, 1.0]),
)
def test_every_expert_is_the_mean_of_its_holders(weighting, seed, density):
    previous = make_pool()
    assignment = make_assignment(previous, density, seed)
    uploads = make_uploads(previous, assignment)
    pool = aggregate(previous, assignment, uploads, weighting, everyone(CLIENTS))
    starts = group_slices(previous.groups)
    for name, group in pool.groups.items():
        for m, e in np.ndindex(len(group.modules), previous.num_experts):
            holders = list(held_by(uploads, name, m, e))
            weights = [weight_of(upload, name, row, weighting) for upload, row in holders]
            embedding_R = pool.provenance.expert_embeddings_MER[starts[name].start + m, e]
            if not holders:
                for key, value in group.experts.items():
                    np.testing.assert_array_equal(
                        value[m, e], previous.groups[name].experts[key][m, e]
                    )
                np.testing.assert_array_equal(embedding_R, 0.0)
                continue
            for key, value in group.experts.items():
                sent = [upload.state.groups[name].experts[key][row] for upload, row in holders]
                np.testing.assert_allclose(value[m, e], plain_mean(sent, weights), atol=1e-6)
            sent = [upload.expert_embeddings[name][row] for upload, row in holders]
            np.testing.assert_allclose(embedding_R, plain_mean(sent, weights), atol=1e-6)


@pytest.mark.parametrize("weighting", ["uniform", "examples", "tokens"])
@pytest.mark.parametrize("experts", [0, 5])
def test_shared_tensors_are_the_mean_of_all_clients(weighting, experts):
    previous = make_pool(experts)
    assignment = make_assignment(previous)
    uploads = make_uploads(previous, assignment)
    pool = aggregate(previous, assignment, iter(uploads), weighting, everyone(CLIENTS))
    weights = [1.0 if weighting == "uniform" else u.num_examples for u in uploads]
    for name, group in pool.groups.items():
        sent = [upload.state.groups[name].shared["token_proj"] for upload in uploads]
        expected = plain_mean(sent, weights)
        np.testing.assert_allclose(group.shared["token_proj"], expected, atol=1e-6)


def test_provenance_says_who_trained_what():
    previous = make_pool()
    assignment = make_assignment(previous)
    uploads = make_uploads(previous, assignment)
    made = aggregate(previous, assignment, uploads, "uniform", everyone(CLIENTS)).provenance
    assert made.round == 1
    np.testing.assert_array_equal(made.num_examples_K, [u.num_examples for u in uploads])
    np.testing.assert_array_equal(made.holders_MEK, assignment.holders_MEK)
    expected_MEK = np.zeros(assignment.holders_MEK.shape, dtype=np.int64)
    for k, upload in enumerate(uploads):
        np.testing.assert_array_equal(made.client_embeddings_MKR[:, k], upload.client_embeddings_MR)
        for name, group in upload.state.groups.items():
            for m, e, tokens in zip(
                group.module_N, group.expert_N, upload.tokens[name], strict=True
            ):
                module = previous.modules.index(group.modules[m])
                expected_MEK[module, e, k] = tokens
    np.testing.assert_array_equal(made.tokens_MEK, expected_MEK)


def test_an_expert_that_nobody_holds_keeps_its_embedding_of_the_round_before():
    start = make_pool()
    everything = make_assignment(start, density=2.0)
    uploads = make_uploads(start, everything)
    first = aggregate(start, everything, uploads, "uniform", everyone(CLIENTS))
    nothing = replace(make_assignment(start, density=-1.0), round=2)
    second = aggregate(first, nothing, make_uploads(start, nothing), "uniform", everyone(CLIENTS))
    np.testing.assert_array_equal(
        second.provenance.expert_embeddings_MER, first.provenance.expert_embeddings_MER
    )
    for name, group in first.groups.items():
        for key, value in group.experts.items():
            np.testing.assert_array_equal(second.groups[name].experts[key], value)


def test_a_single_holder_passes_its_expert_on_unchanged():
    previous = make_pool()
    alone = np.zeros((4, 5, CLIENTS), dtype=bool)
    alone[:, :, 2] = True
    assignment = replace(make_assignment(previous), holders_MEK=alone)
    uploads = make_uploads(previous, assignment)
    for weighting in ("uniform", "tokens"):
        pool = aggregate(previous, assignment, uploads, weighting, everyone(CLIENTS))
        for name, group in pool.groups.items():
            sent = uploads[2].state.groups[name].experts["lora_A"]
            mine = group.experts["lora_A"].reshape(sent.shape)
            np.testing.assert_allclose(mine, sent, rtol=2e-7)


def test_bfloat16_is_summed_in_float32():
    # 1 + 2^-7 is a bfloat16; in bfloat16 the sum of 1000 of it would stick at 256.
    previous = make_pool(experts=1, dtype=BFLOAT16)
    assignment = make_assignment(previous, density=2.0, clients=1000)
    uploads = (make_upload(previous, assignment, k, values=1 + 2.0**-7) for k in range(1000))
    pool = aggregate(previous, assignment, uploads, "uniform", everyone(1000))
    for group in pool.groups.values():
        for value in (*group.experts.values(), *group.shared.values()):
            assert value.dtype == BFLOAT16
            np.testing.assert_array_equal(to_float32(value), np.float32(1 + 2.0**-7))


def test_the_same_order_gives_the_same_bits_and_another_order_the_same_mean():
    previous = make_pool()
    assignment = make_assignment(previous)
    uploads = make_uploads(previous, assignment)
    orders = (uploads, uploads, uploads[::-1])
    pools = [
        aggregate(previous, assignment, order, "examples", everyone(CLIENTS)) for order in orders
    ]
    tensors = [pool.groups["q_proj"].experts["lora_A"] for pool in pools]
    assert tensors[0].tobytes() == tensors[1].tobytes()
    np.testing.assert_allclose(tensors[2], tensors[0], atol=1e-6)


def test_inputs_stay_as_they_are():
    previous = make_pool()
    assignment = make_assignment(previous, density=0.3)
    uploads = make_uploads(previous, assignment)
    before = [_digest(previous.groups), *(_digest(u.state.groups) for u in uploads)]
    aggregate(previous, assignment, uploads, "tokens", everyone(CLIENTS))
    assert before == [_digest(previous.groups), *(_digest(u.state.groups) for u in uploads)]


def _digest(groups):
    """One digest of all tensors."""
    tensors = [t for g in groups.values() for t in (*g.experts.values(), *g.shared.values())]
    return hashlib.sha256(b"".join(tensor.tobytes() for tensor in tensors)).hexdigest()


def test_one_upload_is_in_memory_at_a_time():
    previous = make_pool()
    assignment = make_assignment(previous)
    alive = weakref.WeakSet()

    def uploads():
        for client in range(CLIENTS):
            gc.collect()
            assert not alive
            upload = make_upload(previous, assignment, client)
            alive.add(upload)
            yield upload
            del upload

    aggregate(previous, assignment, uploads(), "uniform", everyone(CLIENTS))


def test_a_pool_without_any_module_can_be_aggregated():
    previous = Pool({}, 0, None)
    assignment = make_assignment(previous)
    uploads = make_uploads(previous, assignment)
    pool = aggregate(previous, assignment, uploads, "uniform", everyone(CLIENTS))
    assert pool.round == 1 and pool.modules == ()


def _changed(upload, **group_changes):
    """Change the first group of an upload."""
    name, group = next(iter(upload.state.groups.items()))
    groups = upload.state.groups | {name: replace(group, **group_changes)}
    return replace(upload, state=ClientState(groups))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda u: u[:-1], r"round 1: no upload of clients \[3\]"),
        (lambda u: [*u, u[0]], "client 0, round 1: is there twice"),
        (lambda u: [replace(u[0], round=2), *u[1:]], "client 0, round 2: round 1 is being"),
        (lambda u: [replace(u[0], client=7), *u[1:]], "client 7 does not exist; allowed: 0 to 3"),
        (
            lambda u: [_changed(u[0], modules=("layers.0.q_proj", "other.q_proj")), *u[1:]],
            "modules are not those of the pool.*other.q_proj",
        ),
        (
            lambda u: [_changed(u[0], expert_N=u[0].state.groups["q_proj"].expert_N[::-1]), *u[1:]],
            "group q_proj does not hold the experts assigned to it",
        ),
        (
            lambda u: [_changed(u[0], shared={"token_proj": np.zeros((2, 9, 3))}), *u[1:]],
            r"group q_proj: has tensors .*\(2, 9, 3\)",
        ),
        (lambda u: [_changed(u[0], shared={}), *u[1:]], "group q_proj: has tensors {}"),
    ],
)
def test_uploads_that_do_not_belong_are_refused(spoil, message):
    previous = make_pool()
    assignment = make_assignment(previous)
    with pytest.raises(FedamoleError, match=message):
        uploads = spoil(make_uploads(previous, assignment))
        aggregate(previous, assignment, uploads, "uniform", everyone(CLIENTS))


def test_a_round_goes_on_without_clients_that_drop_out_if_the_quorum_is_met():
    previous = make_pool()
    assignment = make_assignment(previous, density=2.0)
    uploads = make_uploads(previous, assignment)
    reported = [uploads[0], uploads[2], uploads[3]]

    pool = aggregate(previous, assignment, reported, "uniform", everyone(CLIENTS, quorum=0.7))

    for name, group in pool.groups.items():
        for key, value in group.shared.items():
            parts = [upload.state.groups[name].shared[key] for upload in reported]
            np.testing.assert_allclose(value, np.mean(parts, axis=0), rtol=1e-5, atol=1e-6)
    made = pool.provenance
    assert made.num_examples_K[1] == 0 and not made.tokens_MEK[:, :, 1].any()
    with pytest.raises(FedamoleError, match=r"clients \[1\]; 3 of 4 reported, the quorum is 4"):
        aggregate(previous, assignment, reported, "uniform", everyone(CLIENTS, quorum=0.8))


def test_a_client_that_is_silent_in_a_round_keeps_its_embedding_and_its_size():
    start = make_pool()
    first = make_assignment(start, density=2.0)
    before = aggregate(start, first, make_uploads(start, first), "uniform", everyone(CLIENTS))
    second = replace(make_assignment(before, density=2.0, seed=3), round=2)
    uploads = [
        replace(upload, round=2, client_embeddings_MR=upload.client_embeddings_MR + 1)
        for upload in make_uploads(before, second)[1:]
    ]

    after = aggregate(before, second, uploads, "uniform", everyone(CLIENTS, quorum=0.5))

    ours, theirs = after.provenance, before.provenance
    np.testing.assert_array_equal(
        ours.client_embeddings_MKR[:, 0], theirs.client_embeddings_MKR[:, 0]
    )
    assert ours.num_examples_K[0] == theirs.num_examples_K[0] > 0
    assert (ours.client_embeddings_MKR[:, 1] == theirs.client_embeddings_MKR[:, 1] + 1).all()


def test_clients_that_were_not_drawn_are_refused():
    previous = make_pool()
    assignment = make_assignment(previous, density=2.0)
    who = everyone(CLIENTS, fraction=0.5)
    strangers = sorted(set(range(CLIENTS)) - set(who.reporting(1)))
    with pytest.raises(FedamoleError, match=f"clients \\[{strangers[0]}, {strangers[1]}\\] do not"):
        aggregate(previous, assignment, make_uploads(previous, assignment), "uniform", who)


def test_an_assignment_of_another_round_or_population_is_refused():
    previous = make_pool()
    assignment = make_assignment(previous)
    with pytest.raises(FedamoleError, match="is for round 3; after a pool of round 0"):
        aggregate(previous, replace(assignment, round=3), [], "uniform", everyone(CLIENTS))
    with pytest.raises(FedamoleError, match=r"\(4, 5, 4\); the pool and the config have"):
        aggregate(previous, assignment, [], "uniform", everyone(CLIENTS + 1))


def run_settings():
    """Give settings of a run over the pools of this module."""
    dataset = {
        "name": "none",
        "source": {"files": ["none.jsonl"]},
        "task": "generation",
        "template": "alpaca",
        "response": "answer",
        "category": "topic",
    }
    scenario = {"dataset": dataset, "partition": "iid", "clients": CLIENTS}
    backbone = {"backbone": {"name": "tiny", "generate": {}}}
    return RunStage.model_validate(
        {
            "run": "fedamole",
            "tokens": {"scenario": {"scenario": scenario, "seed": 1}, "backbone": backbone},
            "adapter": {"rank": RANK},
            "assignment": {"num_experts": 5, "choices": 2, "max_experts": 4},
            "aggregation": {"weighting": "tokens"},
            "training": {},
        }
    )


@pytest.fixture
def round_files(tmp_path):
    """Write what a round leaves for the server; give the arguments of `aggregate`."""
    stage = run_settings()
    pool = make_pool()
    assignment = make_assignment(pool)
    write_pool(tmp_path / "pool.h5", Header("pool", digest(stage)), pool)
    header = Header("assignment", digest(stage))
    write_assignment(tmp_path / "assignment.h5", header, assignment)
    paths = [tmp_path / f"client_{client}.h5" for client in range(CLIENTS)]
    for client, path in enumerate(paths):
        upload = make_upload(pool, assignment, client)
        write_upload(path, Header("upload", digest(stage)), upload)
    return SimpleNamespace(
        settings=canonical_json(stage),
        pool=tmp_path / "pool.h5",
        assignment=tmp_path / "assignment.h5",
        uploads=paths,
        quorum=None,
        out_pool=tmp_path / "next" / "pool.h5",
    )


def test_the_commands_write_what_the_functions_compute(round_files, tmp_path):
    run_aggregate(round_files)
    previous = make_pool()
    assignment = make_assignment(previous)
    uploads = make_uploads(previous, assignment)
    expected = aggregate(previous, assignment, uploads, "tokens", everyone(CLIENTS))
    pool = read_pool(round_files.out_pool, digest(run_settings()))
    assert _digest(pool.groups) == _digest(expected.groups)
    parents = read_header(round_files.out_pool).parents
    assert parents["pool"] == sha256(round_files.pool)
    assert set(map(sha256, round_files.uploads)) <= set(parents.values())
    out = tmp_path / "assignment_2.h5"
    run_assign(
        SimpleNamespace(
            settings=round_files.settings, pool=round_files.out_pool, out_assignment=out
        )
    )
    following = read_assignment(out, digest(run_settings()))
    assert following.round == 2
    assert (following.holders_MEK.sum(axis=2) == 2).all()
    assert read_header(out).parents == {"pool": sha256(round_files.out_pool)}


@pytest.mark.parametrize("most", [1, 200, 500])
def test_a_pool_that_is_averaged_in_parts_is_the_same_file(round_files, monkeypatch, most):
    run_aggregate(round_files)
    whole = sha256(round_files.out_pool)
    monkeypatch.setattr("fedamole.cli.server.PART_BYTES", most)
    modules, sizes = read_sizes(round_files.pool)
    parts = cut({name: len(names) for name, names in modules.items()}, sizes, most)
    assert len(parts) > 1
    run_aggregate(round_files)
    assert sha256(round_files.out_pool) == whole


def test_a_part_of_a_trained_pool_has_its_part_of_the_provenance(round_files):
    run_aggregate(round_files)
    whole = read_pool(round_files.out_pool)
    part = read_pool(round_files.out_pool, part={"v_proj": slice(1, 2)})
    assert part.modules == whole.modules[3:4]
    np.testing.assert_array_equal(part.provenance.tokens_MEK, whole.provenance.tokens_MEK[3:4])
    np.testing.assert_array_equal(part.provenance.num_examples_K, whole.provenance.num_examples_K)
    tensor = part.groups["v_proj"].experts["lora_A"]
    np.testing.assert_array_equal(tensor, whole.groups["v_proj"].experts["lora_A"][1:2])


def test_parts_hold_every_module_once_and_no_more_than_allowed():
    modules, sizes = {"a": 5, "b": 1, "c": 8}, {"a": 10, "b": 100, "c": 7}
    for most in (1, 20, 33, 100, 205, 206):
        parts = cut(modules, sizes, most)
        held = [
            (name, module)
            for part in parts
            for name, rows in part.items()
            for module in range(modules[name])[rows]
        ]
        assert held == [(name, module) for name in modules for module in range(modules[name])]
        for part in parts:
            counts = {name: len(range(modules[name])[rows]) for name, rows in part.items()}
            size = sum(count * sizes[name] for name, count in counts.items())
            assert size <= most or sum(counts.values()) == 1
    assert len(cut(modules, sizes, 206)) == 1
    assert cut({}, {}, 1) == [{}]


def test_an_upload_of_another_config_is_refused_and_nothing_is_written(round_files):
    path = round_files.uploads[2]
    pool = make_pool()
    upload = make_upload(pool, make_assignment(pool), client=2)
    write_upload(path, Header("upload", "f" * 64), upload)
    with pytest.raises(FedamoleError, match=f"{path}: was made with other settings"):
        run_aggregate(round_files)
    assert not round_files.out_pool.exists()
