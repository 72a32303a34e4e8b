"""The extra channels of the older layouts, computed from the State, against the loops over pixel frames of the published pipelines."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kling.condition.concat import concat_channels, concat_groups, given_pixels, opened
from kling.condition.state import Given, State, build_state
from kling.errors import UserError

F, HH, WW, Z = 4, 4, 6, 16
T = 4 * (F - 1) + 1


def state_of(given: Given) -> State:
    clean = torch.randn(1, Z, F, HH, WW, generator=torch.Generator().manual_seed(0))
    K = len(given.keyframes)
    return build_state([given], clean, torch.zeros(1, Z, K, HH, WW) if K else None)


def published_mask(known: set[int]) -> Tensor:
    """As wan/image2video.py: one value per pixel frame, the first repeated four times, folded by four."""
    pixels = torch.zeros(1, T, HH, WW)
    pixels[:, sorted(known)] = 1
    pixels = torch.cat([pixels[:, :1].repeat_interleave(4, dim=1), pixels[:, 1:]], dim=1)
    return pixels.view(1, F, 4, HH, WW).transpose(1, 2)


@pytest.mark.parametrize(
    ("given", "known"),
    [
        (Given(), set()),
        (Given(known=1), {0}),
        (Given(known=1, keyframes=((T - 1, 1.0),)), {0, T - 1}),
        (Given(keyframes=((T - 1, 1.0),)), {T - 1}),
        (Given(known=3), set(range(9))),
        (Given(known=1, keyframes=((6, 1.0),)), {0, 6}),
        (Given(keyframes=((0, 1.0), (1, 1.0))), {0, 1}),
    ],
)
def test_the_mask_marks_pixel_frames(given: Given, known: set[int]) -> None:
    assert torch.equal(given_pixels(state_of(given)), published_mask(known))


def test_a_spatial_hole_is_marked_in_every_frame() -> None:
    hole = torch.zeros(HH, WW)
    hole[:2, :4] = 1
    assert torch.equal(given_pixels(state_of(Given(space=hole)))[0], (1 - hole).expand(4, F, HH, WW))


@pytest.mark.parametrize("z", [16, 48])
def test_the_number_of_channels_determines_the_groups(z: int) -> None:
    widths = {"control": z, "mask": 4, "clean": z, "first": z}
    for channels in (z, 2 * z, 2 * z + 4, 3 * z, 3 * z + 4):
        assert z + sum(widths[group] for group in concat_groups(channels, z)) == channels
    with pytest.raises(UserError, match="37 input channels"):
        concat_groups(37, z)


def test_groups_have_the_documented_contents() -> None:
    state, control = state_of(Given(known=1)), torch.randn(1, Z, F, HH, WW)
    out = concat_channels(state, ("control", "mask", "clean", "first"), control)
    assert torch.equal(out[:, :Z], control) and torch.equal(out[:, Z : Z + 4], published_mask({0}))
    assert torch.equal(out[:, Z + 4 : -Z], state.clean)
    assert torch.equal(out[:, -Z:, :1], state.clean[:, :, :1]) and not out[:, -Z:, 1:].any()
    nothing = concat_channels(state_of(Given()), ("control", "mask", "clean"))
    assert not nothing.any(), "nothing given is zero, not the encoding of grey"


def test_an_opened_state_generates_every_frame() -> None:
    state = opened(state_of(Given(known=1, keyframes=((T - 1, 1.0),))))
    assert state.plain and state.mask.shape == (1, 1, F, HH, WW) and bool((state.mask == 1).all())
    assert state.position.tolist() == [[0, 1, 2, 3]] and not state.clean.any() and not state.kind.any()
