"""The latent cache: file format, detection of damage, cost of opening, and locking between processes."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import workers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kling.cache import fill, store
from kling.cache.batches import LatentSteps, mixed
from kling.cache.fill import fill_cache
from kling.cache.plan import CacheConfig, plan_shards
from kling.cache.store import LatentCache
from kling.data.buckets import Bucket
from kling.data.manifest import read_manifest
from kling.data.scan.listing import Listing
from kling.data.scan.scan import scan
from kling.data.source import ClipSource, DataConfig
from kling.data.video import write_video
from kling.errors import UserError, program
from kling.runtime.lock import locked
from kling.vae import AutoencoderKLKling
from tests.test_video import smooth

sys.path[:0] = [str(workers.ROOT / "train")]
import encode as encode_program  # noqa: E402

train_dit = workers.train_dit
BUCKET = Bucket("16:9", 5)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLKling:
    torch.manual_seed(0)
    return AutoencoderKLKling(**workers.TINY_VAE).eval()


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips of five frames with captions, and their manifest."""
    folder = tmp_path_factory.mktemp("films")
    for i in range(4):
        write_video(folder / f"{i}.mp4", smooth(6)[:, :36, : 64 - 4 * (i % 2)], 8)
        (folder / f"{i}.txt").write_text(f"film {i}\n\nein Film {i}", encoding="utf-8")
    list(scan(Listing().find([folder]), folder / "manifest.jsonl"))
    return folder


def config(films: Path, out: Path, **changes: Any) -> CacheConfig:
    data = DataConfig(source=str(films / "manifest.jsonl"), frames=[1, 5], aspects=["16:9"])
    return CacheConfig(**{"out": str(out), "shard": 2, "workers": 0, "data": data, **changes})


@pytest.fixture(scope="module")
def made(films: Path, vae: AutoencoderKLKling, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "cache"
    list(fill_cache(config(films, out), vae))
    return out


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))  # copy2 keeps the times


