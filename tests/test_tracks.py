"""Tracks: the map that the transformer sees against a slow second implementation, extras that cost nothing, and the truth of the small
world against its pixels."""

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise

import pytest
import torch
import workers

from kling.cache.fill import fill_cache
from kling.cache.plan import CacheConfig, settings_of
from kling.cache.store import LatentBatch, LatentCache
from kling.cameras.axes import axes_trajectory
from kling.cameras.trajectory import pixel_rays
from kling.condition.state import Given, build_state
from kling.condition.tracks import Tracks, codes, joined, track_maps
from kling.data.buckets import Bucket
from kling.data.source import DataConfig
from kling.data.transforms import to_tensor, to_uint8
from kling.data.world.captions import COLOURS, MOTIONS, speaks_of_camera
from kling.data.world.scene import COLOUR_RGB, FOCAL, World, render_scene
from kling.data.world.tracks import brushed_caption, draw_tracks, ground_tracks, places_of, scene_of, thing_tracks, world_poses
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError
from kling.flow.losses import flow_loss
from kling.flow.path import velocity
from kling.metrics.segment import segment
from kling.sampling.pipeline import load_vae
from kling.shapes import aspect_size, pixel_frames
from kling.training.examples import Drawing, draw_example
from kling.training.optim import lr_at, make_optimizer, set_lr
from kling.training.start import check_brush, grow
from kling.vae import AutoencoderKLKling

C, F, HH, WW = 4, 3, 4, 6
T = pixel_frames(F)


def still(x: float, y: float, code: int = 1) -> Tracks:
    """One track that rests at a place given in cells of the latents: (0, 0) is the centre of the first one."""
    place = torch.tensor([(x + 0.5) / WW, (y + 0.5) / HH])
    return Tracks(place.expand(1, T, 2).clone(), torch.ones(1, T, dtype=torch.bool), torch.tensor([code]))


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(C, F, HH, WW, generator=torch.Generator().manual_seed(seed))


def track_map(tracks: Tracks, clean: torch.Tensor, known: int, appended: tuple[int, ...] = ()) -> torch.Tensor:
    return track_maps([tracks], clean[None], [known], [appended])[0]


def slow_map(tracks: Tracks, clean: torch.Tensor, known: int, appended: tuple[int, ...] = ()) -> torch.Tensor:
    """The same map, number by number: the tent max(0, 1 - |distance|) along both axes, frame by frame."""
    c, frames, h, w = clean.shape
    last = max(0, known - 1)
    sums = torch.zeros(c + 1, frames + len(appended), h, w)

    def tent(n: int, t: int) -> torch.Tensor:
        x, y = tracks.points[n, t].tolist()
        if not (tracks.there[n, t] and 0 <= x <= 1 and 0 <= y <= 1):
            return torch.zeros(h, w)
        u, v = min(max(x * w - 0.5, 0), w - 1), min(max(y * h - 0.5, 0), h - 1)
        return torch.tensor([[max(0, 1 - abs(v - i)) * max(0, 1 - abs(u - j)) for j in range(w)] for i in range(h)])

    for n in range(len(tracks)):
        of = {j: [0] if j == 0 else [4 * j - 3 + r for r in range(4)] for j in range(frames)}
        content = codes(tracks.code[n : n + 1], c)[0]
        if known:
            under = sum(tent(n, t) for t in of[last])
            if not under.any():
                continue
            content = (clean[:, last] * under).sum((1, 2)) / under.sum()
        for j in range(last, frames):
            spread = sum(tent(n, t) for t in of[j]) / len(of[j])
            sums[:c, j] += content[:, None, None] * spread
            sums[c, j] += spread
        for k, t in enumerate(appended):
            sums[:c, frames + k] += content[:, None, None] * tent(n, t)
            sums[c, frames + k] += tent(n, t)
    sums = sums / sums[c].clamp(min=1)
    sums[c] *= 1 if known else -1
    return sums


@pytest.mark.parametrize("known", [0, 1, 2])
def test_the_map_is_that_of_a_slow_second_implementation(known: int) -> None:
    """Moving, leaving, hidden and crowded tracks, with keyframes."""
    draw = torch.Generator().manual_seed(known)
    points = torch.rand(12, 1, 2, generator=draw) + 0.9 * (torch.rand(12, 1, 2, generator=draw) - 0.5) * torch.linspace(0, 1, T)[:, None]
    points[0, 3:] = torch.inf  # behind the camera
    tracks = Tracks(points, torch.rand(12, T, generator=draw) > 0.2, torch.arange(12) % 4)
    appended = (T - 1, 3)
    torch.testing.assert_close(track_map(tracks, latents(), known, appended), slow_map(tracks, latents(), known, appended))


