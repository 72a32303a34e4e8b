"""Measures a small-world clip against its ground truth: one row of named numbers per clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from kling.cameras.trajectory import Trajectory
from kling.metrics.brush import follows
from kling.metrics.camera.errors import axes_of, camera_class, rotation_error, translation_error
from kling.metrics.camera.odometry import Stage, estimate_trajectory
from kling.metrics.control import QUESTIONS, Detectors
from kling.metrics.permanence import permanence
from kling.metrics.report import Row
from kling.metrics.shots import shots_row
from kling.metrics.things import read_things


@dataclass
class Ruler:
    """The known properties of the world's stage, and detectors fitted to rendered clips."""

    stage: Stage
    detectors: Detectors

    def words(self, video: Tensor, labels: Mapping[str, str]) -> Row:
        """Right or wrong for each of `QUESTIONS`. video: (T, H, W, 3) uint8."""
        reading = self.detectors.read(video)
        return {question: reading[question] == labels[question] for question in QUESTIONS}

    def things(self, video: Tensor, labels: Sequence[Mapping[str, str]]) -> Row:
        """Whether every object has its colour, its solid and its motion, and "right": all of these and the ground."""
        readings = read_things(video, self.detectors, [thing["colour"] for thing in labels])
        row = {q: all(x[q] == thing[q] for x, thing in zip(readings, labels, strict=True)) for q in QUESTIONS}
        return row | {"right": all(row.values())}

    def permanence(self, video: Tensor, count: int, leaves: bool = False) -> Row:
        """Whether `count` objects stay the same; leaves: the camera may move them out of the picture. See `permanence`."""
        return permanence(video, self.detectors.palette, count, self.detectors.solid, leaves)

    def brush(self, video: Tensor, colour: str, asked: Tensor, size: Tensor, other: Mapping[str, str] | None) -> Row:
        """How the thing of a colour follows its path (T, 2) in pixels, see `kling.metrics.brush.follows`; and "other": whether the other
        thing moves as its labels say. other: None if the camera moves, in which no motion can be read."""
        row = follows(video, self.detectors.palette, colour, asked, size)
        moves = None if other is None else read_things(video, self.detectors, [colour, other["colour"]])[1]["motion"] == other["motion"]
        return row | {"other": moves}

    def shots(self, video: Tensor, ranges: Sequence[tuple[int, int]], labels: Sequence[Mapping[str, str]]) -> Row:
        """Whether cuts are where they were asked, and what each shot (first, end frame) shows. See `kling.metrics.shots.shots_row`."""
        return shots_row(video, ranges, labels, self.detectors)

    def camera(self, video: Tensor, asked: Trajectory, axes: Mapping[str, float] | None) -> Row:
        """Errors of the camera's path. axes: of a single axis, a master shot or a static camera; None for combinations.

        class: whether the path would be called the same. rotation: degrees. translation: see `translation_error`. registered: whether every
        frame's pose was found. A camera that was not found has no rotation and no translation, and is of no class but a wrong one.
        """
        estimate = estimate_trajectory(video, self.stage)
        found = estimate.registered
        named = bool(found.all()) and axes is not None
        return {
            "class": None if axes is None else named and camera_class(axes_of(estimate.trajectory)) == camera_class(axes),
            "rotation": rotation_error(estimate.trajectory, asked, found),
            "translation": translation_error(estimate.trajectory, asked, found),
            "registered": bool(found.all()),
        }
