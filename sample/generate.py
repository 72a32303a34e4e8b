"""Make a video. The task follows from what is given.

    kling-sample "a red ball rolls left on grass" --camera pan=5      # held out: no training clip shows it
    kling-sample "the ball rolls on" --image first.png --last-image last.png --camera "pan=5,zoom=2"
    kling-sample --video out/a-red-ball-1.mp4 --extend-to 30     # continues with the prompt that it was made from
    kling-sample "the ball rolls on" --video in.mp4 --extend-to 30
    kling-sample "a red ball rolls left" --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --offload model
    kling-sample --replay out/a-red-ball-1.mp4.json
    kling-sample --prompts many.jsonl --output out/many          # resumable; under accelerate launch, shared over its processes

Beside each output is FILE.json, which records how it was made; --replay makes the same frames from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import secrets
import shlex
import shutil
import sys
import tempfile
import time
import unicodedata
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kling_programs.sample.command import Parser

from kling.errors import UserError, program, unknown
from kling.runtime.files import writing, written

if TYPE_CHECKING:  # torch and diffusers take seconds to import, which --help and a typing mistake should not cost
    import numpy as np
    import torch

    from kling.sampling.machine import Machine
    from kling.sampling.pipeline import KlingPipeline, Plan
    from kling.sampling.record import Record
    from kling.sampling.request import Request

FORMATS = {"mp4": (".mp4", ".mov", ".mkv"), "gif": (".gif",), "png-frames": ("",), "png": (".png",)}  # and the suffixes of their files
REPLAY_TAKES = {"replay", "output", "overwrite", "model", "device", "format", "fps", "save_latents", "dry_run"}
WEIGHTS = ("transformer", "transformer_2", "vae", "checkpoint", "lora", "lora_2", "text_cache")  # in addition to the folder's
MACHINE = ("offload", "fp8", "attention", "cache", "context_parallel", "tiles", "compile")
REPLAY_TAKES |= {*WEIGHTS, *MACHINE, "dtype"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
EXIT_DIFFERENT = 1
NAMED = 12  # unknown words in a line


@program
def main(argv: list[str] | None = None) -> None:
    started, cold = time.perf_counter(), "torch" not in sys.modules
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.prompts is not None:
        from kling_programs.sample.batch import many

        return many(args)

    import torch

    from kling.data.video import frame_rate
    from kling.hub.files import weight_files
    from kling.sampling import record as records

    before = records.read_record(args.replay) if args.replay else None
    request = records.request_of(before, args.replay) if before else asked_request(args)
    kind = chosen_format(args, before)
    inputs = {os.path.realpath(file) for file in (*records.input_hashes(request), args.replay, *beside(args)) if file}
    jobs = [request.replace(seed=request.seed + i, num_videos=1) for i in range(request.num_videos)]
    paths = [output_path(args, kind, job, several=len(jobs) > 1) for job in jobs]
    for path in paths:
        check_place(path, kind, inputs, args.save_latents, args.overwrite)
    for file in beside(args):
        weight_files(file)  # a mistake is told before anything is loaded, in a dry run too
    if (args.cache or "").startswith("calibrate="):
        check_place(Path(args.cache.partition("=")[2]), "json", inputs, overwrite=args.overwrite)
    if cold:  # this takes seconds in a process of its own
        print("loading diffusers and the model …", file=sys.stderr, flush=True)

    from kling.sampling.machine import Machine, pick_device, set_up, write_ratios

    machine = Machine(**given(args, MACHINE))
    folder, pipe = load_pipeline(args.model or (before and before["model"]["path"]), args.device, loading(args, [request], before))
    if before:
        records.check_same_model(before, model_hashes(folder, args), args.replay)
        torch.set_num_threads(before["machine"]["threads"])
    check_fast([request], args)
    asked = {"enhanced": before["enhanced"]} if before and "enhanced" in before else {}
    if args.enhance:
        request, asked = enhanced(args.enhance, request, pipe, pick_device(args.device))
        jobs = [job.replace(prompt=request.prompt) for job in jobs]
    plan = pipe.plan(request)
    if before:
        records.check_same_settings(before, plan, args.replay)
    own_rate = before["output"]["fps"] if before else plan.fps
    fps = float(frame_rate(own_rate if args.fps is None else args.fps))

    from kling.runtime.precision import describe as describe_precision

    device = pick_device(args.device)
    if rank := int(os.environ.get("RANK", "0")):  # of processes that share a clip, the first one speaks and writes
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end
    precision = precision_of(pipe)
    if not rank:
        print(describe_precision(precision, device.type), file=sys.stderr, flush=True)
        if before and (why := records.doubts(before, device, precision)):
            print(f"{args.replay} was made on another machine, and may not come out identical here: {why}", file=sys.stderr, flush=True)
    print(describe(plan, request), flush=True)
    for note in plan.notes:
        print(f"note: {note}", flush=True)
    if line := unknown_to_the_model(pipe, [request]):
        print(line, file=sys.stderr, flush=True)
    if args.dry_run:
        print(details(plan, pipe, paths, machine, device))
        return
    set_up(pipe, machine, device, plan.num_inference_steps)
    model = model_hashes(folder, args)
    for job, path in zip(jobs, paths, strict=True):
        began = time.perf_counter()
        frames, latents = sample(pipe, job, plan)  # uint8 (T, H, W, 3), (c, f, h, w)
        if rank:
            continue
        write_frames(path, kind, frames, fps, args.overwrite)
        if args.save_latents:
            from safetensors.torch import save_file

            with written(path.with_suffix(".safetensors")) as temporary:
                save_file({"latents": latents}, temporary)
        seconds, loading_seconds = time.perf_counter() - began, began - started
        output = {"path": str(path.absolute()), "format": kind, "fps": fps, "seconds": round(seconds, 2)}
        command = shlex.join(["kling-sample", *argv])
        record = records.make_record(job, plan, model, device, frames, precision, output=output, command=command, **asked)
        records.write_record(records.record_path(path), record)
        taken = f"{seconds + loading_seconds:.1f} s" + (f" ({loading_seconds:.1f} s to load)" if loading_seconds > 0.1 else "")
        print(f"{path} · seed {job.seed} · {taken} · {records.record_path(path)}", flush=True)
        started = time.perf_counter()
        if before and (other := records.difference(before, record)):
            print(f"different from {args.replay}: {other}")
            raise SystemExit(EXIT_DIFFERENT)
        if before:
            print(f"identical to {args.replay}: {len(frames)} frames, sha256 {record['frames']['sha256']}")
    if (args.cache or "").startswith("calibrate") and not rank:
        print(f"{write_ratios(pipe, args.cache)} · the ratios of these weights, for --cache mag=FILE")


def sample(pipe: KlingPipeline, request: Request, plan: Plan) -> tuple[np.ndarray, torch.Tensor]:
    """One video and its latents, with a progress bar over the steps of all hops."""
    import torch
    from tqdm import tqdm

    with tqdm(total=plan.total_steps, desc=f"seed {request.seed}", unit="step", dynamic_ncols=True, leave=False) as bar:

        def advance(pipe: KlingPipeline, step: int, timestep: Any, kwargs: dict) -> dict:
            bar.update(step + 1 - bar.n)
            return kwargs

        try:
            out = pipe(request, callback_on_step_end=advance, output_type="np")
        except torch.OutOfMemoryError:
            raise UserError(f"the device has no room for {plan.tokens} tokens: ask for fewer frames, or --device cpu") from None
    return out.frames[0], out.latents[0].float().cpu().contiguous()


def load_pipeline(model: str | None, device: str | None, options: tuple[tuple[str, Any], ...] = ()) -> tuple[Path, KlingPipeline]:
    """The model's folder and its pipeline, not yet on the device. options: see `loading`; without a dtype, the fastest one here that the
    checkpoint allows."""
    from kling.hub.load import find_folder, sampling_dtype
    from kling.sampling.machine import pick_device
    from kling.sampling.pipeline import ASSETS, KlingPipeline

    kind, given = pick_device(device).type, dict(options)  # a missing device is reported before anything is loaded
    folder = find_folder(model, given.get("weights", True)) if model else ASSETS
    if not given.keys() & {"torch_dtype", "transformer", "lora"}:  # the checkpoint's dtype setting is for its own weights only
        given["torch_dtype"] = sampling_dtype(folder, kind)
    return folder.absolute(), KlingPipeline.from_pretrained(folder, **given)


def precision_of(pipe: KlingPipeline) -> str:
    """The transformer's precision, by the name that --dtype takes."""
    name = str(pipe.transformer.dtype).removeprefix("torch.")
    return {full: short for short, full in DTYPES.items()}.get(name, name)


