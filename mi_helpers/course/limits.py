"""A time limit on a call, in a notebook's kernel and elsewhere.

Where there are signals (the main thread on Linux and macOS) a timer interrupts Python code and
waits such as `time.sleep`. Elsewhere (Windows, another thread) a second thread raises the exception
between two steps of Python code. Neither stops a single call into C, such as one huge product of
matrices, before it returns.
"""

import ctypes
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONGEST = 1e6  # seconds: what a timer can hold
AGAIN = 0.05  # seconds between interrupts, as a bare `except:` may swallow the first


class TimeUp(BaseException):
    """Raised inside a call that has run too long; no `except Exception` stops it."""


def within(seconds: float, function: Callable, *args, **kwargs):
    """`function(*args, **kwargs)`; TimeUp when it has not returned after so many seconds.

    Time that a debugger holds the call does not count. Calls may stand inside each other: the one
    whose time ends first is interrupted.
    """
    signals = hasattr(signal, "setitimer")
    main = threading.current_thread() is threading.main_thread()
    with (by_signal if signals and main else by_thread)(min(max(seconds, 0.001), LONGEST)):
        return function(*args, **kwargs)


def late(_number, _frame) -> None:
    """Nothing: a signal that another thread takes after the timer was stopped ends no process."""


@contextmanager
def by_signal(seconds: float) -> Iterator[None]:
    """Interrupt the main thread by a timer, and again until the block is left."""
    live, start = True, time.monotonic()

    def ring(_number, _frame) -> None:
        if live and sys.gettrace() is None:
            raise TimeUp

    left, repeat = signal.getitimer(signal.ITIMER_REAL)
    if 0 < left <= seconds:  # an outer limit ends first: it stays in charge
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
        yield
    finally:
        live = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before if callable(before) else late)
        if left:
            rest = max(left - (time.monotonic() - start), 0.001)
            signal.setitimer(signal.ITIMER_REAL, rest, repeat)


@contextmanager
def by_thread(seconds: float) -> Iterator[None]:
    """Interrupt this thread from another one, and again until the block is left."""
    raise_in, target = ctypes.pythonapi.PyThreadState_SetAsyncExc, threading.get_ident()
    done, lock = threading.Event(), threading.Lock()

    def watch() -> None:
        wait = seconds
        while not done.wait(wait):
            with lock:
                if not done.is_set() and sys.gettrace() is None:
                    raise_in(ctypes.c_ulong(target), ctypes.py_object(TimeUp))
            wait = AGAIN

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finish(done, lock)
        raise_in(ctypes.c_ulong(target), None)  # one that is on its way is called back


def finish(done: threading.Event, lock: threading.Lock) -> None:
    """Tell a watcher to stop, whatever interrupts arrive meanwhile."""
    while not done.is_set():
        try:
            with lock:
                done.set()
        except TimeUp:
            continue
