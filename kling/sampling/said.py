"""Cameras that only the words of a prompt ask for.

The captions of the small world name its camera moves in a few phrases, so that they can be read without a model, and its weights follow the
same move as a camera more often than as words (docs/evaluation.md). Prompts for other weights are left as they are.
"""

from __future__ import annotations

from dataclasses import replace

from kling.cameras.axes import WORDS
from kling.cameras.trajectory import Trajectory
from kling.data.world.captions import camera_said
from kling.sampling.request import Request

Camera = str | dict[str, float] | Trajectory | None


def spelled_out(request: Request, read: bool) -> tuple[Request, list[str]]:
    """The request with a camera wherever only its words say one, and a remark on each. read: whether the weights take such a camera in
    what is asked. Where `camera` is "words" none is given, and the weights have the words alone."""
    notes: list[str] = []

    def camera_of(prompt: str, camera: Camera, where: str) -> Camera:
        if camera == WORDS:
            return None
        if camera is not None or not read or not (said := camera_said(prompt)):
            return camera
        notes.append(f"{where}camera {said}, as the prompt says ('{WORDS}' as the camera leaves it to the weights)")
        return said

    if request.shots is None:
        camera = camera_of(request.prompt, request.camera, "")
        return (request if camera is request.camera else request.replace(camera=camera)), notes
    shots = [replace(s, camera=camera_of(s.prompt, s.camera, f"shot {k}: ")) for k, s in enumerate(request.storyboard, 1)]
    return request.replace(shots=shots), notes
