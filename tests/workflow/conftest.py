"""A finished smoke run that the workflow tests copy and change."""

import pytest
from workflow_study import Study, new_study


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The smoke study, run once; not to be changed."""
    study = new_study(tmp_path_factory.mktemp("finished") / "study")
    study.run()
    return study