def flip(path: Path, at: float, keep_time: bool) -> None:
    """Flip one bit of a file, at the fraction `at` of its length."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_opening_hashes_nothing_and_a_copy_is_hashed_once_when_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = store.sha256
    monkeypatch.setattr(store, "sha256", lambda path: hashed.append(path.name) or real(path))
    for row in range(4):
        LatentCache(cache).batch(BUCKET, [row], 5)
    assert hashed == []
    for path in cache.glob("*.safetensors"):
        os.utime(path)  # what a copy without times leaves
    again = LatentCache(cache)
    assert hashed == []
    for row in (3, 0, 2, 1):
        again.batch(BUCKET, [row], 5)
    assert hashed == ["00001.safetensors", "00000.safetensors"]


@pytest.mark.parametrize("keep_time", [True, False])
@pytest.mark.parametrize("at", [0.01, 0.3, 0.6, 0.999])
def test_a_flipped_bit_is_noticed_at_the_first_read_and_remade_on_demand(
    cache: Path, films: Path, vae: AutoencoderKLKling, at: float, keep_time: bool
) -> None:
    good = (cache / "00001.safetensors").read_bytes()
    flip(cache / "00001.safetensors", at, keep_time)
    damaged = LatentCache(cache)
    damaged.batch(BUCKET, [0, 1], 5)
    with pytest.raises(UserError, match=r"00001.safetensors (has changed|cannot be read).*kling-encode with verify=true"):
        damaged.batch(BUCKET, [2, 3], 5)
    list(fill_cache(config(films, cache, verify=True), vae))
    assert (cache / "00001.safetensors").read_bytes() == good
    LatentCache(cache).batch(BUCKET, [2, 3], 5)


def test_what_is_missing_or_cut_is_named_at_the_start(cache: Path) -> None:
    path = cache / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="00001.safetensors has .* bytes, not"):
        LatentCache(cache)
    path.unlink()
    with pytest.raises(UserError, match="00001.safetensors is missing"):
        LatentCache(cache)
    (cache / "index.json").write_text("{}")
    with pytest.raises(UserError, match="index.json is not readable"):
        LatentCache(cache)


def as_before(cache: Path) -> None:
    """Convert the cache to its older format: rows in a file beside the shard, no checksums, no precision, no times."""
    index = json.loads((cache / "index.json").read_text())
    for name, entry in index["shards"].items():
        tensors, old = load_file(cache / name), LatentCache(cache)
        rows = list(old._shard(name).all_rows())
        save_file({key: t for key, t in tensors.items() if not key.startswith("row")}, cache / name)
        (cache / name).with_suffix(".json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        for key in ("precision", "longest"):
            entry.pop(key)
        entry |= {"bytes": (cache / name).stat().st_size, "sha256": store.sha256(cache / name)}
        (cache / "index.json").write_text(json.dumps(index, indent=1))
    (cache / "stamps.json").unlink()


def test_an_older_cache_is_read_and_checked_and_not_made_again(made: Path, cache: Path, films: Path, vae: AutoencoderKLKling) -> None:
    as_before(cache)
    new, old = LatentCache(made).batch(BUCKET, [3, 0], 5), LatentCache(cache).batch(BUCKET, [3, 0], 5)
    assert torch.equal(new.latents, old.latents) and new.captions == old.captions == [["film 3", "ein Film 3"], ["film 0", "ein Film 0"]]
    assert sorted(LatentCache(cache).captions()) == sorted(LatentCache(made).captions())
    times = {path.name: path.stat().st_mtime_ns for path in cache.glob("0*")}
    list(fill_cache(config(films, cache), vae, precision="bf16"))  # even if shards made today would have another precision
    assert times == {path.name: path.stat().st_mtime_ns for path in cache.glob("0*")}
    assert set(json.loads((cache / "stamps.json").read_text())) == {name for name in times if name.endswith("safetensors")}
    flip(cache / "00000.safetensors", 0.5, keep_time=False)
    with pytest.raises(UserError, match="00000.safetensors has changed"):
        LatentCache(cache).batch(BUCKET, [0], 5)


def test_a_cache_outlives_a_tuned_decoder_and_no_other_encoder(cache: Path, films: Path, vae: AutoencoderKLKling) -> None:
    """Latents do not depend on the decoder. A cache of an older version, whose key is over all weights, is still one of the same VAE's."""

    def keyed(weights: dict[str, torch.Tensor]) -> str:
        index = json.loads((cache / "index.json").read_text())
        parts = [json.dumps(index["settings"], sort_keys=True).encode()]
        for name in sorted(weights):
            parts += [name.encode(), weights[name].numpy().tobytes()]
        (cache / "index.json").write_text(json.dumps(index | {"key": (key := hashlib.sha256(b"".join(parts)).hexdigest())}))
        return key

    weights, times = vae.state_dict(), {path.name: path.stat().st_mtime_ns for path in cache.glob("0*")}
    tuned, other = copy.deepcopy(vae), copy.deepcopy(vae)
    with torch.no_grad():
        tuned.decoder.conv_out.bias += 0.1
        other.encoder.conv_in.bias += 0.1
    LatentCache(cache).check_vae(tuned)
    old = keyed(weights)
    with pytest.raises(UserError, match="made with another VAE"):
        LatentCache(cache).check_vae(tuned)
    LatentCache(cache).check_vae(vae)
    list(fill_cache(config(films, cache), vae))
    assert times == {path.name: path.stat().st_mtime_ns for path in cache.glob("0*")} and LatentCache(cache).key != old
    LatentCache(cache).check_vae(tuned)
    list(fill_cache(config(films, cache), tuned))
    with pytest.raises(UserError, match="made with another VAE"):
        LatentCache(cache).check_vae(other)
    with pytest.raises(UserError, match="with another VAE"):
        list(fill_cache(config(films, cache), other))
    assert times == {path.name: path.stat().st_mtime_ns for path in cache.glob("0*")}


def test_clips_encoded_together_equal_those_encoded_alone(films: Path, vae: AutoencoderKLKling, tmp_path: Path) -> None:
    caches = {}
    for name, changes, precision in (("together", {}, "fp32"), ("alone", {"shard": 1}, "fp32"), ("half", {}, "bf16")):
        list(fill_cache(config(films, tmp_path / name, **changes), vae, precision=precision))
        caches[name] = LatentCache(tmp_path / name).batch(BUCKET, [0, 1, 2, 3], 5)
    together, alone, half = (caches[name] for name in ("together", "alone", "half"))
    torch.testing.assert_close(together.latents, alone.latents, atol=4e-3, rtol=4e-3)  # both rounded to fp16
    torch.testing.assert_close(together.keyframes, alone.keyframes, atol=4e-3, rtol=4e-3)
    assert torch.equal(together.times, alone.times) and together.captions == alone.captions
    error = (half.latents - together.latents).norm() / together.latents.norm()
    assert 0 < error < 0.03
    index = json.loads((tmp_path / "half" / "index.json").read_text())
    assert {entry["precision"] for entry in index["shards"].values()} == {"bf16"} and "precision" not in index["settings"]


