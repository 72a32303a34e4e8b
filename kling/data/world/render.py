"""Ray casting of the small world: a textured ground, a sky with clouds, and convex solids with anti-aliased outlines.

Everything is elementwise over (T, H, W) planes, so one clip takes a few hundred vectorised operations. World axes are OpenCV's
(x right, y down, z forward); the ground is the plane y = 0 and the sky is where y is negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kling.cameras.trajectory import Trajectory, pixel_rays

LIGHT = torch.tensor([-0.45, -0.80, -0.40])  # towards the sun, unit length
HAZE = torch.tensor([0.80, 0.86, 0.93])  # colour of the sky at the horizon, and of very distant ground
HAZE_DISTANCE = 30.0  # metres
FAR = 1e4

Planes = tuple[Tensor, Tensor, Tensor]


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
    """Two colours and how they are mixed: `ripple` stretches the pattern along x, `hard` sharpens it into cells."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    wavelength: float
    ripple: float = 1.0
    cells: bool = False


def render(solids: list[Solid], ground: Ground, phases: Tensor, start: Tensor, camera: Trajectory, H: int, W: int) -> Tensor:
    """Video (T, H, W, 3) uint8.

    phases: (8,) in [0, 1), for the scene's own texture and clouds. start: (3, 4) world pose of camera frame 0. camera: relative to it.
    """
    R = start[:, :3] @ camera.c2w[:, :, :3]  # (T, 3, 3)
    o = (start[:, :3] @ camera.c2w[:, :, 3:] + start[:, 3:])[:, :, 0]  # (T, 3)
    d = torch.einsum("tij,tjhw->ithw", R, pixel_rays(camera.intrinsics, H, W)).contiguous()  # (3, T, H, W)
    pixel = 1.0 / (camera.intrinsics[:, 0] * W)[:, None, None]  # (T, 1, 1) size of a pixel at depth 1
    eye = tuple(o[:, i, None, None] for i in range(3))  # 3 x (T, 1, 1)
    rays = tuple(d)  # 3 x (T, H, W)

    picture, depth = _backdrop(eye, rays, pixel, ground, phases, solids)
    for solid in sorted(solids, key=lambda s: -float((s.centre - o).norm(dim=-1).mean())):  # from far to near
        cover, t, shade = _INTERSECT[solid.shape](solid, eye, rays, pixel)
        alpha = cover * (t < depth)
        for i in range(3):
            picture[i].lerp_(shade * solid.colour[i], alpha)
        depth = torch.where(alpha > 0.5, t, depth)
    return torch.stack(picture, dim=-1).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _backdrop(eye: Planes, d: Planes, pixel: Tensor, ground: Ground, phases: Tensor, solids: list[Solid]) -> tuple[list[Tensor], Tensor]:
    """Ground and sky: three colour planes and the depth (T, H, W)."""
    down = d[1].clamp(min=1e-4)
    t = (-eye[1] / down).clamp(max=FAR)  # depth of the ground along the ray
    x, z = eye[0] + t * d[0], eye[2] + t * d[2]
    # A pattern finer than its footprint would shimmer: fade it out. The footprint grows with t² at grazing angles.
    footprint = t * t * pixel / -eye[1]
    pattern = _pattern(x, z, footprint, ground, phases)
    for solid in solids:  # a soft contact shadow shows how high a thing is above the ground
        cx, cy, cz = (solid.centre[:, i, None, None] for i in range(3))
        r2 = ((x - cx) ** 2 + (z - cz) ** 2) / solid.size**2
        height = (-cy - solid.size).clamp(min=0)
        pattern = pattern - (0.8 / (1 + 2 * height)) * torch.exp(-r2 * 1.2)
    haze = torch.exp(t * (-1 / HAZE_DISTANCE)) * (d[1] > 1e-4)

    # Clouds lie on a dome: project the direction to a plane overhead. They are at infinity, so only rotation moves them.
    up = (-d[1]).clamp(min=0) * (d[0] ** 2 + d[1] ** 2 + d[2] ** 2).rsqrt()
    azimuth = torch.atan2(d[0], d[2])
    p = phases * (2 * math.pi)
    clouds = torch.sin(6 * azimuth + 5 * up + p[0]) + torch.sin(11 * azimuth - 16 * up + p[1]) + torch.sin(17 * azimuth + 24 * up + p[2])
    clouds = (clouds * 0.25 + 0.15).clamp_(0, 0.75) * (up * 6).clamp_(max=1)

    picture = []
    for i, blue in enumerate((0.36, 0.58, 0.88)):
        sky = torch.lerp(HAZE[i].expand_as(up), torch.full_like(up, blue), (up * 2.2).clamp(max=1))
        sky = sky + (0.97 - sky) * clouds
        earth = ground.low[i] + (ground.high[i] - ground.low[i]) * pattern
        picture.append(torch.lerp(sky, earth, haze))
    return picture, torch.where(d[1] > 1e-4, t, FAR)


