"""Checkpoints of several processes, in the background, with kills, full disks and malicious files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import workers
from safetensors.torch import save_file
from torch import Tensor, nn

from kling.errors import UserError
from kling.runtime import checkpoint, saver
from kling.runtime.checkpoint import Rows, load, load_latest, restore
from kling.runtime.saver import Saver
from kling.training.loop import run_tensors


def group(value: float, n: int = 64) -> dict[str, dict[str, Tensor]]:
    return {"model": {"w": torch.full((n, 3), value), "b": torch.tensor(value)}, "ema": {"w": torch.full((n,), value)}}


def test_rows_of_several_files_are_one_tensor(tmp_path: Path) -> None:
    whole = torch.arange(7 * 2.0).view(7, 2)
    cuts = [(0, 3), (3, 5), (5, 7)]
    for rank, (a, b) in enumerate(cuts):
        extra = {"scalar": torch.tensor(4.0)} if rank == 0 else {}
        save_file({"w": whole[a:b].contiguous(), **extra}, tmp_path / f"model.{rank:05d}.safetensors")
    rows = Rows(tmp_path.glob("*.safetensors"))
    assert torch.equal(rows["w"], whole) and rows.shape("w") == whole.shape and rows.shape("scalar") == ()
    assert all(torch.equal(rows.part("w", a, b), whole[a:b]) for a in range(7) for b in range(a + 1, 8))
    into = {"w": torch.zeros(7, 2), "scalar": torch.zeros(())}
    restore(rows, into)
    assert torch.equal(into["w"], whole) and into["scalar"] == 4
    with pytest.raises(UserError, match="'w' has shape .7, 2. in the checkpoint, the model's has .6, 2."):
        restore(rows, into | {"w": torch.zeros(6, 2)})
    with pytest.raises(UserError, match="'v' is not in the checkpoint"):
        restore(rows, into | {"v": torch.zeros(1)})


def test_a_background_save_keeps_the_weights_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = checkpoint.write
    monkeypatch.setattr(saver, "write", lambda *args: (gate.wait(10), real(*args))[1])
    tensors, saves = group(1.0), Saver(tmp_path)
    saves.save(1, tensors)
    tensors["model"]["w"].fill_(2.0)  # training goes on
    assert load_latest(tmp_path) is None
    gate.set()
    saves.wait()
    assert (load_latest(tmp_path).tensors["model"]["w"] == 1).all()  # type: ignore[union-attr]


def test_processes_write_parts_and_the_main_one_waits_for_all(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)
    saves = [
        Saver(tmp_path, accelerator=SimpleNamespace(process_index=r, num_processes=2, wait_for_everyone=barrier.wait))  # type: ignore[arg-type]
        for r in (0, 1)
    ]
    late = threading.Thread(target=lambda: (saves[1].save(3, group(3.0)), saves[1].wait()))
    late.start()
    saves[0].save(3, group(3.0), {"places": 9})
    saves[0].wait()
    late.join()
    found = load_latest(tmp_path)
    assert found is not None and found.meta == {"places": 9} and (found.tensors["model"]["w"] == 3).all()
    assert not list(tmp_path.rglob("part-*.json"))


@pytest.mark.parametrize("damaged", [False, True])
def test_all_processes_open_the_folder_that_the_main_one_found(damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a kill came while the same step was saved again: its first folder is left, under another name."""
    checkpoint.save(tmp_path, 3, group(3.0))
    if damaged:
        shutil.copytree(tmp_path / "step-00000003", tmp_path / "step-00000003.old")
        (tmp_path / "step-00000003" / "model.safetensors").write_bytes(b"")
    else:
        (tmp_path / "step-00000003").rename(tmp_path / "step-00000003.old")
    told: list[int] = []
    for main in (True, False):
        monkeypatch.setattr(saver, "same_for_all", lambda _, number, main=main: told.append(number) or number if main else told.pop(0))
        found = saver.find_latest(SimpleNamespace(is_main_process=main), tmp_path)  # type: ignore[arg-type]
        assert found is not None and found.step == 3 and (found.tensors["model"]["w"] == 3).all()


