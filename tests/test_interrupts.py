"""Ctrl-C beside threads that work: it ends a wait, and locks up nobody."""

import concurrent.futures
import signal
import threading
import time

import pytest

from freeflow.interrupts import looks, uninterrupted


@pytest.fixture(autouse=True)
def ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def struck_while_locking(monkeypatch):
    """Ctrl-C between the locks of the first job and of the second."""
    entered = concurrent.futures._base._AcquireFutures.__enter__

    def enter(self):
        self.futures[0]._condition.acquire()
        signal.raise_signal(signal.SIGINT)
        self.futures[0]._condition.release()
        return entered(self)

    monkeypatch.setattr(concurrent.futures._base._AcquireFutures, "__enter__", enter)


@pytest.mark.usefixtures("struck_while_locking")
@pytest.mark.parametrize("careful", [True, False])
def test_ctrl_c_among_the_locks_of_jobs(careful):
    go = threading.Event()
    threads = concurrent.futures.ThreadPoolExecutor(2)
    jobs = [threads.submit(go.wait, 10) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        if careful:
            list(looks(jobs))
        else:
            concurrent.futures.wait(jobs, timeout=0.2)
    go.set()
    time.sleep(0.2)
    handed_in = all(job._state == "FINISHED" for job in jobs)
    assert handed_in == careful  # what careless waiting comes to: a job that never ends
    for job in () if careful else jobs:
        while job._condition._is_owned():
            job._condition.release()
    threads.shutdown()


def test_looks_end_with_the_jobs_or_the_first_failure():
    go = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        ends = threads.submit(time.sleep, 0.3)
        assert 1 <= len(list(looks([ends]))) <= 30
        waits, fails = threads.submit(go.wait, 10), threads.submit(lambda: 1 / 0)
        assert len(list(looks([waits, fails]))) <= 1
        assert not waits.done()
        go.set()
    assert list(looks([])) == []


def test_held_back_until_the_block_has_ended():
    went_on = False
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        went_on = True
    assert went_on
    with pytest.raises(KeyboardInterrupt):  # the handler is back
        signal.raise_signal(signal.SIGINT)


def test_who_ignores_ctrl_c_still_does_and_threads_do_not_care():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        assert threads.submit(lambda: list(looks([]))).result() == []
