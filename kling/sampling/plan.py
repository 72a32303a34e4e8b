"""From a request to the computation: the task, the clips to sample one after another, and the settings. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kling.cameras.trajectory import Trajectory
from kling.condition.state import Given
from kling.condition.tracks import Tracks
from kling.errors import UserError, unknown
from kling.flow.solvers import SOLVERS
from kling.sampling.brush import stroke_tracks
from kling.sampling.inputs import LAST, Inputs, read_camera
from kling.sampling.request import Request
from kling.sampling.shots import Shot, Timeline, joined_cameras, timeline
from kling.shapes import TEMPORAL, clip_frames, latent_frames, nearest_frames

PRO_STEPS = 2  # "pro" uses this many times the steps of "std", and a second-order solver
FAST_STEPS = 8  # most steps of flow maps: beyond it the weights that they were distilled from are better
CONTEXT = 9  # pixel frames of the clip so far from which a continuation starts (1 + 4j)

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
    """One clip to sample: its first `overlap` frames repeat the end of the video so far and are cut off at the join."""

    given: Given
    frames: int
    start: int = 0  # pixel frame of the whole video where it begins
    overlap: int = 0
    pictures: tuple[int, ...] = ()  # indices into `Inputs.keyframes` for the keyframes of `given`
    shots: tuple[tuple[int, int], ...] = ((0, 0),)  # (number, latent frame of the hop where it begins) of every shot in it

    @property
    def end(self) -> int:
        return self.start + self.frames

    @property
    def cuts(self) -> list[int]:
        """The latent frames of the hop at which another shot begins."""
        return [begin for _, begin in self.shots[1:]]

    @property
    def fade(self) -> int:
        """The number of its new frames on which the frame before them has an influence: those of one latent, if they are of its shot."""
        return 0 if not self.overlap or latent_frames(self.overlap) in self.cuts else TEMPORAL


@dataclass(frozen=True)
class Plan:
    """What a request will do. `frames` is the length of the result, including a given video that is continued."""

    task: str
    hops: list[Hop]
    height: int
    width: int
    fps: float
    num_inference_steps: int
    solver: str
    guidance_scale: float
    guidance_scale_2: float  # below the boundary, if there is a second expert
    camera_guidance_scale: float
    shift: float
    tokens: int  # of the longest hop
    has_camera: bool = False
    brush_guidance_scale: float = 1.0  # 1 without tracks
    reference_guidance_scale: float = 1.0  # 1 without references
    fast: bool = False  # whether the few-step weights beside the transformer make it
    block_frames: int = 0  # latent frames generated at a time; 0: all
    frame_delay: int = 0  # steps by which each latent frame is behind the previous one
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # noise levels between which guidance is used
    guidance_every: int = 1  # number of those steps that share one computation of it
    guidance_reach: float = 0.0  # distance in latent frames from a given frame at which guidance is full; 0: full everywhere
    cuts: tuple[int, ...] = ()  # pixel frames at which another shot begins
    notes: tuple[str, ...] = ()  # remarks for the user, before sampling

    @property
    def passes(self) -> int:
        """The most passes of a step."""
        words = not self.guidance_scale == self.guidance_scale_2 == 1
        camera = self.has_camera and self.camera_guidance_scale != 1
        return 1 + words + camera + (self.brush_guidance_scale != 1) + (self.reference_guidance_scale != 1)

    @property
    def frames(self) -> int:
        return self.hops[-1].end

    @property
    def total_steps(self) -> int:
        return sum(map(self.steps_of, self.hops))

    def steps_of(self, hop: Hop) -> int:
        """The number of steps of one hop: of every block in turn, and until the last of delayed frames is done."""
        f = latent_frames(hop.frames)
        blocks = -(-f // self.block_frames) if self.block_frames else 1
        return self.num_inference_steps * blocks + self.frame_delay * (f - 1)

    @property
    def title(self) -> str:
        """The task in words, for the first line of the command line's output."""
        hops = f", {len(self.cuts) + 1} shots" if self.cuts else ""
        more = len(self.hops) - 1
        hops += f", then {more} continuation{'s' * (more > 1)}" if more and not self.hops[0].overlap else ""
        lone = sum(len(hop.given.keyframes) for hop in self.hops) if self.task in ("continuation", "inpaint", "restyle") else 0
        pictures = self.hops[0].given.references
        beside = [f"{n} {what}{'s' * (n > 1)}" for n, what in ((lone, "keyframe"), (pictures, "reference")) if n]
        return TASK_TITLES[self.task] + (f" with {' and '.join(beside)}" if beside else "") + hops


