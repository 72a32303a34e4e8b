"""The published checkpoints, one row each: their architecture, their capabilities, and the settings their authors sample with.

Sources, read on 2026-11-22 (sizes of other aspects have the same area):

Wan 2.1   generate.py: shift 5, 3 for images at 480p, 16 for both ends; 40 steps for I2V, else 50; guidance 5. README: 8 and 6 for 1.3B.
Wan 2.2   wan/configs/wan_{t2v_A14B,i2v_A14B,ti2v_5B}.py: shift, steps, boundary, guidance (low noise, high noise), frames and fps.
Fun       VideoX-Fun, examples/wan2.1_fun/predict_*.py: 81 frames of 480x832, 50 steps, guidance 6; for UniPC shift 3 at 480p.
Self-Forcing, Causal-Forcing
          their configs/*dmd*.yaml and READMEs; VideoX-Fun, examples/wan2.1_causal_forcing/predict_t2v.py: levels 1000, 750, 500 and 250 at
          shift 5, no guidance, 3 latent frames at a time or 1. Causal-Forcing++ gives its first frame more steps: not here.

VACE and Animate may come later.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kling.errors import UserError, unknown

Sizes = dict[str, tuple[int, int]]  # aspect -> (H, W)

P480: Sizes = {"16:9": (480, 832), "9:16": (832, 480), "1:1": (624, 624)}
P720: Sizes = {"16:9": (720, 1280), "9:16": (1280, 720), "1:1": (960, 960)}
P704: Sizes = {"16:9": (704, 1280), "9:16": (1280, 704), "1:1": (960, 960)}

NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

TEXT = ("text", "text_to_image", "restyle")
FUN = ("text", "image", "last", "first_last", "continuation", "inpaint")


@dataclass(frozen=True)
class Build:
    """What the shapes of the tensors reveal: two checkpoints with the same build cannot be told apart by their files.

    dim, layers: width and depth. z: channels of a latent. extra: input channels in addition to these. image: image-encoder branch;
    ends: its tokens are those of the first and the last frame. camera: a camera adapter. flow_map: a second level, where a step ends.
    """

    dim: int
    layers: int
    z: int = 16
    extra: int = 0
    image: bool = False
    ends: bool = False
    camera: bool = False
    flow_map: bool = False


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A row. guidance: (high noise, low noise) if there are two experts. boundary: the level below which the second one is used.

    sampler: "unipc", or "renoise" or "flow_map" for few-step weights. block: latent frames per step of block-causal weights; 0: all.
    tracks: how they are written into the extra channels, see `kling.condition.writing`; empty for weights that take none.
    """

    name: str
    repo: str
    build: Build
    capabilities: tuple[str, ...]
    shift: float
    steps: int
    guidance: tuple[float, float] = (5.0, 5.0)
    boundary: float | None = None
    sampler: str = "unipc"
    block: int = 0
    tracks: str = ""
    fps: float = 16.0
    frames: int = 81
    sizes: Sizes = field(default_factory=lambda: P480)
    negative: str = NEGATIVE
    licence: str = "Apache-2.0"


SMALL, LARGE = (1536, 30), (5120, 40)
I2V = Build(*LARGE, extra=20, image=True)
ONE = (1.0, 1.0)  # distilled weights were trained with guidance built in

