"""Ray casting of the small world: a textured ground, a sky with clouds, and convex solids with anti-aliased outlines.

Everything is elementwise over (N, H, W) planes, N being the frames of all takes of a pass, so that hundreds of clips take a few hundred
operations, as one does. What differs between takes, such as colours, is a number per frame, (N, 1, 1). World axes are OpenCV's (x right,
y down, z forward); the ground is the plane y = 0 and the sky is where y is negative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kling.cameras.trajectory import Trajectory
from kling.runtime.device import upload

LIGHT = (-0.45, -0.80, -0.40)  # towards the sun, unit length
HAZE = torch.tensor([0.80, 0.86, 0.93])  # colour of the sky at the horizon, and of very distant ground
ZENITH = (0.36, 0.58, 0.88)  # and overhead
HAZE_DISTANCE = 30.0  # metres
FAR = 1e4
PIXELS_PER_PASS = 2**24  # of all frames that are rendered at once: 64 MB for each of about 40 planes

Planes = Sequence[Tensor]  # three of them


@dataclass(frozen=True)
class Solid:
    """A convex body and its path. `centre` is (T, 3) in world metres: the middle of the ball or cube, or of the cone's height."""

    shape: str  # ball, cube or cone
    colour: tuple[float, float, float]
    size: float  # half of its height and width, metres
    yaw: float  # radians about the vertical
    centre: Tensor


