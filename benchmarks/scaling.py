"""How cost grows: with clients, experts, rank, sequence length and rounds.

    python benchmarks/scaling.py [--quick]

Every quantity is measured at several sizes, one of which grows while the others stay; its exponent
is the slope of a straight line through the logarithms of the last three points, where what it costs
to start no longer counts. 1 is linear. Draws results/scaling.png and .svg, writes scaling.json.

The federation is small (two layers of width 256), so that what grows is what one sees; the layer is
one HMoLE layer of width 576 with 8 experts. Times are CPU times of one thread.
"""

# E = domain experts of one module, K = clients, T = tokens

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measuring import RESULTS, Claim, interleaved, machine
from server_round import Size, run_command, write_round
from torch import nn

from fedamole.assignment import assign_experts, random_scores
from fedamole.cli.study import Study, read_config, read_study
from fedamole.hmole import HMoLELinear
from fedamole.planning.volumes import disk_of, volumes_of
from fedamole.planning.workload import works_of

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = Size(clients=100, experts=300, layers=2, width=256, value_width=256)
# Okabe and Ito (2008), as in the figures of a study.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00") * 2
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
WIDTH, EXPERTS, ALPHA, TOP_K = 576, 8, 16.0, 2


@dataclass(frozen=True)
class Growth:
    """One quantity at several sizes."""

    axis: str
    """What grows."""
    quantity: str
    """What is measured, with its unit."""
    expected: float
    """Greatest exponent: 1, or 2 with tables of experts by clients where both grow."""
    sizes: list[int]
    """Along the axis."""
    values: list[float]
    """At each size."""

    @property
    def exponent(self) -> float:
        """Slope through the last three points."""
        x, y = np.log(self.sizes[-3:]), np.log(self.values[-3:])
        return float(np.polyfit(x, y, 1)[0])

    @property
    def claim(self) -> Claim:
        """The exponent beside its limit; times scatter, and the flow has a logarithm more."""
        name = f"growth of {self.quantity} with {self.axis}"
        value = self.exponent
        return Claim(name, value, value, value, unit="exponent", target=self.expected + 0.25)


def measure(quick: bool) -> list[Claim]:
    """Exponents of all quantities; quick: without the larger sizes."""
    return [growth.claim for growth in growths(quick)]


def growths(quick: bool) -> list[Growth]:
    """Measure everything."""
    return [*_clients(quick), *_experts(quick), *_rank(quick), *_length(quick), *_rounds(quick)]


def _points(
    axis: str,
    sizes: list[int],
    at: Callable[[int], Mapping[str, float]],
    squared: tuple[str, ...] = (),
) -> Iterator[Growth]:
    """Measure at every size: one growth for each quantity that is found there."""
    found = [at(size) for size in sizes]
    for quantity in found[0]:
        expected = 2.0 if quantity in squared else 1.0
        yield Growth(axis, quantity, expected, sizes, [float(each[quantity]) for each in found])


def _clients(quick: bool) -> Iterator[Growth]:
    """Three experts a client, six held by each: E K = 3 K^2 pairs."""
    sizes = [10, 20, 40] if quick else [10, 32, 100, 320, 1000]
    table = ("assignment of a module (s)", "assignment file (B)", "pool file (B)")

    def at(clients: int) -> dict[str, float]:
        return _server(replace(SMALL, clients=clients, experts=3 * clients))

    yield from _points("clients", sizes, at, squared=table)
    sizes = [3, 6, 12] if quick else [10, 32, 100, 320, 1000]
    disk = ("disk, all rounds (B)", "disk, last round (B)")
    yield from _points("clients", sizes, lambda clients: _plan(clients, rounds=3), squared=disk)


def _experts(quick: bool) -> Iterator[Growth]:
    """Of ten clients, whose uploads grow with what they hold."""
    sizes = [30, 60, 120] if quick else [30, 100, 300, 1000, 3000]

    def at(experts: int) -> dict[str, float]:
        return _server(replace(SMALL, clients=10, experts=experts, max_experts=experts))

    yield from _points("experts", sizes, at)


def _rank(quick: bool) -> Iterator[Growth]:
    """Of adapters: files and means, and the layer."""
    sizes = [8, 16, 32] if quick else [8, 16, 32, 64]

    def at(rank: int) -> dict[str, float]:
        server = _server(replace(SMALL, clients=20, experts=60, width=1024, rank=rank))
        wanted = ("averaging (s)", "averaging, memory (B)", "pool file (B)", "upload file (B)")
        return {key: server[key] for key in wanted} | _layer(rank, tokens=256)

    yield from _points("rank", sizes, at)


def _length(quick: bool) -> Iterator[Growth]:
    """Tokens of a sequence; attention, which is the backbone's, is not part of the layer."""
    sizes = [128, 256, 512] if quick else [128, 256, 512, 1024, 2048, 4096]
    yield from _points("sequence length", sizes, lambda tokens: _layer(8, tokens))


def _rounds(quick: bool) -> Iterator[Growth]:
    """The graph of a study, which Snakemake builds anew at every start."""
    sizes = [3, 6, 12] if quick else [5, 15, 45, 135]
    yield from _points("rounds", sizes, lambda rounds: _plan(4, rounds))


