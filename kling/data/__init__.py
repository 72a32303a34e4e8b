"""Frames and pictures, what is known of them, and the small world."""

from kling.data.video import VideoWriter, read_video

__all__ = ["VideoWriter", "read_video"]
