import pytest

from tests.experiments.programs import Programs


@pytest.fixture(scope="session")
def programs():
    found = Programs()
    yield found
    found.close()
