"""The teacher as a callable: live, from disk, or several of them mixed."""

from distill.teacher.cache import CachedTeacher
from distill.teacher.live import LiveTeacher
from distill.teacher.mixture import Mixture

__all__ = ["CachedTeacher", "LiveTeacher", "Mixture"]