def test_the_maps_of_a_batch_are_those_of_its_clips() -> None:
    """Clips with different numbers of tracks, of given frames and times of keyframes; one has no tracks, and one knows nothing."""
    draw, clean = torch.Generator().manual_seed(5), torch.stack([latents(seed) for seed in range(5)])
    tracks = [
        Tracks(1.2 * torch.rand(n, T, 2, generator=draw) - 0.1, torch.rand(n, T, generator=draw) > 0.2, torch.arange(n) % 4) if n else None
        for n in (3, 0, 1, 7, 2)
    ]
    known, appended = [1, 2, 0, 2, 3], [(T - 1,), (0,), (3,), (5,), (1,)]
    maps = track_maps(tracks, clean, known, appended)
    assert maps.shape == (5, C + 1, F + 1, HH, WW) and not maps[1].any()
    for i in (0, 2, 3, 4):
        torch.testing.assert_close(maps[i], slow_map(tracks[i], clean[i], known[i], appended[i]))


def test_a_latent_is_copied_from_under_the_start_to_every_later_place() -> None:
    clean, moving = latents(), still(1, 2)
    moving.points[0, 1:] = still(4, 0).points[0, 0]
    maps = track_map(moving, clean, known=1)
    assert torch.equal(maps[:C, 0, 2, 1], clean[:, 0, 2, 1]) and torch.equal(maps[:C, 2, 0, 4], clean[:, 0, 2, 1])
    assert maps[C].sum() == F and maps[C, 0, 2, 1] == maps[C, 1, 0, 4] == maps[C, 2, 0, 4] == 1
    beside = clean.clone()
    beside[:, 1:] = torch.randn(C, F - 1, HH, WW)
    assert torch.equal(track_map(moving, beside, known=1), maps), "what is to be generated never enters the map"
    halfway = track_map(still(1.5, 2), clean, known=1)
    torch.testing.assert_close(halfway[C, 0, 2, 1:3], torch.tensor([0.5, 0.5]))


def test_without_a_first_frame_the_map_tells_things_apart_by_codes() -> None:
    clean = latents()
    maps = track_map(joined([still(0, 0, 1), still(3, 1, 2), still(5, 3, 0)]), clean, known=0)
    assert torch.equal(maps, track_map(joined([still(0, 0, 1), still(3, 1, 2), still(5, 3, 0)]), latents(1), known=0))
    assert (maps[C] <= 0).all() and maps[C, 1, 0, 0] == -1
    assert torch.equal(maps[:C, 2, 3, 5], torch.ones(C)), "the background has code 0"
    for c in (16, 48, 128):
        rows = codes(torch.arange(16), c)
        assert (rows.abs() == 1).all() and torch.equal(rows @ rows.T, c * torch.eye(16)), "no two codes have anything in common"


def test_tracks_are_a_field_of_the_state() -> None:
    clean = torch.stack([latents(0), latents(1)])
    given = [Given(known=1, keyframes=((T - 1, 1.0),)), Given(keyframes=((T - 1, 1.0),))]
    state = build_state(given, clean, torch.zeros(2, C, 1, HH, WW), tracks=[still(1, 1), None])
    assert state.tracks.shape == (2, C + 1, F + 1, HH, WW) and not state.tracks[1].any()
    assert state.tracks[0, C, F, 1, 1] == 1, "a keyframe shows where things are in it"
    assert torch.equal(state.rows(1).tracks, state.tracks[1:]) and torch.equal(state.part(1, 3).tracks, state.tracks[:, :, 1:3])
    assert torch.equal(state.to("cpu").tracks, state.tracks)
    assert build_state(given, clean, torch.zeros(2, C, 1, HH, WW)).tracks is None


# ------------------------------------------------------------------------------------------------------------- the transformer

TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 12, "freq_dim": 32, "ffn_dim": 48, "num_layers": 2}
TINY |= {"in_channels": C, "out_channels": C, "num_kinds": 2}


