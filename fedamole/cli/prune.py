"""The command that frees the disk from rounds that no job needs any more."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from fedamole import stages
from fedamole.cli.study import read_config
from fedamole.config import Config
from fedamole.errors import FedamoleError
from fedamole.planning.workload import RunWork, works_of
from fedamole.results import read_metrics

MIB = 2**20


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "prune", help="delete uploads and pools of the older rounds of a finished study"
    )
    parser.add_argument("--configfile", type=Path, required=True)
    parser.add_argument(
        "--keep",
        required=True,
        metavar="N|last",
        help="newest rounds to keep whole, with the pools they started from; last is 1",
    )
    parser.add_argument(
        "--shared",
        action="store_true",
        help="of a study with a name: the other studies of its results folder are finished too, or "
        "do not need these runs",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print what would go")
    parser.set_defaults(command=run_prune)


def run_prune(args: argparse.Namespace) -> None:
    """Delete what no job of a finished study reads, and say how much that frees."""
    keep = _number(args.keep)
    config = read_config(args.configfile)
    if not args.shared:
        _check_alone(config)
    _check_finished(config, args.configfile)
    verb, freed = "would free" if args.dry_run else "freed", 0
    for slug in config.scenario_seeds():
        for work in works_of(config):
            paths = list(old_files(config, slug, work, keep))
            size = sum(path.stat().st_size for path in paths)
            for path in [] if args.dry_run else paths:
                path.unlink()
            print(f"{slug} {work.run}: {verb} {size / MIB:.1f} MiB, {len(paths)} files")
            freed += size
    print(f"together: {verb} {freed / MIB:.1f} MiB")


def _number(keep: str) -> int:
    """Rounds to keep.

    Raises
    ------
    FedamoleError
        If it is neither ``last`` nor a number from 1 on.
    """
    if keep == "last":
        return 1
    if not (keep.isascii() and keep.isdigit() and int(keep)):
        raise FedamoleError(f"--keep {keep!r} must be last, or a number of rounds from 1 on")
    return int(keep)


def _check_alone(config: Config) -> None:
    """Refuse a study that may share its runs: what others need of them, this one does not know.

    Raises
    ------
    FedamoleError
        If the study has a name.
    """
    if config.study:
        raise FedamoleError(
            f"study {config.study}: other studies of {config.results} may still need the uploads "
            "and pools of these runs, and would train them again; --shared says that those are "
            "finished too, or do not need them"
        )


def _check_finished(config: Config, configfile: Path) -> None:
    """Refuse a study whose jobs may still need the rounds.

    Raises
    ------
    FedamoleError
        If a metrics file is missing, of other settings, or of fewer rounds.
    """
    # Not for the tables, which may show costs as well.
    folder, settings = Path(config.results) / "metrics", stages.manifest_stage(config)
    paths = [
        folder / slug / f"{method}.jsonl"
        for slug in config.scenario_seeds()
        for method in config.methods
    ]
    if missing := [path for path in paths if not path.is_file()]:
        raise FedamoleError(
            f"{missing[0]}: does not exist yet; only a finished study is pruned, "
            f"run: snakemake --configfile {configfile} --cores all"
        )
    for run in read_metrics(paths, settings).runs.values():
        if run.last_round not in (0, config.rounds):
            raise FedamoleError(
                f"{folder / run.info.scenario / run.info.method}.jsonl: has {run.last_round} "
                f"rounds, the config says {config.rounds}; only a finished study is pruned"
            )


def old_files(config: Config, slug: str, work: RunWork, keep: int) -> Iterator[Path]:
    """Uploads, pools and kept states of a run that neither the newest nor later rounds need.

    The pool that a kept round started from stays: with it and the uploads of that round the
    study can go on. Round 0 stays as it is.
    """
    run = Path(config.results) / "runs" / slug / work.run
    oldest = config.rounds - keep + 1
    who = stages.run_stage(config, slug, work.run).population
    last = {client: who.last_before(client, oldest) for client in range(who.clients)}
    for round_ in range(1, oldest if work.trains else 1):
        folder = run / f"round_{round_:03d}"
        yield from sorted(folder.glob("client_*.h5"))
        kept = {f"kept_{client:03d}.h5" for client, at in last.items() if at == round_}
        yield from (path for path in sorted(folder.glob("kept_*.h5")) if path.name not in kept)
        if round_ < oldest - 1 and (folder / "pool.h5").is_file():
            yield folder / "pool.h5"
