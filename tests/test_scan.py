"""The scan: every made file is judged rightly, whatever it is called; nothing hangs, crashes or is examined twice."""

from __future__ import annotations

import json
import os
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from kling.data import scan as scanning
from kling.data.decode import probe
from kling.data.filters import Filters
from kling.data.listing import Listing
from kling.data.manifest import quarantine_of, read_manifest, read_quarantine
from kling.data.scan import Summary, scan
from kling.data.video import read_video
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


def test_every_file_of_the_corpus_is_judged_rightly(corpus, scanned):
    good = {Path(shot.path).name for shot in read_manifest(scanned).shots}
    bad = {Path(one.path).name: one.reason for one in read_quarantine(quarantine_of(scanned))}
    assert len(CORPUS) >= 18
    assert {name: "" for name in good} | bad == {name: reason for name, (_, reason) in CORPUS.items()}


def test_what_was_found_is_true(corpus, scanned):
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


def test_a_second_scan_examines_nothing_again_and_a_changed_file_is(corpus, scanned, monkeypatch):
    before = scanned.read_bytes()
    monkeypatch.setattr(scanning, "run_jobs", lambda jobs, workers: pytest.fail("examined again") if jobs else iter(()))
    assert look(corpus, scanned).reused == len(CORPUS) and scanned.read_bytes() == before
    monkeypatch.undo()
    os.utime(corpus / "plain.mp4", ns=(1, 1))
    manifest = read_manifest(scanned)
    with pytest.raises(UserError, match="has changed since it was scanned"):
        manifest.check(next(shot for shot in manifest.shots if shot.path.endswith("/plain.mp4")))
    assert look(corpus, scanned).reused == len(CORPUS) - 1


def test_a_scan_that_was_killed_goes_on(tmp_path):
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


def test_a_decoder_that_hangs_or_dies_costs_its_file_only(tmp_path, monkeypatch):
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


def test_filters_drop_what_they_say_and_count_it(tmp_path):
    y, x = np.mgrid[:96, :128]
    texture = np.random.default_rng(0).integers(60, 200, (96, 160, 3), dtype=np.uint8)

    def film(name: str, frames: list[np.ndarray]) -> None:
        from kling.data.video import write_video

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
    assert look(tmp_path, out).clips == 8  # nothing is filtered unless it is asked for


def test_cuts_split_a_video_into_shots(tmp_path):
    pytest.importorskip("scenedetect")
    colours = [(200, 40, 30), (20, 160, 60), (40, 60, 220)]
    from kling.data.video import write_video

    frames = np.concatenate([np.full((16, 48, 64, 3), colour, np.uint8) ^ (NOISE & 7) for colour in colours])
    write_video(tmp_path / "a.mp4", frames, 16)
    out = tmp_path / "manifest.jsonl"
    look(tmp_path, out, split=True)
    assert [(s.start, s.end) for s in read_manifest(out).shots] == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]


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
    for wrong in (["--out", "x.csv"], ["--map", "path"], ["--map", "pth=x"], ["--workers", "0"]):
        with pytest.raises(SystemExit) as stop:
            program.main([*words, *wrong])
        assert stop.value.code == 2
