"""The guard of the benchmarks: what it calls a loss. The benchmarks themselves are no tests."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("run", "measuring"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("value", "larger_is_better", "lost"),
    [
        (1.1, False, False),
        (1.16, False, True),
        (0.5, False, False),
        (0.9, True, False),
        (0.84, True, True),
        (2.0, True, False),
    ],
)
def test_a_loss_of_fifteen_percent_fails(value: float, larger_is_better: bool, lost: bool) -> None:
    import run
    from measuring import Claim

    claim = Claim("step", value, value, value, larger_is_better=larger_is_better, guarded=True)
    found = run.losses([claim], {"step": 1.0})
    assert bool(found) == lost
    assert all("committed 1" in text for text in found)


def test_only_guarded_claims_that_are_committed_are_compared() -> None:
    import run
    from measuring import Claim

    free, new = Claim("free", 9.0, 9.0, 9.0), Claim("new", 9.0, 9.0, 9.0, guarded=True)
    assert run.losses([free, new], {"free": 1.0}) == []


def test_a_table_says_which_targets_are_missed() -> None:
    import run
    from measuring import Claim

    missed = Claim("a", 2.0, 1.9, 2.1, target=1.5)
    reached = Claim("b", 5.0, 5.0, 5.0, target=4.0, larger_is_better=True)
    lines = run.table([missed, reached]).splitlines()
    assert lines[2] == "| a | 2 x [1.9, 2.1] | <= 1.5 x | NO |"
    assert lines[3] == "| b | 5 x | >= 4 x | yes |"


def test_every_benchmark_with_claims_is_run() -> None:
    import run

    claiming = {
        path.stem for path in BENCHMARKS.glob("*.py") if "def measure(quick" in path.read_text()
    }
    assert set(run.BENCHMARKS) == claiming
