"""Real processes for the tests of training: forked from one server that has imported everything, so that each starts in a moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "train")]

import torch  # noqa: E402
import train_dit  # noqa: E402
import train_vae  # noqa: E402
import yaml  # noqa: E402
from accelerate.utils import FullyShardedDataParallelPlugin  # noqa: E402, F401 - imported here, it is not imported again by each process

from kling.vae import AutoencoderKLKling  # noqa: E402

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


def environment(config: str, ranks: int, **sizes: int) -> dict[str, str]:
    """What `accelerate launch` would set for a config of configs/accelerate, on CPUs and with other sizes."""
    values = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{config}.yaml").read_text())
    env = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    if values["distributed_type"] == "FSDP":
        env["ACCELERATE_USE_FSDP"] = "true"
        for key, value in values["fsdp_config"].items():
            env[key.upper().replace("_LAYER_CLS", "_CLS")] = str(value)
        layout = values["parallelism_config"] | {f"parallelism_config_{name}_size": size for name, size in sizes.items()}
        env |= {key.upper(): str(value) for key, value in layout.items()}
    return env


def start(words: list[str], env: dict[str, str] | None = None, rank: int = 0) -> Any:
    """A process that runs `kling-train`, or for a preset of configs/vae `kling-train-vae`, with these words."""
    process = PROCESSES.Process(target=_train, args=(words, (env or {}) | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
    process.start()
    return process


def run(words: list[str], env: dict[str, str], timeout: float = 200) -> list[int]:
    """Run it as WORLD_SIZE processes; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = env | {"MASTER_PORT": str(free.getsockname()[1])}
    processes = [start(words, env, rank) for rank in range(int(env["WORLD_SIZE"]))]
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _train(words: list[str], env: dict[str, str]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    if "WORLD_SIZE" in env:
        os.environ.update(env)
        torch.accelerator.device_count = lambda: 1  # diffusers' context parallelism divides by it, and a CPU has none
    os.chdir(ROOT)
    torch.set_num_threads(1)
    try:
        (train_vae if words[0].startswith("configs/vae") else train_dit).main(words)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
