"""What a run sends and stores: bytes of uploads, downloads and pools (torch-free).

Adapters are float32. A client holds domain experts of its own choice of modules, so the numbers are
means over clients; the sizes of real files are in ``tests/workflow/test_plan.py``.
"""

from dataclasses import dataclass

from fedamole.config import Config
from fedamole.planning.model_size import LinearLayer, ModelSize
from fedamole.planning.workload import RunWork
from fedamole.settings import ScenarioSettings

FLOAT, INTEGER = 4, 8
# What HDF5 needs: for a file with its header, and for every dataset.
FILE_BYTES, DATASET_BYTES = 4500, 330
UPLOADED, POOLED = 9, 5


@dataclass(frozen=True)
class Adapters:
    """Numbers of the trainable part of a run, over all adapted modules.

    Attributes
    ----------
    modules
        Adapted linear layers M.
    groups
        Kinds of them by role and shape: each is an array of its own in the files.
    rank
        LoRA rank r.
    expert
        Numbers of one LoRA expert: r (d_in + d_out) summed over the modules.
    token_proj
        Numbers of P: r d_in summed over the modules; 0 without domain experts.
    experts, choices
        Domain experts E per module and clients c that each chooses; 0 without domain experts.
    """

    modules: int
    groups: int
    rank: int
    expert: int
    token_proj: int
    experts: int
    choices: int

    def held(self, clients: int) -> float:
        """Domain experts of a client per module, on average: E c / K."""
        return self.experts * self.choices / clients

    def of_client(self, clients: int) -> float:
        """Numbers that a client holds: its domain experts, the shared one, and P."""
        return (self.held(clients) + 1) * self.expert + self.token_proj

    @property
    def of_pool(self) -> int:
        """Numbers of a pool."""
        return (self.experts + 1) * self.expert + self.token_proj


@dataclass(frozen=True)
class Volumes:
    """Bytes of one run on one scenario.

    Attributes
    ----------
    download, upload
        What a client reads of the pool, and the file that it sends, in one round.
    pool
        A pool that was trained.
    rounds
        Bytes of all rounds beside uploads and trained pools: the first pool and the assignments.
    """

    download: float
    upload: float
    pool: float
    rounds: float


def adapters_of(config: Config, size: ModelSize, work: RunWork) -> Adapters:
    """Count the trainable numbers of a run."""
    rank, layers = config.adapter.rank, size.adapted(config.adapter.target_modules)
    if not work.trains:
        return Adapters(0, 0, rank, 0, 0, 0, 0)
    assignment, has = config.assignment, work.has_experts
    return Adapters(
        modules=len(layers),
        groups=len({_kind(layer) for layer in layers}),
        rank=rank,
        expert=rank * sum(layer.in_features + layer.out_features for layer in layers),
        token_proj=rank * sum(layer.in_features for layer in layers) if has else 0,
        experts=assignment.num_experts if has else 0,
        choices=assignment.choices if has else 0,
    )


def _kind(layer: LinearLayer) -> tuple[str, int, int]:
    """What the modules of a group have in common; see :func:`fedamole.pools.group_modules`."""
    return layer.name.rpartition(".")[2], layer.in_features, layer.out_features


def volumes_of(
    config: Config, size: ModelSize, scenario: ScenarioSettings, work: RunWork
) -> Volumes:
    """Count the bytes of a run on a scenario."""
    adapters, clients = adapters_of(config, size, work), scenario.clients
    cells = adapters.modules * adapters.experts * clients
    assignment = _file(3) + (FLOAT + 1) * cells + INTEGER * adapters.modules
    first = _file(POOLED * adapters.groups) + FLOAT * adapters.of_pool
    # Who trained what: tokens, holders, scores and embeddings.
    made = (INTEGER + FLOAT + 1) * cells
    made += FLOAT * adapters.rank * adapters.modules * (adapters.experts + clients)
    return Volumes(
        download=FLOAT * adapters.of_client(clients) if work.trains else 0.0,
        upload=_upload(adapters, clients) if work.trains else 0.0,
        pool=first + made,
        rounds=first + assignment * (config.rounds if work.trains else 1),
    )


def _upload(adapters: Adapters, clients: int) -> float:
    """Bytes of an upload: tensors, embeddings, and of each expert row who it is and its tokens."""
    rows = adapters.modules * adapters.held(clients)
    numbers = adapters.of_client(clients)
    if adapters.experts:
        numbers += adapters.rank * (adapters.modules + rows)
    datasets = UPLOADED if adapters.experts else UPLOADED - 5
    return _file(datasets * adapters.groups + 1) + FLOAT * numbers + 3 * INTEGER * rows


def _file(datasets: int) -> int:
    """Bytes of an HDF5 file beside its numbers."""
    return FILE_BYTES + DATASET_BYTES * datasets


def disk_of(
    config: Config,
    volumes: Volumes,
    scenario: ScenarioSettings,
    work: RunWork,
    keep: int | None,
) -> float:
    """Bytes that the rounds of a run take on disk.

    Parameters
    ----------
    config, volumes, scenario, work
        The run.
    keep
        Newest rounds whose uploads are kept, with the pool they started from
        (``fedamole prune``); None keeps all.
    """
    rounds = config.rounds if work.trains else 0
    kept = rounds if keep is None else min(keep, rounds)
    # Round t starts from the pool of round t - 1; that of round 0 is counted in volumes.rounds.
    oldest = max(1, rounds - kept)
    pools = max(0, work.aggregations(config.rounds) - oldest + 1)
    return volumes.rounds + kept * scenario.clients * volumes.upload + pools * volumes.pool
