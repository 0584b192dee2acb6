"""Commands about the cache of a study: the small files that its tables can be redrawn from."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fedamole.errors import FedamoleError

if TYPE_CHECKING:
    from fedamole.stages import ResultsStage


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands."""
    parser = subparsers.add_parser("cache", help="describe, pack and verify the metrics of a study")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_manifest(commands)
    pack = commands.add_parser("pack", help="put a folder of metrics into one zip archive")
    pack.add_argument("folder", type=Path, metavar="FOLDER")
    pack.add_argument("--out", type=Path, required=True, metavar="FILE")
    pack.set_defaults(command=run_pack)
    verify = commands.add_parser("verify", help="compare all files with the manifest")
    verify.add_argument("cache", type=Path, metavar="FOLDER_OR_ZIP")
    verify.set_defaults(command=run_verify)
    unpack = commands.add_parser("unpack", help="put the files of an archive into a folder")
    unpack.add_argument("archive", type=Path, metavar="FILE")
    unpack.add_argument("--into", type=Path, required=True, metavar="FOLDER")
    unpack.add_argument("--force", action="store_true", help="overwrite files that differ")
    unpack.set_defaults(command=run_unpack)


def _add_manifest(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add the command that people give a folder, and the workflow its files."""
    parser = commands.add_parser("manifest", help="write down where each metrics file comes from")
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="default: of --out")
    parser.add_argument("--metrics", type=Path, nargs="+", metavar="FILE", help="default: all")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: FOLDER/manifest.json")
    study = parser.add_mutually_exclusive_group()
    study.add_argument("--settings", metavar="JSON", help="settings of the tables (ResultsStage)")
    study.add_argument("--configfile", type=Path, metavar="FILE", help="the study")
    parser.set_defaults(command=run_manifest)


def run_manifest(args: argparse.Namespace) -> None:
    """Write the manifest of a folder; what the old one knows of unchanged files stays."""
    # Here, because help needs none of it.
    from fedamole.machine import this_platform
    from fedamole.manifest import MANIFEST, describe, read_manifest, with_others, write_manifest

    if (args.folder is None) == (args.out is None):
        raise FedamoleError("fedamole cache manifest needs FOLDER or --out FILE, not both")
    out = args.out or args.folder / MANIFEST
    paths = args.metrics or sorted(out.parent.glob("*/*.jsonl"))
    if not paths:
        raise FedamoleError(f"{out.parent}: has no metrics files (SCENARIO/METHOD.jsonl)")
    old = read_manifest(out) if out.exists() else None
    manifest = describe(out.parent, paths, this_platform(), _settings(args), old)
    if old and args.metrics:
        # Another study of the same results folder made the others.
        manifest = with_others(out.parent, manifest, old)
    write_manifest(out, manifest)
    print(f"{out}: {len(manifest.files)} files, {len(manifest.machines)} machines")


def _settings(args: argparse.Namespace) -> "ResultsStage | None":
    """Settings of the tables, as they are or from a config."""
    from fedamole.config import parse
    from fedamole.stages import ResultsStage, results_stage

    if args.configfile:
        from fedamole.cli.study import read_config

        return results_stage(read_config(args.configfile))
    return parse(ResultsStage, args.settings, "--settings") if args.settings else None


def run_pack(args: argparse.Namespace) -> None:
    """Write the archive."""
    from fedamole.cache_archive import pack

    contents = pack(args.folder, args.out)
    print(f"{args.out}: {len(contents.files)} files, {args.out.stat().st_size} bytes")


def run_verify(args: argparse.Namespace) -> None:
    """Print what the cache is, or what is wrong with it."""
    from fedamole.cache_archive import summary, verify

    print(summary(verify(args.cache)))


def run_unpack(args: argparse.Namespace) -> None:
    """Write the files, and say how many were new."""
    from fedamole.cache_archive import unpack

    written = unpack(args.archive, args.into, args.force)
    print(f"{args.into}: {len(written)} files written; the others were there already")
