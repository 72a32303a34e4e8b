"""Real processes for the tests of training, forked from one server that has imported everything, so that each starts quickly."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "train")]

import align  # noqa: E402
import distill  # noqa: E402
import torch  # noqa: E402
import train_dit  # noqa: E402
import train_vae  # noqa: E402
import yaml  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import FullyShardedDataParallelPlugin  # noqa: E402, F401 - imported here, it is not imported again by each process
from diffusers.models import attention_dispatch  # noqa: E402
from diffusers.models.embeddings import TimestepEmbedding  # noqa: E402

from kling.runtime import parallel  # noqa: E402
from kling.runtime.saver import Saver  # noqa: E402
from kling.training import muon  # noqa: E402
from kling.vae import AutoencoderKLKling  # noqa: E402

# The server is a Python process of its own, which ignores a preload that it cannot find; then every process would import torch itself.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["workers"])

TINY_VAE: dict[str, Any] = {
    "base_dim": 4, "decoder_base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True],
    "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 8,
}  # fmt: skip


def debug_words(folder: Path, *words: str) -> list[str]:
    """Arguments of kling-train for the debug preset on a tiny VAE and six clips of five frames, all below `folder`."""
    AutoencoderKLKling(**TINY_VAE).save_pretrained(folder / "vae")
    (folder / "encode.yaml").write_text("{clips: 6, shard: 3, workers: 0, data: {frames: [1, 5]}}")
    return [
        "configs/dit/debug.yaml", "frames=[5]", "max_frames=5", "workers=0", "log_every=1", "sample_every=0", "samples=[]",
        "mixed_precision=fp32", "threads=1", f"vae={folder / 'vae'}", f"cache={folder / 'cache'}", f"encode={folder / 'encode.yaml'}",
        *words,
    ]  # fmt: skip


def environment(config: str, ranks: int, fsdp: dict[str, Any] | None = None, **sizes: int) -> dict[str, str]:
    """The environment that `accelerate launch` would set for a config of configs/accelerate, on CPUs, with other sizes and fsdp_config."""
    values = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{config}.yaml").read_text())
    env = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    if values["distributed_type"] == "FSDP":
        env["ACCELERATE_USE_FSDP"] = "true"
        for key, value in (values["fsdp_config"] | (fsdp or {})).items():
            env[key.upper().replace("_LAYER_CLS", "_CLS")] = str(value)
        layout = values["parallelism_config"] | {f"parallelism_config_{name}_size": size for name, size in sizes.items()}
        env |= {key.upper(): str(value) for key, value in layout.items()}
    return env


def main(words: list[str]) -> None:
    """Run the training of a preset's folder here."""
    {"vae": train_vae, "dit": train_dit, "distill": distill, "align": align}[words[0].split("/")[1]].main(words)


def start(words: list[str], env: dict[str, str] | None = None, rank: int = 0, first: Callable[[int], None] | None = None) -> Any:
    """A process that runs the training of a preset's folder (`kling-train` for configs/dit) with these words, after `first(rank)`."""
    process = PROCESSES.Process(target=_train, args=(words, (env or {}) | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, rank, first))
    process.start()
    return process


def run(words: list[str], env: dict[str, str], first: Callable[[int], None] | None = None) -> list[int]:
    """Run it on WORLD_SIZE processes; returns their exit codes. They end with the test, also on a timeout."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = env | {"MASTER_PORT": str(free.getsockname()[1])}
    processes = [start(words, env, rank, first) for rank in range(int(env["WORLD_SIZE"]))]
    try:
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _train(words: list[str], env: dict[str, str], rank: int, first: Callable[[int], None] | None) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    if "WORLD_SIZE" in env:
        os.environ.update(env)
        torch.accelerator.device_count = lambda: 1  # diffusers' context parallelism divides by it, and a CPU has none
    os.chdir(ROOT)
    torch.set_num_threads(1)
    try:
        if first is not None:
            first(rank)
        main(words)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


# ------------------------------------------------------------------------------------ changes inside a process, for `first`


def record(rank: int) -> None:
    """Record what each micro-step trains on: place, clips and a hash of the noise, one line each in the file SEEN.<rank>."""

    def note(data: Any, place: int, noise: torch.Tensor) -> None:
        digest = hashlib.sha256(noise.numpy().tobytes()).hexdigest()
        with Path(f"{os.environ['SEEN']}.{rank}").open("a") as file:
            file.write(json.dumps([place, data.names(place), list(noise.shape), digest]) + "\n")

    watch(note)


def watch(note: Callable[[Any, int, torch.Tensor], None]) -> None:
    """Call `note(data, place, noise)` for every micro-step of kling-train, when its example is used."""

    class Watched(train_dit.Loop):
        def batches(self, data: Any, *rest: Any) -> Iterator[tuple[int, Any]]:
            for place, (example, noise) in super().batches(data, *rest):
                note(data, place, noise)
                yield place, (example, noise)

    train_dit.Loop = Watched


def recorded(seen: Path) -> list[list[Any]]:
    """All lines of all ranks, sorted by place."""
    return sorted(json.loads(line) for path in seen.parent.glob(f"{seen.name}.*") for line in path.read_text().splitlines())


def poison_the_second(rank: int) -> None:
    """Process 1 has losses that are not finite in its third to seventh micro-step."""
    if rank == 1:
        real, calls = train_dit.flow_loss, itertools.count(1)
        train_dit.flow_loss = lambda *args: real(*args) * (math.nan if 3 <= next(calls) <= 7 else 1.0)


def stall_the_second(rank: int) -> None:
    """Process 1 pauses for a while in its second step."""
    real, calls = train_dit.flow_loss, itertools.count(1)

    def stalled(*args: Any) -> torch.Tensor:
        if next(calls) == 2:
            time.sleep(8)
        return real(*args)

    if rank == 1:
        train_dit.flow_loss = stalled


def signal_in_validation(rank: int) -> None:
    """Process 1 gets SIGUSR1 while it validates."""
    real = train_dit.validation_loss

    def signalled(*args: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGUSR1)
        return real(*args)

    if rank == 1:
        train_dit.validation_loss = signalled


def watch_gradients(rank: int) -> None:
    """After each backward pass write a line to SEEN.<rank>: whether accelerate shards, whether an update follows, and the smallest and the
    largest share of a parameter's gradient on this process."""
    real = Accelerator.backward

    def backward(self: Accelerator, loss: torch.Tensor, **kwargs: Any) -> None:
        real(self, loss, **kwargs)
        params = [p for p in self._models[0].parameters() if p.requires_grad and p.numel() % 2 == 0 and p.shape[0] % 2 == 0]
        shares = [0 if p.grad is None else p.grad.to_local().numel() / p.numel() for p in params]
        with Path(f"{os.environ['SEEN']}.{rank}").open("a") as file:
            file.write(json.dumps([self.is_fsdp2, self.sync_gradients, min(shares), max(shares)]) + "\n")

    Accelerator.backward = backward


