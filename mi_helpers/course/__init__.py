"""What makes notebooks a course: these are all that one needs in a lesson."""

from mi_helpers.course.check import check, confirm, hint, solution
from mi_helpers.course.investigate import investigate
from mi_helpers.course.predict import predict, progress

__all__ = ["check", "confirm", "hint", "investigate", "predict", "progress", "solution"]
