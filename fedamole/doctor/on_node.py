"""What the small job of ``fedamole doctor --from-node`` does on its node."""

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedamole import __version__
from fedamole.config import Config, parse
from fedamole.doctor import folders, host, study
from fedamole.doctor.findings import Finding, attempt, error, ok
from fedamole.doctor.node import FOLDER, MARK, SEEN_LIMIT_S


def main(task: dict[str, Any]) -> None:
    """Print what there is to see from here, a line for each finding."""
    for finding in _see(task):
        named = replace(finding, what=f"node: {finding.what.removeprefix('node: ')}")
        print(MARK + json.dumps(asdict(named)), flush=True)


def _see(task: dict[str, Any]) -> Iterator[Finding]:
    """Look at what a training job needs."""
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "python": lambda: [_python()],
        "working folder": lambda: [_working_folder(task["here"])],
        FOLDER: lambda: _shared_folder(Path(task["place"]), task["token"]),
        "packages": host.packages,
        "libraries": lambda: [host.libraries(task["gpus"] > 0)],
        "TMPDIR": lambda: [host.scratch_space()],
    }
    if task["config"]:
        config = parse(Config, task["config"], "config")
        checks["backbone"] = lambda: [study.backbone(config, offline_is_error=True)]
        checks["data"] = lambda: study.data(config, offline_is_error=True)
    for what, check in checks.items():
        yield from attempt(what, check)


def _python() -> Finding:
    """Where this runs."""
    names = os.environ.get("SLURMD_NODENAME", ""), socket.gethostname()
    where = " on host ".join(dict.fromkeys(name for name in names if name))
    version = platform.python_version()
    return ok("python", f"{where}: {sys.executable} {version}, fedamole {__version__}")


def _working_folder(expected: str) -> Finding:
    """Check that the job runs in the folder that it was submitted from: Snakemake's jobs do."""
    here = str(Path.cwd())
    if here != expected:
        advice = "call Snakemake in a folder that the nodes see"
        return error("working folder", f"{expected} is not seen; the job ran in {here}", advice)
    return ok("working folder", here)


def _shared_folder(place: Path, token: str) -> Iterator[Finding]:
    """Read the token, and answer by a file that appears whole."""
    if not _appears(place / "token", token):
        value = f"{place.parent} on this node is not that of the host that submits"
        yield error(FOLDER, value, "set results: to a shared file system")
        return
    (place / "scratch").write_text(token)
    (place / "scratch").replace(place / "answer")
    point, kind = folders.file_system(place)
    yield ok(FOLDER, f"{place.parent}: read and written ({kind} on {point})")
    yield folders.skew("clock", place)


def _appears(path: Path, text: str) -> bool:
    """Whether a file is there, now or when a network file system has looked again."""
    began = time.monotonic()
    while time.monotonic() - began < SEEN_LIMIT_S:
        try:
            return path.read_text() == text
        except FileNotFoundError:
            # Without the folder above there is nothing to wait for.
            if not path.parent.parent.is_dir():
                return False
            time.sleep(0.5)
    return False


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
