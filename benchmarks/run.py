"""All claims about speed beside their targets; and a guard against losing what was reached.

    python benchmarks/run.py                    # measure, write results/claims.json, draw it
    python benchmarks/run.py --only step layer  # some of them
    python benchmarks/run.py --check            # a reduced size, against results/guard.json
    python benchmarks/run.py --guard           # take the reduced size of today for that

Ratios differ between kinds of processors, so the guard knows one set for each; on a kind that it
does not know it compares nothing and says so.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from measuring import RESULTS, Claim, machine, processor

BENCHMARKS = (
    "layer",
    "step",
    "packing",
    "evaluation",
    "server",
    "round",
    "assignment",
    "scaling",
)
# What the guard measures: the others have no ratio that a loaded machine leaves alone.
CHECKED = ("layer", "step", "packing", "evaluation")
CLAIMS, GUARD = RESULTS / "claims.json", RESULTS / "guard.json"
# A guarded ratio may be worse than the committed one by this part.
LOSS = 0.15
# What looks like a loss is measured again: one bad moment of the machine is none.
TRIES = 3


def measured(name: str, quick: bool) -> list[Claim]:
    """Measure one benchmark in a process of its own: none finds what another has left behind."""
    command = [sys.executable, __file__, "--one", name, *(["--quick"] if quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    if done.returncode:
        sys.exit(f"benchmarks: {name} failed (exit status {done.returncode})")
    return [Claim(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]


def line(claim: Claim) -> str:
    """One line of the table."""
    reached = {True: "yes", False: "NO", None: ""}[claim.met]
    target = "" if claim.target is None else f"{'>=' if claim.larger_is_better else '<='} "
    target += "" if claim.target is None else f"{claim.target:g} {claim.unit}"
    spread = "" if claim.low == claim.high else f" [{claim.low:.3g}, {claim.high:.3g}]"
    return f"| {claim.name} | {claim.value:.3g} {claim.unit}{spread} | {target} | {reached} |"


def table(claims: Iterable[Claim]) -> str:
    """Markdown table of claims."""
    head = ["| what | median [quartiles] | target | reached |", "| :--- | ---: | ---: | :---: |"]
    return "\n".join([*head, *map(line, claims)])


def worse_by(claim: Claim, before: float) -> float:
    """Part of the committed figure that is lost; negative for a gain."""
    return 1 - claim.value / before if claim.larger_is_better else claim.value / before - 1


def losses(claims: Sequence[Claim], committed: dict[str, float]) -> list[str]:
    """Name the guarded claims that are worse than the committed ones by too much."""
    return [
        f"{claim.name}: {claim.value:.3g}, committed {committed[claim.name]:.3g}, "
        f"{100 * worse_by(claim, committed[claim.name]):.0f} % worse"
        for claim in claims
        if claim.guarded
        and claim.name in committed
        and worse_by(claim, committed[claim.name]) >= LOSS
    ]


def read_guard() -> dict[str, dict[str, float]]:
    """Processor -> claim -> committed median at the reduced size."""
    found: dict[str, dict[str, float]] = json.loads(GUARD.read_text()) if GUARD.exists() else {}
    return found


def check(names: Sequence[str]) -> int:
    """Compare with the committed ratios; give the exit status."""
    committed = read_guard().get(processor())
    if committed is None:
        print(f"bench-check: nothing is committed for {processor()}; nothing compared")
        return 0
    failed, seen = [], set[str]()
    for name in names:
        lost: list[str] = []
        for _ in range(TRIES):
            claims = measured(name, quick=True)
            lost = losses(claims, committed)
            if not lost:
                break
        print(table(claim for claim in claims if claim.guarded), flush=True)
        failed += lost
        seen |= {claim.name for claim in claims if claim.guarded}
    if set(names) == set(CHECKED):
        failed += [
            f"{name}: is committed, and not measured any more" for name in committed.keys() - seen
        ]
    for text in failed:
        print(f"bench-check: {text}", file=sys.stderr)
    return 1 if failed else 0


def guard(names: Sequence[str]) -> None:
    """Commit the figures of the reduced size on this processor: the worst of a few tries."""
    content = read_guard()
    mine = content.setdefault(processor(), {})
    for name in names:
        tries = [measured(name, quick=True) for _ in range(TRIES)]
        for claims in zip(*tries, strict=True):
            worst = min if claims[0].larger_is_better else max
            if claims[0].guarded:
                mine[claims[0].name] = round(worst(claim.value for claim in claims), 4)
    GUARD.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def record(names: Sequence[str]) -> None:
    """Measure at full size; write each benchmark's claims, and the picture of all."""
    content = json.loads(CLAIMS.read_text()) if CLAIMS.exists() else {}
    for name in names:
        claims = measured(name, quick=False)
        content[name] = {"machine": machine(), "claims": [asdict(claim) for claim in claims]}
        CLAIMS.write_text(json.dumps(content, indent=2) + "\n")
        print(table(claims), flush=True)
    draw([Claim(**c) for name in BENCHMARKS if name in content for c in content[name]["claims"]])


def draw(claims: Sequence[Claim]) -> None:
    """Draw every figure with a target as a part of it: left of 1 it is reached."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [claim for claim in claims if claim.target]
    figure, axes = pyplot.subplots(figsize=(10, 0.27 * len(shown) + 0.8), layout="constrained")
    for place, claim in enumerate(reversed(shown)):
        assert claim.target is not None
        parts = [value / claim.target for value in (claim.low, claim.value, claim.high)]
        if claim.larger_is_better:
            parts = [1 / part for part in parts]
        colour = "#0072b2" if claim.met else "#d55e00"
        axes.plot([parts[0], parts[2]], [place, place], color=colour, linewidth=2)
        axes.plot(parts[1], place, "o" if claim.met else "X", color=colour)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(shown)), [claim.name for claim in reversed(shown)], fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1 / 8, 1 / 4, 1 / 2, 1, 2], ["1/8", "1/4", "1/2", "target", "2"])
    axes.set_xlabel("over the target, median and quartiles")
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.grid(axis="x", linewidth=0.3)
    figure.savefig(RESULTS / "targets.png", dpi=150)
    figure.savefig(RESULTS / "targets.svg", metadata={"Date": None})


def main() -> None:
    """Measure, compare, or both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, help="default: all")
    parser.add_argument("--check", action="store_true", help="compare with results/guard.json")
    parser.add_argument("--guard", action="store_true", help="write results/guard.json")
    parser.add_argument("--one", choices=BENCHMARKS, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        claims = import_module(arguments.one).measure(arguments.quick)
        print(json.dumps([asdict(claim) for claim in claims]))
    elif arguments.check:
        sys.exit(check(arguments.only or CHECKED))
    elif arguments.guard:
        guard(arguments.only or CHECKED)
    else:
        record(arguments.only or BENCHMARKS)


if __name__ == "__main__":
    main()
