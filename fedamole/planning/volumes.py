"""What a run sends, keeps and stores: bytes of uploads, pools and the rest (torch-free).

What is trained is float32. A client holds domain experts of its own choice of modules, so the
numbers are means over clients. Which tensors the files hold is in
:mod:`fedamole.planning.contents`; the sizes of real files are in ``tests/unit/test_volumes.py``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fedamole.config import Config
from fedamole.planning.contents import Contents, contents_of, virtual_tokens
from fedamole.planning.model_size import LinearLayer, ModelSize
from fedamole.planning.workload import RunWork, clients_by_round, population_of
from fedamole.registry import RUNS
from fedamole.settings import PromptSettings, ScenarioSettings

FLOAT, INTEGER = 4, 8
# What HDF5 needs: for a file with its header, for a group of modules, and for every dataset; and
# for the name of a module in the facts.
FILE_BYTES, GROUP_BYTES, DATASET_BYTES, NAME_BYTES = 4600, 300, 280, 4
PROVENANCE = 7


@dataclass(frozen=True)
class Adapters:
    """The trainable part of a run.

    Attributes
    ----------
    modules
        Names of the modules M.
    groups
        Kinds of them by role and shape: each is an array of its own in the files.
    rank
        LoRA rank r.
    numbers
        Tensor name -> its numbers over all modules; of one domain expert where these have it.
    contents
        Which of the tensors are where.
    experts, choices
        Domain experts E per module and clients c that each chooses; 0 without domain experts.
    """

    modules: tuple[str, ...]
    groups: int
    rank: int
    numbers: dict[str, int] = field(compare=False)
    contents: Contents
    experts: int
    choices: int

    def count(self, names: Iterable[str]) -> int:
        """Numbers of these tensors together."""
        return sum(self.numbers[name] for name in names)

    def held(self, clients: int) -> float:
        """Domain experts of a client per module, where so many clients take part: E c / K."""
        return 1.0 if self.contents.one_each else self.experts * self.choices / clients

    def of_client(self, clients: int) -> float:
        """Numbers that a client is sent."""
        held = self.held(clients) * self.count(self.contents.expert)
        return held + self.count(self.contents.shared)

    @property
    def of_pool(self) -> int:
        """Numbers of a pool."""
        return self.experts * self.count(self.contents.expert) + self.count(self.contents.shared)

    def most_of_client(self, max_experts: int) -> int:
        """Numbers in the model of a client with as many domain experts as it may hold."""
        held = 1 if self.contents.one_each else min(self.experts, max_experts)
        numbers = held * self.count(self.contents.expert)
        if self.contents.models > 1:
            return numbers + self.count(self.contents.shared) + self.count(self.contents.kept)
        # What a client kept stands in the place of what it was sent.
        return numbers + self.count({*self.contents.shared, *self.contents.kept})


@dataclass(frozen=True)
class Volumes:
    """Bytes of one run on one scenario.

    Attributes
    ----------
    download, upload, kept
        What a client reads of the pool, the file that it sends, and the file that it keeps for
        itself, in one round.
    pool
        A pool that was trained.
    server
        What the server adds to pools from round 2 on.
    first
        The first pool.
    assignment
        Who holds what in one round.
    """

    download: float
    upload: float
    kept: float
    pool: float
    server: float
    first: float
    assignment: float


def adapters_of(
    config: Config, size: ModelSize, scenario: ScenarioSettings, work: RunWork
) -> Adapters:
    """Count the trainable numbers of a run."""
    contents, rank = contents_of(work.run), config.adapter.rank
    experts = choices = 0
    if contents.expert:
        experts, choices = config.assignment.num_experts, config.assignment.choices
    if contents.one_each:
        experts, choices = scenario.clients, 1
    if not work.trains:
        return Adapters((), 0, rank, {}, contents, 0, 0)
    if not RUNS[work.run].adapts:
        prompt = _prompt(config.prompt, size.embedding_width, work.run)
        return Adapters(("prompt",), 1, rank, prompt, contents, experts, choices)
    layers = size.adapted(config.adapter.target_modules)
    return Adapters(
        modules=tuple(layer.name for layer in layers),
        groups=len({_kind(layer) for layer in layers}),
        rank=rank,
        numbers=_lora(layers, rank),
        contents=contents,
        experts=experts,
        choices=choices,
    )


def _lora(layers: Sequence[LinearLayer], rank: int) -> dict[str, int]:
    """Numbers of what an adapted layer may have, over all layers."""
    inputs = sum(layer.in_features for layer in layers)
    outputs = sum(layer.out_features for layer in layers)
    return {
        "lora_A": rank * inputs,
        "lora_B": rank * outputs,
        "token_proj": rank * inputs,
        "gate": inputs,
        # A gate over two.
        "mixer": 2 * inputs,
    }


def _prompt(settings: PromptSettings, width: int, run: str) -> dict[str, int]:
    """Numbers of a soft prompt, and of the MLP that may make it."""
    hidden = settings.encoder_width
    numbers = {"embedding.weight": virtual_tokens(run, settings) * width}
    for layer, (inputs, outputs) in zip(
        (0, 2, 4), pairwise((width, hidden, hidden, width)), strict=True
    ):
        numbers |= {f"mlp_head.{layer}.weight": inputs * outputs, f"mlp_head.{layer}.bias": outputs}
    return numbers


def _kind(layer: LinearLayer) -> tuple[str, int, int]:
    """What the modules of a group have in common; see :func:`fedamole.pools.group_modules`."""
    return layer.name.rpartition(".")[2], layer.in_features, layer.out_features


def volumes_of(
    config: Config, size: ModelSize, scenario: ScenarioSettings, work: RunWork
) -> Volumes:
    """Count the bytes of a run on a scenario."""
    adapters, clients = adapters_of(config, size, scenario, work), scenario.clients
    drawn = population_of(config, scenario.seeded_slug(config.seeds[0]), work).size
    contents = adapters.contents
    tensors = len(contents.expert) + len(contents.shared)
    first = _file(adapters, tensors) + FLOAT * adapters.of_pool
    cells = len(adapters.modules) * adapters.experts * clients
    # Who trained what: tokens, holders, scores and embeddings; then the objective and the examples.
    made = (INTEGER + FLOAT + 1) * cells
    if work.has_experts:
        made += FLOAT * adapters.rank * len(adapters.modules) * (adapters.experts + clients)
    made += INTEGER * (len(adapters.modules) + clients) + DATASET_BYTES * PROVENANCE
    server = DATASET_BYTES * len(contents.server) * adapters.groups
    kept = _file(adapters, len(contents.kept)) + FLOAT * adapters.count(contents.kept)
    assignment = (FLOAT + 1) * cells + INTEGER * len(adapters.modules)
    return Volumes(
        download=FLOAT * adapters.of_client(drawn) if work.trains else 0.0,
        upload=_upload(adapters, drawn, work) if work.trains else 0.0,
        kept=float(kept) if contents.kept else 0.0,
        pool=first + made,
        server=server + FLOAT * adapters.count(contents.server),
        first=first,
        assignment=_file(adapters, 0) + 3 * DATASET_BYTES + assignment,
    )


def _upload(adapters: Adapters, drawn: int, work: RunWork) -> float:
    """Bytes of an upload: tensors, embeddings, and of each expert row who it is and its tokens."""
    contents, rows = adapters.contents, len(adapters.modules) * adapters.held(drawn)
    numbers = adapters.held(drawn) * adapters.count(contents.expert)
    numbers += adapters.count(contents.upload)
    if work.has_experts:
        numbers += adapters.rank * (len(adapters.modules) + rows)
    # Of every group, which expert of which module a row is; with experts, embeddings and tokens.
    tensors = len(contents.expert) + len(contents.upload) + (4 if contents.expert else 2)
    return _file(adapters, tensors) + DATASET_BYTES + FLOAT * numbers + 3 * INTEGER * rows


def _file(adapters: Adapters, tensors: int) -> int:
    """Bytes of an HDF5 file beside its numbers, with so many datasets for each group."""
    names = sum(len(name) + NAME_BYTES for name in adapters.modules)
    each = GROUP_BYTES + DATASET_BYTES * tensors if tensors else 0
    return FILE_BYTES + names + adapters.groups * each


def disk_of(
    config: Config, volumes: Volumes, slug: str, work: RunWork, keep: int | None = None
) -> float:
    """Bytes that the rounds of a run take on disk.

    Parameters
    ----------
    config, volumes, slug, work
        The run on a scenario slug.
    keep
        Newest rounds that are kept whole, with the pool they started from and what their clients
        had kept before (``fedamole prune``); None keeps all.
    """
    rounds = config.rounds if work.trains else 0
    whole = rounds if keep is None else min(keep, rounds)
    reporting = clients_by_round(config, slug, work, "train_clients")
    uploads = sum(len(clients) for clients in reporting[rounds - whole :])
    before = {client for clients in reporting[: rounds - whole] for client in clients}
    # Round t starts from the pool of round t - 1; that of round 0 is the first one.
    oldest, newest = max(1, rounds - whole), work.aggregations(config.rounds)
    pools, with_server = (max(0, newest - start + 1) for start in (oldest, max(2, oldest)))
    return (
        volumes.first
        + max(1, rounds) * volumes.assignment
        + uploads * volumes.upload
        + (uploads + len(before)) * volumes.kept
        + pools * volumes.pool
        + with_server * volumes.server
    )
