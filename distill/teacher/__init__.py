"""The teacher behind one callable."""

from distill.teacher.live import LiveTeacher

__all__ = ["LiveTeacher"]
