"""WorldScore (Duan et al. 2025): the scenes that it asks for, the cameras it expects, and how its scores are combined.

A static scene is a picture and a chain of camera moves: every clip continues from the last frame of the previous one. Video models get the
picture and the text; the camera's path is used only to measure them. Sources, as of 2025: `worldscore/run_evaluate.py` and, below
`worldscore/benchmark/`, `helpers/` (dataloader, helper, camera_generator, evaluator) and `utils/utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kling.errors import UserError, unknown

FOCAL = 500  # pixels, of every camera
RADIUS = 1.0  # of an orbit, and the length of a push
TURNS = {"pan_left": 30.0, "pan_right": -30.0, "orbit_left": -30.0, "orbit_right": 30.0}  # degrees
SHIFTS = {"push_in": (0, 0, -1), "pull_out": (0, 0, 1), "move_left": (-0.5, 0, 0), "move_right": (0.5, 0, 0)}  # of the world, in radii
MOVES = (*TURNS, *SHIFTS)
FIXED = "fixed"  # used only for dynamic scenes

STATIC = (
    "camera_control",
    "object_control",
    "content_alignment",
    "3d_consistency",
    "photometric_consistency",
    "style_consistency",
    "subjective_quality",
)
DYNAMIC = ("motion_accuracy", "motion_magnitude", "motion_smoothness")


@dataclass(frozen=True)
class Instance:
    """One scene of WorldScore."""

    folder: str  # below worldscore_output/
    image: str  # below WorldScore-Dataset/
    prompts: tuple[str, ...]  # one per clip
    moves: tuple[str, ...]  # of the camera, one per clip
    data: Mapping[str, Any]  # its entry in the list

    @property
    def still(self) -> bool:
        """Whether only the camera moves."""
        return self.data["visual_movement"] == "static"


def worldscore_instances(info: Sequence[Mapping[str, Any]], still_words: str) -> list[Instance]:
    """From static.json or dynamic.json. still_words: the text that WorldScore's own loader appends to prompts of static scenes."""
    found = []
    for entry in info:
        try:
            still = {"static": True, "dynamic": False}[entry["visual_movement"]]
            *_, category, file = entry["image"].split("/")
            place = [entry["scene_type"], category] if still else [entry["motion_type"]]
            folder = "/".join([entry["visual_movement"], entry["visual_style"], *place, file.split(".")[0]])
            scenes, moves = entry["prompt_list"][1:] if still else [entry["prompt"]], tuple(entry["camera_path"])
            style = entry["style"]
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"worldscore: an entry is not as expected ({error}): give static.json or dynamic.json of its dataset") from None
        if strange := [move for move in moves if move not in (MOVES if still else (*MOVES, FIXED))]:
            raise unknown("camera move", strange[0], (*MOVES, FIXED))
        if len(scenes) != len(moves):
            raise UserError(f"worldscore: {entry['image']} has {len(moves)} camera moves for {len(scenes)} scenes: give its own list")
        prompts = [
            f"Camera {move.replace('_', ' ')}. {scene.removesuffix('.')}. {style}" for move, scene in zip(moves, scenes, strict=True)
        ]
        found.append(Instance(folder, entry["image"], tuple(f"{p}. {still_words}" if still else p for p in prompts), moves, entry))
    return found


def image_data(instance: Instance, frames: int) -> dict[str, Any]:
    """The contents of image_data.json for clips of `frames` frames."""
    n = len(instance.moves)
    data = dict(instance.data) | {"num_scenes": n, "total_frames": n * (frames - 1) + 1}
    return data | ({"anchor_frame_idx": [i * (frames - 1) for i in range(n + 1)]} if instance.still else {})