# ------------------------------------------------------------------------------------------------------------ what goes wrong


def encode_in(words: list[str], said: Path) -> None:
    """Run kling-encode with its standard error written to a file."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(workers.ROOT)
    encode_program.main(words)


def test_a_missing_clip_stops_kling_encode_by_name_or_is_skipped(
    films: Path, vae: AutoencoderKLKling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(workers.ROOT)
    root = Path(shutil.copytree(films, tmp_path / "films"))
    vae.save_pretrained(tmp_path / "vae")
    gone, kept = root / "3.mp4", tmp_path / "3.mp4"
    gone.rename(kept)
    data = [f"data.source={root / 'manifest.jsonl'}", "data.frames=[1,5]", "data.aspects=['16:9']", "shard=1", f"out={tmp_path / 'cache'}"]
    words = ["configs/cache/manifest.yaml", *data, f"vae={tmp_path / 'vae'}", "threads=1", "mixed_precision=fp32"]

    process = workers.PROCESSES.Process(target=encode_in, args=([*words, "workers=1"], tmp_path / "said"))
    process.start()  # in its own process, with its worker: it must end
    process.join(120)
    ended = not process.is_alive()
    process.kill()
    text = (tmp_path / "said").read_text()
    said = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert ended and process.exitcode == 2 and len(said) == 1 and "Traceback" not in text
    assert "3.mp4" in said[0] and "skip_missing=true" in said[0]
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    assert len(done) == 3

    encode_program.main([*words, "workers=0", "skip_missing=true"])
    assert "1 clips are left out" in capsys.readouterr().err
    assert len(LatentCache(tmp_path / "cache")) == 3
    assert done == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    with pytest.raises(SystemExit) as stop:
        encode_program.main([*words, "workers=0"])  # it is still wanted
    assert stop.value.code == 2
    kept.rename(gone)
    encode_program.main([*words, "workers=0"])
    assert (
        len(LatentCache(tmp_path / "cache")) == 4
        and done.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}.items()
    )


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")]
)
def test_a_full_disk_is_one_line_and_leaves_nothing_unfinished(
    films: Path, vae: AutoencoderKLKling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real, calls = fill.save_file, []

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise error
        real(tensors, path)

    monkeypatch.setattr(fill, "save_file", full)
    with pytest.raises(UserError, match="00001.safetensors cannot be written .*No space left"):
        list(fill_cache(config(films, tmp_path), vae))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.safetensors", "index.0.json"]
    list(fill_cache(config(films, tmp_path), vae))
    assert len(calls) == 3 and len(LatentCache(tmp_path)) == 4


def test_any_program_reports_a_full_disk_in_one_line(capsys: pytest.CaptureFixture) -> None:
    @program
    def main(argv: list[str] | None) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: runs/x/metrics.jsonl was not written (No space left on device): free space there\n"


@pytest.mark.parametrize("code", [errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.EISDIR])
def test_any_program_reports_a_file_that_cannot_be_used_in_one_line(code: int, capsys: pytest.CaptureFixture) -> None:
    @program
    def main(argv: list[str] | None = None) -> None:
        raise OSError(code, os.strerror(code), "runs/x")

    with pytest.raises(SystemExit, match="2"):
        main()
    line = capsys.readouterr().err
    assert line.startswith("error: runs/x ") and line.count("\n") == 1 and os.strerror(code) in line


TERMINATED = """
import os, sys, time
from pathlib import Path
from kling.errors import program
from kling.runtime.files import written

@program
def main(argv=None):
    with written(sys.argv[1]) as temporary:
        temporary.write_text("half")
        print("writing", flush=True)
        time.sleep(60)

main()
"""


def test_sigterm_leaves_nothing_half_written(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", TERMINATED, tmp_path / "out.txt"], stdout=subprocess.PIPE, cwd=workers.ROOT)
    assert process.stdout.readline() == b"writing\n"
    process.terminate()
    assert process.wait(timeout=60) == 143 and not list(tmp_path.iterdir())


HANGS = """
import sys, time
from pathlib import Path
from torch.utils.data import Dataset
from kling.data.source import batches
from kling.errors import UserError, program

class Items(Dataset):
    def __getitem__(self, i):
        if i == 1 and sys.argv[1] == "in the worker":
            raise UserError("clip 1 is gone: bring it back")
        return i

