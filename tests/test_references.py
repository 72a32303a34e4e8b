"""References: pictures of things that the clip shows. The State, the camera, the small world's pictures and words, training, sampling."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kling import KlingPipeline, Request, Track
from kling.cache.fill import fill_cache
from kling.cache.plan import CacheConfig, settings_of
from kling.cache.store import LatentBatch, LatentCache
from kling.cameras.axes import axes_trajectory
from kling.cameras.trajectory import Cameras
from kling.condition.state import HISTORY, KEYFRAME, NUMBERED, TARGET, Given, build_state
from kling.condition.tasks import REFERENCES
from kling.condition.tracks import Tracks
from kling.data.buckets import Bucket
from kling.data.image import write_png
from kling.data.manifest import MissingClip, read_manifest, shot_from, write_manifest
from kling.data.scan.listing import Listing
from kling.data.scan.scan import scan
from kling.data.source import DataConfig
from kling.data.video import write_video
from kling.data.world.captions import COLOURS, SOLIDS, SOLIDS_EN, speaks_of_reference, unknown_words
from kling.data.world.references import LARGE, draw_references, render_reference
from kling.data.world.scene import COLOUR_RGB, GROUND_LOOK, World
from kling.data.world.tracks import retold
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError
from kling.flow.guidance import given_share
from kling.flow.losses import flow_loss
from kling.flow.path import velocity
from kling.flow.solvers import KlingFlowScheduler
from kling.metrics.segment import segment
from kling.runtime.random import generator
from kling.sampling import record as records
from kling.sampling.inputs import read_inputs
from kling.training.examples import Drawing, check_divides, draw_example
from kling.training.start import check_reference, grow
from kling.vae import AutoencoderKLKling
from tests import workers
from tests.test_pipeline import movie, picture, tiny_pipeline

C, F, HH, WW = 4, 3, 4, 6
TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 64, "text_dim": 8, "freq_dim": 16}
TINY |= {"in_channels": C, "out_channels": C, "num_kinds": 8}


def state_of(given: Given, seed: int = 0, **more):
    draw = torch.Generator().manual_seed(seed)
    clean, lone = (torch.randn(1, C, n, HH, WW, generator=draw) for n in (F, given.appended))
    return build_state([given], clean, lone if given.appended else None, **more)


# ------------------------------------------------------------------------------------------------------------------- the State


@pytest.mark.parametrize("beside", [{}, {"known": 1}, {"known": 2}, {"hold": 0.4}, {"space": torch.eye(4, 6)}], ids=str)
@pytest.mark.parametrize("keyframes", [(), ((8, 0.5), (5, 1.0))], ids=["", "keyframes"])
def test_references_lie_before_the_clip_clean_and_change_nothing_else_of_it(beside: dict, keyframes: tuple) -> None:
    plain, given = Given(keyframes=keyframes, **beside), Given(keyframes=keyframes, **beside, references=3)
    without, state = state_of(plain), state_of(given, sigma_c=0.02)
    G = F + len(keyframes)
    assert state.position[0].tolist() == [0, 1, 2, *((t + 1.5) / 4 for t, _ in keyframes), -1, -2, -3]
    assert state.kind[0].tolist() == [TARGET] * F + [KEYFRAME] * len(keyframes) + [2, 5, 6]
    assert not state.mask[:, :, G:].any() and torch.equal(state.mask[:, :, :G], without.mask)
    assert given.task(F) == plain.task(F) and given.gives and given.appended == len(keyframes) + 3 and state.frames == F
    level = torch.tensor([0.8])
    assert torch.equal(state.sigma(level)[:, :, G:], torch.full((1, 1, 3, HH, WW), 0.02))
    told = state.levels(level)
    G += 3
    tokens = told.values[told.index].repeat_interleave(G * 6 // told.index.shape[1], dim=1).view(1, G, 2, 3)
    assert torch.equal(tokens, state.sigma(level)[:, 0, :, ::2, ::2]), "the network is told that they are clean"
    noise = torch.randn_like(state.clean)
    clean = state_of(given)
    assert torch.equal(clean.noised(torch.ones(1), noise)[:, :, G - 3 :], clean.clean[:, :, G - 3 :])
    assert clean.finish(noise).shape[2] == F


def test_all_clips_of_a_batch_have_as_many_references() -> None:
    clean, lone = torch.zeros(2, C, F, HH, WW), torch.zeros(2, C, 1, HH, WW)
    with pytest.raises(ValueError, match="keyframes and references"):
        build_state([Given(references=1), Given(keyframes=((8, 1.0),))], clean, lone)
    with pytest.raises(ValueError, match="1 appended"):
        build_state([Given(references=2)] * 2, clean, lone)


def test_no_track_and_no_ray_reaches_a_reference() -> None:
    """Both are what they are without references, and 0 there; a part of the rays is that part of the whole."""
    tracks = [Tracks(torch.rand(5, 9, 2), torch.ones(5, 9, dtype=torch.bool), torch.arange(5))]
    for keyframes in ((), ((7, 1.0),)):
        plain, given = (Given(known=1, keyframes=keyframes, references=n) for n in (0, 2))
        without, state = state_of(plain, tracks=tracks), state_of(given, tracks=tracks)
        n = F + len(keyframes)
        assert torch.equal(state.tracks[:, -1, :n] != 0, without.tracks[:, -1] != 0) and not state.tracks[:, :, n:].any()
        path = axes_trajectory({"pan": 8.0, "dolly": 4.0}, 9, 8, 12)
        lone = torch.tensor([[t for t, _ in keyframes]], dtype=torch.long)
        bare = Cameras(path.c2w[None], path.intrinsics[None], (8, 12), lone)
        cameras = dataclasses.replace(bare, references=2)
        rays = cameras.rays()
        assert rays.shape[2] == cameras.frames == n + 2
        assert torch.equal(rays[:, :, :n], bare.rays()) and not rays[:, :, n:].any()
        assert torch.equal(torch.cat([cameras.rays(g, g + 1) for g in range(n + 2)], dim=2), rays)
        for other in (cameras.rows(0), cameras.repeated(1), cameras.to("cpu")):
            assert other.frames == n + 2


def test_guidance_is_as_without_references() -> None:
    """It reaches away from given frames of the clip: a picture of a thing is none of them."""
    for beside in ({}, {"known": 1}, {"keyframes": ((8, 1.0),)}):
        share, without = (given_share(*state_of(Given(**beside, references=n)).host, 4.0) for n in (2, 0))
        n = F + len(beside.get("keyframes", ()))
        assert (share is None and without is None) if not beside else torch.equal(share[:, :, :n], without)


def test_the_network_knows_a_reference_by_its_position_and_number_alone() -> None:
    """Two pictures that change places with their positions and kinds are the same input; if they change without either, another."""
    torch.manual_seed(0)
    model = KlingTransformer3DModel(**TINY).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    state, text, level = state_of(Given(references=2)), torch.randn(1, 3, 8), torch.tensor([0.7])
    z = state.noised(level, torch.randn_like(state.clean))
    order, swapped = [0, 1, 2, 4, 3], z[:, :, [0, 1, 2, 4, 3]]

    def velocity(z: torch.Tensor, positions: torch.Tensor, kinds: torch.Tensor = state.kind) -> torch.Tensor:
        return model(z, state.levels(level), text, positions=positions, kinds=kinds).sample[:, :, :F]

    v = velocity(z, state.position)
    torch.testing.assert_close(velocity(swapped, state.position[:, order], state.kind[:, order]), v, atol=1e-5, rtol=1e-4)
    assert (velocity(swapped, state.position, state.kind[:, order]) - v).abs().max() > 1e-3
    assert (velocity(swapped, state.position[:, order]) - v).abs().max() > 1e-3
    assert (velocity(z, state.position, torch.zeros_like(state.kind)) - v).abs().max() > 1e-3, "and by its kind"


# -------------------------------------------------------------------------------------------------------------- the small world


@pytest.mark.parametrize("aspect", ["16:9", "9:16", "1:1"])
def test_a_picture_shows_its_thing_whole_alone_on_another_ground(aspect: str) -> None:
    """Against the pixels: an area of its colour, as high as it should be, away from the border."""
    world, palette = World(0, 1, aspect), list(COLOUR_RGB)
    heights, grounds = [], []
    for index in range(12):
        scene, name = world.scene(index), f"world/0/train/{aspect}/{index}"
        references = draw_references(scene, 4, name)
        again = draw_references(scene, 4, name)
        H, W = world.clip(index).video.shape[1:3]
        there = {r.thing for r in references} - {None}
        assert there == set(range(len(scene.things))) and len({r.colour for r in references}) == 4
        for reference, same in zip(references, again, strict=True):
            picture_ = render_reference(reference, H, W)
            assert torch.equal(picture_, render_reference(same, H, W)) and picture_.shape == (H, W, 3)
            assert reference.ground != scene.ground
            if reference.thing is not None:
                thing = scene.things[reference.thing]
                assert (thing.colour, thing.solid) == (reference.colour, reference.solid)
            else:
                assert reference.colour not in {thing.colour for thing in scene.things}
            if reference.ground in ("", "tiles"):  # grounds without a colour of their own
                colours, near = segment(picture_[None], COLOUR_RGB)
                mask = (torch.as_tensor(near)[0] > 0) & (torch.as_tensor(colours)[0] == palette.index(reference.colour))
                rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
                assert rows[0] > 0 and columns[0] > 0 and rows[-1] < H - 1 and columns[-1] < W - 1, (name, reference)
                heights.append(float(rows[-1] + 1 - rows[0]) / min(H, W) / reference.share)
            grounds.append(reference.ground)
    assert len(heights) > 5 and 0.8 < float(np.median(heights)) < 1.4 and set(grounds) == {"", *GROUND_LOOK}
    assert LARGE[1] < 0.7
    assert all(r.ground for i in range(9) for r in draw_references(world.scene(i), 4, str(i), plain=False))


def test_words_that_point_name_neither_colour_nor_solid_nor_how_only_a_ball_moves() -> None:
    rng, seen = random.Random(0), {}
    world = World(2, 1, max_things=2)
    for index in range(150):
        scene = world.scene(index)
        text = retold(scene, True, rng, pointed=dict.fromkeys(range(len(scene.things)), 0) | {0: 1})
        assert speaks_of_reference(text) and not unknown_words(text, pointing=True), text
        plain = text.replace("green lawn", "")
        named = [*COLOURS, *COLOURS.values(), *(w for words in (*SOLIDS_EN.values(), *SOLIDS.values()) for w in words)]
        assert not [word for word in named if re.search(rf"\b{word}\b" if word.isascii() else word, plain)], text
        if scene.things[0].motion in ("left", "right") and len(scene.things) == 1:
            verbs = {word for word in ("rolls", "slides", "滚动", "滑动") if word in text}
            seen.setdefault(scene.things[0].solid == "ball", set()).update(verbs)
    assert all(len(verbs) >= 2 for verbs in seen.values()) and len(seen) == 2, seen
    half = retold(World(2, 1).scene(8), True, random.Random(1), pointed={0: 3})
    assert re.search("fourth|第四", half)
    assert not speaks_of_reference("a red ball rolls left on grass") and speaks_of_reference("The First Thing rolls")
    assert unknown_words("the first thing rolls left") == ["first", "thing"]


# -------------------------------------------------------------------------------------------------------------------- training


def batch_of(frames: int, clips: int = 6, pictures: int = 4) -> LatentBatch:
    """Clips of the world with random latents; picture k of clip i is full of the number 100 i + k."""
    world, f = World(0, frames, "16:9"), 1 + (frames - 1) // 4
    scenes = [world.scene(i) for i in range(clips)]
    captions = [[text for texts in world.captions(scene).values() for text in texts] for scene in scenes]
    z = torch.randn(clips, C, f, 8, 14)
    number = 100.0 * torch.arange(clips)[:, None] + torch.arange(pictures)  # (clips, pictures)
    return LatentBatch(
        list(range(clips)), z, z[:, None, :, -1], torch.full((clips, 1), frames - 1), captions, [[1.0] * 6] * clips,
        [scene.trajectory for scene in scenes], names=[f"world/0/train/16:9/{i}" for i in range(clips)], whole=frames,
        references=number[:, :, None, None, None].expand(-1, -1, C, 8, 14), pictured=[pictures] * clips,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> tuple[KlingTransformer3DModel, AutoencoderKLKling]:
    vae = AutoencoderKLKling(base_dim=8, z_dim=C, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * C, latents_std=[1.0] * C)
    more = {"camera_channels": 24, "camera_fold": "pool", "camera_downscale": 1, "camera_residual_blocks": 0}
    return KlingTransformer3DModel(**TINY, **more, track_channels=C + 1), vae


@pytest.mark.parametrize("frames", [1, 17])
def test_training_draws_references_for_its_share_whose_words_point_at_the_right_ones(tiny, frames: int) -> None:
    tasks, counts, told, n = {"text": 1.0, "image": 1.0, "last": 1.0, "restyle": 1.0}, [], [0, 0], 4 if frames > 1 else 12
    batch = batch_of(frames, n)
    ordinals = re.compile("(first|second|third|fourth) (?:thing|object|picture)|第(一|二|三|四)")
    places = {"first": 0, "second": 1, "third": 2, "fourth": 3, "一": 0, "二": 1, "三": 2, "四": 3}
    for place in range(10):
        plain = draw_example(Drawing(0, tasks, 0.1, 0.4), batch, place, tiny[0].config, tiny[1].spatial_factor)
        how = Drawing(0, tasks, 0.1, 0.4, brush=0.3, reference=0.6)
        drawn, again = (draw_example(how, batch, place, tiny[0].config, tiny[1].spatial_factor) for _ in range(2))
        assert torch.equal(drawn.state.clean, again.state.clean) and drawn.prompts == again.prompts
        state, K = drawn.state, plain.state.mask.shape[2]
        R = state.mask.shape[2] - K
        counts.append(R)
        b = len(drawn.has_camera)  # of single pictures as many as make no more tokens than the batch has without references
        assert b == (n if frames > 1 else n // (1 + R)) == len(drawn.prompts) == len(state.tracks) == len(drawn.cameras.c2w)
        assert torch.equal(state.mask[:, :, :K], plain.state.mask[:b]) and torch.equal(drawn.has_camera, plain.has_camera[:b])
        assert torch.equal(state.clean[:, :, :K], plain.state.clean[:b]) and drawn.cameras.frames == K + R == state.tracks.shape[2]
        assert state.kind[:, K:].eq(torch.tensor(NUMBERED[:R])).all() and not torch.isin(state.kind[:, :K], torch.tensor(NUMBERED)).any()
        for i, (prompt, before) in enumerate(zip(drawn.prompts, plain.prompts[:b], strict=True)):
            numbers = state.clean[i, 0, K:, 0, 0].tolist()
            assert all(k // 100 == i for k in numbers) and len(set(numbers)) == R, "its own pictures, each once"
            scene = World(0, frames, "16:9").scene(i)
            shows = [draw_references(scene, 4, batch.names[i])[int(k) % 100] for k in numbers]
            assert not R or any(picture.thing is not None for picture in shows)
            pointed = {places[a or b] for a, b in ordinals.findall(prompt)}
            assert pointed <= {k for k, picture in enumerate(shows) if picture.thing is not None}, (prompt, shows)
            assert bool(prompt) == bool(before)
            for k in pointed:
                assert shows[k].colour not in prompt and COLOURS[shows[k].colour] not in prompt
            told[0] += bool(pointed)
            told[1] += bool(R and prompt)
    assert {0, 1} < set(counts) <= {0, *REFERENCES} and 0.2 < np.mean([c > 0 for c in counts]) < 0.9
    assert 0.7 < told[0] / told[1] <= 1
    place = counts.index(max(counts))
    batch.pictured[0] = 1  # all clips of a batch get as many as the poorest has
    poor = draw_example(how, batch, place, tiny[0].config, tiny[1].spatial_factor).state.kind
    assert torch.isin(poor, torch.tensor(NUMBERED)).sum() == (n if frames > 1 else n // 2)
    short = draw_example(dataclasses.replace(how, max_bytes=30, reference=1.0), batch, 0, tiny[0].config, tiny[1].spatial_factor)
    assert all(len(prompt.encode()) <= 30 for prompt in short.prompts), "words drawn anew are as short as the text encoder needs"
    batch.names[0] = "world/9/train/16:9/3"
    if frames > 1:
        with pytest.raises(UserError, match="make the cache again"):
            draw_example(Drawing(0, {"text": 1.0}, 0.0, 0.0, reference=1.0), batch, 0, tiny[0].config, tiny[1].spatial_factor)


def test_every_number_of_references_that_a_batch_may_have_must_divide_over_the_processes(tiny) -> None:
    """Not only those of the first clip, which has none here: others of the cache have some."""
    bucket, one = Bucket("16:9", 17), dataclasses.replace(batch_of(17, 1), pictured=[0])
    data = SimpleNamespace(frames=[17], cache=SimpleNamespace(clips={bucket: [0]}, batch=lambda bucket, ids, frames: one))
    check_divides(data, {"text": 1.0}, tiny[0], split=10)
    check_divides(data, {"text": 1.0}, tiny[0], split=28, reference=0.5)
    with pytest.raises(UserError, match=r"168 tokens \(16:9 of 17 frames and 1 reference\) do not divide over cp_size = 10"):
        check_divides(data, {"text": 1.0}, tiny[0], split=10, reference=0.5)


def test_some_references_show_nothing_and_their_words_still_point(tiny) -> None:
    """So guidance has a pass to compare with: latents of 0, and everything else as it was."""
    batch, how = batch_of(17, 4), Drawing(0, {"text": 1.0, "image": 1.0}, 0.0, 0.0, brush=0.3, reference=1.0)
    blank, of = 0, 0
    for place in range(12):
        shown, drawn = (
            draw_example(dataclasses.replace(how, reference_drop=drop), batch, place, tiny[0].config, tiny[1].spatial_factor)
            for drop in (0.0, 0.3)
        )
        assert drawn.prompts == shown.prompts and torch.equal(drawn.state.position, shown.state.position)
        at = shown.state.mask.shape[2] - shown.state.references
        assert shown.state.references == int(torch.isin(shown.state.kind[0], torch.tensor(NUMBERED)).sum()) > 0
        assert torch.equal(drawn.state.clean[:, :, :at], shown.state.clean[:, :, :at])
        for mine, theirs in zip(drawn.state.clean[:, :, at:], shown.state.clean[:, :, at:], strict=True):
            assert torch.equal(mine, theirs) or not mine.any()
            blank, of = blank + (not mine.any()), of + 1
        assert torch.equal(drawn.state.clean, shown.state.without_references(shown.state.clean)) or blank < of
    assert 0.1 < blank / of < 0.5


def test_gradients_reach_a_reference_and_its_loss_counts_for_nothing(tiny) -> None:
    torch.manual_seed(0)
    model, vae = tiny
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    example = draw_example(Drawing(0, {"text": 1.0}, 0.0, 1.0, reference=1.0), batch_of(5, 2), 0, model.config, vae.spatial_factor)
    state = example.state
    given = (state.clean / 100).requires_grad_()
    noise = torch.randn_like(given)
    z = dataclasses.replace(state, clean=given).noised(torch.tensor([0.5, 0.5]), noise)
    v = model(z, state.levels(torch.tensor([0.5, 0.5])), torch.randn(2, 3, 8), positions=state.position, kinds=state.kind).sample
    target = velocity(given.detach(), noise)
    flow_loss(v, target, state.mask).mean().backward()
    assert (given.grad[:, :, state.frames :].abs().amax((1, 3, 4)) > 0).all(), "through attention"
    other = target.clone()
    other[:, :, state.frames :] += 9
    assert torch.equal(flow_loss(v, target, state.mask), flow_loss(v, other, state.mask))


def test_the_cache_holds_each_picture_encoded_alone(tmp_path: Path) -> None:
    data = DataConfig(frames=[1, 5], aspects=["16:9"])
    config = CacheConfig(out=str(tmp_path), clips=2, shorter={1: 1}, references=2, shares=[1.0], shard=2, workers=0, data=data)
    assert "references" not in settings_of(dataclasses.replace(config, references=0)), "older caches keep their key"
    torch.manual_seed(0)
    vae = AutoencoderKLKling(**workers.TINY_VAE).eval()
    list(fill_cache(config, vae))
    cache = LatentCache(tmp_path)
    for frames, ids in ((5, [0, 1]), (1, [0])):
        batch = cache.batch(Bucket("16:9", frames), ids, frames)
        assert batch.pictured == [2] * len(ids)
        for i, name in enumerate(batch.names):
            scene = World(0, frames, "16:9").scene(int(name.split("/")[-1]))
            for k, reference in enumerate(draw_references(scene, 2, name)):
                x = render_reference(reference, 64, 112).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
                with torch.no_grad():
                    z = vae.normalize(vae.encode(x).latent_dist.mode())[0, :, 0]
                torch.testing.assert_close(batch.references[i, k], z, atol=5e-3, rtol=5e-3)
    z = batch.latents.shape[1]
    model = KlingTransformer3DModel(**TINY | {"in_channels": z, "out_channels": z})
    check_reference(0.3, model, cache)
    with pytest.raises(UserError, match="set model.num_kinds=8"):
        check_reference(0.3, KlingTransformer3DModel(**TINY | {"in_channels": z, "out_channels": z, "num_kinds": 7}), cache)
    with pytest.raises(UserError, match="share of batches with references"):
        check_reference(3, model, cache)
    with pytest.raises(UserError, match="0 to 4"):
        list(fill_cache(dataclasses.replace(config, references=5), vae))
    list(fill_cache(dataclasses.replace(config, references=0, shorter={}, out=str(tmp_path / "bare")), vae))
    with pytest.raises(UserError, match="make one with references=4"):
        check_reference(0.3, model, LatentCache(tmp_path / "bare"))


def test_a_table_of_kinds_grows_by_zeros(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = KlingTransformer3DModel(**TINY | {"num_kinds": 2})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path / "transformer")
    grown = grow(tmp_path / "transformer", {"num_kinds": 8})
    assert grown.config.num_kinds == 8 and not grown.kind_embedding.weight[2:].any()
    assert torch.equal(grown.kind_embedding.weight[:2], model.kind_embedding.weight)
    z, text = torch.randn(1, C, 2, 4, 6), torch.randn(1, 3, 8)
    kinds = torch.tensor([[0, 1]])
    with torch.no_grad():
        assert torch.equal(model(z, torch.tensor([0.5]), text, kinds=kinds).sample, grown(z, torch.tensor([0.5]), text, kinds=kinds).sample)
    grown(z, torch.tensor([0.5]), text, kinds=torch.tensor([[0, 2]])).sample.sum().backward()
    assert grown.kind_embedding.weight.grad[2].any()
    assert grow(tmp_path / "transformer", {"num_kinds": 1}).config.num_kinds == 2, "a larger table stays"


def test_a_manifest_names_references(tmp_path: Path) -> None:
    """Scan, two rows with pictures beside the videos, cache, examples: captions that point are used only with them."""
    for i in range(2):
        write_video(tmp_path / f"{i}.mp4", World(0, 5, "16:9").clip(i).video.numpy(), 8)
        (tmp_path / f"{i}.txt").write_text("a clip\n\nthe first thing moves", encoding="utf-8")
        write_png(tmp_path / f"{i}.png", np.full((40 + 40 * i, 60, 3), 60 + 100 * i, np.uint8))
    path = tmp_path / "manifest.jsonl"
    list(scan(Listing().find([tmp_path / "0.mp4", tmp_path / "1.mp4"]), path))
    shots = read_manifest(path).shots
    assert [shot.references for shot in shots] == [(), ()]
    data = DataConfig(source=str(path), frames=[5], aspects=["16:9"])
    torch.manual_seed(0)
    vae = AutoencoderKLKling(**workers.TINY_VAE).eval()

    def cached(name: str, *references: tuple[str, ...]) -> tuple[LatentCache, LatentBatch]:
        write_manifest(path, [dataclasses.replace(shot, references=files) for shot, files in zip(shots, references, strict=True)])
        list(fill_cache(CacheConfig(out=str(tmp_path / name), shard=2, workers=0, data=data), vae))
        cache = LatentCache(tmp_path / name)
        return cache, cache.batch(Bucket("16:9", 5), [0, 1], 5)

    bare, batch = cached("cache", (), ())
    z = batch.latents.shape[1]
    model = KlingTransformer3DModel(**TINY | {"in_channels": z, "out_channels": z})
    with pytest.raises(UserError, match="name some in the manifest"):
        check_reference(0.5, model, bare)
    cache, batch = cached("cache", ("0.png", "1.png"), ("1.png",))  # the same folder: what has changed is made anew
    check_reference(0.5, model, cache)
    assert batch.pictured == [2, 1] and batch.references.shape[:2] == (2, 4) and not batch.references[1, 1:].any()
    torch.testing.assert_close(batch.references[0, 1], batch.references[1, 0])
    with torch.no_grad():
        grey = vae.normalize(vae.encode(torch.full((1, 3, 1, 64, 112), 60 / 127.5 - 1)).latent_dist.mode())[0, :, 0]
    torch.testing.assert_close(batch.references[0, 0], grey, atol=5e-3, rtol=5e-3)
    said = {0: set(), 1: set()}
    for place in range(40):
        example = draw_example(Drawing(0, {"text": 1.0}, 0.0, 0.0, reference=0.5), batch, place, model.config, vae.spatial_factor)
        R = example.state.mask.shape[2] - 2
        said[R] |= set(example.prompts)
        assert not R or torch.equal(example.state.clean[1, :, 2], batch.references[1, 0])
    assert said == {0: {"a clip"}, 1: {"a clip", "the first thing moves"}}
    with pytest.raises(MissingClip, match="reference gone.png of clip 0.mp4"):
        cached("cache", ("gone.png",), ())
    row = json.loads(path.read_text().splitlines()[0])
    for bad in ("a.png", [3], ["a.png"] * 5):
        with pytest.raises(UserError, match="x: references .*: give a list of up to 4 pictures"):
            shot_from(row | {"references": bad}, "x")


# -------------------------------------------------------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def pipe() -> KlingPipeline:
    return tiny_pipeline()


A, B = picture(11), picture(12, 60, 60)
NAMES = {"euler": ("noise", 0), "renoise": ("renoise", 0, 0, 0)}  # of the noise that a clip starts from, and that its first step adds


@pytest.mark.parametrize(
    "given",
    [{}, {"num_frames": 1}, {"image": picture(1), "last_image": picture(2), "camera": "pan=5"}, {"video": movie(9)},
     {"video": movie(5), "strength": 0.5}, {"keyframes": [(picture(3), 4, 0.6)], "tracks": [Track(None, [(40, 30), (90, 30)])]},
     {"loop": True}, {"extend_to": 3.0}, {"solver": "adams", "frame_delay": 1}],
    ids=lambda given: " ".join(given) or "text",
)  # fmt: skip
def test_references_go_with_everything(given: dict) -> None:
    """They change the frames, each by its place, and only frames that are made; every hop sees them."""
    pipe = tiny_pipeline(capabilities=[*tiny_pipeline().config.capabilities, "diffusion_forcing"])
    free = {"num_frames", "video", "extend_to"} & given.keys()
    request = Request("the first thing rolls left", num_inference_steps=1, seed=1, **({} if free else {"num_frames": 9}) | given)
    plan = pipe.plan(request.replace(references=[A, B]))
    assert all(hop.given.references == 2 for hop in plan.hops) and "2 references" in plan.title
    assert plan.tokens == pipe.plan(request).tokens + 2 * 4 * 7
    steps = []
    count = lambda pipe, step, t, kept: steps.append(step) or kept  # noqa: E731
    one, two, turned = (pipe(request, references=pictures, callback_on_step_end=count).frames[0] for pictures in ([], [A, B], [B, A]))
    kept = 9 if given.keys() == {"video"} else 0
    assert len({frames[kept:].tobytes() for frames in (one, two, turned)}) == 3 and one.shape == two.shape
    assert np.array_equal(one[:kept], two[:kept])


def test_guidance_on_references_costs_a_pass_that_sees_none_of_them(pipe: KlingPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    request, seen = Request("a", num_inference_steps=1, seed=1, num_frames=9, references=[A, B]), []
    forward = type(pipe.transformer).forward
    looked = lambda self, x, *a, **k: seen.append(x[:, :, -2:].abs().amax().item()) or forward(self, x, *a, **k)  # noqa: E731
    monkeypatch.setattr(type(pipe.transformer), "forward", looked)
    plain, passes = pipe(request).frames, len(seen)
    assert all(seen)
    seen.clear()
    guided = pipe(request, reference_guidance_scale=3.0).frames
    assert len(seen) == passes + 1 and seen.count(0.0) == 1 and not np.array_equal(plain, guided)
    assert pipe.plan(request.replace(reference_guidance_scale=3.0)).passes == pipe.plan(request).passes + 1
    assert pipe.plan(request.replace(references=[])).reference_guidance_scale == 1
    with pytest.raises(UserError, match="given without references: give pictures too"):
        request.replace(references=[], reference_guidance_scale=2.0)


@pytest.mark.parametrize("solver", ["euler", "renoise"])
def test_appended_pictures_leave_the_noise_of_the_clip_and_of_each_other(monkeypatch: pytest.MonkeyPatch, solver: str) -> None:
    """Clips with and without them are pairs: made alone, in a group of seeds, and with fresh noise at every step."""
    pipe, drawn, step = tiny_pipeline(), [], KlingFlowScheduler.step
    pipe.register_modules(scheduler=KlingFlowScheduler(num_inference_steps=2, solver=solver))

    def noted(self, v, sigma, next_sigma, z, mask, clean, noise=None):
        drawn.append(z if noise is None else noise)
        return step(self, v, sigma, next_sigma, z, mask, clean, **({} if noise is None else {"noise": noise}))

    monkeypatch.setattr(KlingFlowScheduler, "step", noted)
    end, request = [(picture(5), 8, 1e-6)], Request("a", seed=1, num_frames=9, guidance_scale=1.0)
    given = [{}, {"references": [A]}, {"keyframes": end}, {"keyframes": end, "references": [A, B]}]

    def first(make) -> list[torch.Tensor]:
        found = []
        for fields in given:
            drawn.clear()
            make(request.replace(**fields))
            found.append(drawn[0])
        return found

    for make in (pipe, lambda asked: pipe.sample_group(pipe.ask(asked), [1, 2])):
        plain, one, key, both = first(make)
        want = [torch.randn(1, 4, 3, 8, 14, generator=generator(seed, *name)) for seed in (1, 2) for name in [NAMES[solver]]]
        assert torch.equal(plain, torch.cat(want)[: len(plain)]), "as it has always been"
        for other in (one, key, both):
            assert torch.equal(other[:, :, :3], plain)
        torch.testing.assert_close(both[:, :, 3], key[:, :, 3], msg="the keyframe's")


def test_blank_references_are_as_noisy_as_references(pipe: KlingPipeline) -> None:
    state, noise = state_of(Given(references=2), sigma_c=0.1), torch.randn(1, C, F + 2, HH, WW)
    z = state.noised(torch.tensor([0.6]), noise)
    blank = dataclasses.replace(state, clean=torch.cat([state.clean[:, :, :F], torch.zeros_like(state.clean[:, :, F:])], dim=2))
    torch.testing.assert_close(state.without_references(z), blank.noised(torch.tensor([0.6]), noise), atol=1e-6, rtol=0)
    exact = state_of(Given(references=2))
    assert not exact.without_references(exact.noised(torch.tensor([0.6]), noise))[:, :, F:].any()


def test_references_are_counted_by_their_kinds() -> None:
    """Not by their positions: history would lie before the clip too, and is part of it."""
    state = state_of(Given(known=1, references=2))
    position, kind = state.position.clone(), state.kind.clone()
    position[:, 0], kind[:, 0] = -1.0, HISTORY
    past = dataclasses.replace(state, position=position, kind=kind, host=None)
    assert past.references == 2 and past.rows(0).references == 2 and past.repeated(3).references == 2 and past.part(0, F).references == 0
    assert given_share(*past.host, 4.0).flatten().tolist() == [0, 0.5, 0.75, 0, 0.25]


def test_passes_with_one_text_share_its_keys_and_values(pipe: KlingPipeline) -> None:
    """Of all passes of a step only two texts are embedded: with the prompt, and with the negative prompt."""
    calls: list[int] = []
    hook = pipe.transformer.blocks[0].attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    asked = {"references": [A], "tracks": [Track(None, [(40, 30), (90, 30)])], "num_frames": 5, "num_inference_steps": 2}
    try:
        plan = pipe.plan(request := Request("a", **asked, guidance_scale=2.0, brush_guidance_scale=2.0, reference_guidance_scale=2.0))
        assert plan.tokens < 16 * pipe.text_encoder.encode(["a"]).shape[1], "else nothing is kept"
        pipe(request)
    finally:
        hook.remove()
    assert plan.passes == 4 and len(calls) == 2


def test_a_picture_is_shown_whole_whatever_its_aspect_and_does_not_set_the_clip_s(pipe: KlingPipeline) -> None:
    tall = np.zeros((300, 100, 3), np.uint8)
    tall[:, :, 0], tall[:6, :, 1], tall[-6:, :, 2] = 200, 250, 250
    inputs = read_inputs(Request("a", references=[tall]), 9, 8.0, 17)
    (shown,) = inputs.references
    assert (inputs.height, inputs.width) == (64, 112) and shown.shape == (64, 112, 3)
    assert shown[0, 56, 1] > 150 and shown[-1, 56, 2] > 150 and (shown[20, :, 0] > 190).all()


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"references": [A] * 5}, "5 references were given: give at most 4"),
        ({"references": 3}, "references 3: give a list of pictures"),
        ({"references": [3]}, "give a list of pictures"),
        ({"references": ["absent.png"]}, "absent.png does not exist"),
        ({"references": [A[0]]}, "image of type"),
    ],
)
def test_what_cannot_be_is_refused(pipe: KlingPipeline, given: dict, refused: str) -> None:
    with pytest.raises(UserError, match=refused) as error:
        pipe.plan(Request("a", num_frames=5, **given))
    assert "\n" not in str(error.value)


def test_a_model_without_the_capability_or_the_place_for_them_refuses_references() -> None:
    request = Request("a", references=A, num_frames=5)
    assert len(request.references) == 1
    with pytest.raises(UserError, match="not trained for 'reference'"):
        tiny_pipeline(capabilities=["text", "camera"]).plan(request)
    with pytest.raises(UserError, match="no frames beside those"):
        tiny_pipeline(capabilities=["text", "reference"], block_frames=1).plan(request)


def test_a_record_repeats_them_and_notices_a_changed_picture(pipe: KlingPipeline, tmp_path: Path) -> None:
    for name, pixels in (("a.png", A), ("b.png", B)):
        write_png(tmp_path / name, pixels)
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    request = Request("a ball", references=files, num_frames=5, num_inference_steps=1, seed=3)
    frames = pipe(request).frames[0]
    made = records.make_record(request, pipe.plan(request), {"path": "x", "sha256": {}}, torch.device("cpu"), frames, "fp32")
    made = json.loads(json.dumps(made))
    assert list(made["inputs"]) == files
    again = records.request_of(made, "r.json")
    assert again.references == files and np.array_equal(pipe(again).frames[0], frames)
    assert np.array_equal(pipe(request, references=[A, B]).frames[0], frames), "the same as arrays"
    write_png(tmp_path / "b.png", A)
    with pytest.raises(UserError, match="b.png is not the file"):
        records.request_of(made, "r.json")


# ------------------------------------------------------------------------------------------------------------------ evaluation


def test_a_case_s_words_and_pictures_leave_the_ground_to_the_words_and_the_thing_to_the_pictures() -> None:
    from kling_programs.eval.cases import TASKS as CASES
    from kling_programs.eval.cases import copied, held_out, pictures_of

    world = held_out(0, 17, max_things=1)
    for task, k in [(task, k) for task in ("reference", "reference-2") for k in range(4)]:
        case = CASES[task].make(world, k)
        pictures = case.request["references"]
        assert [(p.colour, p.solid) for p in pictures] == [(thing.colour, thing.solid) for thing in case.scene.things]
        assert all(p.ground not in ("", case.scene.ground) for p in pictures) and case.task == task
        words = case.request["prompt"]
        assert not [c for thing in case.scene.things for c in (thing.colour, COLOURS[thing.colour]) if c in words.replace("green lawn", "")]
        assert len(re.findall("first|second|第一|第二", words)) == len(pictures)
        other = copied(case.scene, k)
        assert all(a.colour != b.colour and a.motion == b.motion for a, b in zip(case.scene.things, other.things, strict=True))
        if task == "reference":
            bare = CASES["reference-none"].make(world, k)
            assert bare.request == {name: value for name, value in case.request.items() if name != "references"}
            assert other.ground == pictures_of(case.scene, k)[0].ground and other.things[0].solid != case.scene.things[0].solid
