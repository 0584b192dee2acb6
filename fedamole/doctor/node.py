"""A look from a node: a small job reads and writes the results folder, and checks what it finds."""

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fedamole.config import Config
from fedamole.doctor import demands, folders
from fedamole.doctor.findings import Finding, error, ok, warning
from fedamole.snakemake_profile import Profile

START_LIMIT_S = 120
JOB_MINUTES = 5
JOB_MEM_MB = 4000
# A network file system may show a new file only after its cache of the folder has aged.
SEEN_LIMIT_S = 60
# What Snakemake waits, unless the profile says otherwise.
LATENCY_WAIT_S = 5
# Starts a line with a finding of the job; the site may print others.
MARK = "FINDING "
FOLDER = "node: shared folder"


def look(profile: Profile, config: Config | None) -> Iterator[Finding]:
    """Run the job of one task and give what it found.

    Parameters
    ----------
    profile
        Where it goes.
    config
        The study; without one the working folder stands for the results folder.
    """
    folder = Path(config.results) if config else Path.cwd()
    gpus = config.execution.gpus if config else 0
    with folders.scratch(folder) as place:
        token = secrets.token_hex(8)
        (place / "token").write_text(token)
        task = {"place": str(place), "token": token, "gpus": gpus, "here": str(Path.cwd())}
        task["config"] = config.model_dump_json(exclude_unset=True) if config else None
        command = [*_srun(profile, gpus), sys.executable, "-m", "fedamole.doctor.on_node"]
        code, output, words = _run([*command, json.dumps(task)])
        yield from (found := _found(output))
        if code:
            yield _failure(code, words, bool(found))
        elif not any(finding.level == "error" and finding.what == FOLDER for finding in found):
            yield _answer(place, token, profile)


def _srun(profile: Profile, gpus: int) -> list[str]:
    """Command that runs one task on one node, with a GPU if the study has some."""
    minutes = min(JOB_MINUTES, profile.number("max_runtime") or JOB_MINUTES)
    asked = demands.Demand(gpus=min(gpus, 1), mem_mb=JOB_MEM_MB, minutes=minutes)
    given = demands.options(asked, profile)
    name = ["--job-name=fedamole-doctor", f"--immediate={START_LIMIT_S}", "--export=ALL"]
    return ["srun", *given, *name]


def _run(command: list[str]) -> tuple[int, str, str]:
    """Run srun; its job ends with it.

    Returns
    -------
    tuple
        Exit status, what it printed, and its last words.
    """
    # Inside a job srun would start a step of it instead of asking for a node.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    kept |= {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=kept,
    ) as process:
        try:
            output, words = process.communicate(timeout=START_LIMIT_S + 60 * JOB_MINUTES)
        except subprocess.TimeoutExpired:
            process.terminate()
            output, words = process.communicate()
        except BaseException:
            # SLURM ends the job when srun is asked to end, not when it is killed.
            process.terminate()
            raise
    return process.returncode, output, words


def _found(output: str) -> list[Finding]:
    """Read what the job found."""
    lines = re.findall(rf"^{MARK}(.*)$", output, re.MULTILINE)
    return [Finding(**json.loads(line)) for line in lines]


def _failure(code: int, words: str, began: bool) -> Finding:
    """Say why the job did not come to its end."""
    said = " / ".join(line.strip() for line in words.strip().splitlines()[-3:])
    if "nodes are busy" in words or "queued and waiting" in words:
        value = f"the job did not start within {START_LIMIT_S} s ({said})"
        return warning("node", value, "the queue is busy; try again later")
    advice = f"{sys.executable} and fedamole must be on a file system that the nodes see"
    advice = "it ended in the check after the last one above" if began else advice
    return error("node", f"the job ended with exit status {code} ({said})", advice)


def _answer(place: Path, token: str, profile: Profile) -> Finding:
    """Wait for the file that the job wrote, and compare it with the waiting time of the profile."""
    what, answer, began = "answer of the node", place / "answer", time.monotonic()
    while time.monotonic() - began < SEEN_LIMIT_S:
        # Listing a folder makes a network file system look again.
        if answer in place.iterdir() and answer.read_text() == token:
            break
        time.sleep(0.2)
    else:
        value = f"its file in {place.parent} is not seen here after {SEEN_LIMIT_S} s"
        return error(what, value, "set results: to a shared file system")
    seconds = time.monotonic() - began
    wait = profile.option("latency-wait", LATENCY_WAIT_S)
    value = f"seen here after {seconds:.1f} s (latency-wait: {wait} s)"
    if seconds > wait:
        return warning(what, value, f"write latency-wait: {2 * round(seconds)} into {profile.path}")
    return ok(what, value)
