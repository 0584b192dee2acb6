"""Fixtures that several unit tests use."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """The process group of a job of one process, for the tests of a module."""
    from fedamole.distributed import process_group
    from fedamole.launching import Layout

    with process_group(Layout()):
        yield
