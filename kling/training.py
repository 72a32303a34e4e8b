"""What a training of the transformer is made of: the model as the optimizer sees it, its examples, and the export."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import Dataset

from kling.cache import LatentBatch, LatentSteps
from kling.condition.camera import Trajectory
from kling.condition.concat import concat_channels, concat_groups
from kling.condition.state import Given, State, build_state
from kling.condition.tasks import TASKS, draw_task, keyframe_share
from kling.data.captions import speaks_of_camera
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError, unknown
from kling.pipeline import KlingPipeline, signal
from kling.runtime.parallel import Layout
from kling.shapes import token_grid
from kling.text import ByteTextEncoder
from kling.text.umt5 import UMT5TextEncoder
from kling.vae import AutoencoderKLKling

SAY_CAMERA = 0.9  # of clips whose moving camera is not given as a signal, those whose prompt says it where a caption does
CHECKPOINTING = ("none", "selective", "full")


class Trained(nn.Module):
    """What the optimizer sees: the transformer and a text encoder of ours as one module, so that one wrapper serves both on many
    processes. umT5 is no part of it: its embeddings come from the cache."""

    def __init__(self, transformer: KlingTransformer3DModel, text_encoder: ByteTextEncoder | UMT5TextEncoder) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder

    def words(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """What `forward` takes of the prompts: byte ids (b, s) and lengths (b,), or umT5's embeddings (b, l, e)."""
        if isinstance(self.text_encoder, UMT5TextEncoder):
            return (self.text_encoder.encode(prompts, self.transformer.device).float(),)
        return self.text_encoder.tokenize(prompts)

    def forward(self, example: Example, z: Tensor, level: Tensor, words: tuple[Tensor, ...]) -> Tensor:
        """Velocity of z (b, c, G, h, w) at levels (b,)."""
        text = words[0] if len(words) == 1 else self.text_encoder(*words)  # (b, l, e)
        state = example.state
        return self.transformer(
            z if example.concat is None else torch.cat([z, example.concat], dim=1),
            state.token_sigma(level),
            text,
            positions=state.position,
            kinds=state.kind,
            camera=example.rays,
            camera_mask=example.has_camera,
            encoder_hidden_states_image=example.seen,
        ).sample  # (b, c, G, h, w)


@dataclass
class Lora:
    """Low-rank training: the weights of `init_from` stay, and W becomes W + alpha / rank · B A in the layers whose names end in `targets`.

    rank: 0 trains the model itself. merge: export the whole model with B A added in, besides the small file of A and B alone.
    half: hold the weights that stay in bf16, which takes mixed_precision=bf16.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    merge: bool = False
    half: bool = False


def add_lora(model: Trained, lora: Lora) -> None:
    """Freeze the model and add A (random) and B (zero) to its transformer. Raises `UserError` if peft is missing or no layer matches."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("lora.rank needs peft: pip install 'kling[lora]'") from None
    for target in lora.targets:
        if not any(name.endswith(target) for name, _ in model.transformer.named_modules()):
            raise UserError(f"lora.targets '{target}' is the end of no layer's name: try to_q, to_k, to_v, to_out.0, ffn.net.2")
    model.requires_grad_(False)
    model.transformer.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft makes them as the weights beside them are


def set_checkpointing(transformer: KlingTransformer3DModel, what: str) -> None:
    """Which activations of a block are computed again in the backward pass: none, all but the costly (selective), or all of them (full).

    selective keeps the results of matrix products and attention, and repeats norms, gates and activations.
    """
    if what not in CHECKPOINTING:
        raise unknown("activation_checkpointing", what, CHECKPOINTING)
    if what == "none":
        return
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _keep_products)} if what == "selective" else {}
    transformer.enable_gradient_checkpointing(partial(_checkpoint, contexts))


def _checkpoint(contexts: dict[str, Any], block: nn.Module, *args: Any) -> Tensor:
    return checkpoint(block, *args, use_reentrant=False, **contexts)


