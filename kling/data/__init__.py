"""Frames and pictures, data sets of real videos, and the small world."""

from __future__ import annotations

from typing import Any

__all__ = ["VideoWriter", "read_video"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the small world needs no decoder."""
    if name not in __all__:
        raise AttributeError(f"module 'kling.data' has no attribute '{name}'")
    from kling.data import video

    return getattr(video, name)