def plan_hops(request: Request, inputs: Inputs, frames: int, fps: float, longest: int, spatial: int) -> list[Hop]:
    """The clips to sample. frames: requested. longest: that the model generates at once. spatial: pixels per latent."""
    whole = None if request.extend_to is None else clip_frames(request.extend_to, fps)
    if request.shots is not None:
        times = timeline(request.storyboard, fps)
        hops = [
            replace(hop, shots=tuple(times.within(hop.start, hop.frames)))
            for hop in _hops_of_shots(int(inputs.image is not None), times, longest)
        ]
    elif inputs.video is None:
        if whole is not None and whole < frames and (request.duration or request.num_frames):
            line = f"extend_to {request.extend_to:g} s is shorter than the clip of {frames / fps:.1f} s: leave one of them out"
            raise UserError(line, code="extend_too_short", value=f"{request.extend_to:g}", seconds=f"{frames / fps:.1f}")
        first = min(frames, longest, whole or frames)
        begin = Hop(Given(known=int(inputs.image is not None or request.loop)), first)
        hops = [begin, *_continuations(first, whole or frames, longest)]
    elif request.edited:
        space = None
        if inputs.mask is not None:  # a latent with one pixel to generate is generated
            space = torch.nn.functional.max_pool2d((inputs.mask > 0.5).float()[None], spatial)[0]
        hops = [Hop(Given(space=space, hold=request.strength or 0.0), len(inputs.video))]
    else:
        there = len(inputs.video)
        if (whole or there + frames - 1) <= there:
            asked = f"{frames} frame" if whole is None else f"extend_to {request.extend_to:g} s"
            line = f"the video is {there / fps:.1f} s long already: {asked} adds nothing"
            raise UserError(line, code="adds_nothing", there=f"{there / fps:.1f}", value=f"{(whole or 0) / fps:.1f}")
        hops = _continuations(there, whole or there + frames - 1, longest)
    if inputs.control is not None and len(inputs.control) < hops[-1].end:
        lengths = f"control of {len(inputs.control)} frames for a clip of {hops[-1].end}"
        raise UserError(f"{lengths}: give a longer one, or ask for fewer frames")
    hops = [replace(hop, given=replace(hop.given, references=len(inputs.references))) for hop in hops]
    return _with_keyframes(request, inputs, hops)


def plan_task(request: Request, hops: list[Hop]) -> str:
    """The task as a whole: the first hop's, or the one that the keyframes of later hops make of it."""
    first = hops[0].given
    if first.space is not None or first.hold or hops[0].overlap or not any(hop.pictures for hop in hops[1:]):
        return first.task(latent_frames(hops[0].frames))
    keyframes = tuple((hop.start + t, strength) for hop in hops for t, strength in hop.given.keyframes)
    return replace(first, keyframes=keyframes).task(latent_frames(hops[-1].end))


