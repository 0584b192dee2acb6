"""A study as its config file and its results folder tell it; for the commands for people."""

import csv
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import fedamole
from fedamole import stages
from fedamole.artifacts import read_record
from fedamole.config import Config, load_config
from fedamole.config_files import read_yaml
from fedamole.errors import FedamoleError
from fedamole.planning.model_size import ModelSize, model_size
from fedamole.planning.workload import ClientData, assumed_data, clients_by_round, works_of
from fedamole.results import figures, tables

# (scenario slug, run, rule) -> seconds of a job per turn; see planning.times.Clock.
Measured = dict[tuple[str, str, str], float]
# Rule -> first part of the names of the metrics that it writes.
METRICS = {"train_clients": "metrics", "evaluate_clients": "aggregated"}


@dataclass(frozen=True)
class Study:
    """A study and what is known of it.

    Attributes
    ----------
    config
        Its settings.
    size
        Of its model, if known.
    data
        Slug of a population -> what a client of it has.
    """

    config: Config
    size: ModelSize | None
    data: Mapping[str, ClientData]


def default_config() -> Path:
    """The config that the Snakefile takes when it is given none."""
    return _library() / "demo.yaml"


def read_config(path: Path) -> Config:
    """Read a config file as the workflow does.

    Raises
    ------
    FedamoleError
        See :func:`fedamole.config.load_config`.
    """
    return load_config(read_yaml(path), _library(), str(path), [path.parent])


def first_shown(config: Config) -> Path:
    """A file that is there when a study is drawn: its first table, or else a figure or settings."""
    shown, output = stages.results_stage(config), Path(config.output)
    for names, folder, suffix in ((tables, "tables", "md"), (figures, "figures", "svg")):
        if found := names(shown):
            return output / folder / f"{found[0]}.{suffix}"
    return output / "study" / "config.html"


def _library() -> Path:
    """Folder with the data sets and models that a config may name."""
    here = Path("configs")
    return here if (here / "models").is_dir() else Path(fedamole.__file__).parents[1] / "configs"


def read_study(config: Config) -> Study:
    """Collect what the results folder says already of the model and the data."""
    results, name = Path(config.results), config.backbone.name
    size = model_size(config.backbone, results / "backbones" / name)
    data = {
        slug: read_data(results / "scenarios" / slug / f"tokens-{name}", config, slug)
        or assumed_data(scenario)
        for slug, (scenario, _) in config.data_seeds().items()
    }
    return Study(config, size, data)


def read_data(folder: Path, config: Config, slug: str) -> ClientData | None:
    """Count the examples of a tokenised scenario; None if there is none, or of other settings."""
    if not folder.is_dir():
        return None
    from fedamole.datasets.tokens import TokenStore

    try:
        store = TokenStore.open(folder, stages.digest(stages.tokens_stage(config, slug)))
    except FedamoleError:
        return None
    tokens = len(store.input_ids) / len(store)
    sets = ("train", "embedding", "eval", "test")
    return ClientData(
        **{name: fmean(len(client.parts()[name]) for client in store.clients) for name in sets},
        tokens=tokens,
        answer_tokens=tokens - float(store.prompt_lengths.mean()),
        choices=len(store.choices),
        measured=True,
    )


def read_benchmarks(config: Config) -> Measured:
    """Mean times of the finished jobs of a study; of those with other settings none.

    Raises
    ------
    FedamoleError
        If a file is no benchmark of Snakemake.
    """
    found = {}
    for slug in config.scenario_seeds():
        for work in works_of(config):
            digest = stages.digest(stages.client_stage(config, slug, work.run))
            for rule, rounds in work.model_rounds(config.rounds).items():
                clients = clients_by_round(config, slug, work, rule)
                numbers = range(1, rounds + 1) if work.trains else [0]
                seconds = [
                    _seconds_per_turn(path, here, config)
                    for round_, here in zip(numbers, clients, strict=True)
                    for path in _benchmarks(config, slug, work.run, round_, rule)
                    if _is_current(path, Path(config.results), rule, digest)
                ]
                if seconds:
                    found[slug, work.run, rule] = fmean(seconds)
    return found


def _benchmarks(config: Config, slug: str, run: str, round_: int, rule: str) -> list[Path]:
    """Benchmarks of the jobs of one round."""
    folder = Path(config.results, "benchmarks", slug, run, f"round_{round_:03d}")
    return sorted(folder.glob(f"{rule}_*.tsv"))


def _is_current(benchmark: Path, results: Path, rule: str, digest: str) -> bool:
    """Whether the metrics that came out of a job have the settings of the config."""
    folder = results / "runs" / benchmark.parent.relative_to(results / "benchmarks")
    name = f"{METRICS[rule]}_{benchmark.stem.removeprefix(rule + '_').split('_')[0]}.json"
    try:
        read_record(folder / name, "metrics", digest)
    except FedamoleError:
        return False
    return True


def _seconds_per_turn(path: Path, clients: Collection[int], config: Config) -> float:
    """Wall time of a finished job over the turns that its clients, of those of a round, took."""
    # train_clients_000_003 had those from 0 to 3 that took part, train_clients_000 one.
    try:
        with path.open(newline="") as stream:
            seconds = float(next(csv.DictReader(stream, delimiter="\t"))["s"])
        first, *last = (int(part) for part in path.stem.split("_")[2:])
    except (OSError, StopIteration, LookupError, ValueError, TypeError) as error:
        raise FedamoleError(f"{path}: is no benchmark of a finished job ({error})") from error
    here = sum(first <= client <= (last[0] if last else first) for client in clients)
    return seconds / math.ceil(here / config.execution.clients_at_once)