def loading(args: argparse.Namespace, requests: Sequence[Request], before: Record | None = None) -> tuple[tuple[str, Any], ...]:
    """What to load instead of the folder's own parts or in addition to them, and in which precision: a replay uses that of its record, or
    the folder's default if an earlier version wrote it. A dry run loads no weights, and few-step ones are for requests in mode fast."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in given(args, WEIGHTS).items()}
    if args.dtype is not None:
        if args.dtype not in DTYPES:
            raise unknown("dtype", args.dtype, DTYPES)
        import torch

        options["torch_dtype"] = getattr(torch, DTYPES[args.dtype])
    elif before:
        import torch

        options["torch_dtype"] = getattr(torch, DTYPES.get(before["machine"].get("dtype"), ""), None)
    options["transformer_fast"] = any(request.mode == "fast" for request in requests)
    return tuple((options | ({"weights": False} if args.dry_run else {})).items())


def model_hashes(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Hashes of all files that determine the frames, for the record."""
    from kling.hub.files import weight_files
    from kling.sampling import record as records

    return records.model_hashes(folder, [file for path in beside(args) for file in weight_files(path)])


def beside(args: argparse.Namespace) -> list[str]:
    """Weights that are given beside a model's folder."""
    paths = [args.transformer, args.transformer_2, args.vae, *(path for path, _ in [*(args.lora or []), *(args.lora_2 or [])])]
    return [path for path in paths if path is not None]


