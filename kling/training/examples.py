"""The training examples of the transformer: for every clip of a batch, the given content, the prompt and the camera."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kling.cache.batches import LatentSteps
from kling.cache.store import LatentBatch
from kling.cameras.trajectory import Cameras, Trajectory
from kling.condition.concat import concat_channels, concat_groups
from kling.condition.state import Given, State, build_state
from kling.condition.tasks import TASKS, draw_task, keyframe_share
from kling.condition.tracks import BACKGROUND, Tracks
from kling.data.world.captions import speaks_of_camera
from kling.data.world.tracks import DROPPED, brushed_caption, draw_tracks, is_unnamed, scene_of
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError
from kling.runtime.device import upload
from kling.sampling.pipeline import ray_grid
from kling.shapes import first_frame, pixel_frames, token_grid
from kling.text.encoder import cut_prompt
from kling.vae import AutoencoderKLKling

CHOSEN = (1, 2, 4, 8, 16, 32)  # tracks of a real clip that are given, each number equally often
SAY_CAMERA = 0.9  # share of clips with a moving camera but no camera signal whose prompt mentions it, if a caption does


def check_divides(data: LatentSteps, tasks: Mapping[str, float], transformer: KlingTransformer3DModel, split: int) -> None:
    """Raises `UserError` if the tokens of any possible batch do not divide over the `split` processes that share it."""
    for bucket in data.cache.clips:
        for frames in sorted({T for T in data.frames if bucket.frames >= T}):
            _, _, f, h, w = data.cache.batch(bucket, [0], frames).latents.shape
            for appended in range(2 if f > 1 and keyframe_share(tasks) else 1):
                n = math.prod(token_grid(f + appended, h, w, tuple(transformer.config.patch_size)))
                if n % split:
                    shape = f"{bucket.aspect} of {frames} frames{' and a keyframe' if appended else ''}"
                    raise UserError(
                        f"{n} tokens ({shape}) do not divide over cp_size = {split} processes: change it, or leave that shape out"
                    )


@dataclass(frozen=True)
class Drawing:
    """How examples are drawn: weights of the tasks, and how often text or camera are left out. group: consecutive places of one shape.
    max_bytes: longer captions are cut to it. brush: share of clips with tracks."""

    seed: int
    tasks: Mapping[str, float]
    text_drop: float
    camera_drop: float
    group: int = 1
    max_bytes: int | None = None
    brush: float = 0.0

    def appends_keyframe(self, place: int) -> bool:
        """Whether the batch of a place is for tasks that append a frame; the same within a group, since it changes the amount of work."""
        return random.Random(f"keyframe/{self.seed}/{place // self.group}").random() < keyframe_share(self.tasks)


@dataclass(frozen=True)
class Example:
    """A batch in the form that the network takes."""

    state: State
    prompts: list[str]  # of every sample, or of the S shots of every sample, one sample after another
    cameras: Cameras | None  # static for clips without a known camera; None for a model without a camera input
    has_camera: Tensor  # (b,), or (b, G) if some clip has several shots
    concat: Tensor | None = None  # (b, ·, F, h, w) given content, for weights that take it as extra channels
    seen: Tensor | None = None  # (b, i, e) CLIP tokens of the first frame, for weights that take them; zeros if it is not given

    def rows(self, start: int) -> Example:
        """The samples from `start` on."""
        cut = {name: t[start:] for name in ("has_camera", "concat", "seen") if (t := getattr(self, name)) is not None}
        cameras = None if self.cameras is None else self.cameras.rows(start)
        prompts = self.prompts[start * len(self.prompts) // len(self.state.position) :]
        return replace(self, state=self.state.rows(start), prompts=prompts, cameras=cameras, **cut)

    def to(self, device: torch.device) -> Example:
        """Copy to the device without waiting for it."""
        moved = {name: upload(t, device) for name in ("has_camera", "concat", "seen") if (t := getattr(self, name)) is not None}
        cameras = None if self.cameras is None else self.cameras.to(device)
        return replace(self, state=self.state.to(device), cameras=cameras, **moved)


def draw_example(how: Drawing, batch: LatentBatch, place: int, transformer: KlingTransformer3DModel, vae: AutoencoderKLKling) -> Example:
    """The given content of every clip of a batch, its prompt and its camera. Draws depend only on (seed, place)."""
    rng = random.Random(f"condition/{how.seed}/{place}")
    b, _, f, h, w = batch.latents.shape
    K = int(f > 1 and how.appends_keyframe(place))  # the same for all clips of a batch, which share a shape
    given: list[Given] = []
    tracks: list[Tracks | None] = []
    lone, words, starts = [], [], []
    for i in range(b):
        task = draw_task(rng, how.tasks, K) if f > 1 else "text"
        what = TASKS[task][1](rng, f, h, w)
        if K:
            what, j = choose_keyframe(what, batch.times[i].tolist(), f, rng)
            lone.append(batch.keyframes[i, j])
        given.append(what)
        shots = batch.shots[i] if batch.shots else None
        if shots is None:
            prompt, shown = draw_words(rng, how, batch.captions[i], batch.weights[i], batch.cameras[i])
            mine, prompt = draw_brush(how, batch, i, place, what, prompt, shown)
            told = [(prompt, shown)]
        else:
            mine, told = None, draw_story(rng, how, batch, i, shots)
        tracks.append(mine)
        words.append(told)
        starts.append([0] if shots is None else [j for j, _ in shots])
    keyframes = torch.stack(lone)[:, :, None] if K else None  # (b, c, 1, h, w)
    asked = tracks if transformer.config.track_channels else None  # also if no clip has any: every process must use every parameter
    state = build_state(given, batch.latents, keyframes, tuple(transformer.config.patch_size), tracks=asked, shots=starts)
    most = 1 if state.shot is None else max(map(len, words))
    prompts = [prompt for mine in words for prompt in [*(prompt for prompt, _ in mine), *[""] * (most - len(mine))]]  # b · S
    has_camera = torch.tensor([[shown for _, shown in mine] + [False] * (most - len(mine)) for mine in words])  # (b, S)
    has_camera = has_camera[:, 0] if state.shot is None else has_camera.gather(1, state.shot)  # (b,) or (b, G)
    example = Example(state, prompts, batch_cameras(batch, given, transformer, vae), has_camera)
    return as_extra_channels(example, batch, given, transformer)


def draw_story(rng: random.Random, how: Drawing, batch: LatentBatch, i: int, shots: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """The prompt of every shot of clip i of a batch, and whether its camera signal is given. All of them have words, or none has."""
    silent, camera, words, told = rng.random() < how.text_drop, batch.cameras[i], [], 0
    ends = [first_frame(j) for j, _ in shots[1:]] + [pixel_frames(batch.latents.shape[2])]
    for (start, count), end in zip(shots, ends, strict=True):
        own = slice(told, told + count)
        path = None if camera is None else camera[first_frame(start) : end]
        words.append(draw_words(rng, replace(how, text_drop=0.0), batch.captions[i][own], batch.weights[i][own], path))
        told += count
    return [("" if silent else prompt, shown) for prompt, shown in words]


def draw_brush(
    how: Drawing, batch: LatentBatch, i: int, place: int, what: Given, prompt: str, camera_shown: bool
) -> tuple[Tracks | None, str]:
    """The tracks of clip i of a batch, None for most, and its prompt, in which tracked things may move without being told to.

    what: is given of the clip; the motion of a video that is filled or restyled is known, so such clips have no tracks.
    """
    f = batch.latents.shape[2]
    rng = random.Random(f"tracks/{how.seed}/{place}/{i}")  # of its own, so that a run without tracks draws what it always did
    share = 1 if how.brush and is_unnamed(batch.names[i]) else how.brush
    if f == 1 or what.space is not None or what.hold or rng.random() >= share:
        return None, prompt
    T, start = pixel_frames(f), pixel_frames(what.known) - 1 if what.known else 0
    if batch.tracks is not None:
        return choose_tracks(batch.tracks[i], rng, start), prompt
    scene = scene_of(batch.names[i], batch.whole)
    camera = batch.cameras[i]
    if scene is None or camera is None or not torch.allclose(camera.c2w, scene.trajectory.c2w[:T], atol=1e-4):
        raise UserError(f"clip {batch.names[i]} of the latent cache is not what this version of the world shows: make the cache again")
    brushed = draw_tracks(scene, rng, start)
    if prompt:
        prompt = brushed_caption(scene, brushed, camera_shown, rng)
        prompt = prompt if how.max_bytes is None else cut_prompt(prompt, how.max_bytes)
    return brushed.tracks.frames(0, T), prompt


def choose_tracks(stored: Tensor, rng: random.Random, start: int) -> Tracks | None:
    """Some of a real clip's tracks (n, T, 3) that are there in frame `start`, from it on; None if none is."""
    time = torch.arange(stored.shape[1])
    present = (stored[:, start, 2] > 0).nonzero().flatten().tolist()
    if not present:
        return None
    chosen = stored[rng.sample(present, min(len(present), rng.choice(CHOSEN)))]  # (m, T, 3)
    end = rng.randint(min(len(time), start + 2), len(time)) if rng.random() < DROPPED else len(time)
    there = (chosen[..., 2] > 0) & (time >= start) & (time < end)
    return Tracks(chosen[..., :2], there, torch.full((len(chosen),), BACKGROUND))


