"""The command that shows people what is in a file of a run."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedamole.errors import FedamoleError

if TYPE_CHECKING:
    import numpy as np

    from fedamole.artifacts import Header
    from fedamole.pools import ClientGroup, PoolGroup, Provenance

# M = modules, E = domain experts of one module, K = clients


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands."""
    parser = subparsers.add_parser("pool", help="look into the files of a run")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="print what a file holds and where it comes from")
    show.add_argument("file", type=Path, metavar="FILE")
    show.set_defaults(command=run_show)


def run_show(args: argparse.Namespace) -> None:
    """Print a file in words and tables."""
    from fedamole.pool_files import read_header

    header = read_header(args.file)
    kinds: dict[str, Callable[[Path], list[str]]] = {
        "pool": _pool,
        "upload": _upload,
        "assignment": _assignment,
        "kept": _kept,
        "dropout": _dropout,
    }
    if header.kind not in kinds:
        raise FedamoleError(f"{args.file}: holds {header.kind}; allowed: {', '.join(kinds)}")
    print("\n".join([*_header(header), *kinds[header.kind](args.file)]))


def _header(header: "Header") -> list[str]:
    """Say what the file is."""
    rows = [("kind", header.kind), ("package", f"fedamole {header.package}")]
    rows += [("settings", header.digest)]
    rows += [(f"parent {role}", digest) for role, digest in sorted(header.parents.items())]
    return table(rows)


def _pool(path: Path) -> list[str]:
    """Describe a pool."""
    from fedamole.pool_files import read_pool

    pool = read_pool(path)
    facts = [("round", pool.round), ("experts per module", pool.num_experts)]
    lines = ["", *table(facts), "", *_tensors(pool.groups)]
    if pool.provenance is None:
        return [*lines, "", "Before training: nobody has trained it."]
    return [*lines, *_provenance(pool.modules, pool.provenance)]


def _provenance(modules: Sequence[str], made: "Provenance") -> list[str]:
    """Describe who trained a pool."""
    known = [(k, n) for k, n in enumerate(made.num_examples_K) if n]
    examples = [(f"client {k}", f"{n} examples") for k, n in known]
    lines = ["", "Trained by, in this round or before", *table(examples)]
    if not made.holders_MEK.shape[1]:
        return lines
    lines += ["", "Experts per client", *_loads(modules, made.holders_MEK, made.objective_M)]
    rows = [
        (module, expert, _trainers(made.holders_MEK[m, expert], made.tokens_MEK[m, expert]))
        for m, module in enumerate(modules)
        for expert in range(made.holders_MEK.shape[1])
    ]
    title = "Who trained what in this round (client: tokens routed to the expert)"
    return [*lines, "", title, *table(rows, ("module", "expert", "trained by"))]


def _trainers(held_K: "np.ndarray", tokens_K: "np.ndarray") -> str:
    """List the clients that hold an expert."""
    return "  ".join(f"{k}: {tokens_K[k]}" for k in held_K.nonzero()[0]) or "nobody"


def _upload(path: Path) -> list[str]:
    """Describe an upload."""
    from fedamole.pool_files import read_upload

    upload = read_upload(path)
    facts = [(key, getattr(upload, key)) for key in ("client", "round", "num_examples")]
    rows = [
        (group.modules[m], expert, tokens)
        for name, group in upload.state.groups.items()
        if name in upload.tokens
        for m, expert, tokens in zip(
            group.module_N, group.expert_N, upload.tokens[name], strict=True
        )
    ]
    lines = ["", *table(facts), "", *_tensors(upload.state.groups)]
    return [*lines, "", *table(rows, ("module", "expert", "tokens"))] if rows else lines


def _kept(path: Path) -> list[str]:
    """Describe what a client keeps for itself."""
    from fedamole.pool_files import read_kept

    kept = read_kept(path)
    facts = [("client", kept.client), ("after round", kept.round), *sorted(kept.numbers.items())]
    arrays = {
        (name, key): array
        for name, tensors in kept.groups.items()
        for key, array in tensors.items()
    }
    return ["", *table(facts), "", *_tensor_table(arrays)]


def _dropout(path: Path) -> list[str]:
    """Say why a client dropped out."""
    from fedamole.pool_files import read_dropout

    return ["", f"Dropped out: {read_dropout(path)}"]


def _assignment(path: Path) -> list[str]:
    """Describe an assignment."""
    from fedamole.pool_files import read_assignment

    assignment = read_assignment(path)
    modules, experts, clients = assignment.holders_MEK.shape
    facts = [("for round", assignment.round), ("solver", assignment.solver)]
    facts += [("modules", modules), ("experts per module", experts), ("clients", clients)]
    lines = ["", *table(facts)]
    if not experts:
        return [*lines, "", "Without domain experts: all clients hold the same."]
    loads = _loads(assignment.modules, assignment.holders_MEK, assignment.objective_M)
    rows = [
        (module, client, " ".join(map(str, assignment.holders_MEK[m, :, client].nonzero()[0])))
        for m, module in enumerate(assignment.modules)
        for client in range(clients)
    ]
    held = table(rows, ("module", "client", "experts"))
    return [*lines, "", "Experts per client", *loads, "", "Who holds what", *held]


def _loads(
    modules: Sequence[str], holders_MEK: "np.ndarray", objective_M: "np.ndarray"
) -> list[str]:
    """Tabulate how many experts the clients hold per module."""
    rows = [
        (module, load_K.min(), f"{load_K.mean():.2f}", load_K.max(), f"{objective:.6f}")
        for module, load_K, objective in zip(
            modules, holders_MEK.sum(axis=1), objective_M, strict=True
        )
    ]
    return table(rows, ("module", "min", "mean", "max", "objective"))


def _tensors(groups: "Mapping[str, PoolGroup] | Mapping[str, ClientGroup]") -> list[str]:
    """Tabulate the tensors of all groups with shape, dtype and size."""
    if not groups:
        return ["No tensors: nothing is trained."]
    return _tensor_table(
        {
            (name, f"{part}/{key}"): array
            for name, group in groups.items()
            for part in ("experts", "shared", "server")
            for key, array in getattr(group, part, {}).items()
        }
    )


def _tensor_table(arrays: "Mapping[tuple[str, str], np.ndarray]") -> list[str]:
    """Tabulate arrays by group and name."""
    rows = [
        (*key, _shape(array), _dtype(array), _mib(array.nbytes)) for key, array in arrays.items()
    ]
    rows += [("total", "", "", "", _mib(sum(array.nbytes for array in arrays.values())))]
    return table(rows, ("group", "tensor", "shape", "dtype", "MiB"))


def _mib(size: int) -> str:
    """Write a number of bytes in MiB."""
    return f"{size / 2**20:.3f}"


def _shape(array: "np.ndarray") -> str:
    """Write a shape as 2 x 3."""
    return " x ".join(map(str, array.shape))


def _dtype(array: "np.ndarray") -> str:
    """Name a dtype, bfloat16 included."""
    return (array.dtype.names or (array.dtype.name,))[0]


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> list[str]:
    """Align rows in columns, numbers to the right, under a ruled head if there is one."""
    body = [[str(cell) for cell in row] for row in rows]
    lines = [list(head), *body] if head else body
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [all(map(_is_number, column)) for column in zip(*body, strict=True)]
    text = [
        "  ".join(
            cell.rjust(width) if right and head else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    ]
    return [text[0], "  ".join("-" * width for width in widths), *text[1:]] if head else text


def _is_number(cell: str) -> bool:
    """Whether a cell is to be aligned to the right."""
    return cell.replace(".", "", 1).isdigit()
