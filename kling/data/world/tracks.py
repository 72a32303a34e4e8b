"""Exact tracks of the small world: where the camera sees its things and points of its ground and sky in every frame.

Nothing is stored for them: a clip's name determines its scene (`scene_of`), so any latent cache of the world has tracks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from kling.cameras.trajectory import Trajectory
from kling.condition.tracks import BACKGROUND, Tracks, joined
from kling.data.world.captions import LANGUAGES, caption
from kling.data.world.render import FAR
from kling.data.world.scene import SPLITS, Scene, World, start_pose

KINDS = {"things": 65, "ground": 15, "both": 20}  # what is tracked in a training clip, as weights
THING_POINTS = (1, 1, 2, 4, 8)  # points of a thing, each equally often
GROUND_POINTS = (1, 2, 4, 8, 16, 24)
INSIDE = 0.8  # share of a thing's outline, about its centre, in which its points lie
HIDES = 0.85  # of a thing's size: what is behind it and nearer than this to its centre is hidden
DROPPED = 0.2  # share of tracks that end early (ATI, arXiv 2505.22944)
UNSAID = 0.7  # share of captions that do not say how tracked things move, so that the tracks must
TELLS = 4  # points of the ground that show how the camera moves
SAY_CAMERA, MAY_SAY_CAMERA = 0.9, 0.5  # share of captions that say it, if nothing else shows it, and if something does


@lru_cache(maxsize=4096)  # a training draws every clip many times
def scene_of(name: str, frames: int) -> Scene | None:
    """The scene of a clip of the world by its name in a cache, over `frames` frames; None for other clips and for storyboards."""
    kind, *rest = name.split("/")
    if kind != "world" or len(rest) != 4 or rest[1] not in SPLITS:
        return None
    seed, split, aspect, index = rest
    return World(int(seed), frames, aspect, split).scene(int(index))


def is_unnamed(name: str) -> bool:
    """Whether a clip, by its name in a cache, shows motion that no word describes."""
    return name.startswith("world/") and name.split("/")[2] == "paths"


@np.errstate(invalid="ignore")
def project(points: Tensor, camera: Trajectory, poses: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Where the camera sees points (…, T, 3) of the world: x and y (…, T, 2), divided by width and height, and the depth (…, T) in metres.

    x = K Rᵀ (p - o), for the camera's world pose [R | o] in each frame. A point behind the camera is at infinity. poses: `world_poses` of
    the camera, if they are known already.
    """
    R, o = (t.numpy() for t in poses or world_poses(camera))  # (T, 3, 3), (T, 3); arrays, because the points are few
    off = (points.numpy() - o)[..., None]  # (…, T, 3, 1)
    seen = off[..., 0, :] * R[:, 0] + off[..., 1, :] * R[:, 1] + off[..., 2, :] * R[:, 2]  # (…, T, 3) in the camera's axes
    depth, k = seen[..., 2], camera.intrinsics.numpy()
    places = k[:, :2] * seen[..., :2] / np.maximum(depth, 1e-6)[..., None] + k[:, 2:]  # (…, T, 2)
    return torch.from_numpy(np.where(depth[..., None] > 0.05, places, np.float32(np.inf))), torch.from_numpy(depth)


def world_poses(camera: Trajectory) -> tuple[Tensor, Tensor]:
    """Rotation (T, 3, 3) and position (T, 3) of the camera in the world."""
    start = _start()
    return start[:, :3] @ camera.c2w[:, :, :3], (start[:, :3] @ camera.c2w[:, :, 3:] + start[:, 3:])[:, :, 0]


_start = cache(start_pose)


@dataclass(frozen=True)
class Places:
    """Where the k things of a scene are in the picture: centres (k, T, 2) and half of their height (k, T, 2), both divided by width and
    height; depth (k, T) in metres; and the poses of the camera in the world."""

    centre: Tensor
    half: Tensor
    depth: Tensor
    poses: tuple[Tensor, Tensor]

    def visible(self, k: int, t: int) -> bool:
        """Whether the centre of thing k is in the picture of frame t, and no nearer thing is in front of it."""
        x, y = self.centre[k, t].tolist()
        return 0 <= x <= 1 and 0 <= y <= 1 and not self.hides(self.centre[k], self.depth[k], but=k)[t].item()

    @np.errstate(invalid="ignore")
    def hides(self, place: Tensor, depth: Tensor, but: int | None = None) -> Tensor:
        """(…, T) bool: points at places (…, T, 2) and depths (…, T) that are behind a thing, other than thing `but`."""
        at, far = place.numpy(), depth.numpy()
        hidden = np.zeros(far.shape, bool)
        for k, (centre, half, near) in enumerate(zip(self.centre.numpy(), self.half.numpy(), self.depth.numpy(), strict=True)):
            if k != but:
                off = (at - centre) / (np.float32(HIDES) * half)  # (…, T, 2)
                hidden |= (off[..., 0] ** 2 + off[..., 1] ** 2 < 1) & (far > near)
        return torch.from_numpy(hidden)


def places_of(scene: Scene) -> Places:
    """Where the things of a scene are in every frame."""
    centres = torch.stack([thing.centre for thing in scene.things])  # (k, T, 3)
    poses = world_poses(scene.trajectory)
    centre, depth = project(centres, scene.trajectory, poses)
    size = torch.tensor([thing.size for thing in scene.things])[:, None, None]  # (k, 1, 1)
    return Places(centre, size * scene.trajectory.intrinsics[:, :2] / depth.clamp(min=0.05)[..., None], depth, poses)


