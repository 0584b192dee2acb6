"""Commands ``partition`` and ``tokenize``: from a data set to the token ids of every client."""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fedamole import stages
from fedamole.artifacts import Header, read_record, sha256, write_record
from fedamole.backbone_limits import check_length
from fedamole.cli.libraries import prepare_libraries
from fedamole.config import parse
from fedamole.errors import FedamoleError
from fedamole.settings import BackboneSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands to the command line."""
    parser = subparsers.add_parser("partition", help="spread a data set over clients")
    parser.add_argument("--settings", required=True, help="ScenarioStage as JSON")
    parser.add_argument("--out", required=True, type=Path, help="partition.json to write")
    parser.set_defaults(command=run_partition)

    parser = subparsers.add_parser("tokenize", help="turn a scenario's texts into token ids")
    parser.add_argument("--settings", required=True, help="TokensStage as JSON")
    parser.add_argument("--partition", required=True, type=Path, help="partition.json")
    parser.add_argument("--backbone", required=True, type=Path, help="folder of the backbone")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.set_defaults(command=run_tokenize)


def run_partition(args: argparse.Namespace) -> None:
    """Spread a data set over clients and write who has which examples."""
    from fedamole.datasets.loading import load_corpus
    from fedamole.datasets.splits import make_partition, partition_record

    settings = parse(stages.ScenarioStage, args.settings, "--settings")
    corpus = load_corpus(settings.scenario.dataset)
    division = make_partition(corpus, settings.scenario, settings.seed)
    header = Header("partition", stages.digest(settings))
    write_record(args.out, header, partition_record(division))
    logger.info(
        "%s: %d examples of %d classes to clients of %s; dropped rows %s",
        settings.label,
        len(corpus.examples),
        len(corpus.classes),
        division.counts.sum(axis=1).tolist(),
        corpus.dropped,
    )


def run_tokenize(args: argparse.Namespace) -> None:
    """Tokenise the examples of every client and write the memory-mapped store."""
    from fedamole.datasets.loading import load_corpus
    from fedamole.datasets.splits import check_corpus, read_partition
    from fedamole.datasets.tokenize import tokenize_scenario
    from fedamole.datasets.tokens import write_store

    settings = parse(stages.TokensStage, args.settings, "--settings")
    scenario = settings.scenario.scenario
    division = read_partition(args.partition, stages.digest(settings.scenario))
    corpus = load_corpus(scenario.dataset)
    check_corpus(division, corpus, scenario.dataset.name)
    if not (args.backbone / "backbone.json").is_file():
        raise FedamoleError(
            f"{args.backbone}: is not a prepared backbone (it has no backbone.json)"
        )
    facts = read_record(args.backbone / "backbone.json", "backbone")[1]
    check_length(facts["name"], facts.get("positions"), scenario.max_length)
    tokenizer = read_tokenizer(args.backbone, settings.backbone.backbone)
    store = tokenize_scenario(corpus, division, scenario, tokenizer)
    parents = {
        "partition": sha256(args.partition),
        "backbone": sha256(args.backbone / "backbone.json"),
    }
    write_store(args.out, Header("tokens", stages.digest(settings), parents), store)
    logger.info(
        "%s: %d sequences, %d tokens; per client dropped %s, cut %s",
        settings.scenario.label,
        len(store),
        len(store.input_ids),
        store.dropped,
        store.cut,
    )


def read_tokenizer(
    folder: Path, settings: BackboneSource, offline: bool = True
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer in a model's folder.

    Parameters
    ----------
    folder
        The folder.
    settings
        Whether code that comes with the model is run.
    offline
        Whether nothing else of the process needs the hub.

    Raises
    ------
    FedamoleError
        If there is none.
    """
    prepare_libraries(offline=offline, quantized=False)
    from fedamole.backbone import load_tokenizer

    try:
        return load_tokenizer(folder, settings)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FedamoleError(f"{folder}: has no usable tokenizer ({reason})") from error
