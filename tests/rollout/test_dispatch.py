"""Requests spread over servers: how many at a time, what is tried again, and how it ends early."""

import threading
import time

import httpx
import pytest

from jaxrft.rollout.errors import EngineError
from jaxrft.rollout.vllm import dispatch
from jaxrft.rollout.vllm.dispatch import Dispatcher


class Server:
    """Answers with its own name; ``work`` may wait or raise, and is given the payload and the number of its tries."""

    def __init__(self, name="server", work=lambda payload, tries: None):
        self.name, self._work = name, work
        self.running, self.most, self.answered, self.tries = 0, 0, [], {}
        self.pings = 0
        self.aborted = threading.Event()
        self._lock = threading.Lock()

    def generate(self, payload):
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.tries[payload["number"]] = tries = self.tries.get(payload["number"], 0) + 1
        try:
            self._work(payload, tries)
        finally:
            with self._lock:
                self.running -= 1
                self.answered.append(payload["number"])
        return {"by": self.name, **payload}

    def abort(self):
        self.aborted.set()

    def ping(self):
        self.pings += 1


def payloads(count):
    return [{"number": number} for number in range(count)]


def gate(parties):
    """Work that goes on when so many requests are under way together."""
    barrier = threading.Barrier(parties)
    return lambda payload, tries: barrier.wait(20)


def test_as_many_at_a_time_as_servers_take():
    """6 requests run together on 2 servers, 3 on each and never more; answers stand in the order of requests."""
    work = gate(6)
    servers = [Server(name, work) for name in "ab"]
    seen = []
    answers = Dispatcher(servers, 3).run(payloads(24), lambda *answered: seen.append(answered))
    assert [answer["number"] for answer in answers] == list(range(24))
    assert [server.most for server in servers] == [3, 3]
    assert sorted(place for place, _ in seen) == list(range(24))
    assert all(answer is answers[place] for place, answer in seen)
    # Each round of 6 is even, as nobody is done before the others.
    assert [len(server.answered) for server in servers] == [12, 12]


def test_fewer_requests_than_room():
    """They are spread all the same: 4 requests over 2 servers of 8 are 2 each."""
    work = gate(4)
    servers = [Server(name, work) for name in "ab"]
    Dispatcher(servers, 8).run(payloads(4))
    assert [server.most for server in servers] == [2, 2]


def test_the_faster_server_gets_more():
    """One that hangs until all others are done answers but one request."""
    rest = threading.Event()
    done = []

    def quick(payload, tries):
        done.append(payload)
        if len(done) == 19:
            rest.set()

    slow = Server("slow", lambda payload, tries: rest.wait(20))
    fast = Server("fast", quick)
    Dispatcher([slow, fast], 1).run(payloads(20))
    assert (len(slow.answered), len(fast.answered)) == (1, 19)


def test_nothing_to_do():
    assert Dispatcher([Server()], 2).run([]) == []


def refusing(number, times, error):
    def work(payload, tries):
        if payload["number"] == number and tries <= times:
            raise error

    return work


def test_a_lost_connection_is_tried_again():
    server = Server(work=refusing(2, 1, httpx.ConnectError("refused")))
    answers = Dispatcher([server], 2).run(payloads(5))
    assert [answer["number"] for answer in answers] == list(range(5))
    assert server.tries == {0: 1, 1: 1, 2: 2, 3: 1, 4: 1}


@pytest.mark.parametrize(
    ("error", "tries", "message"),
    [
        (httpx.ConnectError("refused"), 2, r"^server: the connection broke off twice \(ConnectError\): does it still"),
        (httpx.ReadTimeout("late"), 1, r"^server: a request took longer than rollout\.vllm\.request_seconds; raise it"),
    ],
)
def test_a_request_that_fails(error, tries, message):
    """Others that are under way are ended, what is waiting is not sent. What took too long would do so again."""
    server = Server(work=refusing(0, 2, error))
    with pytest.raises(EngineError, match=message):
        Dispatcher([server], 1).run(payloads(1))
    assert server.tries == {0: tries}
    assert server.aborted.is_set()


