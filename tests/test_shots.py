"""Shots: each token reads the words of its own shot only, positions jump at a cut, and one shot costs no bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import workers
from torch import Tensor

from kling.cache.batches import LatentSteps, mixed
from kling.cache.fill import fill_cache
from kling.cache.plan import CacheConfig, settings_of
from kling.cache.store import LatentCache
from kling.condition.state import SHOT_GAP, Given, State, build_state
from kling.data.buckets import Bucket
from kling.data.clips import open_manifest
from kling.data.manifest import Caption, read_manifest, write_manifest
from kling.data.source import ClipSource, DataConfig, StepBatches
from kling.data.video import write_video
from kling.data.world.captions import COLOURS, MOTIONS
from kling.data.world.scene import COLOUR_RGB, HELD_OUT, World, render_scene
from kling.data.world.storyboard import Storyboard, Storyboards, render_storyboard, shot_ranges
from kling.data.world.tracks import places_of
from kling.dit import KlingTransformer3DModel
from kling.dit.walk_cache import WalkCache
from kling.errors import UserError
from kling.metrics.brush import thing_places
from kling.metrics.segment import segment
from kling.metrics.shots import find_cuts
from kling.nn.attention import Attention
from kling.training.examples import Drawing, draw_example
from kling.training.start import check_shots
from kling.vae import AutoencoderKLKling

C, F, HH, WW = 4, 5, 4, 6
TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 12, "freq_dim": 32, "ffn_dim": 48, "num_layers": 2}
TINY |= {"in_channels": C, "out_channels": C, "num_kinds": 2}
SHOTS = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 1, 1, 1]])  # (b, F) of two samples with three texts each


def transformer(**more: object) -> KlingTransformer3DModel:
    torch.manual_seed(0)
    model = KlingTransformer3DModel(**TINY | more).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, C, F, HH, WW), torch.tensor([0.3, 0.9]), torch.randn(6, 7, 12)  # latents, levels, texts (b · S, l, e)


# ------------------------------------------------------------------------------------------------------------------ the State


def state_of(given: list[Given], starts: list[list[int]] | None) -> State:
    lone = torch.zeros(len(given), C, len(given[0].keyframes), HH, WW) if given[0].keyframes else None
    return build_state(given, torch.zeros(len(given), C, F, HH, WW), lone, shots=starts)


def test_positions_jump_at_every_cut_and_a_keyframe_is_of_the_shot_that_it_falls_in() -> None:
    given = [Given(known=1, keyframes=((7, 1.0),)), Given(keyframes=((16, 0.5),))]  # pixel frames 7 and 16: latent frames 2 and 4
    state = state_of(given, [[0, 2, 4], [0, 1]])
    assert state.shot.tolist() == [[0, 0, 1, 1, 2, 1], [0, 1, 1, 1, 1, 1]]
    plain = state_of(given, None).position
    assert torch.equal(state.position - plain, SHOT_GAP * state.shot)
    assert plain[0, 5] == (7 + 1.5) / 4, "a keyframe's own place is between the latents"
    assert SHOT_GAP % 1, "a distance across a cut is no distance within a shot"


def test_a_reference_lies_before_the_first_shot_and_reads_its_words() -> None:
    given, lone = [Given(keyframes=((16, 1.0),), references=2)], torch.zeros(1, C, 3, HH, WW)
    state = build_state(given, torch.zeros(1, C, F, HH, WW), lone, shots=[[0, 2, 4]])
    assert state.shot.tolist() == [[0, 0, 1, 1, 2, 2, 0, 0]] and state.position[0, 6:].tolist() == [-1, -2]
    assert not state.mask[0, :, 6:].any()


def test_one_shot_is_the_state_of_before() -> None:
    given = [Given(known=1), Given()]
    assert state_of(given, [[0], [0]]).shot is None and torch.equal(state_of(given, [[0], [0]]).position, state_of(given, None).position)


def test_shots_follow_the_samples_and_the_frames_of_a_state() -> None:
    state = state_of([Given(), Given()], [[0, 2, 4], [0, 1]])
    assert torch.equal(state.rows(1).shot, state.shot[1:]) and torch.equal(state.part(1, 3).shot, state.shot[:, 1:3])
    assert state.rows(1).repeated(3).shot.tolist() == [[0, 1, 1, 1, 1]] * 3 and torch.equal(state.to("cpu").shot, state.shot)


# ------------------------------------------------------------------------------------------------------------ cross-attention


def test_cross_attention_by_shot_is_masked_attention_over_all_words() -> None:
    """Against the definition: softmax over the words of all shots, with those of other shots masked, in float64."""
    torch.manual_seed(0)
    layer = Attention(32, 2, qk_norm=False).double()
    x, text = torch.randn(2, F * 6, 32, dtype=torch.float64), torch.randn(6, 7, 32, dtype=torch.float64)
    rows = SHOTS + torch.tensor([[0], [3]])
    out = layer(x, text, rows=rows)
    for i in range(2):
        heads = [t.unflatten(-1, (2, 16)) for t in (layer.to_q(x[i]), layer.to_k(text.flatten(0, 1)), layer.to_v(text.flatten(0, 1)))]
        q, k, v = heads  # (n, heads, 16), (6 · 7, heads, 16) twice
        mine = rows[i].repeat_interleave(6)[:, None] == torch.arange(6).repeat_interleave(7)  # (n, 42)
        scores = torch.einsum("nhd,mhd->hnm", q, k) / 4
        weights = scores.masked_fill(~mine, -torch.inf).softmax(-1)
        want = layer.to_out[0](torch.einsum("hnm,mhd->nhd", weights, v).flatten(1))
        torch.testing.assert_close(out[i], want, atol=1e-12, rtol=1e-12)


def test_where_tokens_do_not_see_each_other_every_shot_is_the_clip_of_its_own_words() -> None:
    model = transformer()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn1.to_out[0].weight)
    z, sigma, text = inputs()
    with torch.no_grad():
        mixed = model(z, sigma, text, shots=SHOTS).sample
        alone = torch.stack([model(z, sigma, text[s::3]).sample for s in range(3)])  # (S, b, c, F, h, w), all frames with one text
    for i in range(2):
        for j in range(F):
            torch.testing.assert_close(mixed[i, :, j], alone[SHOTS[i, j], i, :, j], atol=1e-5, rtol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 0.1, "the words matter here"


def test_words_reach_other_shots_only_through_the_picture() -> None:
    """A word of a shot that no frame is of changes nothing; its gradient is zero."""
    model, (z, sigma, text) = transformer(), inputs()
    text.requires_grad_()
    model(z, sigma, text, shots=SHOTS).sample.sum().backward()
    used = text.grad.abs().amax((1, 2)) > 0
    assert used.tolist() == [True, True, True, True, True, False], "sample 1 has no third shot"


def test_one_shot_is_computed_to_the_bit_as_without_shots() -> None:
    model, (z, sigma, text) = transformer(), inputs()
    with torch.no_grad():
        want = model(z, sigma, text[:2]).sample
        torch.testing.assert_close(model(z, sigma, text[:2], shots=torch.zeros(2, F, dtype=torch.long)).sample, want)
        assert torch.equal(model(z, sigma, text[:2], shots=None).sample, want)


def test_a_walk_keeps_the_words_of_all_shots() -> None:
    model, (z, sigma, text) = transformer(), inputs()
    cache = WalkCache(len(model.blocks))
    with torch.no_grad():
        want = model(z, sigma, text, shots=SHOTS).sample
        model(z, sigma, text, shots=SHOTS, walk_cache=cache)
        again = model(z, sigma, text, shots=SHOTS, walk_cache=cache).sample
    assert torch.equal(again, want) and len(cache.layers[0].pairs["text"][0]) == 6


def test_a_camera_may_be_given_for_some_shots_only() -> None:
    model = transformer(camera_channels=24, camera_fold="pool", camera_downscale=1)
    z, sigma, text = inputs()
    rays, shown = torch.randn(2, 24, F, HH, WW), torch.tensor([[1, 1, 0, 0, 1], [0] * 5], dtype=torch.bool)
    with torch.no_grad():
        part = model._camera(rays, torch.zeros(2, F * 6, 32), shown).unflatten(1, (F, 6))
        whole = model._camera(rays, torch.zeros(2, F * 6, 32), None).unflatten(1, (F, 6))
    assert torch.equal(part, whole * shown[..., None, None]) and bool((whole != 0).any())


def test_shots_that_do_not_fit_are_refused() -> None:
    model, (z, sigma, text) = transformer(), inputs()
    with pytest.raises(UserError, match="shots of shape"):
        model(z, sigma, text, shots=SHOTS[:, 1:])
    with pytest.raises(UserError, match="5 texts"):
        model(z, sigma, text[:5], shots=SHOTS)
    model._parallel_config = object()
    with pytest.raises(UserError, match="context parallelism"):
        model(z, sigma, text, shots=SHOTS)


# ----------------------------------------------------------------------------------------------------------- the small world


@pytest.fixture(scope="module")
def boards() -> list[Storyboard]:
    return [Storyboards(seed=2, frames=41, aspect="16:9").storyboard(i) for i in range(40)]


def test_a_storyboard_is_a_pure_function_with_cuts_where_latents_begin(boards: list[Storyboard]) -> None:
    again = Storyboards(seed=2, frames=41, aspect="16:9").storyboard(7)
    assert again.starts == boards[7].starts and torch.equal(again.trajectory.c2w, boards[7].trajectory.c2w)
    assert {len(board.shots) for board in boards} == {2, 3}
    for board in boards:
        lengths = [shot.frames for shot in board.shots]
        assert sum(lengths) == 41 == len(board.trajectory) and lengths[0] % 4 == 1 and not any(n % 4 for n in lengths[1:])
        assert list(board.cuts) == [sum(lengths[: k + 1]) for k in range(len(lengths) - 1)]
    assert len({board.starts for board in boards}) > 8, "cuts fall anywhere"


def test_all_shots_show_the_same_things_on_the_same_ground_doing_something_else(boards: list[Storyboard]) -> None:
    for board in boards:
        first = board.shots[0]
        for before, shot in pairwise(board.shots):
            assert [(t.colour, t.solid, t.size) for t in shot.things] == [(t.colour, t.solid, t.size) for t in first.things]
            assert shot.ground == first.ground and torch.equal(shot.phases, first.phases)
            assert all(a.motion != b.motion for a, b in zip(before.things, shot.things, strict=True))
        assert not any((t.colour, t.solid, t.motion) in HELD_OUT for shot in board.shots for t in shot.things)
    held = [Storyboards(2, 41, "16:9", split="heldout").storyboard(i).shots[0].things[0] for i in range(5)]
    assert all((t.colour, t.solid, t.motion) in HELD_OUT for t in held)


def test_every_shot_is_told_in_both_languages_by_words_of_its_own(boards: list[Storyboard]) -> None:
    told = Storyboards(seed=2, frames=41, aspect="16:9").captions(boards[0])
    assert len(told) == len(boards[0].shots)
    for shot, texts in zip(boards[0].shots, told, strict=True):
        assert set(texts) == {"en", "zh"}
        for thing in shot.things:
            assert all(COLOURS[thing.colour] in text for text in texts["zh"]) and all(thing.colour in text for text in texts["en"])
            said = [phrase.format(roll="rolls" if thing.solid == "ball" else "slides") for phrase in MOTIONS[thing.motion][0]]
            assert all(any(phrase in text for phrase in said) for text in texts["en"])


def test_the_truth_of_a_shot_is_what_its_frames_show() -> None:
    """The place of a ball that `places_of` gives, against its pixels, in shots that look at another place from another side."""
    errors, world = [], Storyboards(seed=4, frames=17, aspect="16:9", max_things=1)
    boards = (world.storyboard(index) for index in range(30))
    for board in [board for board in boards if board.shots[0].things[0].solid == "ball"][:5]:
        video = render_storyboard(board)
        for shot, (first, end) in list(zip(board.shots, shot_ranges(board.starts, 17), strict=True))[1:]:
            seen = thing_places(video[first:end], COLOUR_RGB, shot.things[0].colour)  # (t, 2)
            asked = places_of(shot).centre[0] * torch.tensor([112.0, 64.0])
            whole = ((asked > 16) & (asked < torch.tensor([96.0, 48.0]))).all(1)
            errors += (seen - asked).norm(dim=1)[whole].tolist()
    errors = torch.tensor(errors)
    assert len(errors) > 20 and errors.median() < 0.8 and errors.quantile(0.9) < 1.5


def test_a_place_moves_and_turns_the_view_of_the_ground_and_not_what_stands_on_it() -> None:
    board = Storyboards(seed=4, frames=17, aspect="16:9", max_things=1).storyboard(1)
    here = replace(board, places=(torch.eye(3, 4),) * len(board.places))
    a, b = (segment(render_storyboard(which), COLOUR_RGB)[1] > 0 for which in (board, here))
    first, end = shot_ranges(board.starts, 17)[1]
    assert (a[first:end] != b[first:end]).float().mean() < 0.01 and a[first:end].any(), "the thing's outline is the same"
    moved = (render_storyboard(board).float() - render_storyboard(here).float()).abs().mean((1, 2, 3))
    assert moved[:first].max() == 0 and moved[first:].min() > 2, "and the ground under it another part"


def test_a_clip_without_room_for_a_cut_is_refused() -> None:
    with pytest.raises(UserError, match="no room for a cut"):
        Storyboards(frames=9)


# ------------------------------------------------------------------------------------------------------- cache and training


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    out = tmp_path_factory.mktemp("shots")
    data = DataConfig(frames=[1, 13], aspects=["1:1"])
    config = CacheConfig(out=str(out), clips=3, shots={13: 2}, shares=[1.0], shard=2, workers=0, data=data)
    assert "shots" not in settings_of(replace(config, shots={})), "older caches keep their key"
    torch.manual_seed(0)
    vae = AutoencoderKLKling(**workers.TINY_VAE).eval()
    list(fill_cache(config, vae))
    with pytest.raises(UserError, match="name some of these"):
        list(fill_cache(replace(config, shots={1: 1}, out=str(out / "other")), vae))
    return LatentCache(out)


def test_a_cache_keeps_the_shots_of_its_storyboards(cache: LatentCache) -> None:
    bucket = Bucket("1:1", 13)
    assert cache.storyboards == {bucket: [3, 4]}
    batch = cache.batch(bucket, [0, 3, 4], 13)
    boards = [Storyboards(0, 13, "1:1").storyboard(i) for i in range(2)]
    assert batch.shots == [None, *([(start, 6) for start in board.starts] for board in boards)]
    assert torch.equal(batch.cameras[1].c2w, boards[0].trajectory.c2w)
    assert [len(texts) for texts in batch.captions] == [6, 12, 12]
    assert cache.batch(bucket, [3], 5).shots == [[(0, 6)]], "a clip that is cut before its second shot has one"


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_storyboards_are_as_many_of_the_clips_as_asked(cache: LatentCache, share: float) -> None:
    steps = LatentSteps(cache, 2, [13], seed=0, shots=share)
    drawn = [name for place in range(2 * steps.per_epoch) for name in steps.names(place)]
    of = [name.split("/")[2] == "shots" for name in drawn]
    assert abs(sum(of) / len(of) - share) < 0.11
    assert len(set(drawn)) == {0.0: 3, 1.0: 2}.get(share, 5), "every clip is used"
    assert list(mixed(10, [8, 9], 0.5)).count(8) == 4 and list(mixed(10, list(range(5, 10)), 0.1)).count(0) == 9


def test_training_gives_every_shot_its_own_words_and_camera(cache: LatentCache) -> None:
    vae = AutoencoderKLKling(**workers.TINY_VAE)
    z = vae.config.z_dim
    size = {"in_channels": z, "out_channels": z, "camera_channels": 24, "camera_fold": "pool", "camera_downscale": 1}
    model = KlingTransformer3DModel(**TINY | size)
    batch = cache.batch(Bucket("1:1", 13), [0, 3, 4], 13)
    how, silent, shown = Drawing(0, {"text": 1.0, "last": 1.0}, 0.3, 0.5), [], []
    for place in range(30):
        example = draw_example(how, batch, place, model.config, vae.spatial_factor)
        assert example.state.shot is not None and len(example.prompts) == 6 and example.prompts[1] == ""
        assert example.state.shot[0].max() == 0 and example.has_camera.shape == example.state.shot.shape
        for i in (1, 2):
            mine, told = example.prompts[2 * i : 2 * i + 2], batch.captions[i]
            assert (mine[0] == "") == (mine[1] == ""), "a clip has words, or it has none"
            silent.append(mine[0] == "")
            assert mine[0] == "" or (mine[0] in told[:6] and mine[1] in told[6:])
            shown += [bool(example.has_camera[i][example.state.shot[i] == k].all()) for k in (0, 1)]
            assert all(len(set(example.has_camera[i][example.state.shot[i] == k].tolist())) == 1 for k in (0, 1))
        assert example.rows(1).prompts == example.prompts[2:]
    assert 0.1 < sum(silent) / len(silent) < 0.5 and 0.3 < sum(shown) / len(shown) < 0.7
    plain = draw_example(how, cache.batch(Bucket("1:1", 13), [0, 1], 13), 0, model.config, vae.spatial_factor)
    assert plain.state.shot is None and len(plain.prompts) == 2 and plain.has_camera.ndim == 1


def test_a_share_that_cannot_be_learned_is_refused(cache: LatentCache) -> None:
    model = KlingTransformer3DModel(**TINY)
    check_shots(0.3, model, cache)
    with pytest.raises(UserError, match="from 0 to 1"):
        check_shots(1.5, model, cache)
    with pytest.raises(UserError, match="set cp_size 1"):
        check_shots(0.3, model, cache, split=2)
    cache.storyboards, kept = {}, cache.storyboards
    try:
        with pytest.raises(UserError, match="has no storyboards"):
            check_shots(0.3, model, cache)
    finally:
        cache.storyboards = kept


def test_the_decoder_s_tuning_sees_cuts() -> None:
    source = ClipSource(DataConfig(frames=[13], aspects=["16:9"]), seed=0)
    names = StepBatches(source, 8, cuts=0.5).names(0)
    of = [name.split("/")[2] == "shots" for name in names]
    assert any(of) and not all(of) and not any("shots" in name for name in StepBatches(source, 8).names(0))


# ---------------------------------------------------------------------------------------------------------------- real clips


def test_a_manifest_s_row_of_several_shots_has_its_cuts_where_latents_begin(tmp_path: Path) -> None:
    """Black for 11 frames, then white for 19: the last two of the first shot and the last three of the second are left out."""
    frames = np.zeros((30, 64, 112, 3), np.uint8)
    frames[11:] = 255
    write_video(tmp_path / "a.mp4", frames, 8)
    (tmp_path / "a.txt").write_text("black")
    (shot,) = open_manifest(tmp_path).shots
    told = replace(shot, captions=(Caption("black"), Caption("white"), Caption("白")), shots=((0.0, 1), (11 / 8, 2)))
    write_manifest(tmp_path / "m.jsonl", [told])
    clips = ClipSource(DataConfig(source=str(tmp_path / "m.jsonl"), frames=[9, 25], aspects=["16:9"])).manifest
    assert read_manifest(tmp_path / "m.jsonl").shots == [told]
    assert {bucket: len(pieces) for bucket, pieces in clips.buckets.items()} == {Bucket("16:9", 25): 1}
    sample = clips.clip(Bucket("16:9", 25), 0, epoch=3)
    assert sample.shots == [(0, 1), (3, 2)] and sample.captions == ["black", "white", "白"]
    bright = sample.video.float().mean((1, 2, 3))
    assert (bright[:9] < 40).all() and (bright[9:] > 215).all()
    assert clips.any(0, 9, "16:9").shots == [(0, 1)]
    plain = ClipSource(DataConfig(source=str(tmp_path), frames=[25], aspects=["16:9"])).manifest
    assert len(plain.identity(Bucket("16:9", 25), 0)) == 6, "rows of one shot are to a cache what they were"
    assert plain.clip(Bucket("16:9", 25), 0).shots is None
    for wrong, says in (
        ({"shots": ((1.0, 3),)}, "its start first"),
        ({"shots": ((0.0, 1), (9.0, 2))}, "rising times"),
        ({"shots": ((0.0, 1), (1.0, 1))}, "give each its own"),
        ({"camera": "a.json"}, "leave them out"),
    ):
        write_manifest(tmp_path / "wrong.jsonl", [replace(told, **wrong)])
        with pytest.raises(UserError, match=f"line 1: .*{says}"):
            read_manifest(tmp_path / "wrong.jsonl")
    short = replace(told, shots=((0.0, 1), (3.5, 2)))
    write_manifest(tmp_path / "short.jsonl", [short])
    with pytest.raises(UserError, match="too short for a latent frame"):
        ClipSource(DataConfig(source=str(tmp_path / "short.jsonl"), frames=[9], aspects=["16:9"]))


# ------------------------------------------------------------------------------------------------------------- the metrics


def test_cuts_are_found_where_they_are_and_nowhere_else() -> None:
    """Of rendered storyboards with moving cameras, and none in single clips, in a frozen one, or where a clip fades."""
    for index in range(3):
        board = Storyboards(seed=1, frames=25, aspect="16:9").storyboard(index)
        assert find_cuts(render_storyboard(board)) == list(board.cuts)
    world = World(1, 25, "16:9")
    assert not any(find_cuts(render_scene(world.scene(index))) for index in range(3))
    still = torch.randint(0, 256, (1, 64, 112, 3), dtype=torch.uint8).expand(5, -1, -1, -1)
    assert not find_cuts(still) and find_cuts(torch.cat([still, 255 - still])) == [5]
    fade = torch.linspace(0, 255, 9)[:, None, None, None].expand(9, 64, 112, 3).to(torch.uint8)
    assert not find_cuts(fade)


@pytest.mark.slow
def test_a_tiny_transformer_learns_that_each_shot_shows_its_own_word() -> None:
    """Clips whose shots are +1 or -1 as their word says, always one of each: from noise alone it also makes two alike."""
    torch.manual_seed(0)
    model = KlingTransformer3DModel(**TINY)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    words = torch.randn(2, 7, 12)  # (word, l, e)
    starts, draw = [[0, 2]], torch.Generator().manual_seed(0)

    def clips(pairs: list[tuple[int, int]]) -> tuple[State, Tensor]:
        """Their state and the words of their shots (b · 2, l, e)."""
        value = torch.tensor(pairs, dtype=torch.float32)[:, [0, 0, 1, 1, 1]] * 2 - 1  # (b, F)
        clean = value[:, None, :, None, None].expand(-1, C, -1, HH, WW).contiguous()
        return build_state([Given()] * len(pairs), clean, None, shots=starts * len(pairs)), words[torch.tensor(pairs).flatten()]

    state, text = clips([(0, 1), (1, 0)] * 4)
    for _ in range(150):
        sigma, noise = torch.rand(8, generator=draw), torch.randn(state.clean.shape, generator=draw)
        v = model(state.noised(sigma, noise), sigma, text, positions=state.position, shots=state.shot).sample
        (v - (noise - state.clean)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    asked, text = clips([(0, 1), (1, 0), (0, 0), (1, 1)])
    noise = torch.randn(asked.clean.shape, generator=draw)
    with torch.no_grad():
        made = noise - model(noise, torch.ones(4), text, positions=asked.position, shots=asked.shot).sample  # x̂₀ at σ = 1
    right = (made.mean((1, 3, 4)).sign() == asked.clean.mean((1, 3, 4))).float()  # (b, F)
    assert right.mean() == 1