def draw_words(
    rng: random.Random, how: Drawing, captions: Sequence[str], weights: Sequence[float], camera: Trajectory | None
) -> tuple[str, bool]:
    """The prompt of a clip, and whether its camera signal is given.

    If the signal is left out and a caption mentions the camera, that caption is used nine times in ten. So words learn to move the camera,
    and prompts that do not mention it come almost only from clips with a static camera.
    """
    prompt = rng.choices(captions, weights)[0]
    shown = camera is not None and rng.random() >= how.camera_drop
    if camera is not None and not shown and not is_static(camera) and rng.random() < SAY_CAMERA:
        said = [i for i, text in enumerate(captions) if speaks_of_camera(text)]
        if said:
            prompt = rng.choices([captions[i] for i in said], [weights[i] for i in said])[0]
    prompt = prompt if how.max_bytes is None else cut_prompt(prompt, how.max_bytes)
    return ("" if rng.random() < how.text_drop else prompt), shown


def is_static(camera: Trajectory) -> bool:
    """Whether a camera neither moves, rotates nor zooms."""
    return bool((camera.c2w == camera.c2w[:1]).all() and (camera.intrinsics == camera.intrinsics[:1]).all())


def as_extra_channels(example: Example, batch: LatentBatch, given: list[Given], transformer: KlingTransformer3DModel) -> Example:
    """The same example for weights that take given content as extra channels: in the clip itself nothing is given any more."""
    config, state, b = transformer.config, example.state, len(given)
    if config.image_dim is not None:
        seen = torch.zeros(b, 1, config.image_dim) if batch.seen is None else batch.seen
        example = replace(example, seen=seen * torch.tensor([what.known > 0 for what in given])[:, None, None])
    if not (groups := concat_groups(config.in_channels, config.out_channels)):
        return example
    shown = torch.zeros_like(batch.latents) if batch.shown is None else batch.shown
    concat = concat_channels(replace(state, clean=shown) if "clean" in groups else state, groups)
    opened = build_state([Given()] * b, batch.latents, None, state.patch)
    maps = None if state.tracks is None else state.tracks[:, :, : state.frames]
    return replace(example, state=replace(opened, tracks=maps), concat=concat)