@program
def main(argv=None):
    for i in batches(Items(), 0, 100, 1):
        if i == 1 and sys.argv[1] == "in the loop":
            raise UserError("clip 1 is gone: bring it back")
        if i == 1 and sys.argv[1] == "a bug":
            raise RuntimeError("a bug")

main()
"""


@pytest.mark.slow
def test_a_program_with_workers_ends_however_it_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(HANGS)
    codes = {"in the worker": 2, "in the loop": 2, "a bug": 1, "nowhere": 0}
    started = {
        where: subprocess.Popen([sys.executable, tmp_path / "program.py", where], stderr=subprocess.PIPE, text=True, cwd=workers.ROOT)
        for where in codes
    }
    for where, process in started.items():
        try:
            _, said = process.communicate(timeout=90)
        finally:
            process.kill()
        assert process.returncode == codes[where], said
        if codes[where] == 2:
            assert said.splitlines()[-1] == "error: clip 1 is gone: bring it back" and "Traceback" not in said


# ------------------------------------------------------------------------------------------------------------------- locks


HOLDS = """
import sys, time
from kling.runtime.lock import locked
with locked(sys.argv[1], "run"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_locked_until_its_run_ends_however_it_ends(tmp_path: Path) -> None:
    (tmp_path / "holds.py").write_text(HOLDS)
    folder = tmp_path / "run"
    for ending in (signal.SIGKILL,):
        other = subprocess.Popen([sys.executable, tmp_path / "holds.py", folder], stdout=subprocess.PIPE, cwd=workers.ROOT)
        try:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match=rf"run {folder} is in use by process {other.pid} on {os.uname().nodename}"), locked(folder):
                pass
        finally:
            other.send_signal(ending)
            other.wait()
        with locked(folder), locked(folder):  # a stale lock file is no obstacle, and a process may lock twice
            second = subprocess.run(
                [sys.executable, tmp_path / "holds.py", folder], capture_output=True, text=True, cwd=workers.ROOT, timeout=60
            )
            assert f"in use by process {os.getpid()}" in second.stderr
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path / "holds.py"):
        pass


def test_two_trainings_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workers.ROOT)
    (tmp_path / "holds.py").write_text(HOLDS)
    other = subprocess.Popen([sys.executable, tmp_path / "holds.py", tmp_path / "run"], stdout=subprocess.PIPE, cwd=workers.ROOT)
    try:
        other.stdout.readline()
        programs = {
            "train_dit": workers.debug_words(tmp_path, "steps=1"),
            "train_vae": ["configs/vae/debug.yaml", "workers=0"],
            "train_text": ["configs/text/world.yaml", "workers=0"],
            "encode": ["configs/cache/debug.yaml", "workers=0"],
        }
        for name, words in programs.items():
            with pytest.raises(SystemExit) as stop:
                __import__(name).main([*words, "mixed_precision=fp32", f"out={tmp_path / 'run'}"])
            assert stop.value.code == 2 and f"in use by process {other.pid}" in capsys.readouterr().err, name
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    finally:
        other.kill()
        other.wait()


# ------------------------------------------------------------------------------------------------ what training refuses before step 1


@pytest.fixture(scope="module")
def words(films: Path, made: Path, vae: AutoencoderKLKling, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("words")
    vae.save_pretrained(folder / "vae")
    return [
        "configs/dit/debug.yaml", "frames=[1,5]", "max_frames=5", "workers=0", "sample_every=0", "samples=[]", "mixed_precision=fp32",
        "threads=1", f"vae={folder / 'vae'}", f"cache={made}", "encode=", "batch=1", "steps=2", "save_every=10",
    ]  # fmt: skip


def refused(words: list[str], capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_dit.main(words)
    assert stop.value.code == 2
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))


def test_a_custom_cache_is_distinguished_from_the_presets(
    words: list[str], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workers.ROOT)
    before = (made / "index.json").read_bytes()
    said = refused([*words, "encode=cache/world.yaml", f"out={tmp_path / 'a'}"], capsys)
    assert "was made with other settings" in said and "data.source" in said and "set encode=" in said and "delete" not in said
    assert (made / "index.json").read_bytes() == before
    for name in ("0.1b", "1.3b", "5b", "14b", "own", "wan"):
        assert train_dit.load_config(train_dit.TrainDiTConfig, f"dit/{name}.yaml").encode == "", name
    train_dit.main([*words, f"out={tmp_path / 'b'}"])