def test_a_refused_request_ends_all_at_once():
    server = Server(work=refusing(1, 9, EngineError("server: refused a request (400): too long")))
    with pytest.raises(EngineError, match="too long"):
        Dispatcher([server], 1).run(payloads(50))
    assert server.tries[1] == 1
    assert len(server.tries) < 50


def test_what_a_caller_raises_ends_all():
    """As an interrupt does: requests under way are ended and waited for, and what was raised is raised again."""

    class InterruptedError(Exception):
        pass

    servers = [Server(name) for name in "ab"]
    for server in servers:
        server._work = lambda payload, tries, server=server: payload["number"] and server.aborted.wait(20)

    def interrupt(place, answer):
        raise InterruptedError(place)

    before = threading.active_count()
    with pytest.raises(InterruptedError, match="0"):
        Dispatcher(servers, 2).run(payloads(40), interrupt)
    assert all(server.aborted.is_set() for server in servers)
    assert [server.running for server in servers] == [0, 0]
    assert threading.active_count() == before
    assert sum(len(server.answered) for server in servers) <= 5


def test_abort_from_another_thread():
    """Requests under way answer with what they have, those not yet sent with None."""
    under_way = threading.Barrier(3)

    def work(payload, tries):
        under_way.wait(20)
        server.aborted.wait(20)

    server = Server(work=work)
    dispatcher = Dispatcher([server], 2)
    aborting = threading.Thread(target=lambda: (under_way.wait(20), dispatcher.abort()))
    aborting.start()
    answers = dispatcher.run(payloads(6))
    aborting.join()
    assert [answer is None for answer in answers] == [False, False, True, True, True, True]


def test_a_server_that_stands_still_is_stirred(monkeypatch):
    """It answers when it is asked for anything else, as one does whose event loop missed an event."""
    monkeypatch.setattr(dispatch, "WAIT_SECONDS", 0.05)
    stirred = threading.Event()

    class Still(Server):
        def ping(self):
            super().ping()
            stirred.set()

    def work(payload, tries):
        assert stirred.wait(20)

    still = Still(work=work)
    assert len(Dispatcher([still], 1).run(payloads(1))) == 1
    assert still.pings >= 1


def test_a_request_that_slips_past_an_abort(monkeypatch):
    """It was on its way when the server was told to end all: the server is told again; one that hangs is left alone."""
    monkeypatch.setattr(dispatch, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(dispatch, "END_SECONDS", 1.0)
    arrived, told, over = threading.Event(), [], threading.Event()

    class Deaf(Server):
        def abort(self):
            told.append(time.monotonic())

    def work(payload, tries):
        arrived.set()
        while len(told) < 3:
            time.sleep(0.01)
        if payload["number"] == 1:
            over.wait(20)

    dispatcher = Dispatcher([Deaf(work=work)], 2)
    aborting = threading.Thread(target=lambda: (arrived.wait(20), dispatcher.abort()))
    aborting.start()

    def stop():
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        dispatcher.run(payloads(2), on_wait=stop)
    aborting.join()
    assert len(told) >= 3
    over.set()


def test_a_server_that_is_gone_cannot_be_told_to_end():
    """The others are told, and the caller hears of the first failure, not of this one."""

    class Gone(Server):
        def abort(self):
            super().abort()
            raise EngineError("gone: no answer")

    gone, other = Gone("gone", refusing(0, 9, EngineError("gone: ended"))), Server("other")
    # The other server leaves the first request to the one that is gone.
    other._work = lambda payload, tries: time.sleep(0.001)
    with pytest.raises(EngineError, match="gone: ended"):
        Dispatcher([gone, other], 1).run(payloads(200))
    assert other.aborted.is_set()
