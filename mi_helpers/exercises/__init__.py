"""Exercises of the lessons: `check`, `hint`, `solution` and `progress` are all a notebook needs."""

from mi_helpers.exercises.check import check, hint, progress, solution

__all__ = ["check", "hint", "progress", "solution"]
