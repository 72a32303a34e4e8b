"""From a request to what will be computed: the task, the clips to sample one after another, and the settings. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kling.cameras.trajectory import Trajectory
from kling.condition.state import Given
from kling.errors import UserError
from kling.sampling.inputs import Inputs, read_camera
from kling.sampling.request import Request
from kling.shapes import TEMPORAL, clip_frames, latent_frames, nearest_frames

PRO_STEPS = 2  # "pro" takes this many times the steps of "std", and a second-order solver
CONTEXT = 9  # pixel frames of the clip so far that a continuation starts from (1 + 4j)

TASK_TITLES = {
    "text_to_image": "text to image",
    "text": "text to video",
    "image": "image to video",
    "last": "last frame to video",
    "first_last": "first + last frame to video",
    "keyframes": "keyframes to video",
    "continuation": "continuation of a video",
    "inpaint": "filling of a video",
    "restyle": "restyling of a video",
}


@dataclass(frozen=True)
class Hop:
    """One clip to sample: `overlap` of its first frames repeat the end of what is there already and are cut off at the join."""

    given: Given
    frames: int
    start: int = 0  # pixel frame of the whole video at which it begins
    overlap: int = 0

    @property
    def end(self) -> int:
        return self.start + self.frames


@dataclass(frozen=True)
class Plan:
    """What a request will do. `frames` is the length of the result, a given video that is continued included."""

    task: str
    hops: list[Hop]
    height: int
    width: int
    fps: float
    num_inference_steps: int
    solver: str
    guidance_scale: float
    guidance_scale_2: float  # below the boundary, where there is a second expert
    camera_guidance_scale: float
    shift: float
    tokens: int  # of the longest hop
    block_frames: int = 0  # latent frames made at a time; 0: all
    frame_delay: int = 0  # steps by which each latent frame is behind the one before
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # noise levels at which there is guidance
    guidance_every: int = 1  # of those steps, how many share one computation of it
    guidance_reach: float = 0.0  # latent frames from a given one to where guidance is whole; 0: it is so everywhere

    @property
    def frames(self) -> int:
        return self.hops[-1].end

    @property
    def total_steps(self) -> int:
        steps = 0
        for hop in self.hops:
            f = latent_frames(hop.frames)
            blocks = -(-f // self.block_frames) if self.block_frames else 1
            steps += self.num_inference_steps * blocks + self.frame_delay * (f + len(hop.given.keyframes) - 1)
        return steps

    @property
    def title(self) -> str:
        """The task in words, as the command line prints it first."""
        hops = f", then {len(self.hops) - 1} continuations" if len(self.hops) > 1 and not self.hops[0].overlap else ""
        return TASK_TITLES[self.task] + hops


def plan_hops(request: Request, inputs: Inputs, frames: int, fps: float, longest: int, spatial: int) -> list[Hop]:
    """The clips to sample. frames: asked for. longest: that the model makes at once. spatial: pixels along a latent."""
    if inputs.video is None:
        first = _first(request, inputs, min(frames, longest))
        asked = frames if request.extend_to is None else clip_frames(request.extend_to, fps)
        return [first, *_continuations(first.end, max(asked, first.end), longest)]
    there = len(inputs.video)
    if inputs.mask is not None or request.strength is not None:
        space = None
        if inputs.mask is not None:  # a latent with one pixel to make is made
            space = torch.nn.functional.max_pool2d((inputs.mask > 0.5).float()[None], spatial)[0]
        return [Hop(Given(space=space, hold=request.strength or 0.0), there)]
    asked = there + frames - 1 if request.extend_to is None else clip_frames(request.extend_to, fps)
    if asked <= there:
        line = f"the video is {there / fps:.1f} s long already: extend_to {request.extend_to:g} s adds nothing"
        raise UserError(line, code="adds_nothing", there=f"{there / fps:.1f}", value=f"{request.extend_to:g}")
    return _continuations(there, asked, longest)


def plan_camera(request: Request, hops: list[Hop], H: int, W: int) -> Trajectory | None:
    """The asked path from the first hop's first frame to the last hop's last. Frames that were there already stand still."""
    still = max(0, hops[0].overlap - 1)
    camera = read_camera(request, hops[-1].end - hops[0].start - still, H, W)
    if camera is None or not still:
        return camera
    return Trajectory(*(torch.cat([t[:1].expand(still, *t.shape[1:]), t]) for t in (camera.c2w, camera.intrinsics)))


def _first(request: Request, inputs: Inputs, frames: int) -> Hop:
    """The clip that starts a video."""
    if beyond := [t for _, t, _ in inputs.keyframes if t >= frames]:
        line = f"keyframe at frame {beyond[0]}: this model makes {frames} frames at once, so give a frame up to {frames - 1}"
        raise UserError(line, code="keyframe_beyond_model", frame=beyond[0], n=frames, last=frames - 1)
    keyframes = [(t, strength) for _, t, strength in inputs.keyframes] + ([(frames - 1, 1.0)] if request.loop else [])
    return Hop(Given(known=int(inputs.image is not None or request.loop), keyframes=tuple(keyframes)), frames)


def _continuations(end: int, asked: int, longest: int) -> list[Hop]:
    """Hops from `end` frames to `asked`, each as long as the model allows; the last is rounded up to whole latents."""
    hops: list[Hop] = []
    while end < asked:
        overlap = min(CONTEXT, nearest_frames(end)[0])
        new = min(longest - overlap, TEMPORAL * -(-(asked - end) // TEMPORAL))
        if new <= 0:
            raise UserError(f"this model makes {longest} frames at once: too few to continue a video from {overlap} of them")
        hops.append(Hop(Given(known=latent_frames(overlap)), overlap + new, end - overlap, overlap))
        end += new
    return hops
