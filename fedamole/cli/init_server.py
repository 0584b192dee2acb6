"""The command that starts a federated run: the first pool and the first assignment."""

import argparse
from pathlib import Path

from fedamole.artifacts import Header, read_record, sha256
from fedamole.cli.libraries import prepare_libraries
from fedamole.config import parse
from fedamole.registry import RUNS
from fedamole.stages import RunStage, digest


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser("init-server", help="make the pool before training")
    parser.add_argument("--settings", required=True, help="JSON of the run's settings")
    parser.add_argument("--backbone", type=Path, required=True, help="prepared backbone folder")
    parser.add_argument("--out-pool", type=Path, required=True)
    parser.add_argument("--out-assignment", type=Path, required=True)
    parser.set_defaults(command=run_init_server)


def run_init_server(args: argparse.Namespace) -> None:
    """Write a fresh pool and an assignment for round 1."""
    from fedamole.backbone_limits import check_loading
    from fedamole.methods import load
    from fedamole.pool_files import write_assignment, write_pool
    from fedamole.targets import BackboneFacts, target_modules

    settings = parse(RunStage, args.settings, "--settings")
    record_path = args.backbone / "backbone.json"
    facts = read_record(record_path, "backbone", digest(settings.tokens.backbone))[1]
    check_loading(facts, settings.loading)
    adapts = RUNS[settings.run].adapts
    modules = target_modules(facts, settings.adapter.target_modules) if adapts else []
    if RUNS[settings.run].depends_on("prompt"):
        # A soft prompt starts from the tokenizer and the embeddings of the backbone.
        prepare_libraries(offline=True)
    method = load(settings.run)
    pool = method.init_pool(settings, BackboneFacts(modules, args.backbone))
    assignment = method.assign(settings, pool, 1)
    header = Header("pool", digest(settings), {"backbone": sha256(record_path)})
    write_pool(args.out_pool, header, pool)
    header = Header("assignment", digest(settings), {"pool": sha256(args.out_pool)})
    write_assignment(args.out_assignment, header, assignment)