def test_milestones_are_kept(tmp_path: Path) -> None:
    saves = Saver(tmp_path, keep_last=2, keep_every=10, background=False)
    for step in range(5, 40, 5):
        saves.save(step, group(step))
    assert sorted(int(p.name[5:]) for p in tmp_path.glob("step-*")) == [10, 20, 30, 35]


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    saves, bad = Saver(tmp_path), group(1.0)
    saves.save(1, group(1.0))
    bad["ema"]["w"][5] = torch.nan
    with pytest.raises(UserError, match="ema 'w' is not finite"):
        saves.save(2, bad)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000001"]


def test_every_file_of_a_checkpoint_is_verified(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [p.name for p in checkpoint.save(tmp_path / "0", 2, group(2.0), {"a": 1}).iterdir()]
    assert sorted(names) == ["ema.safetensors", "manifest.json", "meta.json", "model.safetensors"]
    for name in names:
        run = tmp_path / name
        checkpoint.save(run, 1, group(1.0))
        path = checkpoint.save(run, 2, group(2.0), {"a": 1}) / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(bytes(data))
        with pytest.raises(UserError, match=name):
            load(path.parent)
        assert load_latest(run).step == 1 and name in caplog.text  # type: ignore[union-attr]


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_planted_pickle_is_never_executed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, group(1.0))
    folder = checkpoint.save(tmp_path, 2, group(2.0))
    payload = pickle.dumps(Bomb(tmp_path / "exploded"))
    (folder / "model.pt").write_bytes(payload)  # beside the others
    (folder / "model.safetensors").write_bytes(payload)  # in the place of one, with a manifest that vouches for it
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert load_latest(tmp_path).step == 1 and not (tmp_path / "exploded").exists()  # type: ignore[union-attr]
    pickle.loads(payload)
    assert (tmp_path / "exploded").exists(), "the payload works"


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """On a real file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        saves = Saver(disk / "run", background=True)
        saves.save(1, group(1.0))
        saves.save(2, group(2.0, n=10**6))
        with pytest.raises(UserError, match="step-00000002 was not written .*older ones are untouched"):
            saves.wait()
        assert load_latest(disk / "run").step == 1 and not list((disk / "run").glob("*.tmp"))  # type: ignore[union-attr]
        saves.save(3, group(3.0))
        saves.wait()
        assert load_latest(disk / "run").step == 3  # type: ignore[union-attr]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "error", [UserError("a"), RuntimeError("b"), MemoryError("c"), KeyError("d")], ids=lambda error: type(error).__name__
)
def test_every_error_in_the_background_is_raised(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise error

    saves = Saver(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(saver, "write", fails)
        saves.save(1, group(1.0))
        with pytest.raises(type(error)) as found:
            saves.wait()
    assert found.value is error
    saves.check()  # once
    saves.save(2, group(2.0))
    saves.wait()
    assert load_latest(tmp_path).step == 2  # type: ignore[union-attr]


def pointed(run: Path) -> int:
    """The step that `latest` names."""
    return int((run / "latest").read_text()[5:]) if (run / "latest").exists() else 0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_inside_saves_leave_a_readable_checkpoint(kills: int, tmp_path: Path) -> None:
    """Twelve files per save, kill -9 at a random moment in it: the checkpoint named by `latest` is complete every time."""
    rng, inside, step = random.Random(0), 0, 0
    for _ in range(kills):
        process = workers.PROCESSES.Process(target=workers.save_for_ever, args=(str(tmp_path), step + 1))
        process.start()
        while pointed(tmp_path) <= step:
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)
        while not list(tmp_path.glob("*.tmp")):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        inside += bool(list(tmp_path.glob("*.tmp")))
        found = load(tmp_path / f"step-{pointed(tmp_path):08d}")  # itself, not one before it
        assert found.step >= step + 1 and len(found.tensors) == 12
        assert all((rows["w"] == found.step).all() for rows in found.tensors.values())
        step = found.step
    print(f"{inside} of {kills} kills were inside a save")
    assert inside >= 0.8 * kills


def weights(run: Path) -> dict[str, Tensor]:
    saved = load_latest(run)
    assert saved is not None
    return {f"{name}/{key}": rows[key] for name, rows in saved.tensors.items() for key in rows}


def saving(run: Path, since: int) -> bool:
    """Whether a save that began after the moment `since` (ns) is running; saves interrupted by an earlier kill do not count."""
    for path in run.glob("*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir() and path.stat().st_ctime_ns > since:
                return True
    return False


def steps_of(run: Path) -> int:
    """Number of updates that a run has logged."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return workers.debug_words(tmp_path_factory.mktemp("parts"), "batch=1", "save_every=2", "steps=16")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_repeatedly_killed_run_ends_as_if_uninterrupted(kills: int, words: list[str], tmp_path: Path) -> None:
    survives(kills, words, tmp_path)


