"""A folder of videos as a dataset."""

from __future__ import annotations

import json

import pytest
import torch

from kling.data.folder import VideoFolder
from kling.data.video import read_video, write_video
from kling.errors import UserError
from tests.test_video import smooth

SIZE = (32, 32)


@pytest.fixture
def root(tmp_path):
    """Two videos in two folders, one caption file of each kind, and things to pass over."""
    for name, n, caption in (
        ("dogs/b 犬", 25, "one dog\n\ntwo dogs\n"),
        ("cats/a", 12, json.dumps({"caption": "a cat", "captions": ["猫"]})),
    ):
        path = tmp_path / f"{name}.mp4"
        write_video(path, smooth(n), 8)
        path.with_suffix(".json" if caption.startswith("{") else ".txt").write_text(caption, encoding="utf-8")
    (tmp_path / "cats" / "._a.mp4").write_bytes(b"a Mac was here")
    (tmp_path / "notes.md").write_text("mine")
    return tmp_path


def test_clips_in_order(root):
    data = VideoFolder(root, frames=9, fps=8, size=SIZE)
    assert [data.item(i).source for i in range(len(data))] == ["cats/a.mp4@0.000", "dogs/b 犬.mp4@0.000", "dogs/b 犬.mp4@1.125"]
    assert data[0].captions == ["a cat", "猫"] and data[2].captions == ["one dog", "two dogs"]
    whole = read_video(root / "dogs" / "b 犬.mp4", fps=8, size=SIZE).frames
    assert torch.equal(data[2].video, whole[9:18]) and data[2].video.shape == (9, *SIZE, 3)
    assert "3 clips of 9 frames from 2 videos" in data.report()


def test_an_item_depends_on_its_index_alone(root):
    data = VideoFolder(root, frames=5, fps=8, size=SIZE)
    last = data.item(len(data) - 1).video
    data.item(0)
    assert torch.equal(last, data.item(len(data) - 1).video)
    with pytest.raises(IndexError):
        data.item(len(data))


def test_bad_files_are_named_and_counted(root):
    (root / "x.mp4").write_text("words")
    write_video(root / "short.mp4", smooth(4), 8)
    with pytest.raises(UserError, match=r"2 unusable .*short.mp4 is 0.50 s long.*x.mp4 is not a video.*skip_bad") as error:
        VideoFolder(root, frames=9, fps=8, size=SIZE)
    assert "\n" not in str(error.value)
    data = VideoFolder(root, frames=9, fps=8, size=SIZE, skip_bad=True)
    assert len(data) == 3 and [path.name for path, _ in data.bad] == ["short.mp4", "x.mp4"] and "2 unusable" in data.report()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (None, "", "has no caption"),
        ("c.txt", " \n", "holds no caption"),
        ("c.json", "{", "not JSON"),
        ("c.json", '{"caption": 3}', "must be text"),
        ("c.json", '["a cat"]', "must be text"),
        ("c.json", "{}", "holds no caption"),
        ("c.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_captions(tmp_path, name, text, says):
    write_video(tmp_path / "c.mp4", smooth(5), 8)
    if name:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=says):
        VideoFolder(tmp_path, frames=5, fps=8, size=SIZE)
    if not name:
        assert VideoFolder(tmp_path, frames=5, fps=8, size=SIZE, unconditional=True)[0].captions == [""]


def test_two_caption_files_are_one_too_many(root):
    (root / "cats" / "a.txt").write_text("another cat")
    with pytest.raises(UserError, match="both a.txt and a.json"):
        VideoFolder(root, frames=9, fps=8, size=SIZE)


def test_requests_are_checked(root, tmp_path):
    for wrong in (dict(frames=8), dict(size=(0, 8)), dict(fps=0)):
        with pytest.raises(UserError):
            VideoFolder(root, **({"frames": 9, "fps": 8, "size": SIZE} | wrong))
    (tmp_path / "empty").mkdir()
    for folder, says in (("empty", "0 videos"), ("none", "not a folder"), ("notes.md", "not a folder")):
        with pytest.raises(UserError, match=says):
            VideoFolder(tmp_path / folder, frames=9, fps=8, size=SIZE)


def test_links_are_followed_once(root):
    (root / "cats" / "up").symlink_to(root)
    assert len(VideoFolder(root, frames=9, fps=8, size=SIZE)) == 3
