"""`progress`: what a learner has done over the course, and how well they predict."""

from mi_helpers.course import card, record
from mi_helpers.course.investigate import investigations_of
from mi_helpers.course.predict import calibration, settle
from mi_helpers.course.shown import display


def progress() -> None:
    """How many exercises of each lesson are passed, investigations, and predictions' hits.

    Of predictions it says, for each confidence, how many were right and how many should have been.
    """
    done = record.everything()
    rows = ["| Lesson | Passed | | Investigation |", "|---|---|---|---|"]
    scores = done.get("investigations", {})
    for lesson, exercises in card.lessons().items():
        marks = [exercise.id in done["passed"] for exercise in exercises]
        drawing = "".join("■" if mark else "□" for mark in marks)
        best = [f"{scores[each.id]:.3g}" for each in investigations_of(lesson) if each.id in scores]
        rows.append(
            f"| {lesson:02d} | {sum(marks)} of {len(marks)} | {drawing} | {', '.join(best)} |"
        )
    display("\n".join([*rows, *predicted()]))


def predicted() -> list[str]:
    """The lines on predictions; none where there are none."""
    table = settle()
    counts = calibration(table)
    if not counts:
        return []
    total, right = (sum(column) for column in list(zip(*counts, strict=True))[1:])
    expected = sum(sure * n for sure, n, _ in counts) / 100
    rows = [
        "",
        f"**Predictions:** {right} of {total} right; as sure as you were, {expected:.1f} would be.",
        "",
        "| You were | Predictions | Right | Expected |",
        "|---|---|---|---|",
    ]
    return rows + [
        f"| {sure} % sure | {n} | {hits} ({hits / n:.0%}) | {sure * n / 100:.1f} ({sure}%) |"
        for sure, n, hits in counts
    ]
