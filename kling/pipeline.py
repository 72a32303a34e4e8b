"""One pipeline for every task. What a request gives decides what is known of the clip; everything else is the same loop.

pipe = KlingPipeline.from_pretrained()                      # the shipped model
pipe("a red ball rolls left on grass", camera="pan=5", seed=1).frames      # (1, 41, 64, 112, 3)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from kling.condition.camera import Trajectory, camera_signal
from kling.condition.state import State, build_state
from kling.data.transforms import to_tensor, to_uint8
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError
from kling.flow.guidance import guided_velocity
from kling.flow.scheduler import KlingFlowScheduler
from kling.inputs import Inputs, asked_frames, read_inputs
from kling.plan import PRO_STEPS, Hop, Plan, plan_camera, plan_hops
from kling.request import Request
from kling.runtime.random import generator
from kling.shapes import latent_frames, latent_size
from kling.text import ByteTextEncoder
from kling.vae import AutoencoderKLKling

ASSETS = Path(__file__).parent / "assets"
LORA_FILE = "pytorch_lora_weights.safetensors"
PARTS = {
    "vae": AutoencoderKLKling,
    "transformer": KlingTransformer3DModel,
    "text_encoder": ByteTextEncoder,
    "scheduler": KlingFlowScheduler,
}


@dataclass
class KlingOutput(BaseOutput):
    """frames: (b, T, H, W, 3) uint8 for "np", (b, T, 3, H, W) in [0, 1] for "pt". latents: (b, c, f, h, w) of the last hop."""

    frames: np.ndarray | Tensor | None
    latents: Tensor


class KlingPipeline(DiffusionPipeline):
    """VAE, transformer, text encoder and scheduler, and what the checkpoint can do.

    capabilities: names of the tasks (and "camera") that the weights were trained for; others are refused by name.
    fps: frames a second that it learned. max_frames: its longest single clip; longer ones are continued in hops.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        vae: AutoencoderKLKling,
        transformer: KlingTransformer3DModel,
        text_encoder: ByteTextEncoder,
        scheduler: KlingFlowScheduler,
        capabilities: list[str] = (),
        fps: float = 8.0,
        max_frames: int = 41,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, text_encoder=text_encoder, scheduler=scheduler)
        self.register_to_config(**{name: ("kling", part.__name__) for name, part in PARTS.items()})  # where a reader finds the classes
        self.register_to_config(capabilities=list(capabilities), fps=fps, max_frames=max_frames)

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, torch_dtype: torch.dtype = torch.float32) -> KlingPipeline:
        """Load a folder in diffusers layout, or the shipped model. Raises `UserError` if it is none, or a part of it is missing."""
        folder = Path(path) if path is not None else ASSETS
        index = read_index(folder)
        parts = {}
        for name, part in PARTS.items():
            kwargs = {} if name == "scheduler" else {"torch_dtype": torch_dtype, "use_safetensors": True}
            try:
                parts[name] = part.from_pretrained(folder / name, **kwargs)
            except (OSError, ValueError, KeyError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"model {folder} is incomplete: {name} cannot be loaded ({str(error).splitlines()[0]})") from None
        return cls(**parts, **{key: index[key] for key in ("capabilities", "fps", "max_frames") if key in index})

    # ---- low-rank weights ----

    def load_lora_weights(self, path: str | Path, adapter_name: str | None = None) -> None:
        """Add low-rank weights in diffusers' format, such as the `lora` folder of kling-train. Never reads a pickle.

        Raises `UserError` if the folder has no `pytorch_lora_weights.safetensors`, or peft is not installed.
        """
        if not (Path(path) / LORA_FILE).is_file():
            raise UserError(f"low-rank weights '{path}': no {LORA_FILE} there; give the `lora` folder of kling-train")
        try:
            from diffusers.loaders import WanLoraLoaderMixin as Loader  # imports peft, which takes seconds: not at the top
            from peft import LoraConfig  # noqa: F401 - is it there
        except ImportError:
            raise UserError("low-rank weights need peft: pip install 'kling[lora]'") from None
        weights, settings = Loader.lora_state_dict(str(path), weight_name=LORA_FILE, use_safetensors=True, return_lora_metadata=True)
        Loader.load_lora_into_transformer(weights, self.transformer, adapter_name=adapter_name, metadata=settings)

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Add what was loaded into the weights themselves, times `lora_scale`; no cost in sampling is left."""
        self.transformer.fuse_lora(lora_scale)
        self.transformer.unload_lora()

    # ---- what will be done ----

    def plan(self, request: Request) -> Plan:
        """Resolve a request without computing anything. Raises `UserError` for what this model cannot do."""
        return self._prepare(request)[0]

    def _prepare(self, request: Request) -> tuple[Plan, Inputs, Trajectory | None]:
        fps, longest, patch = self.config.fps, self.config.max_frames, self.transformer.config.patch_size
        frames = asked_frames(request, fps)
        inputs = read_inputs(request, frames, fps, longest)
        H, W = inputs.height, inputs.width
        h, w = latent_size(H, W, self.vae.spatial_factor, patch[1])
        hops = plan_hops(request, inputs, frames, fps, longest, self.vae.spatial_factor)
        camera = plan_camera(request, hops, H, W)
        task = hops[0].given.task(latent_frames(hops[0].frames))
        self._check_capable(task, camera, len(hops) > 1)
        settings, pro = self.scheduler.config, request.mode == "pro"
        plan = Plan(
            task=task,
            hops=hops,
            height=H,
            width=W,
            fps=fps,
            num_inference_steps=request.num_inference_steps or settings.num_inference_steps * (PRO_STEPS if pro else 1),
            solver="adams" if pro else settings.solver,
            guidance_scale=settings.guidance_scale if request.guidance_scale is None else request.guidance_scale,
            camera_guidance_scale=request.camera_guidance_scale,
            shift=settings.shift if request.shift is None else request.shift,
            tokens=max(latent_frames(hop.frames) + len(hop.given.keyframes) for hop in hops) * (h // patch[1]) * (w // patch[2]),
        )
        return plan, inputs, camera

    def _check_capable(self, task: str, camera: Trajectory | None, hops: bool) -> None:
        able = self.config.capabilities
        wanted = [task, *(["camera"] if camera is not None else []), *(["continuation"] if hops else [])]
        for name in wanted:
            if name not in able:
                raise UserError(f"this model was not trained for '{name}': it can do {', '.join(able)}")

    # ---- doing it ----

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Request = "",
        *,
        output_type: str = "np",
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict] | None = None,
        return_dict: bool = True,
        **fields: Any,
    ) -> KlingOutput | tuple:
        """Make `num_videos` clips from a `Request`, or from its fields as keywords.

        callback_on_step_end(pipe, step, timestep, {"latents": z, "x0": x0}) is called after every step; `step` counts over all hops.
        Videos are made one at a time, so that a seed gives the same video alone and among others.
        """
        request = prompt if isinstance(prompt, Request) else Request(prompt=prompt, **fields)
        if output_type not in ("np", "pt", "latent"):
            raise UserError(f"output_type '{output_type}': choose from np, pt, latent")
        plan, inputs, camera = self._prepare(request)
        videos, latents = [], []
        for i in range(request.num_videos):
            frames, z = self._one(request, plan, inputs, camera, request.seed + i, callback_on_step_end, output_type != "latent")
            videos.append(frames)
            latents.append(z)
        result: np.ndarray | Tensor | None = None
        if output_type != "latent":
            stacked = torch.stack(videos)  # (b, T, H, W, 3) uint8
            result = stacked.numpy() if output_type == "np" else stacked.permute(0, 1, 4, 2, 3).float() / 255
        output = KlingOutput(frames=result, latents=torch.cat(latents))
        return output if return_dict else (output.frames, output.latents)

    def _one(
        self, request: Request, plan: Plan, inputs: Inputs, camera: Trajectory | None, seed: int, callback: Callable | None, decode: bool
    ) -> tuple[Tensor, Tensor]:
        """One video: (T, H, W, 3) uint8, and the latents of its last hop."""
        if request.loop and inputs.image is None:  # a loop needs a frame to come back to
            still = request.replace(loop=False, num_frames=1, duration=None, extend_to=None, camera=None, seed=seed, num_videos=1)
            inputs = replace(inputs, image=torch.from_numpy(self(still).frames[0, 0]))
        text = {"prompt": self._encode_text(request.prompt), "negative": self._encode_text(request.negative_prompt)}
        continued = inputs.video is not None and plan.hops[0].overlap
        done = inputs.video if continued else torch.empty(0, plan.height, plan.width, 3, dtype=torch.uint8)
        for number, hop in enumerate(plan.hops):
            state = self._state(request, hop, inputs, done if hop.overlap else None)
            rays = None if camera is None else self._rays(camera, hop, plan, plan.hops[0].start)
            noise = torch.randn(state.clean.shape, generator=generator(seed, "noise", number))
            steps = self._sample(state.to(self.device), text, rays, plan, noise.to(self.device))
            for i, (z, x0) in enumerate(steps, start=number * plan.num_inference_steps):
                if callback is not None:
                    callback(self, i, self.scheduler.timesteps[i % plan.num_inference_steps], {"latents": z, "x0": x0})
            latents = state.to(self.device).finish(z)
            if decode or number + 1 < len(plan.hops):
                frames = self.decode(latents)[0]
                done = torch.cat([done, frames[hop.overlap :]])
        return done, latents

    def _sample(
        self, state: State, text: dict[str, Tensor], rays: Tensor | None, plan: Plan, noise: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Walk from noise to the clip; yields z and x0 (b, c, G, h, w) after every step."""
        scheduler = self.scheduler
        scheduler.set_timesteps(plan.num_inference_steps, noise.device, plan.shift, plan.solver)
        z = state.noised(torch.ones(1, device=noise.device), noise)
        for level, next_level in zip(scheduler.sigmas[:-1, None], scheduler.sigmas[1:, None], strict=True):
            tokens = state.token_sigma(level)  # (1, G, h', w')

            def predict(which: str, camera: bool, z: Tensor = z, tokens: Tensor = tokens) -> Tensor:
                return self.transformer(
                    z, tokens, text[which], positions=state.position, kinds=state.kind, camera=rays if camera else None
                ).sample

            v = guided_velocity(predict, plan.guidance_scale, plan.camera_guidance_scale, rays is not None)
            z, x0 = scheduler.step(v, state.sigma(level), state.sigma(next_level), z, state.mask, state.clean)
            yield z, x0

    def _state(self, request: Request, hop: Hop, inputs: Inputs, before: Tensor | None) -> State:
        """What is given of one hop, encoded. `before`: the frames so far, of which the hop's first ones are the last."""
        vae = self.vae
        f, h, w = latent_frames(hop.frames), inputs.height // vae.spatial_factor, inputs.width // vae.spatial_factor
        clean = torch.zeros(1, vae.config.z_dim, f, h, w)
        known: Tensor | None = None
        if before is not None:
            known = before[-hop.overlap :]
        elif inputs.video is not None:
            known = inputs.video
        elif inputs.image is not None:
            known = inputs.image[None]
        if known is not None:
            latents = self.encode(known)
            clean[:, :, : latents.shape[2]] = latents
        lone = [picture for picture, _, _ in inputs.keyframes] + ([inputs.image] if request.loop else [])
        keyframes = torch.cat([self.encode(picture[None]) for picture in lone], dim=2) if lone and hop.given.keyframes else None
        return build_state([hop.given], clean, keyframes, tuple(self.transformer.config.patch_size), request.sigma_c)

    def _rays(self, camera: Trajectory, hop: Hop, plan: Plan, origin: int) -> Tensor:
        """P of one hop, (1, 24, G, ...): its part of the path, relative to its own first frame."""
        part = camera[hop.start - origin : hop.start - origin + hop.frames].relative()
        appended = tuple(t for t, _ in hop.given.keyframes)
        return signal(self.transformer, self.vae, part, plan.height, plan.width, appended)[None].to(self.device)

    def _encode_text(self, prompt: str) -> Tensor:
        return self.text_encoder.encode([prompt])

    def encode(self, frames: Tensor) -> Tensor:
        """(T, H, W, 3) uint8 -> normalised latents (1, c, f, h, w) on the CPU."""
        video = to_tensor(frames)[None].to(self.device, self.vae.dtype)
        return self.vae.normalize(self.vae.encode(video).latent_dist.mode()).float().cpu()

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (b, c, f, h, w) -> (b, T, H, W, 3) uint8 on the CPU, frame by frame: memory does not grow with T."""
        stream = self.vae.decode_stream(self.vae.denormalize(latents.to(self.vae.dtype)))
        chunks = [torch.stack([to_uint8(video) for video in chunk]) for chunk in stream]
        return torch.cat(chunks, dim=1)


def signal(
    transformer: KlingTransformer3DModel, vae: AutoencoderKLKling, camera: Trajectory, H: int, W: int, appended: tuple[int, ...] = ()
) -> Tensor:
    """The camera rays (24, G, h', w') at the resolution that the transformer folds."""
    scale = vae.spatial_factor // transformer.config.camera_downscale
    return camera_signal(camera, H // scale, W // scale, appended)


def load_vae(path: str | Path = "") -> AutoencoderKLKling:
    """A VAE folder, the `vae` of a pipeline folder, or the shipped one for an empty path, ready to encode."""
    folder = Path(path) if path else ASSETS / "vae"
    if not (folder / "config.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(f"VAE folder '{path}' does not exist or holds no config.json: give the export of kling-train-vae")
    return AutoencoderKLKling.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True).eval()


def read_index(folder: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline folder."""
    try:
        return json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"model folder '{folder}' does not exist or holds no model_index.json: give a folder that kling-train exported"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"model folder '{folder}' is damaged: model_index.json is not readable ({error})") from None