def batch_cameras(batch: LatentBatch, given: list[Given], transformer: KlingTransformer3DModel, vae: AutoencoderKLKling) -> Cameras | None:
    """The camera of every clip, static if it is not known (`Example.has_camera` then masks it).

    Also if no clip of the batch has one, because every process must use every parameter in every step.
    """
    if not transformer.config.camera_channels:
        return None
    _, _, f, h, w = batch.latents.shape
    T = pixel_frames(f)
    still = Trajectory(torch.eye(3, 4).expand(T, 3, 4), torch.tensor([1.0, 1.0, 0.5, 0.5]).expand(T, 4))
    paths = [still if camera is None else camera for camera in batch.cameras]
    grid = ray_grid(transformer, vae, h * vae.spatial_factor, w * vae.spatial_factor)
    appended = torch.tensor([[t for t, _ in what.keyframes] for what in given], dtype=torch.long)
    return Cameras(torch.stack([path.c2w for path in paths]), torch.stack([path.intrinsics for path in paths]), grid, appended)


def choose_keyframe(what: Given, times: list[int], f: int, rng: random.Random) -> tuple[Given, int]:
    """The task's keyframe, assigned to a single frame in the cache: the last one if the task says so, an inner one if not (-1)."""
    (t, strength), end = what.keyframes[0], 4 * (f - 1)
    inner = [j for j, time in enumerate(times) if 0 < time < end]
    j = times.index(end) if t == end or not inner else rng.choice(inner)
    return Given(known=what.known, keyframes=((times[j], strength),)), j
