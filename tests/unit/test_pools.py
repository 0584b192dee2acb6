"""Pool, upload and assignment files: what is written comes back, and only whole files are read."""

# M = modules, E = domain experts, K = clients, R = rank, N = rows that a client holds
import hashlib
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from fedamole.artifacts import Header
from fedamole.cli.pool import run_show
from fedamole.errors import FedamoleError
from fedamole.hdf5 import datasets, opened, read_rows
from fedamole.pool_files import (
    read_assignment,
    read_client_state,
    read_dropout,
    read_header,
    read_kept,
    read_origin,
    read_pool,
    read_upload,
    write_assignment,
    write_dropout,
    write_kept,
    write_pool,
    write_upload,
)
from fedamole.pools import (
    BFLOAT16,
    Assignment,
    ClientGroup,
    ClientState,
    KeptState,
    ModuleShape,
    Pool,
    PoolGroup,
    Provenance,
    Upload,
    cast,
    group_modules,
    to_float32,
)

HEADER = Header("pool", "d" * 64, {"backbone": "b" * 64})


def make_pool(experts=6, clients=3, modules=4, width=8, dtype=np.float32, trained=True):
    """Make a pool of two groups with random numbers everywhere."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return cast(rng.standard_normal(shape).astype(np.float32), np.dtype(dtype))

    groups = {
        name: PoolGroup(
            modules=tuple(f"layers.{i}.{name}" for i in range(modules)),
            experts={"lora_A": draw(modules, experts, 2, width)} if experts else {},
            shared={"lora_B": draw(modules, height, 2)},
        )
        for name, height in (("v_proj", 4), ("q_proj", 8))
    }
    size = (2 * modules, experts, clients)
    provenance = Provenance(
        round=3,
        tokens_MEK=rng.integers(0, 2**40, size),
        holders_MEK=rng.random(size) < 0.5,
        scores_MEK=rng.random(size, dtype=np.float32),
        objective_M=rng.random(2 * modules),
        expert_embeddings_MER=rng.random((*size[:2], 2), dtype=np.float32),
        client_embeddings_MKR=rng.random((size[0], clients, 2), dtype=np.float32),
        num_examples_K=rng.integers(1, 100, clients),
    )
    return Pool(groups, experts, provenance if trained else None)


def make_assignment(pool, clients=3, round_=4):
    """Make a random assignment of a pool."""
    rng = np.random.default_rng(1)
    size = (len(pool.modules), pool.num_experts, clients)
    holders, scores = rng.random(size) < 0.5, rng.random(size, dtype=np.float32)
    return Assignment(pool.modules, holders, scores, rng.random(size[0]), "random", round_)


def take_client(pool, assignment, client):
    """Select what a client holds, by plain loops."""
    groups, start = {}, 0
    for name, group in pool.groups.items():
        rows = [
            (m, e)
            for m in range(len(group.modules))
            for e in range(pool.num_experts)
            if assignment.holders_MEK[start + m, e, client]
        ]
        start += len(group.modules)
        groups[name] = ClientGroup(
            modules=group.modules,
            experts={
                key: np.array([value[row] for row in rows], dtype=value.dtype)
                for key, value in group.experts.items()
            },
            module_N=np.array([m for m, _ in rows], dtype=np.int64),
            expert_N=np.array([e for _, e in rows], dtype=np.int64),
            shared=group.shared,
        )
    return ClientState(groups)


def make_upload(pool, assignment, client):
    """Make what a client might send."""
    state = take_client(pool, assignment, client)
    counts = {name: len(group.module_N) for name, group in state.groups.items()}
    rng = np.random.default_rng(client)
    return Upload(
        client=client,
        round=assignment.round,
        state=state,
        num_examples=17,
        client_embeddings_MR=rng.random((len(pool.modules), 2), dtype=np.float32),
        expert_embeddings={
            name: rng.random((n, 2), dtype=np.float32) for name, n in counts.items()
        },
        tokens={name: rng.integers(0, 100, n) for name, n in counts.items()},
    )


def assert_same(one, other):
    """Equality of dataclasses down to dtype, shape and bits of arrays, and the order of groups."""
    if isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif hasattr(one, "__dataclass_fields__"):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    else:
        assert one == other


def as_torch(array):
    """BFLOAT16 array -> torch.bfloat16, by its bits."""
    return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)


def test_modules_are_grouped_by_role_and_by_shape_where_a_role_has_several():
    shapes = [
        ModuleShape("layers.0.v_proj", 8, 4),
        ModuleShape("layers.0.q_proj", 8, 8),
        ModuleShape("layers.1.v_proj", 8, 2),
        ModuleShape("layers.1.q_proj", 8, 8),
    ]
    assert group_modules(shapes) == {
        "q_proj": (shapes[1], shapes[3]),
        "v_proj-8x2": (shapes[2],),
        "v_proj-8x4": (shapes[0],),
    }


def test_all_bfloat16_widen_as_in_torch():
    bits = np.arange(2**16, dtype=np.uint16).view(BFLOAT16)
    expected = as_torch(bits).to(torch.float32).numpy()
    np.testing.assert_array_equal(to_float32(bits), expected)


def test_float32_rounds_to_bfloat16_as_in_torch():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    # All ties, and what lies beside them.
    ties = (np.arange(2**16, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, ties - 1, ties, ties + 1]).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    torch.testing.assert_close(
        as_torch(cast(values, BFLOAT16)), expected, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float16, np.float64])
@pytest.mark.parametrize("trained", [True, False])
def test_a_pool_comes_back_bit_by_bit(tmp_path, dtype, trained):
    pool = make_pool(dtype=dtype, trained=trained)
    write_pool(tmp_path / "pool.h5", HEADER, pool)
    assert_same(read_pool(tmp_path / "pool.h5", HEADER.digest), pool)
    assert read_header(tmp_path / "pool.h5") == HEADER


def test_pools_without_experts_and_without_anything_come_back(tmp_path):
    for pool in (make_pool(experts=0), Pool({}, 0, None)):
        write_pool(tmp_path / "pool.h5", HEADER, pool)
        assert_same(read_pool(tmp_path / "pool.h5"), pool)
        state = read_client_state(tmp_path / "pool.h5", None, client=1)
        assert_same(state, take_client(pool, make_assignment(pool), client=1))


def test_bfloat16_is_a_number_to_every_reader_of_hdf5(tmp_path):
    pool = make_pool(dtype=BFLOAT16)
    write_pool(tmp_path / "pool.h5", HEADER, pool)
    with h5py.File(tmp_path / "pool.h5") as file:
        dataset = file["groups/q_proj/experts/lora_A"]
        assert dataset.id.get_type().get_size() == 2
        expected = as_torch(pool.groups["q_proj"].experts["lora_A"]).to(torch.float32)
        np.testing.assert_array_equal(dataset[()], expected.numpy())


def test_many_modules_fit(tmp_path):
    names = tuple(f"model.decoder.layers.{i}.some_long_attention_name.q_proj" for i in range(3000))
    group = PoolGroup(names, {}, {"lora_A": np.zeros((3000, 1, 1), dtype=np.float32)})
    write_pool(tmp_path / "pool.h5", HEADER, Pool({"q_proj": group}, 0, None))
    assert read_pool(tmp_path / "pool.h5").modules == names


def test_equal_pools_are_equal_bytes_at_any_time(tmp_path):
    pool = make_pool(dtype=BFLOAT16)
    write_pool(tmp_path / "one.h5", HEADER, pool)
    time.sleep(1.1)  # HDF5 counts time in seconds.
    shuffled = {
        name: replace(group, experts=dict(reversed(group.experts.items())))
        for name, group in pool.groups.items()
    }
    write_pool(tmp_path / "other.h5", HEADER, replace(pool, groups=shuffled))
    digests = {hashlib.sha256(path.read_bytes()).digest() for path in tmp_path.glob("*.h5")}
    assert len(digests) == 1


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_a_client_gets_its_rows(tmp_path, dtype):
    pool = make_pool(dtype=dtype)
    assignment = make_assignment(pool)
    write_pool(tmp_path / "pool.h5", HEADER, pool)
    for client in range(3):
        state = read_client_state(tmp_path / "pool.h5", assignment, client, HEADER.digest)
        assert_same(state, take_client(pool, assignment, client))


@pytest.mark.parametrize("width", [512, 8192])
def test_a_client_reads_nothing_of_the_other_experts(tmp_path, width):
    # Rows of 4 and 64 KiB: by default HDF5 reads 64 KiB around smaller ones.
    pool = make_pool(experts=32, width=width)
    assignment = make_assignment(pool)
    assignment.holders_MEK[:, :, 0] = np.arange(32) == 5
    write_pool(tmp_path / "pool.h5", HEADER, pool)
    before = _bytes_read()
    state = read_client_state(tmp_path / "pool.h5", assignment, client=0)
    took = _bytes_read() - before
    held = sum(array.nbytes for group in state.groups.values() for array in group.experts.values())
    assert held == 8 * 8 * width
    assert held <= took < held + 2**15
    assert (tmp_path / "pool.h5").stat().st_size > 32 * held


def test_a_server_that_assigns_reads_no_tensors(tmp_path):
    pool = make_pool(experts=32, width=8192)
    write_pool(tmp_path / "pool.h5", HEADER, pool)
    before = _bytes_read()
    origin = read_origin(tmp_path / "pool.h5", HEADER.digest)
    took = _bytes_read() - before
    assert took < 2**16 < (tmp_path / "pool.h5").stat().st_size / 100
    assert origin.modules == pool.modules
    assert origin.round == pool.round
    for field in fields(Provenance):
        np.testing.assert_array_equal(
            getattr(origin.provenance, field.name), getattr(pool.provenance, field.name)
        )


def _bytes_read():
    """Bytes that this process has asked of files so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def test_an_assignment_of_other_modules_or_clients_is_refused(tmp_path):
    pool = make_pool()
    write_pool(tmp_path / "pool.h5", HEADER, pool)
    other = make_assignment(make_pool(modules=3))
    with pytest.raises(FedamoleError, match=r"round 4 is for 6 modules .*; the pool has 8 modules"):
        read_client_state(tmp_path / "pool.h5", other, client=0)
    with pytest.raises(FedamoleError, match="client 3 does not exist; allowed: 0 to 2"):
        read_client_state(tmp_path / "pool.h5", make_assignment(pool), client=3)
    with pytest.raises(FedamoleError, match="needs an assignment"):
        read_client_state(tmp_path / "pool.h5", None, client=0)


