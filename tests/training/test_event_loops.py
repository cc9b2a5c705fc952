"""Event loops that end their tasks before they close."""

import asyncio

import pytest

from jaxrft.training import event_loops


def test_tasks_end_before_their_loop_closes():
    ended = []

    async def late(seconds):
        await asyncio.sleep(seconds)
        if seconds < 0.05:
            # One that is begun while the others are waited for.
            tasks.append(asyncio.ensure_future(late(0.05)))
        ended.append(seconds)
        raise OSError("heard by nobody")

    async def fails():
        tasks.extend(asyncio.ensure_future(late(seconds)) for seconds in (0.02, 0.1))
        raise KeyError

    tasks: list[asyncio.Task] = []
    before = asyncio.get_event_loop_policy()
    with event_loops.drained():
        loop = asyncio.new_event_loop()
        with pytest.raises(KeyError):
            loop.run_until_complete(fails())
        loop.close()
    assert sorted(ended) == [0.02, 0.05, 0.1]
    assert loop.is_closed()
    assert asyncio.get_event_loop_policy() is before
