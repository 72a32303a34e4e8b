"""Arrows on the page: how they become tracks, what is refused, and how a record's tracks become arrows again."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from kling_programs.sample.studio import views
from kling_programs.sample.studio.form import FIELDS, request_of
from kling_programs.sample.studio.restore import fields_of
from kling_programs.sample.studio.uploads import Uploads

from kling import Track
from kling.data.image import write_png
from kling.errors import UserError
from kling.sampling.brush import MOST

ARROW = {"points": [[0.5, 0.5], [0.75, 0.25]]}


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    (tmp_path / "arrivals").mkdir()
    return Uploads(tmp_path / "arrivals", tmp_path / "store")


def upload(uploads: Uploads, name: str, h: int, w: int) -> dict[str, str]:
    write_png(uploads.arrivals / name, np.zeros((h, w, 3), np.uint8))
    return {"path": str(uploads.arrivals / name)}


def test_arrows_are_tracks_in_pixels_of_the_first_frame(uploads: Uploads) -> None:
    picture = upload(uploads, "a.png", 90, 160)
    request = request_of({"prompt": "a ball", "image": picture, "tracks": [ARROW, {"points": [[0.1, 0.1]]}]}, uploads)
    assert request.tracks == [Track(None, ((79.5, 44.5), (119.5, 22.0))), Track(None, ((15.5, 8.5),))]
    clip = request_of({"prompt": "a ball", "aspect": "1:1", "tracks": [ARROW]}, uploads)
    assert clip.tracks == [Track(None, ((39.5, 39.5), (59.5, 19.5)))], "without a first frame in pixels of the clip"
    masked = request_of({"image": picture, "tracks": [ARROW | {"mask": upload(uploads, "m.png", 90, 160)}]}, uploads)
    assert Path(masked.tracks[0].mask).parent == uploads.store
    assert request_of({"prompt": "a ball", "tracks": []}, uploads).tracks is None


@pytest.mark.parametrize(
    ("tracks", "refused"),
    [
        ("x", "give a list"),
        ([1], "give a list"),
        ([ARROW] * (MOST + 1), f"at most {MOST}"),
        ([{}], "each needs a mask, or 1 to"),
        ([{"points": [[1]]}], "each needs a mask, or 1 to"),
        ([{"points": [["a", 1]]}], "is not a number"),
        ([{"points": [[9, 1]]}], "number from -2 to 3"),
        ([{"points": [[0.1, 0.1]] * 201}], "each needs a mask, or 1 to"),
        ([ARROW | {"mask": {"path": "/etc/passwd"}}], "not uploaded here"),
    ],
)
def test_what_is_no_arrow_is_refused(uploads: Uploads, tracks: object, refused: str) -> None:
    with pytest.raises(UserError, match=refused) as error:
        request_of({"prompt": "a ball", "tracks": tracks}, uploads)
    assert "\n" not in str(error.value)


def test_tracks_of_a_record_are_arrows_again(uploads: Uploads) -> None:
    studio = SimpleNamespace(uploads=uploads, pipe=SimpleNamespace(config=SimpleNamespace(fps=8.0)), weights_from=lambda record: None)
    asked = {"prompt": "a ball", "aspect": "1:1", "keyframes": [], "tracks": [{"mask": None, "points": [[39.5, 39.5], [59.5, 19.5]]}]}
    fields, remarks = fields_of({"request": asked, "inputs": {}}, studio)
    assert fields["tracks"] == [ARROW] and request_of({k: v for k, v in fields.items() if k in FIELDS}, uploads).tracks
    masked = asked | {"tracks": [{"mask": "/x/m.png", "points": [[1, 1]]}]}
    _, remarks = fields_of({"request": masked, "inputs": {}}, studio)
    assert ("elsewhere", {"names": "tracks"}) in remarks, "the page cannot show masks of tracks, and says so"


def test_the_board_has_the_picture_s_shape() -> None:
    board = views.board((64, 112), np.zeros((64, 112, 3), np.uint8))
    assert 'viewBox="0 0 112 64"' in board and "<img" in board and 'class="arrows"' in board and "blank" not in board
    assert "<img" not in views.board((80, 80), None) and "blank" in views.board((80, 80), None)


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine")
def test_arrows_are_drawn_stretched_moved_and_removed() -> None:
    """page.js with a pretended page: what a pointer does, and what the form then sends."""
    done = subprocess.run(["node", str(Path(__file__).parent / "data" / "arrows.js")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