def survives(kills: int, words: list[str], tmp_path: Path) -> None:
    """kill -9 at random moments, two in five of them inside a save: final weights, averages and optimizers are bit-equal."""
    workers.main([*words, f"out={tmp_path / 'straight'}"])
    rng, killed, inside, run = random.Random(1), 0, 0, tmp_path / "killed"
    reference = weights(tmp_path / "straight")
    while killed < kills:
        before, more, in_save = steps_of(run), rng.randint(0, 3), killed % 5 < 2
        began = time.time_ns()
        process = workers.start([*words, f"out={run}"])
        while process.is_alive():
            if saving(run, began) if in_save else steps_of(run) >= before + more:
                time.sleep(0 if in_save else rng.uniform(0, 0.1))
                process.kill()
                process.join()
                killed, inside = killed + 1, inside + saving(run, began)
                break
            time.sleep(0.002)
        process.join()
        if process.exitcode == 0:  # it finished: start another run of the same kind
            assert all(torch.equal(t, reference[key]) for key, t in weights(run).items())
            shutil.rmtree(run)
    workers.main([*words, f"out={run}"])
    ours = weights(run)
    assert ours.keys() == reference.keys() and all(torch.equal(ours[key], reference[key]) for key in ours)
    print(f"{killed} kills, {inside} of them inside a save")
    assert inside >= 0.4 * kills


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_saves_and_exits_143(number: signal.Signals, words: list[str], tmp_path: Path) -> None:
    process = workers.start([*words, "steps=100000", f"out={tmp_path}"])
    while not (tmp_path / "config.yaml").exists():  # written just before the loop
        assert process.is_alive()
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == 143
    saved = load_latest(tmp_path)
    assert saved is not None and saved.step >= 1
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == list(range(1, saved.step + 1))


def test_a_signal_while_caching_ends_after_a_shard_and_caching_resumes(words: list[str], tmp_path: Path) -> None:
    encode = tmp_path / "encode.yaml"
    encode.write_text("{clips: 60, shard: 1, workers: 0, data: {frames: [1, 5]}}")
    words = [*words, f"encode={encode}", f"cache={tmp_path / 'cache'}", f"out={tmp_path / 'run'}", "steps=1"]
    process = workers.start(words)
    while not list((tmp_path / "cache").glob("*.safetensors")):
        assert process.is_alive()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    assert process.exitcode == 143 and 1 <= len(made) < 60 and not (tmp_path / "cache" / "index.json").exists()
    assert workers.run(words, workers.environment("ddp", 2)) == [0, 0]  # two processes share what is left
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    assert len(after) == 60 and made.items() <= after.items(), "what was made is not made again"
    assert load_latest(tmp_path / "run").step == 1  # type: ignore[union-attr]


def test_a_critic_is_saved_without_an_average() -> None:
    """`run_tensors` of a model without an average; the VAE's discriminator is saved this way."""
    model = nn.Linear(2, 2)
    groups = run_tensors(model, torch.optim.AdamW(model.parameters()), prefix="critic_")
    assert set(groups) == {"critic_model", "critic_optimizer"} and not groups["critic_optimizer"]
