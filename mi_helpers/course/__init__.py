"""What makes notebooks a course: `check`, `hint`, `solution`, `progress` are all that one needs."""

from mi_helpers.course.check import check, hint, progress, solution

__all__ = ["check", "hint", "progress", "solution"]
