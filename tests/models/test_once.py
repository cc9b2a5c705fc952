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


def test_an_error_is_not_kept():
    """Nor Ctrl-C: who waited calls for itself."""
    failing, entered, go_on = [ValueError("wrong"), KeyboardInterrupt("wrong")], threading.Event(), threading.Event()

    @Once
    def fails():
        entered.set()
        assert go_on.wait(10)
        if failing:
            raise failing.pop()
        return 1

    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(fails)]
        assert entered.wait(10)
        calls += [pool.submit(fails) for _ in range(2)]
        go_on.set()
        with pytest.raises(KeyboardInterrupt):
            calls[0].result(10)
        outcomes = sorted(repr(call.exception(10) or call.result(10)) for call in calls[1:])
    assert outcomes == ["1", "ValueError('wrong')"]
    assert fails() == 1
