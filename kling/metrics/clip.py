"""Measurements of any video, from its frames and the inputs it was made from. A metric is one function here: the decorator adds it to the
table, the report, the controls and the ranking of `kling-eval videos`.

    @metric("motion", "brightness", "levels", controls=("turned", "noise"))
    def motion_brightness(clip: Clip) -> float:
        return float(clip.video.float().mean())
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from kling.cameras.trajectory import Trajectory
from kling.data.transforms import to_tensor
from kling.metrics.camera.errors import axes_of, rotation_error, summed_errors, translation_error
from kling.metrics.camera.structure import Structure, estimate_structure
from kling.metrics.continuation import drift, seam_rows
from kling.metrics.motion import Flow, camera_classes, dynamic_degree, matched, optical_flow, warp_error
from kling.metrics.pixel import flicker, psnr, ssim, temporal_psnr
from kling.metrics.vmaf import vmaf

STANDS_STILL = 0.5  # levels of 255: a clip that never differs more than this from its first frame counts as a still picture
Value = float | bool | None  # None: not applicable, or no result


@dataclass
class Clip:
    """A video (T, H, W, 3) uint8, and its inputs."""

    video: Tensor
    fps: float
    reference: Tensor | None = None  # (T, H, W, 3) uint8
    camera: Trajectory | None = None  # the requested path
    keyframes: dict[int, Tensor] = field(default_factory=dict)  # frame -> (H, W, 3) uint8; -1 is the last
    seams: list[int] = field(default_factory=list)
    colmap: bool = False  # whether pycolmap may be used for the camera too

    def has(self, task: str) -> bool:
        """Whether the clip has what the metrics of a task compare with."""
        given = {"motion": True, "reference": self.reference is not None, "camera": self.camera is not None}
        return (given | {"keyframes": bool(self.keyframes), "continuation": bool(self.seams)})[task]

    @cached_property
    def batch(self) -> Tensor:
        return to_tensor(self.video)[None]  # (1, 3, T, H, W)

    @cached_property
    def truth(self) -> Tensor:
        return to_tensor(self.reference)[None]  # (1, 3, T, H, W)

    @cached_property
    def flow(self) -> Flow:
        return optical_flow(self.video)

    @cached_property
    def estimate(self) -> Structure:
        return estimate_structure(self.video, self.camera.intrinsics, self.colmap)

    @cached_property
    def placed(self) -> bool:
        """Whether every frame's pose was found."""
        return bool(self.estimate.found.all())

    @cached_property
    def sums(self) -> dict[str, float]:
        return summed_errors(self.estimate.trajectory, self.camera)

    @cached_property
    def travels(self) -> float | None:
        return translation_error(self.estimate.trajectory, self.camera, self.estimate.found)

    @cached_property
    def joins(self) -> dict[str, float]:
        return seam_rows(self.batch, self.seams, self.flow.speed())

    @cached_property
    def drift(self) -> dict[str, float]:
        return drift(self.video, self.seams)


@dataclass(frozen=True)
class Metric:
    """One number of a task, and the order in which its controls must be ranked, best first."""

    task: str
    name: str
    title: str
    unit: str
    controls: tuple[str, ...]
    higher: bool  # whether more is better
    of: Callable[[Clip], Value]


METRICS: list[Metric] = []


def metric(task: str, title: str, unit: str = "", *, controls: tuple[str, ...] = (), higher: bool = True) -> Callable[..., Callable]:
    """Register a function TASK_NAME(clip) -> number. task: motion, or the input it needs: reference, camera, keyframes, continuation.

    unit: % for shares of clips. controls: synthetic clips (see `control_rows` of `kling-eval videos`) that it must rank in this order.
    """

    def register(function: Callable[[Clip], Value]) -> Callable[[Clip], Value]:
        METRICS.append(Metric(task, function.__name__.removeprefix(f"{task}_"), title, unit, controls, higher, function))
        return function

    return register


# --------------------------------------------------------------------------------------------------------------------- reference

TRUTH = ("truth", "shuffled", "noise")


@metric("reference", "PSNR", "dB", controls=TRUTH)
def reference_psnr(clip: Clip) -> Value:
    return float(psnr(clip.batch, clip.truth).mean())


@metric("reference", "SSIM", controls=TRUTH)
def reference_ssim(clip: Clip) -> Value:
    return float(ssim(clip.batch, clip.truth).mean())


@metric("reference", "temporal PSNR", "dB", controls=TRUTH)
def reference_temporal(clip: Clip) -> Value:
    return float(temporal_psnr(clip.batch, clip.truth).mean()) if len(clip.video) > 1 else None


@metric("reference", "VMAF", controls=("truth", "noise"))
def reference_vmaf(clip: Clip) -> Value:
    return vmaf(clip.video, clip.reference)


# ------------------------------------------------------------------------------------------------------------------------ motion


