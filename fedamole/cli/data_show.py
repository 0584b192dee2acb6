"""The command that shows a data set to people, before anything is trained on it."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedamole.cli.data import read_tokenizer
from fedamole.cli.study import default_config, read_config
from fedamole.config import Config, load_named, parse
from fedamole.config_files import read_yaml
from fedamole.errors import FedamoleError, did_you_mean
from fedamole.settings import (
    BackboneSettings,
    BackboneSource,
    DatasetSettings,
    ScenarioSettings,
    SourceSettings,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedamole.datasets.loading import Corpus


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser("data", help="look into data sets")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = commands.add_parser(
        "show", help="print examples as the model sees them, lengths, classes and the split"
    )
    show.add_argument(
        "data",
        metavar="DATA",
        help="name of a data set (configs/datasets), its YAML file, or the config of a study",
    )
    show.add_argument(
        "--file",
        nargs="+",
        metavar="PATH",
        help="read these files of a local copy instead of its source",
    )
    show.add_argument(
        "--backbone",
        metavar="NAME",
        help="count in tokens of this backbone: the folder of a model, or the name of one that a "
        "study has prepared; default: the study's",
    )
    show.add_argument("--examples", type=int, default=2, metavar="N", help="default: 2")
    show.add_argument(
        "--partition", metavar="LAW", help="for example dir0.1; default: dir1, or iid"
    )
    show.add_argument("--clients", type=int, metavar="K", help="default: 10")
    show.add_argument("--seed", type=int, metavar="S", help="default: 42, or the study's first")
    show.set_defaults(command=run_show)


def run_show(args: argparse.Namespace) -> None:
    """Print data sets, and how they are spread over clients."""
    from fedamole.cli.data_view import describe, split_table
    from fedamole.datasets.loading import load_corpus
    from fedamole.datasets.splits import make_partition

    if args.examples < 0:
        raise FedamoleError(f"--examples {args.examples} must be 0 or more")
    selection = _select(args)
    tokenizer = _tokenizer(args.backbone, selection.config)
    shown: dict[str, Corpus] = {}
    for scenario in selection.scenarios:
        dataset = scenario.dataset
        if dataset.name not in shown:
            shown[dataset.name] = load_corpus(dataset)
            for part in describe(shown[dataset.name], scenario, tokenizer, args.examples):
                print("\n".join([*part, ""]))
        # Printed before, since a law may not suit the data.
        division = make_partition(shown[dataset.name], scenario, selection.seed)
        print("\n".join([*split_table(division, scenario, selection.seed), ""]))
    for note in selection.notes if tokenizer is None else []:
        print(note)


@dataclass(frozen=True)
class _Selection:
    """What was asked for: populations with one seed, and the study they stand in, if any."""

    scenarios: Sequence[ScenarioSettings]
    seed: int
    config: Config | None

    @property
    def notes(self) -> list[str]:
        """What to say where there is no tokenizer."""
        if self.config is None:
            return ["With --backbone also the special tokens are shown, and tokens counted."]
        name = self.config.backbone.name
        return [f"Backbone {name} is not prepared yet: no special tokens are shown or counted."]


def _select(args: argparse.Namespace) -> _Selection:
    """Find what the arguments stand for."""
    path = Path(args.data)
    if "/" not in args.data and path.suffix not in (".yaml", ".yml", ".json"):
        if path.suffix and path.is_file():
            raise FedamoleError(
                f"{path}: is a file of data; name the YAML file of a data set, which may take "
                f"--file {path}"
            )
        return _data_set(args, _by_name(args.data))
    raw = read_yaml(path)
    if isinstance(raw, dict) and "scenarios" in raw:
        return _study(args, path)
    return _data_set(args, load_named(DatasetSettings, args.data, _library(), "data set"))


def _library() -> Path:
    """Folder of the data sets that a config may name."""
    return default_config().parent / "datasets"


def _by_name(name: str) -> DatasetSettings:
    """Read a data set of the library."""
    _check_name("data set", name, [path.stem for path in _library().glob("*.yaml")])
    return load_named(DatasetSettings, name, _library(), "data set")


def _check_name(what: str, name: str, allowed: Sequence[str]) -> None:
    """Refuse a name that does not exist, with the nearest that does."""
    if name not in allowed:
        raise FedamoleError(
            f"{what} {name!r} is unknown; {did_you_mean(name, allowed)}"
            f"allowed: {', '.join(sorted(allowed))}, or a path"
        )


def _study(args: argparse.Namespace, path: Path) -> _Selection:
    """Take the populations of a study."""
    for name in ("file", "partition", "clients"):
        if getattr(args, name) is not None:
            raise FedamoleError(f"--{name} goes with a data set; {path} is a study, which says it")
    config = read_config(path)
    seed = config.seeds[0] if args.seed is None else args.seed
    return _Selection(config.scenarios, seed, config)


def _data_set(args: argparse.Namespace, dataset: DatasetSettings) -> _Selection:
    """Make a population of a data set."""
    data = dataset.model_dump(exclude_unset=True)
    if args.file:
        kept = dataset.source.model_dump(include={"layout"})
        if dataset.source.layout == "natural-instructions":
            kept["splits"] = dataset.source.splits
        source = parse(SourceSettings, {**kept, "files": args.file}, "--file")
        data["source"] = source.model_dump(exclude_unset=True)
    has_classes = bool(dataset.category or dataset.label)
    asked = {"partition": args.partition, "clients": args.clients}
    settings = {"partition": "dir1" if has_classes else "iid"}
    settings |= {key: value for key, value in asked.items() if value is not None}
    scenario = parse(ScenarioSettings, {"dataset": data, **settings}, dataset.name)
    return _Selection([scenario], 42 if args.seed is None else args.seed, None)


def _tokenizer(asked: str | None, config: Config | None) -> "PreTrainedTokenizerBase | None":
    """Load the tokenizer that was asked for, or that of a study whose backbone is prepared."""
    if asked is None:
        if config is None:
            return None
        folder = Path(config.results) / "backbones" / config.backbone.name
        is_prepared = (folder / "backbone.json").is_file()
        return _read(folder, config.backbone) if is_prepared else None
    if Path(asked).is_dir():
        return _read(Path(asked), BackboneSource(name="asked", folder=asked))
    models = default_config().parent / "models"
    if "/" not in asked:
        _check_name("backbone", asked, [path.stem for path in models.glob("*.yaml")])
    settings = load_named(BackboneSettings, asked, models, "backbone")
    if settings.folder:
        return _read(Path(settings.folder).expanduser(), settings)
    results = Path(config.results if config else "results")
    places = [results / "backbones", *sorted(results.glob("*/backbones"))]
    for place in places:
        if (place / settings.name / "backbone.json").is_file():
            return _read(place / settings.name, settings)
    raise FedamoleError(
        f"backbone {settings.name!r} is not prepared in {results}; give the folder of a model, or "
        "prepare it: snakemake --configfile STUDY --cores 1 prepare_backbone"
    )


def _read(folder: Path, settings: BackboneSource) -> "PreTrainedTokenizerBase":
    """Load a tokenizer; the data may still have to come from the hub."""
    return read_tokenizer(folder, settings, offline=False)
