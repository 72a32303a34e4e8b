"""The transformer against diffusers' Wan with the same weights: forward, with backward, compiled, and the memory of a training step.

On the CPU a model of 30 M parameters; on CUDA models of 0.4 B and 1.3 B in bf16.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import WanTransformer3DModel
from kling_programs.eval.benches.measure import NAMES, Bench, Check, Row, poison
from kling_programs.eval.benches.memory import peak, slope
from torch import Tensor, nn

from kling.dit import KlingTransformer3DModel
from kling.dit.cost import forward_flops
from kling.runtime.precision import bf16_is_fast

TEXT = (77, 512)  # tokens and width of the text


@dataclass(frozen=True)
class Size:
    name: str
    heads: int
    head_dim: int
    layers: int
    ffn: int


SMALL = Size("30M 6x64", 6, 64, 12, 1536)
WIDE = Size("30M 3x128", 3, 128, 12, 1536)
LARGE = (Size("0.4B 8x128", 8, 128, 24, 4096), Size("1.3B 12x128", 12, 128, 30, 8960))
# bf16, fp32: forward; bf16, fp32: with backward
GOALS = {torch.bfloat16: (1.5, 1.35), torch.float32: (1.1, 1.08)}
COMPILED = 1.1
CUDA_GOALS = (1.5, 1.6)


@dataclass(frozen=True)
class SizePlan:
    """One model in one dtype: token counts for a forward pass and for one with backward, and whether to compare compiled models."""

    size: Size
    dtype: torch.dtype
    forward: tuple[int, ...]
    backward: tuple[int, ...]
    compiled: bool = False


def plans(bench: Bench) -> Iterator[SizePlan]:
    if bench.device.type == "cuda":
        for size in LARGE[: 1 if bench.quick else 2]:
            yield SizePlan(size, torch.bfloat16, (8192, 32768), (8192, 32768), compiled=True)
        return
    fp32, bf16 = torch.float32, torch.bfloat16
    if bench.quick:
        yield SizePlan(SMALL, fp32, (256,), (256,))
        return
    yield SizePlan(SMALL, fp32, (256, 1024, 2048), (256, 1024), compiled=True)
    yield SizePlan(WIDE, fp32, (1024,), (1024,))
    if bf16_is_fast(bench.device.type):
        yield SizePlan(SMALL, bf16, (1024, 2048), (1024, 2048), compiled=True)


def rows(bench: Bench) -> Iterator[Row]:
    for plan in plans(bench):
        pair = Pair(plan.size, plan.dtype, bench.device, bench.seed)
        check, gradients = pair.check(256)
        passes = (("forward", plan.forward, check, 0), ("forward + backward", plan.backward, gradients, 1))
        for what, counts, checked, i in passes:
            for tokens in counts:
                runs = pair.runs(what, tokens)
                case = f"{plan.size.name} {what} {tokens} tokens"
                if not bench.noisy and i == 0 and tokens == counts[0]:
                    yield bench.same(f"{case} {NAMES[plan.dtype]}", runs[0])
                goal = CUDA_GOALS[i] if bench.device.type == "cuda" else GOALS[plan.dtype][i] if tokens >= 1024 else None
                flops = (3 if i else 1) * pair.flops(tokens)
                row = bench.compare(case, *runs, check=checked, dtype=plan.dtype, flops=flops, goal=goal)
                yield row | {"axis": "tokens", "size": tokens, "line": f"{plan.size.name} {NAMES[plan.dtype]} {what}"}
        if plan.compiled:
            yield from compiled(bench, plan, pair)
    if not bf16_is_fast(bench.device.type):
        yield {"case": "bf16", "verdict": "not judged: bf16 products are not faster than fp32 here (see the ceilings)"}
    yield from memory(bench)


class Pair:
    """Our model and the peer's with the same weights, and the peer's in fp64."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        config = {
            "num_attention_heads": size.heads, "attention_head_dim": size.head_dim, "num_layers": size.layers, "ffn_dim": size.ffn,
            "text_dim": TEXT[1], "freq_dim": 256, "in_channels": 16, "out_channels": 16,
        }  # fmt: skip
        self.dtype, self.device = dtype, device
        self.exact = WanTransformer3DModel(**config).double().to(device)
        self.peer = WanTransformer3DModel(**config).to(device)
        self.peer.load_state_dict(self.exact.state_dict())
        cast(self.peer, dtype)
        self.ours = KlingTransformer3DModel(**config).to(device)
        self.ours.load_state_dict(self.exact.state_dict(), strict=True)
        cast(self.ours, dtype)
        self.exact.load_state_dict(self.peer.state_dict())  # the same rounded weights

    def flops(self, tokens: int) -> float:
        return forward_flops(self.ours.config, tokens, TEXT[0])

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor]:
        """New latents of `tokens` tokens, and text."""
        z = torch.randn(1, 16, tokens // 256, 32, 32, device=self.device)
        return z.to(self.dtype), torch.randn(1, *TEXT, device=self.device).to(self.dtype)

    def velocity(self, model: nn.Module, z: Tensor, text: Tensor) -> Tensor:
        level = 0.5 if isinstance(model, KlingTransformer3DModel) else 500.0
        return model(z, torch.tensor([level], dtype=torch.float64, device=z.device), text, return_dict=False)[0]

    def runs(self, what: str, tokens: int) -> tuple[Callable[[], object], Callable[[], object]]:
        z, text = self.inputs(tokens)
        run = self.forward if what == "forward" else self.step
        return tuple(partial(run, model, z, text) for model in (self.ours, self.peer))

    @torch.no_grad()
    def forward(self, model: nn.Module, z: Tensor, text: Tensor) -> Tensor:
        return self.velocity(model, z, text)

    def step(self, model: nn.Module, z: Tensor, text: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        self.velocity(model, z, text).float().square().mean().backward()

    def check(self, tokens: int) -> tuple[Check, Check]:
        """Velocities and all gradients for new inputs."""
        z, text = self.inputs(tokens)
        found = []
        for model, x in ((self.ours, (z, text)), (self.peer, (z, text)), (self.exact, (z.double(), text.double()))):
            model.zero_grad(set_to_none=True)
            poison(z)
            out = self.velocity(model, *x)
            out.to(torch.promote_types(out.dtype, torch.float32)).square().mean().backward()
            found.append((out.detach(), torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters())])))
        return Check(*(out for out, _ in found)), Check(*(grads for _, grads in found))


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast to `dtype`, except the parts that the model keeps in fp32, as `from_pretrained(torch_dtype=...)` does."""
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)


def compiled(bench: Bench, plan: SizePlan, pair: Pair) -> Iterator[Row]:
    """Both with compiled blocks, at the middle size."""
    seconds = {}
    for name, model in (("ours", pair.ours), ("peer", pair.peer)):
        model.compile_repeated_blocks()
        z, text = pair.inputs(1024)
        begin = time.perf_counter()
        pair.forward(model, z, text)
        pair.step(model, z, text)
        seconds[f"{name} compile s"] = time.perf_counter() - begin
    check, gradients = pair.check(1024)
    for what, checked, times in (("forward", check, 1), ("forward + backward", gradients, 3)):
        row = bench.compare(
            f"{plan.size.name} {what} 1024 tokens, compiled", *pair.runs(what, 1024), name="diffusers, compiled",
            check=checked, dtype=plan.dtype, flops=times * pair.flops(1024), goal=COMPILED,
        )  # fmt: skip
        yield row | seconds


def memory(bench: Bench) -> Iterator[Row]:
    """Peak memory of a forward and backward pass in fp32 (bf16 on CUDA), each in its own process."""
    counts, device = ((256, 512) if bench.quick else (512, 1024, 2048)), bench.device.type
    peaks: dict[str, list[float]] = {}
    for which in ("ours", "peer"):
        peaks[which] = [peak(f"{__name__}:training_step", {"which": which, "tokens": n, "device": device}, device) for n in counts]
    for i, tokens in enumerate(counts):
        row = {
            "case": f"memory of a step, {tokens} tokens",
            "peer": "diffusers",
            "ours MiB": peaks["ours"][i],
            "peer MiB": peaks["peer"][i],
        }
        yield row | {"axis": "tokens", "size": tokens, "line": "memory of a step"}
    each = {f"{which} MiB a 1000 tokens": 1000 * slope(list(counts), peaks[which]) for which in peaks}
    yield {"case": "memory of a step, slope", "peer": "diffusers"} | each


def training_step(which: str, tokens: int, device: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """For `memory.peak`: warms up with 256 tokens."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pair = Pair(SMALL, dtype, torch.device(device), seed=0)
    model = pair.ours if which == "ours" else pair.peer

    def step(n: int) -> None:
        pair.step(model, *pair.inputs(n))
        model.zero_grad(set_to_none=True)

    return lambda: step(256), lambda: step(tokens)