@metric("motion", "flicker", "levels", controls=("frozen", "noise"), higher=False)
def motion_flicker(clip: Clip) -> Value:
    return float(flicker(clip.batch)) if len(clip.video) > 2 else None


@metric("motion", "warp error, mean square", controls=("frozen", "turned"), higher=False)
def motion_warp(clip: Clip) -> Value:
    """None where no frame can be matched with the next."""
    return warp_error(clip.video, clip.flow)


@metric("motion", "frames that can be matched with the next", "%", controls=("frozen", "noise"))
def motion_matched(clip: Clip) -> Value:
    return matched(clip.flow)


@metric("motion", "dynamic degree", "%", controls=("turned", "frozen"))
def motion_dynamic(clip: Clip) -> Value:
    return dynamic_degree(clip.flow, clip.fps)


# ------------------------------------------------------------------------------------------------------------------------ camera


@metric("camera", "camera class (VBench's seven)", "%", controls=("turned", "frozen"))
def camera_class(clip: Clip) -> Value:
    name = vbench_class(clip.camera)
    return None if name is None else name in camera_classes(clip.flow)


@metric("camera", "RotErr", "°", controls=("turned", "frozen"), higher=False)
def camera_rotation(clip: Clip) -> Value:
    return rotation_error(clip.estimate.trajectory, clip.camera, clip.estimate.found)


@metric("camera", "RotErr, CamI2V's sum", "rad", controls=("turned", "frozen"), higher=False)
def camera_rotation_sum(clip: Clip) -> Value:
    return clip.sums["rotation"] if clip.placed else None


@metric("camera", "TransErr, relative", higher=False)
def camera_translation(clip: Clip) -> Value:
    return clip.travels


@metric("camera", "TransErr, CamI2V's sum", higher=False)
def camera_translation_sum(clip: Clip) -> Value:
    return clip.sums["translation"] if clip.travels is not None else None


@metric("camera", "CamMC, CamI2V's sum", controls=("turned", "frozen"), higher=False)
def camera_cammc(clip: Clip) -> Value:
    return clip.sums["cammc"] if clip.placed else None


@metric("camera", "camera found", "%", controls=("turned", "noise"))
def camera_registered(clip: Clip) -> Value:
    return clip.placed


def vbench_class(path: Trajectory) -> str | None:
    """VBench's class of a path, if it is one of the seven: a single axis, where sideways travel counts as a pan and forward as a zoom."""
    axes = {name: value for name, value in axes_of(path).items() if abs(value) > 0.5}
    if not axes:
        return "static"
    if len(axes) > 1:
        return None
    (name, value), names = next(iter(axes.items())), ("left", "right")
    if name in ("pan", "horizontal"):
        return f"pan_{names[value > 0]}"
    if name in ("tilt", "vertical"):
        return "tilt_up" if value > 0 else "tilt_down"
    if name in ("zoom", "dolly"):
        return "zoom_in" if (value > 0) == (name == "dolly") else "zoom_out"
    return None


# --------------------------------------------------------------------------------------------------------------------- keyframes


@metric("keyframes", "keyframes, PSNR", "dB", controls=("faded", "noise"))
def keyframes_psnr(clip: Clip) -> Value:
    """None for a still video, which another metric counts: repeating the keyframe must not score."""
    pairs = [(to_tensor(clip.video[f][None])[None], to_tensor(picture[None])[None]) for f, picture in clip.keyframes.items()]
    return None if keyframes_frozen(clip) else sum(float(psnr(a, b)) for a, b in pairs) / len(pairs)


@metric("keyframes", "stands still (in no mean)", "%", controls=("faded", "frozen"), higher=False)
def keyframes_frozen(clip: Clip) -> Value:
    return not (clip.video.float() - clip.video[:1]).abs().mean(dim=(1, 2, 3)).max() > STANDS_STILL


# ------------------------------------------------------------------------------------------------------------------ continuation

JOIN = ("frozen", "stepped")


@metric("continuation", "join, below its neighbours", "dB", controls=JOIN, higher=False)
def continuation_gap(clip: Clip) -> Value:
    return clip.joins["gap"]


@metric("continuation", "join, excess colour change", "levels", controls=JOIN, higher=False)
def continuation_jump(clip: Clip) -> Value:
    return clip.joins["colour"]


@metric("continuation", "join, change of speed", "px", controls=JOIN, higher=False)
def continuation_velocity(clip: Clip) -> Value:
    return clip.joins["velocity"]


@metric("continuation", "drift of colour a hop", "levels", controls=JOIN, higher=False)
def continuation_colour(clip: Clip) -> Value:
    return clip.drift["colour"]


@metric("continuation", "drift of contrast a hop", "%", controls=JOIN, higher=False)
def continuation_contrast(clip: Clip) -> Value:
    return clip.drift["contrast"]


@metric("continuation", "drift of sharpness a hop", "%", controls=JOIN, higher=False)
def continuation_sharpness(clip: Clip) -> Value:
    return clip.drift["sharpness"]