@dataclass(frozen=True)
class Ground:
    """Two colours and how they are mixed: `ripple` stretches the pattern along x, `cells` sharpens it into tiles."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    wavelength: float
    ripple: float = 1.0
    cells: bool = False


@dataclass(frozen=True)
class Take:
    """What one camera films without a cut: solids on a ground, over T frames.

    phases: (8,) in [0, 1), for the scene's own texture and clouds. start: (3, 4) world pose of camera frame 0. camera: relative to it.
    """

    solids: tuple[Solid, ...]
    ground: Ground
    phases: Tensor
    start: Tensor
    camera: Trajectory

    def __len__(self) -> int:
        return len(self.camera)

    def poses(self) -> tuple[Tensor, Tensor]:
        """Rotation (T, 3, 3) and position (T, 3) of the camera in the world."""
        R = self.start[:, :3]
        return R @ self.camera.c2w[:, :, :3], (R @ self.camera.c2w[:, :, 3:] + self.start[:, 3:])[:, :, 0]


def render(takes: Sequence[Take], H: int, W: int, device: torch.device | str = "cpu") -> Tensor:
    """The frames of all takes, one after another: (N, H, W, 3) uint8 on `device`. Takes may differ in everything, also in length.

    The host prepares numbers and indices and never waits for the device.
    """
    parts = [_render(part, H, W, torch.device(device)) for part in _passes(takes, PIXELS_PER_PASS // (H * W))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _passes(takes: Sequence[Take], frames: int) -> Iterator[list[Take]]:
    """Consecutive takes of at most `frames` in all, or one longer take."""
    part: list[Take] = []
    room = frames
    for take in takes:
        room -= len(take)
        if part and room < 0:
            yield part
            part, room = [], frames - len(take)
        part.append(take)
    yield part


@dataclass(frozen=True)
class _Look:
    """How the ground and the sky of every frame look: numbers (…, N, 1, 1)."""

    low: Tensor  # (3, N, 1, 1)
    span: Tensor  # (3, N, 1, 1) from the low to the high colour
    waves: Tensor  # (8, N, 1, 1) wave numbers, see `WAVES`
    ripple: Tensor
    p: Tensor  # (8, N, 1, 1) phases in radians
    kinds: dict[bool, slice | Tensor]  # frames whose ground has cells, and those whose ground has none


@dataclass(frozen=True)
class _Bodies:
    """One solid of each of some takes, in the n frames of these: numbers (…, n, 1, 1)."""

    at: slice | Tensor  # the frames, among those of the pass
    centre: Tensor  # (3, n, 1, 1)
    size: Tensor
    cos: Tensor  # of its yaw
    sin: Tensor
    colour: Tensor  # (3, n, 1, 1)


class _Pass:
    """The takes of one pass, N frames in all, whose numbers are brought to the device."""

    def __init__(self, takes: list[Take], device: torch.device) -> None:
        self.takes, self.device = takes, device
        self.lengths = torch.tensor([len(take) for take in takes])
        self.ends = list(accumulate(map(len, takes)))

    def frames_of(self, chosen: Sequence[int]) -> slice | Tensor:
        """The frames of the takes with these numbers, as an index: all of them without a copy."""
        if len(chosen) == len(self.takes):
            return slice(None)
        return upload(torch.cat([torch.arange(self.ends[i] - len(self.takes[i]), self.ends[i]) for i in chosen]), self.device)

    def numbers(self, frames: Sequence[Tensor], rows: list[list[float]], chosen: Sequence[int]) -> Tensor:
        """Columns (n, ·) of numbers for each frame, then a row of numbers for each of the takes `chosen` -> (columns, n, 1, 1)."""
        each = torch.tensor(rows).repeat_interleave(self.lengths[chosen], dim=0)  # (n, ·)
        return upload(torch.cat([*frames, each], dim=1).T.contiguous(), self.device)[..., None, None]

    def bodies(self, solids: Sequence[Sequence[Solid]]) -> Iterator[tuple[str, _Bodies]]:
        """The first solid of every take, then the second of those that have two, and so on, by their shape. solids: of every take."""
        for rank in range(max(map(len, solids))):
            for shape in _INTERSECT:
                same = {i: own[rank] for i, own in enumerate(solids) if rank < len(own) and own[rank].shape == shape}
                if same:
                    rows = [[s.size, math.cos(s.yaw), math.sin(s.yaw), *s.colour] for s in same.values()]
                    table = self.numbers([torch.cat([s.centre for s in same.values()])], rows, list(same))  # (9, n, 1, 1)
                    yield shape, _Bodies(self.frames_of(list(same)), table[:3], *table[3:6], table[6:])

    def look(self, table: Tensor) -> _Look:
        """From the columns of `look_row`."""
        low, span, waves, ripple, p = table.split((3, 3, len(WAVES), 1, 8))
        kinds = {cells: [i for i, take in enumerate(self.takes) if take.ground.cells == cells] for cells in (False, True)}
        return _Look(low, span, waves, ripple[0], p, {cells: self.frames_of(chosen) for cells, chosen in kinds.items() if chosen})


def _look_row(take: Take) -> list[float]:
    ground, k = take.ground, 2 * math.pi / take.ground.wavelength
    span = [high - low for low, high in zip(ground.low, ground.high, strict=True)]
    return [*ground.low, *span, *(share * k for share in WAVES), ground.ripple, *(take.phases * (2 * math.pi)).tolist()]


def _render(takes: list[Take], H: int, W: int, device: torch.device) -> Tensor:
    shoot, poses = _Pass(takes, device), [take.poses() for take in takes]
    R, o = (torch.cat(part) for part in zip(*poses, strict=True))  # (N, 3, 3), (N, 3)
    intrinsics = torch.cat([take.camera.intrinsics for take in takes])  # (N, 4)
    table = shoot.numbers([R.flatten(1), o, intrinsics], [_look_row(take) for take in takes], range(len(takes)))
    R, eye, (fx, fy, cx, cy), look = table.split((9, 3, 4, len(table) - 16))
    u = ((torch.arange(W, device=device) + 0.5) / W - cx) / fx  # (N, 1, W) at depth 1
    v = (((torch.arange(H, device=device) + 0.5) / H)[:, None] - cy) / fy  # (N, H, 1)
    R = R.unflatten(0, (3, 3))
    d = (R[:, 0] * u + R[:, 2]) + R[:, 1] * v  # (3, N, H, W) directions; no matrix product, which TF32 would round
    pixel = 1.0 / (fx * W)  # (N, 1, 1) size of a pixel at depth 1
    things = list(shoot.bodies([_far_to_near(take, o) for take, (_, o) in zip(takes, poses, strict=True)]))
    picture, depth = _backdrop(eye.unbind(), d.unbind(), pixel, shoot.look(look), [body for _, body in things])
    for shape, body in things:
        at = body.at
        cover, t, shade = _INTERSECT[shape](body, (eye[:, at] - body.centre).unbind(), d[:, at].unbind(), pixel[at])  # (n, H, W) each
        alpha, shown = cover * (t < depth[at]), picture[:, at]
        picture[:, at] = shown.lerp_(shade * body.colour, alpha)
        depth[at] = torch.where(alpha > 0.5, t, depth[at])
    return picture.mul_(255).round_().clamp_(0, 255).to(torch.uint8).movedim(0, -1).contiguous()  # (N, H, W, 3)


def _far_to_near(take: Take, eye: Tensor) -> Sequence[Solid]:
    """The solids by their mean distance from the eye (T, 3)."""
    if len(take.solids) < 2:
        return take.solids
    return sorted(take.solids, key=lambda s: -float((s.centre - eye).norm(dim=-1).mean()))


def _backdrop(eye: Planes, d: Planes, pixel: Tensor, look: _Look, shadows: list[_Bodies]) -> tuple[Tensor, Tensor]:
    """Ground and sky: colours (3, N, H, W) and depth (N, H, W)."""
    down = d[1].clamp(min=1e-4)
    t = (-eye[1] / down).clamp(max=FAR)  # depth of the ground along the ray
    x, z = eye[0] + t * d[0], eye[2] + t * d[2]
    # A pattern finer than its footprint would shimmer: fade it out. The footprint grows with t² at grazing angles.
    footprint = t * t * pixel / -eye[1]
    pattern = _pattern(x, z, footprint, look)
    for body in shadows:  # a soft contact shadow shows how high a thing is above the ground
        cx, cy, cz = body.centre
        r2 = ((x[body.at] - cx) ** 2 + (z[body.at] - cz) ** 2) / body.size**2
        height = (-cy - body.size).clamp(min=0)
        pattern[body.at] -= (0.8 / (1 + 2 * height)) * torch.exp(-r2 * 1.2)
    haze = torch.exp(t * (-1 / HAZE_DISTANCE)) * (d[1] > 1e-4)

    # Clouds lie on a dome: project the direction to a plane overhead. They are at infinity, so only rotation moves them.
    up = (-d[1]).clamp(min=0) * (d[0] ** 2 + d[1] ** 2 + d[2] ** 2).rsqrt()
    azimuth, p = torch.atan2(d[0], d[2]), look.p.unbind()
    clouds = torch.sin(6 * azimuth + 5 * up + p[0]) + torch.sin(11 * azimuth - 16 * up + p[1]) + torch.sin(17 * azimuth + 24 * up + p[2])
    clouds = (clouds * 0.25 + 0.15).clamp_(0, 0.75) * (up * 6).clamp_(max=1)
    overhead = (up * 2.2).clamp(max=1)

    picture = up.new_empty(3, *up.shape)
    for i, (horizon, zenith) in enumerate(zip(HAZE.tolist(), ZENITH, strict=True)):
        sky = (overhead * (zenith - horizon)).add_(horizon)
        sky += (0.97 - sky) * clouds
        torch.lerp(sky, look.low[i] + look.span[i] * pattern, haze, out=picture[i])
    return picture, torch.where(d[1] > 1e-4, t, FAR)


def _pattern(x: Tensor, z: Tensor, footprint: Tensor, look: _Look) -> Tensor:
    """The mixing ratio of the ground's two colours in [0, 1], about 0.5 where the pattern is too far away to be visible."""
    blur, fade, *_, a, b, c, e = look.waves
    near = torch.exp(-((footprint * blur) ** 2))
    far = torch.exp(-((footprint * fade) ** 2))
    fine = torch.empty_like(x)
    for cells, at in look.kinds.items():
        fine[at] = (_cells if cells else _waves)(x[at], z[at], look.waves[2:4, at], look.ripple[at], look.p[:, at])
    broad = torch.sin(a * x + b * z + look.p[5]) * torch.sin(c * z - e * x + look.p[6])
    return 0.5 + 0.36 * fine * near + 0.2 * broad * far