def plan_solver(request: Request, hops: list[Hop], own: str, extra_channels: bool) -> tuple[str, str]:
    """The solver of all hops: the requested one, or the checkpoint's `own`; and, if it is not that, the reason.

    A diffusers scheduler has one level for the whole clip; if levels differ, ours is used, of second order like the published ones.
    extra_channels: given content enters as extra channels. Raises `UserError` for an unknown solver.
    """
    if request.solver is not None and request.solver not in SOLVERS:
        raise unknown("solver", request.solver, SOLVERS)
    if "flow_map" in (own, request.solver) and own != (request.solver or own):
        if own == "flow_map":
            raise UserError(f"solver {request.solver}: few-step weights were distilled for flow_map; leave it out")
        raise UserError("solver flow_map: these weights were not distilled for it; use mode fast, or leave solver out")
    if request.solver is not None:
        return request.solver, ""
    if own in SOLVERS:
        return ("adams" if request.mode == "pro" and own == "euler" else own), ""
    reasons = {
        "frames follow one another": bool(request.frame_delay),
        "what is given is noised": not extra_channels and request.sigma_c > 0 and any(hop.given.gives for hop in hops),
        "what is given holds in part": not extra_channels and not all(hop.given.whole for hop in hops),
    }
    why = next((reason for reason, holds in reasons.items() if holds), None)
    return (own, "") if why is None else ("adams", f"solver adams instead of {own}, which has one noise level for all frames: {why}")


def check_flow_map(request: Request) -> None:
    """Raises `UserError` for what a flow map has no use for: guidance is in its weights, and its steps are few."""
    used = {
        "negative_prompt": request.negative_prompt,
        "guidance_scale": request.guidance_scale not in (None, 1) or None,
        "camera_guidance_scale": request.camera_guidance_scale not in (None, 1) or None,
        "brush_guidance_scale": request.brush_guidance_scale not in (None, 1) or None,
        "reference_guidance_scale": request.reference_guidance_scale not in (None, 1) or None,
        "guidance_interval": request.guidance_interval,
        "guidance_every": request.guidance_every != 1 or None,
        "guidance_reach": request.guidance_reach,
    }
    for name, value in used.items():
        if value is not None:
            line = f"{name}: few-step weights have guidance built in, so nothing of it can be set: leave it out, or use mode std"
            raise UserError(line, code="fast_guidance", field=name)
    if (request.num_inference_steps or 1) > FAST_STEPS:
        line = f"num_inference_steps {request.num_inference_steps}: few-step weights take 1 to {FAST_STEPS}; for more use mode std"
        raise UserError(line, code="fast_steps", value=request.num_inference_steps, most=FAST_STEPS)


def plan_camera(request: Request, hops: list[Hop], H: int, W: int, fps: float) -> Trajectory | None:
    """The requested path from the first hop's first frame to the last hop's last. During frames that exist already, the camera rests."""
    if request.shots is not None:
        return _shots_camera(request, request.storyboard, H, W, fps)
    still = max(0, hops[0].overlap - 1)
    if request.camera is not None and hops[-1].end == 1:
        line = "camera was given for a single picture, in which nothing can move: leave it out, or give a duration"
        raise UserError(line, code="nothing_moves", field="camera")
    camera = read_camera(request.camera, request.camera_scale, hops[-1].end - hops[0].start - still, H, W)
    if camera is None or not still:
        return camera
    return Trajectory(*(torch.cat([t[:1].expand(still, *t.shape[1:]), t]) for t in (camera.c2w, camera.intrinsics)))


def _shots_camera(request: Request, shots: list[Shot], H: int, W: int, fps: float) -> Trajectory | None:
    """The cameras of all shots, each relative to its own first frame."""
    ranges, paths = timeline(shots, fps).ranges, []
    for number, (shot, (start, end)) in enumerate(zip(shots, ranges, strict=True), 1):
        try:
            paths.append(read_camera(shot.camera, request.camera_scale, end - start, H, W))
        except UserError as error:
            raise UserError(f"shot {number}: {error}") from None
    return joined_cameras(paths, ranges)


