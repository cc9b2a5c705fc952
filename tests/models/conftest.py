"""Models shared by the tests of this room: each is made and loaded once."""

from __future__ import annotations

import pytest

from tests.models.cases import CASES, Case, make_case


@pytest.fixture(scope="session", params=list(CASES))
def case(request: pytest.FixtureRequest, made_case) -> Case:
    return made_case(request.param)


@pytest.fixture(scope="session")
def made_case(tmp_path_factory: pytest.TempPathFactory):
    """A case by name."""
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            made[name] = make_case(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get
