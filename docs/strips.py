"""The strips of the README and of docs/controls.md: rows of frames for every control, made by the shipped model.

python docs/strips.py                        # writes docs/strips/<control>.png, minutes on two cores
python docs/strips.py runs/dit/export        # with another model
python docs/strips.py "" text camera-pan     # only these
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from kling import KlingPipeline, Request, Shot, Track
from kling.cameras.axes import MOVES, UNITS
from kling.data.image import write_png
from kling.data.strip import strip
from kling.data.world.scene import World

HERE = Path(__file__).parent / "strips"
FAST = ({}, {"mode": "fast"}, {"mode": "fast", "num_inference_steps": 2})
PATHS = ([(86, 37), (30, 42)], [(86, 37), (60, 27)], [(86, 37), (95, 52)])  # of the brush: left, away, toward the camera
# No training clip shows a red ball that rolls left: it is held out.
STORY = [Shot("a red ball rolls left on grass", 2.5), Shot("a red ball jumps up and down on grass", 2.5, "pan=5")]
STILL = "a yellow ball stays still on grey tiles"


def requests() -> dict[str, list[Request]]:
    """The rows of a strip, by name. Given pictures and videos are rendered from a held-out scene."""
    clip = World(seed=1, frames=41, aspect="16:9", split="heldout", max_things=1).clip(3)
    video, prompt = clip.video, clip.captions["en"][0]
    ball = World(seed=1, frames=17, aspect="16:9", split="heldout", max_things=1).clip(47).video[0].numpy()  # at (86, 37)
    hole = torch.zeros(64, 112)
    hole[16:48, 32:80] = 1
    wanted = {
        "seeds": [Request("a red ball rolls left on grass", seed=seed) for seed in (1, 2, 3)],
        "text": Request("a red cube moves right on grass", seed=1),
        "chinese": Request("一个绿色的球在沙地上绕圈移动", seed=2),
        "camera": Request(STILL, camera="pan=7", seed=3),
        "camera-words": Request(f"{STILL}, the camera pans left", seed=3),
        "image": Request(prompt, image=video[0].numpy(), seed=4),
        "first_last": Request(prompt, image=video[0].numpy(), last_image=video[-1].numpy(), seed=5),
        "last": Request(prompt, last_image=video[-1].numpy(), seed=5),
        "keyframes": Request(prompt, keyframes=[(video[20].numpy(), 20, 1.0)], seed=6),
        "brush": [Request("a red ball on grass", image=ball, tracks=[Track(None, path)], seed=5) for path in PATHS],
        "brush-camera": Request("a red ball on grass", image=ball, tracks=[Track(None, PATHS[1])], camera="pan=5", seed=5),
        "shots": Request(shots=STORY, seed=1),
        "loop": Request("a green ball moves in a circle on sand", loop=True, seed=7),
        "continuation": Request(prompt, video=video[:17].numpy(), num_frames=25, seed=8),
        "inpaint": Request(prompt, video=video.numpy(), mask=hole.numpy(), seed=9),
        "outpaint": Request(prompt, video=video.numpy(), outpaint="1:1", seed=10),
        "restyle": Request("a purple ball on snow", video=video.numpy(), strength=0.3, seed=11),
        "strength": [Request("a purple ball on snow", video=video.numpy(), strength=s, seed=11) for s in (0.2, 0.5, 0.8)],
        "guidance": [Request("a blue cube stays still on sand", guidance_scale=g, seed=12) for g in (1.0, 3.0, 5.0)],
        "steps": [Request("a blue cube stays still on sand", num_inference_steps=n, seed=12) for n in (4, 10, 20)],
        "fast": [Request("a red ball rolls left on grass", seed=1, **how) for how in FAST],
        "fast-4": Request("a red ball rolls left on grass", seed=1, mode="fast"),
        "aspects": [Request("an orange ball bounces up and down on snow", aspect=aspect, seed=13) for aspect in ("9:16", "1:1")],
        **{f"camera-{axis}": [Request(STILL, camera={axis: value}, seed=3) for value in (-8.0, 8.0)] for axis in UNITS},
        "camera-moves": [Request(STILL, camera=move, seed=3) for move in MOVES],
    }
    return {name: rows if isinstance(rows, list) else [rows] for name, rows in wanted.items()}


def main(argv: list[str]) -> None:
    pipe = KlingPipeline.from_pretrained(argv[0] if argv and argv[0] else None)
    HERE.mkdir(exist_ok=True)
    for name, rows in requests().items():
        if not argv[1:] or name in argv[1:]:
            write_png(HERE / f"{name}.png", strip([torch.from_numpy(pipe(row).frames[0]) for row in rows]))
            print(HERE / f"{name}.png", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
