"""Manifests and folders as data sets: buckets, equal tokens per batch, and an order that depends only on (seed, step)."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kling import KlingPipeline
from kling.cache.batches import LatentSteps, RankBatches
from kling.cache.fill import fill_cache
from kling.cache.plan import CacheConfig
from kling.cache.store import LatentCache
from kling.config import load_config
from kling.data.buckets import Bucket, Epochs, cuts_of
from kling.data.clips import ManifestClips, folder_manifest, held_out
from kling.data.manifest import read_manifest, write_manifest
from kling.data.scan.listing import Listing
from kling.data.scan.scan import scan
from kling.data.source import ClipSource, DataConfig, StepBatches, batches, check_data
from kling.data.video import read_video, write_video
from kling.dit.cost import forward_flops
from kling.errors import UserError
from kling.runtime.parallel import Layout
from kling.shapes import aspect_size, latent_frames
from kling.training.examples import Drawing
from tests.test_pipeline import tiny_pipeline
from tests.test_video import smooth

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "train")]
import encode as encode_program  # noqa: E402
import train_dit  # noqa: E402
import train_vae  # noqa: E402

ASPECTS = ["16:9", "9:16", "1:1"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small for two
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Wide, tall and square videos of several lengths, and a picture, all with captions."""
    folder = tmp_path_factory.mktemp("films")
    for name, n, caption in (
        ("dogs/b 犬", 25, "one dog\n\ntwo dogs\n"),
        ("cats/a", 12, json.dumps({"caption": "a cat", "captions": [{"text": "猫", "weight": 3}]})),
        ("cats/tall", 9, "a tall cat"),
        ("birds/square", 6, "a bird"),
    ):
        path = folder / f"{name}.mp4"
        frames = smooth(n)[:, :, :48] if "square" in name else smooth(n).transpose(1, 2) if "tall" in name else smooth(n)[:, :36]
        write_video(path, frames, 8)
        path.with_suffix(".json" if caption.startswith("{") else ".txt").write_text(caption, encoding="utf-8")
    (folder / "cats" / "._a.mp4").write_bytes(b"a Mac was here")
    (folder / "notes.md").write_text("mine")
    Image.fromarray(smooth(1)[0, :36].numpy()).save(folder / "picture.png")
    (folder / "picture.txt").write_text("a picture")
    return folder


@pytest.fixture(scope="module")
def manifest(root) -> Path:
    list(scan(Listing().find([root]), root / "manifest.jsonl"))
    return root / "manifest.jsonl"


def config(path: Path, **changes) -> DataConfig:
    return DataConfig(**{"source": str(path), "frames": [1, 5, 9], "fps": 8, **changes})


def test_shots_go_to_their_aspect_and_their_longest_length(root, manifest):
    for source in (root, manifest):  # a folder is a manifest made on the spot
        clips = ClipSource(config(source)).manifest
        assert {b: [p.shot.path for p in pieces] for b, pieces in clips.buckets.items()} == {
            Bucket("16:9", 1): ["picture.png"],
            Bucket("16:9", 9): ["cats/a.mp4", "dogs/b 犬.mp4", "dogs/b 犬.mp4"],
            Bucket("1:1", 5): ["birds/square.mp4"],
            Bucket("9:16", 9): ["cats/tall.mp4"],
        }
        sample = clips.clip(Bucket("16:9", 9), 2)
        assert sample.captions == ["one dog", "two dogs"] and sample.video.shape == (9, 64, 112, 3) and sample.trajectory is None
        assert torch.equal(sample.video, read_video(root / "dogs" / "b 犬.mp4", fps=8, size=(64, 112)).frames[9:18])
        assert clips.clip(Bucket("16:9", 9), 0).weights == [1, 3]
        assert clips.clip(Bucket("16:9", 1), 0).video.shape == (1, 64, 112, 3)
        assert "6 clips from 5 shots" in clips.report()


def test_remaining_frames_of_a_shot_are_used_in_other_epochs(manifest):
    clips = ClipSource(config(manifest)).manifest
    names = {clips.clip(Bucket("16:9", 9), 2, epoch).name for epoch in range(20)}
    assert len(names) == 25 % 9 + 1 and names == {clips.clip(Bucket("16:9", 9), 2, epoch).name for epoch in range(20)}


