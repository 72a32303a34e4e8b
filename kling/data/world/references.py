"""Pictures of the things of a scene, for references: the same solid in the same colour, from another view, on another ground, at another
size, and alone.

They are a pure function of the clip's name, as its scene is: what each of them shows need not be stored.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kling.cameras.axes import axes_trajectory
from kling.cameras.trajectory import Trajectory
from kling.condition.state import MOST_REFERENCES
from kling.data.world.captions import COLOURS, SOLIDS
from kling.data.world.render import Ground, Solid, Take, render
from kling.data.world.scene import COLOUR_RGB, FOCAL, GROUND_LOOK, Scene

PLAIN = Ground((0.86, 0.86, 0.86), (0.86, 0.86, 0.86), wavelength=1.0)  # what a thing that was photographed for a catalogue stands on
LARGE = (0.25, 0.48)  # height of the thing in the picture, as a share of the shorter side
ELEVATION = (4.0, 28.0)  # degrees by which the eye is above the thing
AIM = 3.0  # degrees by which it looks above or below it, at most


@dataclass(frozen=True)
class Reference:
    """A picture of one thing. `thing` is its place in the scene; None if the clip does not show it, and no word points at it."""

    thing: int | None
    colour: str
    solid: str
    ground: str  # empty for a plain one
    yaw: float  # radians
    share: float  # of the picture's shorter side that it is high
    elevation: float  # degrees
    aim: float  # degrees
    aside: float  # from -1 to 1, where it still touches neither edge
    phases: Tensor  # (8,) texture and clouds


def draw_references(scene: Scene, count: int, name: str, plain: bool = True) -> list[Reference]:
    """`count` pictures for the clip of that name: its things in a random order, then others, of colours that it does not have.

    plain: some are on a plain ground. Raises `ValueError` for more than `MOST_REFERENCES`.
    """
    if count > MOST_REFERENCES:
        raise ValueError(f"{count} references of a clip: at most {MOST_REFERENCES}")
    rng = random.Random(f"references/{name}")
    shown = rng.sample(range(len(scene.things)), len(scene.things))
    absent = rng.sample([c for c in COLOURS if c not in {thing.colour for thing in scene.things}], MOST_REFERENCES)
    grounds = [ground for ground in (*GROUND_LOOK, *([""] if plain else [])) if ground != scene.ground]
    found = []
    for i in range(count):
        k = shown[i] if i < len(shown) else None
        colour, solid = (absent[i], rng.choice(list(SOLIDS))) if k is None else (scene.things[k].colour, scene.things[k].solid)
        view = [rng.uniform(*between) for between in ((0, math.pi / 2), LARGE, ELEVATION, (-AIM, AIM), (-1, 1))]
        found.append(Reference(k, colour, solid, rng.choice(grounds), *view, torch.tensor([rng.random() for _ in range(8)])))
    return found


def render_reference(reference: Reference, H: int, W: int) -> Tensor:
    """The picture (H, W, 3) uint8."""
    return render([reference_take(reference, H, W)], H, W)[0]


def reference_take(reference: Reference, H: int, W: int) -> Take:
    """What `render_reference` renders, one frame. The eye's distance makes the thing as large as it should be."""
    size, focal = 0.5, FOCAL * (H * W) ** 0.5  # half the thing's height in metres, and pixels
    far = 2 * size * focal / (reference.share * min(H, W))  # metres from the eye
    up, down = math.radians(reference.elevation), math.radians(reference.elevation + reference.aim)
    x = reference.aside * max(0.0, 0.5 * W / focal * far - 1.5 * size)
    centre = torch.tensor([[x, -size, far * math.cos(up)]])  # (1, 3)
    R = torch.tensor([[1, 0, 0], [0, math.cos(down), math.sin(down)], [0, -math.sin(down), math.cos(down)]])
    start = torch.cat([R, torch.tensor([[0.0], [-size - far * math.sin(up)], [0.0]])], dim=1)  # (3, 4) world pose of the eye
    solid = Solid(reference.solid, COLOUR_RGB[reference.colour], size, reference.yaw, centre)
    ground = GROUND_LOOK[reference.ground] if reference.ground else PLAIN
    return Take((solid,), ground, reference.phases, start, _still(H, W))


@cache
def _still(H: int, W: int) -> Trajectory:
    """A camera of one frame."""
    return axes_trajectory({}, 1, H, W, FOCAL)