def test_absent_tracks_cost_no_bit_and_old_weights_gain_them(tmp_path) -> None:
    torch.manual_seed(0)
    old = KlingTransformer3DModel(**TINY).eval()
    for parameter in old.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    old.save_pretrained(tmp_path / "transformer")
    new = grow(tmp_path / "transformer", {"track_channels": C + 1}).eval()
    assert new.config.track_channels == C + 1 and old.config.track_channels == 0
    z, sigma, text = torch.randn(2, C, F, HH, WW), torch.tensor([0.3, 0.9]), torch.randn(2, 5, 12)
    maps = torch.stack([track_map(still(1, 1), latents(), 1), torch.zeros(C + 1, F, HH, WW)])
    with torch.no_grad():
        before = old(z, sigma, text).sample
        assert torch.equal(new(z, sigma, text).sample, before) and torch.equal(new(z, sigma, text, tracks=maps).sample, before)
        torch.nn.init.normal_(new.track_embedding.weight)
        after = new(z, sigma, text, tracks=maps).sample
        assert torch.equal(new(z, sigma, text).sample, before), "without tracks it is the old model"
        assert (after[0] - before[0]).abs().max() > 0.1 and torch.equal(after[1], before[1]), "nor do they change another sample"
    with pytest.raises(UserError, match="track_channels is 0"):
        old(z, sigma, text, tracks=maps)
    with pytest.raises(UserError, match="a map of the size of the latents"):
        new(z, sigma, text, tracks=maps[:, :, 1:])
    with pytest.raises(UserError, match="leave it unchanged"):
        new.save_pretrained(tmp_path / "new")
        grow(tmp_path / "new", {"track_channels": C + 2})


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_new_input_may_learn_faster(name: str) -> None:
    """lr_of: one step moves the named part by its multiple of what it moves otherwise, and everything else as before."""

    def moved(**lr_of: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = KlingTransformer3DModel(**TINY, track_channels=C + 1)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        optimizer = make_optimizer(name, model, 1e-3, weight_decay=0.0, exact=True, lr_of=lr_of)
        set_lr(optimizer, 2e-3)
        optimizer.step()
        return {key: p.detach() - before[key] for key, p in model.named_parameters()}

    plain, fast = moved(), moved(track_embedding=5.0)
    for key, change in plain.items():
        torch.testing.assert_close(fast[key], change * (5 if key.startswith("track_embedding") else 1), atol=1e-7, rtol=1e-3)
    with pytest.raises(UserError, match="name a part of the model"):
        moved(track_embeding=5.0)


# ------------------------------------------------------------------------------------------------------ the truth of the world


@pytest.mark.parametrize("axes", [{}, {"pan": 6.0, "dolly": 4.0, "zoom": -3.0}], ids=["static", "moving"])
def test_the_places_of_things_are_those_of_their_pixels(axes: dict[str, float]) -> None:
    """Of a ball, whose outline's centre is nearly its centre's place: within a pixel and a half, in every frame that shows it whole."""
    H, W = aspect_size("16:9")
    world, errors, sizes = World(3, 17, "16:9", max_things=1), [], []
    for index in range(20):
        scene = world.scene(index)
        if scene.things[0].solid != "ball":
            continue
        scene = dataclasses.replace(scene, axes=axes, trajectory=axes_trajectory(axes, 17, H, W, FOCAL))
        colours, near = segment(render_scene(scene), COLOUR_RGB)
        mask = (near > 0) & (colours == list(COLOUR_RGB).index(scene.things[0].colour))
        places = places_of(scene)
        for t in range(17):
            rows, columns = mask[t].any(1).nonzero().flatten(), mask[t].any(0).nonzero().flatten()
            if len(rows) < 6 or min(rows[0], columns[0]) == 0 or rows[-1] == H - 1 or columns[-1] == W - 1:
                continue
            box = torch.stack([(columns[0] + columns[-1] + 1) / 2 / W, (rows[0] + rows[-1] + 1) / 2 / H])
            errors.append(((box - places.centre[0, t]) * torch.tensor([W, H])).norm())
            sizes.append((rows[-1] + 1 - rows[0]) / 2 / (places.half[0, t, 1] * H))
    assert len(errors) > 40 and torch.stack(errors).median() < 0.8 and torch.stack(errors).quantile(0.95) < 1.5
    assert 0.9 < torch.stack(sizes).median() < 1.1


def test_points_of_ground_and_sky_stay_on_them() -> None:
    """The rays through a track's places meet the ground in one point, by the inverse of the projection; the sky turns only."""
    H, W = 64, 112
    axes = {"pan": 7.0, "horizontal": -5.0, "vertical": 4.0, "roll": 3.0}
    scene = World(0, 17, "16:9", max_things=1).scene(0)
    away = dataclasses.replace(scene.things[0], centre=torch.full((17, 3), 99.0))
    scene = dataclasses.replace(scene, things=(away,), axes=axes, trajectory=axes_trajectory(axes, 17, H, W, FOCAL))
    pixels = torch.tensor([[0.3, 0.65], [0.6, 0.6], [0.5, 0.05]])
    tracks = ground_tracks(scene, pixels, start=4)
    torch.testing.assert_close(tracks.points[:, 4], pixels, atol=1e-4, rtol=0)
    R, o = world_poses(scene.trajectory)
    rays = pixel_rays(scene.trajectory.intrinsics[::8], 1000, 1000)  # (3, 3, 1000, 1000)
    for t in (0, 8, 16):
        x, y = (tracks.points[:2, t] * 1000 - 0.5).round().long().unbind(1)
        met = [R[t] @ rays[t // 8, :, j, i] for i, j in zip(x, y, strict=True)]
        feet = [o[t] - o[t, 1] / d[1] * d for d in met]
        start = [
            R[4] @ torch.tensor([*((p - scene.trajectory.intrinsics[4, 2:]) / scene.trajectory.intrinsics[4, :2]), 1.0]) for p in pixels[:2]
        ]
        for foot, d in zip(feet, start, strict=True):
            assert (foot - (o[4] - o[4, 1] / d[1] * d)).norm() < 0.06  # metres: the grid of rays is a thousandth
    sky = (tracks.points[2, :, 0] - 0.5) / scene.trajectory.intrinsics[:, 0]
    assert sky.std() > 0.1 and tracks.there.all()


def test_hidden_points_are_left_out() -> None:
    world = World(0, 17, "16:9", max_things=1)
    scene = world.scene(0)
    near, far = (dataclasses.replace(scene.things[0], centre=torch.tensor([0.0, -0.6, z]).expand(17, 3)) for z in (4.0, 6.0))
    scene = dataclasses.replace(scene, things=(near, far), axes={}, trajectory=axes_trajectory({}, 17, 64, 112, FOCAL))
    assert not thing_tracks(scene, 1, torch.zeros(1, 2)).there.any() and thing_tracks(scene, 0, torch.zeros(1, 2)).there.all()
    assert not places_of(scene).visible(1, 0) and len(ground_tracks(scene, places_of(scene).centre[0, :1])) == 0


def test_drawn_tracks_are_of_all_kinds_and_their_words_leave_the_motion_to_them() -> None:
    world, rng = World(1, 17), random.Random(0)
    drawn = []
    for index in range(150):
        scene = world.scene(index)
        brushed = draw_tracks(scene, rng, start=index % 5)
        assert not brushed.tracks.there[:, : index % 5].any() and brushed.tracks.points.shape[1] == 17
        assert {int(k) for k in brushed.tracks.code} <= {0, *(k + 1 for k in brushed.things)}
        text = brushed_caption(scene, brushed, camera_shown=True, rng=rng)
        verbs = sum(any(phrase.split("{")[0].strip() in text for phrase in MOTIONS[thing.motion][0]) for thing in scene.things)
        ended = bool((~brushed.tracks.there[:, -1]).any())  # or is hidden there
        drawn.append((len(brushed.things), brushed.ground > 0, verbs < len(scene.things), ended, speaks_of_camera(text)))
    things, ground, unsaid, ended, camera = zip(*drawn, strict=True)
    assert sum(a == 0 and not b for a, b in zip(things, ground, strict=True)) < 15, "hardly ever does a thing hide all points"
    assert set(things) == {0, 1, 2, 3} and 0.2 < sum(ground) / 150 < 0.7 and sum(unsaid) > 30 and sum(ended) > 20
    assert 0.3 < sum(camera) / 150 < 0.7


def test_the_cache_s_names_are_the_scenes() -> None:
    scene = World(5, 17, "1:1").scene(12)
    again = scene_of("world/5/train/1:1/12", 17)
    assert torch.equal(again.trajectory.c2w, scene.trajectory.c2w) and again.things[0].colour == scene.things[0].colour
    assert scene_of("cats/a.mp4+0.000", 17) is None


def batch_of(frames: int, clips: int = 6) -> LatentBatch:
    """Clips of the world with random latents."""
    world, f = World(0, frames, "16:9"), 1 + (frames - 1) // 4
    scenes = [world.scene(i) for i in range(clips)]
    captions = [[text for texts in world.captions(scene).values() for text in texts] for scene in scenes]
    z = torch.randn(clips, C, f, 8, 14)
    return LatentBatch(
        list(range(clips)), z, z[:, None, :, -1], torch.full((clips, 1), frames - 1), captions, [[1.0] * 6] * clips,
        [scene.trajectory for scene in scenes], names=[f"world/0/train/16:9/{i}" for i in range(clips)], whole=frames,
    )  # fmt: skip


def test_training_draws_tracks_for_its_share_and_nothing_else_changes() -> None:
    model = KlingTransformer3DModel(**TINY, track_channels=C + 1)
    vae = AutoencoderKLKling(base_dim=8, z_dim=C, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * C, latents_std=[1.0] * C)
    tasks, batch = {"text": 1.0, "image": 1.0, "last": 1.0, "restyle": 1.0, "continuation": 1.0}, batch_of(17)
    shares, told = [], []
    for place in range(12):
        plain = draw_example(Drawing(0, tasks, 0.1, 0.4), batch, place, model.config, vae.spatial_factor)
        brushed = draw_example(Drawing(0, tasks, 0.1, 0.4, brush=0.5), batch, place, model.config, vae.spatial_factor)
        again = draw_example(Drawing(0, tasks, 0.1, 0.4, brush=0.5), batch, place, model.config, vae.spatial_factor)
        assert torch.equal(brushed.state.tracks, again.state.tracks) and brushed.prompts == again.prompts
        assert not plain.state.tracks.any() and plain.state.tracks.shape[1] == C + 1
        assert torch.equal(plain.state.mask, brushed.state.mask) and torch.equal(plain.has_camera, brushed.has_camera)
        has = brushed.state.tracks.flatten(1).any(1)
        whole = ((brushed.state.mask == 0) | (brushed.state.mask == 1)).flatten(1).all(1)
        assert not has[~whole].any(), "the motion of a restyled clip is known"
        told += [a == b for a, b, tracked in zip(plain.prompts, brushed.prompts, has, strict=True) if not tracked]
        shares += has[whole].tolist()
    assert all(told) and 0.25 < sum(shares) / len(shares) < 0.75
    batch.names[0] = "world/9/train/16:9/3"
    with pytest.raises(UserError, match="make the cache again"):
        draw_example(Drawing(0, {"text": 1.0}, 0.0, 0.0, brush=1.0), batch, 0, model.config, vae.spatial_factor)


def test_a_cache_of_free_paths_trains_with_tracks_and_words_that_do_not_say_them(tmp_path) -> None:
    data = DataConfig(frames=[1, 5], aspects=["16:9"])
    config = CacheConfig(out=str(tmp_path), clips=2, paths={5: 3}, shares=[1.0], shard=2, workers=0, data=data)
    assert "paths" not in settings_of(dataclasses.replace(config, paths={})), "older caches keep their key"
    torch.manual_seed(0)
    vae = AutoencoderKLKling(**workers.TINY_VAE).eval()
    list(fill_cache(config, vae))
    cache = LatentCache(tmp_path)
    batch = cache.batch(Bucket("16:9", 5), list(range(5)), 5)
    assert batch.names == [f"world/0/{split}/16:9/{i}" for split, n in (("train", 2), ("paths", 3)) for i in range(n)]
    z = batch.latents.shape[1]
    model = KlingTransformer3DModel(**TINY | {"in_channels": z, "out_channels": z}, track_channels=z + 1)
    check_brush(0.3, model, cache)
    example = draw_example(Drawing(0, {"image": 1.0}, 0.0, 0.0, brush=1e-9), batch, 0, model.config, vae.spatial_factor)
    assert example.state.tracks.flatten(1).any(1).tolist() == [False, False, True, True, True]
    for i in (2, 3, 4):
        scene = scene_of(batch.names[i], batch.whole)
        unnamed = [thing for thing in scene.things if not thing.motion]
        assert all(thing.colour in example.prompts[i] or COLOURS[thing.colour] in example.prompts[i] for thing in unnamed)
    with pytest.raises(UserError, match="name some of these"):
        list(fill_cache(dataclasses.replace(config, paths={9: 1}, out=str(tmp_path / "other")), vae))
    with pytest.raises(UserError, match="set model.track_channels="):
        check_brush(0.3, KlingTransformer3DModel(**TINY | {"in_channels": z, "out_channels": z}), cache)


# ------------------------------------------------------------------------------------------------------------ it can be learned

ENDS = (-1.6, -0.8, 0.8, 1.6)  # metres to the right, where the ball goes


@pytest.mark.slow
def test_a_tiny_transformer_learns_to_move_the_brushed_thing() -> None:
    """Four clips that differ only in where the ball goes: after a few hundred steps its track alone says it, in all four, and without it
    they come out alike."""
    torch.manual_seed(0)
    frames, (H, W) = 9, aspect_size("16:9")
    scene = World(0, frames, "16:9", max_things=1).scene(1)
    trajectory = axes_trajectory({}, frames, H, W, FOCAL)
    thing = dataclasses.replace(scene.things[0], solid="ball", colour="red", size=0.6)
    way = torch.linspace(0, 1, frames)[:, None] * torch.tensor([1.0, 0, 0]) + torch.tensor([0, -0.6, 5.0])
    scenes = [
        dataclasses.replace(
            scene, ground="snow", axes={}, trajectory=trajectory,
            things=(dataclasses.replace(thing, centre=way * torch.tensor([end, 1.0, 1.0])),),
        )
        for end in ENDS
    ]  # fmt: skip
    vae = load_vae()
    with torch.no_grad():
        clean = torch.cat([vae.normalize(vae.encode(to_tensor(render_scene(s))[None]).latent_dist.mode()) for s in scenes]).float()
    tracks = [thing_tracks(s, 0, torch.zeros(1, 2)) for s in scenes]
    state = build_state([Given(known=1)] * 4, clean, None, tracks=tracks)
    z_dim = clean.shape[1]
    size = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 3, "ffn_dim": 256, "text_dim": 8, "freq_dim": 64}
    model = KlingTransformer3DModel(**size, in_channels=z_dim, out_channels=z_dim, track_channels=z_dim + 1)
    optimizer = make_optimizer("muon", model, 4e-3)
    text = torch.zeros(4, 1, 8)
    draw = torch.Generator().manual_seed(0)
    for step in range(300):
        set_lr(optimizer, lr_at(step, lr=4e-3, warmup=10, steps=300, schedule="cosine"))
        sigma, noise = torch.rand(4, generator=draw) ** 0.5, torch.randn(clean.shape, generator=draw)
        v = model(state.noised(sigma, noise), state.levels(sigma), text, tracks=state.tracks).sample
        flow_loss(v, velocity(clean, noise), state.mask).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def ends(maps: torch.Tensor | None) -> torch.Tensor:
        """Where the ball is in the last frame, in pixels from the left, (4,)."""
        levels = [1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.15, 0.0]
        z = state.noised(torch.ones(4), torch.randn(1, *clean.shape[1:], generator=torch.Generator().manual_seed(1)).expand_as(clean))
        for level, after in pairwise(levels):
            v = model(z, state.levels(torch.full((4,), level)), text, tracks=maps).sample
            z = torch.where(state.mask > 0, z - (level - after) * v, clean)
        found = []
        for video in vae.decode(vae.denormalize(z)).sample:
            colours, near = segment(to_uint8(video)[-1:], COLOUR_RGB)
            columns = ((near > 0) & (colours == list(COLOUR_RGB).index("red")))[0].nonzero()[:, 1].float()
            found.append(columns.mean() if len(columns) else torch.tensor(torch.nan))
        return torch.stack(found)

    asked = torch.stack([places_of(s).centre[0, -1, 0] * W for s in scenes])
    diameter = 2 * places_of(scenes[0]).half[0, -1, 0] * W
    with_tracks, without = ends(state.tracks), ends(None)
    assert (with_tracks - asked).abs().max() < diameter / 4, (asked, with_tracks)
    assert without.nan_to_num(asked.mean()).std() < 1 and (without - asked).abs().nan_to_num(99).max() > diameter / 2
