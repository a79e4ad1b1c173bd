"""The ledger: every result that a lesson reproduces, with its source, ours, and a verdict.

`data/claims.csv` holds what was measured. What is claimed stands in `claims.py` of each lesson's
room, above the function that measures it. To add a row, write `measure(seed) -> float` there with
`@claim(...)` above it, and run `python -m mi_helpers claims --measure LESSON`.

    python -m mi_helpers claims                 the table; exit code 1 when a claim fails
    python -m mi_helpers claims --measure 1     measure lesson 1 anew over its seeds, write the rows
    python -m mi_helpers claims --page          write the table into docs/ledger.md
"""

import csv
import functools
import importlib
import importlib.util
import io
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import tyro

from mi_helpers.course.exercise import lesson_numbers
from mi_helpers.errors import Refused, reading
from mi_helpers.files import put_between, write_text

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "data" / "claims.csv"
PAGE = ROOT / "docs" / "ledger.md"
BEGIN, END = "<!-- claims -->", "<!-- /claims -->"
HOLDS, FAILS, UNMEASURED = "holds", "fails", "not measured"
COLUMNS = "lesson id claim source published ours sd seeds tolerance verdict".split()


@dataclass(frozen=True)
class Claim:
    """One claim.

    id         a short name, unique over all lessons
    claim      what is claimed, with the settings it holds for
    source     paper with its figure, table or section; or "derived", with the formula
    published  the source's value, or the derived one, such as "2/5" or "0.784"; "" where the
               source gives none
    tolerance  "± 0.02" of the published value, or a bound on ours: ">= 0.9", "<= 1e-5"
    measure    the function (seed) -> float that measures it once
    seeds      how many seeds are measured: 0, 1, …
    fast       whether the tests measure one seed again
    """

    lesson: int
    id: str
    claim: str
    source: str
    published: str
    tolerance: str
    measure: Callable[[int], float]
    seeds: int = 5
    fast: bool = True

    def value(self, seed: int) -> float:
        """Measure it once."""
        return float(self.measure(seed))

    def agrees(self, value: float, row: dict[str, str]) -> bool:
        """Whether one seed, measured again on any machine, agrees with the ledger's row.

        It has the row's verdict, and is within four standard deviations over the seeds of its
        value, or within a fiftieth of the value or of the tolerance, on which no verdict hangs.
        Every processor rounds its own way: rounding has its bound, and no value.
        """
        if verdict(self.published, value, self.tolerance) != row["verdict"]:
            return False
        ours, (_, limit) = float(row["ours"]), bound(self.tolerance)
        slack = max(4 * float(row["sd"]), 0.02 * abs(ours), 0.02 * abs(limit))
        return is_rounding(row) or abs(value - ours) <= slack


def claim(
    id: str,
    claim: str,
    *,
    source: str,
    tolerance: str,
    published: str = "",
    seeds: int = 5,
    fast: bool = True,
) -> Callable[[Callable], Callable]:
    """Declare what a function measures; it stands above the function in a lesson's `claims.py`."""

    def declare(measure: Callable[[int], float]) -> Callable[[int], float]:
        lesson = int(re.search(r"lesson_(\d\d)", measure.__module__)[1])
        measure.claim = Claim(lesson, id, claim, source, published, tolerance, measure, seeds, fast)
        return measure

    return declare


@functools.cache
def all_claims() -> list[Claim]:
    """The claims of every lesson, in the order in which they are declared."""
    found = []
    for number in lesson_numbers():
        name = f"mi_helpers.lessons.lesson_{number:02d}.claims"
        if importlib.util.find_spec(name):
            values = vars(importlib.import_module(name)).values()
            claims = [getattr(each, "claim", None) for each in values]
            found += [claim for claim in claims if isinstance(claim, Claim)]
    return found


# -- verdicts --------------------------------------------------------------------------------


def number(text: str) -> float:
    """A published value, such as "2/5", "0.784" or "1e-5"."""
    return float(Fraction(text))


