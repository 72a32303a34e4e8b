"""The words of a training clip beside its camera: which caption is used, and whether the camera signal is given."""

from __future__ import annotations

import random

import pytest

from kling.cameras.axes import axes_trajectory
from kling.cameras.trajectory import Trajectory
from kling.data.world.scene import FOCAL
from kling.training.examples import Drawing, draw_words

PLAIN, SAID = "a red ball rolls left", "a red ball rolls left, the camera pans right"
DRAWS = 200


def path(**axes: float) -> Trajectory:
    return axes_trajectory(axes, 17, 64, 112, FOCAL)


def drawn(camera: Trajectory | None, camera_drop: float, text_drop: float = 0.0, captions: tuple[str, ...] = (PLAIN, SAID)) -> list:
    """(prompt, camera signal given) of many clips, whose caption about the camera is one in four."""
    how = Drawing(0, {"text": 1.0}, text_drop, camera_drop)
    return [draw_words(random.Random(f"words/{i}"), how, captions, (3.0, 1.0), camera) for i in range(DRAWS)]


def share(draws: list, what: str) -> float:
    return sum(prompt == what for prompt, _ in draws) / len(draws)


@pytest.mark.parametrize("axes", [{"pan": 5.0}, {"zoom": 3.0}, {"horizontal": -4.0}])
def test_a_moving_camera_without_its_signal_is_said_nine_times_in_ten(axes: dict[str, float]) -> None:
    """And one of the other tenth in four: 92.5 % of the clips, of which 25 % would say it by chance."""
    draws = drawn(path(**axes), camera_drop=1.0)
    assert share(draws, SAID) == pytest.approx(0.925, abs=0.06) and not any(shown for _, shown in draws)


def test_where_a_signal_shows_the_camera_or_none_moves_words_are_as_often_as_their_weights() -> None:
    for camera, camera_drop, shown in ((path(pan=5.0), 0.0, True), (path(), 1.0, False), (None, 0.0, False)):
        draws = drawn(camera, camera_drop)
        assert share(draws, SAID) == pytest.approx(0.25, abs=0.08) and {given for _, given in draws} == {shown}
    assert {prompt for prompt, _ in drawn(path(pan=5.0), 1.0, captions=(PLAIN, PLAIN))} == {PLAIN}, "no caption says it"


def test_prompts_that_do_not_mention_the_camera_come_from_clips_whose_camera_stands_still() -> None:
    still, moving = drawn(path(), 1.0), drawn(path(pan=5.0), 1.0)
    silent = share(still, PLAIN) / (share(still, PLAIN) + share(moving, PLAIN))
    assert silent > 0.85


def test_signal_and_text_are_left_out_as_often_as_asked_for_guidance() -> None:
    draws = drawn(path(pan=5.0), camera_drop=0.4, text_drop=0.3)
    assert sum(shown for _, shown in draws) / DRAWS == pytest.approx(0.6, abs=0.1) and share(draws, "") == pytest.approx(0.3, abs=0.1)
    told = [prompt for prompt, shown in draws if not shown and prompt]
    assert told.count(SAID) / len(told) > 0.8, "those without the signal"
