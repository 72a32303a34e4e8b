"""The scan: every synthetic file is judged correctly, whatever its name; nothing hangs, crashes or is examined twice."""

from __future__ import annotations

import json
import os
import sys
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from kling.data.decode import probe
from kling.data.manifest import quarantine_of, read_manifest, read_quarantine
from kling.data.scan import scan as scanning
from kling.data.scan.filters import Filters
from kling.data.scan.listing import Listing
from kling.data.scan.measure import ShotMeter
from kling.data.scan.scan import Summary, scan
from kling.data.video import read_video, write_video
from kling.errors import UserError
from tests.corpus import CORPUS, NOISE, make_corpus
from tests.test_video import make

sys.path[:0] = [str(Path(__file__).parents[1] / "train")]
import data as program  # noqa: E402


def look(folder: Path, out: Path, listing: Listing | None = None, **kwargs) -> Summary:
    return list(scan((listing or Listing()).find([folder]), out, **kwargs))[-1]


def times_of(clock) -> list[float]:  # noqa: ANN001 - (first, ((step, how often), ...))
    times = [clock[0]]
    for step, count in clock[1]:
        times += [times[-1] + step * (i + 1) for i in range(count)]
    return times


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    (folder / "plain.txt").write_text("a grey picture\n灰色的画面\n", encoding="utf-8")
    (folder / "notes.md").write_text("mine")
    return folder


@pytest.fixture(scope="module")
def scanned(corpus) -> Path:
    out = corpus.parent / "out" / "manifest.jsonl"
    look(corpus, out, workers=2)
    return out


def test_every_file_of_the_corpus_is_judged_correctly(corpus, scanned):
    good = {Path(shot.path).name for shot in read_manifest(scanned).shots}
    bad = {Path(one.path).name: one.reason for one in read_quarantine(quarantine_of(scanned))}
    assert len(CORPUS) >= 18
    assert {name: "" for name in good} | bad == {name: reason for name, (_, reason) in CORPUS.items()}


def test_scanned_facts_are_correct(corpus, scanned):
    shots = {Path(shot.path).name: shot for shot in read_manifest(scanned).shots}
    assert shots["vfr.mkv"].video.vfr and not shots["plain.mp4"].video.vfr
    assert times_of(shots["vfr.mkv"].clock) == pytest.approx([t / 120 for t in (0, 10, 20, 30, 60, 90, 120, 125, 130, 240)], abs=2e-3)
    assert times_of(shots["plain.mp4"].clock) == pytest.approx([i / 12 for i in range(24)], abs=1e-6)
    assert (shots["rotated.mov"].video.width, shots["rotated.mov"].video.height) == (48, 64)
    assert shots["wide pixels.mp4"].video.pixel_aspect == 1.5 and shots["wide pixels.mp4"].video.width == 96
    assert [shots[f"{name}.mp4"].video.pix_fmt for name in ("444", "10bit")] == ["yuv444p", "yuv420p10le"]
    assert (shots["hevc.mp4"].video.codec, shots["one frame.mp4"].video.frames) == ("hevc", 1)
    assert shots["a picture.mp4"].is_image and [c.language for c in shots["plain.mp4"].captions] == ["en", "zh"]
    assert all(len(shot.sha256) == 64 and shot.measures["hashes"] for shot in shots.values())


def test_a_second_scan_examines_only_changed_files(corpus, scanned, monkeypatch):
    before = scanned.read_bytes()
    monkeypatch.setattr(scanning, "run_jobs", lambda jobs, workers: pytest.fail("examined again") if jobs else iter(()))
    assert look(corpus, scanned).reused == len(CORPUS) and scanned.read_bytes() == before
    monkeypatch.undo()
    os.utime(corpus / "plain.mp4", ns=(1, 1))
    manifest = read_manifest(scanned)
    with pytest.raises(UserError, match="has changed since it was scanned"):
        manifest.check(next(shot for shot in manifest.shots if shot.path.endswith("/plain.mp4")))
    assert look(corpus, scanned).reused == len(CORPUS) - 1