def thing_tracks(scene: Scene, k: int, offsets: Tensor, places: Places | None = None) -> Tracks:
    """Tracks of n points of thing k, with code k + 1. offsets: (n, 2) from its centre to the right and down in frame 0, in its sizes.
    places: of the scene, if they are known already."""
    places = places or places_of(scene)
    R, _ = places.poses
    thing = scene.things[k]
    points = thing.centre + thing.size * (offsets @ R[0, :, :2].T)[:, None]  # (n, T, 3)
    place, depth = project(points, scene.trajectory, places.poses)
    return Tracks(place, ~places.hides(place, depth, but=k), torch.full((len(offsets),), k + 1))


def ground_tracks(scene: Scene, pixels: Tensor, start: int = 0, places: Places | None = None) -> Tracks:
    """Tracks of the points of ground and sky at places `pixels` (n, 2) of frame `start`; those that a thing hides there are left out.
    places: of the scene's things, if they are known already."""
    places = places or places_of(scene)
    R, o = places.poses
    f, c = scene.trajectory.intrinsics[start, :2], scene.trajectory.intrinsics[start, 2:]
    rays = torch.cat([(pixels - c) / f, torch.ones(len(pixels), 1)], dim=1) @ R[start].T  # (n, 3)
    far = torch.where(rays[:, 1] > 1e-4, -o[start, 1] / rays[:, 1].clamp(min=1e-4), FAR).clamp(max=FAR)  # the ground is y = 0
    points = o[start] + far[:, None] * rays  # (n, 3)
    place, depth = project(points[:, None].expand(-1, scene.frames, -1), scene.trajectory, places.poses)
    there = ~places.hides(place, depth)
    kept = there[:, start]
    return Tracks(place[kept], there[kept], torch.full((int(kept.sum()),), BACKGROUND))


@dataclass(frozen=True)
class Brushed:
    """What is tracked in a training clip: the tracks, the things they are on, and how many are on the ground and the sky."""

    tracks: Tracks
    things: tuple[int, ...]
    ground: int


def draw_tracks(scene: Scene, rng: random.Random, start: int = 0) -> Brushed:
    """Tracks as a user might give them, from frame `start` on: of one to three visible things, of ground and sky, or of both."""
    kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
    places, parts, things, ground = places_of(scene), [], (), 0
    seen = [k for k in range(len(scene.things)) if places.visible(k, start)]
    unnamed = {k for k in seen if not scene.things[k].motion}  # only tracks tell how these move
    if unnamed or (seen and kind != "ground"):
        things = tuple(sorted(unnamed | set(rng.sample(seen, rng.randint(1, len(seen))))))
        for k in things:
            offsets = [point_on(scene.things[k].solid, rng) for _ in range(rng.choice(THING_POINTS))]
            offsets[0] = (0.0, 0.0) if rng.random() < 0.5 else offsets[0]
            parts.append(thing_tracks(scene, k, torch.tensor(offsets), places))
    if kind != "things" or not parts:
        pixels = torch.tensor([(rng.random(), rng.random()) for _ in range(rng.choice(GROUND_POINTS))])
        parts.append(ground_tracks(scene, pixels, start, places))
        ground = len(parts[-1])
    parts = [_shortened(part, rng, start) for part in parts]
    return Brushed(joined(parts), things, ground)


def point_on(solid: str, rng: random.Random) -> tuple[float, float]:
    """A random point of a solid's outline, seen from the side: from its centre to the right and down, in its sizes."""
    while True:
        x, y = rng.uniform(-INSIDE, INSIDE), rng.uniform(-INSIDE, INSIDE)
        wide = {"ball": max(0.0, INSIDE**2 - y * y) ** 0.5, "cube": INSIDE, "cone": INSIDE * (1 + y) / 2}[solid]
        if abs(x) <= wide:
            return x, y


def _shortened(tracks: Tracks, rng: random.Random, start: int) -> Tracks:
    """The tracks of one thing, from `start` on, and in some cases to an early end."""
    T = tracks.there.shape[1]
    end = rng.randint(min(T, start + 2), T) if rng.random() < DROPPED else T
    there = torch.zeros_like(tracks.there)
    there[:, start:end] = tracks.there[:, start:end]
    return Tracks(tracks.points, there, tracks.code)


def brushed_caption(
    scene: Scene, brushed: Brushed, camera_shown: bool, rng: random.Random, pointed: Mapping[int, int] | None = None
) -> str:
    """A caption that mostly leaves it to the tracks how their things move, and how the camera does if the tracks show that. pointed: see
    `retold`."""
    unsaid = brushed.things if rng.random() < UNSAID else ()
    return retold(scene, camera_shown or brushed.ground >= TELLS, rng, unsaid, pointed)


def retold(
    scene: Scene, camera_shown: bool, rng: random.Random, unsaid: Sequence[int] = (), pointed: Mapping[int, int] | None = None
) -> str:
    """A caption that does not say how the things `unsaid` move, and points at the references of others. pointed: thing -> its reference.
    camera_shown: something else shows how the camera moves."""
    pointed = pointed or {}
    things = [
        (pointed.get(k, thing.colour), thing.solid, None if k in unsaid else thing.motion or None) for k, thing in enumerate(scene.things)
    ]
    say = rng.random() < (MAY_SAY_CAMERA if camera_shown or not scene.axes else SAY_CAMERA)
    return caption(things, scene.ground, scene.axes, scene.move, rng.choice(LANGUAGES), rng, camera=say)
