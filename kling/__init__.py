"""kling: a research toolkit for controllable video generation, from data to video.

from kling import KlingPipeline
video = KlingPipeline.from_pretrained()("a red ball rolls left on grass", camera="pan=5").frames    # held out: no training clip shows it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kling.dit import KlingTransformer3DModel
    from kling.flow.solvers import KlingFlowScheduler
    from kling.sampling.brush import Track
    from kling.sampling.pipeline import KlingPipeline
    from kling.sampling.request import Request
    from kling.sampling.shots import Shot
    from kling.text import ByteTextEncoder
    from kling.vae import AutoencoderKLKling

__version__ = "0.2.0"
_WHERE = {
    "KlingPipeline": "kling.sampling.pipeline",
    "Request": "kling.sampling.request",
    "Track": "kling.sampling.brush",
    "Shot": "kling.sampling.shots",
    "KlingTransformer3DModel": "kling.dit",
    "AutoencoderKLKling": "kling.vae",
    "ByteTextEncoder": "kling.text",
    "KlingFlowScheduler": "kling.flow.solvers",
}
__all__ = [
    "AutoencoderKLKling",
    "ByteTextEncoder",
    "KlingFlowScheduler",
    "KlingPipeline",
    "KlingTransformer3DModel",
    "Request",
    "Shot",
    "Track",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import kling` itself stays light."""
    if name not in _WHERE:
        raise AttributeError(f"module 'kling' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