# ------------------------------------------------------------------------------------------------------------ the command line


def parse(argv: list[str]) -> argparse.Namespace:
    """Unset options are None, so that a request's own defaults apply."""
    parser = Parser("kling-sample", __doc__, usage='kling-sample "PROMPT" [options]')
    parser.add_argument("prompt", nargs="?", help="what to show, in English or Chinese")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what to avoid")
    parser.add_argument("--prompts", metavar="FILE.jsonl", help="many requests, an object of options a line; goes on where it was stopped")
    writes = "a chat model in a local folder writes the prompt out first, and knows what the checkpoint can do; the record keeps both"
    parser.add_argument("--enhance", metavar="FOLDER", type=a_path, help=writes)

    add = parser.add_argument_group("pictures and videos").add_argument
    add("--image", metavar="FILE", type=a_path, help="the first frame: png, jpg or webp; cropped to the clip's aspect")
    add("--last-image", metavar="FILE", type=a_path, help="the last frame")
    add("--keyframe", metavar="FILE@FRAME[:STRENGTH]", dest="keyframes", type=a_keyframe, action="append", help="repeat for more")
    add(
        "--video",
        metavar="FILE",
        type=a_path,
        help="alone: continue it; with --strength: restyle it; with --mask or --outpaint: fill it",
    )
    add("--mask", metavar="FILE", type=a_path, help="white is generated, black is kept")
    add("--outpaint", metavar="ASPECT", help="show the whole video in this aspect and fill what is around it")
    holds = "how much of the video is kept while it is restyled: 1 keeps it, 0 ignores it (other tools: denoise = 1 - this)"
    add("--strength", metavar="0..1", type=float, help=holds)
    thing = "a picture of a thing that the prompt points at: 'the first thing rolls left on snow'; repeat for the second, up to four"
    add("--reference", metavar="FILE", dest="references", type=a_path, action="append", help=thing)
    add(
        "--reference-guidance-scale",
        metavar="X",
        type=float,
        help="1: none; more resembles the references closer, for one more pass a step",
    )
    add("--loop", action="store_true", help="the end leads back to the beginning")

    add = parser.add_argument_group("camera").add_argument
    move = (
        "axes as in 'pan=5,zoom=2' (-10 to 10), a shot such as forward_up, or a RealEstate10K or JSON trajectory file; default: for the "
        "shipped model the move that the prompt says, which 'words' leaves to the model"
    )
    add("--camera", metavar="MOVE", type=a_camera, help=move)
    add("--camera-scale", metavar="X", type=float, help="multiplies how far the camera travels (1)")
    add("--camera-guidance-scale", metavar="X", type=float, help="1: none; more follows the camera closer, for one more pass a step")

    add = parser.add_argument_group("shots").add_argument
    story = "a storyboard instead of a prompt: under shots: a line '- {prompt: …, seconds: …, camera: …}' for each of 1 to 6"
    add("--shots", metavar="FILE.yaml", type=a_path, help=story)

    add = parser.add_argument_group("motion brush").add_argument
    path = "what is white in MASK.png moves along these pixels of the first frame; without MASK.png: what is at the first; repeat for more"
    add("--brush", metavar="[MASK.png:]x,y;x,y;…", action="append", help=path)
    add("--static", metavar="MASK.png", action="append", help="what is white in it stays where it is; repeat for more")
    add("--tracks", metavar="FILE.json", type=a_path, help="the same as a file: masks and paths")
    add("--brush-guidance-scale", metavar="X", type=float, help="1: none; more follows the tracks closer, for one more pass a step")

    add = parser.add_argument_group("size and length").add_argument
    add("--control", metavar="FILE", type=a_path, help="a video of edges, depth or poses that the result follows")
    add("--size", metavar="WIDTHxHEIGHT", help="in pixels, such as 832x480, instead of --aspect")
    add("--aspect", metavar="W:H", help="16:9, 9:16 or 1:1; default: the nearest to the picture given, else 16:9")
    add("--duration", metavar="SECONDS", type=float, help="of the clip, or of what is added to --video (5)")
    add("--num-frames", metavar="N", type=int, help="instead of --duration: 1 + 4k frames")
    add("--extend-to", metavar="SECONDS", type=float, help="continue in hops until the whole video is this long")
    add("--image-only", action="store_true", help="one picture, as png")
    add("--mode", metavar="std|pro|fast", help="pro takes more steps with a better solver, fast 4 with few-step weights (std)")

    add = parser.add_argument_group("sampling; defaults are the checkpoint's own").add_argument
    add("--num-inference-steps", metavar="N", type=int)
    add("--solver", metavar="NAME", help="euler, adams (second order), renoise or flow_map (few-step weights); default: the checkpoint's")
    add("--guidance-scale", metavar="X", type=float, help="how strongly to follow the prompt; 1: no guidance")
    add("--guidance-interval", metavar=("LOW", "HIGH"), nargs=2, type=float, help="noise levels with guidance, as in 0.2 0.9; faster")
    add("--guidance-every", metavar="N", type=int, help="compute guidance only at every N-th step; faster (1)")
    add("--guidance-reach", metavar="N", type=float, help="latent frames from a given frame to full guidance")
    add("--shift", metavar="X", type=float, help="larger values spend more steps at high noise")
    add("--sigma-c", metavar="X", type=float, help="noise added to given frames, 0 to below 1 (0)")
    add("--seed", metavar="N", type=a_seed, help="default: drawn at random and printed")
    add("--num-videos", metavar="N", type=int, help="with seeds S, S+1, …; each video is the same as made alone")
    add("--frame-delay", metavar="N", type=int, help="steps by which each latent frame is behind the previous one (diffusion forcing)")

    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="FOLDER", help="ours, published Wan weights in diffusers layout, or a hub id; default: the shipped one")
    add("--transformer", metavar="FILE", type=a_path, help="safetensors to use instead of the folder's, in original or diffusers naming")
    add("--transformer-2", metavar="FILE", type=a_path, help="the same for the low-noise expert")
    add("--vae", metavar="FILE", type=a_path, help="the same for the VAE")
    add("--checkpoint", metavar="NAME", help="whose settings to use, if the files do not tell, such as wan2.1-i2v-14b-480p")
    add("--text-cache", metavar="FOLDER", type=a_path, help="keep umT5's embeddings of prompts here; known prompts do not load it again")
    add("--lora", metavar="FILE[:SCALE]", type=a_lora, action="append", help="repeat for more")
    add("--lora-2", metavar="FILE[:SCALE]", type=a_lora, action="append", help="for the low-noise expert")

    add = parser.add_argument_group("machine").add_argument
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, …; default: cuda if there is one")
    add(
        "--dtype",
        metavar="fp32|bf16|fp16",
        help="of transformer and text encoder; default: bf16 for published weights and where it is faster and ours allow it",
    )
    add("--offload", metavar="model|group", help="keep one model, or one block, on the device at a time")
    add("--fp8", action="store_true", default=None, help="store the transformer in 8 bits")
    add("--attention", metavar="NAME", help="native, math, cudnn, flex, xformers, flash, flash3 or sage")
    add("--cache", metavar="NAME=X", help="reuse steps: first-block=0.1, taylorseer=5 or mag=FILE.json (made by calibrate=FILE.json)")
    add("--tiles", metavar="PIXELS", type=int, help="the VAE works in overlapping squares of this side, such as 256")
    add("--compile", action="store_true", default=None, help="compile the transformer's blocks: faster steps after a slow first one")
    add("--context-parallel", metavar="N", type=int, help="share each clip between the N processes that torchrun started")

    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="PATH", help="a file, or a folder (existing, or without a suffix); default: out/")
    add("--overwrite", action="store_true", help="replace existing files")
    add("--format", metavar="mp4|gif|png-frames", help="default: by the ending of --output, else mp4")
    add("--fps", metavar="X", type=float, help="playback rate of the file; the frames are made at the model's own rate either way")
    add("--save-latents", action="store_true", help="also write the latents, as safetensors")
    add("--dry-run", action="store_true", help="print what would be done, and write nothing")
    add("--replay", metavar="FILE.json", help="make the same frames again from the JSON beside an output, and compare")
    args, rest = parser.parse_known_args(argv)
    if rest and not rest[0].startswith("-"):
        raise UserError(f"'{rest[0]}' is left over: put the prompt in quotes")
    if rest:
        parser.refuse(rest)
    for name, value in vars(args).items():
        if args.replay and name not in REPLAY_TAKES and value not in (None, False):
            called = "the prompt" if name == "prompt" else parser.called(name)
            raise UserError(f"--replay repeats the record {args.replay}: leave out {called}")
    return args