def _keep_products(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    name = str(op)
    keep = any(part in name for part in ("aten.mm", "aten.addmm", "aten.bmm", "scaled_dot_product", "flash_attn"))
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


# -------------------------------------------------------------------------------------------------------------- examples


class Places(Dataset):
    """The batches that one process takes, in order: number k is place `first + k · ranks + rank` of the run's endless row of batches.

    So the row is walked once and in order whatever the number of processes and of accumulated micro-steps, also when they change.
    """

    def __init__(self, steps: Dataset, first: int, layout: Layout) -> None:
        self.steps, self.first, self.layout = steps, first, layout

    def place(self, k: int) -> int:
        return self.first + k * self.layout.ranks + self.layout.rank

    def __getitem__(self, k: int) -> LatentBatch:
        return self.steps[self.place(k)]


def check_divides(data: LatentSteps, tasks: Mapping[str, float], transformer: KlingTransformer3DModel, split: int) -> None:
    """Raises `UserError` if a batch could come whose tokens do not divide over the `split` processes that share it."""
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
    """How examples are drawn: weights of the tasks, and how often text or camera are left out."""

    seed: int
    tasks: Mapping[str, float]
    text_drop: float
    camera_drop: float


@dataclass(frozen=True)
class Example:
    """A batch as the network gets it."""

    state: State
    prompts: list[str]
    rays: Tensor | None  # (b, 24, G, h', w'), zeros where a clip has no camera; None for a model without a camera input
    has_camera: Tensor  # (b,)
    concat: Tensor | None = None  # (b, ·, F, h, w) what is given, for weights that take it beside the noise
    seen: Tensor | None = None  # (b, i, e) what CLIP sees of the first frame, for weights that take that, zeros where none is given

    def to(self, device: torch.device) -> Example:
        moved = {name: t.to(device) for name in ("rays", "has_camera", "concat", "seen") if (t := getattr(self, name)) is not None}
        return replace(self, state=self.state.to(device), **moved)


def draw_example(how: Drawing, batch: LatentBatch, place: int, transformer: KlingTransformer3DModel, vae: AutoencoderKLKling) -> Example:
    """What is given of every clip of a batch, its prompt and its camera. Draws depend on (seed, place) alone."""
    rng = random.Random(f"condition/{how.seed}/{place}")
    b, _, f, h, w = batch.latents.shape
    K = int(f > 1 and rng.random() < keyframe_share(how.tasks))  # the same for all clips of a batch, which share a shape
    given: list[Given] = []
    lone, prompts, has_camera = [], [], []
    for i in range(b):
        task = draw_task(rng, how.tasks, K) if f > 1 else "text"
        what = TASKS[task][1](rng, f, h, w)
        if K:
            what, j = choose_keyframe(what, batch.times[i].tolist(), f, rng)
            lone.append(batch.keyframes[i, j])
        given.append(what)
        prompt, shown = draw_words(rng, how, batch.captions[i], batch.weights[i], batch.cameras[i])
        prompts.append(prompt)
        has_camera.append(shown)
    keyframes = torch.stack(lone)[:, :, None] if K else None  # (b, c, 1, h, w)
    state = build_state(given, batch.latents, keyframes, tuple(transformer.config.patch_size))
    example = Example(state, prompts, batch_rays(batch, given, transformer, vae), torch.tensor(has_camera))
    return beside(example, batch, given, transformer)


def draw_words(
    rng: random.Random, how: Drawing, captions: Sequence[str], weights: Sequence[float], camera: Trajectory | None
) -> tuple[str, bool]:
    """The prompt of a clip, and whether its camera signal is given.

    A signal that is left out is said in words instead where a caption does so, nine times in ten: words learn to move the camera, and a
    prompt without any camera comes from clips whose camera stands still, or nearly all of them.
    """
    prompt = rng.choices(captions, weights)[0]
    shown = camera is not None and rng.random() >= how.camera_drop
    if camera is not None and not shown and not is_static(camera) and rng.random() < SAY_CAMERA:
        said = [i for i, text in enumerate(captions) if speaks_of_camera(text)]
        if said:
            prompt = rng.choices([captions[i] for i in said], [weights[i] for i in said])[0]
    return ("" if rng.random() < how.text_drop else prompt), shown


def is_static(camera: Trajectory) -> bool:
    """Whether a camera neither moves nor zooms."""
    return bool((camera.c2w == camera.c2w[:1]).all() and (camera.intrinsics == camera.intrinsics[:1]).all())


def beside(example: Example, batch: LatentBatch, given: list[Given], transformer: KlingTransformer3DModel) -> Example:
    """The same example for weights that take what is given beside the noise: nothing of the clip itself is given any more."""
    config, state, b = transformer.config, example.state, len(given)
    if config.image_dim is not None:
        seen = torch.zeros(b, 1, config.image_dim) if batch.seen is None else batch.seen
        example = replace(example, seen=seen * torch.tensor([what.known > 0 for what in given])[:, None, None])
    if not (groups := concat_groups(config.in_channels, config.out_channels)):
        return example
    shown = torch.zeros_like(batch.latents) if batch.shown is None else batch.shown
    concat = concat_channels(replace(state, clean=shown) if "clean" in groups else state, groups)
    return replace(example, state=build_state([Given()] * b, batch.latents, None, state.patch), concat=concat)


def batch_rays(batch: LatentBatch, given: list[Given], transformer: KlingTransformer3DModel, vae: AutoencoderKLKling) -> Tensor | None:
    """Rays of every clip (b, 24, G, h', w'), zeros where its camera is not known.

    Also when no clip of the batch has one: every process must use every parameter at every step.
    """
    if not transformer.config.camera_channels:
        return None
    _, _, f, h, w = batch.latents.shape
    s, fold = vae.spatial_factor, transformer.config.camera_downscale
    blank = torch.zeros(transformer.config.camera_channels, f + len(given[0].keyframes), h * fold, w * fold)
    rows = [
        blank if camera is None else signal(transformer, vae, camera, h * s, w * s, tuple(t for t, _ in what.keyframes))
        for camera, what in zip(batch.cameras, given, strict=True)
    ]
    return torch.stack(rows)


def choose_keyframe(what: Given, times: list[int], f: int, rng: random.Random) -> tuple[Given, int]:
    """The task's keyframe, tied to a lone frame of the cache: the end where the task says so, an inner one where it leaves it open (-1)."""
    (t, strength), end = what.keyframes[0], 4 * (f - 1)
    inner = [j for j, time in enumerate(times) if 0 < time < end]
    j = times.index(end) if t == end or not inner else rng.choice(inner)
    return Given(known=what.known, keyframes=((times[j], strength),)), j


# ---------------------------------------------------------------------------------------------------------------- export


def export(pipe: KlingPipeline, folder: Path) -> None:
    """The folder that `KlingPipeline.from_pretrained` reads, what was trained in bf16; whole or absent.

    Of published weights the encoders are copied, and the VAE keeps its precision: no training has touched them.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    published = isinstance(pipe.text_encoder, UMT5TextEncoder)
    for name in ("text_encoder", "image_encoder", "image_processor") if published else ():
        if (part := getattr(pipe, name)) is not None:
            part.save_pretrained(temporary if name == "text_encoder" else temporary / name)
    for name in ("vae", "transformer", "transformer_2") if published else ("vae", "transformer", "text_encoder"):
        if (part := getattr(pipe, name)) is None:
            continue
        part.save_config(temporary / name)
        _forget_origin(temporary / name / "config.json")
        dtype = torch.float32 if published and name == "vae" else torch.bfloat16
        weights = {key: t.detach().to("cpu", dtype).contiguous() for key, t in part.state_dict().items()}
        save_file(weights, temporary / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    pipe.scheduler.save_pretrained(temporary / "scheduler")
    pipe.save_config(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _forget_origin(config: Path) -> None:
    """Takes out where the weights that training began from lay: a folder that nobody else has."""
    settings = json.loads(config.read_text())
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2) + "\n")


def export_lora(transformer: KlingTransformer3DModel, folder: Path) -> None:
    """The low-rank weights alone, as `pytorch_lora_weights.safetensors` in diffusers' format."""
    from diffusers.loaders import WanLoraLoaderMixin
    from peft import get_peft_model_state_dict

    layers, settings = get_peft_model_state_dict(transformer), transformer.peft_config["default"].to_dict()
    WanLoraLoaderMixin.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=settings)
