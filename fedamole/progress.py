"""How far the clients of a round are: what each is doing, and the files of those that are done.

A job of several clients may die when some of them are finished, and Snakemake then removes its
outputs. So each client's files first appear here, in a folder of the round that is no output, and
move to their places when all clients of the job are done. A retry finds them, and checks by their
headers that they are what it would compute.

Beside them lies a small record of every client, which says where and since when it runs, how long
it took, or why it failed: for people and for ``fedamole status``. No result depends on it.
"""

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from fedamole.artifacts import canonical, replacing
from fedamole.errors import FedamoleError
from fedamole.meter import ClientCosts, Machine

Work = Literal["train", "test"]
State = Literal["running", "done", "failed", "dropped"]


@dataclass(frozen=True)
class ClientProgress:
    """What one client is doing in one round.

    Attributes
    ----------
    work
        ``train`` (train-clients) or ``test`` (evaluate-clients).
    client
        Index of the client.
    state
        ``running``: began and has not ended; whether its job still lives, only the scheduler knows.
        ``dropped``: failed for good, and the round goes on without it.
    started
        Seconds since 1970.
    seconds
        What it took; None while it runs. Of what a pack does together it counts its share: all that
        the pack took for it, divided by its clients.
    host, process, job
        Where: host name, process number, and SLURM job, None outside SLURM.
    error
        Why it failed, in one line.
    attempt
        How often it was begun since it was last done; an attempt that was interrupted from outside
        does not count.
    digest
        Of the settings it was begun with: attempts with others do not count either.
    ended
        Seconds since 1970; None while it runs, and in records of older versions.
    pack
        Clients that were begun together: as many times its share go by until it ends.
    costs
        What it cost in detail; None unless it is done, and in records of older versions.
    """

    work: Work
    client: int
    state: State
    started: float
    seconds: float | None = None
    host: str = ""
    process: int = 0
    job: int | None = None
    error: str | None = None
    attempt: int = 1
    digest: str = ""
    ended: float | None = None
    pack: int = 1
    costs: ClientCosts | None = None


