"""Event loops that other people's code makes and closes while their tasks still run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


class _DrainedLoop(asyncio.SelectorEventLoop):
    """Ends its tasks before it closes."""

    def close(self) -> None:
        if not self.is_closed() and not self.is_running():
            while tasks := asyncio.all_tasks(self):
                self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


class _Policy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _DrainedLoop()


@contextlib.contextmanager
def drained() -> Iterator[None]:
    """Within the block, new event loops run their tasks to the end before they close.

    Where one array of a checkpoint cannot be read, Orbax closes its loop while the reads of the others go on in native
    threads. These report to the closed loop, and processes were seen to die of it, without a word.
    """
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_Policy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)