def a_path(text: str) -> str:
    return str(Path(text).absolute()) if text else text


def a_lora(text: str) -> tuple[str, float]:
    """FILE or FILE:SCALE; the file's name may contain a colon."""
    found = re.fullmatch(r"(.+):(-?\d*\.?\d+)", text)
    return (a_path(found[1]), float(found[2])) if found else (a_path(text), 1.0)


def a_camera(text: str) -> str:
    return a_path(text) if os.path.isfile(text) else text


def a_seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"'{text}' is no seed: give a whole number from 0 to {2**32 - 1}")
    return int(text)


def a_keyframe(text: str) -> tuple[str, int, float]:
    """PATH@FRAME[:STRENGTH]; the path may contain @ and :."""
    if not (found := re.fullmatch(r"(.+)@(\d+)(?::(\d*\.?\d+))?", text)):
        raise argparse.ArgumentTypeError(f"'{text}': write it as FILE@FRAME or FILE@FRAME:STRENGTH, such as mid.png@20:0.8")
    return a_path(found[1]), int(found[2]), float(found[3] or 1)


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options that were set."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def asked_request(args: argparse.Namespace) -> Request:
    """The request from the options."""
    from kling.sampling.request import Request

    fields = given(args, (field.name for field in dataclasses.fields(Request)))
    if args.image_only:
        for name in ("duration", "num_frames", "extend_to"):
            if getattr(args, name) is not None:
                raise UserError(f"--image-only makes one picture: leave out --{name.replace('_', '-')}")
        fields["num_frames"] = 1
    fields |= given_tracks(args)
    if not fields.keys() & {"prompt", "image", "last_image", "keyframes", "video", "references", "shots"}:
        raise UserError('there is nothing to start from: give a prompt, as in  kling-sample "a red ball rolls left on grass"')
    request = Request(**{"seed": secrets.randbelow(2**31)} | fields)
    if args.video and args.prompt is None and not request.edited and (found := prompt_of(Path(args.video))):
        request = request.replace(prompt=found)
        print(f"prompt: {found} (what {args.video} was made from; give another to change it)", file=sys.stderr)
    if args.enhance and not request.prompt:
        given_instead = "--shots has words for each shot: write them out there" if args.shots else "there is none: give a few words"
        raise UserError(f"--enhance writes a prompt out, and {given_instead}")
    return request


