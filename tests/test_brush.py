"""The motion brush as users give it: options, files, Python, Kling's wire; where it lands on the clip, over hops, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kling import KlingFlowScheduler, KlingPipeline, Request, Track
from kling.condition.tracks import codes
from kling.config import load_config
from kling.data.image import write_png
from kling.data.transforms import fit
from kling.errors import UserError
from kling.sampling.brush import as_tracks, parse_brush, read_strokes, read_tracks, stroke_tracks
from kling.sampling.brush_http import tracks_from_wire, tracks_to_wire
from kling.sampling.inputs import Inputs
from kling.sampling.pipeline import ASSETS
from kling.sampling.plan import hop_tracks, plan_tracks
from kling.training.start import Start
from tests.test_pipeline import movie, picture, tiny_pipeline

H, W = 64, 112


def spot(h: int, w: int, x: int, y: int, r: int = 2) -> np.ndarray:
    """A mask (h, w) with a white square around pixel (x, y)."""
    mask = np.zeros((h, w), np.uint8)
    mask[y - r : y + r + 1, x - r : x + r + 1] = 255
    return mask


def test_all_ways_to_write_tracks_mean_the_same(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.repeat(spot(90, 160, 80, 40)[..., None], 3, 2))
    mask = str(tmp_path / "a.png")
    expected = [Track(mask, ((80.0, 40.0), (120.0, 40.5))), Track(None, ((10.0, 20.0),)), Track(mask, ())]
    rows = [{"mask": "a.png", "points": [[80, 40], [120, 40.5]]}, {"mask": None, "points": [[10, 20]]}, {"mask": "a.png", "points": []}]
    (tmp_path / "t.json").write_text(json.dumps({"tracks": rows}))
    given = [(Path(mask), [(80, 40), np.array([120, 40.5])]), {"points": torch.tensor([[10, 20]])}, Track(mask)]
    assert read_tracks(tmp_path / "t.json") == as_tracks(given) == expected
    assert [parse_brush(f"{mask}:80,40;120,40.5"), parse_brush("10,20"), Track(mask, ())] == expected
    request = Request("a", tracks=tmp_path / "t.json")
    assert request.tracks == str(tmp_path / "t.json") and Request("a", tracks=[]).tracks is None
    assert Request("a", tracks=Track(None, [(1, 2)])).tracks == [Track(None, ((1.0, 2.0),))]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ('{"tracks": []}', "t.json: give"),
        ('[{"points": [[1, 2]]}]', "t.json: give"),
        ('{"tracks": [{"points": [[1, 2]], "mask": 3}]}', "mask 3: give the name"),
        ('{"tracks": [{"point": [[1, 2]]}]}', "'point': its keys are mask and points"),
        ('{"tracks": [{"points": [[1, 2, 3]]}]}', "give \\(x, y\\)"),
        ('{"tracks": [{"points": [1, 2]}]}', "give \\(x, y\\)"),
        ('{"tracks": [{"points": [[1, NaN]]}]}', "give"),
        ('{"tracks": [{"points": [[1' + "0" * 400 + ", 2]]}]}", "give"),
        ('{"tracks": [{"points": [[1, 2]], "points": [[3, 4]]}]}', "give"),
        ('{"tracks": [{}]}', "neither a mask nor points"),
        (json.dumps({"tracks": [{"points": [[1, 2]]}] * 17}), "17 tracks were given: give at most 16"),
        ("a picture", "t.json: give"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path: Path, text: str, refused: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match=refused) as error:
        read_tracks(tmp_path / "t.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "a.png", "a.png:", "a.png:1", ":1,2", "1,2;3", "a.png:1,2,3", "a.png:x,y"])
def test_mistakes_in_an_option_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match="write it as MASK.png:x,y;x,y"):
        parse_brush(text)


@pytest.mark.parametrize(("h", "w"), [(90, 160), (200, 200), (64, 112), (480, 300), (30, 60)])
def test_a_stroke_starts_where_the_picture_s_pixel_lands(h: int, w: int) -> None:
    """Against the picture itself: the place of a white spot after the picture was fitted to the clip."""
    x, y = round(0.45 * w), round(0.55 * h)
    white = fit(spot(h, w, x, y, r=max(2, h // 30)).astype(np.float32), H, W)  # (H, W)
    rows, columns = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    landed = torch.stack([(white * columns).sum() / W, (white * rows).sum() / H]) / white.sum()
    (stroke,) = read_strokes([Track(None, [(x, y)])], (H, W), (h, w), 8)
    torch.testing.assert_close(stroke.start[0], landed, atol=0.004, rtol=0)
    (masked,) = read_strokes([Track(spot(h, w, x, y, r=max(3, h // 30)), [(0, 0), (10, 0)])], (H, W), (h, w), 8)
    assert (masked.start[0] - landed).abs().max() < 0.75 / H, "the middle of the mask, wherever the path is drawn"
    scale = max(H / h, W / w)
    torch.testing.assert_close(masked.moved, torch.tensor([[0, 0], [10 * scale / W, 0]]), atol=0.002, rtol=0)


def test_many_points_are_under_a_large_mask_and_none_beside_it() -> None:
    mask = np.zeros((H, W), np.float32)
    mask[16:48, 24:100] = 1
    moving, resting = read_strokes([Track(mask, [(0, 0), (5, 5)]), Track(mask)], (H, W), None, 8)
    assert len(moving.start) == 8 and len(resting.start) == 4 * 9 + 1 and (moving.thing, resting.thing) == (True, False)
    for stroke in (moving, resting):
        x, y = (stroke.start * torch.tensor([W, H])).unbind(1)
        assert bool(((x > 24) & (x < 100) & (y > 16) & (y < 48)).all())


def test_points_of_a_path_are_spread_evenly_over_the_clip() -> None:
    strokes = read_strokes([Track(None, [(0, 0), (10, 0), (10, 20)]), Track(None, [(5, 5)])], (H, W), None, 8)
    tracks = stroke_tracks(strokes, 9)
    pixels = tracks.points * torch.tensor([W, H]) - 0.5
    assert pixels[0, [0, 2, 4, 6, 8]].round().tolist() == [[0, 0], [5, 0], [10, 0], [10, 10], [10, 20]]
    assert (tracks.points[1] == tracks.points[1, 0]).all() and tracks.code.tolist() == [1, 2] and tracks.there.all()


# ---------------------------------------------------------------------------------------------------------------- the pipeline


def brushed_pipeline(**settings) -> KlingPipeline:
    able = ["text", "image", "first_last", "continuation", "camera", "text_to_image", "brush"]
    return tiny_pipeline(**{"capabilities": able} | settings)


@pytest.fixture(scope="module")
def pipe() -> KlingPipeline:
    return brushed_pipeline()


RIGHT, LEFT = [Track(None, [(40, 30), (90, 30)])], [Track(None, [(40, 30), (10, 30)])]


@pytest.mark.parametrize(
    "given",
    [{}, {"image": picture(1, H, W)}, {"image": picture(1, H, W), "last_image": picture(2, H, W), "camera": "pan=5"},
     {"video": movie(9)}, {"image": picture(1, H, W), "extend_to": 4.0, "duration": None}],
    ids=["text", "image", "first, last and camera", "continuation", "hops"],
)  # fmt: skip
def test_tracks_go_with_everything(pipe: KlingPipeline, given: dict) -> None:
    """They change the frames, by where they lead, and only frames that are made."""
    request = Request("a ball", num_inference_steps=1, seed=1, **{"num_frames": None if "extend_to" in given else 9} | given)
    plain, right, left = (pipe(request, tracks=tracks).frames[0] for tracks in (None, RIGHT, LEFT))
    kept = 9 if "video" in given else 0
    assert len({frames[kept:].tobytes() for frames in (plain, right, left)}) == 3
    assert np.array_equal(plain[:kept], right[:kept]) and plain.shape == right.shape
    assert np.array_equal(right, pipe(request, tracks=[{"mask": None, "points": [(40, 30), (90, 30)]}]).frames[0])


def test_guidance_on_the_tracks_costs_a_pass_and_changes_the_frames(pipe: KlingPipeline, monkeypatch) -> None:
    request, calls = Request("a ball", num_inference_steps=1, seed=1, num_frames=5, tracks=RIGHT, image=picture(1, H, W)), []
    forward = type(pipe.transformer).forward
    counted = lambda self, *a, tracks=None, **k: calls.append(tracks is not None) or forward(self, *a, tracks=tracks, **k)  # noqa: E731
    monkeypatch.setattr(type(pipe.transformer), "forward", counted)
    plain, passes = pipe(request).frames, list(calls)
    calls.clear()
    guided = pipe(request, brush_guidance_scale=3.0).frames
    assert all(passes) and len(calls) == len(passes) + 1 and calls.count(False) == 1 and not np.array_equal(plain, guided)
    assert pipe.plan(request.replace(tracks=None)).brush_guidance_scale == 1
    with pytest.raises(UserError, match="without tracks to follow"):
        request.replace(tracks=None, brush_guidance_scale=2.0)


def test_a_loop_makes_its_first_frame_without_the_brush_and_copies_what_lies_there(pipe: KlingPipeline) -> None:
    """The still is that of `num_frames=1` with the same seed, so the clip is the loop that begins with that picture."""
    request = Request("a ball", num_inference_steps=1, seed=1, num_frames=9, loop=True, tracks=RIGHT, brush_guidance_scale=2.0)
    frames, plain = pipe(request).frames[0], pipe(request.replace(tracks=None, brush_guidance_scale=None)).frames[0]
    still = pipe("a ball", num_inference_steps=1, seed=1, num_frames=1).frames[0, 0]
    assert np.array_equal(frames, pipe(request, image=still).frames[0]) and not np.array_equal(frames, plain)


def test_weights_that_go_block_by_block_have_no_pass_without_tracks() -> None:
    """Also where their scheduler asks for one."""
    pipe = brushed_pipeline(block_frames=1)
    pipe.register_modules(scheduler=KlingFlowScheduler(num_inference_steps=1, brush_guidance_scale=4.0))
    request = Request("a ball", num_frames=5, seed=1, tracks=RIGHT)
    assert pipe.plan(request).brush_guidance_scale == 1
    frames = [pipe(request, tracks=tracks).frames for tracks in (RIGHT, LEFT)]
    assert not np.array_equal(*frames)


def test_a_hop_takes_its_part_of_the_path(pipe: KlingPipeline) -> None:
    """In frames of the whole video: what each hop makes lies on the one path, and a given video has none."""
    for given, there in (({"image": picture(1, H, W)}, 0), ({"video": movie(9)}, 8)):
        plan = pipe.plan(Request("a", extend_to=5.0, **given))
        inputs = Inputs(H, W, strokes=read_strokes(RIGHT, (H, W), None, 8))
        whole, origin = plan_tracks(inputs, plan.hops), plan.hops[0].start
        assert len(plan.hops) > 2
        for hop in plan.hops:
            part = hop_tracks(whole, hop, origin)
            x = part.points[0, :, 0] * W - 0.5
            asked = [40 + 50 * max(0, hop.start + t - there) / (plan.frames - 1 - there) for t in range(hop.frames)]
            assert x.tolist() == pytest.approx(asked, abs=1e-3)
            assert part.there[0].tolist() == [t >= hop.overlap - 1 for t in range(hop.frames)]


def test_without_a_first_frame_the_second_track_is_of_the_second_thing(pipe: KlingPipeline, monkeypatch) -> None:
    states = []
    monkeypatch.setattr("kling.sampling.pipeline.Sampler.__call__", lambda self, state, *_: states.append(state) or iter(()))
    with pytest.raises(UnboundLocalError):
        pipe("a ball and a cube", num_frames=5, tracks=[Track(None, [(20.5, 28)]), Track(spot(H, W, 84, 28)), Track(None, [(60, 28)])])
    maps = states[0].tracks[0]
    found = {float(maps[4, 0, 3, j]): maps[:4, 0, 3, j] / -maps[4, 0, 3, j] for j in range(14) if maps[4, 0, 3, j] < -0.2}
    rows = [row.round().tolist() for row in found.values()]
    assert codes(torch.tensor([1]), 4)[0].tolist() in rows and codes(torch.tensor([2]), 4)[0].tolist() in rows and [1.0] * 4 in rows


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"num_frames": 1}, "tracks .* single picture"),
        ({"video": movie(5), "strength": 0.5}, "both strength and tracks"),
        ({"image": picture(), "tracks": [Track(None, [(160, 20)])]}, "starts at 160,20, outside the first frame of 160x90"),
        ({"image": picture(h=160, w=90), "aspect": "16:9", "tracks": [Track(None, [(20, 2)])]}, "after its crop"),
        ({"image": picture(), "tracks": [Track(spot(90, 90, 40, 40), [(1, 1)])]}, "mask is 90x90 and the first frame 160x90"),
        ({"tracks": [Track(np.zeros((H, W)), [(1, 1)])]}, "no white area"),
        ({"tracks": [Track(np.zeros((H, W, 3)), [(1, 1)])]}, "give \\(H, W\\)"),
        ({"tracks": [Track("absent.png", [(1, 1)])]}, "absent.png does not exist"),
        ({"tracks": "absent.json"}, "absent.json does not exist"),
        ({"tracks": 3}, "tracks of type int"),
        ({"tracks": [3]}, "a track is of type int"),
        ({"tracks": [Track(None, "ab")]}, "give a list of"),
    ],
)
def test_what_cannot_be_is_refused(pipe: KlingPipeline, given: dict, refused: str) -> None:
    with pytest.raises(UserError, match=refused) as error:
        pipe.plan(Request(**{"tracks": RIGHT, **({} if "video" in given else {"num_frames": 5})} | given))
    assert "\n" not in str(error.value)


def test_a_model_without_the_capability_refuses_tracks() -> None:
    with pytest.raises(UserError, match="not trained for 'brush'"):
        tiny_pipeline(capabilities=["text", "camera"]).plan(Request("a", tracks=RIGHT, num_frames=5))


# ------------------------------------------------------------------------------------------------------------------ Kling's wire


def test_kling_s_wire_counts_from_the_bottom_left() -> None:
    mask = spot(90, 160, 30, 70)
    body = tracks_to_wire([Track(mask, [(30, 70), (50, 0)]), Track(spot(90, 160, 9, 9))], 90)
    assert body["dynamic_masks"][0]["trajectories"] == [{"x": 30, "y": 19}, {"x": 50, "y": 89}]
    moving, resting = tracks_from_wire(json.loads(json.dumps(body)), 90)
    assert moving.points == ((30.0, 70.0), (50.0, 0.0)) and np.array_equal(moving.mask, mask)
    assert resting.points == () and np.array_equal(resting.mask, spot(90, 160, 9, 9))
    assert tracks_from_wire({"model_name": "kling-v1"}, 90) == []


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"dynamic_masks": [{}] * 7}, "7 masks: give at most 6"),
        ({"dynamic_masks": [{"mask": "x", "trajectories": [{"x": 1, "y": 1}]}]}, "1 trajectories points: give 2 to 77"),
        ({"dynamic_masks": [{"mask": "x", "trajectories": [{"x": 1, "y": 1}] * 2}]}, "mask is no picture in base64"),
        ({"static_mask": "https://a.b/c.png"}, "static_mask is an address"),
        ({"dynamic_masks": "x"}, "give a list"),
    ],
)
def test_kling_s_wire_has_limits(change: dict, refused: str) -> None:
    with pytest.raises(UserError, match=refused):
        tracks_from_wire(change, 90)


def test_what_kling_s_wire_cannot_carry_is_refused() -> None:
    mask = spot(90, 160, 30, 70)
    for tracks, refused in (
        (RIGHT, "without a mask"),
        ([Track(mask, [(1, 1), (2, 2)])] * 7, "7 moving"),
        ([Track(mask)] * 2, "2 static"),
        ([Track(mask, [(1, 1)])], "1 points"),
    ):
        with pytest.raises(UserError, match=refused):
            tracks_to_wire(tracks, 90)


@pytest.mark.parametrize("preset", ["world-brush", "world-controls"])
def test_a_model_that_gains_the_brush_gets_the_shipped_guidance(preset: str) -> None:
    """As from weights without it, such as those of kling-train-all, whose scheduler has 1."""
    from kling_programs.train.train_dit import TrainDiTConfig

    cfg = load_config(TrainDiTConfig, f"dit/{preset}.yaml")
    shipped = json.loads((ASSETS / "scheduler" / "scheduler_config.json").read_text())
    scheduler = Start(ASSETS, {"scheduler": KlingFlowScheduler(shift=5.0)}, "").scheduler(cfg.scheduler)
    assert scheduler.config.brush_guidance_scale == shipped["brush_guidance_scale"] == 4
    assert scheduler.config.guidance_scale == shipped["guidance_scale"], "what the base preset sets is kept"