def bound(tolerance: str) -> tuple[str, float]:
    """Its sign, "±", ">=" or "<=", and its number. ValueError, with a sentence, for other text."""
    found = re.fullmatch(r"(±|>=|<=) *(\S+)", tolerance.strip())
    if not found:
        raise ValueError(
            f"The tolerance '{tolerance}' cannot be applied: write '± 0.02' beside a published "
            "value, or a bound such as '>= 0.9' or '<= 1e-5'."
        )
    return found[1], number(found[2])


def verdict(published: str, ours: float, tolerance: str) -> str:
    """HOLDS or FAILS. ValueError, with a sentence, for a tolerance that cannot be applied."""
    sign, limit = bound(tolerance)
    if sign == "±" and not published:
        raise ValueError(f"'{tolerance}' cannot be applied: there is no published value beside it.")
    if not math.isfinite(ours):
        return FAILS
    if sign == "±":
        return HOLDS if abs(ours - number(published)) <= limit else FAILS
    return HOLDS if (ours >= limit if sign == ">=" else ours <= limit) else FAILS


def is_rounding(row: dict[str, str]) -> bool:
    """Whether only rounding is measured: 0 is derived, and ours is to stay under a bound."""
    return row["published"] == "0" and bound(row["tolerance"])[0] == "<="


def row_of(claim: Claim, values: list[float]) -> dict[str, str]:
    """The ledger's row of a claim measured over several seeds."""
    mean = statistics.fmean(values) if values else math.nan
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return described(claim) | {
        "ours": f"{mean:.6g}" if values else "",
        "sd": f"{spread:.2g}" if values else "",
        "seeds": str(len(values)),
        "verdict": verdict(claim.published, mean, claim.tolerance) if values else UNMEASURED,
    }


def described(claim: Claim) -> dict[str, str]:
    """What a row says before anything is measured."""
    names = ("id", "claim", "source", "published", "tolerance")
    return {"lesson": f"{claim.lesson:02d}"} | {name: getattr(claim, name) for name in names}


# -- the file --------------------------------------------------------------------------------


def read(path: Path = LEDGER) -> list[dict[str, str]]:
    """The rows of the ledger; none where there is no file."""
    if not path.is_file():
        return []
    advice = "`python -m mi_helpers claims --measure` writes it anew."
    with reading(path, Refused, advice), path.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream)
        if rows.fieldnames != COLUMNS:
            raise Refused(
                f"{path.name} has the columns {rows.fieldnames}, expected {COLUMNS}: {advice}"
            )
        return list(rows)


def write(rows: Iterable[dict[str, str]], path: Path = LEDGER) -> None:
    """Write the ledger atomically."""
    stream, rows = io.StringIO(), list(rows)
    bare = not any("\r" in value for row in rows for value in row.values())  # not quoted by itself
    quoting = csv.QUOTE_MINIMAL if bare else csv.QUOTE_ALL
    table = csv.DictWriter(stream, COLUMNS, lineterminator="\n", quoting=quoting)
    table.writeheader()
    table.writerows(rows)
    write_text(path, stream.getvalue())


def problems(rows: list[dict[str, str]], claims: list[Claim] | None = None) -> list[str]:
    """What is wrong with the ledger, a sentence each: failing claims, and rows that are not ours.

    Verdicts are computed again from the stored numbers, so that none can be edited by hand.
    """
    claims = all_claims() if claims is None else claims
    stored = {row["id"]: row for row in rows}
    known = {claim.id for claim in claims}
    found = [f"{name}: no claim of this name is declared." for name in stored if name not in known]
    for claim in claims:
        row = stored.get(claim.id)
        if row is None or not row["ours"]:
            found.append(f"{claim.id}: {UNMEASURED}; run --measure {claim.lesson}.")
            continue
        differs = [name for name, text in described(claim).items() if row[name] != text]
        if differs:
            found.append(f"{claim.id}: {', '.join(differs)} differs; run --measure {claim.lesson}.")
        judged = verdict(claim.published, float(row["ours"]), claim.tolerance)
        if judged != row["verdict"]:
            found.append(f"{claim.id}: the row says '{row['verdict']}', its numbers '{judged}'.")
        if judged == FAILS:
            found.append(f"{claim.id}: {FAILS}. {claim.claim}: {ours(row)}.")
    return found


