"""The small world: a pure function, complete, with held-out combinations, and consistent with its camera."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch

from kling.cameras.axes import MOVES, UNITS
from kling.data.world.captions import COLOURS, GROUNDS, LANGUAGES, MOTIONS, SOLIDS
from kling.data.world.scene import COLOUR_RGB, EYE_HEIGHT, FOCAL, HELD_OUT, World, render_scene, start_pose
from kling.errors import UserError
from kling.shapes import ASPECTS

N = 1500


@pytest.fixture(scope="module")
def scenes():
    world = World(seed=3, frames=5)
    return [world.scene(i) for i in range(N)]


def test_a_clip_is_a_pure_function_of_seed_and_index():
    torch.rand(7)
    a, b = World(1, frames=5).clip(4), World(1, frames=5).clip(4)
    assert torch.equal(a.video, b.video) and a.captions == b.captions
    assert not torch.equal(World(2, frames=5, aspect=a.scene.aspect).clip(4).video, a.video)


def test_all_documented_features_occur(scenes):
    things = [t for s in scenes for t in s.things]
    assert {t.colour for t in things} == set(COLOURS) and len(COLOURS) >= 8
    assert {t.solid for t in things} == set(SOLIDS) and len(SOLIDS) >= 3
    assert {t.motion for t in things} == set(MOTIONS) and len(MOTIONS) >= 5
    assert {s.ground for s in scenes} == set(GROUNDS) and len(GROUNDS) >= 4
    assert {len(s.things) for s in scenes} == {1, 2, 3}
    assert {s.aspect for s in scenes} == set(ASPECTS)
    signs = {(name, value > 0) for s in scenes for name, value in s.axes.items()}
    assert signs == {(name, way) for name in UNITS for way in (True, False)}
    assert {s.move for s in scenes} == {*MOVES, "static", ""}
    assert any(len(s.axes) > 1 and not s.move for s in scenes), "no mixtures"


def test_held_out_combinations_occur_only_in_the_test_split(scenes):
    assert not {(t.colour, t.solid, t.motion) for s in scenes for t in s.things} & set(HELD_OUT)
    held = World(seed=3, frames=5, split="heldout")
    first = [held.scene(i).things[0] for i in range(200)]
    assert {(t.colour, t.solid, t.motion) for t in first} == set(HELD_OUT)


def test_captions_state_the_truth_in_both_languages():
    world = World(seed=0, frames=5)
    phrasings = collections.defaultdict(set)
    for i in range(200):
        scene = world.scene(i)
        captions = world.captions(scene)
        assert set(captions) == set(LANGUAGES)
        for text in captions["en"]:
            assert all(t.colour in text for t in scene.things)
            phrasings[scene.ground].add(text)
        for text in captions["zh"]:
            assert all(COLOURS[t.colour] in text and any(word in text for word in SOLIDS[t.solid]) for t in scene.things)


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("frames", [1, 41, 81])
def test_lengths_and_aspects(aspect, frames):
    clip = World(0, frames=frames, aspect=aspect).clip(2)
    assert clip.video.shape == (frames, *ASPECTS[aspect], 3) and clip.video.dtype == torch.uint8
    assert len(clip.trajectory) == frames


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="40 frames.*41"):
        World(frames=40)
    with pytest.raises(UserError, match="16x9"):
        World(aspect="16x9")


def test_things_are_drawn_at_their_true_positions():
    """Project the centre of each lone ball with the published camera: the picture has the ball's colour there."""
    world, seen = World(seed=9, frames=9, aspect="16:9", max_things=1), 0
    H, W = ASPECTS["16:9"]
    for i in range(200):
        scene = world.scene(i)
        thing = scene.things[0]
        if thing.solid != "ball":
            continue
        video = render_scene(scene).float() / 255
        R0, o0 = start_pose()[:, :3], start_pose()[:, 3]
        for t in (0, 8):
            R = R0 @ scene.trajectory.c2w[t, :, :3]
            o = R0 @ scene.trajectory.c2w[t, :, 3] + o0
            p = R.T @ (thing.centre[t] - o)  # in camera axes
            fx, fy, cx, cy = scene.trajectory.intrinsics[t].tolist()
            u, v = (fx * p[0] / p[2] + cx) * W, (fy * p[1] / p[2] + cy) * H
            if p[2] < 1 or not (2 < u < W - 2 and 2 < v < H - 2):
                continue
            colour = video[t, int(v), int(u)]
            expected = torch.tensor(COLOUR_RGB[thing.colour])
            assert torch.cosine_similarity(colour, expected, dim=0) > 0.97, (i, t)
            seen += 1
    assert seen > 40


def test_the_horizon_follows_from_the_pitch():
    """At frame 0 the ground meets the sky 10 degrees above the picture's centre; for dark ground the brightness jumps there."""
    H, W = ASPECTS["16:9"]
    world = World(seed=0, frames=1, aspect="16:9", max_things=1)
    scene = next(s for s in map(world.scene, range(100)) if s.ground == "water" and abs(float(s.things[0].centre[0, 0])) > 0.5)
    column = render_scene(scene)[0, :, 4].float().mean(-1).numpy()
    row = H / 2 - np.tan(np.radians(10)) * FOCAL * (H * W) ** 0.5
    assert column[: int(row) - 2].min() > column[int(row) + 8 :].mean() + 40
    assert float(-start_pose()[1, 3]) == EYE_HEIGHT


@pytest.mark.slow
def test_thirty_clips_a_second_on_one_core():
    import time

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        world = World(seed=0, frames=17, size=(64, 64))
        world.clip(0)
        began = time.process_time()
        for i in range(30):
            world.clip(i)
        assert (time.process_time() - began) < 1.0
    finally:
        torch.set_num_threads(threads)
