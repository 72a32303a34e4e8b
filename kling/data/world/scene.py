"""The small world: a procedural 3-D scene as a pure function of (seed, index), with its captions, its camera and its ground truth.

It is the training set of the shipped model, the fixture of the tests and the reference of the evaluation.

    world = World(seed=0, frames=41)
    clip = world.clip(7)            # video, captions in two languages, trajectory, scene
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from kling.cameras.axes import MOVES, UNITS, axes_trajectory
from kling.cameras.trajectory import Trajectory
from kling.data.world.captions import COLOURS, GROUNDS, LANGUAGES, MOTIONS, SOLIDS, caption
from kling.data.world.render import Ground, Solid, Take, render
from kling.errors import unknown
from kling.shapes import ASPECTS, aspect_size, latent_frames

FPS = 8.0
EYE_HEIGHT = 2.0  # metres above the ground at frame 0 of every scene, so that the depth of the ground is known exactly
EYE_PITCH = 10.0  # degrees down, likewise
FOCAL = 1.1  # in units of sqrt(H * W) pixels
PHRASINGS = 3  # captions per language

COLOUR_RGB = {
    "red": (0.84, 0.10, 0.10),
    "orange": (0.98, 0.50, 0.06),
    "yellow": (0.97, 0.90, 0.12),
    "green": (0.05, 0.66, 0.18),
    "cyan": (0.10, 0.84, 0.86),
    "blue": (0.10, 0.20, 0.86),
    "purple": (0.48, 0.10, 0.66),
    "pink": (0.99, 0.50, 0.76),
}
GROUND_LOOK = {
    "grass": Ground((0.16, 0.26, 0.10), (0.40, 0.50, 0.20), wavelength=1.3),
    "sand": Ground((0.60, 0.50, 0.34), (0.88, 0.79, 0.58), wavelength=1.2, ripple=3.0),
    "tiles": Ground((0.30, 0.30, 0.32), (0.66, 0.66, 0.68), wavelength=1.7, cells=True),
    "snow": Ground((0.76, 0.82, 0.90), (0.98, 0.98, 1.00), wavelength=1.9),
    "water": Ground((0.02, 0.14, 0.26), (0.16, 0.40, 0.54), wavelength=1.1, ripple=2.2),
}
assert set(COLOUR_RGB) == set(COLOURS) and set(GROUND_LOOK) == set(GROUNDS)

# (colour, solid, motion) combinations that no object of any training clip has: 14 of 168.
HELD_OUT = (
    ("red", "ball", "left"),
    ("red", "cone", "bounce"),
    ("orange", "cube", "right"),
    ("orange", "ball", "still"),
    ("yellow", "cone", "toward"),
    ("yellow", "cube", "circle"),
    ("green", "ball", "away"),
    ("green", "cube", "left"),
    ("cyan", "cone", "right"),
    ("cyan", "ball", "bounce"),
    ("blue", "cube", "toward"),
    ("blue", "cone", "still"),
    ("purple", "ball", "circle"),
    ("pink", "cube", "away"),
)


@dataclass(frozen=True)
class Thing:
    """One object: its description in the captions, and its true position."""

    colour: str
    solid: str
    motion: str  # empty for a path that no word describes
    size: float  # half its height, metres
    yaw: float
    centre: Tensor  # (T, 3) world metres, y down, ground at 0


@dataclass(frozen=True)
class Scene:
    """The ground truth of a clip."""

    index: int
    aspect: str
    frames: int
    ground: str
    things: tuple[Thing, ...]
    axes: dict[str, float]  # camera axes, empty for a static camera
    move: str  # a master shot's name, "static", or "" for single axes and combinations of axes
    phases: Tensor  # (8,) texture and clouds
    trajectory: Trajectory


@dataclass(frozen=True)
class WorldClip:
    """A rendered scene: video (T, H, W, 3) uint8, and captions by language."""

    video: Tensor
    captions: dict[str, list[str]]
    trajectory: Trajectory
    scene: Scene


def start_pose() -> Tensor:
    """World pose (3, 4) of every scene's first camera: `EYE_HEIGHT` above the ground, looking `EYE_PITCH` down, along +z."""
    a = math.radians(-EYE_PITCH)
    R = torch.tensor([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    return torch.cat([R, torch.tensor([[0.0], [-EYE_HEIGHT], [0.0]])], dim=1)


SPLITS = ("train", "heldout", "paths")
FREE = 0.7  # share of the objects of the split "paths" that follow one


class World:
    """Scenes by index. `split` is "train" (no held-out combination), "heldout" (the first object is one), or "paths" (as "train", but most
    objects follow a path that no word describes, for the motion brush)."""

    def __init__(
        self,
        seed: int = 0,
        frames: int = 41,
        aspect: str | None = None,
        split: str = "train",
        size: tuple[int, int] | None = None,
        max_things: int = 3,
    ) -> None:
        latent_frames(frames)  # raises unless frames is 1 + 4k
        if aspect is not None and aspect not in ASPECTS:
            raise unknown("aspect", aspect, ASPECTS)
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        self.seed, self.frames, self.aspect, self.split, self.size, self.max_things = seed, frames, aspect, split, size, max_things

    def clip(self, index: int) -> WorldClip:
        scene = self.scene(index)
        return WorldClip(render_scene(scene, self.size), self.captions(scene), scene.trajectory, scene)

    def captions(self, scene: Scene) -> dict[str, list[str]]:
        """`PHRASINGS` sentences per language; every other one does not mention the camera."""
        rng = random.Random(f"captions/{self.seed}/{self.split}/{scene.index}")
        things = [(t.colour, t.solid, t.motion or None) for t in scene.things]
        return {
            language: [caption(things, scene.ground, scene.axes, scene.move, language, rng, camera=i % 2 == 0) for i in range(PHRASINGS)]
            for language in LANGUAGES
        }

    def scene(self, index: int) -> Scene:
        rng = random.Random(f"scene/{self.seed}/{self.split}/{index}")
        aspect = self.aspect or rng.choices(list(ASPECTS), weights=(3, 1, 1))[0]
        H, W = self.size or aspect_size(aspect)
        axes, move = self.draw_camera(rng)
        count = min(self.max_things, rng.choices((1, 2, 3), weights=(6, 3, 1))[0])
        half_view = 0.5 * W / (FOCAL * (H * W) ** 0.5)  # tangent of half the horizontal view
        slots = rng.sample((-1, 0, 1), count) if count > 1 else [None]
        colours = rng.sample(list(COLOURS), count)  # distinct, so that a sentence identifies each thing
        things = tuple(self._thing(rng, i, colours[i], slot, half_view, aspect) for i, slot in enumerate(slots))
        phases = torch.tensor([rng.random() for _ in range(8)])
        trajectory = axes_trajectory(axes, self.frames, H, W, FOCAL)
        return Scene(index, aspect, self.frames, rng.choice(list(GROUNDS)), things, axes, move, phases, trajectory)

    def _thing(self, rng: random.Random, place: int, colour: str, slot: int | None, half_view: float, aspect: str) -> Thing:
        solid, motion = rng.choice(list(SOLIDS)), rng.choice(list(MOTIONS))
        if self.split == "heldout" and place == 0:
            colour, solid, motion = rng.choice(HELD_OUT)
        elif (colour, solid, motion) in HELD_OUT:
            solid, motion = rng.choice([(s, m) for s in SOLIDS for m in MOTIONS if (colour, s, m) not in HELD_OUT])
        size, yaw = rng.uniform(0.5, 0.72), rng.uniform(0, math.pi / 2)
        x, z, room = place_of(rng, place, slot, half_view, size)
        if self.split == "paths" and rng.random() < FREE:
            return Thing(colour, solid, "", size, yaw, free_path(x, z, size, half_view, rng, self.frames))
        return Thing(colour, solid, motion, size, yaw, thing_path(motion, x, z, size, room, rng, self.frames))

    def draw_camera(self, rng: random.Random) -> tuple[dict[str, float], str]:
        """`axes` and `move` of a `Scene`."""
        kind = rng.choices(("static", "axis", "move", "mixture"), weights=(30, 40, 12, 18))[0]
        if kind == "static":
            return {}, "static"
        if kind == "move":
            move = rng.choice(list(MOVES))
            return dict(MOVES[move]), move
        names = rng.sample(list(UNITS), 1 if kind == "axis" else rng.choice((2, 2, 3)))
        return {name: round(rng.choice((-1, 1)) * rng.uniform(3, 10), 1) for name in sorted(names)}, ""


def place_of(rng: random.Random, place: int, slot: int | None, half_view: float, size: float) -> tuple[float, float, float]:
    """Where a thing stands, x and z in metres, and the metres from the middle to the edge of the picture there. place: its number. slot: a
    third of the picture (-1, 0, 1); None for a thing that is alone."""
    z = rng.uniform(4.6, 6.2) if slot is None else 5.2 + 1.6 * ((slot + 1 + place) % 3) * 0.6 + rng.uniform(-0.2, 0.2)
    room = max(half_view * z - size, 0.3)
    x = rng.uniform(-0.45, 0.45) * room if slot is None else slot * 0.62 * room
    return x, z, room


def thing_path(motion: str, x: float, z: float, size: float, room: float, rng: random.Random, T: int) -> Tensor:
    """Centre of a thing in world metres (T, 3). Its motion spans the whole clip, of any length; bounces and circles keep real time."""
    s = torch.linspace(0, 1, T) if T > 1 else torch.zeros(1)
    seconds = torch.arange(T) / FPS
    xs, ys, zs = torch.full((T,), x), torch.full((T,), -size), torch.full((T,), z)
    if motion in ("left", "right"):
        sign = 1 if motion == "right" else -1
        way = 1.3 * room
        xs = x * 0.3 + sign * way * (s - 0.5)
    elif motion in ("toward", "away"):
        near, far = z - 1.4, z + 2.4
        zs = far + (near - far) * s if motion == "toward" else near + (far - near) * s
        xs = xs * zs / zs[0] * 0.8  # keeps its position in the picture
    elif motion == "bounce":
        phase = (seconds / 1.25 + rng.random()) % 1
        ys = -size - 4 * 0.9 * phase * (1 - phase)
    elif motion == "circle":
        angle = 2 * math.pi * (seconds / 3.0 + rng.random())
        xs, zs = x * 0.5 + 0.8 * torch.cos(angle), z + 0.8 * torch.sin(angle)
    return torch.stack([xs, ys, zs], dim=1)


def free_path(x: float, z: float, size: float, half_view: float, rng: random.Random, T: int) -> Tensor:
    """A path over the ground from (x, z) to any place that the first camera sees, straight or in an arc, at a steady or an eased speed:
    (T, 3) world metres. half_view: tangent of half the horizontal view."""
    end_z = rng.uniform(4.0, 7.5)
    end_x = rng.uniform(-0.85, 0.85) * max(half_view * end_z - size, 0.3)
    bend = rng.choice((0.0, 0.0, rng.uniform(-0.5, 0.5)))  # of the way, to the side of its middle
    s = torch.linspace(0, 1, T) if T > 1 else torch.zeros(1)
    s = s * s * (3 - 2 * s) if rng.random() < 0.3 else s
    side = 4 * s * (1 - s) * bend
    xs, zs = x + s * (end_x - x) - side * (end_z - z), z + s * (end_z - z) + side * (end_x - x)
    return torch.stack([xs, torch.full((T,), -size), zs.clamp(min=3.0)], dim=1)


def render_scene(scene: Scene, size: tuple[int, int] | None = None) -> Tensor:
    """Video (T, H, W, 3) uint8 of a scene, at its aspect's size or another size with the same field of view."""
    return render([take_of(scene)], *(size or aspect_size(scene.aspect)))


def take_of(scene: Scene) -> Take:
    """What `render_scene` renders."""
    solids = tuple(Solid(t.solid, COLOUR_RGB[t.colour], t.size, t.yaw, t.centre) for t in scene.things)
    return Take(solids, GROUND_LOOK[scene.ground], scene.phases, start_pose(), scene.trajectory)