def test_a_killed_scan_resumes(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(4):
        make(tmp_path / "in" / f"{i}.mp4", n=4)
    out = tmp_path / "manifest.jsonl"
    steps = scan(Listing().find([tmp_path / "in"]), out)
    for done, _ in steps:
        if done == 2:
            break
    steps.close()
    with out.with_suffix(".scan.jsonl").open("a") as file:
        file.write('{"key": "cut off in the mid')
    assert not out.exists() and look(tmp_path / "in", out).reused == 2 and len(read_manifest(out)) == 4


def test_a_hanging_or_crashing_decoder_loses_only_its_file(tmp_path, monkeypatch):
    for name in ("a good", "b hangs", "c dies", "d good"):
        make(tmp_path / f"{name}.mp4", n=4)
    real = scanning.examine

    def examine(source, path, **kwargs):
        if "hangs" in Path(path).name:
            time.sleep(60)
        if "dies" in Path(path).name:
            os._exit(9)
        return real(source, path, **kwargs)

    monkeypatch.setattr(scanning, "examine", examine)  # forked workers inherit it
    monkeypatch.setattr(scanning, "GRACE", 0.5)
    out = tmp_path / "out" / "manifest.jsonl"
    summary = look(tmp_path, out, workers=1, per_minute=2.0)
    assert summary.bad == {"too slow": 1, "crashed the decoder": 1} and summary.clips == 2
    monkeypatch.setattr(scanning, "examine", real)
    assert look(tmp_path, out).clips == 4  # both get another chance


def test_the_deadline_is_kept(tmp_path):
    make(tmp_path / "a.mp4", n=24)
    summary = look(tmp_path, tmp_path / "out" / "manifest.jsonl", per_minute=1e-6)
    assert summary.bad == {"too slow": 1}


def test_tables_name_files_captions_and_stretches(tmp_path):
    (tmp_path / "videos").mkdir()
    make(tmp_path / "videos" / "a.mp4", n=36)
    (tmp_path / "openvid.csv").write_text('video,caption,fps\na.mp4,"a grey, brightening picture",12\n', encoding="utf-8")
    (tmp_path / "koala.csv").write_text("videoID,start,end,text\na,0:00:00.5,0:00:01.5,变亮\n", encoding="utf-8")
    (tmp_path / "panda.csv").write_text(
        "videoID,timestamp,caption\na,\"[['0:00:00.000', '0:00:01.000'], ['0:00:01.000', '0:00:03.000']]\",\"['dark', 'bright']\"\n"
    )
    (tmp_path / "own.jsonl").write_text('{"file": "a.mp4", "captions": ["x", {"text": "y", "weight": 3}]}\n')
    root = tmp_path / "videos"
    find = lambda name, mapping=None: Listing(mapping, root).find([tmp_path / name])  # noqa: E731
    assert find("openvid.csv")[0].captions[0].text == "a grey, brightening picture"
    (one,) = find("koala.csv", {"path": "{videoID}.mp4", "caption": "text"})
    assert (one.start, one.end, one.captions[0].language) == (0.5, 1.5, "zh")
    both = find("panda.csv", {"path": "{videoID}.mp4"})
    assert [(c.start, c.end, c.captions[0].text) for c in both] == [(0.0, 1.0, "dark"), (1.0, 3.0, "bright")]
    assert [c.weight for c in find("own.jsonl")[0].captions] == [1, 3]
    out = tmp_path / "manifest.jsonl"
    summary = list(scan(both, out))[-1]
    assert summary.clips == 2 and [(s.start, s.end) for s in read_manifest(out).shots] == [(0.0, 1.0), (1.0, 3.0)]
    with pytest.raises(UserError, match="did you mean 'videoID'"):
        find("koala.csv", {"path": "videoIDs"})
    with pytest.raises(UserError, match="names no file; its columns are a, b"):
        (tmp_path / "x.csv").write_text("a,b\n1,2\n")
        find("x.csv")


def test_tar_shards_are_read_in_place(tmp_path):
    make(tmp_path / "a.mp4", n=24)
    (tmp_path / "a.json").write_text(json.dumps({"caption": "grey"}))
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, inside in (("a.mp4", "x/000.mp4"), ("a.json", "x/000.json"), ("a.mp4", "x/001.mp4")):
            tar.add(tmp_path / name, inside)
    out = tmp_path / "out" / "m.jsonl"
    summary = list(scan(Listing().find([tmp_path / "0.tar"]), out))[-1]
    assert (summary.clips, summary.uncaptioned) == (2, 1)
    manifest = read_manifest(out)
    source = manifest.check(manifest.shots[0])
    assert probe(source).frames == 24 and manifest.shots[0].captions[0].text == "grey"
    assert (read_video(source, start=1.0).frames == read_video(tmp_path / "a.mp4", start=1.0).frames).all()


def video2dataset(folder: Path, n: int) -> Path:
    """The files of a video2dataset sample: the video, its caption, and a JSON of metadata that repeats the caption."""
    make(folder / f"{n:08}.mp4", n=4)
    meta = {"url": "https://x/1", "key": f"{n:08}", "status": "success", "error_message": None, "caption": f"clip {n}", "clips": [[0, 1]]}
    (folder / f"{n:08}.json").write_text(json.dumps(meta | ({"caption": None} if n == 2 else {})))
    if n != 2:
        (folder / f"{n:08}.txt").write_text(f"clip {n}")
    return folder


def record_of(prompt: str) -> str:
    """The record that kling-sample writes beside a video."""
    return json.dumps({"kling": "0.1.0", "request": {"prompt": prompt, "negative": "no"}, "settings": {}, "frames": {"shape": [4]}})


def captions_found(candidates: list) -> dict[str, list[str]]:
    assert not [one.trouble for one in candidates if one.trouble]
    return {Path(getattr(one.source, "name", "")).name: [c.text for c in one.captions] for one in candidates}


def test_captions_are_found_in_the_formats_of_other_tools(tmp_path):
    """A text and a JSON, metadata without text, our own records under both names; in a folder and in a tar."""
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(3):
        video2dataset(folder, n)
    for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4"):
        make(folder / name, n=4)
    (folder / "a.json").write_text(record_of("a red ball"))
    (folder / "b.mp4.json").write_text(record_of("a blue cube"))
    (folder / "c.json").write_text('["one", "two"]')
    (folder / "d.json").write_text('[{"frame": 1, "boxes": []}]')
    expected = {"00000000.mp4": ["clip 0"], "00000001.mp4": ["clip 1"], "00000002.mp4": []}
    expected |= {"a.mp4": ["a red ball"], "b.mp4": ["a blue cube"], "c.mp4": ["one", "two"], "d.mp4": []}
    listing = Listing()
    assert captions_found(listing.find([folder])) == expected
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    shard = Listing()
    assert captions_found(shard.find([tmp_path / "0.tar"])) == expected and not shard.passed


@pytest.mark.parametrize("odd", "\v\f\x1c\x85\u2028\u2029")
def test_only_a_line_end_ends_a_caption(tmp_path, odd):
    make(tmp_path / "a.mp4", n=4)
    (tmp_path / "a.txt").write_text(f"a ball{odd}rolls\r\nsecond", encoding="utf-8", newline="")
    (tmp_path / "t.csv").write_text(f'video,caption\na.mp4,"a ball{odd}rolls"\n', encoding="utf-8", newline="")
    for path, expected in ((tmp_path / "a.mp4", ["a ball rolls", "second"]), (tmp_path / "t.csv", ["a ball rolls"])):
        assert [c.text for c in Listing().find([path])[0].captions] == expected


def test_a_list_of_clips_in_json(tmp_path):
    """The format of VideoX-Fun."""
    rows = [{"file_path": "train/a.mp4", "text": "a, b", "type": "video"}, {"file_path": "b.png", "text": "c", "type": "image"}]
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    found = Listing().find([tmp_path / "metadata.json"])
    assert [(one.source, [c.text for c in one.captions]) for one in found] == [
        (tmp_path / "train/a.mp4", ["a, b"]), (tmp_path / "b.png", ["c"]),
    ]  # fmt: skip


def test_pandas_values_for_missing_captions_are_no_captions(tmp_path):
    for name, text in (
        ("t.csv", "video,caption\na.mp4,nan\n"),
        ("t.jsonl", '{"video": "a.mp4", "caption": NaN}\n'),
        ("t.json", '[{"video": "a.mp4", "text": null}]'),
    ):
        (tmp_path / name).write_text(text)
        assert Listing().find([tmp_path / name])[0].captions == ()
    (tmp_path / "t.jsonl").write_text('{"video": "a.mp4", "caption": {"text": "a cat", "weight": 2}}\n')
    (caption,) = Listing().find([tmp_path / "t.jsonl"])[0].captions
    assert (caption.text, caption.weight) == ("a cat", 2)


def test_a_template_contains_only_column_names(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"id": "x", "a.b": "y"}\n')
    assert Listing({"path": "{a.b}/{id}.mp4"}).find([tmp_path / "t.jsonl"])[0].source == tmp_path / "y/x.mp4"


def test_a_damaged_shard_loses_only_the_part_after_the_damage(tmp_path):
    """Cut anywhere, or with a damaged header: samples before it are kept, the shard is in the quarantine, other shards are unaffected."""
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(3):
        video2dataset(folder, n)
    for name in "abcd":
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name)
    raw = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        third = tar.getmember("00000001.mp4").offset
    (tmp_path / "b.tar").write_bytes(raw[:third] + b"rot!" * 128 + raw[third + 512 :])
    (tmp_path / "c.tar").write_bytes(raw[:third])
    (tmp_path / "d.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    out = tmp_path / "out" / "m.jsonl"
    summary = list(scan(Listing().find([tmp_path / f"{name}.tar" for name in "abcd"]), out))[-1]
    assert summary.clips == 3 + 1 + 1 and sum(summary.bad.values()) == 3
    assert sorted(Path(one.path).name for one in read_quarantine(quarantine_of(out))) == ["b.tar", "c.tar", "d.tar"]


def test_filters_drop_and_count_the_right_clips(tmp_path):
    y, x = np.mgrid[:96, :128]
    texture = np.random.default_rng(0).integers(60, 200, (96, 160, 3), dtype=np.uint8)

    def film(name: str, frames: list[np.ndarray]) -> None:
        write_video(tmp_path / f"{name}.mp4", np.stack(frames).astype(np.uint8), 12)

    film("moving", [np.roll(texture, 2 * t, 1)[:, :128] for t in range(24)])
    film("similar", [np.roll(texture, 2 * t, 1)[:, :128] // 8 * 8 for t in range(24)])
    film("frozen", [np.roll(texture, 40, 0)[:, :128]] * 24)
    film("shaken", [np.roll(texture, 9 * (t // 2 % 2) + 50, 1)[:, :128] for t in range(24)])
    film("dark", [texture[:, :128] // 16] * 24)
    film("barred", [np.where((y > 20) & (y < 76), 1, 0)[..., None] * np.roll(texture, -2 * t, 1)[::-1, :128] for t in range(24)])
    film("blurred", [np.stack([60 + x // 2 + t, 40 + y, 200 - x // 2], -1) for t in range(24)])
    film("short", [np.roll(texture, 3 * t, 0)[:, :128] for t in range(4)])
    limits = dict(min_seconds=1, min_motion=0.5, max_shake=2, min_sharpness=20, max_dark=0.5, max_letterbox=0.1, duplicate=6)
    out = tmp_path / "out" / "manifest.jsonl"
    summary = look(tmp_path, out, filters=Filters(**limits))
    reasons = {Path(one.path).stem: one.reason for one in read_quarantine(quarantine_of(out))}
    assert reasons == {
        "similar": "near-duplicate", "frozen": "frozen", "shaken": "shaken", "dark": "near black", "barred": "letterbox",
        "blurred": "blurred", "short": "too short",
    }  # fmt: skip
    assert sum(summary.dropped.values()) == 7 and summary.clips == 1
    assert look(tmp_path, out).clips == 8  # nothing is filtered by default


def test_cuts_split_a_video_into_shots(tmp_path):
    pytest.importorskip("scenedetect")
    colours = [(200, 40, 30), (20, 160, 60), (40, 60, 220)]
    frames = np.concatenate([np.full((16, 48, 64, 3), colour, np.uint8) ^ (NOISE & 7) for colour in colours])
    write_video(tmp_path / "a.mp4", frames, 16)
    out = tmp_path / "manifest.jsonl"
    look(tmp_path, out, split=True)
    assert [(s.start, s.end) for s in read_manifest(out).shots] == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]


def test_a_shot_knows_the_key_frames_inside_it(tmp_path):
    make(tmp_path / "a.mp4", n=40, fps=4, g="8", sc_threshold="0")
    (tmp_path / "t.csv").write_text("video,start,end\na.mp4,,\na.mp4,3,7.5\n")
    out = tmp_path / "manifest.jsonl"
    list(scan(Listing().find([tmp_path / "t.csv"]), out))
    assert [shot.video.keyframes for shot in read_manifest(out).shots] == [(2, 4, 6, 8), (4, 6)]


@pytest.mark.parametrize("moving", [True, False])
@pytest.mark.parametrize(
    "words, white, outline", [("You never told me that", True, True), ("it was raining", False, False), ("12:04:33", True, True)]
)
def test_overlaid_text_is_measured(moving, words, white, outline):
    """Compared with the same footage without text, with a moving and with a static camera."""
    rng = np.random.default_rng(0)
    wall = cv2.resize(rng.integers(40, 216, (30, 90, 3), dtype=np.uint8), (720, 180), interpolation=cv2.INTER_CUBIC)
    shares = []
    for written in (False, True):
        meter = ShotMeter()
        for t in range(12):
            frame = wall[:, (6 * t if moving else 0) :][:, :320].copy()
            style = {"org": (40, 160), "fontFace": cv2.FONT_HERSHEY_SIMPLEX, "fontScale": 0.5, "lineType": cv2.LINE_AA}
            if written and outline:
                cv2.putText(frame, words, **style, color=(0, 0, 0) if white else (255, 255, 255), thickness=4)
            if written:
                cv2.putText(frame, words, **style, color=(255, 255, 255) if white else (0, 0, 0), thickness=1)
            meter.see(t / 8, frame)
        shares.append(meter.summary(0.0, 9.0)["text"])
    assert shares[0] <= 0.0005 and shares[1] >= 0.002


def test_overlaid_text_is_dropped_only_on_request(tmp_path):
    rng = np.random.default_rng(0)
    wall = cv2.resize(rng.integers(40, 216, (24, 80, 3), dtype=np.uint8), (640, 144), interpolation=cv2.INTER_CUBIC)
    for name in ("clean", "titled"):
        frames = np.stack([wall[:, 6 * t : 6 * t + 256] for t in range(24)]) // 2
        for frame in frames if name == "titled" else ():
            cv2.putText(frame, "previously on this show", (24, 130), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
        write_video(tmp_path / f"{name}.mp4", frames, 12)
    out = tmp_path / "out" / "manifest.jsonl"
    assert look(tmp_path, out).clips == 2
    assert look(tmp_path, out, filters=Filters(max_text=0.001)).dropped == {"text overlay": 1}
    assert [Path(one.path).stem for one in read_quarantine(quarantine_of(out))] == ["titled"]


def test_the_program_counts_reasons_and_fails_above_five_percent(tmp_path, capsys):
    make(tmp_path / "a.mp4", n=4)
    (tmp_path / "b.mp4").write_text("words")
    out = tmp_path / "out" / "manifest.jsonl"
    words = ["scan", str(tmp_path), "--out", str(out), "--workers", "1"]
    with pytest.raises(SystemExit) as stop:
        program.main(words)
    said = capsys.readouterr()
    assert stop.value.code == 3 and "not a video" in said.out and "50.0 %" in said.err and str(quarantine_of(out)) in said.err
    program.main([*words, "--allow-bad", "0.5"])


def test_a_file_named_twice_keeps_the_captions_of_both(tmp_path):
    make(tmp_path / "a.mp4", n=4)
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "t.csv").write_text("video,text\na.mp4,first\na.mp4,second\n./a.mp4,third\n")
    (one,) = Listing().find([tmp_path, tmp_path / "t.csv"])
    assert [caption.text for caption in one.captions] == ["first", "second", "third"]


def test_every_caption_of_a_row_is_kept(tmp_path):
    """Two columns, a list in one cell, and lists with lists of time ranges, in csv and in jsonl."""
    (tmp_path / "t.csv").write_text("name,en,zh\na.mp4,a cat,一只猫\nb.mp4,\"['one', 'two']\",\n")
    found = Listing({"path": "name", "caption": ["en", "zh"]}).find([tmp_path / "t.csv"])
    assert [[(c.text, c.language) for c in one.captions] for one in found] == [
        [("a cat", "en"), ("一只猫", "zh")], [("one", "en"), ("two", "en")],
    ]  # fmt: skip
    for name, row in (
        ("p.csv", "videoID,caption,timestamp\nc,\"['one', 'two']\",\"[[0, 1], ['0:00:01.5', 3]]\"\n"),
        ("p.jsonl", '{"videoID": "c", "caption": ["one", "two"], "timestamp": [[0, 1], [1.5, 3]]}\n'),
    ):
        (tmp_path / name).write_text(row)
        found = Listing().find([tmp_path / name])
        assert [(one.start, one.end, [c.text for c in one.captions]) for one in found] == [(0, 1, ["one"]), (1.5, 3, ["two"])]


def test_unusual_entries_of_a_folder_affect_nothing_else(tmp_path):
    """A pipe, which would block a reader; a dead link; a name that is not UTF-8, which must survive JSON twice."""
    folder = tmp_path / "in"
    folder.mkdir()
    make(folder / "a.mp4", n=4).rename(os.fsdecode(os.fsencode(folder) + b"/\xff\xe9t\xe9.mp4"))
    os.mkfifo(folder / "pipe.mp4")
    os.mkfifo(folder / "pipe")
    (folder / "dead.mp4").symlink_to(folder / "nowhere.mp4")
    out = tmp_path / "manifest.jsonl"
    for reused in (0, 3):
        summary = look(folder, out)
        assert summary.bad == {"not a file": 1, "missing": 1} and summary.clips == 1 and summary.reused == reused
    manifest = read_manifest(out)
    assert read_video(manifest.check(manifest.shots[0])).frames.shape[0] == 4


def test_a_scan_log_of_another_kind_is_replaced(tmp_path):
    make(tmp_path / "a.mp4", n=4)
    out = tmp_path / "manifest.jsonl"
    for line in ('{"no": "key"}\n', "5\n", "\n", "words\n"):
        out.with_suffix(".scan.jsonl").write_text(line)
        summary = look(tmp_path, out)
        assert (summary.clips, summary.reused) == (1, 0)


def put(folder: Path, name: str, contents: str | bytes = "") -> str:
    path = folder / name
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return str(path)


MISTAKES = {
    "no such folder": (lambda f: [str(f / "nowhere")], "nowhere does not exist"),
    "nothing in it": (lambda f: [str(f / "empty")], "no video or picture in"),
    "an empty table": (lambda f: [put(f, "t.csv")], "t.csv is empty"),
    "a table of columns": (lambda f: [put(f, "t.csv", "video,text\n")], "no video or picture in"),
    "a table of something else": (lambda f: [put(f, "t.csv", "a,b\n1,2\n")], "line 2 names no file; its columns are a, b: map one"),
    "a table in Latin-1": (lambda f: [put(f, "t.csv", b"video\n\xe9t\xe9.mp4\n")], "cannot be read as a table"),
    "a column that is not there": (lambda f: [put(f, "t.csv", "video\na\n"), "--map", "path=vide"], "did you mean 'video'"),
    "a template that does not fit": (lambda f: [put(f, "t.csv", "video\na\n"), "--map", "path={id}.mp4"], "has no column 'id'"),
    "a field that is not there": (lambda f: [str(f / "films"), "--map", "pth=video"], "did you mean 'path'"),
    "times in words": (lambda f: [put(f, "t.csv", "video,start\na,soon\n")], "time 'soon': give seconds"),
    "times before the start": (lambda f: [put(f, "t.csv", "video,start\na,-3\n")], "time '-3': give seconds"),
    "half a pair of times": (lambda f: [put(f, "t.csv", 'video,timestamp\na,"[1.0]"\n')], "give [start, end]"),
    "lines that are not JSON": (lambda f: [put(f, "t.jsonl", '{"video": "a.mp4"}\n{"vid')], "t.jsonl line 2 is not JSON"),
    "a list on a line": (lambda f: [put(f, "t.jsonl", "[1]\n")], "line 1 holds a list"),
    "captions that are no text": (lambda f: [put(f, "t.jsonl", '{"video": "a", "captions": [3]}')], "captions must be text"),
    "a comma without quotes": (
        lambda f: [put(f, "t.csv", "video,caption\na.mp4,a cat\nb.mp4,a red ball, rolling left\n")], "line 3 has more cells than the 2",
    ),
    "a quote that never ends": (lambda f: [put(f, "t.csv", 'video,caption\na.mp4,"a cat\nb.mp4,x\n')], "cannot be read as a table"),
    "two columns of one name": (lambda f: [put(f, "t.csv", "video,text,text\na.mp4,a,b\n")], "two columns 'text'"),
    "a caption that is an object": (lambda f: [put(f, "t.jsonl", '{"video": "a", "caption": {"a": 1}}')], "line 1: captions must be text"),
    "a caption that is a number": (lambda f: [put(f, "t.jsonl", '{"video": "a", "caption": 3}')], "line 1: captions must be text"),
    "half a character": (lambda f: [put(f, "t.jsonl", '{"video": "a", "caption": "\\ud83d"}')], "line 1: the caption"),
    "a template with an attribute": (lambda f: [put(f, "t.csv", "a,video\na,b\n"), "--map", "path={a.b}"], "has no column 'a.b'"),
    "a template with a width": (lambda f: [put(f, "t.csv", "a,video\na,b\n"), "--map", "path={a:>9999999999}"], "has no column 'a:>"),
    "a template with an empty cell": (lambda f: [put(f, "t.csv", "a,video\n,b\n"), "--map", "path={a}.mp4"], "nothing to put for {a}"),
    "an object in a .json": (lambda f: [put(f, "t.json", '{"a": 1}')], "t.json holds a dict"),
    "words in a .json": (lambda f: [put(f, "t.json", '["a.mp4"]')], "t.json entry 1 holds a str"),
    "a .json in a .json in …": (lambda f: [put(f, "t.json", "[" * 100_000)], "is nested thousands of levels deep"),
    "lines in lines in …": (lambda f: [put(f, "t.jsonl", '{"video": "a", "x": ' + "[" * 500 + "]" * 500 + "}")], "line 1 is not JSON"),
    "times in brackets in …": (lambda f: [put(f, "t.csv", f"video,timestamp\na,{'[' * 9999}\n")], "give [start, end]"),
    "a packed tar": (lambda f: [put(f, "t.tar", b"\x1f\x8b" + bytes(600))], "t.tar is not an uncompressed tar"),
    "no filters": (lambda f: [str(f / "films"), "--filters", str(f / "no.yaml")], "no.yaml"),
    "a filter that is not there": (lambda f: [str(f / "films"), "--filters", put(f, "f.yaml", "min_motoin: 1")], "mean 'min_motion'"),
    "a filter in words": (lambda f: [str(f / "films"), "--filters", put(f, "f.yaml", "min_motion: much")], "min_motion"),
    "too many bits": (lambda f: [str(f / "films"), "--filters", put(f, "f.yaml", "duplicate: 9")], "duplicate 9: give 0 to 7"),
    "no manifest's name": (lambda f: [str(f / "films"), "--out", "x.csv"], "end the manifest's name in .jsonl"),
    "a file where a folder should be": (lambda f: [str(f / "films"), "--out", str(f / "films" / "a.mp4" / "m.jsonl")], "cannot be written"),
    "somebody else's jsonl": (lambda f: [str(f / "films"), "--out", put(f, "mine.jsonl", '{"a": 1}\n')], "mine.jsonl line 1 is not a line"),
    "no workers": (lambda f: [str(f / "films"), "--workers", "0"], "--workers"),
    "no time": (lambda f: [str(f / "films"), "--seconds-per-minute", "0"], "--seconds-per-minute"),
    "more than everything": (lambda f: [str(f / "films"), "--allow-bad", "2"], "--allow-bad"),
    "two columns for one file": (lambda f: [str(f / "films"), "--map", "path=a", "path=b"], "path is mapped to a, b"),
    "captions without a stretch": (
        lambda f: [put(f, "t.csv", "video,caption,timestamp\na,\"['x','y','z']\",\"[[0,1],[1,2]]\"\n")], "3 captions for 2 stretches",
    ),
    "a time of hundreds of digits": (lambda f: [put(f, "t.jsonl", '{"video": "a", "start": 1' + "0" * 400 + "}")], "give seconds"),
    "a time in another base": (lambda f: [put(f, "t.csv", f"video,timestamp\na,\"[0x{'f' * 999}, 1]\"\n")], "give seconds"),
    "a list without an end in sight": (lambda f: [put(f, "t.csv", "video,caption\na,\"[" + "'a'," * 99_999 + "]\"\n")], "write it as JSON"),
    "a weight of hundreds of digits": (
        lambda f: [put(f, "t.jsonl", '{"video": "a", "captions": [{"text": "b", "weight": 1' + "0" * 400 + "}]}")], "captions must be text",
    ),
    "half a mapping": (lambda f: [str(f / "films"), "--map", "path"], "give FIELD=COLUMN"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(tmp_path, capsys, mistake):
    (tmp_path / "empty").mkdir()
    (tmp_path / "films").mkdir()
    make(tmp_path / "films" / "a.mp4", n=2)
    words, says = MISTAKES[mistake][0](tmp_path), MISTAKES[mistake][1]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    out = [] if "--out" in words else ["--out", str(tmp_path / "out" / "manifest.jsonl")]
    with pytest.raises(SystemExit) as stop:
        program.main(["scan", *words, *out, "--workers", "1"] if "--workers" not in words else ["scan", *words, *out])
    said = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert stop.value.code == 2 and said.startswith("error: ") and says in said
    assert all(path.read_bytes() == text for path, text in before.items())


def test_a_name_that_no_file_can_have_costs_only_its_row(tmp_path):
    make(tmp_path / "a.mp4", n=2)
    names = ["a.mp4", "b\0.mp4", f"{'c' * 300}.mp4", "\ud83d.mp4"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"video": name, "caption": "a"}) + "\n" for name in names))
    out = tmp_path / "manifest.jsonl"
    *_, summary = scan(Listing().find([tmp_path / "t.jsonl"]), out)
    assert summary.clips == 1 and sum(summary.bad.values()) == 3
    assert len(read_quarantine(quarantine_of(out))) == 3


@pytest.mark.parametrize("line", ['{"a": 1}', '{"path": "a"}', '{"path": 5, "reason": "x", "detail": "y"}'])
def test_another_file_in_the_place_of_the_quarantine_is_refused(tmp_path, line):
    put(tmp_path, "quarantine.jsonl", line)
    with pytest.raises(UserError, match=r"quarantine.jsonl line 1"):
        read_quarantine(tmp_path / "quarantine.jsonl")


def test_splitting_without_pyscenedetect_says_so_before_anything_is_decoded(tmp_path, monkeypatch):
    make(tmp_path / "a.mp4", n=2)
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(UserError, match="pip install 'kling\\[shots\\]'"):
        look(tmp_path, tmp_path / "out" / "manifest.jsonl", split=True)
    assert not (tmp_path / "out").exists()
