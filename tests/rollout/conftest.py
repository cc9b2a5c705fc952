"""One model for the room's tests, so that its programs are compiled once."""

from __future__ import annotations

import pytest

from jaxrft.models import Decoder
from tests.rollout.tiny import random_model


@pytest.fixture(scope="session")
def model() -> Decoder:
    return random_model()
