"""The training examples of the transformer: for every clip of a batch, the given content, the prompt and the camera."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kling.cache.batches import LatentSteps
from kling.cache.store import LatentBatch
from kling.cameras.trajectory import Cameras, Trajectory
from kling.condition.concat import concat_channels, concat_groups
from kling.condition.state import Given, State, build_state
from kling.condition.tasks import REFERENCES, TASKS, draw_task, keyframe_share
from kling.condition.tracks import BACKGROUND, Tracks
from kling.data.world.captions import speaks_of_camera, speaks_of_reference
from kling.data.world.references import draw_references as world_references
from kling.data.world.scene import Scene
from kling.data.world.tracks import DROPPED, brushed_caption, draw_tracks, is_unnamed, retold, scene_of
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError
from kling.runtime.device import upload
from kling.runtime.random import noise_like
from kling.shapes import first_frame, pixel_frames, token_grid
from kling.text.encoder import cut_prompt
from kling.vae import AutoencoderKLKling

CHOSEN = (1, 2, 4, 8, 16, 32)  # tracks of a real clip that are given, each number equally often
POINTED = 0.9  # share of clips with references whose prompt points at them, instead of naming colour and solid
SAY_CAMERA = 0.9  # share of clips with a moving camera but no camera signal whose prompt mentions it, if a caption does


def check_divides(
    data: LatentSteps, tasks: Mapping[str, float], transformer: KlingTransformer3DModel, split: int, reference: float = 0.0
) -> None:
    """Raises `UserError` if the latents of any possible batch do not divide into patches, or its tokens over the `split` processes that
    share it."""
    _, ph, pw = transformer.config.patch_size
    for bucket in data.cache.clips:
        for frames in sorted({T for T in data.frames if bucket.frames >= T}):
            first = data.cache.batch(bucket, [0], frames)
            _, _, f, h, w = first.latents.shape
            if h % ph or w % pw:
                line = f"latents of {h}x{w} ({bucket.aspect}) do not divide into patches of {ph}x{pw}"
                raise UserError(f"{line}: change model.patch_size, or leave that aspect out of the cache")
            most = 0 if first.references is None or not reference else first.references.shape[1]  # of a clip; this one may have fewer
            for lone, count in product(range(2 if f > 1 and keyframe_share(tasks) else 1), range(most + 1)):
                n = math.prod(token_grid(f + lone + count, h, w, tuple(transformer.config.patch_size)))
                if n % split:
                    shape = f"{bucket.aspect} of {frames} frames{' and a keyframe' if lone else ''}"
                    shape += f" and {count} reference{'s' * (count > 1)}" if count else ""
                    raise UserError(
                        f"{n} tokens ({shape}) do not divide over cp_size = {split} processes: change it, or leave that shape out"
                    )


@dataclass(frozen=True)
class Drawing:
    """How examples are drawn: weights of the tasks, and how often text or camera are left out. group: consecutive places of one shape.
    max_bytes: longer captions are cut to it. brush: share of clips with tracks. reference: share of batches with references.
    reference_drop: share of the clips with references whose pictures show nothing, for guidance; their words are the same."""

    seed: int
    tasks: Mapping[str, float]
    text_drop: float
    camera_drop: float
    group: int = 1
    max_bytes: int | None = None
    brush: float = 0.0
    reference: float = 0.0
    reference_drop: float = 0.0

    def appends_keyframe(self, place: int) -> bool:
        """Whether the batch of a place is for tasks that append a frame; the same within a group, since it changes the amount of work."""
        return random.Random(f"keyframe/{self.seed}/{place // self.group}").random() < keyframe_share(self.tasks)

    def cut(self, prompt: str) -> str:
        """A prompt as long as the text encoder takes."""
        return prompt if self.max_bytes is None else cut_prompt(prompt, self.max_bytes)

    def references(self, place: int) -> int:
        """How many references the clips of a batch get, if they have as many; the same within a group."""
        rng = random.Random(f"references/{self.seed}/{place // self.group}")
        return rng.choice(REFERENCES) if rng.random() < self.reference else 0

    def shows_references(self, place: int, i: int) -> bool:
        """Whether the references of clip i of a batch show anything. Else their latents are 0, and words that point at them, such as "the
        first thing", stay in the prompt: guidance leaves out the pictures alone."""
        return not self.reference_drop or random.Random(f"reference drop/{self.seed}/{place}/{i}").random() >= self.reference_drop


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

    def to(self, device: torch.device | str) -> Example:
        """Copy to the device without waiting for it."""
        return self.each(partial(upload, device=device))

    def pin_memory(self) -> Example:
        """In memory from which a GPU copies without the processor: `DataLoader` calls this in a thread of its own."""
        return self.each(Tensor.pin_memory)

    def each(self, change: Callable[[Tensor], Tensor]) -> Example:
        """The same with every tensor changed."""
        changed = {name: change(t) for name in ("has_camera", "concat", "seen") if (t := getattr(self, name)) is not None}
        cameras = None if self.cameras is None else self.cameras.each(change)
        return replace(self, state=self.state.each(change), cameras=cameras, **changed)