def camera_data(moves: Sequence[str], frames: int) -> dict[str, Any]:
    """The contents of camera_data.json: the path of a chain of moves, `frames` frames each.

    World to camera, a move adds one rotation about the vertical axis and one shift to what came before; angles and shifts are interpolated
    linearly. Matrices (4, 4) are camera to world in Blender's axes (right, up, backward), the first at the origin.
    """
    angle, shift = torch.zeros(1, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    for move in moves:
        turn = torch.tensor([math.radians(TURNS.get(move, 0.0))], dtype=torch.float64)
        own = RADIUS * torch.tensor(SHIFTS.get(move, (0, 0, 0)), dtype=torch.float64)
        if move.startswith("orbit"):  # about a fixed point ahead
            ahead = RADIUS * torch.tensor([0, 0, 1], dtype=torch.float64)
            own = ahead - _turned(turn)[0] @ ahead
        angle = torch.cat([angle, angle[-1] + turn])
        shift = torch.cat([shift, (_turned(turn)[0] @ shift[-1] + own)[None]])
    t = torch.arange(len(moves) * (frames - 1) + 1, dtype=torch.float64) / (frames - 1)
    before = t.long().clamp(max=len(moves) - 1)
    part = t - before
    between_angle = angle[before].lerp(angle[before + 1], part)
    between_shift = shift[before].lerp(shift[before + 1], part[:, None])
    keys, path = _blender(angle, shift), _blender(between_angle, between_shift)
    return {"focal_length": FOCAL, "scale": RADIUS, "cameras": keys.tolist(), "cameras_interp": path.tolist()}


def _turned(angle: Tensor) -> Tensor:
    """Rotations (n, 3, 3) about the vertical axis, by angles (n,) in radians."""
    zero, one, c, s = torch.zeros_like(angle), torch.ones_like(angle), angle.cos(), angle.sin()
    return torch.stack([c, zero, -s, zero, one, zero, s, zero, c], dim=1).view(-1, 3, 3)


def _blender(angle: Tensor, shift: Tensor) -> Tensor:
    """From world to camera with axes left, up, forward, as angles (n,) and shifts (n, 3), to camera to world in Blender's, (n, 4, 4)."""
    back = _turned(angle).mT
    c2w = torch.eye(4, dtype=angle.dtype).repeat(len(angle), 1, 1)
    c2w[:, :3, :3] = back * torch.tensor([-1, 1, -1], dtype=angle.dtype)
    c2w[:, :3, 3] = -(back @ shift[..., None])[..., 0]
    return c2w


def worldscore_aspects(instances: Sequence[tuple[str, Mapping[str, Mapping[str, Mapping[str, float]]]]]) -> dict[str, float]:
    """Aspects, 0 to 100 with two decimals, as `calculate_mean_scores` computes them, from (movement, evaluation.json) of every instance.

    An evaluation is {aspect: {metric: {"score_normalized": x}}}. Means over instances, then over the metrics of an aspect; "static"
    instances count in the static aspects only, "dynamic" ones in the dynamic aspects only. An aspect without measurements is 0.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in (*STATIC, *DYNAMIC)}
    for movement, evaluation in instances:
        for aspect in set(evaluation) & set(STATIC if movement == "static" else DYNAMIC):
            for metric, score in evaluation[aspect].items():
                if score:
                    found[aspect].setdefault(metric, []).append(score["score_normalized"])
    means = {aspect: [sum(x) / len(x) for x in metrics.values()] for aspect, metrics in found.items()}
    return {aspect: round(100 * sum(x) / len(x), 2) if x else 0.0 for aspect, x in means.items()}


def worldscore(aspects: Mapping[str, float]) -> dict[str, float]:
    """WorldScore-Static (mean of seven) and -Dynamic (of all ten) from aspects of 0 to 100, as in `calculate_worldscore`.

    A model that makes no motion gets 0 in the three dynamic aspects, as upstream does.
    """
    if strange := sorted(set(aspects) - {*STATIC, *DYNAMIC}):
        raise UserError(f"'{strange[0]}' is no aspect of WorldScore: it has {', '.join((*STATIC, *DYNAMIC))}")
    if missing := [name for name in STATIC if name not in aspects]:
        raise UserError(f"WorldScore: {missing[0]} is missing: run its own evaluation of every static aspect first")
    static = [aspects[name] for name in STATIC]
    both = static + [aspects.get(name, 0.0) for name in DYNAMIC]
    if not all(0 <= x <= 100 and math.isfinite(x) for x in both):
        raise UserError("WorldScore: a score is not between 0 and 100: give the worldscore.json that its run_evaluate.py wrote")
    return {"static": round(sum(static) / len(static), 2), "dynamic": round(sum(both) / len(both), 2)}
