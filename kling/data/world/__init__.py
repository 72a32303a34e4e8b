"""The small world: scenes, their captions and their truth."""

from kling.data.world.scene import World, render_scene

__all__ = ["World", "render_scene"]
