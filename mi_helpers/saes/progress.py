"""How far a long stage is, and how durations are written."""

import sys

from tqdm import tqdm


def progress_bar(name: str, total: int, unit: str, done: int = 0, shown: bool = True) -> tqdm:
    """A tqdm bar on stderr: drawn five times a second on a terminal, every half minute elsewhere.

    Args:
        name, unit: such as "harvest" and "tokens".
        total, done: how many units there are, and how many were done before.
        shown: False shows nothing.
    """
    pace = 0.2 if sys.stderr.isatty() else 30
    return tqdm(
        desc=name, total=total, unit=f" {unit}", initial=done, disable=not shown, mininterval=pace
    )


def duration(seconds: float) -> str:
    """90 -> "1.5 min", 7200 -> "2.0 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5_400 else f"{seconds / 3_600:.1f} h"
