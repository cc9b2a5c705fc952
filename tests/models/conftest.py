"""Models shared by the tests of this room: each is made and loaded once."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.models.configs import CASES

# Without torch, the reference, what remains is what needs none.
collect_ignore = [] if find_spec("torch") else ["test_parity.py", "test_checkpoint.py", "test_checkpoint_errors.py"]


@pytest.fixture(scope="session", params=list(CASES))
def case(request: pytest.FixtureRequest, made_case):
    return made_case(request.param)


@pytest.fixture(scope="session")
def made_case(tmp_path_factory: pytest.TempPathFactory):
    """A case by name."""
    from tests.models.cases import Case, make_case

    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            made[name] = make_case(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get
