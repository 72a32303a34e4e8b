"""How far `std` and `pro` are from many steps: PSNR of each, on the same seeds, to 120 steps of the second-order solver.

python docs/modes.py            # four clips of 17 frames, minutes on two cores
"""

from __future__ import annotations

import torch

from kling import KlingPipeline, Request
from kling.data.transforms import to_tensor
from kling.metrics.pixel import psnr

PROMPTS = (
    "a red ball rolls left on grass",  # held out: no training clip shows it
    "a blue cube stays still on snow",
    "a pink cone moves away on grey tiles",
    "一个绿色的球在水面上绕圈移动",
)


def main() -> None:
    pipe = KlingPipeline.from_pretrained()
    for seed, prompt in enumerate(PROMPTS, start=1):
        request = Request(prompt, num_frames=17, seed=seed)
        wanted = {"many": {"mode": "pro", "num_inference_steps": 120}, "std": {"mode": "std"}, "pro": {"mode": "pro"}}
        made = {name: to_tensor(torch.from_numpy(pipe(request.replace(**fields)).frames[0]))[None] for name, fields in wanted.items()}
        scores = {name: float(psnr(made[name], made["many"]).mean()) for name in ("std", "pro")}
        print(f"{prompt}: std {scores['std']:.1f} dB, pro {scores['pro']:.1f} dB", flush=True)


if __name__ == "__main__":
    main()