def given_tracks(args: argparse.Namespace) -> dict[str, Any]:
    """The field of a request for --brush and --static; {} without them."""
    from kling.sampling.brush import Track, parse_brush

    if not (args.brush or args.static):
        return {}
    if args.tracks:
        raise UserError("both --tracks and --brush or --static were given: write all tracks into the file, or leave it out")
    strokes = [*map(parse_brush, args.brush or []), *map(Track, args.static or [])]
    return {"tracks": [Track(track.mask and a_path(track.mask), track.points) for track in strokes]}


def check_fast(requests: Sequence[Request], args: argparse.Namespace) -> None:
    """Raises `UserError` for options that would have no effect in mode fast."""
    unused = [f"--{name}" for name in ("lora", "cache") if getattr(args, name)]
    if unused and any(request.mode == "fast" for request in requests):
        raise UserError(f"{unused[0]} works on the transformer, and mode fast uses the few-step weights beside it: leave one of them out")


def enhanced(model: str, request: Request, pipe: KlingPipeline, device: torch.device) -> tuple[Request, dict[str, Any]]:
    """The request with its prompt written out by a chat model, and what the record says about that; prints the prompt."""
    from kling.sampling.enhance import Enhancer

    pipe.plan(request.replace(prompt=""))  # a mistake is told before the minutes that a chat model takes
    written_out = Enhancer(model, device)(request, pipe)
    print(f"prompt: {written_out}", flush=True)
    return request.replace(prompt=written_out), {"enhanced": {"prompt": request.prompt, "by": model}}


