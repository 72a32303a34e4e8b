"""Metrics based on networks trained by others, from local weight files; nothing is downloaded.

    kling-eval features made/ --out out/f --reference true/ --with fvd=i3d_torchscript.pt#SHA256 --with lpips=vgg16.pt#SHA256
    kling-eval features made/ --out out/f --with dino=dino-vitb16/ --with clip=clip-vit-base-patch32/
    kling-eval features made/ --out out/f --with clipscore=clip-vit-base-patch32/ --prompts words/        # NAME.txt

fvd, jedi and fid compare sets and need --reference, as lpips does. Each number is given with its protocol (N, frames, stride, size, resize,
hash of the weights) and its controls; if a metric ranks those wrongly, the exit code is 3. The error for a metric without weights says
where to get them. A video that cannot be read ends the run, because a set without it would be another set.
"""

from __future__ import annotations

import argparse
import shlex
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from kling_programs.eval.common import VIDEOS, check_order, files, protocol_hash, results, write_json, write_text
from kling_programs.eval.options import features as parse
from torch import Tensor

from kling.data.transforms import fit
from kling.data.video import stream_video
from kling.errors import UserError
from kling.metrics.controls import Order, frozen, noise
from kling.metrics.distances import frechet, mmd_polynomial
from kling.metrics.features import (
    Weights,
    clip_network,
    clip_score,
    consistency,
    dino_network,
    inception_features,
    lpips,
    video_features,
)
from kling.metrics.report import Line, markdown
from kling.metrics.stats import mean
from kling.runtime.files import read_text

TITLES = {"fvd": "FVD", "jedi": "JEDi", "fid": "FID", "lpips": "LPIPS", "clipscore": "CLIPScore"}
TITLES |= {"clip": "CLIP consistency", "dino": "DINO consistency"}
RESIZE = {"fvd": "inside, 224", "fid": "inside, 299", "lpips": "none", "jedi": "bilinear, 224", "dino": "bilinear, short side 224"}
ORDERS = (
    *(Order(f"features {name}", ("truth", "noise"), higher=False) for name in ("fvd", "jedi", "fid", "lpips")),
    *(Order(f"features {name}", ("frozen", "mixed")) for name in ("dino", "clip")),
    Order("features clipscore", ("truth", "other words")),
)  # fmt: skip
Found = dict[str, dict[str, float]]  # by control ("" for the videos themselves): value, low, high, n


def main(argv: list[str]) -> None:
    args = parse(argv)
    given = [Weights.parse(text) for text in args.weights]
    with results(args, "features"):
        scored(args, given, argv)


def scored(args: argparse.Namespace, given: list[Weights], argv: list[str]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made, truth, prompts = load(args)
    columns: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    protocol: dict[str, Any] = {}
    for weights in given:
        for name, value in measure(weights, made, truth, prompts, device).items():
            (columns.setdefault(name, {"features": {}})["features"] if name else scores)[weights.name] = value
        H, W = made[0].shape[1:3]
        resize = RESIZE.get(weights.name, "bicubic, 224, centre")
        how = {"N": len(made), "frames": args.frames, "stride": args.stride, "size": f"{W}x{H}", "resize": resize}
        protocol[weights.name] = how | {"sha256": weights.sha256}
    lines = [Line("features", name, TITLES[name], "") for name in TITLES]
    table = markdown(lines, {"features": scores}, columns)
    notes = "\n".join(f"- {TITLES[name]}: " + ", ".join(f"{key} {value}" for key, value in how.items()) for name, how in protocol.items())
    report = {"suite": "features", "options": vars(args), "protocol": protocol_hash(protocol), "protocols": protocol, "n": len(made)}
    report |= {"failures": {}, "scores": {"features": scores}, "columns": columns, "table": f"{table}\n\n{notes}"}
    report["command"] = shlex.join(["kling-eval", "features", *argv])
    write_json(Path(args.out) / "scores.json", report)
    write_text(Path(args.out) / "scores.md", report["table"] + "\n")
    print(report["table"])
    check_order(ORDERS, columns)


def measure(weights: Weights, made: list[Tensor], truth: list[Tensor], prompts: list[str], device: torch.device) -> Found:
    """One metric on the videos and on its controls. Clips are (T, H, W, 3) uint8."""
    if weights.name in ("fvd", "jedi", "fid"):
        see = inception_features if weights.name == "fid" else video_features
        real = see(weights, truth, device)

        def apart(videos: list[Tensor]) -> dict[str, float]:
            features = see(weights, videos, device)
            distance = 100 * mmd_polynomial(features, real) if weights.name == "jedi" else frechet(features, real)
            return {"value": distance, "low": distance, "high": distance, "n": len(features)}

        return {"": apart(made), "truth": apart(truth), "noise": apart([noise(v, i) for i, v in enumerate(truth)])}
    if weights.name == "lpips":
        distance = lpips(weights, device)
        answers = {"": made, "truth": truth, "noise": [noise(v, i) for i, v in enumerate(truth)]}
        return {name: mean([distance(a, b) for a, b in zip(videos, truth, strict=True)]) for name, videos in answers.items()}
    if weights.name == "clipscore":
        pictures, words = clip_network(weights, device)
        said = [words(text) for text in prompts]
        shown = [pictures(video) for video in made]
        found = {"": mean([clip_score(a, b) for a, b in zip(shown, said, strict=True)])}
        if truth and len(set(prompts)) > 1:
            real = [pictures(video) for video in truth]
            found["truth"] = mean([clip_score(a, b) for a, b in zip(real, said, strict=True)])
            found["other words"] = mean([clip_score(a, b) for a, b in zip(real, said[1:] + said[:1], strict=True)])
        return found
    pictures = dino_network(weights, device) if weights.name == "dino" else clip_network(weights, device)[0]
    found = {"": mean([consistency(pictures(video)) for video in made])}
    found["frozen"] = mean([consistency(pictures(frozen(video))) for video in made])
    if len(made) > 1:  # each clip is compared with another one
        mixed = torch.stack([made[t % len(made)][t] for t in range(len(made[0]))])
        found["mixed"] = mean([consistency(pictures(mixed))])
    return found


def load(args: argparse.Namespace) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """The videos, their references and their prompts, in the same order; all clips have the same number of frames and one size."""
    paths = files(args.folder, VIDEOS, "videos")
    made = [clip(path, args) for path in paths.values()]
    made = [fit(video, *made[0].shape[1:3]) for video in made]
    truth, prompts = [], []
    if args.reference:
        others = files(args.reference, VIDEOS, "videos")
        if args.paired and (missing := [name for name in paths if name not in others]):
            raise UserError(f"{args.reference} has no {missing[0]}, which LPIPS and CLIPScore compare by name: give it, or leave both out")
        chosen = [others[name] for name in paths] if args.paired else list(others.values())
        truth = [fit(clip(path, args), *made[0].shape[1:3]) for path in chosen]
    if args.prompts:
        for name in paths:
            prompts.append(read_text(Path(args.prompts) / f"{name}.txt").strip())
    return made, truth, prompts


def clip(path: Path, args: argparse.Namespace) -> Tensor:
    """The first `--frames` frames, every `--stride`th. Raises `UserError` if the video is shorter."""
    frames = list(islice(stream_video(path), 0, args.frames * args.stride, args.stride))
    if len(frames) < args.frames:
        raise UserError(
            f"{path} has {len(frames)} frames at stride {args.stride}: give videos of at least {args.frames}, or a smaller --frames"
        )
    return torch.stack(frames)