CHECKPOINTS = (
    PublishedCheckpoint("wan2.1-t2v-1.3b", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", Build(*SMALL), TEXT, 8.0, 50, (6.0, 6.0)),
    PublishedCheckpoint("wan2.1-t2v-14b", "Wan-AI/Wan2.1-T2V-14B-Diffusers", Build(*LARGE), TEXT, 5.0, 50, sizes=P720),
    PublishedCheckpoint("wan2.1-i2v-14b-480p", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", I2V, ("image",), 3.0, 40),
    PublishedCheckpoint("wan2.1-i2v-14b-720p", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", I2V, ("image",), 5.0, 40, sizes=P720),
    PublishedCheckpoint("wan-move-14b-480p", "Ruihang/Wan-Move-14B-480P", I2V, ("image", "brush"), 3.0, 40, tracks="copy"),
    PublishedCheckpoint("ati-14b-480p", "bytedance-research/ATI", I2V, ("image", "brush"), 3.0, 40, tracks="splat"),
    PublishedCheckpoint(
        "wan2.1-flf2v-14b-720p", "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers", Build(*LARGE, extra=20, image=True, ends=True),
        ("first_last",), 16.0, 50, sizes=P720,
    ),
    PublishedCheckpoint(
        "wan2.2-t2v-a14b", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", Build(*LARGE), TEXT, 12.0, 40, (4.0, 3.0), 0.875, sizes=P720,
    ),
    PublishedCheckpoint(
        "wan2.2-i2v-a14b", "Wan-AI/Wan2.2-I2V-A14B-Diffusers", Build(*LARGE, extra=20), ("image",), 5.0, 40, (3.5, 3.5), 0.9, sizes=P720,
    ),
    PublishedCheckpoint(
        "wan2.2-ti2v-5b", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", Build(3072, 30, z=48), (*TEXT, "image"), 5.0, 50,
        fps=24.0, frames=121, sizes=P704,
    ),
    PublishedCheckpoint(
        "wan2.1-fun-inp-1.3b", "alibaba-pai/Wan2.1-Fun-1.3B-InP", Build(*SMALL, extra=20, image=True), FUN, 3.0, 50, (6.0, 6.0),
    ),
    PublishedCheckpoint("wan2.1-fun-inp-14b", "alibaba-pai/Wan2.1-Fun-14B-InP", I2V, FUN, 3.0, 50, (6.0, 6.0)),
    PublishedCheckpoint(
        "wan2.1-fun-control-1.3b", "alibaba-pai/Wan2.1-Fun-1.3B-Control", Build(*SMALL, extra=32, image=True),
        ("text", "image", "control"), 3.0, 50, (6.0, 6.0),
    ),
    PublishedCheckpoint(
        "wan2.1-fun-control-14b", "alibaba-pai/Wan2.1-Fun-14B-Control", Build(*LARGE, extra=32, image=True),
        ("text", "image", "control"), 3.0, 50, (6.0, 6.0),
    ),
    PublishedCheckpoint(
        "wan2.1-fun-camera-1.3b", "alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control-Camera", Build(*SMALL, extra=16, image=True, camera=True),
        ("image", "camera"), 3.0, 50, (6.0, 6.0),
    ),
    PublishedCheckpoint(
        "wan2.1-fun-camera-14b", "alibaba-pai/Wan2.1-Fun-V1.1-14B-Control-Camera", Build(*LARGE, extra=16, image=True, camera=True),
        ("image", "camera"), 3.0, 50, (6.0, 6.0),
    ),
    PublishedCheckpoint(
        "self-forcing-1.3b", "gdhe17/Self-Forcing", Build(*SMALL), ("text",), 5.0, 4, ONE, sampler="renoise", block=3,
        licence="CC-BY-NC-SA-4.0",
    ),
    PublishedCheckpoint(
        "causal-forcing-1.3b", "zhuhz22/Causal-Forcing", Build(*SMALL), ("text",), 5.0, 4, ONE, sampler="renoise", block=3,
    ),
    PublishedCheckpoint(
        "causal-forcing-1.3b-framewise", "zhuhz22/Causal-Forcing/framewise", Build(*SMALL), ("text", "image"), 5.0, 4, ONE,
        sampler="renoise", block=1,
    ),
    PublishedCheckpoint(
        "anyflow-1.3b", "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", Build(*SMALL, flow_map=True), ("text", "text_to_image"), 5.0, 4, ONE,
        sampler="flow_map", licence="NVIDIA non-commercial",
    ),
    PublishedCheckpoint(
        "anyflow-14b", "nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers", Build(*LARGE, flow_map=True), ("text", "text_to_image"), 5.0, 4, ONE,
        sampler="flow_map", licence="NVIDIA non-commercial",
    ),
)  # fmt: skip


def by_name(name: str) -> PublishedCheckpoint:
    """The row of a name or a hub id. Raises `UserError` with the nearest name."""
    for row in CHECKPOINTS:
        if name in (row.name, row.repo):
            return row
    raise unknown("checkpoint", name, [row.name for row in CHECKPOINTS])


def by_build(build: Build, experts: bool, plain: bool = False) -> PublishedCheckpoint:
    """The only row of this build, with two experts or one. Raises `UserError` if several or none have it, naming them.

    plain: leave out few-step weights, which are published as single files.
    """
    rows = [row for row in CHECKPOINTS if row.build == build and (row.boundary is not None) == experts]
    rows = [row for row in rows if not plain or row.sampler != "renoise"]
    if len(rows) == 1:
        return rows[0]
    what = f"{build.layers} layers of width {build.dim}, {build.z} + {build.extra} input channels"
    names = ", ".join(row.name for row in rows or CHECKPOINTS)
    if not rows:
        raise UserError(
            f"no published checkpoint is built like this ({what}): choose whose settings to use with checkpoint=, one of {names}"
        )
    raise UserError(f"the files do not tell which checkpoint this is ({what}): name it with checkpoint=, one of {names}")
