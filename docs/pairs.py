"""The picture of docs/controls.md that shows every pair of controls together, made by the shipped model.

python docs/pairs.py                        # writes docs/strips/pairs.png, minutes on two cores
python docs/pairs.py runs/dit/export        # with another model

A row and a column name two controls. Above the diagonal is the middle frame of the clip with both, below it the last one. A pair that is
refused is grey; a control that the model was not trained for is left out.
"""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from kling import KlingPipeline, Request, Track
from kling.data.world.scene import World
from kling.data.world.tracks import places_of
from kling.errors import UserError

HERE = Path(__file__).parent / "strips"
WORLD, SCENE = World(seed=1, frames=41, aspect="16:9", split="heldout", max_things=1), 47
PROMPT = "a red ball moves left on grass"  # held out, like the scene
FRAMES, SEED, EDGE = 17, 5, 64  # of a clip; pixels for the names of rows and columns


def controls() -> dict[str, dict[str, Any]]:
    """The fields of every control. Given pictures and videos are rendered from a held-out scene."""
    video = WORLD.clip(SCENE).video.numpy()
    x, y = (float(place) * side for place, side in zip(places_of(WORLD.scene(SCENE)).centre[0, 0], (112, 64), strict=True))
    hole = torch.zeros(64, 112)
    hole[16:48, 32:80] = 1
    return {
        "image": {"image": video[0]},
        "last image": {"last_image": video[16]},
        "keyframe": {"keyframes": [(video[8], 8, 1.0)]},
        "video": {"video": video[:17]},
        "mask": {"video": video[:17], "mask": hole.numpy()},
        "outpaint": {"video": video[:17], "outpaint": "1:1"},
        "strength": {"video": video[:17], "strength": 0.3},
        "loop": {"loop": True},
        "camera": {"camera": "pan=7"},
        "brush": {"tracks": [Track(None, [(x, y), (x - 4, y - 6), (x - 8, y - 10)])]},
    }


def together(pipe: KlingPipeline, fields: dict[str, Any]) -> torch.Tensor | None:
    """Frames (T, H, W, 3) of the clip with these fields, without those of a video that it continues; None if it is refused."""
    whole = {"mask", "outpaint", "strength"} & fields.keys()
    if "video" in fields and not whole and "keyframes" in fields:
        fields = fields | {"keyframes": [(picture, frame + FRAMES, strength) for picture, frame, strength in fields["keyframes"]]}
    try:
        request = Request(PROMPT, num_frames=None if whole else FRAMES, seed=SEED, **fields)
        frames = torch.from_numpy(pipe(request).frames[0])
    except UserError as error:
        print(f"  {error}", flush=True)
        return None
    return frames[FRAMES:] if "video" in fields and not whole else frames


def main(argv: list[str]) -> None:
    pipe = KlingPipeline.from_pretrained(argv[0] if argv else None)
    known = {name: fields for name, fields in controls().items() if name != "brush" or "brush" in pipe.config.capabilities}
    names, (H, W) = list(known), (64, 112)
    sheet = Image.new("RGB", (EDGE + len(names) * (W + 2), EDGE // 4 + len(names) * (H + 2)), "white")
    pen = ImageDraw.Draw(sheet)

    def put(row: int, column: int, frame: torch.Tensor | None) -> None:
        cell = Image.new("RGB", (W, H), (225, 225, 225))
        if frame is not None:
            shown = Image.fromarray(frame.numpy())
            cell.paste(shown.resize((round(shown.width * H / shown.height), H)), ((W - round(shown.width * H / shown.height)) // 2, 0))
        sheet.paste(cell, (EDGE + column * (W + 2), EDGE // 4 + row * (H + 2)))

    for i, name in enumerate(names):
        pen.text((2, EDGE // 4 + i * (H + 2) + H // 2 - 6), name, fill="black")
        pen.text((EDGE + i * (W + 2) + 2, 2), name, fill="black")
        alone = together(pipe, known[name])
        put(i, i, alone[len(alone) // 2])
    for (i, one), (j, other) in combinations(enumerate(names), 2):
        print(f"{one} and {other}", flush=True)
        frames = together(pipe, known[one] | known[other])
        put(i, j, None if frames is None else frames[len(frames) // 2])
        put(j, i, None if frames is None else frames[-1])
    sheet.save(HERE / "pairs.png", optimize=True)
    print(HERE / "pairs.png")


if __name__ == "__main__":
    main(sys.argv[1:])