@pytest.mark.parametrize("group", [1, 8])
def test_tokens_of_a_batch_are_constant_and_no_clip_is_lost(group):
    buckets = [Bucket(a, T) for a in ASPECTS for T in (1, 17, 41)]
    lengths = [1, 17, 17, 41]
    cuts = cuts_of(buckets, 4, lengths)
    budget = 4 * max(b.volume for b in buckets)
    assert all(budget - v < c.size * v <= budget for b in buckets for c in cuts[b] if (v := Bucket(b.aspect, c.frames).volume))
    items = {b: 1 + 7 * i for i, b in enumerate(buckets)}
    epochs = Epochs(items, cuts, seed=3, group=group)
    cut = Counter()
    for epoch in range(3):
        used = Counter()
        for place in range(epoch * epochs.per_epoch, (epoch + 1) * epochs.per_epoch):
            _, bucket, frames, numbers = epochs[place]
            (size,) = [c.size for c in cuts[bucket] if c.frames == frames]
            assert len(numbers) == size and frames == epochs[place // group * group][2]
            used.update((bucket, n) for n in numbers)
            cut[bucket, frames] += size
        assert set(used) == {(b, n) for b in buckets for n in range(items[b])}
        for bucket, (least, most) in epochs.uses().items():
            counts = [used[bucket, n] for n in range(items[bucket])]
            assert (min(counts), max(counts)) == (least, most) and least >= epochs.rounds
    # half of the clips of 41 frames are cut to 17 and a quarter to 1, in proportion to how often the lengths are listed
    (long,) = [b for b in buckets if b == Bucket("1:1", 41)]
    shares = {T: cut[long, T] / sum(cut[long, other] for other in (1, 17, 41)) for T in (1, 17, 41)}
    assert shares == pytest.approx({1: 0.25, 17: 0.5, 41: 0.25}, abs=0.1)
    assert f"{buckets[0]}: 1 clips in " in epochs.report() and f"batches of {cuts[buckets[0]][0].size} x 1 frames" in epochs.report()


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize(("batch", "clips"), [(1, 3000), (8, 3000), (1, 7)])
def test_all_processes_of_a_step_have_equal_work(ranks, batch, clips):
    """Computed from the plan of batches of a 0.1B model on 480p clips, with attention, text and keyframes: mean over slowest."""
    cfg = load_config(train_dit.TrainDiTConfig, "dit/0.1b.yaml")
    model = {"patch_size": (1, 2, 2), "in_channels": 16, "out_channels": 16, "text_dim": 512, "freq_dim": 256, **cfg.model}
    buckets = [Bucket(a, T) for a in ASPECTS for T in (1, 17, 41, 81)]
    drawing = Drawing(0, cfg.tasks, 0.1, 0.4)

    @cache
    def work(aspect: str, frames: int, size: int, appended: bool) -> int:
        H, W = aspect_size(aspect, 7)
        tokens = (latent_frames(frames) + appended) * (H // 16) * (W // 16)
        return size * forward_flops(model, tokens, 64)

    def balance(group: int) -> float:
        epochs = Epochs({b: clips for b in buckets}, cuts_of(buckets, batch, [1, 17, 41, 81]), 0, group)
        mean = slowest = 0
        for step in range(100):
            costs = []
            for place in range(step * ranks, (step + 1) * ranks):
                _, bucket, frames, numbers = epochs[place]
                appended = frames > 1 and replace(drawing, group=group).appends_keyframe(place)
                costs.append(work(bucket.aspect, frames, len(numbers), appended))
            mean, slowest = mean + sum(costs) / ranks, slowest + max(costs)
        return mean / slowest

    together, apart = balance(ranks), balance(1)
    print(f"{ranks} ranks, batch {batch}: mean over slowest {together:.3f} in groups of {ranks}, {apart:.3f} in groups of 1")
    assert together >= 0.95 > apart


def test_the_order_is_a_function_of_seed_and_step_alone(manifest):
    source = ClipSource(config(manifest, aspects=["16:9"]), seed=5)
    straight = list(batches(StepBatches(source, 2), 0, 6, workers=0))
    for workers, start in ((0, 2), (2, 0)):
        again = list(batches(StepBatches(ClipSource(config(manifest, aspects=["16:9"]), seed=5), 2), start, 6, workers))
        assert all(torch.equal(a, b) for a, b in zip(straight[start:], again, strict=True))
    two = [RankBatches(StepBatches(source, 2), 0, Layout(rank, 2)) for rank in (0, 1)]
    assert all(torch.equal(two[place % 2][place // 2], straight[place]) for place in range(6))
    other = StepBatches(ClipSource(config(manifest, aspects=["16:9"]), seed=6), 2)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(straight, (other[i] for i in range(6)), strict=True))


def test_unusable_clips_are_named_or_counted(root, manifest, tmp_path):
    with pytest.raises(UserError, match=r"1 of 5 clips are too short for data.frames \[5, 9\] \(picture.png.*is a picture.*skip_bad"):
        ClipSource(config(manifest, frames=[5, 9]))
    clips = ClipSource(config(manifest, frames=[5, 9], skip_bad=True)).manifest
    assert "1 too short" in clips.report()
    read = read_manifest(manifest)
    bare = [type(shot)(**{**shot.__dict__, "captions": ()}) for shot in read.shots]
    write_manifest(root / "bare.jsonl", bare)
    with pytest.raises(UserError, match="5 of 5 clips have no caption .*kling-data caption"):
        ClipSource(config(root / "bare.jsonl"))
    assert ClipSource(config(root / "bare.jsonl", unconditional=True)).clip(0, 9, "1:1").captions == [""]
    (tmp_path / "x.mp4").write_text("words")
    write_video(tmp_path / "y.mp4", smooth(9), 8)
    (tmp_path / "y.txt").write_text("a caption")
    with pytest.raises(UserError, match=r"1 files are unusable \(.*x.mp4 is not a video.*skip_bad"):
        folder_manifest(tmp_path, skip_bad=False)
    assert len(folder_manifest(tmp_path, skip_bad=True)) == 1
    with pytest.raises(UserError, match="decord does not notice damage: make a manifest"):
        ClipSource(config(tmp_path, reader="decord", skip_bad=True))
    for wrong in (dict(scale=0), dict(holdout=1.0), dict(source="world", holdout=0.1), dict(source="world", reader="decord")):
        with pytest.raises(UserError):
            check_data(config(manifest, **wrong))


LIES = {  # what a row can say, by the path to it, and what the error says
    "start": ("x", -1, 1e9, math.nan), "end": (1e12, math.nan, None), "path": (5, None), "bytes": ("7",), "sha256": ("", "xyz", 5),
    "captions": ("a cat", ["a cat"], [{"text": 5}], [{"text": "a", "weight": -1}], [{"text": "a", "weight": math.nan}], [{"words": "a"}]),
    "camera": (5,), "tracks": ([],), "references": ("a.png", [3], ["a"] * 5), "clock": ([0.0], [0.0, [[1]]]), "member": (["a", 1],),
    "shots": ([1], [[0.0, "x"]]), "measures": ([],), "video.width": (0, -3, "640", 1.5), "video.height": (0,), "video.frames": (0, None),
    "video.fps": (0, -25.0, math.nan, math.inf, "25", 10**400), "video.duration": (-1.0, 1e300, math.inf),
    "video.colour": (3,), "colour": (3,),
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in LIES.items() for value in values])
def test_a_row_that_lies_is_refused_with_its_line(root, manifest, key, value):
    """Each would otherwise end in a traceback far away, or in millions of clips."""
    row = json.loads(manifest.read_text(encoding="utf-8").splitlines()[0])
    part = row["video"] if key.startswith("video.") else row
    part[key.removeprefix("video.")] = value
    (root / "lies.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"lies.jsonl line 1") as error:
        read_manifest(root / "lies.jsonl")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", '{"path": 3}', "[1]", '{"path": "a", "video": {"width": 3}}'])
def test_an_invalid_manifest_is_refused_with_its_line(tmp_path, text):
    (tmp_path / "m.jsonl").write_text(f"\n{text}\n")
    with pytest.raises(UserError, match="m.jsonl line 2"):
        read_manifest(tmp_path / "m.jsonl")


def test_files_held_out_for_evaluation_are_not_trained_on(manifest):
    read = read_manifest(manifest)
    places = sorted(int(shot.sha256[:8], 16) / 2**32 for shot in read.shots)
    train, test = (held_out(read, (places[1] + places[2]) / 2, evaluation) for evaluation in (False, True))
    assert (len(train), len(test)) == (3, 2)
    names = {s.path for s in train.shots}, {s.path for s in test.shots}
    assert names[0] | names[1] == {s.path for s in read.shots} and not names[0] & names[1]
    with pytest.raises(UserError, match="leaves no clip"):
        held_out(read, 1e-9, True)


def test_a_camera_beside_a_video_is_cut_with_it(tmp_path):
    write_video(tmp_path / "a.mp4", smooth(25)[:, :36], 8)
    (tmp_path / "a.txt").write_text("turning")
    angles = [0.02 * i for i in range(50)]  # 16 poses a second, panning right
    c2w = [[[np.cos(a), 0, np.sin(a), 0.1 * i], [0, 1, 0, 0], [-np.sin(a), 0, np.cos(a), 0]] for i, a in enumerate(angles)]
    (tmp_path / "a.camera.json").write_text(json.dumps({"fps": 16, "intrinsics": [[0.5, 0.875, 0.5, 0.5]] * 50, "c2w": c2w}))
    clips = ManifestClips(folder_manifest(tmp_path, False), [9], ["16:9"], 8.0)
    camera = clips.clip(Bucket("16:9", 9), 1).trajectory
    want = 0.04 * torch.arange(9)  # two poses a frame, from the clip's first on
    assert torch.allclose(torch.atan2(camera.c2w[:, 0, 2], camera.c2w[:, 0, 0]), want, atol=1e-5)
    first = 0.02 * 18  # the clip starts at the 18th pose: its axes are the clip's axes
    step = torch.tensor([np.cos(first), np.sin(first)], dtype=torch.float32) * 0.2
    assert torch.allclose(camera.c2w[1, [0, 2], 3], step, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- the cache


@pytest.fixture(scope="module")
def vae():
    return tiny_pipeline().vae


def encode(manifest: Path, out: Path, vae, upto: int | None = None, **kwargs) -> CacheConfig:
    cfg = CacheConfig(out=str(out), shard=1, workers=0, data=config(manifest))
    steps = fill_cache(cfg, vae, **kwargs)
    for i, _ in enumerate(steps):
        if i == upto:
            steps.close()
            break
    return cfg


def shards(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}


def test_a_manifest_is_encoded_whole_and_trains_in_constant_tokens(manifest, tmp_path, vae):
    encode(manifest, tmp_path, vae)
    cache = LatentCache(tmp_path)
    assert len(cache) == 6 and {str(b) for b in cache.clips} == {"16:9 x 1", "16:9 x 9", "1:1 x 5", "9:16 x 9"}
    with pytest.raises(UserError, match="add 1"):
        LatentSteps(cache, 1, [5, 9], 0)
    steps = LatentSteps(cache, 2, [1, 5, 9], 0)
    seen = [steps[p] for p in range(steps.per_epoch)]
    assert len({name for b in seen for name in b.names}) == 6
    most = max(b.latents[:, 0].numel() for b in seen)
    assert all(b.latents[:, 0].numel() + b.latents[0, 0].numel() > most for b in seen), "as many as fit into the tokens of the largest"
    pictures = next(b for b in seen if b.captions[0] == ["a picture"])
    assert pictures.latents.shape[:3] == (2 * 3, 4, 1) and pictures.keyframes.shape[1] == 0
    cat = next(b for b in seen if ["a cat", "猫"] in b.captions)
    assert cat.weights[cat.captions.index(["a cat", "猫"])] == [1, 3]


def test_an_unfinished_cache_is_not_read_and_can_be_continued(manifest, tmp_path, vae):
    encode(manifest, tmp_path, vae, upto=3)
    with pytest.raises(UserError, match="does not exist"):
        LatentCache(tmp_path)
    before = shards(tmp_path)
    encode(manifest, tmp_path, vae)
    assert len(before) == 3 and before.items() <= shards(tmp_path).items() and len(LatentCache(tmp_path)) == 6
    assert not list(tmp_path.glob("index.*.json"))


def test_two_processes_make_the_same_cache_as_one(manifest, tmp_path, vae):
    encode(manifest, tmp_path / "one", vae)
    ranks = [fill_cache(encode_config(manifest, tmp_path / "two"), vae, rank, 2, lambda: None) for rank in (1, 0)]
    for steps in ranks:  # simulates `wait`: both have listed the shards before one writes
        next(steps)
    for steps in ranks:  # and rank 0 finishes last
        list(steps)
    a, b = (json.loads((tmp_path / name / "index.json").read_text()) for name in ("one", "two"))
    assert a == b


def encode_config(manifest: Path, out: Path) -> CacheConfig:
    return CacheConfig(out=str(out), shard=1, workers=0, data=config(manifest))


def test_only_a_changed_clip_or_a_cut_shard_is_made_again(manifest, root, tmp_path, vae):
    encode(manifest, tmp_path, vae)
    before = shards(tmp_path)
    cut = tmp_path / "00004.safetensors"
    cut.write_bytes(cut.read_bytes()[:-3])
    read = read_manifest(manifest)
    words = [type(s)(**{**s.__dict__, "captions": (type(s.captions[0])("other words"),)}) if s.is_image else s for s in read.shots]
    write_manifest(root / "changed.jsonl", words)
    cfg = encode_config(manifest, tmp_path)
    cfg.data.source = str(root / "changed.jsonl")
    with pytest.raises(UserError, match="with other settings .data.source .*changed.jsonl"):  # another manifest is another cache
        list(fill_cache(cfg, vae))
    original = manifest.read_bytes()
    manifest.write_bytes((root / "changed.jsonl").read_bytes())
    try:
        with pytest.raises(UserError, match="00004"):
            LatentCache(tmp_path)
        encode(manifest, tmp_path, vae)
    finally:
        manifest.write_bytes(original)
    after = shards(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"00000.safetensors", "00004.safetensors"}


def test_pictures_and_videos_train_together(manifest, tmp_path, vae, capsys, monkeypatch):
    """All three programs on one manifest of videos of several shapes and a picture, run as a user would."""
    monkeypatch.chdir(ROOT)
    smaller = ["model.base_dim=4", "model.decoder_base_dim=4", "model.dim_mult=[1,1,1]"]
    data = [f"data.source={manifest}", "data.frames=[1,5,9]", "workers=0", "threads=1"]
    words = ["configs/vae/debug.yaml", *smaller, *data, f"out={tmp_path / 'vae'}", "steps=3", "batch=1", "eval_clips=1", "log_every=1"]
    train_vae.main(words)
    vae.save_pretrained(tmp_path / "tiny")
    known = [f"vae={tmp_path / 'tiny'}", "workers=0", "threads=1"]
    encode_program.main(["configs/cache/manifest.yaml", *data, *known, f"out={tmp_path / 'cache'}"])
    model = "model={in_channels: 4, out_channels: 4}"
    words = [
        "configs/dit/debug.yaml", *known, f"cache={tmp_path / 'cache'}", "encode=", "frames=[1,5,9]", "max_frames=9", "batch=2", model,
        "steps=7", "save_every=7", "sample_every=7", "samples=[{prompt: a cat, num_frames: 5}, {prompt: 猫, num_frames: 1}]", "log_every=1",
    ]  # fmt: skip
    train_dit.main([*words, f"out={tmp_path / 'dit'}"])
    said = capsys.readouterr().err
    assert "batches of 6 x 1 frames, each clip" in said and "batches of 3 x 5 frames" in said and "batches of 2 x 9 frames" in said
    for run, steps in (("vae", 3), ("dit", 7)):
        rows = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        losses = [row["loss"] for row in rows if "loss" in row]
        assert len(losses) == steps and all(math.isfinite(loss) for loss in losses)
    assert KlingPipeline.from_pretrained(tmp_path / "dit" / "export").config.max_frames == 9


def test_the_world_still_needs_a_number_of_clips_and_a_manifest_none(manifest, tmp_path, vae):
    with pytest.raises(UserError, match="manifest is encoded whole"):
        list(fill_cache(CacheConfig(out=str(tmp_path), clips=3, data=config(manifest)), vae))
    with pytest.raises(UserError, match="clips None"):
        list(fill_cache(CacheConfig(out=str(tmp_path)), vae))


def test_a_cache_may_have_more_pictures_than_clips_of_other_scenes(tmp_path, vae):
    """Short clips are cheap, so a cache may hold more of them, and a batch of them has as many tokens as a batch of long ones."""
    data = DataConfig(frames=[1, 5, 9])
    cfg = CacheConfig(out=str(tmp_path), clips=5, shorter={5: 5, 1: 20}, shard=3, workers=0, data=data)
    list(fill_cache(cfg, vae))
    cache = LatentCache(tmp_path)
    assert {str(b): len(c) for b, c in cache.clips.items() if b.aspect == "16:9"} == {"16:9 x 9": 3, "16:9 x 5": 3, "16:9 x 1": 12}
    steps = LatentSteps(cache, 2, [1, 5, 9], 0)
    batches = [steps[p] for p in range(4 * steps.per_epoch)]
    assert {b.latents.shape[2] for b in batches} == {1, 2, 3} and max(b.latents.shape[0] for b in batches) == 6
    first = {row.half().numpy().tobytes() for b in batches for row in b.latents[:, :, 0]}
    assert len(first) == len(cache), "all scenes differ"
    for wrong in ({7: 1}, {9: 1}):
        with pytest.raises(UserError, match=f"clips of {next(iter(wrong))} frames"):
            list(fill_cache(CacheConfig(out=str(tmp_path / "w"), clips=2, shorter=wrong, data=data), vae))
