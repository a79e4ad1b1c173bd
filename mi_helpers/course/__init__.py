"""What makes notebooks a course: `check`, `hint`, `solution` and `progress` are all a notebook needs."""

from mi_helpers.course.check import check, hint, progress, solution

__all__ = ["check", "hint", "progress", "solution"]
