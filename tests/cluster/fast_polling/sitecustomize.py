"""Snakemake asks SLURM for its jobs every second instead of every ten and more.

Python imports this by its name from PYTHONPATH. The tests alone do so: a shared cluster would not
like it.
"""

import asyncio
import sys

if "snakemake" in " ".join(sys.orig_argv[:3]) and "--mode" not in sys.orig_argv:
    from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

    async def _sleep(self: RemoteExecutor) -> None:
        await asyncio.sleep(1)

    RemoteExecutor.sleep = _sleep
