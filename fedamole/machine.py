"""The machine that numbers come from, as far as they may depend on it: no host, path or time."""

import importlib.metadata
import os
import platform
from pathlib import Path

from fedamole.settings import Section

PACKAGES = ("deepspeed", "torch", "transformers")


class Platform(Section):
    """What a study ran on."""

    processor: str
    """Name of the processor, with its generation and widest instructions."""
    cores: int
    """Logical cores."""
    system: str
    """Operating system, instruction set and C library."""
    python: str
    """Version of Python."""
    packages: dict[str, str]
    """Package -> version, of those that compute the numbers and are installed."""


def this_platform() -> Platform:
    """Describe what this process runs on; no package is imported."""
    system = [platform.system(), platform.machine(), *platform.libc_ver()]
    return Platform(
        processor=processor(),
        cores=os.cpu_count() or 1,
        system=" ".join(filter(None, system)),
        python=platform.python_version(),
        packages=_versions(),
    )


def processor() -> str:
    """Name the kind of processor: machines of one name differ in generation and in instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (s.partition(":") for s in lines)}
    if not {"model name", "flags", "cpu family", "model"} <= set(facts):
        return platform.machine()
    wide = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in facts["flags"]]
    kind = f"family {facts['cpu family']}, model {facts['model']}"
    return f"{facts['model name']} ({', '.join([kind, *wide])})"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