def test_uploads_and_assignments_come_back(tmp_path):
    pool = make_pool(dtype=BFLOAT16)
    assignment = make_assignment(pool)
    upload = make_upload(pool, assignment, client=2)
    write_upload(tmp_path / "upload.h5", replace(HEADER, kind="upload"), upload)
    assert_same(read_upload(tmp_path / "upload.h5", HEADER.digest), upload)
    write_assignment(tmp_path / "assignment.h5", replace(HEADER, kind="assignment"), assignment)
    assert_same(read_assignment(tmp_path / "assignment.h5", HEADER.digest), assignment)


def test_an_upload_without_experts_comes_back(tmp_path):
    pool = make_pool(experts=0)
    upload = make_upload(pool, make_assignment(pool), client=1)
    upload = replace(
        upload,
        expert_embeddings={},
        tokens={},
        client_embeddings_MR=np.zeros((0, 0), dtype=np.float32),
    )
    write_upload(tmp_path / "upload.h5", replace(HEADER, kind="upload"), upload)
    assert_same(read_upload(tmp_path / "upload.h5"), upload)


def refusal(path, **expected):
    """Give the one line that reading a file as a pool ends with."""
    with pytest.raises(FedamoleError) as caught:
        read_pool(path, **expected)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    return line


def test_every_truncated_file_is_refused(tmp_path):
    write_pool(tmp_path / "whole.h5", HEADER, make_pool())
    content = (tmp_path / "whole.h5").read_bytes()
    for length in [*range(0, len(content), 97), len(content) - 1]:
        (tmp_path / "part.h5").write_bytes(content[:length])
        line = refusal(tmp_path / "part.h5")
        assert "truncated" in line or "only the start" in line