def prompt_of(video: Path) -> str:
    """The prompt that one of our own videos was made from; empty if its record is missing."""
    from kling.sampling.record import find_record, read_record

    with suppress(UserError):
        if found := find_record(video):
            return read_record(found)["request"].get("prompt") or ""
    return ""


# ---------------------------------------------------------------------------------------------------------------------- output


def chosen_format(args: argparse.Namespace, before: Record | None) -> str:
    """The requested format, else the one of the output's suffix, else that of the video to replay, else mp4."""
    if args.image_only and args.format:
        raise UserError(f"--image-only writes a png: leave out --format {args.format}")
    if args.format not in (None, "mp4", "gif", "png-frames"):
        raise unknown("format", args.format, ["mp4", "gif", "png-frames"])
    ending = Path(args.output or "").suffix.lower()
    by_name = next((kind for kind in ("mp4", "gif") if ending in FORMATS[kind]), None)
    kind = "png" if args.image_only else args.format or by_name or (before["output"]["format"] if before else "mp4")
    if kind not in FORMATS:
        raise UserError(f"{args.replay} was written as {kind!r}, which is none of {', '.join(FORMATS)}: give --format")
    return kind


def output_path(args: argparse.Namespace, kind: str, request: Request, several: bool) -> Path:
    """The path of a video: FILE (with the seed in its name if there are several), or FOLDER/<slug>-<seed>."""
    name = f"{slug(request.prompts[0])}-{request.seed}{FORMATS[kind][0]}"
    if args.output is None and args.replay:
        made = Path(args.replay).name.removesuffix(".json")
        stem = made.removesuffix(next((end for ends in FORMATS.values() for end in ends if end and made.endswith(end)), ""))
        return Path(args.replay).with_name(f"{stem}-replay{FORMATS[kind][0]}")
    path = Path(args.output or "out")
    if os.path.isdir(path) or not path.suffix or str(args.output).endswith("/"):
        return path / name
    if path.suffix.lower() not in FORMATS[kind]:
        what = f"name it {' or '.join(FORMATS[kind])}" if FORMATS[kind][0] else "give a folder"
        raise UserError(f"{kind} cannot be written to {path}: {what}, or end it in / for a folder")
    return path.with_stem(f"{path.stem}-{request.seed}") if several else path


def slug(prompt: str) -> str:
    """A file name of up to 40 characters from a prompt in any script.

    >>> slug("A red ball, rolling!")
    'a-red-ball-rolling'
    """
    words = re.findall(r"\w+", unicodedata.normalize("NFC", prompt).lower())
    return "-".join(words)[:40].strip("-_") or "video"


def check_place(path: Path, kind: str, inputs: set[str], latents: bool = False, overwrite: bool = False) -> None:
    """Before any work is done, raise `UserError` for a path that cannot be written, or that would overwrite an input or another output.

    Makes no folder yet. overwrite: allow replacing an output.
    """
    from kling.sampling import record as records

    for file in (path, records.record_path(path), *([path.with_suffix(".safetensors")] if latents else [])):
        if os.path.realpath(file) in inputs:
            raise UserError(f"{file} is an input and would be overwritten: choose another --output")
        if os.path.lexists(file) and not overwrite:
            raise UserError(f"{file} exists already: choose another --output or seed, or add --overwrite")
    if kind == "png-frames" and path.is_dir() and not all(re.fullmatch(r"frame_\d+\.png", file.name) for file in path.iterdir()):
        raise UserError(f"{path} holds more than frames, which --overwrite would delete: choose another --output")
    folder = path.parent
    with writing(path):
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()  # raises for names that are too long
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):  # tried, since permissions alone are not conclusive
            pass


