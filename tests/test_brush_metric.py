"""The measurement of the motion brush on rendered truth: a clip that does as asked scores all, one that stands still nothing."""

from __future__ import annotations

import pytest
import torch
from kling_programs.eval.cases import TRAVELS, brush_case, held_out
from kling_programs.eval.world import brush_tracks

from kling.data.world.scene import COLOUR_RGB, render_scene
from kling.data.world.tracks import places_of
from kling.metrics.brush import LOST, follows, thing_places
from kling.metrics.controls import frozen
from kling.sampling.brush import read_strokes, stroke_tracks

WORLD = held_out(0, 17)
SIZE = torch.tensor([112, 64])


@pytest.mark.parametrize("moving", [False, True], ids=["static camera", "moving camera"])
def test_truth_is_followed_and_a_still_picture_is_not(moving: bool) -> None:
    rows = {"truth": [], "frozen": []}
    for k in range(6):
        case = brush_case(WORLD, k, moving=moving)
        first, other = case.scene.things
        places, truth = places_of(case.scene), render_scene(case.scene)
        asked, height = places.centre[0] * SIZE, 2 * places.half[0, :, 1] * 64
        for name, video in (("truth", truth), ("frozen", frozen(truth))):
            rows[name].append(follows(video, COLOUR_RGB, first.colour, asked, height))
        assert (asked[-1] - asked[0]).norm() >= TRAVELS * height.max() and bool(case.scene.axes) == moving
        assert first.motion == "" and other.motion and other.colour != first.colour
        plain = brush_case(WORLD, k, brushed=False, moving=moving)
        assert {**plain.request, "tracks": "tracked"} == case.request, "only the brush differs"

        (track,) = brush_tracks(case.scene, truth)
        (stroke,) = read_strokes([track], (64, 112), None, 8)
        made = stroke_tracks([stroke], 17).points[0] * SIZE  # the middle of the mask, moved
        assert ((made - asked).norm(dim=1) / height).max() < 0.25, "what a user would give leads along the path"
    assert all(row["near"] and row["distance"] < 0.2 for row in rows["truth"])
    assert not any(row["near"] for row in rows["frozen"]) and min(row["distance"] for row in rows["frozen"]) > 0.4


def test_a_thing_that_is_not_there_is_far_from_its_path() -> None:
    video = torch.full((5, 64, 112, 3), 128, dtype=torch.uint8)
    asked = torch.full((5, 2), 30.0)
    assert follows(video, COLOUR_RGB, "red", asked, torch.full((5,), 20.0)) == {"near": False, "distance": LOST}
    video[:, 20:40, 40:60] = torch.tensor([214, 25, 25], dtype=torch.uint8)
    assert torch.allclose(thing_places(video, COLOUR_RGB, "red"), torch.tensor([50.0, 30.0]), atol=0.6)
    row = follows(video, COLOUR_RGB, "red", asked, torch.full((5,), 40.0))
    assert row["near"] and row["distance"] == pytest.approx(0.5, abs=0.02)