def test_damaged_bytes_never_end_in_a_traceback(tmp_path):
    write_pool(tmp_path / "whole.h5", HEADER, make_pool())
    content = (tmp_path / "whole.h5").read_bytes()
    path = tmp_path / "part.h5"
    # All metadata; what the values are is covered by the digests of the parents.
    for at in range(0, len(content), 53):
        path.write_bytes(content[:at] + bytes(byte ^ 0xFF for byte in content[at : at + 8]))
        with path.open("ab") as stream:
            stream.write(content[at + 8 :])
        try:
            read_pool(path)
        except FedamoleError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_files_that_are_no_pools_are_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "missing.h5")
    assert "Is a directory" in refusal(tmp_path)
    (tmp_path / "text.h5").write_text("experts: 3\n")
    assert "is not an HDF5 file" in refusal(tmp_path / "text.h5")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["groups/q_proj"] = np.zeros(3)
    assert "no header" in refusal(tmp_path / "foreign.h5")
    for number, header in enumerate(("no JSON", "[1]", '{"name": 1}', "7")):
        path = tmp_path / f"strange{number}.h5"
        with h5py.File(path, "w") as file:
            file.attrs["header"], file.attrs["facts"] = header, "{}"
        refusal(path)


def test_files_of_another_kind_config_or_format_are_refused(tmp_path):
    path, pool = tmp_path / "file.h5", make_pool()
    write_assignment(path, replace(HEADER, kind="assignment"), make_assignment(pool))
    assert "holds assignment; pool is needed" in refusal(path)
    write_pool(path, HEADER, pool)
    assert "made with other settings" in refusal(path, digest="e" * 64)
    write_pool(path, replace(HEADER, format=99), pool)
    assert "has format 99" in refusal(path)


