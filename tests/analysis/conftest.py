"""The records in the repository, read once."""

import pytest

from analysis.records import Records
from macbench.cli import CONF


@pytest.fixture(scope="session")
def records() -> Records:
    return Records(CONF.parent / "runs" / "reference")
