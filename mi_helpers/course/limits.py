"""A limit of time for what a learner wrote.

    within(10, answer, x)  # TimeUp where it has not returned after ten seconds

One thread watches all limits, for as long as the process lives. A thread for each call would be
started while an outer limit runs out, and where Python 3.11 raises in a thread that is about to
start another, it may raise in the new one, for which the first then waits for ever.
"""

import contextlib
import ctypes
import os
import queue
import sys
import threading
import time
import traceback

AGAIN = 0.05  # seconds between interrupts, as a bare `except:` may swallow the first
LOCK = threading.Lock()
STARTS = threading.Thread.start.__code__
raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc


class TimeUp(BaseException):
    """Raised inside a call that has run too long; no `except Exception` stops it."""


class Limit:
    """When the call of a frame in a thread has to have ended; `frame` is None once it has."""

    def __init__(self, seconds: float, frame):
        self.ends = time.monotonic() + min(max(seconds, 0.001), threading.TIMEOUT_MAX)
        self.thread, self.frame = threading.get_ident(), frame

    def interrupt(self) -> None:
        """Raise TimeUp where the call is now; where it cannot be raised, only try again."""
        with LOCK:
            top = sys._current_frames().get(self.thread)  # noqa: SLF001
            frames = [frame for frame, _ in traceback.walk_stack(top)] if top else []
            if self.frame not in frames:
                self.frame = None
            elif not any(frame.f_trace or frame.f_code is STARTS for frame in frames):
                raise_in(ctypes.c_ulong(self.thread), ctypes.py_object(TimeUp))
        self.ends = time.monotonic() + AGAIN

    def end(self) -> None:
        """No interrupt comes from now on, whatever arrives meanwhile."""
        while self.frame is not None:
            try:
                with LOCK:
                    self.frame = None
            except TimeUp:
                continue


class Watcher:
    """The thread that interrupts what has run out of time."""

    def __init__(self):
        self.new, self.process = queue.SimpleQueue(), os.getpid()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        """Wait for the next limit to run out, or for a new one."""
        limits: list[Limit] = []
        while True:
            wait = min((each.ends for each in limits), default=None)
            with contextlib.suppress(queue.Empty):
                limits.append(self.new.get(timeout=wait and max(0.0, wait - time.monotonic())))
            limits = [each for each in limits if each.frame is not None]
            for each in limits:
                if each.ends <= time.monotonic():
                    each.interrupt()

    @classmethod
    def get(cls) -> "Watcher":
        """The one of this process; another after a fork, which copies no threads."""
        global WATCHER  # noqa: PLW0603
        with STARTING:
            if WATCHER is None or WATCHER.process != os.getpid():
                WATCHER = cls()
            return WATCHER


STARTING, WATCHER = threading.Lock(), None


def within(seconds: float, function, *args, **kwargs):
    """`function(*args, **kwargs)`; TimeUp when it has not returned after so many seconds.

    It is raised between two steps of Python code, on every system and in every thread: a single
    call into C, such as `time.sleep`, returns first. Time in a debugger does not count. Calls may
    stand inside each other.
    """
    watcher, limit = Watcher.get(), Limit(seconds, sys._getframe())  # noqa: SLF001
    try:
        watcher.new.put(limit)
        return function(*args, **kwargs)
    finally:
        limit.end()
        try:  # one that is on its way comes now: merely called back, 3.11 would loop in tracing
            raise_in(ctypes.c_ulong(limit.thread), ctypes.py_object(TimeUp))
            while True:
                pass
        except TimeUp:
            pass
