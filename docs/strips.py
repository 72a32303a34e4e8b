"""The strips of the README: one row of frames for every task, made by the shipped model from held-out scenes.

python docs/strips.py            # writes docs/strips/<task>.png, minutes on two cores
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from kling import KlingPipeline, Request
from kling.data.image import write_png
from kling.data.strip import strip
from kling.data.world.scene import World

HERE = Path(__file__).parent / "strips"


def requests() -> dict[str, Request]:
    """Every task on held-out scenes; what is given comes from the scene's own rendering."""
    clip = World(seed=1, frames=41, aspect="16:9", split="heldout", max_things=1).clip(3)
    video, prompt = clip.video, clip.captions["en"][0]
    hole = torch.zeros(64, 112)
    hole[16:48, 32:80] = 1
    return {
        "text": Request("a red cube moves right on grass", seed=1),
        "chinese": Request("一个蓝色的球在雪地上上下弹跳", seed=2),
        "camera": Request("a yellow ball stays still on tiles", camera="pan=7", seed=3),
        "image": Request(prompt, image=video[0].numpy(), seed=4),
        "first_last": Request(prompt, image=video[0].numpy(), last_image=video[-1].numpy(), seed=5),
        "last": Request(prompt, last_image=video[-1].numpy(), seed=5),
        "keyframes": Request(prompt, keyframes=[(video[20].numpy(), 20, 1.0)], seed=6),
        "loop": Request("a green ball moves in a circle on sand", loop=True, seed=7),
        "continuation": Request(prompt, video=video[:17].numpy(), num_frames=25, seed=8),
        "inpaint": Request(prompt, video=video.numpy(), mask=hole.numpy(), seed=9),
        "outpaint": Request(prompt, video=video.numpy(), outpaint="1:1", seed=10),
        "restyle": Request("a purple ball on snow", video=video.numpy(), strength=0.3, seed=11),
    }


def main() -> None:
    pipe = KlingPipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else None)
    HERE.mkdir(exist_ok=True)
    for name, request in requests().items():
        write_png(HERE / f"{name}.png", strip([torch.from_numpy(pipe(request).frames[0])]))
        print(HERE / f"{name}.png", flush=True)


if __name__ == "__main__":
    main()
