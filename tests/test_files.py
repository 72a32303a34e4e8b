"""Writing files: with the user's umask, atomically, and with a one-line error if the disk is full."""

from __future__ import annotations

import io
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_wan
import torch
from safetensors.torch import load_file, save_file

from kling.cache.fill import fill_cache
from kling.cache.plan import CacheConfig
from kling.config import load_config
from kling.errors import UserError
from kling.hub.export import export_weights
from kling.runtime import checkpoint
from kling.runtime.files import DEEPEST, as_umask, parse_json, written, written_folder
from kling.runtime.log import RunLog, finished, read_metrics
from kling.vae import AutoencoderKLKling

WAN: list[Path] = []  # a transformer to export
BIG = {"x": torch.zeros(1 << 18)}  # a MiB


@pytest.fixture(scope="module", autouse=True)
def wan(tmp_path_factory: pytest.TempPathFactory) -> None:
    WAN[:] = [tmp_path_factory.mktemp("wan")]
    tiny_wan.transformer().save_pretrained(WAN[0])


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """A disk on which no file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def a_vae() -> AutoencoderKLKling:
    return AutoencoderKLKling(base_dim=16, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def latents(place: Path) -> None:
    with written(place / "latents.safetensors") as temporary:
        save_file(BIG, temporary)


def a_text(place: Path) -> None:
    with written(place / "long.json") as temporary:
        temporary.write_text("x" * (1 << 20))


def a_model(place: Path) -> None:
    with written_folder(place / "export") as temporary:
        a_vae().save_pretrained(temporary)


def an_export(place: Path) -> None:
    export_weights(WAN[0], place / "other", "original")


def a_cache(place: Path) -> None:
    cfg = load_config(CacheConfig, None, [f"out={place / 'cache'}", "clips=3", "data.frames=[1]", "workers=0"])
    list(fill_cache(cfg, a_vae()))


def a_checkpoint(place: Path) -> None:
    with checkpoint.disk_errors(place, 1):
        checkpoint.begin(place, 1)
        files = checkpoint.write(place, 1, {"model": BIG})
        checkpoint.finish(place, 1, files, {}, keep_last=1)


WRITERS: dict[str, Callable[[Path], None]] = {f.__name__: f for f in (latents, a_text, a_model, an_export, a_cache, a_checkpoint)}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_are_made_with_the_users_umask(writer: str, umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        WRITERS[writer](tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes and set(modes.values()) == {0o666 & ~umask}, modes


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_nothing(writer: str, tmp_path: Path) -> None:
    with full_after(1024), pytest.raises(UserError, match="too large|written") as error:
        WRITERS[writer](tmp_path)
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    WRITERS[writer](tmp_path)  # and later there is room
    assert [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    with written(tmp_path / "latents.safetensors") as temporary:
        save_file({"x": torch.ones(3)}, temporary)
    with full_after(4096), pytest.raises(UserError):
        latents(tmp_path)
    assert load_file(tmp_path / "latents.safetensors")["x"].tolist() == [1, 1, 1]


def test_other_errors_inside_a_block_are_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), written(tmp_path / "a"):
        (tmp_path / "nowhere").read_text()
    with pytest.raises(KeyError), written_folder(tmp_path / "b"):
        raise KeyError("x")
    assert not list(tmp_path.iterdir())


def test_metrics_on_a_full_disk_are_whole_lines(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 1000, log_every=1, stream=io.StringIO())
    with full_after(4096), pytest.raises(UserError, match="metrics.jsonl cannot be written"):
        for step in range(1, 1000):
            log.log(step, {"loss": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("}\n") and 3900 < len(text) <= 4096
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
    log.log(last + 1, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, last + 2))


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    assert finished(0, 20, tmp_path) == f"finished: 20 steps, the model is in {tmp_path}"
    assert finished(20, 20, tmp_path).startswith("already finished: 20 of 20 steps") and "steps=" in finished(20, 20, tmp_path)


def test_the_temporary_files_of_other_processes_may_vanish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them write into the folder of one checkpoint, and each sets the modes there."""
    for name in ("a.safetensors", ".theirs.part"):
        (tmp_path / name).touch(mode=0o600)
    real = Path.is_symlink

    def then_gone(path: Path) -> bool:
        found = real(path)
        if path.suffix == ".part":
            path.unlink()
        return found

    monkeypatch.setattr(Path, "is_symlink", then_gone)
    as_umask(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_json_may_nest_to_a_limit() -> None:
    assert parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]} and parse_json("3") == 3
    for depth in (DEEPEST + 1, 900, 100_000):
        with pytest.raises(ValueError, match="nested"):
            parse_json("[" * depth + "]" * depth)
