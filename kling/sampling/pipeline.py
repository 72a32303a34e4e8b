"""One pipeline for every task. The request determines what is known of the clip; everything else is the same loop.

pipe = KlingPipeline.from_pretrained()                      # the shipped model
pipe("a red ball rolls left on grass", camera="pan=5", seed=1).frames      # (1, 41, 64, 112, 3); the sentence is held out
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from kling.cameras.trajectory import Cameras, Trajectory
from kling.condition.concat import concat_channels, concat_groups, opened
from kling.condition.state import Given, State, build_state
from kling.condition.tracks import Tracks
from kling.condition.writing import write_tracks
from kling.data.transforms import to_tensor, to_uint8
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError
from kling.flow.diffusers_scheduler import shift_key
from kling.flow.solvers import KlingFlowScheduler
from kling.hub.clip import clip_tokens
from kling.hub.load import find_file, find_folder, load, loaded
from kling.hub.lora import add_lora, add_loras
from kling.runtime.device import upload
from kling.runtime.files import as_umask
from kling.sampling.batches import Batches
from kling.sampling.inputs import Inputs, asked_frames, paste, read_inputs
from kling.sampling.join import join
from kling.sampling.plan import (
    PRO_STEPS,
    Hop,
    Plan,
    check_flow_map,
    hop_tracks,
    plan_camera,
    plan_hops,
    plan_solver,
    plan_task,
    plan_tracks,
)
from kling.sampling.request import Fields, Request
from kling.sampling.said import spelled_out
from kling.sampling.sampler import Sampler, Signals, draw_noise
from kling.sampling.shots import rounding_note, timeline
from kling.shapes import ASPECTS, first_frame, latent_frames, latent_size, token_grid
from kling.text import ByteTextEncoder
from kling.text.umt5 import UMT5TextEncoder
from kling.vae import AutoencoderKLKling

ASSETS = Path(__file__).parents[1] / "assets"
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass
class KlingOutput(BaseOutput):
    """frames: (b, T, H, W, 3) uint8 for "np", (b, T, 3, H, W) in [0, 1] for "pt". latents: (b, c, f, h, w) of the last hop."""

    frames: np.ndarray | Tensor | None
    latents: Tensor


class KlingPipeline(Batches, DiffusionPipeline, WanLoraLoaderMixin):
    """VAE, transformer, text encoder and scheduler, and what the checkpoint can do.

    transformer_2, boundary_ratio: a second expert, for levels below the ratio. transformer_fast: a few-step flow map, distilled from the
    transformer, for mode "fast"; `fast` are its `num_inference_steps` and `shift`, and whether it was distilled for `brush`, `reference`
    and `shots`. image_encoder, image_processor: CLIP, for the Wan 2.1 image models. scheduler: ours, or any flow scheduler of diffusers.

    capabilities: names of the tasks (and "camera", "brush", "reference", "shots", "control") that the weights were trained for; others are
    refused by name.
    fps: frames a second of its training clips. max_frames: its longest single clip; longer ones are continued in hops.
    sizes: aspect -> (H, W). block_frames: latent frames per step of block-causal weights; 0 generates all at once.
    defaults: `num_inference_steps`, `guidance_scale` (high noise, low noise) and `negative_prompt`, if the scheduler is not ours.
    licence: of published weights.
    sampling_dtype: "bf16" if measurements allow sampling in it (`kling.sampling.agreement`); used by programs, see `load`.
    vocabulary: "world" if the weights know only the words of the small world's captions.
    track_writing: how tracks are written into the extra channels of published weights, "copy" or "splat"; see `kling.condition.writing`.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->transformer->transformer_2->vae"
    _optional_components = ["transformer_2", "transformer_fast", "image_encoder", "image_processor"]

    def __init__(
        self,
        vae: AutoencoderKLKling,
        transformer: KlingTransformer3DModel,
        text_encoder: ByteTextEncoder | UMT5TextEncoder,
        scheduler: SchedulerMixin,
        capabilities: list[str] = (),
        fps: float = 8.0,
        max_frames: int = 41,
        sizes: dict[str, tuple[int, int]] | None = None,
        transformer_2: KlingTransformer3DModel | None = None,
        image_encoder: Any = None,
        image_processor: Any = None,
        boundary_ratio: float | None = None,
        block_frames: int = 0,
        defaults: dict[str, Any] | None = None,
        licence: str | None = None,
        sampling_dtype: str | None = None,
        vocabulary: str | None = None,
        transformer_fast: KlingTransformer3DModel | None = None,
        fast: dict[str, Any] | None = None,
        track_writing: str | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae, transformer=transformer, text_encoder=text_encoder, scheduler=scheduler, transformer_2=transformer_2,
            transformer_fast=transformer_fast, image_encoder=image_encoder, image_processor=image_processor,
        )  # fmt: skip
        parts = ("vae", "transformer", "transformer_2", "transformer_fast", "text_encoder", "scheduler")
        ours = {name: getattr(self, name) for name in parts}
        self.register_to_config(  # where diffusers looks for the classes
            **{name: ("kling", type(part).__name__) for name, part in ours.items() if type(part).__module__.startswith("kling.")}
        )
        self.register_to_config(capabilities=list(capabilities), fps=fps, max_frames=max_frames)
        extra = {"sizes": sizes, "boundary_ratio": boundary_ratio, "block_frames": block_frames or None, "defaults": defaults}
        extra |= {
            "licence": licence,
            "vocabulary": vocabulary,
            "sampling_dtype": sampling_dtype,
            "track_writing": track_writing,
            "fast": fast,
        }
        self.register_to_config(**{key: value for key, value in extra.items() if value is not None})
        self.groups = concat_groups(transformer.config.in_channels, vae.config.z_dim)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
        lora: Sequence[tuple[str, float]] = (),
        lora_2: Sequence[tuple[str, float]] = (),
        **replaced: Any,
    ) -> KlingPipeline:
        """The shipped model, a folder of ours, a folder of published Wan weights in diffusers layout, or a hub id of either.

        lora, lora_2: (file, scale) pairs added to the transformer and to the second expert.
        replaced: `transformer`, `transformer_2` and `vae` as safetensors in original or diffusers naming, and `checkpoint`, their name in
        the registry; weights=False for planning only; transformer_fast=False without mode fast; see `kling.hub.load`.
        Raises `UserError` if anything is missing, damaged or unknown.
        """
        weights = replaced.get("weights", True)
        pipe = cls(**load(ASSETS if path is None else find_folder(path, weights), torch_dtype, **replaced))
        if weights:
            add_loras(pipe, lora)
            add_loras(pipe, lora_2, second=True)
        return pipe

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write a folder that `from_pretrained` reads. umT5 is copied, not loaded."""
        text = self.text_encoder
        if isinstance(text, UMT5TextEncoder):
            text.save_pretrained(save_directory)
            self.text_encoder = None  # diffusers would only warn that it cannot save it
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.text_encoder = text
        as_umask(Path(save_directory))

    @classmethod
    def lora_state_dict(cls, lora: Any, **kwargs: Any) -> Any:
        """As in diffusers, but never from a pickle."""
        return super().lora_state_dict(lora, **{"use_safetensors": True, **kwargs})

    @property
    def experts(self) -> list[KlingTransformer3DModel]:
        """The transformer, and the second expert if there is one."""
        return [model for model in (self.transformer, self.transformer_2) if model is not None]

    @property
    def transformers(self) -> list[KlingTransformer3DModel]:
        """The experts, and the few-step weights if there are any."""
        return [*self.experts, *([] if self.transformer_fast is None else [self.transformer_fast])]

    def setting(self, name: str, asked: Any = None) -> Any:
        """`asked`, or the checkpoint's own value if that is None: `num_inference_steps`, `guidance_scale` (two: high and low noise),
        `camera_guidance_scale`, `brush_guidance_scale`, `reference_guidance_scale`, `guidance_reach`, `negative_prompt`, `shift` or
        `solver`."""
        scheduler = self.scheduler
        own = {"negative_prompt": "", "camera_guidance_scale": 1.0, "brush_guidance_scale": 1.0}
        own |= {"reference_guidance_scale": 1.0}
        own |= {"guidance_reach": 0.0, "solver": type(scheduler).__name__}
        own |= self.config.get("defaults") or {}
        own |= scheduler.config if isinstance(scheduler, KlingFlowScheduler) else {}
        own["shift"] = scheduler.config[shift_key(scheduler)]
        value = own[name] if asked is None else asked
        return [value, value] if name == "guidance_scale" and not isinstance(value, list | tuple) else value

    def load_lora_weights(
        self,
        lora: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        weight_name: str | None = None,
        load_into_transformer_2: bool = False,
        **hub: Any,
    ) -> None:
        """As diffusers', but read by what reads `lora=` of `from_pretrained` (see `kling.hub.lora`), which knows every naming.

        lora: a file, a folder with one (or `weight_name`), the same on the hub, or tensors by their keys. hub: revision, token and what
        else huggingface_hub's download takes. Whole differences of distilled LoRAs go into the weights: `unload_lora_weights` leaves them.
        Raises `UserError` for a file that is missing, damaged, of another method, or no LoRA of this model, and if peft is not installed.
        """
        file = lora if isinstance(lora, Mapping) else find_file(lora, weight_name, LORA_FILE, **hub)
        add_lora(self, file, load_into_transformer_2, adapter_name)

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Add the loaded low-rank weights, times `lora_scale`, to the weights themselves, so that they cost nothing in sampling."""
        for model in (model for model in self.experts if hasattr(model, "peft_config")):
            model.fuse_lora(lora_scale)
            model.unload_lora()

    # ---- planning ----

    def plan(self, request: Request) -> Plan:
        """Resolve a request without computing anything. Raises `UserError` for what this model cannot do."""
        return self._prepare(request)[1]

    def _prepare(self, request: Request) -> tuple[Request, Plan, Inputs, Trajectory | None]:
        """The request with its cameras spelled out, and what it will do, reads and follows."""
        fps, longest, patch = self.config.fps, self.config.max_frames, self.transformer.config.patch_size
        frames = asked_frames(request, fps)
        moves = frames > 1 and not request.edited and "camera" in self.config.capabilities
        request, said = spelled_out(request, moves and self.config.get("vocabulary") == "world")
        for prompt in (*request.prompts, request.negative_prompt or "") if isinstance(self.text_encoder, ByteTextEncoder) else ():
            self.text_encoder.as_bytes(prompt)  # raises for one that is too long
        inputs = read_inputs(request, frames, fps, longest, self.config.get("sizes") or ASPECTS, self.vae.spatial_factor)
        H, W = inputs.height, inputs.width
        h, w = latent_size(H, W, self.vae.spatial_factor, patch[1])
        hops = plan_hops(request, inputs, frames, fps, longest, self.vae.spatial_factor)
        camera = plan_camera(request, hops, H, W, fps)
        plan_tracks(inputs, hops)  # raises where nothing can move
        task = plan_task(request, hops)
        self._check_capable(task, request, camera, hops)
        fast = self._fast(request)
        solver, why = plan_solver(request, hops, "flow_map" if fast else self.setting("solver"), bool(self.groups))
        if few := solver == "flow_map":
            check_flow_map(request)
        steps = request.num_inference_steps or (fast or {}).get("num_inference_steps")
        if steps is None:
            steps = self.setting("num_inference_steps") * (PRO_STEPS if request.mode == "pro" and not few else 1)

        unshown = not request.references
        unmapped = request.tracks is None or bool(self.groups or self.config.get("block_frames"))  # then no pass is without tracks

        def appended(hop: Hop) -> int:
            return 0 if self.groups else hop.given.appended

        for hop in hops:
            self.check_divides(latent_frames(hop.frames) + appended(hop), h, w)
        times = None if request.shots is None else timeline(request.storyboard, fps)
        cuts = () if times is None else times.cuts
        rounded = rounding_note(request.storyboard, times, fps) if cuts else ""
        high, low = (1.0, 1.0) if few else self.setting("guidance_scale", request.guidance_scale)
        plan = Plan(
            task=task,
            hops=hops,
            height=H,
            width=W,
            fps=fps,
            num_inference_steps=steps,
            solver=solver,
            guidance_scale=high,
            guidance_scale_2=low,
            has_camera=camera is not None,
            camera_guidance_scale=1.0 if few else self.setting("camera_guidance_scale", request.camera_guidance_scale),
            brush_guidance_scale=1.0 if few or unmapped else self.setting("brush_guidance_scale", request.brush_guidance_scale),
            reference_guidance_scale=1.0 if few or unshown else self.setting("reference_guidance_scale", request.reference_guidance_scale),
            shift=self.setting("shift", (fast or {}).get("shift") if request.shift is None else request.shift),
            fast=fast is not None,
            tokens=max(latent_frames(hop.frames) + appended(hop) for hop in hops) * (h // patch[1]) * (w // patch[2]),
            block_frames=self.config.get("block_frames") or 0,
            frame_delay=request.frame_delay,
            guidance_interval=request.guidance_interval or (0.0, 1.0),
            guidance_every=request.guidance_every,
            guidance_reach=0.0 if few else self.setting("guidance_reach", request.guidance_reach),
            cuts=cuts,
            notes=(*inputs.notes, *said, *filter(None, (why, rounded))),
        )
        return request, plan, inputs, camera

    def _fast(self, request: Request) -> dict[str, Any] | None:
        """Settings of the few-step weights if mode "fast" asks for them, else None. Raises `UserError` if there are none."""
        if request.mode != "fast":
            return None
        if self.transformer_fast is None:
            few = self.setting("solver") == "flow_map"
            why = "its own weights take few steps already: leave mode out" if few else "distil it with kling-distill, or use mode std"
            raise UserError(f"mode fast: this model has no few-step weights beside its own; {why}", code="no_fast")
        if getattr(self.transformer, "peft_config", None):
            line = "mode fast: the LoRA changes the transformer, not the few-step weights beside it; unload it, or use mode std"
            raise UserError(line, code="not_fast", field="lora")
        return self.config.get("fast") or {"num_inference_steps": 4}

    def check_divides(self, f: int, h: int, w: int) -> None:
        """Raises `UserError` unless the tokens of latents (f, h, w), appended frames included, divide over the processes of a clip."""
        shared = getattr(self.transformer, "_parallel_config", None)
        split = shared.context_parallel_config.ulysses_degree * shared.context_parallel_config.ring_degree if shared else 1
        n = math.prod(token_grid(f, h, w, tuple(self.transformer.config.patch_size)))
        if n % split:
            raise UserError(
                f"{n} tokens ({f} latent frames of {w}x{h}) do not divide over the {split} processes that share a clip: "
                "change the frames, the size, or their number"
            )

    def _check_capable(self, task: str, request: Request, camera: Trajectory | None, hops: list[Hop]) -> None:
        able = self.config.capabilities
        asked = {"camera": camera is not None, "continuation": len(hops) > 1, "control": request.control is not None}
        asked |= {"diffusion_forcing": bool(request.frame_delay), "text_to_image": request.loop and request.image is None}  # made first
        asked |= {"restyle": bool(request.strength), "brush": request.tracks is not None}
        asked |= {"reference": bool(request.references), "shots": len(request.prompts) > 1}
        beside = [hop for hop in hops if hop.given.keyframes and (hop.overlap or hop.given.space is not None or hop.given.hold)]
        lone = [Given(keyframes=hop.given.keyframes).task(latent_frames(hop.frames)) for hop in beside]  # of a clip that is given too
        for name in [task, *lone, *(name for name, wanted in asked.items() if wanted)]:
            if name not in able:
                raise UserError(
                    f"this model was not trained for '{name}': it can do {', '.join(able)}",
                    code="not_trained",
                    task=name,
                    able=", ".join(able),
                )
        fast, learned = request.mode == "fast" and self.transformer_fast is not None, self.config.get("fast") or {}
        for name, field in (("brush", "tracks"), ("reference", "references"), ("shots", "shots")):
            if asked[name] and fast and not learned.get(name):
                line = f"mode fast: this model's few-step weights were not distilled for {field}: use mode std"
                raise UserError(line, code="not_fast", field=field)
        if asked["shots"] and self.groups:
            raise UserError("shots: these weights take what is given as extra channels, which know no cut: make one shot at a time")
        if request.references and (self.groups or self.config.get("block_frames")):
            raise UserError("references: this model has no frames beside those that it makes, which references are: leave them out")
        if request.brush_guidance_scale not in (None, 1) and (self.groups or self.config.get("block_frames")):
            raise UserError(f"brush_guidance_scale {request.brush_guidance_scale:g}: this model has no pass without tracks: leave it out")
        if request.guidance_reach and (self.groups or self.config.get("block_frames")):
            raise UserError(f"guidance_reach {request.guidance_reach:g}: this model has no given frames among those it makes: leave it out")

    # ---- sampling ----

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Request = "",
        *,
        output_type: str = "np",
        callback_on_step_end: Callable[[Any, int, float, dict], dict] | None = None,
        latents: Tensor | None = None,
        return_dict: bool = True,
        **fields: Unpack[Fields],
    ) -> KlingOutput | tuple:
        """Generate `num_videos` clips from a `Request`, or from its fields as keywords; keywords next to a request replace its fields.

        callback_on_step_end(pipe, step, timestep, {"latents": z, "x0": x0}) is called after every step; `step` counts over all hops.
        latents: the noise to start from (1, c, G, h, w), instead of noise from the seed.
        Videos are generated one at a time, so that a seed gives the same video alone and among others.
        """
        request = prompt.replace(**fields) if isinstance(prompt, Request) else Request(prompt=prompt, **fields)
        if output_type not in ("np", "pt", "latent"):
            raise UserError(f"output_type '{output_type}': choose from np, pt, latent")
        request, plan, inputs, camera = self._prepare(request)
        if latents is not None:
            self._check_latents(latents, plan, request)
        text, decode = self._encode_text(request, plan), output_type != "latent"
        videos, made = [], []
        for i in range(request.num_videos):
            frames, z = self._one(request, plan, inputs, camera, text, request.seed + i, callback_on_step_end, decode, latents)
            videos.append(frames)
            made.append(z)
        self.maybe_free_model_hooks()
        result: np.ndarray | Tensor | None = None
        if output_type != "latent":
            stacked = torch.stack(videos)  # (b, T, H, W, 3) uint8
            result = stacked.numpy() if output_type == "np" else stacked.permute(0, 1, 4, 2, 3).float() / 255
        output = KlingOutput(frames=result, latents=torch.cat(made))
        return output if return_dict else (output.frames, output.latents)

    def _check_latents(self, latents: Tensor, plan: Plan, request: Request) -> None:
        """Raise `UserError` unless the given noise fits one hop of one video."""
        if request.num_videos > 1 or len(plan.hops) > 1:
            raise UserError(f"latents were given for {request.num_videos} videos in {len(plan.hops)} hops: they start one clip; use seed")
        (hop,), scale = plan.hops, self.vae.spatial_factor
        frames = latent_frames(hop.frames) + (0 if self.groups else hop.given.appended)
        shape = (1, self.vae.config.z_dim, frames, plan.height // scale, plan.width // scale)
        if tuple(latents.shape) != shape:
            raise UserError(f"latents of shape {tuple(latents.shape)}: this clip starts from {shape}")

    def _one(
        self, request: Request, plan: Plan, inputs: Inputs, camera: Trajectory | None, text: dict[str, Tensor], seed: int,
        callback: Callable | None = None, decode: bool = True, start: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One video: (T, H, W, 3) uint8, and the latents of its last hop. text: of `_encode_text`. start: noise instead of the seed's."""
        if request.loop and inputs.image is None:  # a loop needs a first frame to return to
            alone = {"loop": False, "keyframes": [], "camera": None, "camera_scale": 1.0, "tracks": None, "brush_guidance_scale": None}
            alone |= {"num_frames": 1, "duration": None, "extend_to": None}
            still = request.replace(**alone, seed=seed, num_videos=1)
            inputs = replace(inputs, image=torch.from_numpy(self(still).frames[0, 0]))
        signals = Signals(text, image=self._image_tokens(inputs))
        continued = inputs.video is not None and plan.hops[0].overlap
        done = inputs.video if continued else torch.empty(0, plan.height, plan.width, 3, dtype=torch.uint8)
        experts = [self.transformer_fast] if plan.fast else self.experts
        sampler = Sampler(experts, self.config.get("boundary_ratio"), self.scheduler, plan)
        steps = 0
        for number, hop in enumerate(plan.hops):
            state, told = self._conditions(request, plan, hop, inputs, camera, signals, done)
            noise = draw_noise(state.clean.shape, state.frames, seed, "noise", number) if start is None else start.float()
            for step in sampler(state, told, upload(noise, self._execution_device), [seed], number):
                if callback is not None:
                    callback(self, steps, step.timestep, {"latents": step.z, "x0": step.x0})
                steps += 1
            latents = state.finish(step.z)
            if decode or number + 1 < len(plan.hops):
                frames = self.decode(latents, hop.cuts)[0]
                if hop.given.space is not None:
                    frames = paste(frames, inputs.video, inputs.mask, self.vae.spatial_factor // 4)
                done = join(done, frames, hop.overlap, hop.fade)
        return done, latents

    def _conditions(
        self, request: Request, plan: Plan, hop: Hop, inputs: Inputs, camera: Trajectory | None, signals: Signals, done: Tensor | None
    ) -> tuple[State, Signals]:  # fmt: skip
        """Everything that one hop is sampled from, except the noise, on the device. signals: those of the whole video. done: its frames so
        far."""
        tracks, origin, way = plan_tracks(inputs, plan.hops), plan.hops[0].start, self.config.get("track_writing")
        tracks = None if tracks is None else hop_tracks(tracks, hop, origin)
        state = self._state(request, hop, inputs, done if hop.overlap else None, None if way else tracks)
        if self.groups:
            concat = concat_channels(state, self.groups, self._control(inputs, hop))
            concat = upload(write_tracks(concat, tracks, way) if way and tracks is not None else concat, self._execution_device)
            state, signals = opened(state), replace(signals, concat=concat)
        state = state.to(self._execution_device)
        return state, self._signals(request, hop, plan, state, signals, camera, origin)

    def _state(self, request: Request, hop: Hop, inputs: Inputs, before: Tensor | None, tracks: Tracks | None) -> State:
        """The encoded given content of one hop. `before`: the frames so far, whose last ones are the hop's first ones. tracks: its own."""
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
        lone = [inputs.image if (picture := inputs.keyframes[i][0]) is None else picture for i in hop.pictures]
        appended = None
        if self.groups:  # these weights take single frames at their position in the clip, with grey for everything else
            video = torch.zeros(3, hop.frames, inputs.height, inputs.width)
            if known is not None:
                video[:, : len(known)] = to_tensor(known)
            if hop.given.space is not None:
                video *= 1 - (inputs.mask > 0.5).float()
            for (t, _), picture in zip(hop.given.keyframes, lone, strict=True):
                video[:, t] = to_tensor(picture[None])[:, 0]
            clean = self._encode(video[None])
            appended = clean.new_zeros(1, vae.config.z_dim, len(lone), h, w) if lone else None
        else:
            if known is not None:
                latents = self.encode(known)
                clean[:, :, : latents.shape[2]] = latents
            inputs.encoded += [self.encode(picture[None]) for picture in inputs.references[len(inputs.encoded) :]]
            if lone := [*(self.encode(picture[None]) for picture in lone), *inputs.encoded]:
                appended = torch.cat(lone, dim=2)
        patch = tuple(self.transformer.config.patch_size)
        starts = [[j for _, j in hop.shots]]
        return build_state([hop.given], clean, appended, patch, request.sigma_c, None if tracks is None else [tracks], starts)

    def _signals(
        self, request: Request, hop: Hop, plan: Plan, state: State, signals: Signals, camera: Trajectory | None, origin: int
    ) -> Signals:  # fmt: skip
        """The signals of one hop: of all texts those of its shots, and its part of the camera, where its shots have one."""
        numbers = [k for k, _ in hop.shots]
        signals = replace(signals, text=signals.text | {"prompt": signals.text["prompt"][numbers[0] : numbers[-1] + 1]})
        shown = [camera is not None] if request.shots is None else [request.storyboard[k].camera is not None for k in numbers]
        if not any(shown):
            return signals
        mask = None if all(shown) else torch.tensor(shown, device=self._execution_device)[state.shot]  # (1, G)
        return replace(signals, camera=self._view(camera, hop, plan, origin), camera_mask=mask)

    def _view(self, camera: Trajectory, hop: Hop, plan: Plan, origin: int) -> Cameras:
        """The camera of one hop: its part of the path, relative to the hop's first frame, or that of the shot."""
        bounds = [hop.start - origin + t for t in [*(first_frame(j) for _, j in hop.shots), hop.frames]]
        parts = [camera[start:end].relative() for start, end in pairwise(bounds)]
        part = Trajectory(torch.cat([part.c2w for part in parts]), torch.cat([part.intrinsics for part in parts]))
        appended = torch.tensor([[t for t, _ in hop.given.keyframes]], dtype=torch.long)
        grid = ray_grid(self.transformer, self.vae, plan.height, plan.width)
        return Cameras(part.c2w[None], part.intrinsics[None], grid, appended, hop.given.references).to(self._execution_device)

    def _control(self, inputs: Inputs, hop: Hop) -> Tensor | None:
        """Latents of one hop's part of the control video."""
        return None if inputs.control is None else self.encode(inputs.control[hop.start : hop.end])

    def _encode_text(self, request: Request, plan: Plan) -> dict[str, Tensor]:
        """The prompts of all shots, and the negative one if guidance needs it. Published encoders are freed before the transformer runs."""
        texts = {"prompt": request.prompts, "negative": [self.setting("negative_prompt", request.negative_prompt)]}
        if plan.guidance_scale == plan.guidance_scale_2 == 1:
            del texts["negative"]
        device, prompts = self._execution_device, [text for several in texts.values() for text in several]
        if isinstance(self.text_encoder, UMT5TextEncoder):
            rows = self.text_encoder.encode(prompts, device)
        else:
            rows = torch.cat([self.text_encoder.encode([text]) for text in prompts])
        return dict(zip(texts, rows.split([len(several) for several in texts.values()]), strict=True))  # (S, l, e), (1, l, e)

    def _image_tokens(self, inputs: Inputs) -> Tensor | None:
        """CLIP's tokens of the first frame, and of the last one if the weights take both; zeros if there is no picture."""
        config = self.transformer.config
        if config.image_dim is None:
            return None
        pictures = [inputs.image] if inputs.image is not None else []
        if config.pos_embed_seq_len is not None:
            pictures += [inputs.image if picture is None else picture for picture, _, _ in inputs.keyframes[-1:]]
        shown = pictures or [torch.zeros(inputs.height, inputs.width, 3, dtype=torch.uint8)]
        tokens = clip_tokens(self.image_encoder, self.image_processor, shown, self._execution_device)  # (1 or 2, i, image_dim)
        return tokens if pictures else torch.zeros_like(tokens)

    def encode(self, frames: Tensor) -> Tensor:
        """(T, H, W, 3) uint8 -> normalised latents (1, c, f, h, w) on the CPU."""
        return self._encode(to_tensor(frames)[None])

    def _encode(self, video: Tensor) -> Tensor:
        """(1, 3, T, H, W) in [-1, 1] -> normalised latents (1, c, f, h, w) on the CPU."""
        video = upload(video, self._execution_device).to(self.vae.dtype)
        return self.vae.normalize(self.vae.encode(video).latent_dist.mode()).float().cpu()

    def decode(self, latents: Tensor, cuts: Sequence[int] = ()) -> Tensor:
        """Normalised latents (b, c, f, h, w) -> (b, T, H, W, 3) uint8 on the CPU, frame by frame: memory does not grow with T.

        cuts: latent frames at which another shot begins.
        """
        stream = self.vae.decode_stream(self.vae.denormalize(latents.to(self.vae.dtype)), cuts=cuts)
        chunks = [torch.stack([to_uint8(video) for video in chunk]) for chunk in stream]
        return torch.cat(chunks, dim=1)


# The signature that `help` and notebooks show has every field by name. Editors read `Fields`.
_shown, _asked = inspect.signature(KlingPipeline.__call__), inspect.signature(Request).parameters
KlingPipeline.__call__.__signature__ = _shown.replace(
    parameters=[
        *[parameter for parameter in _shown.parameters.values() if parameter.name != "fields"],
        *[parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, parameter in _asked.items() if name != "prompt"],
    ]
)


def ray_grid(transformer: KlingTransformer3DModel, vae: AutoencoderKLKling, H: int, W: int) -> tuple[int, int]:
    """The size of the grid of rays that the transformer takes for a clip of H x W pixels."""
    scale = vae.spatial_factor // transformer.config.camera_downscale
    return H // scale, W // scale


def load_vae(path: str | Path = "") -> AutoencoderKLKling:
    """A VAE ready to encode: from a VAE folder, from the `vae` of a pipeline folder or hub id, or the shipped one for an empty path."""
    folder = find_folder(path) if path else ASSETS / "vae"
    if not (folder / "config.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(f"VAE folder '{path}' does not exist or holds no config.json: give the export of kling-train-vae")
    return loaded(folder.parent, folder.name, AutoencoderKLKling, torch_dtype=torch.float32).eval()
