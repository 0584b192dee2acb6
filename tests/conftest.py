"""Fixtures that several test modules use."""

import os
from pathlib import Path

import pytest

# Equal bytes are promised on CPUs; and two ranks need two GPUs where torch sees one.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real public data, which are not part of the project; see its README."""
    shared = Path(os.environ.get("FEDAMOLE_SHARED") or CHECKOUT.parent / "shared")
    if not (shared / "data").is_dir():
        pytest.skip("no real data: set FEDAMOLE_SHARED to a folder that holds data/")
    return shared / "data"


@pytest.fixture(scope="session")
def configs() -> Path:
    """Folder of the configs that come with the project."""
    return CHECKOUT / "configs"