def _pattern(x: Tensor, z: Tensor, footprint: Tensor, ground: Ground, phases: Tensor) -> Tensor:
    """The mixing ratio of the ground's two colours in [0, 1], about 0.5 where the pattern is too far away to be visible."""
    k = 2 * math.pi / ground.wavelength
    p = phases * (2 * math.pi)
    near = torch.exp(-((footprint * (0.35 * k)) ** 2))
    far = torch.exp(-((footprint * (0.12 * k)) ** 2))
    if ground.cells:
        fine = (3.0 * torch.sin(0.5 * k * x + p[3]) * torch.sin(0.5 * k * z + p[4])).clamp_(-1, 1)
    else:
        a, b = k * (0.8 * x + 0.6 * z) / ground.ripple + p[3], k * (-0.5 * x + 0.85 * z) + p[4]
        fine = torch.sin(a + 0.8 * torch.sin(0.37 * b)) * torch.sin(b + 0.9 * torch.sin(0.41 * a))
    broad = torch.sin(0.29 * k * x + 0.17 * k * z + p[5]) * torch.sin(0.23 * k * z - 0.13 * k * x + p[6])
    return 0.5 + 0.36 * fine * near + 0.2 * broad * far


def _lambert(normal: Planes) -> Tensor:
    """Brightness in [0.5, 1.05] for unit normals."""
    cosine = normal[0] * LIGHT[0] + normal[1] * LIGHT[1] + normal[2] * LIGHT[2]
    return 0.55 + 0.5 * cosine.clamp(min=0) + 0.1 * cosine.clamp(max=0)


def _local(solid: Solid, eye: Planes) -> Planes:
    """The camera's position relative to the solid's centre: 3 x (T, 1, 1)."""
    return tuple(e - solid.centre[:, i, None, None] for i, e in enumerate(eye))


def _turned(v: Planes, yaw: float) -> Planes:
    """A vector in the axes of a body rotated by `yaw` about the vertical."""
    c, s = math.cos(yaw), math.sin(yaw)
    return c * v[0] - s * v[2], v[1], s * v[0] + c * v[2]


def _edge(margin: Tensor) -> Tensor:
    """Coverage in [0, 1] of a pixel where a shape's margin (metres, positive inside) changes by |grad| over one pixel."""
    margin = margin.clamp(-1, 1)  # far from the outline the margin may jump, which is no edge
    gu = torch.nn.functional.pad((margin[..., 1:] - margin[..., :-1]).abs(), (0, 1))
    gv = torch.nn.functional.pad((margin[:, 1:] - margin[:, :-1]).abs(), (0, 0, 0, 1))
    return (0.5 + margin / (gu + gv + 1e-6)).clamp_(0, 1)


def _ball(solid: Solid, eye: Planes, d: Planes, pixel: Tensor) -> Planes:
    o = _local(solid, eye)
    a = d[0] ** 2 + d[1] ** 2 + d[2] ** 2
    b = -(o[0] * d[0] + o[1] * d[1] + o[2] * d[2])
    c = o[0] ** 2 + o[1] ** 2 + o[2] ** 2
    nearest = b / a  # depth at which the ray passes closest
    distance = (c - b * nearest).clamp(min=0).sqrt()
    cover = (0.5 + (solid.size - distance) / (nearest.abs() * pixel + 1e-6)).clamp_(0, 1) * (nearest > 0)
    t = nearest - ((solid.size**2 - distance**2).clamp(min=0) / a).sqrt()
    normal = tuple((o[i] + t * d[i]) / solid.size for i in range(3))
    return cover, t, _lambert(normal)


def _cube(solid: Solid, eye: Planes, d: Planes, pixel: Tensor) -> Planes:
    o, d = _turned(_local(solid, eye), solid.yaw), _turned(d, solid.yaw)
    enter, leave = [], []
    for i in range(3):
        inverse = 1 / torch.where(d[i].abs() < 1e-5, 1e-5, d[i])
        middle, half = -o[i] * inverse, solid.size * inverse.abs()
        enter.append(middle - half)
        leave.append(middle + half)
    t = torch.maximum(torch.maximum(enter[0], enter[1]), enter[2])
    exit = torch.minimum(torch.minimum(leave[0], leave[1]), leave[2])
    light = _turned(tuple(LIGHT), solid.yaw)
    shade = torch.zeros_like(t)
    for i in range(3):  # the face entered last is the one seen
        cosine = -torch.sign(d[i]) * float(light[i])
        shade = torch.where(enter[i] >= t, 0.55 + 0.5 * cosine.clamp(min=0) + 0.1 * cosine.clamp(max=0), shade)
    return _edge(exit - t) * (t > 0.05), t, shade


def _cone(solid: Solid, eye: Planes, d: Planes, pixel: Tensor) -> Planes:
    """Apex up, base on the ground: radius falls linearly from `size` to 0 over a height of twice `size`."""
    o = _local(solid, eye)
    k = 0.5  # radius per height
    apex = o[1] + solid.size  # height below the apex, of the eye
    A = (d[0] ** 2 + d[2] ** 2 - k * k * d[1] ** 2).clamp(min=1e-4)
    B = o[0] * d[0] + o[2] * d[2] - k * k * apex * d[1]
    C = o[0] ** 2 + o[2] ** 2 - k * k * apex * apex
    disc = B * B - A * C
    root = disc.abs().sqrt()
    inverse = 1 / torch.where(d[1].abs() < 1e-5, 1e-5, d[1])
    middle, half = -o[1] * inverse, solid.size * inverse.abs()
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
