"""Fixtures that several unit tests use."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from federation import Federation


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """The process group of a job of one process, for the tests of a module."""
    from fedamole.distributed import process_group
    from fedamole.launching import Layout

    with process_group(Layout()):
        yield


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> "Federation":
    """Three clients over a tiny backbone that is prepared as the command does it."""
    from federation import Federation

    from fedamole.artifacts import Header, write_record
    from fedamole.backbone import describe

    made = Federation(tmp_path_factory.mktemp("federation") / "backbone")
    facts = describe(made.folder, made.stage("fedit").run.backbone)
    write_record(made.folder / "backbone.json", Header("backbone", "0" * 64), facts)
    return made
