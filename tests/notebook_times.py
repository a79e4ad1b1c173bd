"""`python tests/notebook_times.py REPORT.xml`: seconds per notebook, from nbval's report."""

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict

LIMIT = 60.0  # seconds that a notebook may take on two cores


def times(report: str) -> dict[str, float]:
    """Notebook -> seconds, the sum over its cells."""
    seconds = defaultdict(float)
    for case in ElementTree.parse(report).iter("testcase"):
        name = re.search(r"[^./\\]+\.ipynb", case.get("classname"))[0]
        seconds[name] += float(case.get("time"))
    return dict(sorted(seconds.items()))


def main(report: str) -> None:
    """Print the table; a notebook over the limit is marked in words."""
    for name, seconds in times(report).items():
        print(f"{seconds:7.1f} s  {name}" + ("  over a minute" if seconds > LIMIT else ""))


if __name__ == "__main__":
    main(sys.argv[1])