def plan_tracks(inputs: Inputs, hops: list[Hop]) -> Tracks | None:
    """The tracks from the first hop's first frame to the last hop's last; they begin on the last frame that exists already."""
    if not inputs.strokes:
        return None
    if hops[-1].end == 1:
        line = "tracks were given for a single picture, in which nothing can move: leave them out, or give a duration"
        raise UserError(line, code="nothing_moves", field="tracks")
    still = max(0, hops[0].overlap - 1)
    tracks = stroke_tracks(inputs.strokes, hops[-1].end - hops[0].start - still)
    before = Tracks(tracks.points[:, :1].expand(-1, still, -1), torch.zeros(len(tracks), still, dtype=torch.bool), tracks.code)
    return Tracks(*(torch.cat([getattr(part, name) for part in (before, tracks)], 1) for name in ("points", "there")), tracks.code)


def hop_tracks(tracks: Tracks, hop: Hop, origin: int) -> Tracks:
    """A hop's part of the tracks, from its last given frame on. origin: of the tracks, in pixel frames of the whole video."""
    part = tracks.frames(hop.start - origin, hop.start - origin + hop.frames)
    return Tracks(part.points, part.there & (torch.arange(hop.frames) >= hop.overlap - 1), part.code)


def _with_keyframes(request: Request, inputs: Inputs, hops: list[Hop]) -> list[Hop]:
    """Assign every keyframe to the hop that generates its frame. Frame numbers are those of the result, including a continued video."""
    end, there = hops[-1].end, hops[0].start + hops[0].overlap
    if request.loop and end == 1:
        raise UserError("loop was asked for of a single picture: give a duration", code="nothing_moves", field="loop")
    taken = {0: "image" if inputs.image is not None else "the loop's first frame"} if hops[0].given.known and not there else {}
    names = ["keyframe"] * len(request.keyframes) + ["last_image" if request.last_image is not None else "loop"]
    placed: list[list[int]] = [[] for _ in hops]
    frames = [end - 1 if t == LAST else t for _, t, _ in inputs.keyframes]
    for i, t in enumerate(frames):
        if t >= end:
            line = f"keyframe at frame {t} lies beyond the clip's last frame {end - 1}: give a smaller frame or a longer duration"
            raise UserError(line, code="keyframe_beyond", frame=t, last=end - 1)
        if t < there:
            line = f"keyframe at frame {t} lies in the given video: the first generated frame is {there}"
            raise UserError(line, code="keyframe_in_video", frame=t, first=there)
        if t in taken:
            line = f"{taken[t]} and {names[i]} both fall on frame {t}: leave one out, or give a longer duration"
            raise UserError(line, code="same_frame", field=taken[t], other=names[i], frame=t)
        taken[t] = names[i]
        placed[next(number for number, hop in enumerate(hops) if t < hop.end)].append(i)
    return [
        replace(
            hop,
            pictures=tuple(mine),
            given=replace(hop.given, keyframes=tuple((frames[i] - hop.start, inputs.keyframes[i][2]) for i in mine)),
        )
        for hop, mine in zip(hops, placed, strict=True)
    ]


def _hops_of_shots(known: int, times: Timeline, longest: int) -> list[Hop]:
    """Hops over the shots of a clip. If the model cannot make the rest at once, a hop ends at the last cut within its reach, or, in a shot
    that is longer, where its reach ends; the next one begins with the end of the clip so far."""
    hops: list[Hop] = []
    while (end := hops[-1].end if hops else 0) < times.frames:
        overlap = min(CONTEXT, end)
        if longest - overlap < TEMPORAL:
            raise UserError(f"this model makes {longest} frames at once: too few to continue a shot from {overlap} of them")
        until = min(times.frames, end - overlap + longest)
        if until < times.frames:
            until = max((cut for cut in times.cuts if end < cut <= until), default=until)
        given = Given(known=latent_frames(overlap) if overlap else known)
        hops.append(Hop(given, until - end + overlap, end - overlap, overlap))
    return hops


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
