"""Tracks of real videos: optical flow against the exact truth of the small world, their files, and the way into training."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import workers

from kling.cache.fill import fill_cache
from kling.cache.plan import CacheConfig
from kling.cache.store import LatentCache
from kling.cameras.axes import axes_trajectory
from kling.condition.tracks import Tracks
from kling.data.buckets import Bucket
from kling.data.manifest import read_manifest
from kling.data.scan.listing import Listing
from kling.data.scan.scan import scan
from kling.data.source import DataConfig
from kling.data.tracks import load_tracks, save_tracks
from kling.data.video import write_video
from kling.data.world.scene import FOCAL, World, render_scene
from kling.data.world.tracks import ground_tracks, places_of
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError
from kling.metrics.tracks import GRID, SHORTEST, flow_tracks
from kling.training.examples import Drawing, draw_example
from kling.training.start import check_brush
from kling.vae import AutoencoderKLKling

sys.path[:0] = [str(Path(__file__).parents[1] / "train")]
import data as program  # noqa: E402

H, W = 64, 112


def test_optical_flow_follows_the_world_s_ground() -> None:
    """Points of the ground with a moving camera, against their exact places: after a second within 2.5 pixels of 112 in 3 of 4 cases."""
    off = []
    for index, axes in enumerate(({"pan": 4.0}, {"dolly": 5.0}, {"horizontal": 5.0, "tilt": 3.0}, {"zoom": 4.0})):
        scene = World(3, 17, "16:9", max_things=1).scene(index)
        scene = dataclasses.replace(scene, axes=axes, trajectory=axes_trajectory(axes, 17, H, W, FOCAL), ground="tiles")
        found = flow_tracks(render_scene(scene), every=16)
        start = found.points[:, 0]
        low = (start[:, 1] > 0.55) & ~places_of(scene).hides(start[:, None].expand(-1, 17, -1), torch.full((len(start), 17), 99.0))[:, 0]
        for n in low.nonzero().flatten().tolist():
            truth = ground_tracks(scene, found.points[n : n + 1, 0])
            if len(truth) and found.there[n, 8] and truth.there[0, 8]:
                off.append((found.points[n, 8] - truth.points[0, 8]) * torch.tensor([W, H]))
    errors = torch.stack(off).norm(dim=1)
    print(f"\n{len(errors)} points after 8 frames: median {errors.median():.2f} px, 3 of 4 within {errors.quantile(0.75):.2f} px")
    assert len(errors) > 20 and errors.median() < 1.5 and errors.quantile(0.75) < 2.5


def test_tracks_end_where_their_points_leave_the_picture() -> None:
    scene = World(0, 17, "16:9", max_things=1).scene(0)
    axes = {"pan": 10.0}
    video = render_scene(dataclasses.replace(scene, trajectory=axes_trajectory(axes, 17, H, W, FOCAL)))
    tracks = flow_tracks(video, every=8)
    assert len(tracks) <= 2 * GRID**2 and tracks.points.shape[1] == 17 and int(tracks.there.sum(1).min()) >= SHORTEST
    changes = tracks.there[:, 1:].int() - tracks.there[:, :-1].int()
    assert int((changes == 1).sum(1).max()) <= 1 and int((changes == -1).sum(1).max()) <= 1, "one stretch each"
    assert not tracks.there[:, -1].all() and tracks.points[tracks.there].min() >= 0 and tracks.points[tracks.there].max() <= 1


def test_a_file_gives_places_at_any_time_on_any_crop(tmp_path: Path) -> None:
    s = torch.linspace(0, 1, 9)
    points = torch.stack([torch.stack([0.25 + 0.5 * s, 0.5 + 0 * s], 1), torch.stack([0.9 + 0 * s, s], 1)])
    there = torch.ones(2, 9, dtype=torch.bool)
    there[1, 4:] = False
    save_tracks(tmp_path / "a.safetensors", Tracks(points, there, torch.zeros(2, dtype=torch.long)), 8.0, 1.0, 2.0)
    same = load_tracks(tmp_path / "a.safetensors", 1 + torch.arange(5) / 8 * 2, (50, 100))
    torch.testing.assert_close(same.points, points[:, ::2])
    assert torch.equal(same.there, there[:, ::2])
    between = load_tracks(tmp_path / "a.safetensors", torch.tensor([1 + 1.5 / 8]), (50, 100))
    assert float(between.points[0, 0, 0]) == pytest.approx(0.25 + 0.5 * 1.5 / 8)
    square = load_tracks(tmp_path / "a.safetensors", torch.tensor([1.0]), (60, 60))  # the middle half of the width
    assert square.points[:, 0, 0].tolist() == pytest.approx([0.0, 1.3])
    assert len(load_tracks(tmp_path / "a.safetensors", torch.tensor([1.8]), (50, 100))) == 1
    assert len(load_tracks(tmp_path / "a.safetensors", torch.tensor([9.0]), (50, 100))) == 0
    (tmp_path / "b.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match="run kling-data tracks again"):
        load_tracks(tmp_path / "b.safetensors", torch.tensor([1.0]), (50, 100))


def test_real_clips_train_with_their_tracks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scan, tracks, cache, examples: the tracks of a clip reach the transformer, only of clips that have some."""
    moving = render_scene(dataclasses.replace(World(0, 17, "16:9").scene(0), trajectory=axes_trajectory({"pan": 3.0}, 17, H, W, FOCAL)))
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", moving.numpy(), 8)
        (tmp_path / f"{name}.txt").write_text("a clip", encoding="utf-8")
    path = tmp_path / "manifest.jsonl"
    list(scan(Listing().find([tmp_path]), path))
    program.main(["tracks", str(path)])
    assert "2 clips with tracks, 0 without" in capsys.readouterr().out
    manifest = read_manifest(path)
    assert all(shot.tracks and shot.measures["tracks"]["count"] > 5 for shot in manifest.shots)
    program.main(["tracks", str(path)])
    assert read_manifest(path).shots == manifest.shots, "nothing is done twice"

    torch.manual_seed(0)
    vae = AutoencoderKLKling(**workers.TINY_VAE).eval()
    data = DataConfig(source=str(path), frames=[1, 5], aspects=["16:9"])
    list(fill_cache(CacheConfig(out=str(tmp_path / "cache"), shard=2, workers=0, data=data), vae))
    cache = LatentCache(tmp_path / "cache")
    batch = cache.batch(Bucket("16:9", 5), [0, 1, 2, 3], 5)
    z = batch.latents.shape[1]
    size = {"num_attention_heads": 1, "attention_head_dim": 16, "text_dim": 8, "freq_dim": 16, "ffn_dim": 16, "num_layers": 1}
    model = KlingTransformer3DModel(**size, in_channels=z, out_channels=z, track_channels=z + 1)
    check_brush(1.0, model, cache)
    batch.tracks[3] = 0
    example = draw_example(Drawing(0, {"image": 1.0}, 0.0, 0.0, brush=1.0), batch, 0, model.config, vae.spatial_factor)
    assert example.state.tracks.flatten(1).any(1).tolist() == [True, True, True, False] and set(example.prompts) == {"a clip"}
    none = draw_example(Drawing(0, {"image": 1.0}, 0.0, 0.0), batch, 0, model.config, vae.spatial_factor)
    assert not none.state.tracks.any()
