"""Bytes of uploads, pools and kept states against the real files of every run, on a tiny model."""

import dataclasses
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from federation import CHECKOUT, Federation, Round

from fedamole.artifacts import Header
from fedamole.config import Config, load_config
from fedamole.meter import state_bytes, upload_bytes
from fedamole.planning.contents import virtual_tokens
from fedamole.planning.model_size import model_size
from fedamole.planning.volumes import Volumes, volumes_of
from fedamole.planning.workload import works_of
from fedamole.pool_files import write_assignment, write_pool
from fedamole.pools import ClientState, Pool
from fedamole.registry import METHODS, RUNS

pytestmark = pytest.mark.usefixtures("group")

TRAINED = [run for run in RUNS if RUNS[run].trains]
ROUNDS = 2
# A small prompt encoder; the rank and the widths make numbers outweigh what HDF5 needs.
SECTIONS: dict[str, Any] = {
    "adapter": {"rank": 16},
    "training": {"steps": 1, "batch_size": 1},
    "prompt": {"encoder_width": 48},
}


def config_of(federation: Federation, run: str, **changes: Any) -> Config:
    """A study of one run, with the federation's settings and mine."""
    method = next(name for name, row in METHODS.items() if row.run == run)
    raw = federation.raw | {"methods": [method], "rounds": ROUNDS}
    raw |= {key: raw.get(key, {}) | value for key, value in {**SECTIONS, **changes}.items()}
    return load_config(raw, CHECKOUT / "configs")


def planned(federation: Federation, config: Config) -> Volumes:
    size = model_size(config.backbone, federation.folder)
    assert size
    assert size.exact
    return volumes_of(config, size, config.scenarios[0], works_of(config)[0])


@dataclasses.dataclass(frozen=True)
class Played:
    """Two rounds of a run, and their files."""

    run: str
    config: Config
    folder: Path
    rounds: list[Round]

    def bytes_of(self, pattern: str) -> list[int]:
        return [path.stat().st_size for path in sorted(self.folder.glob(pattern))]


@pytest.fixture(scope="module", params=TRAINED)
def played(request: pytest.FixtureRequest, federation: Federation, tmp_path_factory: Any) -> Played:
    run, folder = request.param, tmp_path_factory.mktemp(request.param)
    session = federation.session(run, **SECTIONS)
    rounds = list(federation.rounds(session, folder, ROUNDS))
    header = Header("pool", "0" * 64, {f"upload_{client:04}": "0" * 64 for client in range(3)})
    write_pool(folder / "last.h5", header, rounds[-1].pool)
    write_assignment(folder / "assignment.h5", header, rounds[-1].assignment)
    return Played(run, config_of(federation, run), folder, rounds)


def numbers(pool: Pool | ClientState) -> int:
    """Bytes of all tensors that clients are sent."""
    return sum(
        array.nbytes
        for group in pool.groups.values()
        for tensors in (group.experts, group.shared)
        for array in tensors.values()
    )


def test_files_are_as_large_as_planned(played: Played, federation: Federation) -> None:
    computed = planned(federation, played.config)
    # That of round 1; the last one also has what the server keeps from round 2 on.
    first, pool = played.bytes_of("pool_*.h5")
    sizes = {
        "upload": np.mean(played.bytes_of("client_*.h5")),
        "first": first,
        "pool": pool,
        "assignment": played.bytes_of("assignment.h5")[0],
    }
    sent = np.mean([numbers(state) for each in played.rounds for state in each.states.values()])
    last = played.bytes_of("last.h5")[0]
    if played.run == "fedprompt":
        # How many tokens its text has, only the tokenizer knows. Of the model's width, 32 numbers.
        tokens = virtual_tokens(played.run, played.config.prompt)
        missing = computed.download - sent
        assert 0 < missing < 4 * 32 * tokens
        sizes = {name: size + missing * (name != "assignment") for name, size in sizes.items()}
        sent, last = sent + missing, last + missing
    assert {name: getattr(computed, name) for name in sizes} == pytest.approx(sizes, rel=0.1)
    assert computed.pool + computed.server == pytest.approx(last, rel=0.1)
    assert computed.download == pytest.approx(sent)


def test_what_is_measured_is_what_is_sent(played: Played, federation: Federation) -> None:
    """The costs of a client count arrays; the plan counts files, with what HDF5 adds to them."""
    computed = planned(federation, played.config)
    uploads = [result.upload for each in played.rounds for result in each.results.values()]
    states = [state for each in played.rounds for state in each.states.values()]
    files = [arrays_of(path) for path in sorted(played.folder.glob("client_*.h5"))]
    measured = [upload_bytes(upload) for upload in uploads]
    assert sorted(measured) == sorted(sum(sizes) for sizes in files)
    of_hdf5 = np.mean(played.bytes_of("client_*.h5")) - np.mean(measured)
    # The prompt of fedprompt, and what HDF5 needs where nothing is sent, are planned roughly.
    assert np.mean(measured) == pytest.approx(computed.upload - of_hdf5, rel=0.1, abs=700)
    assert np.mean([*map(state_bytes, states)]) == pytest.approx(computed.download, rel=0.1)


def arrays_of(path: Path) -> list[int]:
    """Bytes of all arrays of a file."""
    sizes: list[int] = []
    with h5py.File(path, locking=False) as file:
        file.visititems(
            lambda _, item: sizes.append(item.nbytes) if isinstance(item, h5py.Dataset) else None
        )
    return sizes


def test_what_clients_keep_is_as_large_as_planned(played: Played, federation: Federation) -> None:
    kept = played.bytes_of("kept_*.h5")
    assert bool(kept) == RUNS[played.run].keeps
    computed = planned(federation, played.config).kept
    assert computed == pytest.approx(np.mean(kept) if kept else 0.0, rel=0.1)


def test_experts_are_shared_out_among_those_who_take_part(
    federation: Federation, tmp_path: Path
) -> None:
    sampling = {"participation": {"fraction": 0.6}}
    session = federation.session("fedamole", **SECTIONS, **sampling)
    (only,) = federation.rounds(session, tmp_path, count=1)
    assert len(only.states) == 2
    computed = planned(federation, config_of(federation, "fedamole", **sampling))
    sent = np.mean([numbers(state) for state in only.states.values()])
    assert computed.download == pytest.approx(sent)
    uploads = [path.stat().st_size for path in tmp_path.glob("client_*.h5")]
    assert computed.upload == pytest.approx(np.mean(uploads), rel=0.1)
