"""Every test with a ``case`` runs for every row of the matrix."""

import pytest

from tests.methods.cases import CASES, Case


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]
