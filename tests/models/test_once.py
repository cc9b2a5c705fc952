"""Results that are kept, of functions that several threads call."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxrft.models.once import Once


def test_threads_share_one_call():
    calls, entered, go_on = [], threading.Event(), threading.Event()

    @Once
    def slow(a, *, b=0):
        """Says what it does."""
        calls.append((a, b))
        if a == 1:
            entered.set()
            assert go_on.wait(10)
        return a + b

    assert (slow.__doc__, slow.__name__) == ("Says what it does.", "slow")
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(slow, 1, b=2)
        assert entered.wait(10)
        others = [pool.submit(slow, 1, b=2) for _ in range(3)]
        # Another's result does not wait for it.
        assert slow(5) == 5
        assert not any(other.done() for other in others)
        go_on.set()
        assert [future.result(10) for future in (first, *others)] == [3] * 4
    assert slow(1, b=2) == 3
    assert calls == [(1, 2), (5, 0)]
    slow.cache_clear()
    assert slow(5) == 5
    assert calls == [(1, 2), (5, 0), (5, 0)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_come_up_in_all_that_wait_and_are_not_kept(error):
    """But for Ctrl-C, which is the business of the thread that it came to: another calls again."""
    failing, entered, looked_up = [error("wrong")], threading.Event(), threading.Event()

    class Argument:
        def __hash__(self):
            # Within the lock: whoever has come this far finds the call under way.
            if entered.is_set():
                looked_up.set()
            return 0

    @Once
    def fails(argument):
        if failing:
            entered.set()
            assert looked_up.wait(10)
            raise failing.pop()
        return 1

    argument = Argument()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fails, argument)
        assert entered.wait(10)
        second = pool.submit(fails, argument)
        with pytest.raises(error, match="wrong"):
            first.result(10)
        if error is KeyboardInterrupt:
            assert second.result(10) == 1
        else:
            with pytest.raises(error, match="wrong"):
                second.result(10)
    assert fails(argument) == 1
