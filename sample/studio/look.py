"""Views inside the model: the steps from noise to clip, attention, guidance, the VAE. Tensors in, tensors and numbers out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from kling_programs.sample.studio.jobs import Tell
from kling_programs.sample.studio.studio import Step, sample
from torch import Tensor

from kling.condition.state import Given, build_state
from kling.data.transforms import fit, to_tensor
from kling.data.video import probe, read_video
from kling.errors import UserError
from kling.metrics.pixel import psnr, ssim
from kling.nn.rope import rotate
from kling.runtime.random import generator
from kling.sampling.inputs import clip_size
from kling.sampling.pipeline import KlingPipeline
from kling.sampling.request import Request
from kling.shapes import ASPECTS, latent_frames, latent_size, nearest_frames, token_grid

ROWS = 6  # steps of which x̂₀ is shown
COLUMNS = 5  # frames of each
ERROR_GAIN = 4  # brightness factor of an error map
CELL = 6  # screen pixels along a latent point
GAP = 12  # between blocks of channels


@dataclass(frozen=True)
class Walk:
    """A request from inside. x0: (step, (T, H, W, 3) uint8) for some steps. latents: (c, f, h, w) at the end, of the first hop."""

    sigmas: list[float]
    x0: list[tuple[int, np.ndarray]]
    latents: Tensor
    frames: np.ndarray
    prompts: list[str]  # of the shots of the clip
    starts: list[int]  # latent frames where they begin
    fps: float


@torch.no_grad()
def walk(pipe: KlingPipeline, request: Request, tell: Tell) -> Walk:
    """Sample the first clip of a request and keep intermediate results."""
    plan = pipe.plan(request)
    hop = plan.hops[0]
    f = latent_frames(hop.frames)
    shown = {round(s) for s in np.linspace(1, plan.num_inference_steps, min(ROWS, plan.num_inference_steps))}
    seen: list[tuple[int, np.ndarray]] = []
    latents: list[Tensor] = []
    sigmas: list[float] = []

    def advance(pipe: KlingPipeline, step: int, timestep: Any, state: dict) -> dict:
        tell(Step(step + 1, plan.total_steps))
        if step < plan.num_inference_steps:
            sigmas.append(timestep / 1000)
        if step + 1 in shown:
            seen.append((step + 1, pipe.decode(state["x0"][:, :, :f], hop.cuts)[0].numpy()))
        if step + 1 == plan.num_inference_steps:
            latents.append(state["x0"][0, :, :f].float().cpu())
        return state

    tell(Step(0, plan.total_steps))
    frames = pipe(request, callback_on_step_end=advance).frames[0]
    return Walk([*sigmas, 0.0], seen, latents[0], frames, [request.prompts[k] for k, _ in hop.shots], [j for _, j in hop.shots], plan.fps)


def channel_map(latents: Tensor) -> np.ndarray:
    """(c, f, h, w) -> a picture with a row for every channel and a column for every latent frame; each row is scaled to its own range.

    Many channels of few frames are arranged in several blocks side by side, so that the picture is about square.
    """
    c, f, h, w = latents.shape
    blocks = min((k for k in range(1, c + 1) if c % k == 0), key=lambda k: abs(math.log(k * f * w / (c // k * h))))
    low, high = latents.amin((1, 2, 3), keepdim=True), latents.amax((1, 2, 3), keepdim=True)
    level = ((latents - low) / (high - low).clamp(min=1e-12) * 255).round().byte()
    cells = [np.concatenate([_coloured(frame.numpy()) for frame in channel], axis=1) for channel in level]
    parts = [np.concatenate(cells[i : i + c // blocks], axis=0) for i in range(0, c, c // blocks)]
    return np.concatenate([np.pad(part, ((0, 0), (0, GAP), (0, 0))) for part in parts[:-1]] + parts[-1:], axis=1)


def _coloured(level: np.ndarray) -> np.ndarray:
    """uint8 (h, w) -> (h', w', 3), enlarged, with a dark border."""
    large = np.repeat(np.repeat(level, CELL, 0), CELL, 1)
    return np.pad(cv2.cvtColor(cv2.applyColorMap(large, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB), ((0, 2), (0, 2), (0, 0)))


# -------------------------------------------------------------------------------------------------------------------- attention


@torch.no_grad()
def attention_of(pipe: KlingPipeline, seen: Walk, layer: int, sigma: float, token: tuple[int, int, int]) -> Tensor:
    """The self-attention of one token to all others, mean over the heads: (f, h', w'), sums to 1.

    Noise of level `sigma` is added to the generated clip, which passes through the transformer once, with its prompt, as text to video.
    token: (frame, row, column) on the token grid. Raises `UserError` for weights that take more than the latents.
    """
    if pipe.groups:
        raise UserError("attention cannot be shown for weights that take the given frames as extra channels: choose another model")
    transformer = pipe.transformer
    x0 = seen.latents[None].to(pipe.device, transformer.dtype)  # (1, c, f, h, w)
    grid = token_grid(*x0.shape[2:], tuple(transformer.config.patch_size))
    noise = torch.randn(x0.shape, generator=generator(0, "noise", 0)).to(x0)
    z = (1 - sigma) * x0 + sigma * noise
    chosen = (token[0] * grid[1] + token[1]) * grid[2] + token[2]
    found: list[Tensor] = []

    def watch(attn: Any, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["hidden_states"]  # (1, n, d)
        rotation = kwargs["rotary_emb"]
        query = attn.norm_q(attn.to_q(x)).unflatten(2, (attn.heads, -1))  # (1, n, heads, head_dim)
        key = attn.norm_k(attn.to_k(x)).unflatten(2, (attn.heads, -1))
        query, key = rotate(query, rotation)[0, chosen], rotate(key, rotation)[0]  # (heads, head_dim), (n, heads, head_dim)
        scores = torch.einsum("hd,nhd->hn", query.float(), key.float()) / query.shape[-1] ** 0.5
        found.append(scores.softmax(-1).mean(0))  # (n,)

    hook = transformer.blocks[layer].attn1.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        text = pipe.text_encoder.encode(seen.prompts).to(z)  # (S, l, e)
        state = build_state([Given()], x0, None, shots=[seen.starts])
        transformer(z, torch.full((1,), sigma, device=z.device), text, positions=state.position, shots=state.shot)
    finally:
        hook.remove()
    return found[0].view(grid).cpu()


def heat(frame: np.ndarray, weight: Tensor, most: float) -> np.ndarray:
    """A frame (H, W, 3) with its attention (h', w') as a heat map; `most` is the maximum of the scale."""
    H, W = frame.shape[:2]
    level = cv2.resize((weight / most).clamp(0, 1).numpy(), (W, H), interpolation=cv2.INTER_CUBIC).clip(0, 1)[..., None]
    hot = cv2.cvtColor(cv2.applyColorMap((level * 255).astype(np.uint8), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    grey = frame.mean(-1, keepdims=True).repeat(3, -1)
    return (0.6 * grey * (1 - level) + hot * (0.25 + 0.75 * level)).clip(0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------- guidance and VAE


@dataclass(frozen=True)
class Cell:
    """One of several videos to compare: (T, H, W, 3) uint8."""

    name: str
    frames: np.ndarray


def sweep(pipe: KlingPipeline, request: Request, scales: list[float], tell: Tell) -> None:
    """The same seed at each guidance scale; emits a `Cell` when each is done."""
    for scale in scales:
        frames, _ = sample(pipe, request.replace(guidance_scale=scale), tell, previews=False)
        tell(Cell(f"g = {scale:g}", frames))


@dataclass(frozen=True)
class Reconstruction:
    """original, again, error: uint8 (T, H, W, 3). psnr (dB) and ssim of every frame."""

    original: np.ndarray
    again: np.ndarray
    error: np.ndarray
    psnr: list[float]
    ssim: list[float]


@torch.no_grad()
def reconstruct(pipe: KlingPipeline, path: str) -> Reconstruction:
    """A clip of at most the model's length, through the VAE and back."""
    H, W = clip_size(Request(video=path), pipe.config.get("sizes") or ASPECTS)
    latent_size(H, W, pipe.vae.spatial_factor)
    count = min(nearest_frames(probe(path).count(pipe.config.fps))[0], pipe.config.max_frames)
    frames = fit(read_video(path, fps=pipe.config.fps, num_frames=count).frames, H, W)  # (T, H, W, 3)
    again = pipe.decode(pipe.encode(frames))[0]
    error = ((frames.int() - again.int()).abs() * ERROR_GAIN).clamp(0, 255).byte()
    a, b = to_tensor(frames)[None], to_tensor(again)[None]
    return Reconstruction(frames.numpy(), again.numpy(), error.numpy(), psnr(a, b)[0].tolist(), ssim(a, b)[0].tolist())


def read_scales(text: str) -> list[float]:
    """ "1, 3, 6" -> [1, 3, 6]: up to eight guidance scales. Raises `UserError`."""
    try:
        scales = [float(part) for part in text.replace("，", ",").split(",") if part.strip()]
    except (ValueError, AttributeError):
        scales = []
    if not 1 <= len(scales) <= 8 or not all(0 <= s <= 50 for s in scales):
        raise UserError("scales: give one to eight numbers from 0 to 50 with commas between them, such as 1, 3, 6", code="scales")
    return scales
