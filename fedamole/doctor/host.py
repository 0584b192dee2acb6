"""One machine, be it where a person types or a node: packages, libraries, GPUs, scratch space."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fedamole.doctor.findings import Finding, error, ok, warning

# Oldest versions that work on a cluster.
PACKAGES = {"snakemake": (9, 10), "snakemake-executor-plugin-slurm": (2, 7, 1), "submitit": (1, 5)}
IMPORT_LIMIT_S = 300
# Slower than that, every job of a few minutes spends most of its time on it.
SLOW_IMPORT_S = 60
ENOUGH_SCRATCH_GB = 2

_LIBRARIES = """
import json, time
start = time.perf_counter()
import torch, deepspeed
found = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
found |= {"cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
found |= {"seconds": time.perf_counter() - start, "usable": torch.cuda.is_available()}
if found["usable"]:
    # A driver that is too old shows only when something is computed.
    found["device"] = torch.cuda.get_device_name(0)
    ones = torch.ones(8, 8, device="cuda")
    assert (ones @ ones).sum() == 512
print("FOUND", json.dumps(found))
"""


def packages() -> Iterator[Finding]:
    """Check the packages and commands that run the workflow."""
    versions, missing = [], False
    for name, oldest in PACKAGES.items():
        wanted = f"{name} >= {'.'.join(map(str, oldest))}"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing = True
            yield error("packages", f"{name} is not installed", f"pip install '{wanted}'")
            continue
        versions.append(f"{name} {version}")
        if tuple(map(int, re.findall(r"\d+", version)[: len(oldest)])) < oldest:
            missing = True
            yield error("packages", f"{name} {version} is too old", f"pip install '{wanted}'")
    if not missing:
        yield ok("packages", ", ".join(versions))
    if shutil.which("fedamole") is None:
        advice = f"activate the environment of {sys.executable}: jobs call the command"
        yield error("packages", "the command fedamole is not on the PATH", advice)


def libraries(needs_gpu: bool = False) -> Finding:
    """Import torch and DeepSpeed in a process of its own, with time.

    Parameters
    ----------
    needs_gpu
        Whether a GPU must be usable here.
    """
    what = "libraries"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LIBRARIES],
            capture_output=True,
            text=True,
            timeout=IMPORT_LIMIT_S,
            stdin=subprocess.DEVNULL,
            env=_environment(),
        )
    except subprocess.TimeoutExpired:
        value = f"import torch, deepspeed takes more than {IMPORT_LIMIT_S} s"
        return error(what, value, "install the environment on a faster file system")
    found = re.search(r"^FOUND (.*)$", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        words = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return error(what, f"import torch, deepspeed fails ({words})", "install fedamole anew")
    return _libraries(what, json.loads(found[1]), needs_gpu)


def _environment() -> dict[str, str]:
    """Keep DeepSpeed from a warning about its accelerator where there is no driver."""
    has_driver = Path("/dev/nvidiactl").exists()
    return {**({} if has_driver else {"DS_ACCELERATOR": "cpu"}), **os.environ}


def _libraries(what: str, found: dict[str, object], needs_gpu: bool) -> Finding:
    """Judge what an import of the libraries found."""
    device = f"{found['gpus']} x {found['device']}" if found["usable"] else "no GPU"
    value = f"torch {found['torch']} (CUDA {found['cuda'] or 'not built in'}, {device})"
    value += f", deepspeed {found['deepspeed']}, imported in {found['seconds']:.0f} s"
    if needs_gpu and not found["usable"]:
        advice = "check gpu_request in the profile, the driver, and that torch is built for CUDA"
        return error(what, f"{value}, and the study asks for GPUs", advice)
    if float(str(found["seconds"])) > SLOW_IMPORT_S:
        return warning(what, value, "every job waits so long; use a container or a faster disk")
    return ok(what, value)


def scratch_space() -> Finding:
    """Check the folder for temporary files."""
    what, folder = "TMPDIR", tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / 1e9
    if free < ENOUGH_SCRATCH_GB:
        return warning(what, f"{folder} has {free:.1f} GB free", "set TMPDIR to a larger folder")
    return ok(what, f"{folder}, {free:.1f} GB free")
