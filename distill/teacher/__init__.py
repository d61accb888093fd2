"""The teacher behind one callable."""

from distill.teacher.online import OnlineTeacher

__all__ = ["OnlineTeacher"]
