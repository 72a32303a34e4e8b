"""`UserError`, the error for everything a user can fix, and the decorator that turns it into one line and an exit code."""

from __future__ import annotations

import difflib
import errno
import functools
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

EXIT_BAD_INPUT = 2
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # from writing to a full or broken disk, at any write


# Our name for a setting (the first of these that exists), and what diffusers, ComfyUI and Wan's scripts call it. The keys of a training
# are in kling/config.py.
NAMES = {
    "num_inference_steps": "steps sample_steps num_steps sampling_steps",
    "guidance_scale": "cfg cfg_scale sample_guide_scale guide_scale guidance embedded_cfg_scale",
    "solver": "sampler sampler_name sample_solver scheduler",
    "shift": "sample_shift flow_shift time_shift",
    "negative_prompt": "neg negative neg_prompt n_prompt sample_neg_prompt",
    "prompt": "text positive",
    "size": "width height resolution",
    "aspect": "aspect_ratio ratio",
    "num_frames": "frame_num frames length video_length n_frames",
    "duration": "seconds",
    "fps": "frame_rate frames_per_second",
    "last_image": "end_image tail_image image_tail end_frame last_frame image_end",
    "image": "start_image first_image first_frame init_image input_image source_image img",
    "keyframes": "keyframe",
    "video": "input_video src_video init_video source_video",
    "mask": "mask_image src_mask inpaint_mask",
    "strength": "denoise denoising_strength",
    "control": "control_video",
    "camera": "camera_motion camera_control",
    "tracks": "trajectory trajectories motion_brush dynamic_masks track track_path",
    "seed": "generator base_seed noise_seed random_seed",
    "num_videos": "num_videos_per_prompt num_images_per_prompt batch_count",
    "model": "ckpt_dir ckpt model_path model_id checkpoint_path task",
    "model init_from": "pretrained_model_name_or_path",
    "lora": "lora_path loras lora_weights",
    "output": "save_file save_path out o",
    "output out": "output_dir outdir",
    "dtype mixed_precision": "precision torch_dtype fp16 bf16",
    "offload": "offload_model cpu_offload",
    "context_parallel": "ulysses_size",
    "overwrite": "force y yes",
    "device": "gpu cuda",
}
MEANS = {theirs: ours for ours, several in NAMES.items() for theirs in several.split()}
# How our setting differs from the other tool's, where the new name alone would mislead.
DIFFERS = {
    "width": "as WIDTHxHEIGHT", "height": "as WIDTHxHEIGHT", "denoise": "which is 1 - denoise: 1 keeps",
    "denoising_strength": "which is 1 - denoise: 1 keeps", "generator": "a whole number", "fp16": "fp16", "bf16": "bf16",
}  # fmt: skip


class UserError(ValueError):
    """A mistake in what was given. The message is one line: the thing, its value, and the remedy.

    code: the kind of mistake, so that programs and translations need not parse English. values: what the message mentions.
    """

    def __init__(self, message: str = "", /, code: str = "", **values: object) -> None:
        super().__init__(message)
        self.code, self.values = code, values


def unknown(thing: str, value: object, choices: Iterable[str], known_as: str = "") -> UserError:
    """The error for an unknown name. It suggests `known_as` if given, else the most similar choice.

    >>> str(unknown("aspect", "16x9", ["16:9", "9:16"]))
    "unknown aspect '16x9' (did you mean '16:9'?): choose from 16:9, 9:16"
    """
    choices = list(choices)
    near, key = known_as or meant(str(value), choices), _plain(str(value))
    hint = f" (did you mean '{near}'{', ' + DIFFERS[key] if key in DIFFERS else ''}?)" if near else ""
    return UserError(f"unknown {thing} '{value}'{hint}: choose from {', '.join(choices)}")


def meant(value: str, choices: list[str]) -> str | None:
    """The choice that another tool's name stands for, else the choice nearest in spelling, else None.

    >>> meant("--cfg", ["--camera", "--guidance-scale"]), meant("request.neg", ["request.negative_prompt"]), meant("sizee", ["size"])
    ('--guidance-scale', 'request.negative_prompt', 'size')
    """
    plain = {_plain(choice): choice for choice in choices}
    key = _plain(value).rsplit(".", 1)[-1]
    for name in (_plain(value), *MEANS.get(key, "").split()):
        if found := [choice for other, choice in plain.items() if other == name or other.endswith(f".{name}")]:
            return found[0]
    return next(iter(difflib.get_close_matches(value, choices, n=1, cutoff=0.5)), None)


def _plain(name: str) -> str:
    """`--Num-Frames` -> num_frames"""
    return name.lstrip("-").lower().replace("-", "_")


def program(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a program's `main(argv)`: a `UserError`, a full disk or a file that cannot be used becomes one line on stderr and exit code
    2, never a traceback. SIGTERM ends it as Ctrl-C does, after everything that a `finally` cleans up."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        try:
            with _ends_on_sigterm():
                try:
                    main(argv)
                finally:
                    if sys.stdout is not None:
                        sys.stdout.flush()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(EXIT_BAD_INPUT) from None
        except OSError as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():  # as after `| head -1`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise SystemExit(128 + signal.SIGPIPE) from None
            if error.errno in FULL:
                line = f"{error.filename or 'a file'} was not written ({error.strerror}): free space there"
            elif error.filename is not None:
                line = f"{error.filename} cannot be used ({error.strerror}): check the path and its permissions"
            else:
                raise
            print(f"error: {line}", file=sys.stderr)
            raise SystemExit(EXIT_BAD_INPUT) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return run


def _nobody_reads() -> bool:
    """Whether the reader of this program's output has closed it."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    """SIGTERM raises `SystemExit` with 143, unless the program handles it, as a training does, which saves first."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    here = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if here:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if here and signal.getsignal(signal.SIGTERM) is stop:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