def measure_anew(
    lessons: list[int], path: Path = LEDGER, claims: list[Claim] | None = None
) -> None:
    """Measure the claims of these lessons (all of them when empty), keep the others' rows."""
    claims = all_claims() if claims is None else claims
    measured = {}
    for claim in claims:
        if not lessons or claim.lesson in lessons:
            row = row_of(claim, [claim.value(seed) for seed in range(claim.seeds)])
            print(f"{claim.id}: {ours(row)}, {row['verdict']}", flush=True)
            measured[claim.id] = row
    stored = {row["id"]: row for row in read(path)} if lessons else {}  # as it is now, not before
    rows = {claim.id: stored.pop(claim.id, None) or row_of(claim, []) for claim in claims}
    others = {name: row for name, row in stored.items() if int(row["lesson"]) not in lessons}
    write((rows | others | measured).values(), path)


# -- the tables ------------------------------------------------------------------------------


def ours(row: dict[str, str]) -> str:
    """Our value as text: mean ± standard deviation over the seeds; of rounding, its bound."""
    if not row["ours"]:
        return UNMEASURED
    if is_rounding(row) and row["verdict"] == HOLDS:
        return row["tolerance"]
    mean, sd = float(row["ours"]), float(row["sd"])
    digits = 4 if not sd else min(4, max(2, 1 - math.floor(math.log10(sd))))
    shown = f"{mean:.{digits}f}" if abs(mean) >= 1e-3 or mean == 0 else f"{mean:.1e}"
    return f"{shown} ± {row['sd']}" if sd else shown


def table(rows: list[dict[str, str]]) -> str:
    """The ledger for a terminal: two lines per claim."""
    lines = []
    for row in rows:
        mark = {HOLDS: "✓", FAILS: "✗"}.get(row["verdict"], "·")
        value = f"published {row['published']}" if row["published"] else "nothing published"
        lines.append(f"{row['lesson']} {mark} {row['claim']}")
        lines.append(
            f"       {value}, ours {ours(row)} ({row['seeds']} seeds), "
            f"tolerance {row['tolerance']}: {row['verdict']}. {row['source']}"
        )
    return "\n".join(lines)


def markdown(rows: list[dict[str, str]]) -> str:
    """The ledger as a Markdown table, with its markers, for the page."""
    head = "Lesson,Claim,Source,Published or derived,Ours,Seeds,Tolerance,Verdict".split(",")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        names = ("lesson", "claim", "source", "published")
        cells = [*(row[name] for name in names), ours(row)]
        cells += [row["seeds"], row["tolerance"], row["verdict"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([BEGIN, "", *lines, "", END])


def update_page(rows: list[dict[str, str]], path: Path = PAGE) -> bool:
    """Put the table between the page's markers; False where there are none."""
    return put_between(path, BEGIN, END, markdown(rows))


def main(
    measure: Annotated[list[int] | None, tyro.conf.arg(metavar="[LESSON ...]")] = None,
    page: Annotated[bool, tyro.conf.arg(aliases=["--readme"])] = False,
    ledger: Path = LEDGER,
) -> int:
    """Show the ledger: what is claimed, by whom, what we measure, and whether it holds.

    The exit code is 1 when a claim fails.

    Args:
        measure: measure these lessons anew over their seeds, or all of them, and write the rows
        page: write the table into docs/ledger.md
        ledger: another claims.csv
    """
    lessons = {claim.lesson for claim in all_claims()}
    if unknown := set(measure or []) - lessons:
        print(
            f"Lesson {min(unknown)} has no claims; there are lessons {sorted(lessons)}.",
            file=sys.stderr,
        )
        return 2
    try:
        if measure is not None:
            measure_anew(measure, ledger)
            print("Now write the checksums of data/: python -m mi_helpers manifest --write\n")
        rows = read(ledger)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(rows))
    if page and not update_page(rows):
        print(f"docs/ledger.md has no markers {BEGIN} … {END}: put them where the table should be.")
        return 1
    found = problems(rows)
    print("\n".join(["", *found]) if found else f"\nAll {len(rows)} claims hold.")
    return 1 if found else 0
