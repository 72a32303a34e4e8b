"""Storyboards of the small world: clips of several shots of the same things on the same ground, a pure function of (seed, index).

    board = Storyboards(seed=0, frames=41).storyboard(7)        # its shots, each a `Scene`: the truth
    clip = Storyboards(seed=0, frames=41).clip(7)               # video, captions of every shot, the camera of all of them

Every shot looks at another place of the same ground, from another side. There the things stand elsewhere and move in another way, and the
camera begins anew: each shot's path and truth are relative to its own first frame, as those of a clip. Cuts are where latents begin.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from kling.cameras.axes import axes_trajectory, rotation
from kling.cameras.trajectory import Trajectory
from kling.data.world.captions import LANGUAGES, MOTIONS, caption
from kling.data.world.render import Solid, Take, render
from kling.data.world.scene import (
    COLOUR_RGB,
    FOCAL,
    GROUND_LOOK,
    HELD_OUT,
    PHRASINGS,
    Scene,
    Thing,
    World,
    place_of,
    start_pose,
    thing_path,
)
from kling.errors import UserError
from kling.runtime.random import derive_seed
from kling.shapes import aspect_size, first_frame, latent_frames

SHORTEST = 13  # pixel frames of a clip that has room for a cut
AWAY = 10.0  # metres from one shot's place to the first one's, at most, along each axis
TURNED = math.radians(60)  # and how far its view is turned, at most: the sun stays behind the camera
FEWEST = 2  # latent frames of a shot


@dataclass(frozen=True)
class Storyboard:
    """The ground truth of a clip of several shots."""

    index: int
    aspect: str
    frames: int
    shots: tuple[Scene, ...]  # each over its own frames, as its own camera sees it
    starts: tuple[int, ...]  # latent frame at which each begins; the first is 0
    places: tuple[Tensor, ...]  # (3, 4) each: from a shot's axes, in which its camera starts at `start_pose`, to those of the first shot

    @property
    def cuts(self) -> tuple[int, ...]:
        """Pixel frames at which a shot begins, without the first."""
        return tuple(first_frame(j) for j in self.starts[1:])

    @property
    def trajectory(self) -> Trajectory:
        """The cameras of all shots, each relative to its own first frame."""
        paths = [shot.trajectory for shot in self.shots]
        return Trajectory(torch.cat([path.c2w for path in paths]), torch.cat([path.intrinsics for path in paths]))


@dataclass(frozen=True)
class StoryClip:
    """A rendered storyboard: video (T, H, W, 3) uint8, and for every shot its captions by language."""

    video: Tensor
    captions: tuple[dict[str, list[str]], ...]
    trajectory: Trajectory
    storyboard: Storyboard


class Storyboards:
    """Storyboards by index, of `frames` pixel frames. split: "train" (no shot has a held-out combination), or "heldout" (the first thing of
    the first shot has one). Raises `UserError` for a length without room for a cut."""

    def __init__(
        self, seed: int = 0, frames: int = 41, aspect: str | None = None, split: str = "train", size: tuple[int, int] | None = None,
        max_things: int = 3,
    ) -> None:  # fmt: skip
        if frames < SHORTEST:
            raise UserError(f"a clip of {frames} frames has no room for a cut: give {SHORTEST} or more")
        self.seed, self.split, self.size = seed, split, size
        self.world = World(derive_seed(seed, "storyboards"), frames, aspect, split, size, max_things)

    def clip(self, index: int) -> StoryClip:
        board = self.storyboard(index)
        return StoryClip(render_storyboard(board, self.size), self.captions(board), board.trajectory, board)

    def captions(self, board: Storyboard) -> tuple[dict[str, list[str]], ...]:
        """For every shot `PHRASINGS` sentences per language, as those of a clip; every other one does not mention the camera."""
        rng = random.Random(f"story captions/{self.seed}/{self.split}/{board.index}")
        told = []
        for shot in board.shots:
            things = [(thing.colour, thing.solid, thing.motion) for thing in shot.things]
            told.append({
                language: [caption(things, shot.ground, shot.axes, shot.move, language, rng, camera=i % 2 == 0) for i in range(PHRASINGS)]
                for language in LANGUAGES
            })  # fmt: skip
        return tuple(told)

    def storyboard(self, index: int) -> Storyboard:
        rng = random.Random(f"storyboard/{self.seed}/{self.split}/{index}")
        first = self.world.scene(index)
        starts = _starts(latent_frames(first.frames), rng)
        ends = [*map(first_frame, starts[1:]), first.frames]
        shots, places = [], []
        motions = [thing.motion for thing in first.things]
        for k, (start, end) in enumerate(zip(map(first_frame, starts), ends, strict=True)):
            if k:
                motions = [self._other_motion(thing, before, rng) for thing, before in zip(first.things, motions, strict=True)]
            shots.append(self._shot(first, motions, end - start, rng))
            places.append(_place(rng) if k else torch.eye(3, 4))
        return Storyboard(index, first.aspect, first.frames, tuple(shots), starts, tuple(places))

    def _other_motion(self, thing: Thing, before: str, rng: random.Random) -> str:
        """A motion of a thing unlike that of the shot before, and not a held-out one."""
        return rng.choice([m for m in MOTIONS if m != before and (thing.colour, thing.solid, m) not in HELD_OUT])

    def _shot(self, first: Scene, motions: list[str], frames: int, rng: random.Random) -> Scene:
        """The things of a scene in a shot of their own: elsewhere, with these motions, and another camera."""
        H, W = self.size or aspect_size(first.aspect)
        half_view = 0.5 * W / (FOCAL * (H * W) ** 0.5)
        slots = rng.sample((-1, 0, 1), len(first.things)) if len(first.things) > 1 else [None]
        things = []
        for i, (thing, motion, slot) in enumerate(zip(first.things, motions, slots, strict=True)):
            x, z, room = place_of(rng, i, slot, half_view, thing.size)
            centre = thing_path(motion, x, z, thing.size, room, rng, frames)
            things.append(replace(thing, motion=motion, yaw=rng.uniform(0, math.pi / 2), centre=centre))
        axes, move = self.world.draw_camera(rng)
        camera = axes_trajectory(axes, frames, H, W, FOCAL)
        return replace(first, frames=frames, things=tuple(things), axes=axes, move=move, trajectory=camera)


def render_storyboard(board: Storyboard, size: tuple[int, int] | None = None) -> Tensor:
    """Video (T, H, W, 3) uint8 of all shots, one after another."""
    return render(takes_of(board), *(size or aspect_size(board.aspect)))


def takes_of(board: Storyboard) -> tuple[Take, ...]:
    """What `render_storyboard` renders: a take for every shot."""
    return tuple(_take(shot, place) for shot, place in zip(board.shots, board.places, strict=True))


def _take(shot: Scene, place: Tensor) -> Take:
    """A shot where it is: its things and its camera are moved together over the ground, under the same sun."""
    R, o = place[:, :3], place[:, 3]
    turned = math.atan2(float(R[0, 2]), float(R[0, 0]))
    solids = tuple(Solid(t.solid, COLOUR_RGB[t.colour], t.size, t.yaw + turned, t.centre @ R.T + o) for t in shot.things)
    start = start_pose()
    start = torch.cat([R @ start[:, :3], (R @ start[:, 3] + o)[:, None]], dim=1)
    return Take(solids, GROUND_LOOK[shot.ground], shot.phases, start, shot.trajectory)


def _place(rng: random.Random) -> Tensor:
    """A place on the ground and a side from which to look, (3, 4)."""
    zero = torch.zeros(())
    R = rotation(torch.tensor(rng.uniform(-TURNED, TURNED)), zero, zero)
    return torch.cat([R, torch.tensor([[rng.uniform(-AWAY, AWAY)], [0.0], [rng.uniform(-AWAY, AWAY)]])], dim=1)


def _starts(f: int, rng: random.Random) -> tuple[int, ...]:
    """The latent frames at which the shots of a clip of f begin: two to four shots, as there is room."""
    count = rng.choice((2,) if f < 8 else (2, 3) if f < 16 else (2, 3, 4))
    least = max(FEWEST, f // (count + 1))
    spare = sorted(rng.randint(0, f - count * least) for _ in range(count - 1))
    return (0, *(least * (k + 1) + more for k, more in enumerate(spare)))


def shot_ranges(starts: tuple[int, ...], frames: int) -> list[tuple[int, int]]:
    """(first, end) pixel frames of the shots that begin at these latent frames, of a clip of `frames`."""
    return list(pairwise([*map(first_frame, starts), frames]))
