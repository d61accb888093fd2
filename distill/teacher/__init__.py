"""The teacher as a callable: live, or several of them mixed."""

from distill.teacher.live import LiveTeacher
from distill.teacher.mixture import Mixture

__all__ = ["LiveTeacher", "Mixture"]