def write_frames(path: Path, kind: str, frames: np.ndarray, fps: float, overwrite: bool = False) -> None:
    """Write uint8 (T, H, W, 3), atomically."""
    from kling.data.image import write_png, write_png_frames
    from kling.data.video import write_gif, write_video

    if kind == "mp4":
        write_video(path, frames, fps)
    elif kind == "gif":
        write_gif(path, frames, fps)
    elif kind == "png":
        write_png(path, frames[0])
    else:
        temporary, old = (path.with_name(f".{uuid.uuid4().hex}.part") for _ in range(2))
        try:
            write_png_frames(temporary, frames)
            with writing(path):
                if overwrite and path.is_dir():
                    os.replace(path, old)
                os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def describe(plan: Plan, request: Request) -> str:
    """The task and its settings in one line."""
    extras = [*(["loop"] if request.loop else []), *([f"camera {request.camera}"] if request.camera else [])]
    extras += ["motion brush"] if request.tracks is not None else []
    seeds = f"seed {request.seed}" if request.num_videos == 1 else f"seeds {request.seed} to {request.seed + request.num_videos - 1}"
    size = f"{plan.frames} frames {plan.width}x{plan.height} at {plan.fps:g} fps"
    return f"task: {', '.join([plan.title, *extras])} · {size} · {plan.num_inference_steps} steps · {seeds}"


def unknown_to_the_model(pipe: KlingPipeline, requests: Iterable[Request]) -> str:
    """One line about the words of prompts that a model of the small world does not know; empty if it knows them all, or is of another."""
    from kling.data.world.captions import unknown_words, vocabulary

    if pipe.config.get("vocabulary") != "world":
        return ""
    found = {word: text for asked in requests for text in asked.prompts for word in unknown_words(text, bool(asked.references))}
    if not found:
        return ""
    words, more = list(found)[:NAMED], " …" * (len(found) > NAMED)
    chinese = bool(re.search(r"[\u3400-\u9fff]", found[words[0]]))
    subjects = ("colours", "solids", "grounds", "motions")
    known = [("、" if chinese else ", ").join(row[1 + chinese][0] for row in vocabulary()[subject]) for subject in subjects]
    if chinese:
        return f"提示：这个小模型不认识{''.join(f'“{word}”' for word in words)}{more}，照样生成；它只认识{'；'.join(known)}；以及镜头运动"
    named = ", ".join(f'"{word}"' for word in words) + more
    return f"note: this small model does not know {named} and ignores them: it knows {'; '.join(known)}; and camera moves"


def details(plan: Plan, pipe: KlingPipeline, paths: list[Path], machine: Machine, device: torch.device) -> str:
    """The additional lines of a dry run. It gives no seconds, because nothing was measured."""
    from kling.sampling.memory import report

    scales = {"text": plan.guidance_scale, "camera": plan.camera_guidance_scale}
    scales |= {"brush": plan.brush_guidance_scale} if plan.brush_guidance_scale != 1 else {}
    scales |= {"references": plan.reference_guidance_scale} if plan.reference_guidance_scale != 1 else {}
    rows = {
        "length": f"{plan.frames / plan.fps:.1f} s",
        **({"cuts": f"at frames {', '.join(map(str, plan.cuts))}"} if plan.cuts else {}),
        "tokens": f"{plan.tokens} at once",
        "steps": f"{plan.total_steps} in all, {plan.solver}, shift {plan.shift:g}",
        "guidance": ", ".join(f"{scale:g} on the {what}" for what, scale in scales.items()),
        **report(pipe, plan, machine, device),
        **({"licence": f"{pipe.config.licence} (of the weights)"} if pipe.config.get("licence") else {}),
        "output": ", ".join(map(str, paths)) + " (dry run: nothing is written)",
    }
    return "\n".join(f"  {name:9} {text}" for name, text in rows.items())


if __name__ == "__main__":
    main()