def test_a_pool_that_lacks_an_array_is_refused(tmp_path):
    path = tmp_path / "pool.h5"
    write_pool(path, HEADER, make_pool())
    with h5py.File(path, "r+") as file:
        del file["provenance/tokens_MEK"]
    assert "is damaged" in refusal(path) and "tokens_MEK" in refusal(path)


def test_a_pool_that_lacks_a_fact_is_refused(tmp_path):
    path = tmp_path / "pool.h5"
    write_pool(path, HEADER, make_pool())
    with h5py.File(path, "r+") as file:
        file.attrs["facts"] = '{"modules": {}, "round": 3}'
    assert "is damaged (it has no 'num_experts')" in refusal(path)


@pytest.mark.parametrize("error", [KeyError, OSError, RuntimeError, TypeError, ValueError])
def test_our_own_defects_do_not_look_like_a_damaged_file(tmp_path, error):
    write_pool(tmp_path / "pool.h5", HEADER, make_pool())
    with pytest.raises(error, match="a defect"), opened(tmp_path / "pool.h5", "pool", None):
        raise error("a defect")


def test_arrays_that_are_read_while_a_file_is_open_are_found_damaged(tmp_path):
    path = tmp_path / "pool.h5"
    write_pool(path, HEADER, make_pool())
    with h5py.File(path, "r+") as file:
        del file["groups/q_proj/experts/lora_A"]
        file["groups/q_proj/experts/lora_A"] = np.zeros((1, 1, 2, 8), dtype=np.float32)
    with opened(path, "pool", None) as (file, _):
        dataset = datasets(file, "groups/q_proj/experts")["lora_A"]
        with pytest.raises(FedamoleError, match="pool.h5: .* damaged"):
            read_rows(dataset, np.array([3]), np.array([5]))
        with pytest.raises(FedamoleError, match="pool.h5: is damaged .*'scores'"):
            file["scores"]


