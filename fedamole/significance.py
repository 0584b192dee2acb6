"""Whether the reference method differs from the others: Wilcoxon's signed-rank test.

A pair is the score of the reference and that of another method for one client and seed. Wilcoxon's
test (1945, Biometrics Bulletin 1) asks, two-sided, whether the differences lie symmetrically about
zero. Equal pairs are left out, as Wilcoxon did. The p value is exact up to 50 unequal pairs where
no two differences are equally large, and up to 12 also where some are; beyond that it is that of
the normal approximation, with the corrections for ties and for continuity.

The effect size is the rank-biserial correlation (Kerby 2014, Comprehensive Psychology 3): the share
of the rank sum in favour of the reference minus the share against it, from -1 to 1.

The clients of one seed share a backbone, a split of the data and, in most methods, what the server
averages. They are not independent, so that a p value is too small rather than too large.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from fedamole.comparison import compared, counted, known, note
from fedamole.records import METRIC_LABELS
from fedamole.rendering import PERCENT, Cell, Column
from fedamole.results import Metrics
from fedamole.stages import ResultsStage

EXACT_PAIRS = 50
# All 4096 signs of 12 differences take milliseconds.
EXACT_PAIRS_WITH_TIES = 12
# Scores are shares of a few hundred examples; what differs by less is a rounding error.
DECIMALS = 12
POOLED = "all scenarios"
_NOTES = (
    "Wilcoxon signed-rank test, two-sided; p (Holm): adjusted for all rows of the table.",
    "The clients of one seed share a backbone, a split and most of what is trained: they are not "
    "independent, and p is too small rather than too large.",
)


@dataclass(frozen=True)
class Comparison:
    """The reference method against another one.

    Attributes
    ----------
    pairs, unequal
        Pairs, and those whose scores differ.
    mean, median
        Of the differences, reference minus other, as a fraction; not a number without pairs.
    effect
        Rank-biserial correlation; not a number without unequal pairs.
    p
        Two-sided p value; not a number without unequal pairs.
    holm
        The same, adjusted for all comparisons of a table.
    kind
        ``exact``, ``normal``, or empty where there is no p value.
    """

    pairs: int
    unequal: int
    mean: float
    median: float
    effect: float
    p: float
    holm: float
    kind: str


def significance(metrics: Metrics, settings: ResultsStage) -> dict[str, dict[str, Comparison]]:
    """Compare the reference with every other method: scenario -> method -> comparison.

    With several scenarios the last entry, :data:`POOLED`, has the pairs of all of them; not in a
    sweep.
    """
    others = [method for method in settings.methods if method != settings.tables.reference]
    differences = {
        name: {method: _differences(metrics, settings, slugs, method) for method in others}
        for name, slugs in settings.scenarios.items()
    }
    # The points of a sweep have the same clients: pooled, each would count once per value.
    if len(differences) > 1 and not settings.sweep:
        pooled = {
            method: [d for found in differences.values() for d in found[method]]
            for method in others
        }
        differences[POOLED] = pooled
    return {name: compare(found) for name, found in differences.items()}


def _differences(
    metrics: Metrics, settings: ResultsStage, slugs: Sequence[str], method: str
) -> list[float]:
    """Score of the reference minus that of a method, for each client and seed."""
    found = []
    for slug in slugs:
        ours, theirs = (
            {record.client: record.score for record in counted(metrics, settings, slug, row)}
            for row in (settings.tables.reference, method)
        )
        found += [ours[k] - theirs[k] for k in sorted(compared(metrics, settings, slug))]
    return found


def compare(differences: Mapping[str, Sequence[float]]) -> dict[str, Comparison]:
    """Test the differences of each row of a table, and adjust the p values for their number."""
    tested = {
        method: _unequal_test([round(value, DECIMALS) for value in values])
        for method, values in differences.items()
    }
    adjusted = holm([p for _, _, p, _ in tested.values()])
    return {
        method: Comparison(
            pairs=len(values),
            unequal=tested[method][0],
            mean=fmean(values) if values else math.nan,
            median=median(values) if values else math.nan,
            effect=tested[method][1],
            p=tested[method][2],
            holm=corrected,
            kind=tested[method][3],
        )
        for (method, values), corrected in zip(differences.items(), adjusted, strict=True)
    }


def _unequal_test(differences: Sequence[float]) -> tuple[int, float, float, str]:
    """Number of unequal pairs, their rank-biserial correlation, p value, and its kind."""
    from scipy.stats import rankdata

    unequal = [value for value in differences if value]
    if not unequal:
        return 0, math.nan, math.nan, ""
    ranks = rankdata([abs(value) for value in unequal])
    signed = sum(math.copysign(rank, value) for rank, value in zip(ranks, unequal, strict=True))
    p, kind = wilcoxon_p(unequal)
    return len(unequal), float(signed / ranks.sum()), p, kind


def wilcoxon_p(unequal: Sequence[float]) -> tuple[float, str]:
    """Two-sided p value of differences that are not zero, and ``exact`` or ``normal``."""
    from scipy.stats import PermutationMethod, wilcoxon

    tied = len({abs(value) for value in unequal}) < len(unequal)
    if len(unequal) <= EXACT_PAIRS and not tied:
        return float(wilcoxon(unequal, method="exact").pvalue), "exact"
    if len(unequal) <= EXACT_PAIRS_WITH_TIES:
        every_sign = PermutationMethod(n_resamples=2**EXACT_PAIRS_WITH_TIES)
        return float(wilcoxon(unequal, method=every_sign).pvalue), "exact"
    return float(wilcoxon(unequal, method="asymptotic", correction=True).pvalue), "normal"


def holm(values: Sequence[float]) -> list[float]:
    """Adjust p values by the step-down method (Holm 1979, Scandinavian Journal of Statistics 6).

    What is no number stays so, and does not count as a test.
    """
    order = sorted((k for k, p in enumerate(values) if not math.isnan(p)), key=lambda k: values[k])
    adjusted, largest = [math.nan] * len(values), 0.0
    for step, k in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - step) * values[k]))
        adjusted[k] = largest
    return adjusted


def significance_columns(
    found: Mapping[str, Mapping[str, Comparison]], settings: ResultsStage
) -> dict[str, list[Column]]:
    """Columns of the table of each scenario; differences in percentage points."""
    signed = f"+.{settings.tables.decimals}f"
    return {
        name: [
            Column("pairs", {m: Cell(row.pairs) for m, row in rows.items()}, spec=".0f"),
            Column("unequal", {m: Cell(row.unequal) for m, row in rows.items()}, spec=".0f"),
            Column(
                "mean (points)",
                {m: Cell(PERCENT * row.mean) for m, row in rows.items()},
                spec=signed,
            ),
            Column(
                "median (points)",
                {m: Cell(PERCENT * row.median) for m, row in rows.items()},
                spec=signed,
            ),
            Column(
                "rank-biserial r", {m: Cell(row.effect) for m, row in rows.items()}, spec="+.2f"
            ),
            Column("p", {m: Cell(row.p) for m, row in rows.items()}, spec=".2g"),
            Column("p (Holm)", {m: Cell(row.holm) for m, row in rows.items()}, spec=".2g"),
        ]
        for name, rows in found.items()
    }


def significance_notes(metrics: Metrics, settings: ResultsStage, name: str) -> list[str]:
    """What is to be said below the table of a scenario, or of all of them."""
    names = list(settings.scenarios) if name == POOLED else [name]
    labels = list(dict.fromkeys(METRIC_LABELS[settings.metrics[each]] for each in names))
    mixed = [f"Differences of {' and '.join(labels)} are ranked together."]
    return [
        f"Differences: {settings.tables.reference} minus the other method, over the pairs "
        + ("(scenario, client, seed)." if name == POOLED else "(client, seed)."),
        *_NOTES,
        *(mixed if len(labels) > 1 else []),
        *(line for n in names for line in note(metrics, settings, settings.scenarios[n], n)),
    ]


def significance_rows(
    found: Mapping[str, Mapping[str, Comparison]], settings: ResultsStage
) -> list[dict[str, Any]]:
    """Rows of ``significance.csv``: differences as fractions; empty where there is no number."""
    return [
        {
            "scenario": name,
            "reference": settings.tables.reference,
            "method": method,
            "pairs": row.pairs,
            "unequal_pairs": row.unequal,
            "mean_difference": known(row.mean),
            "median_difference": known(row.median),
            "rank_biserial": known(row.effect),
            "p": known(row.p),
            "p_holm": known(row.holm),
            "test": row.kind,
        }
        for name, rows in found.items()
        for method, row in rows.items()
    ]