def watch_levels(rank: int) -> None:
    """Write the dtypes of every pass through the embedding of noise levels (input, weight, result) to SEEN.<rank>."""
    real = TimestepEmbedding.forward

    def forward(self: TimestepEmbedding, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        out = real(self, x, *rest)
        with Path(f"{os.environ['SEEN']}.{rank}").open("a") as file:
            file.write(json.dumps([str(t.dtype) for t in (x, self.linear_1.weight, out)]) + "\n")
        return out

    TimestepEmbedding.forward = forward


def count_turned(rank: int) -> None:
    """Write the number of matrices that Muon orthogonalises on this process, batch by batch, to SEEN.<rank>."""
    real = muon.orthogonal

    def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
        with Path(f"{os.environ['SEEN']}.{rank}").open("a") as file:
            file.write(json.dumps([len(matrices), *matrices.shape[1:]]) + "\n")
        return real(matrices)

    muon.orthogonal = orthogonal


def ring_on_cpu(_: int) -> None:
    """Flash attention for CPUs: softmax from scores and their log-sum, and its gradient from those of the whole ring."""

    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, _save_ctx: bool = True, **kwargs: Any) -> Any:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        lse = scores.logsumexp(-1)  # (b, heads, q)
        out = torch.einsum("bhqk,bkhd->bqhd", (scores - lse[..., None]).exp(), v)
        if _save_ctx:
            ctx.save_for_backward(q, k, v)
        return out, lse.transpose(1, 2)

    def backward(ctx: Any, d_out: torch.Tensor, *, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
                 lse: torch.Tensor) -> Any:  # fmt: skip
        scale = query.shape[-1] ** -0.5
        p = (torch.einsum("bqhd,bkhd->bhqk", query, key) * scale - lse.transpose(1, 2)[..., None]).exp()
        d_p = torch.einsum("bqhd,bkhd->bhqk", d_out, value)
        d_s = p * (d_p - (d_out * out).sum(-1).transpose(1, 2)[..., None]) * scale
        return (torch.einsum("bhqk,bkhd->bqhd", d_s, key), torch.einsum("bhqk,bqhd->bkhd", d_s, query),
                torch.einsum("bhqk,bqhd->bkhd", p, d_out))  # fmt: skip

    attention_dispatch._native_flash_attention_forward_op = forward
    attention_dispatch._native_flash_attention_backward_op = backward
    parallel.ring_backend = lambda accelerator: "_native_flash"


def trace_only(rank: int) -> None:
    """Run the graphs of torch.compile operation by operation, forward and backward, with one line for each in SEEN.<rank>."""
    from torch._dynamo.backends.debugging import aot_eager  # here: the others need no compiler

    model = train_dit.KlingTransformer3DModel

    def backend(graph: Any, inputs: Any) -> Any:
        with Path(f"{os.environ['SEEN']}.{rank}").open("a") as file:
            file.write("1\n")
        return aot_eager(graph, inputs)

    model.compile_repeated_blocks = functools.partialmethod(model.compile_repeated_blocks, backend=backend)


def save_for_ever(run: str, start: int) -> None:
    """Save checkpoints of many small files one after another, so that nearly all of the time is spent inside a save."""
    saves = Saver(run, background=False)
    for step in range(start, 10**6):
        saves.save(step, {f"part{i}": {"w": torch.full((64,), float(step))} for i in range(12)})
