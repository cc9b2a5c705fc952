"""What the data room hands on: prompts."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row of a dataset, ready to be answered.

    Attributes:
        index: row in the dataset, before shuffling; stable over epochs and runs.
        value: the ``prompt`` column as it is: text, or a list of chat messages. Rewards see this.
        text: the same after the chat template; what the model reads.
        token_ids: ``text`` in tokens, at most ``max_prompt_length``.
        columns: all other columns of the row, handed to the rewards by name.
    """

    index: int
    value: str | list[dict[str, Any]]
    text: str
    token_ids: list[int]
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)
