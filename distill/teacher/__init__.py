"""The teacher behind one callable."""

from distill.teacher.live import LiveTeacher, shard

__all__ = ["LiveTeacher", "shard"]