WAVES = (0.35, 0.12, 0.5, 1.0, 0.29, 0.17, 0.23, 0.13)  # the wave numbers of `_pattern`, in those of the ground


def _cells(x: Tensor, z: Tensor, k: Planes, ripple: Tensor, p: Planes) -> Tensor:
    return (3.0 * torch.sin(k[0] * x + p[3]) * torch.sin(k[0] * z + p[4])).clamp_(-1, 1)


def _waves(x: Tensor, z: Tensor, k: Planes, ripple: Tensor, p: Planes) -> Tensor:
    a, b = k[1] * (0.8 * x + 0.6 * z) / ripple + p[3], k[1] * (-0.5 * x + 0.85 * z) + p[4]
    return torch.sin(a + 0.8 * torch.sin(0.37 * b)) * torch.sin(b + 0.9 * torch.sin(0.41 * a))


def _lambert(normal: Planes) -> Tensor:
    """Brightness in [0.5, 1.05] for unit normals."""
    cosine = normal[0] * LIGHT[0] + normal[1] * LIGHT[1] + normal[2] * LIGHT[2]
    return 0.55 + 0.5 * cosine.clamp(min=0) + 0.1 * cosine.clamp(max=0)


def _turned(v: Sequence[Tensor | float], body: _Bodies) -> tuple[Tensor | float, ...]:
    """A vector in the axes of a body that is turned about the vertical."""
    return body.cos * v[0] - body.sin * v[2], v[1], body.sin * v[0] + body.cos * v[2]


