"""Rendering many takes of the small world at once: equal to each alone, on a device without waiting for it, and the caches made so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pretend
import pytest
import torch
import workers
from safetensors.torch import load_file
from torch import Tensor

from kling.cache import fill
from kling.cache.fill import fill_cache
from kling.cache.plan import CacheConfig
from kling.cache.store import SUMS, read_index
from kling.data.source import ClipSource, DataConfig, packed, rendered, unpacked
from kling.data.world import render as module
from kling.data.world.references import draw_references, reference_take
from kling.data.world.render import Ground, Take, render
from kling.data.world.scene import World, start_pose, take_of
from kling.data.world.storyboard import Storyboards, takes_of
from kling.vae import AutoencoderKLKling

H, W = 32, 56


@pytest.fixture(scope="module")
def takes() -> list[Take]:
    """Takes of 1 to 17 frames, with 0 to 3 solids of all shapes on all grounds."""
    found = []
    for frames in (1, 5, 9):
        world = World(3, frames, "16:9", "paths" if frames == 5 else "train", size=(H, W))
        found += [take_of(world.scene(i)) for i in range(8)]
    found += takes_of(Storyboards(3, 17, "16:9", size=(H, W)).storyboard(2))
    found += [reference_take(one, H, W) for one in draw_references(World(3, 1, "16:9").scene(0), 4, "here")]
    found.append(replace(found[-1], solids=(), ground=Ground((0.1, 0.2, 0.3), (0.9, 0.8, 0.7), 1.5)))
    assert {len(take) for take in found} >= {1, 5, 9} and {len(take.solids) for take in found} == {0, 1, 2, 3}
    assert {solid.shape for take in found for solid in take.solids} == {"ball", "cube", "cone"}
    assert {take.ground.cells for take in found} == {True, False} and len({take.ground.wavelength for take in found}) > 5
    return found


def assert_same_pixels(a: Tensor, b: Tensor) -> None:
    """Equal, apart from the last bit of a sum now and then."""
    off = (a.int() - b.int()).abs()
    assert a.shape == b.shape and a.dtype == b.dtype == torch.uint8
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-3


@pytest.mark.parametrize("frames", [1000, 20, 1])
def test_takes_rendered_together_equal_each_rendered_alone(takes: list[Take], frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many fit into a pass."""
    alone = torch.cat([render([take], H, W) for take in takes])
    monkeypatch.setattr(module, "PIXELS_PER_PASS", frames * H * W)
    together = render(takes, H, W)
    assert len(together) == sum(map(len, takes))
    assert_same_pixels(together, alone)


def test_a_flat_ground_has_its_colour_below_the_horizon() -> None:
    """And not that of the take before it."""
    flat, other = (0.25, 0.5, 0.75), (0.9, 0.1, 0.1)
    takes = [take_of(World(0, 1, "16:9").scene(0)) for _ in range(3)]
    takes = [replace(take, solids=(), ground=Ground(c, c, 1.0, cells=c == other), start=start_pose())
             for take, c in zip(takes, (flat, other, flat), strict=True)]  # fmt: skip
    haze = 1 - torch.exp(torch.tensor(-1 / module.HAZE_DISTANCE))
    for frame, colour in zip(render(takes, 64, 112).float() / 255, (flat, other, flat), strict=True):
        near = frame[-1].mean(0)  # a few metres away, so a little haze
        assert ((near - torch.tensor(colour)).abs() < 8 * haze * (module.HAZE - torch.tensor(colour)).abs() + 1e-2).all()


def test_the_host_never_waits_while_a_device_renders(takes: list[Take], monkeypatch: pytest.MonkeyPatch) -> None:
    want = render(takes, H, W)
    monkeypatch.setattr(module, "PIXELS_PER_PASS", 40 * H * W)
    with pretend.device(monkeypatch) as device:
        got = render(takes, H, W, pretend.CUDA)
        assert not device.waits, device.waits
        assert got.is_cuda
        got = got.cpu()
    assert_same_pixels(got, want)