def _server(size: Size) -> dict[str, float]:
    """Measure what the server does in a round."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_round(Path(folder), size)
        costs = [run_command(files.aggregate) for _ in range(2)]
        run_command(files.assign)
        return {
            "assignment of a module (s)": _assign_seconds(size),
            "averaging (s)": min(cost.cpu_s for cost in costs),
            "averaging, memory (B)": 1e9 * min(cost.peak_gb for cost in costs),
            "pool file (B)": files.out_pool.stat().st_size,
            "upload file (B)": float(np.mean([path.stat().st_size for path in files.uploads])),
            "assignment file (B)": files.out_assignment.stat().st_size,
        }


def _assign_seconds(size: Size) -> float:
    """Assign one module of random scores."""
    scores = random_scores(np.random.default_rng(0), 1, size.experts, size.clients)[0]
    arguments = (size.choices, TOP_K, size.max_experts)
    repeats = 1 if scores.size > 1e6 else 5
    seconds = interleaved({"all": lambda: assign_experts(scores, *arguments)}, repeats, warm_up=1)
    return float(np.median(seconds["all"]))


def _layer(rank: int, tokens: int) -> dict[str, float]:
    """Measure forward and backward pass of a layer, and what it keeps between them."""
    torch.manual_seed(0)
    base = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
    layer = HMoLELinear(base, rank, ALPHA, EXPERTS, TOP_K, 0.05)
    x_TD = torch.randn(1, tokens, WIDTH, requires_grad=True)
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def step() -> None:
        layer(x_TD).sum().backward()

    seconds = interleaved({"all": step}, repeats=15)["all"]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x_TD)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    saved = [tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own]
    return {"layer, both passes (s)": float(np.median(seconds)), "layer, kept (B)": sum(saved)}


def _plan(clients: int, rounds: int) -> dict[str, float]:
    """Plan the smoke study at another size, one job for each client."""
    config: dict[str, Any] = yaml.safe_load((REPOSITORY / "configs/smoke.yaml").read_text())
    config |= {"rounds": rounds, "methods": ["fedamole"], "results": "results"}
    config["scenarios"][0] |= {"clients": clients, "partition": "iid", "min_examples": 4}
    config["assignment"] = {"num_experts": 3 * clients, "choices": 2, "max_experts": 8}
    config["execution"] = {"clients_per_job": 1}
    folder = Path(tempfile.mkdtemp())
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    study = read_study(read_config(folder / "config.yaml"))
    snakemake = ["snakemake", "-n", "--quiet", "all", "--snakefile", str(REPOSITORY / "Snakefile")]
    before = _children_seconds()
    subprocess.run(
        [*snakemake, "--directory", str(folder), "--configfile", str(folder / "config.yaml")],
        check=True,
        capture_output=True,
    )
    spent = _children_seconds() - before
    shutil.rmtree(folder)
    disks = {"disk, all rounds (B)": None, "disk, last round (B)": 1}
    return {"snakemake -n (s)": spent} | {name: _disk(study, keep) for name, keep in disks.items()}


def _disk(study: Study, keep: int | None) -> float:
    """Plan the bytes of the newest rounds of the one run of a study."""
    config, (work,) = study.config, works_of(study.config)
    volumes = volumes_of(config, study.size, config.scenarios[0], work)
    return disk_of(config, volumes, *config.scenario_seeds(), work, keep)


def _children_seconds() -> float:
    """CPU time of all programs that were started and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def draw(found: list[Growth]) -> Figure:
    """Draw a panel for each axis: cost over that at the smallest size, both in powers of ten."""
    axes_names = list(dict.fromkeys(growth.axis for growth in found))
    figure = Figure(figsize=(11, 8.6), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for name, panel in zip(axes_names, panels, strict=False):
        _panel(panel, [growth for growth in found if growth.axis == name])
    for panel in list(figure.axes)[len(axes_names) :]:
        panel.set_visible(False)
    return figure


def _panel(panel: Axes, found: list[Growth]) -> None:
    """Draw the quantities of one axis, with a line of exponent 1 to compare."""
    smallest, largest = min(g.sizes[0] for g in found), max(g.sizes[-1] for g in found)
    ends = np.array([smallest, largest])
    panel.plot(ends, ends / smallest, color="0.6", linestyle=":", label="linear: 1")
    for growth, colour, marker in zip(found, COLOURS, MARKERS, strict=False):
        values = np.array(growth.values) / growth.values[0]
        label = f"{growth.quantity.rpartition(' (')[0]}: {growth.exponent:.2f}"
        panel.plot(growth.sizes, values, color=colour, marker=marker, ms=5, lw=1.3, label=label)
    panel.set(xscale="log", yscale="log", xlabel=found[0].axis, ylabel="cost over the first")
    panel.set_xticks(found[0].sizes, map(str, found[0].sizes))
    panel.minorticks_off()
    panel.yaxis.set_major_formatter("{x:g}")
    panel.legend(fontsize=7.5, frameon=False, title="exponent", title_fontsize=7.5)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Print all exponents; draw and write them at full size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, no picture")
    quick = parser.parse_args().quick
    found = growths(quick)
    for growth in found:
        print(f"{growth.axis:16} {growth.quantity:28} {growth.exponent:5.2f} ", end="")
        pairs = zip(growth.sizes, growth.values, strict=True)
        print(*(f"{size}: {value:.3g}" for size, value in pairs))
    if quick:
        return
    figure = draw(found)
    figure.savefig(RESULTS / "scaling.png", dpi=150)
    figure.savefig(RESULTS / "scaling.svg", metadata={"Date": None})
    records = [{**asdict(growth), "exponent": growth.exponent} for growth in found]
    text = json.dumps({"machine": machine(), "records": records}, indent=1)
    (RESULTS / "scaling.json").write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
