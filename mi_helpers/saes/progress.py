"""A progress bar of one line: how far, how fast, how long still."""

import sys
import time


class Progress:
    """`bar.to(n)` after each piece of work; on a terminal it redraws, elsewhere it prints tenths.

    what, unit  "harvest", "tokens"; total: how many; shown: False prints nothing
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0, shown: bool = True):
        self.what, self.total, self.unit, self.shown = what, max(total, 1), unit, shown
        self.first, self.begin, self.last = done, time.monotonic(), -1.0
        self.tenth = 10 * done // self.total

    def to(self, done: int, note: str = "") -> None:
        """`done` of the total are done; `note` is said after the numbers."""
        if not self.shown:
            return
        now, terminal = time.monotonic(), sys.stdout.isatty()
        tenth = 10 * done // self.total
        if not (tenth > self.tenth or (terminal and now - self.last > 0.2)):
            return
        self.tenth, self.last = tenth, now
        end = "\r" if terminal and done < self.total else "\n"
        print(self.line(done, now - self.begin, note), end=end, flush=True)

    def line(self, done: int, seconds: float, note: str = "") -> str:
        """The bar as text, after `seconds` of work in this process."""
        rate = (done - self.first) / max(seconds, 1e-9)
        left = (self.total - done) / rate if rate > 0 else 0
        marks = round(20 * done / self.total)
        bar = f"{self.what:8} [{'#' * marks}{'.' * (20 - marks)}] {done:,}/{self.total:,}"
        return f"{bar} {self.unit}, {rate:,.1f}/s, {duration(left)} left {note}".rstrip()


def duration(seconds: float) -> str:
    """90 -> "1.5 min", 7200 -> "2.0 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5_400 else f"{seconds / 3_600:.1f} h"
