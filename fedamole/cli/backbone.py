"""The command that makes the frozen backbone ready."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from fedamole.artifacts import Header, replacing, write_record
from fedamole.cli.libraries import prepare_libraries
from fedamole.config import parse
from fedamole.settings import DatasetSettings
from fedamole.stages import BackboneStage, digest


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "prepare-backbone", help="download, link, convert or generate the backbone"
    )
    parser.add_argument("--settings", required=True, help="JSON of the stage's settings")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.set_defaults(command=run_prepare_backbone)


def run_prepare_backbone(args: argparse.Namespace) -> None:
    """Write the backbone's folder, and the facts that the torch-free stages need."""
    prepare_libraries(offline=False)
    from fedamole.backbone import describe, prepare_backbone

    settings = parse(BackboneStage, args.settings, "--settings")
    with replacing(args.out) as folder:
        prepare_backbone(folder, settings.backbone, _texts(settings.corpus))
        facts = describe(folder, settings.backbone)
        write_record(folder / "backbone.json", Header("backbone", digest(settings)), facts)


def _texts(corpora: list[DatasetSettings]) -> Iterator[str]:
    """Read the texts that train the tokenizer of a generated backbone."""
    from fedamole.datasets.loading import load_corpus

    for settings in corpora:
        for example in load_corpus(settings).examples:
            yield example.prompt + example.response
