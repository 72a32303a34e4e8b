"""A simulated CUDA device: tensors that report the device "cuda" and keep their numbers on the CPU.

Everything runs as on a GPU and gives the CPU's numbers. An operation that mixes tensors of both devices fails as on a GPU, and every wait
of the host for the device is recorded with the line of our code that caused it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = str(Path(__file__).parents[1])
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
# operations whose result, or its shape, the host must know before it continues
WAITS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "_unique2", "unique_dim", "unique_consecutive",
    "masked_select", "argwhere", "bincount", "histc",
}  # fmt: skip


class Pretended(Tensor):
    """A tensor of the simulated device. `held`: its numbers. For C++ it is on "meta", because a PyTorch without CUDA refuses gradients of
    "cuda"."""

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
        """Handles what a PyTorch without CUDA would refuse before dispatching."""
        own = {Tensor.to: to, Tensor.tolist: lambda x: x.cpu().tolist(), Tensor.new_tensor: new_tensor}.get(func)
        with torch._C.DisableTorchFunctionSubclass():
            return (own or func)(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if Device.current is None:
            raise RuntimeError(f"{func} on a device that is gone")
        return Device.current.run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """The simulated device "cuda". `waits`: (what, where in our code) for every time that the host waited for it."""

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
        tensors = list(tensors_of((*args, *kwargs.values())))
        there = [x for x in tensors if type(x) is Pretended]
        asked = kwargs.get("device")
        name = func._schema.name.removeprefix("aten::")
        if name == "_pin_memory":
            self.pinned.add((out := args[0].clone()).data_ptr())
            return out
        if name == "is_pinned":
            return args[0].data_ptr() in self.pinned
        if name == "_fused_sdp_choice" and there:
            return 0  # plain operations, available on every device
        ours = ("cuda", "meta") if there or name == "scalar_tensor" else ("cuda",)  # C++ makes the 0.0 of `where(m, x, 0.0)` on "meta"
        target = asked is not None and torch.device(asked).type in ours
        if not there and not target:
            return func(*args, **kwargs)
        here = [x for x in tensors if type(x) is not Pretended]
        self.note(name, args, kwargs, there, here, asked, target)
        if there and here and name not in ("_to_copy", "copy_"):
            for x in here:
                if x.ndim > 0 and not name.startswith(("index", "_index", "_unsafe_index")):
                    raise RuntimeError(f"{func}: a CPU tensor {tuple(x.shape)} meets a CUDA one at {where()}")
                if x.ndim > 0:
                    self.wait(f"{name} with a CPU index")
        if asked is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
            kwargs.pop("pin_memory", None)
        args, kwargs = held(args), {key: held(value) for key, value in kwargs.items()}
        out = func(*args, **kwargs)
        if name == "_to_copy" and asked is not None and not target:  # back on the CPU
            return out
        wrappers = {id(x.held): x for x in there}
        if name == "copy_" and there[0] is not tensors[0]:
            return out
        return again(out, wrappers)

    def note(self, name: str, args: Any, kwargs: Any, there: list[Tensor], here: list[Tensor], asked: Any, target: bool) -> None:
        """Record an operation that makes the host wait."""
        if there and name in WAITS or name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait(name)
        elif there and name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(i.dtype in (torch.bool, torch.uint8) for i in tensors_of(args[1])):
                self.wait(f"{name} by a mask")
        elif name == "_to_copy" and asked is not None:
            if there and not target:
                self.wait("copy to the CPU")
            if here and target and not (kwargs.get("non_blocking") and here[0].data_ptr() in self.pinned):
                self.wait("copy from pageable memory")
        elif name == "copy_" and there and here and here[0].ndim > 0:
            blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if type(args[0]) is not Pretended or blocking:
                self.wait("copy to the CPU" if type(args[1]) is Pretended else "copy from pageable memory")

    def wait(self, what: str) -> None:
        self.waits.append((what, where()))

    def since(self, mark: int) -> Counter[tuple[str, str]]:
        """The waits after the first `mark` ones."""
        return Counter(self.waits[mark:])


def new_tensor(x: Tensor, data: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(data, dtype=dtype or x.dtype, device=CUDA)


def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As `Tensor.to`, which does not take the simulated device for "cuda"."""
    there = ("cuda", "cuda:0", CUDA)
    args, kwargs = tuple(a for a in args if a not in there), {k: v for k, v in kwargs.items() if not (k == "device" and v in there)}
    return Tensor.to(x, *args, **kwargs) if args or kwargs.keys() - {"non_blocking"} else x


def tensors_of(values: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of an operation, also inside lists."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from tensors_of(x)


def held(x: Any) -> Any:
    """Arguments with simulated tensors replaced by their numbers."""
    if type(x) is Pretended:
        return x.held
    return type(x)(map(held, x)) if type(x) in (list, tuple) else x


def again(out: Any, wrappers: dict[int, Tensor]) -> Any:
    """Results as simulated tensors; tensors that were written in place are the given ones."""
    if isinstance(out, Tensor):
        return wrappers.get(id(out)) if id(out) in wrappers else Pretended(out)
    return type(out)(again(x, wrappers) for x in out) if type(out) in (list, tuple) else out


class Event:
    """A CUDA event that can be recorded without waiting."""

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
    """The innermost line of the toolkit that is being executed."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and "/tests/" not in file and "/.venv/" not in file:
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """ "cuda" is available inside the `with` block."""
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