FILL_AND_WRITE = """
    import os, resource, sys
    from pathlib import Path
    from fedamole.errors import FedamoleError
    from fedamole.pool_files import write_pool
    from test_pools import HEADER, make_pool

    folder, how = Path(sys.argv[1]), sys.argv[2]
    path, pool = folder / "pool.h5", make_pool(width=256)
    write_pool(path, HEADER, make_pool(trained=False))
    old = path.read_bytes()
    for room in range(0, 140_000, 4096 if how == "disk" else 1021):
        if how == "disk":
            (folder / "ballast").unlink(missing_ok=True)
            disk = os.statvfs(folder)
            os.sync()
            (folder / "ballast").write_bytes(bytes(max(0, disk.f_bavail * disk.f_bsize - room)))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            write_pool(path, HEADER, pool)
        except FedamoleError as error:
            assert str(error).startswith(f"{path}: cannot be written, "), error
            assert "no space left" in str(error) or "file size limit" in str(error), error
            assert path.read_bytes() == old
            assert not list(folder.glob(".pool*"))
        else:
            print("needed", room)
            break
"""


def _fill_and_write(folder, how):
    """Write with more and more room, in a process of its own: HDF5 used to crash at its end."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FILL_AND_WRITE), str(folder), how],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
    )


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        result = _fill_and_write(tmp_path, "disk")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert int(result.stdout.split()[1]) > 0


def test_a_file_size_limit_leaves_the_old_file_and_nothing_else(tmp_path):
    result = _fill_and_write(tmp_path, "limit")
    assert (result.returncode, result.stderr) == (0, "")
    assert int(result.stdout.split()[1]) > 0


def show(path, capsys):
    """Give the printed lines, split into words."""
    run_show(SimpleNamespace(file=path))
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_show_tells_people_what_a_pool_holds(tmp_path, capsys):
    pool = make_pool(dtype=BFLOAT16)
    write_pool(tmp_path / "pool.h5", HEADER, pool)
    lines = show(tmp_path / "pool.h5", capsys)
    assert ["kind", "pool"] in lines
    assert ["settings", "d" * 64] in lines
    assert ["parent", "backbone", "b" * 64] in lines
    shape = ["4", "x", "6", "x", "2", "x", "8"]
    assert ["q_proj", "experts/lora_A", *shape, "bfloat16", "0.001"] in lines
    made = pool.provenance
    assert ["client", "0", str(made.num_examples_K[0]), "examples"] in lines
    load_K = made.holders_MEK[0].sum(axis=0)
    objective = f"{made.objective_M[0]:.6f}"
    mean = f"{load_K.mean():.2f}"
    row = ["layers.0.v_proj", str(load_K.min()), mean, str(load_K.max()), objective]
    assert row in lines
    holders = [
        word
        for k in made.holders_MEK[0, 2].nonzero()[0]
        for word in (f"{k}:", str(made.tokens_MEK[0, 2, k]))
    ]
    assert ["layers.0.v_proj", "2", *(holders or ["nobody"])] in lines


def test_show_tells_people_what_uploads_and_assignments_hold(tmp_path, capsys):
    pool = make_pool()
    assignment = make_assignment(pool)
    upload = make_upload(pool, assignment, client=2)
    write_upload(tmp_path / "upload.h5", replace(HEADER, kind="upload"), upload)
    lines = show(tmp_path / "upload.h5", capsys)
    assert ["client", "2"] in lines and ["num_examples", "17"] in lines
    group = upload.state.groups["q_proj"]
    module, expert = group.modules[group.module_N[0]], group.expert_N[0]
    assert [module, str(expert), str(upload.tokens["q_proj"][0])] in lines
    write_assignment(tmp_path / "assignment.h5", replace(HEADER, kind="assignment"), assignment)
    lines = show(tmp_path / "assignment.h5", capsys)
    assert ["for", "round", "4"] in lines and ["solver", "random"] in lines
    held = map(str, assignment.holders_MEK[7, :, 1].nonzero()[0])
    assert ["layers.3.q_proj", "1", *held] in lines


@pytest.mark.parametrize("pool", [make_pool(experts=0), Pool({}, 0, None)])
def test_show_copes_with_methods_without_experts(tmp_path, capsys, pool):
    write_pool(tmp_path / "pool.h5", HEADER, pool)
    assert ["experts", "per", "module", "0"] in show(tmp_path / "pool.h5", capsys)
    header, assignment = replace(HEADER, kind="assignment"), make_assignment(pool)
    write_assignment(tmp_path / "assignment.h5", header, assignment)
    assert ["experts", "per", "module", "0"] in show(tmp_path / "assignment.h5", capsys)


def test_what_a_client_keeps_comes_back(tmp_path):
    rng = np.random.default_rng(3)
    groups = {
        "q_proj": {"lora_A": rng.normal(size=(2, 3, 5)).astype(np.float32)},
        "v_proj": {"lora_A": cast(rng.normal(size=(2, 3, 5)).astype(np.float32), BFLOAT16)},
    }
    kept = KeptState(client=2, round=7, groups=groups, numbers={"weight": 0.1})
    path = tmp_path / "kept.h5"
    write_kept(path, replace(HEADER, kind="kept"), kept)

    back = read_kept(path)

    assert (back.client, back.round, back.numbers) == (2, 7, {"weight": 0.1})
    assert back.groups.keys() == groups.keys()
    for name, tensors in groups.items():
        assert back.groups[name]["lora_A"].tobytes() == tensors["lora_A"].tobytes()
        assert back.groups[name]["lora_A"].dtype == tensors["lora_A"].dtype
    with pytest.raises(FedamoleError, match="kept"):
        read_upload(path)


def test_a_dropout_is_no_upload_and_says_why(tmp_path):
    path = tmp_path / "client.h5"
    write_dropout(path, replace(HEADER, kind="dropout"), 1, 4, "out of memory")
    assert read_dropout(path) == "out of memory"
    with pytest.raises(FedamoleError, match="dropout"):
        read_upload(path)


def test_what_the_server_keeps_comes_back_and_reaches_no_client(tmp_path):
    pool = make_pool()
    name, group = next(iter(pool.groups.items()))
    key, value = next(iter(group.shared.items()))
    momentum = {key: np.ones_like(value)}
    pool = replace(pool, groups={**pool.groups, name: replace(group, server=momentum)})
    path = tmp_path / "pool.h5"
    write_pool(path, HEADER, pool)
    np.testing.assert_array_equal(read_pool(path).groups[name].server[key], momentum[key])
    state = read_client_state(path, make_assignment(pool), 0)
    assert set(state.groups[name].shared) == set(group.shared)
    assert not any("server" in key for key in state.groups[name].shared)


def test_show_tells_people_what_clients_keep_and_why_they_dropped_out(tmp_path, capsys):
    groups = {"q_proj": {"lora_B": np.zeros((2, 3, 5), np.float32)}}
    kept, dropout = tmp_path / "kept.h5", tmp_path / "client.h5"
    write_kept(kept, replace(HEADER, kind="kept"), KeptState(2, 7, groups, {"weight": 0.25}))
    write_dropout(dropout, replace(HEADER, kind="dropout"), 1, 4, "out of memory")
    run_show(SimpleNamespace(file=kept))
    run_show(SimpleNamespace(file=dropout))
    out = capsys.readouterr().out
    assert "weight       0.25" in out and "2 x 3 x 5" in out
    assert "Dropped out: out of memory" in out
