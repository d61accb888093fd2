"""The teacher behind one callable."""

from distill.teacher.cache import CachedTeacher
from distill.teacher.live import LiveTeacher

__all__ = ["CachedTeacher", "LiveTeacher"]
