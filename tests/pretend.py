"""A CUDA device that is not there: tensors that say they lie on "cuda" and hold their numbers on the CPU.

Everything runs as it would on a GPU and gives the CPU's numbers, but an operation that mixes tensors of both devices fails as it would
there, and every time that the host waits for the device is written down with the line of ours that made it.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

ROOT = str(Path(__file__).parents[1])
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
# operations whose result, or its shape, the host must know before it goes on
WAITS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "_unique2", "unique_dim", "unique_consecutive", "masked_select",
    "argwhere", "bincount", "histc",
}  # fmt: skip


class Pretended(Tensor):
    """A tensor of the device that is not there. `held`: its numbers. To the C++ side it lies on "meta", since a PyTorch without CUDA
    refuses gradients of "cuda"."""

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device="meta"
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What a PyTorch without CUDA refuses before it dispatches."""
        own = {Tensor.to: to, Tensor.tolist: lambda x: x.cpu().tolist()}.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            return (own or func)(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if Device.current is None:
            raise RuntimeError(f"{func} on a device that is gone")
        return Device.current.run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Where "cuda" is. `waits`: (what, where in our code) of every time that the host waited for it."""

    current: Device | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[str, str]] = []
        self.pinned: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def __enter__(self) -> Device:
        Device.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Device.current = None

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.removeprefix("aten::")
        flat, _ = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, Tensor)]
        there = [x for x in tensors if isinstance(x, Pretended)]
        here = [x for x in tensors if not isinstance(x, Pretended)]
        asked = kwargs.get("device")
        target = CUDA if asked is not None and torch.device(asked).type in ("cuda", "meta") else None
        if name == "_pin_memory":
            out = args[0].clone()
            self.pinned.add(out.data_ptr())
            return out
        if name == "is_pinned":
            return args[0].data_ptr() in self.pinned
        if name == "_fused_sdp_choice":
            return 0  # plain operations, which any device has
        if name == "record_stream":
            return None
        moves = name in ("_to_copy", "copy_", "set_") or name.startswith("_foreach_copy")
        self.note(name, func, args, kwargs, there, here, asked)
        if there and here and not moves:
            for x in here:
                index = name.startswith(("index", "_index", "_unsafe_index")) or name == "_foreach_add_"
                if x.ndim > 0 and not index:
                    raise RuntimeError(f"{func}: a CPU tensor {tuple(x.shape)} meets a CUDA one at {where()}")
                if x.ndim > 0:
                    self.wait(f"{name} with a CPU index")
        if name == "_pin_memory" or (target is None and asked is None and not there):
            return func(*args, **kwargs)
        if target is not None or asked is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if name == "_to_copy" and kwargs.pop("non_blocking", False):
            pass
        kwargs.pop("pin_memory", None)
        plain_args, plain_kwargs = tree_map(lambda x: x.held if isinstance(x, Pretended) else x, (args, kwargs))
        with nullcontext():
            out = func(*plain_args, **plain_kwargs)
        if name == "copy_":
            return args[0]
        goes_back = name == "_to_copy" and asked is not None and target is None
        if goes_back:  # a copy on the CPU
            return out
        if name == "_to_copy" and target is not None and not there:
            out = out.clone() if out is plain_args[0] else out
        written = {id(p): o for p, o in zip(tree_leaves((plain_args, plain_kwargs)), flat, strict=False) if isinstance(p, Tensor)}
        if not there and target is None:
            return out
        return tree_map(lambda x: written[id(x)] if id(x) in written else Pretended(x) if isinstance(x, Tensor) else x, out)

    def note(self, name: str, func: Any, args: Any, kwargs: Any, there: list, here: list, asked: Any) -> None:
        """Write down what makes the host wait."""
        if there and name in WAITS:
            self.wait(name)
        elif there and name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [i for i in tree_leaves(args[1]) if isinstance(i, Tensor)]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                self.wait(f"{name} by a mask")
        elif there and name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait(name)
        elif name == "_to_copy" and asked is not None:
            kind = "cuda" if torch.device(asked).type == "meta" else torch.device(asked).type
            if kind == "cpu" and there and not kwargs.get("non_blocking"):
                self.wait("copy to the CPU")
            if kind == "cuda" and here and not (kwargs.get("non_blocking") and here[0].data_ptr() in self.pinned):
                self.wait("copy from pageable memory")
        elif name == "copy_":
            to, source = args[0], args[1]
            blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if isinstance(source, Pretended) and not isinstance(to, Pretended) and blocking:
                self.wait("copy to the CPU")
            if isinstance(to, Pretended) and not isinstance(source, Pretended) and source.ndim > 0 and blocking:
                self.wait("copy from pageable memory")

    def wait(self, what: str) -> None:
        self.waits.append((what, where()))

    def since(self, mark: int) -> Counter[tuple[str, str]]:
        """What waited after the first `mark` waits."""
        return Counter(self.waits[mark:])


def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As `Tensor.to`, which takes this device for another one than "cuda"."""
    there = ("cuda", "cuda:0", CUDA)
    args, kwargs = tuple(a for a in args if a not in there), {k: v for k, v in kwargs.items() if not (k == "device" and v in there)}
    return Tensor.to(x, *args, **kwargs) if args or kwargs.keys() - {"non_blocking"} else x


class Event:
    """A CUDA event that costs no wait to record."""

    def __init__(self, **_: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        Device.current.wait("event.synchronize")

    def elapsed_time(self, _: Event) -> float:
        return 1.0


def where() -> str:
    """The innermost line of the toolkit that is running."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(ROOT) and "/tests/" not in frame.filename and "/.venv/" not in frame.filename:
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
    return "elsewhere"


@contextmanager
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """"cuda" is there inside the `with`."""
    torch._C._ensureCUDADeviceGuardSet()
    here = Device()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "synchronize", lambda *_: here.wait("synchronize"))
        patch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 0)
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            with here:
                yield here
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