def test_lengths_without_an_encoded_last_frame_are_refused_if_tasks_append_it(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workers.ROOT)
    for tasks in ("{last: 1}", "{text: 1, keyframes: 0.1}", "{first_last: 1}"):
        made = next(word for word in words if word.startswith("cache=")).removeprefix("cache=")
        nine = Path(shutil.copytree(made, tmp_path / tasks))
        index = json.loads((nine / "index.json").read_text())
        index["settings"]["data"]["frames"] = [1, 9]  # as if 9 had been asked for, and 5 not
        (nine / "index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"frames 5 with tasks that append a keyframe.* keeps last frames of \[1, 9\] only"):
            LatentCache(nine).check_lengths([1, 5])
        LatentCache(nine).check_lengths([1, 9])
        monkeypatch.setattr(LatentCache, "check_vae", lambda *_: None)
        said = refused([*words, f"cache={nine}", f"tasks={tasks}", f"out={tmp_path / 'x'}"], capsys)
        assert "keeps last frames of [1, 9] only" in said


def test_a_too_long_caption_is_reported_before_the_first_step(
    words: list[str], films: Path, vae: AutoencoderKLKling, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workers.ROOT)
    root = Path(shutil.copytree(films, tmp_path / "films"))
    (root / "2.txt").write_text("猫" * 90, encoding="utf-8")  # 270 bytes
    list(scan(Listing().find([root]), root / "manifest.jsonl"))
    list(fill_cache(config(root, tmp_path / "cache"), vae))
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert [entry["longest"] for entry in index["shards"].values()] == [len("ein Film 0"), 270]
    words = [*words, f"cache={tmp_path / 'cache'}", "steps=8"]
    said = refused([*words, f"out={tmp_path / 'run'}"], capsys)
    assert "1 clips of latent cache" in said and "2.mp4" in said and "270 bytes" in said and "long_captions=cut" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    as_before(tmp_path / "cache")  # an older cache does not record the length of captions, so all are checked
    assert "2.mp4" in refused([*words, f"out={tmp_path / 'old'}"], capsys)
    train_dit.main([*words, f"out={tmp_path / 'run'}", "long_captions=cut"])
    with pytest.raises(SystemExit):
        train_dit.main([*words, f"out={tmp_path / 'odd'}", "long_captions=maybe"])
    text = __import__("train_text")
    preset = [
        "configs/text/world.yaml",
        f"data.source={root / 'manifest.jsonl'}",
        "data.frames=[1,5]",
        "workers=0",
        "steps=1",
        "batch=4",
        "mixed_precision=fp32",
    ]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        text.main([*preset, f"out={tmp_path / 'text'}"])
    assert stop.value.code == 2 and "2.mp4" in capsys.readouterr().err
    text.main([*preset, f"out={tmp_path / 'text'}", "long_captions=cut"])


@pytest.mark.parametrize("prompt", ["a red ball rolls left on grass", "猫" * 100, "x" * 400, "héé " * 80, "", "ß🙂" * 60])
@pytest.mark.parametrize("most", [7, 20, 255])
def test_a_cut_prompt_fits_and_is_a_prefix_of_whole_characters(prompt: str, most: int) -> None:
    from kling.text.encoder import cut_prompt, prompt_bytes

    cut = cut_prompt(prompt, most)
    data = prompt_bytes(prompt)
    assert len(prompt_bytes(cut)) <= most and data.startswith(prompt_bytes(cut))
    assert len(prompt_bytes(cut)) >= min(len(data), most // 2 - 4) and (len(data) > most or cut == prompt)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_storyboards_are_the_asked_share_and_every_clip_is_there(share: float) -> None:
    storyboards, others = [2, 3, 11, 17], set(range(20)) - {2, 3, 11, 17}
    numbers = Counter(map(int, mixed(20, storyboards, share)))
    told = sum(numbers[i] for i in storyboards) / numbers.total()
    assert told == pytest.approx(share, abs=0.03) and numbers.keys() == (others if share < 1 else set()) | set(storyboards if share else [])
    for kind in (storyboards, others):
        assert max(numbers[i] for i in kind) - min(numbers[i] for i in kind) <= 1, "all of a kind equally often"
    assert list(mixed(20, [], share)) == list(range(20)) and list(mixed(3, [0, 1, 2], 0.5)) == [0, 1, 2]


def test_clips_of_the_world_are_divided_as_the_settings_say() -> None:
    def counts(aspects: list[str], shares: list[float] | None = None) -> list[int]:
        cfg = CacheConfig(clips=100, shares=shares, data=DataConfig(source="world", frames=[5], aspects=aspects))
        found = Counter({aspect: 0 for aspect in aspects})
        for shard in plan_shards(cfg, ClipSource(cfg.data, 0)):
            found[shard.bucket.aspect] += len(shard.numbers)
        return list(found.values())

    assert counts(["16:9", "9:16", "1:1"]) == [60, 20, 20] and counts(["16:9"]) == [100] and counts(["16:9", "1:1"]) == [50, 50]
    assert counts(["16:9", "1:1"], [1.0, 3.0]) == [25, 75]
    with pytest.raises(UserError, match="all aspects a share"):
        counts(["16:9"], [1.0, 1.0])


# ------------------------------------------------------------------------------------------------------------------- large ones


def large_index(folder: Path, clips: int, shard: int = 50) -> None:
    """The index of a cache of `clips` clips, a quarter of the longer ones storyboards, and empty files of the right size."""
    shards, stamps = {}, {}
    buckets = [(aspect, frames) for aspect in ("16:9", "9:16", "1:1") for frames in (1, 17, 41, 81)]
    for i in range(clips // shard):
        name, (aspect, frames) = f"{i:05d}.safetensors", buckets[i % len(buckets)]
        with (folder / name).open("wb") as file:
            file.truncate(4096)
        shards[name] = {"clips": shard, "aspect": aspect, "frames": frames, "digest": "0" * 64, "bytes": 4096, "sha256": "0" * 64,
                        "precision": "bf16", "longest": 200}  # fmt: skip
        shards[name] |= {"shots": list(range(shard))} if frames > 1 and i // len(buckets) % 4 == 3 else {}
        stamps[name] = (folder / name).stat().st_mtime_ns
    settings = {"data": {"source": "m.jsonl", "frames": [1, 17, 41, 81]}, "seed": 0, "shard": shard}
    (folder / "index.json").write_text(json.dumps({"key": "0", "settings": settings, "shards": shards}, indent=1))
    (folder / "stamps.json").write_text(json.dumps(stamps))


def start_on(folder: str, pipe: Any) -> None:
    """The steps of a training before its first batch: open, check, plan, find the first places of its ranks."""
    import resource

    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    began = time.process_time()  # other processes do not count
    cache = LatentCache(folder)
    cache.check_lengths([1, 17, 41, 81])
    assert not list(cache.long_captions(255))
    steps = LatentSteps(cache, 1, [1, 17, 41, 81], 0, 64, shots=0.3)
    first = [steps.epochs[place][2] for place in range(64)]
    steps.epochs.report()
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    pipe.send((seconds, peak, len(cache), len(set(first))))


@pytest.mark.slow
def test_a_run_on_two_million_clips_starts_in_seconds(tmp_path: Path) -> None:
    large_index(tmp_path, 2_000_000)
    ours, theirs = workers.PROCESSES.Pipe()
    process = workers.PROCESSES.Process(target=start_on, args=(str(tmp_path), theirs))
    process.start()
    seconds, peak, clips, shapes = ours.recv()
    process.join()
    print(f"start on {clips} clips: {seconds:.1f} s, {peak / 2**20:.0f} MiB")
    assert clips == 2_000_000 and shapes == 1 and seconds < 10 and peak < 2**30


@pytest.mark.slow
def test_from_own_videos_to_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of docs/own-videos.md, on six clips and for two steps, each in its own process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "VIDEOS").mkdir()
    for i in range(6):
        write_video(tmp_path / "VIDEOS" / f"{i}.mp4", smooth(20), 8)
        (tmp_path / "VIDEOS" / f"{i}.txt").write_text(f"colours that move, number {i}")

    def run(*words: str) -> str:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([Path(sys.executable).with_name(words[0]), *words[1:]], capture_output=True, text=True, timeout=400, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr

    run("kling-data", "scan", "VIDEOS", "--out", "cats/manifest.jsonl")
    assert len(read_manifest("cats/manifest.jsonl")) == 6
    run("kling-encode", "configs/cache/manifest.yaml", "data.source=cats/manifest.jsonl", "out=runs/cats")
    run("kling-train", "configs/dit/own.yaml", "cache=runs/cats", "out=runs/cats-dit", "steps=2", "batch=2")
    run("kling-sample", "colours that move", "--model", "runs/cats-dit/export", "--output", "cat.mp4")
    assert (tmp_path / "cat.mp4").stat().st_size > 1000
