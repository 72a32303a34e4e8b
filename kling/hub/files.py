"""Published safetensors: one file, or shards with an index. Names and shapes are read without the data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kling.errors import UserError
from kling.runtime.files import parse_object

Shapes = dict[str, tuple[int, ...]]


PICKLES = (".pth", ".pt", ".bin", ".ckpt")


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint: the file itself, the shards that an index names, or the model in a folder.

    Raises `UserError` for pickles, missing shards, and folders with no file, or with several and no index.
    """
    path = Path(path)
    if not path.is_dir():  # a file, nothing, or a pipe, which would be waited for
        if path.suffix in PICKLES:
            raise UserError(f"{path.name} is a pickle, which can run code when it is opened: get the safetensors of the same weights")
        if not path.is_file():
            raise UserError(f"weights '{path}' {'are no file' if path.exists() else 'do not exist'}: check the path")
        return [path]
    if indices := sorted(path.glob("*.safetensors.index.json")):
        try:
            names = sorted(set(parse_object(indices[0].read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"{indices[0]} is not readable: get it again") from None
        if missing := [name for name in names if not (path / name).is_file()]:
            raise UserError(f"{path} lacks {len(missing)} of its {len(names)} shards, '{missing[0]}' among them: get them again")
        return [path / name for name in names]
    files = sorted(path.glob("diffusion_pytorch_model*.safetensors")) or sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        pickles = [file.name for file in path.iterdir() if file.suffix in PICKLES]
        hint = f" (there is {pickles[0]}, a pickle: get the safetensors of the same weights)" if pickles and not files else ""
        raise UserError(f"{path} holds {len(files)} safetensors files and no index for them: give one file{hint}")
    return files


def read_shapes(path: str | Path) -> Shapes:
    """Every tensor's shape, read from the headers only."""
    return {name: tuple(file.get_slice(name).get_shape()) for file in _opened(path) for name in file.keys()}  # noqa: SIM118 - no dict


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor, memory-mapped."""
    return {name: file.get_tensor(name) for file in _opened(path) for name in file.keys()}  # noqa: SIM118 - no dict


def _opened(path: str | Path) -> Iterator[safe_open]:
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or no safetensors file ({error}): get it again") from None
