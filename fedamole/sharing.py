"""Studies that share a results folder: what another left there must be what this one would make.

Light (no torch, no SciPy): the Snakefile checks it while it is parsed.
"""

from pathlib import Path

from fedamole.artifacts import Header
from fedamole.errors import FedamoleError
from fedamole.manifest import metrics_name
from fedamole.records import KIND
from fedamole.results import expected, json_line
from fedamole.stages import ResultsStage


def check_shared(folder: Path, settings: ResultsStage) -> None:
    """Make sure that the metrics of a study that are there already have its settings.

    Runs have no study in their paths, so that studies can share them: one of other settings would
    write over them. Only the first line of each file is read; files that are missing are fine.

    Parameters
    ----------
    folder
        Metrics files of the studies.
    settings
        This study.

    Raises
    ------
    FedamoleError
        Names the first file of other settings, or that is no metrics file.
    """
    for slug, method in expected(settings):
        path = folder / metrics_name(slug, method)
        found, wanted = _digest(path), settings.digests[slug][method]
        if found is not None and found != wanted:
            raise FedamoleError(
                f"{path}: was made with other settings or by other code (digest {found[:12]}, the "
                f"config gives {wanted[:12]}), maybe for another study of this folder, which would "
                "be overwritten; take another results folder, or move the file away"
            )


def _digest(path: Path) -> str | None:
    """Digest in the header of a metrics file; None if there is no file."""
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            line = stream.readline()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FedamoleError(f"{path}: cannot be read ({error.strerror})") from error
    header = Header.from_mapping(json_line(path, 0, line).get("header"), path)
    header.check(path, KIND, None)
    return header.digest
