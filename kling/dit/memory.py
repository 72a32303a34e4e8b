"""The memory of a training step, found by running it without data: on fake tensors, which have shapes and no bytes.

No formula of the architecture is used: the tensors that autograd keeps are counted, so a change of the model changes the estimate. Depth is
extrapolated from two shallow copies, since every block costs the same; so a 14B model takes seconds on a laptop.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kling.dit.model import KlingTransformer3DModel
from kling.flow.losses import flow_loss
from kling.nn.modulation import Levels


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were created inside and are still alive, and their peak: in total, and without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = self.activations = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._note(t.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.activations = max(self.activations, self.live - self.gradients)
        weakref.finalize(storage, self._free, key, size)

    def note_gradient(self, parameter: Tensor) -> None:
        """Hook: a parameter's gradient is complete."""
        self.gradients += parameter.grad.untyped_storage().nbytes()

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@dataclass(frozen=True)
class StepMemory:
    """Numbers in the model, those of them that are trained, and those in one of its blocks; and the peak of a batch's forward and backward
    pass beyond the weights, in bytes: in total, and the activations in it, which peak before the gradients exist."""

    parameters: int
    trained: int
    block: int
    peak: int
    activations: int

    def beyond(self, gradients: float, batches: float = 1.0) -> float:
        """Bytes beyond the weights and `gradients` (fewer than all in a sharded run) when `batches` times the batch is computed at once."""
        together = max(0.0, self.peak - gradients + (batches - 1) * self.activations)  # exact for one batch and all gradients
        return min(together, batches * self.activations)


def step_memory(
    config: Mapping[str, Any],
    latents: tuple[int, ...],
    text_tokens: int,
    prepare: Callable[[KlingTransformer3DModel], None] = lambda _: None,
    bf16: bool = True,
    runs: int = 1,
) -> StepMemory:
    """A step of a transformer on clips of latents (b, c, f, h, w) with `text_tokens` of text, fp32 weights, bf16 by autocast if requested.

    prepare: what a training does to its model first, such as checkpointing or low-rank weights.
    runs: of equal noise levels in a clip: 1, f if frames are given, all tokens if parts of frames are; each has its own gates.
    """
    layers = int(config["num_layers"])
    if layers <= 4:
        return _trace(config, latents, text_tokens, prepare, bf16, runs)
    two, four = (_trace({**config, "num_layers": n}, latents, text_tokens, prepare, bf16, runs) for n in (2, 4))

    def extended(name: str) -> int:
        a, b = getattr(two, name), getattr(four, name)
        return a + (b - a) * (layers - 2) // 2

    return StepMemory(extended("parameters"), extended("trained"), two.block, extended("peak"), extended("activations"))


def _trace(
    config: Mapping[str, Any], latents: tuple[int, ...], text_tokens: int, prepare: Callable[..., None], bf16: bool, runs: int
) -> StepMemory:
    with torch.device("meta"):  # here layers can be replaced and cast, unlike those of fake tensors
        model = KlingTransformer3DModel(**config).train()
        prepare(model)
    with FakeTensorMode():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
            for name, x in module.named_buffers(recurse=False):
                module.register_buffer(name, torch.empty(x.shape, dtype=x.dtype), name not in module._non_persistent_buffers_set)
        b, _, f, h, w = latents
        text = torch.zeros(b, text_tokens, model.config.text_dim)
        scale = model.config.camera_downscale
        camera = torch.zeros(b, model.config.camera_channels, f, h * scale, w * scale) if model.config.camera_channels else None
        z, mask = torch.zeros(latents), torch.ones(b, 1, f, h, w)
        # for every clip a random level, and the level of given content
        sigma = Levels(torch.zeros(2 * b), torch.zeros(b, runs, dtype=torch.long)) if runs > 1 else torch.zeros(b)
        counter = LiveBytes()
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.register_post_accumulate_grad_hook(counter.note_gradient)
        with counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                v = model(z, sigma, text, camera=camera).sample  # (b, c, f, h, w)
            flow_loss(v, z, mask).mean().backward()
            del v
    sizes = (_numbers(parameters) for parameters in (model.parameters(), trained, model.blocks[0].parameters()))
    return StepMemory(*sizes, counter.peak, counter.activations)


def _numbers(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