class RoundProgress:
    """The progress of one round of one run, in a folder.

    Parameters
    ----------
    folder
        Folder of the round; made when something is written.
    work
        What the job does with its clients.
    digest
        Of the settings of the job.
    """

    def __init__(self, folder: Path, work: Work, digest: str = "") -> None:
        self.folder = folder
        self.work = work
        self.digest = digest

    def kept(self, output: Path) -> Path:
        """Where the file of a finished client waits for the others of its job."""
        return self.folder / output.name

    def start(self, client: int, is_try: bool = True, pack: int = 1) -> ClientProgress:
        """Say that a client begins.

        Parameters
        ----------
        client
            Who.
        is_try
            Whether an end of its process would be a failure of this client; see `count_try`.
        pack
            Clients that begin together.
        """
        job = os.environ.get("SLURM_JOB_ID", "")
        now = ClientProgress(
            work=self.work,
            client=client,
            state="running",
            started=round(time.time(), 1),
            host=socket.gethostname(),
            process=os.getpid(),
            job=int(job) if job.isdigit() else None,
            attempt=self.attempts(client) + is_try,
            digest=self.digest,
            pack=pack,
        )
        return self._write(now)

    def count_try(self, began: ClientProgress) -> ClientProgress:
        """Say that a client that was begun with others has its own turn now."""
        return self._write(replace(began, attempt=began.attempt + 1))

    def attempts(self, client: int) -> int:
        """How often a client was begun without an end that counts."""
        before = self._read(client)
        if before is None or before.digest != self.digest:
            return 0
        return before.attempt if before.state in ("running", "failed") else 0

    def reason(self, client: int) -> str:
        """Why a client that was begun has failed the last time."""
        before = self._read(client)
        return (before and before.error) or "its job was ended"

    def drop(self, client: int) -> str:
        """Say that a round goes on without a client; give the reason of its last failure."""
        before = self._read(client)
        assert before is not None, "only a client that was begun can be dropped"
        reason = self.reason(client)
        self._write(replace(before, state="dropped", error=reason))
        return reason

    def end(
        self,
        began: ClientProgress,
        error: str | None = None,
        interrupted: bool = False,
        seconds: float | None = None,
        costs: ClientCosts | None = None,
    ) -> ClientProgress:
        """Say that a client is done, or why it failed.

        Parameters
        ----------
        began
            What was said when it began.
        error
            Why it failed; None if it is done.
        interrupted
            Whether it was ended from outside, and so had no try.
        seconds
            What it took; default: all that went by since it began.
        costs
            What it cost in detail.
        """
        now = time.time()
        return self._write(
            replace(
                began,
                state="failed" if error else "done",
                seconds=round(now - began.started if seconds is None else seconds, 1),
                error=error,
                attempt=began.attempt - interrupted,
                ended=round(now, 1),
                costs=costs,
            )
        )

    def _path(self, client: int) -> Path:
        return self.folder / f"{self.work}_{client:03d}.json"

    def _read(self, client: int) -> ClientProgress | None:
        """What was last said of a client; None where nothing can be read."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            text = self._path(client).read_text(encoding="utf-8")
            return _parsed(text)
        return None

    def _write(self, progress: ClientProgress) -> ClientProgress:
        with replacing(self._path(progress.client)) as scratch:
            scratch.write_text(canonical(asdict(progress)) + "\n", encoding="utf-8")
        return progress

    def finished(
        self, outputs: Mapping[int, list[Path]], is_current: Callable[[Path], bool]
    ) -> set[int]:
        """Clients of an earlier attempt whose files are all here and are what is wanted.

        Parameters
        ----------
        outputs
            Client -> the files it has to write.
        is_current
            Whether a file exists and was made from the inputs of this job.
        """
        if self.folder.is_dir():
            # Asks a network file system for the names that are there by now.
            list(self.folder.iterdir())
        return {
            client
            for client, paths in outputs.items()
            if all(is_current(self.kept(path)) or is_current(path) for path in paths)
        }

    def publish(
        self, outputs: Mapping[int, list[Path]], is_current: Callable[[Path], bool]
    ) -> None:
        """Give the files of all clients of the job their places, and forget them here.

        They are linked first and removed at the end: a job killed while it links loses none. A file
        that is in its place already comes from a copy of this job on a node that SLURM had given
        up; it stays as it is, since what follows may have read it.

        Parameters
        ----------
        outputs, is_current
            See :meth:`finished`.
        """
        paths = [path for files in outputs.values() for path in files]
        for path in paths:
            if is_current(path):
                continue
            with replacing(path) as scratch:
                try:
                    os.link(self.kept(path), scratch)
                except OSError:
                    # File systems without hard links.
                    shutil.copyfile(self.kept(path), scratch)
                # Newer than every input, also where an earlier attempt made it.
                os.utime(scratch)
        for path in paths:
            self.kept(path).unlink(missing_ok=True)


def read_progress(folder: Path) -> list[ClientProgress]:
    """Read what the clients of a round are doing, ordered by work and client.

    Raises
    ------
    FedamoleError
        If a record is none of fedamole's.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        if not path.name.startswith(("train_", "test_")):
            continue
        try:
            found.append(_parsed(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            continue
        except (ValueError, TypeError) as error:
            raise FedamoleError(f"{path}: is no record of a client's progress ({error})") from error
    return found


def _parsed(text: str) -> ClientProgress:
    """Make a record of its JSON text; what older versions did not say has its default."""
    content = json.loads(text)
    if costs := content.get("costs"):
        machine = costs.get("machine")
        costs["machine"] = machine and Machine(**machine)
        content["costs"] = ClientCosts(**costs)
    return ClientProgress(**content)
