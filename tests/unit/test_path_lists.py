"""Paths in braces, against the bash that expands them."""

import subprocess

import pytest

from fedamole.path_lists import braced


def expanded(text: str) -> list[str]:
    """What bash makes of words."""
    script = f"printf '%s\\0' {text}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize(
    "paths",
    [
        ["a/round_001/metrics_000.json", "a/round_001/metrics_001.json", "a/round_002/b.json"],
        ["only.json"],
        ["a/1", "a/11", "a/111", "a/1"],
        ["b/x_2", "a/x_1", "b/x_1"],
        ["it's/{a,b} $HOME/x 1,2.json", "it's/{a,b} $HOME/x 3}.json"],
    ],
)
def test_bash_makes_the_same_paths_in_the_same_order(paths: list[str]) -> None:
    assert expanded(braced(paths)) == paths


def test_a_large_study_fits_into_a_script() -> None:
    """Linux takes 128 KiB for one argument of a process, here the text that bash gets."""
    run = f"/{'r' * 60}/runs/chatterbot-dir0.5-s42/fedamole"
    paths = [
        f"{run}/round_{round_:03d}/aggregated_{client:03d}.json"
        for round_ in range(1, 31)
        for client in range(50)
    ]
    assert len(" ".join(paths)) > 2**17
    assert len(braced(paths)) < 2**14
    assert expanded(braced(paths)) == paths