def settings(out: Path, count: int = 0) -> CacheConfig:
    """Clips of all kinds, in shards of one or two."""
    data, more = DataConfig(frames=[1, 5, 13], aspects=["16:9"]), {"shorter": {1: 3}, "paths": {5: 2}, "shots": {13: 2}}
    return CacheConfig(out=str(out), clips=2, **more, references=2, shares=[1.0], shard=2, workers=count, data=data)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLKling:
    torch.manual_seed(0)
    return AutoencoderKLKling(**workers.TINY_VAE).eval()


def test_a_cache_whose_clips_are_rendered_shard_by_shard_is_the_same(
    vae: AutoencoderKLKling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, counts = tmp_path / "one", tmp_path / "two", []
    list(fill_cache(settings(one), vae, late=False))
    monkeypatch.setattr(fill, "rendered", lambda clips, device: counts.append(len(clips)) or rendered(clips, device))
    list(fill_cache(settings(two, count=1), vae, late=True))
    assert counts == [2, 2, 1, 2, 2], "one call for each shard, in this process"
    was, now = read_index(one / "index.json"), read_index(two / "index.json")
    assert was["key"] == now["key"] and was["shards"].keys() == now["shards"].keys()
    names = set()
    for name in was["shards"]:
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys()
        names |= a.keys()
        for key in a.keys() - {SUMS}:
            if key in ("latents", "keyframes", "references"):
                torch.testing.assert_close(a[key], b[key], atol=1e-2, rtol=1e-2)
            else:
                assert torch.equal(a[key], b[key]), key
    assert {"latents", "keyframes", "references", "c2w", "intrinsics"} <= names


def test_a_device_encodes_a_shard_with_a_copy_back_for_each_kind_of_latent(
    vae: AutoencoderKLKling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of its clips, and without a copy of pixels: latents, keyframes and references."""
    config = replace(settings(tmp_path / "cpu"), paths={}, shots={}, data=DataConfig(frames=[1, 5], aspects=["16:9"]))
    list(fill_cache(config, vae))
    with pretend.device(monkeypatch) as device:
        monkeypatch.setattr("kling.cache.encode.PIXELS_PER_PASS", 2 * 64 * 112)
        there = AutoencoderKLKling(**workers.TINY_VAE).eval().to(pretend.CUDA)
        there.load_state_dict(vae.state_dict())
        steps, shards = fill_cache(replace(config, out=str(tmp_path / "device")), there), []
        next(steps)
        mark = len(device.waits)
        for _ in steps:
            shards.append(device.since(mark))
            mark = len(device.waits)
    assert len(shards) == 3
    for waits in shards:
        assert {what for what, _ in waits} == {"copy to the CPU"} and waits.total() <= 3, waits
    for name in read_index(tmp_path / "cpu" / "index.json")["shards"]:
        a, b = load_file(tmp_path / "cpu" / name), load_file(tmp_path / "device" / name)
        torch.testing.assert_close(a["latents"], b["latents"], atol=1e-2, rtol=1e-2)


def test_clips_rendered_together_keep_their_own_words_and_pictures() -> None:
    source = ClipSource(DataConfig())
    asked = [(4, "train"), (5, "paths"), (6, "shots")]
    alone = [source.clip(i, 13, "1:1", split, references=k) for k, (i, split) in enumerate(asked)]
    sent = [unpacked(packed(source.unrendered(i, 13, "1:1", split, k))) for k, (i, split) in enumerate(asked)]
    for want, got in zip(alone, rendered(sent), strict=True):
        assert (want.name, want.captions, want.shots) == (got.name, got.captions, got.shots)
        assert torch.equal(want.trajectory.c2w, got.trajectory.c2w) and len(want.references) == len(got.references)
        for a, b in [(want.video, got.video), *zip(want.references, got.references, strict=True)]:
            assert_same_pixels(a, b)
