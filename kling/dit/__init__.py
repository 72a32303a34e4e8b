"""The spatiotemporal diffusion transformer."""

from kling.dit.model import KlingTransformer3DModel

__all__ = ["KlingTransformer3DModel"]
