"""Tracks in the extra channels of published weights, against slow second implementations of what Wan-Move and ATI publish."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kling import KlingPipeline, Track
from kling.condition.tracks import Tracks
from kling.condition.writing import write_tracks
from kling.hub.load import settings_of
from kling.hub.registry import by_name
from kling.vae import AutoencoderKLKling
from tests.test_pipeline import picture, tiny_pipeline

C, F, H, W = 3, 3, 4, 6
T = 4 * (F - 1) + 1


def some(n: int = 5, seed: int = 0) -> tuple[torch.Tensor, Tracks]:
    """Extra channels (1, 4 + C, F, H, W) and tracks, some of which leave the picture, end, or begin hidden."""
    draw = torch.Generator().manual_seed(seed)
    concat = torch.randn(1, 4 + C, F, H, W, generator=draw)
    concat[:, :4] = 0
    concat[:, :4, 0] = 1
    points = torch.rand(n, 1, 2, generator=draw) + 1.2 * (torch.rand(n, 1, 2, generator=draw) - 0.5) * torch.linspace(0, 1, T)[:, None]
    there = torch.rand(n, T, generator=draw) > 0.25
    points[0, 5:] = torch.inf
    there[0, 5:] = there[1, 0] = False
    return concat, Tracks(points, there, torch.ones(n, dtype=torch.long))


def wan_move(concat: torch.Tensor, tracks: Tracks) -> torch.Tensor:
    """create_pos_feature_map ("sample") and replace_feature of wan/modules/trajectory.py, in pixels and with loops."""
    out, scale = concat.clone(), 8
    for n in range(len(tracks.points)):
        cells = []
        for t in range(0, T, 4):
            x, y = tracks.points[n, t, 0] * W * scale, tracks.points[n, t, 1] * H * scale
            shown = tracks.there[n, t] and 0 <= x < W * scale and 0 <= y < H * scale
            cells.append((int(y // scale), int(x // scale)) if shown else None)
        if cells[0] is None:
            continue
        for j in range(1, F):
            if cells[j] is not None:
                out[0, 4:, j, cells[j][0], cells[j][1]] = concat[0, 4:, 0, cells[0][0], cells[0][1]]
    return out


def ati(concat: torch.Tensor, tracks: Tracks) -> torch.Tensor:
    """process_tracks and patch_motion of ATI, in pixels and with loops over every place."""
    out, short = concat.clone(), min(W, H) * 8
    units = (torch.nan_to_num(tracks.points, posinf=5.0) * torch.tensor([W * 8.0, H * 8.0]) - torch.tensor([W * 4.0, H * 4.0])) / short * 2
    under = []
    for n in range(len(tracks.points)):
        u, v = (max(-1.0, min(1.0, float(a) / (s * 8 / short))) for a, s in zip(units[n, 0], (W, H), strict=True))
        x, y = (u + 1) / 2 * W - 0.5, (v + 1) / 2 * H - 0.5
        value = torch.zeros(C)
        for j in (math.floor(x), math.floor(x) + 1):
            for i in (math.floor(y), math.floor(y) + 1):
                if 0 <= j < W and 0 <= i < H:
                    value += (1 - abs(x - j)) * (1 - abs(y - i)) * concat[0, 4:, 0, i, j]
        under.append(value)
    for f in range(1, F):
        frames = range(4 * f - 3, 4 * f + 1)
        for i in range(H):
            for j in range(W):
                gx, gy = -W / min(W, H) + 2 * W / min(W, H) * j / (W - 1), -H / min(W, H) + 2 * H / min(W, H) * i / (H - 1)
                weights = []
                for n in range(len(tracks.points)):
                    seen = [t for t in frames if tracks.there[n, t]]
                    mean = sum((units[n, t] for t in seen), torch.zeros(2)) / (len(seen) + 1e-5)
                    far = (float(mean[0]) - gx) ** 2 + (float(mean[1]) - gy) ** 2
                    weights.append((math.exp(-220 * far) * min(1, len(seen)), n))
                two = sorted(weights, reverse=True)[:2]
                total = sum(weight for weight, _ in two)
                content = sum((weight * under[n] for weight, n in two), torch.zeros(C))
                out[0, 4:, f, i, j] = content + concat[0, 4:, f, i, j] * (1 - min(1.0, total))
                out[0, :4, f, i, j] = total
    out[0, :4, 0] = 1
    return out


@pytest.mark.parametrize("seed", range(3))
def test_both_ways_are_those_of_their_authors(seed: int) -> None:
    concat, tracks = some(seed=seed)
    before = concat.clone()
    torch.testing.assert_close(write_tracks(concat, tracks, "copy"), wan_move(concat, tracks))
    torch.testing.assert_close(write_tracks(concat, tracks, "splat"), ati(concat, tracks), atol=2e-5, rtol=1e-4)
    assert torch.equal(concat, before), "the given channels stay"


def test_a_single_track_at_the_centre_of_a_cell() -> None:
    concat, _ = some()
    points = torch.tensor([(1.5 / W, 2.5 / H)]).repeat(1, T, 1)
    points[0, 1:] = torch.tensor([4.5 / W, 0.5 / H])
    written = write_tracks(concat, Tracks(points, torch.ones(1, T, dtype=torch.bool), torch.ones(1, dtype=torch.long)), "copy")
    assert torch.equal(written[0, 4:, 1:, 0, 4], concat[0, 4:, :1, 2, 1].expand(-1, F - 1))
    assert (written != concat).any(1).sum() == F - 1 and torch.equal(written[:, :4], concat[:, :4])


@pytest.mark.parametrize(("name", "way"), [("wan-move-14b-480p", "copy"), ("ati-14b-480p", "splat")])
def test_the_registry_knows_how_weights_take_tracks(name: str, way: str) -> None:
    row = by_name(name)
    assert settings_of(row, None)["track_writing"] == way and row.capabilities == ("image", "brush")
    assert (row.build.z + row.build.extra, row.build.image) == (36, True), "plain image-to-video weights"
    assert settings_of(by_name("wan2.1-i2v-14b-480p"), None)["track_writing"] is None


@pytest.mark.parametrize("way", ["copy", "splat"])
def test_a_pipeline_of_such_weights_follows_tracks(way: str) -> None:
    """With weights of the layout (mask, clean): the brush changes the frames, and their channels are those of `write_tracks`."""
    plain = tiny_pipeline()
    config = {k: v for k, v in plain.transformer.config.items() if not k.startswith("_")}
    config |= {"in_channels": 12, "num_kinds": 0, "camera_channels": 0, "track_channels": 0}
    torch.manual_seed(0)
    model = type(plain.transformer)(**config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    assert isinstance(plain.vae, AutoencoderKLKling)
    pipe = KlingPipeline(plain.vae, model, plain.text_encoder, plain.scheduler, ["image", "brush"], max_frames=17, track_writing=way)
    pipe.set_progress_bar_config(disable=True)
    fields = {"image": picture(1, 64, 112), "num_frames": 9, "num_inference_steps": 1, "seed": 1}
    right, left = ([Track(None, [(40, 30), (x, 30)])] for x in (90, 10))
    made = [pipe("a ball", **fields, tracks=tracks).frames for tracks in (None, right, left)]
    assert len({frames.tobytes() for frames in made}) == 3
    assert np.array_equal(made[0], pipe("a ball", **fields).frames)