def _edge(margin: Tensor) -> Tensor:
    """Coverage in [0, 1] of a pixel where a shape's margin (metres, positive inside) changes by |grad| over one pixel."""
    margin = margin.clamp(-1, 1)  # far from the outline the margin may jump, which is no edge
    gu = torch.nn.functional.pad((margin[..., 1:] - margin[..., :-1]).abs(), (0, 1))
    gv = torch.nn.functional.pad((margin[:, 1:] - margin[:, :-1]).abs(), (0, 0, 0, 1))
    return (0.5 + margin / (gu + gv + 1e-6)).clamp_(0, 1)


def _ball(body: _Bodies, o: Planes, d: Planes, pixel: Tensor) -> Planes:
    a = d[0] ** 2 + d[1] ** 2 + d[2] ** 2
    b = -(o[0] * d[0] + o[1] * d[1] + o[2] * d[2])
    c = o[0] ** 2 + o[1] ** 2 + o[2] ** 2
    nearest = b / a  # depth at which the ray passes closest
    distance = (c - b * nearest).clamp(min=0).sqrt()
    cover = (0.5 + (body.size - distance) / (nearest.abs() * pixel + 1e-6)).clamp_(0, 1) * (nearest > 0)
    t = nearest - ((body.size**2 - distance**2).clamp(min=0) / a).sqrt()
    normal = tuple((o[i] + t * d[i]) / body.size for i in range(3))
    return cover, t, _lambert(normal)


def _cube(body: _Bodies, o: Planes, d: Planes, pixel: Tensor) -> Planes:
    o, d = _turned(o, body), _turned(d, body)
    enter, leave = [], []
    for i in range(3):
        inverse = 1 / torch.where(d[i].abs() < 1e-5, 1e-5, d[i])
        middle, half = -o[i] * inverse, body.size * inverse.abs()
        enter.append(middle - half)
        leave.append(middle + half)
    t = torch.maximum(torch.maximum(enter[0], enter[1]), enter[2])
    exit = torch.minimum(torch.minimum(leave[0], leave[1]), leave[2])
    light = _turned(LIGHT, body)
    shade = torch.zeros_like(t)
    for i in range(3):  # the face entered last is the one seen
        cosine = -torch.sign(d[i]) * light[i]
        shade = torch.where(enter[i] >= t, 0.55 + 0.5 * cosine.clamp(min=0) + 0.1 * cosine.clamp(max=0), shade)
    return _edge(exit - t) * (t > 0.05), t, shade


def _cone(body: _Bodies, o: Planes, d: Planes, pixel: Tensor) -> Planes:
    """Apex up, base on the ground: radius falls linearly from `size` to 0 over a height of twice `size`."""
    k = 0.5  # radius per height
    apex = o[1] + body.size  # height below the apex, of the eye
    A = (d[0] ** 2 + d[2] ** 2 - k * k * d[1] ** 2).clamp(min=1e-4)
    B = o[0] * d[0] + o[2] * d[2] - k * k * apex * d[1]
    C = o[0] ** 2 + o[2] ** 2 - k * k * apex * apex
    disc = B * B - A * C
    root = disc.abs().sqrt()
    inverse = 1 / torch.where(d[1].abs() < 1e-5, 1e-5, d[1])
    middle, half = -o[1] * inverse, body.size * inverse.abs()
    side = (-B - root * (disc > 0)) / A
    t = torch.maximum(side, middle - half)
    exit = torch.minimum((-B + root * (disc > 0)) / A, middle + half)
    margin = torch.where(disc > 0, exit - t, torch.minimum(exit - t, -root / A))
    x, z = o[0] + t * d[0], o[2] + t * d[2]
    r = (x * x + z * z).sqrt() + 1e-6
    c = 1 / math.sqrt(1 + k * k)
    slanted = _lambert((x / r * c, torch.full_like(r, -k * c), z / r * c))
    return _edge(margin) * (t > 0.05), t, slanted


_INTERSECT = {"ball": _ball, "cube": _cube, "cone": _cone}