class Examples(Dataset):
    """The example at every place of a run's sequence of batches, and its noise (b, c, G, h, w): a function of (seed, place) only.

    A clip of 41 frames takes about a millisecond of a processor's time, a GPU's step less: so the workers that read the clips draw them.
    """

    def __init__(self, steps: LatentSteps, how: Drawing, transformer: KlingTransformer3DModel, vae: AutoencoderKLKling) -> None:
        self.steps, self.how = steps, how
        self.config, self.factor = transformer.config, vae.spatial_factor  # not the models themselves: a worker has no use for them

    def __getitem__(self, place: int) -> tuple[Example, Tensor]:
        example = draw_example(self.how, self.steps[place], place, self.config, self.factor).to("cpu")  # finds the levels of its tokens
        clean = example.state.clean  # (b, c, G, h, w)
        return example, noise_like(clean, self.how.seed, "noise", place, range(len(clean)))

    def names(self, place: int) -> list[str]:
        return self.steps.names(place)


def draw_example(how: Drawing, batch: LatentBatch, place: int, config: Mapping[str, Any], factor: int) -> Example:
    """The given content of every clip of a batch, its prompt and its camera. Draws depend only on (seed, place).

    config: of the transformer. factor: pixels of a latent's side.
    """
    rng = random.Random(f"condition/{how.seed}/{place}")
    _, _, f, h, w = batch.latents.shape
    K = int(f > 1 and how.appends_keyframe(place))  # the same for all clips of a batch, which share a shape, as is the next
    R = min(how.references(place), stored_references(batch))
    if R and f == 1:  # R times the tokens of the picture itself: fewer pictures, so that the batch is no larger than others
        batch = batch.first(max(1, len(batch.ids) // (1 + R)))
    b = len(batch.ids)
    given: list[Given] = []
    tracks: list[Tracks | None] = []
    times, appended, words, starts = batch.times.tolist(), [], [], []
    for i in range(b):
        task = draw_task(rng, how.tasks, K) if f > 1 else "text"
        what = TASKS[task][1](rng, f, h, w)
        if K:
            what, j = choose_keyframe(what, times[i], f, rng)
            appended.append(batch.keyframes[i, j])
        given.append(what := replace(what, references=R) if R else what)
        shots = batch.shots[i] if batch.shots else None
        if shots is None:
            prompt, shown = draw_words(rng, how, batch.captions[i], batch.weights[i], batch.cameras[i], R > 0)
            pictures, pointed, prompt = draw_references(how, batch, i, place, R, prompt, shown)
            mine, prompt = draw_brush(how, batch, i, place, what, prompt, shown, pointed)
            told = [(prompt, shown)]
        else:  # its words name what its pictures show
            mine, told = None, draw_story(rng, how, batch, i, shots)
            pictures, _, _ = draw_references(how, batch, i, place, R, "", False)
        seen = 1 if how.shows_references(place, i) else 0
        appended += [batch.references[i, k] * seen for k in pictures]
        tracks.append(mine)
        words.append(told)
        starts.append([0] if shots is None else [j for j, _ in shots])
    lone = torch.stack(appended).unflatten(0, (b, K + R)).transpose(1, 2) if K + R else None  # (b, c, K + R, h, w)
    asked = tracks if config["track_channels"] else None  # also if no clip has any: every process must use every parameter
    state = build_state(given, batch.latents, lone, tuple(config["patch_size"]), tracks=asked, shots=starts)
    most = 1 if state.shot is None else max(map(len, words))
    prompts = [prompt for mine in words for prompt in [*(prompt for prompt, _ in mine), *[""] * (most - len(mine))]]  # b · S
    has_camera = torch.tensor([[shown for _, shown in mine] + [False] * (most - len(mine)) for mine in words])  # (b, S)
    has_camera = has_camera[:, 0] if state.shot is None else has_camera.gather(1, state.shot)  # (b,) or (b, G)
    example = Example(state, prompts, batch_cameras(batch, given, config, factor), has_camera)
    return as_extra_channels(example, batch, given, config)


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


def stored_references(batch: LatentBatch) -> int:
    """The number of references that every clip of a batch has."""
    return 0 if batch.references is None else min(batch.pictured)


def draw_references(
    how: Drawing, batch: LatentBatch, i: int, place: int, count: int, prompt: str, camera_shown: bool
) -> tuple[list[int], dict[int, int], str]:
    """Which of clip i's pictures are given, in order; which thing is pointed at by which of them; and the prompt, which points at them.

    Of the world at least one picture is of a thing that the clip shows; the others may be of things that no word points at.
    """
    if not count:
        return [], {}, prompt
    rng = random.Random(f"references/{how.seed}/{place}/{i}")  # of its own, so that a run without references draws what it always did
    scene = scene_in(batch, i)
    if scene is None:
        return rng.sample(range(batch.pictured[i]), count), {}, prompt
    pictures = world_references(scene, batch.pictured[i], batch.names[i])
    shown = [k for k, picture in enumerate(pictures) if picture.thing is not None]
    absent = [k for k in range(len(pictures)) if k not in shown]
    few = rng.randint(max(1, count - len(absent)), min(count, len(shown)))
    chosen = rng.sample(shown, few) + rng.sample(absent, count - few)
    rng.shuffle(chosen)
    pointed = {thing: k for k, j in enumerate(chosen) if (thing := pictures[j].thing) is not None}
    if not prompt or rng.random() >= POINTED:
        return chosen, {}, prompt
    return chosen, pointed, how.cut(retold(scene, camera_shown, rng, pointed=pointed))


def scene_in(batch: LatentBatch, i: int) -> Scene | None:
    """The scene of clip i of a batch; None if it is no clip of the world. Raises `UserError` if it shows another scene by now."""
    scene, camera = scene_of(batch.names[i], batch.whole), batch.cameras[i]
    if scene is None:
        return None
    T = pixel_frames(batch.latents.shape[2])
    if camera is None or not bool(((camera.c2w - scene.trajectory.c2w[:T]).abs() <= 1e-4).all()):
        raise UserError(f"clip {batch.names[i]} of the latent cache is not what this version of the world shows: make the cache again")
    return scene


def draw_brush(
    how: Drawing, batch: LatentBatch, i: int, place: int, what: Given, prompt: str, camera_shown: bool, pointed: Mapping[int, int]
) -> tuple[Tracks | None, str]:
    """The tracks of clip i of a batch, None for most, and its prompt, in which tracked things may move without being told to. pointed: the
    references of its things.

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
    scene = scene_in(batch, i)
    if scene is None:
        raise UserError(f"clip {batch.names[i]} of the latent cache has no tracks and is not of the small world: set brush=0")
    brushed = draw_tracks(scene, rng, start)
    if prompt:
        prompt = how.cut(brushed_caption(scene, brushed, camera_shown, rng, pointed))
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
    rng: random.Random, how: Drawing, captions: Sequence[str], weights: Sequence[float], camera: Trajectory | None,
    referring: bool = False,
) -> tuple[str, bool]:  # fmt: skip
    """The prompt of a clip, and whether its camera signal is given.

    If the signal is left out and a caption mentions the camera, that caption is used nine times in ten. So words learn to move the camera,
    and prompts that do not mention it come almost only from clips with a static camera. A caption that points at references is used only
    with them (referring).
    """
    pointing = not referring and speaks_of_reference("\n".join(captions))  # asked of all at once: hardly any clip's do
    if pointing and (plain := [i for i, text in enumerate(captions) if not speaks_of_reference(text)]):
        captions, weights = [captions[i] for i in plain], [weights[i] for i in plain]
    prompt = rng.choices(captions, weights)[0]
    shown = camera is not None and rng.random() >= how.camera_drop
    if camera is not None and not shown and not is_static(camera) and rng.random() < SAY_CAMERA:
        said = [i for i, text in enumerate(captions) if speaks_of_camera(text)]
        if said:
            prompt = rng.choices([captions[i] for i in said], [weights[i] for i in said])[0]
    prompt = how.cut(prompt)
    return ("" if rng.random() < how.text_drop else prompt), shown


def is_static(camera: Trajectory) -> bool:
    """Whether a camera neither moves, rotates nor zooms."""
    return all(bool((path == path[:1]).all()) for path in (camera.c2w.numpy(), camera.intrinsics.numpy()))


def as_extra_channels(example: Example, batch: LatentBatch, given: list[Given], config: Mapping[str, Any]) -> Example:
    """The same example for weights that take given content as extra channels: in the clip itself nothing is given any more."""
    state, b = example.state, len(given)
    if config["image_dim"] is not None:
        seen = torch.zeros(b, 1, config["image_dim"]) if batch.seen is None else batch.seen
        example = replace(example, seen=seen * torch.tensor([what.known > 0 for what in given])[:, None, None])
    if not (groups := concat_groups(config["in_channels"], config["out_channels"])):
        return example
    shown = torch.zeros_like(batch.latents) if batch.shown is None else batch.shown
    concat = concat_channels(replace(state, clean=shown) if "clean" in groups else state, groups)
    free = build_state([Given()] * b, batch.latents, None, state.patch)
    maps = None if state.tracks is None else state.tracks[:, :, : state.frames]
    return replace(example, state=replace(free, tracks=maps), concat=concat)


def batch_cameras(batch: LatentBatch, given: list[Given], config: Mapping[str, Any], factor: int) -> Cameras | None:
    """The camera of every clip, static if it is not known (`Example.has_camera` then masks it).

    Also if no clip of the batch has one, because every process must use every parameter in every step.
    """
    if not config["camera_channels"]:
        return None
    _, _, f, h, w = batch.latents.shape
    T = pixel_frames(f)
    still = Trajectory(torch.eye(3, 4).expand(T, 3, 4), torch.tensor([1.0, 1.0, 0.5, 0.5]).expand(T, 4))
    paths = [still if camera is None else camera for camera in batch.cameras]
    fine = config["camera_downscale"]  # rays a latent's side
    grid = h * fine, w * fine
    appended = torch.tensor([[t for t, _ in what.keyframes] for what in given], dtype=torch.long)
    poses = (torch.stack([path.c2w for path in paths]), torch.stack([path.intrinsics for path in paths]))
    return Cameras(*poses, grid, appended, given[0].references)


def choose_keyframe(what: Given, times: list[int], f: int, rng: random.Random) -> tuple[Given, int]:
    """The task's keyframe, assigned to a single frame in the cache: the last one if the task says so, an inner one if not (-1)."""
    (t, strength), end = what.keyframes[0], pixel_frames(f) - 1
    inner = [j for j, time in enumerate(times) if 0 < time < end]
    j = times.index(end) if t == end or not inner else rng.choice(inner)
    return replace(what, keyframes=((times[j], strength),)), j
