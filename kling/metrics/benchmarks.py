"""Published benchmarks: the names of the videos to sample, and the rules that combine their results into scores.

Their metrics need environments whose pinned versions conflict with ours. So this file has only what comes before and after: the list of
files to sample, and the published normalisation and weights for the results that the benchmarks write. Sources, as of 2025:
VBench `scripts/constant.py`, `scripts/cal_final_score.py`, `scripts/cal_i2v_final_score.py`, `VBench-2.0/scripts/cal_final_score.py`;
Physics-IQ `calculate_iq_score.py`. WorldScore, which expects folders, is in worldscore.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kling.errors import UserError


@dataclass(frozen=True)
class Dimension:
    """One number of a benchmark: the part of the total it belongs to, its range, and its weight in that part."""

    part: str
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


@dataclass(frozen=True)
class Board:
    """How a benchmark is totalled: dimensions, and the weight of each part in the total."""

    dimensions: Mapping[str, Dimension]
    parts: Mapping[str, float]


def _all(part: str, *names: str) -> dict[str, Dimension]:
    return {name: Dimension(part) for name in names}


_CONSISTENT = {"subject_consistency": Dimension("quality", 0.1462), "background_consistency": Dimension("quality", 0.2615)}
_LOOKS = {
    "motion_smoothness": Dimension("quality", 0.706, 0.9975),
    "dynamic_degree": Dimension("quality", weight=0.5),
    **_all("quality", "aesthetic_quality", "imaging_quality"),
}
_SEMANTIC = {
    **_all("semantic", "object_class", "multiple_objects", "human_action", "color", "spatial_relationship"),
    "scene": Dimension("semantic", 0.0, 0.8222),
    "appearance_style": Dimension("semantic", 0.0009, 0.2855),
    "temporal_style": Dimension("semantic", 0.0, 0.364),
    "overall_consistency": Dimension("semantic", 0.0, 0.364),
}
_QUALITY = {**_CONSISTENT, "temporal_flickering": Dimension("quality", 0.6293), **_LOOKS}
_VBENCH = Board({**_QUALITY, **_SEMANTIC}, {"quality": 4.0, "semantic": 1.0})
_I2V = {
    "camera_motion": Dimension("i2v", weight=0.1),
    "i2v_subject": Dimension("i2v", 0.1462),
    "i2v_background": Dimension("i2v", 0.2615),
}
_VBENCH2 = {
    **_all("creativity", "Composition", "Diversity"),
    **_all("commonsense", "Instance_Preservation", "Motion_Rationality"),
    **_all("controllability", "Camera_Motion", "Complex_Landscape", "Complex_Plot", "Dynamic_Attribute", "Dynamic_Spatial_Relationship"),
    **_all("controllability", "Human_Interaction", "Motion_Order_Understanding"),
    **_all("human fidelity", "Human_Anatomy", "Human_Clothes", "Human_Identity"),
    **_all("physics", "Material", "Mechanics", "Multi-View_Consistency", "Thermotics"),
}
BOARDS = {
    "vbench": _VBENCH,
    "vbench-long": _VBENCH,  # the same dimensions and sums, on longer videos
    "vbench-i2v": Board({**_I2V, **_CONSISTENT, **_LOOKS}, {"quality": 1.0, "i2v": 1.0}),
    "vbench-2.0": Board(_VBENCH2, dict.fromkeys(("creativity", "commonsense", "controllability", "human fidelity", "physics"), 1.0)),
}


def board_scores(board: Board, results: Mapping[str, float]) -> dict[str, float]:
    """Every dimension normalised to [0, 1], every part, and "total", from raw results by dimension.

    A dimension that was not measured counts as a raw 0, as upstream does (below 0 if the range begins higher). Raises `UserError` for
    names that the benchmark does not have.
    """
    if unknown := sorted(set(results) - set(board.dimensions)):
        raise UserError(f"'{unknown[0]}' is no dimension of this benchmark: it has {', '.join(board.dimensions)}")
    scores = {name: (results.get(name, 0.0) - d.low) / (d.high - d.low) for name, d in board.dimensions.items()}
    parts = {}
    for part in board.parts:
        own = {name: d for name, d in board.dimensions.items() if d.part == part}
        parts[part] = sum(scores[name] * d.weight for name, d in own.items()) / sum(d.weight for d in own.values())
    total = sum(parts[part] * weight for part, weight in board.parts.items()) / sum(board.parts.values())
    return scores | parts | {"total": total}


# ------------------------------------------------------------------------------------------------------------------ Physics-IQ

VIEWS = ("perspective-left", "perspective-center", "perspective-right")


def physics_iq(rows: Sequence[Mapping[str, object]]) -> dict[str, float]:
    """The Physics-IQ score (0 to 100) of its CSV's rows, with lists already parsed: the mean of three overlaps, each divided by that of two
    takes of the same scene, less the excess of the squared error, as in `calculate_iq_score` of the original benchmark."""
    if not rows:
        raise UserError("Physics-IQ: the file holds no row: run its own evaluation first")

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    def each(name: str) -> float:  # one number per row and view
        return mean([mean([float(row[f"{name}_{view}"]) for row in rows]) for view in VIEWS])

    def listed(name: str) -> float:  # one list per row and view: mean over all frames of a row, then over the rows
        return mean([mean([x for view in VIEWS for x in row[f"{name}_{view}"]]) for row in rows])

    def listed_by_view(name: str) -> float:
        return mean([mean([x for row in rows for x in row[f"{name}_{view}"]]) for view in VIEWS])

    error, steady = listed("v1_mse"), round(listed_by_view("variance_mse"), 4)
    parts = {
        "spatiotemporal": listed("spatiotemporal_iou_v1") / round(listed_by_view("variance_spatiotemporal_iou"), 4),
        "spatial": each("spatial_iou_v1") / round(each("variance_spatial"), 5),
        "weighted spatial": each("weighted_spatial_iou_v1") / round(each("variance_weighted_spatial"), 4),
    }
    score = 100 * (mean(list(parts.values())) - (error - steady))
    return parts | {"excess error": error - steady, "total": round(max(0.0, min(100.0, score)), 2)}


# ------------------------------------------------------------------------------------------------------------- files to sample


@dataclass(frozen=True)
class Job:
    """One video that a benchmark needs."""

    file: str
    prompt: str
    take: int  # number of the video for this prompt; each has its own seed
    image: str = ""  # file name of the picture that it starts from


def vbench_jobs(name: str, info: Sequence[Mapping[str, object]]) -> list[Job]:
    """From a benchmark's full_info.json: `prompt-0.mp4` and so on, five per prompt (25 for flicker, which uses only the static ones).

    VBench-2.0 needs three per prompt (20 for diversity) and uses at most 180 characters of it. A prompt shared by dimensions is sampled
    once. VBench-I2V's camera prompts do not name their picture: it is that of the same prompt without the camera words.
    """
    counts: dict[str, int] = {}
    images: dict[str, str] = {}
    for entry in info:
        if "prompt_en" not in entry or "dimension" not in entry:
            raise UserError(f"{name}: an entry without prompt_en and dimension: give the benchmark's own full_info.json")
        prompt, asked = str(entry["prompt_en"]), set(entry["dimension"])
        usual, many, special = (3, 20, "Diversity") if name == "vbench-2.0" else (5, 25, "temporal_flickering")
        counts[prompt] = max(many if special in asked else usual, counts.get(prompt, 0))
        if name == "vbench-i2v":
            images[prompt] = str(entry.get("image_name") or f"{prompt.rpartition(', camera ')[0]}.jpg")
    longest = 180 if name == "vbench-2.0" else None
    return [Job(f"{prompt[:longest]}-{i}.mp4", prompt, i, images.get(prompt, "")) for prompt, n in counts.items() for i in range(n)]


def physics_iq_jobs(rows: Sequence[Mapping[str, str]]) -> list[Job]:
    """From Physics-IQ's descriptions.csv: one video per row, from the frame where generation starts (`switch-frames/`)."""
    jobs = []
    for row in rows:
        if not row.get("generated_video_name") or not row.get("description"):
            raise UserError("Physics-IQ: a row without generated_video_name and description: give its own descriptions.csv")
        number, _, rest = row["generated_video_name"].removesuffix(".mp4").partition("_")
        jobs.append(Job(row["generated_video_name"], row["description"], 0, f"{number}_switch-frames_anyFPS_{rest}.jpg"))
    return jobs
