"""What a round of ten clients costs beside training and testing: start-up, and switching clients.

A job imports its libraries once, maps the backbone once, and then puts one client after another
into it. The share is that of all this in the CPU time of a round at the size of a small replica of
the paper: SmolLM2-135M, thirty steps a client; the time of a step is that by which more steps take
longer.

    python benchmarks/round.py [--quick]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from measuring import Claim, claim
from packing import SMOLLM2, Case, make_backbone, make_session, states_of

from fedamole import distributed
from fedamole.client import Start, locally_trained
from fedamole.launching import Layout
from fedamole.targets import BackboneFacts

STEPS = 30
IMPORTS = "import time; from fedamole import client; print(time.process_time())"


def import_seconds() -> float:
    """CPU seconds until a job can begin with its first client."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def client_seconds(case: Case, folder: Path, facts: BackboneFacts) -> tuple[float, float]:
    """CPU seconds of loading the backbone, and of all clients one after another."""
    began = time.process_time()
    session = make_session(case, folder, pack=1)
    session.backbone()
    loading = time.process_time() - began
    states = states_of(session, facts, folder)
    began = time.process_time()
    for client, state in states.items():
        with locally_trained(session, client, 1, Start(state, with_embedding_set=False)):
            pass
    return loading, time.process_time() - began


def shares(case: Case, repeats: int) -> np.ndarray:
    """Part of the CPU time of a round that is neither training nor testing."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = make_backbone(case, folder)
        for _ in range(repeats):
            loading, few = client_seconds(case, folder, facts)
            _, more = client_seconds(replace(case, steps=3 * case.steps), folder, facts)
            # What does not grow with the steps is start and end of the clients' turns.
            step = (more - few) / (2 * case.steps)
            beside = import_seconds() + loading + few - case.steps * step
            found.append(beside / (beside + STEPS * step))
    return np.array(found)


def measure(quick: bool) -> list[Claim]:
    """All claims."""
    torch.set_num_threads(1)
    shape = {**SMOLLM2, "num_hidden_layers": 4} if quick else SMOLLM2
    case = Case("", shape, "float32", 3 if quick else 10, (128, 128), 2, None)
    with distributed.process_group(Layout()):
        found = shares(case, 1 if quick else 2)
    name = f"round: share of all but training and testing, {case.clients} clients x {STEPS} steps"
    return [claim(name, 100 * found, unit="%", target=None if quick else 10.0)]


def main() -> None:
    """Print the claims."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer clients")
    for found in measure(parser.parse_args().quick):
        print(f"{found.name}: {found.value:.1f} % [{found.low:.1f}, {found.high:.1f}]")


if __name__ == "__main__":
    main()
