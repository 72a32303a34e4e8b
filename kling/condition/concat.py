"""The input layouts of older published weights: known content enters as extra input channels beside the noise, instead of replacing it.

    group    channels  content, for every target frame
    control  z         latents of a control video
    mask     4         1 where a pixel frame of the latent is given (frame 0 repeated four times), 0 where it is to be generated
    clean    z         latents of the clip, with everything unknown grey
    first    z         latents where given, 0 elsewhere

All of them are computed from the same `State`; the number of input channels of the weights decides which of them the weights take.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kling.condition.state import TARGET, State
from kling.errors import UserError
from kling.shapes import TEMPORAL, first_frame, latent_of_frame, position_frame


def concat_groups(in_channels: int, z: int) -> tuple[str, ...]:
    """The groups that weights with `in_channels` inputs take beside z noisy channels. Raises `UserError` if no published layout fits.

    >>> concat_groups(36, 16)
    ('mask', 'clean')
    """
    layouts = {
        z: (),
        2 * z: ("first",),  # Fun Camera
        z + TEMPORAL + z: ("mask", "clean"),  # I2V, FLF2V, Fun InP
        3 * z: ("control", "first"),  # Fun Control
        2 * z + TEMPORAL + z: ("control", "mask", "clean"),  # Fun Control of Wan 2.2
    }
    if in_channels not in layouts:
        raise UserError(f"a transformer with {in_channels} input channels for latents of {z}: known layouts have {sorted(layouts)}")
    return layouts[in_channels]


def concat_channels(state: State, groups: tuple[str, ...], control: Tensor | None = None) -> Tensor:
    """The extra channels (b, channels, F, h, w) of the target frames. `control`: latents (b, z, F, h, w); 0 if there are none."""
    clean, mask = state.clean[:, :, : state.frames], state.mask[:, :, : state.frames]
    given = given_pixels(state)
    parts = {
        "control": torch.zeros_like(clean) if control is None else control.to(clean),
        "mask": given,
        "clean": clean * given.amax((1, 2, 3, 4), keepdim=True),  # zeros instead of grey if nothing is given
        "first": clean * (mask == 0),
    }
    return torch.cat([parts[group] for group in groups], dim=1)


def given_pixels(state: State) -> Tensor:
    """1 where a pixel frame is given: (b, 4, F, h, w). Channel r of latent j >= 1 is pixel frame 4j - 3 + r; frame 0 fills latent 0."""
    given = (state.mask[:, :, : state.frames] == 0).to(state.clean.dtype)
    given = given.repeat(1, TEMPORAL, 1, 1, 1)  # (b, 4, F, h, w)
    for k in range(state.frames, state.mask.shape[2]):  # keyframes, which the State appends to the clip
        for i, p in enumerate(state.host[1][:, k].tolist()):
            t = position_frame(p)
            j = latent_of_frame(t)
            r = slice(None) if t == 0 else t - first_frame(j)
            given[i, r, j] = (state.mask[i, 0, k] == 0).to(given)
    return given


def opened(state: State) -> State:
    """The same clip with every frame to be generated and none appended, since the given content is in the extra channels."""
    F = state.frames
    return replace(
        state,
        clean=torch.zeros_like(state.clean[:, :, :F]),
        mask=torch.ones_like(state.mask[:, :, :F]),
        position=state.position[:, :F],
        kind=torch.full_like(state.kind[:, :F], TARGET),
        sigma_c=0.0,
        tracks=None if state.tracks is None else state.tracks[:, :, :F],
        shot=None if state.shot is None else state.shot[:, :F],
        host=None,
    )
