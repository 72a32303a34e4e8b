"""The small world: procedural scenes, their captions and their ground truth."""

from kling.data.world.scene import World, render_scene

__all__ = ["World", "render_scene"]
