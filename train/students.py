"""What the methods of kling-distill share: the settings, the teacher and the student, the guidance to build in, and the export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kling.cache.batches import LatentSteps
from kling.cache.store import LatentCache
from kling.condition.state import State
from kling.condition.tasks import check_tasks, keyframe_share
from kling.dit import KlingTransformer3DModel
from kling.errors import UserError, unknown
from kling.flow.diffusers_scheduler import shift_key
from kling.flow.guidance import given_share, guided_velocity
from kling.flow.solvers import KlingFlowScheduler
from kling.hub.load import loaded
from kling.runtime.accelerator import shard_frozen
from kling.runtime.device import upload
from kling.runtime.parallel import same_rng
from kling.sampling.pipeline import KlingPipeline, load_vae
from kling.sampling.plan import FAST_STEPS
from kling.sampling.request import Request
from kling.shapes import check_lengths
from kling.text import ByteTextEncoder
from kling.text.umt5 import UMT5TextEncoder
from kling.training.ema import EMA, restore_average
from kling.training.examples import Drawing, Example
from kling.training.export import save_pipeline
from kling.training.loop import Loop
from kling.training.lora import Lora, add_lora, check_half
from kling.training.model import Trained
from kling.training.optim import check_names
from kling.training.start import (
    LONG_CAPTIONS,
    SHIPPED,
    Start,
    check_brush,
    check_captions,
    check_fit,
    check_reference,
    check_shots,
    complete_cache,
    complete_text,
    open_start,
)
from kling.training.validation import check_samples, draw_samples, sample_requests
from kling.vae import AutoencoderKLKling

VELOCITIES = ("teacher", "data")
CONTROLS = ("brush", "reference", "shots")  # that a student knows only if it was distilled with them


@dataclass
class FlowMap:
    """Method flow_map: the mean velocity between any two noise levels (kling/flow/flow_map.py).

    velocity: the target: teacher, its guided velocity, which has no noise; or data, as in a training.
    gate: share of the embedded noise level that encodes the end of the step, as in AnyFlow.
    plain: share of the clips, 0 to 1, with steps of length 0, which keep the student's velocity correct.
    counts: numbers of steps whose sampling grids the other clips' steps are drawn from; one listed twice is drawn twice as often. Empty
    draws both ends freely, as AnyFlow does. to_clean: share of the freely drawn steps, 0 to 1, that end at level 0.
    stride: the target goes this share of the schedule along the velocity, and on with the student's own step. 0 takes AnyFlow's target,
    with a derivative in time instead. delta: half the interval of that derivative.
    """

    velocity: str = "teacher"
    gate: float = 0.25
    plain: float = 0.25
    counts: list[int] = field(default_factory=lambda: [1, 2, 4, 4, 4, 8])
    to_clean: float = 0.5
    stride: float = 0.05
    delta: float = 0.005

    def check(self) -> None:
        if self.velocity not in VELOCITIES:
            raise unknown("flow_map.velocity", self.velocity, VELOCITIES)
        for name in ("plain", "to_clean", "gate", "stride"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"flow_map.{name} {getattr(self, name):g}: give a share from 0 to 1")
        if not 0 < self.delta <= 0.1:
            raise UserError(f"flow_map.delta {self.delta:g}: give more than 0 and at most 0.1")
        if self.counts and self.to_clean != FlowMap.to_clean:
            raise UserError(f"flow_map.to_clean {self.to_clean:g} is for freely drawn steps: leave it out, or set flow_map.counts=[]")
        if self.stride and self.delta != FlowMap.delta:
            raise UserError(f"flow_map.delta {self.delta:g} is for a derivative in time: leave it out, or set flow_map.stride=0")


@dataclass
class Matching:
    """Method dmd: clips that have the teacher's distribution (kling/flow/matching.py).

    critic_updates: updates of the critic for each of the student. critic_lr: the critic's highest learning rate.
    """

    critic_updates: int = 4
    critic_lr: float = 1e-6

    def check(self) -> None:
        if not self.critic_lr > 0:
            raise UserError(f"dmd.critic_lr {self.critic_lr:g}: give a positive number")


METHODS = {"flow_map": FlowMap, "dmd": Matching}


@dataclass
class DistillConfig:
    """All settings of a distillation.

    out: folder of the run: checkpoints, metrics.jsonl, samples, and the model in export/.
    teacher: a model folder, ours, published or shipped.
    checkpoint: the registry's name of it, if its files do not tell. vae: a VAE folder; empty for the teacher's.
    student: a model folder to start from instead of the teacher: an export of this program, perhaps of an earlier teacher. From a flow map
    dmd makes another flow map.
    method: flow_map, a mean velocity for steps of any length; or dmd, clips with the teacher's distribution after a few fixed steps. Its
    settings are in `flow_map` or `dmd`; those of the other method must be left out.
    guidance_scale, camera_guidance_scale, brush_guidance_scale, reference_guidance_scale, guidance_reach: guidance to build in; null is the
    teacher's own.
    num_inference_steps: default steps of the export; dmd trains clips of so many. beside: export the teacher together with the student, for
    mode fast.
    steps: updates of the weights, in all; of dmd, those of the critic too. seed: of all random draws. batch: clips of the longest length in
    a batch of each process and micro-step; of a shorter one there are more, for the same number of tokens. group: consecutive batches of
    one shape.
    optimizer: adamw or muon, with the same lr. lr: highest learning rate. betas: of the optimizer's moments.
    warmup: updates in which lr rises from 0. schedule: constant or cosine, after the warmup. floor: fraction of lr at the end of cosine.
    weight_decay: of matrices, relative to lr. clip_grad: largest norm of the gradients. ema: decay of the averaged weights, per update.
    lora: train low-rank weights, and of a flow map the embedding of a step's end; they are merged in the export. Teacher, student and
    critic then share one copy of the other weights, unless they are sharded.
    cache: a latent cache; filled by the preset `encode` (if that is empty, the cache is used as kling-encode left it).
    encode: preset of kling-encode that fills the cache. frames: lengths to draw from in pixel frames, each 1 + 4k, at most the cache's; one
    listed twice is drawn twice as often.
    tasks: how often each is drawn, as shares. text_drop, camera_drop: share of clips, 0 to 1, whose text or camera is left out.
    brush: share of clips with tracks, for a teacher that knows them. reference: share of batches with references, likewise. shots: share of
    the clips of a length that are storyboards; 0 leaves those of the cache out.
    long_captions: what to do with a caption that is too long for our text encoder: refuse (before the first step), or cut it.
    samples: what is drawn every `sample_every` updates, as fields of `Request`. sample_every: updates between samples, 0 draws none.
    save_every: updates between checkpoints. keep_last: checkpoints to keep. log_every: updates between lines of the log.
    mixed_precision: auto (measured), bf16 or fp32. gradient_accumulation: micro-steps of an update.
    activation_checkpointing: none, selective or full.
    trackers: tensorboard, wandb or both, in addition to metrics.jsonl. workers: processes that read clips, for each training process.
    threads: CPU threads per operation, null is OMP_NUM_THREADS or all cores.
    """

    out: str = "runs/distill"
    teacher: str = SHIPPED
    checkpoint: str | None = None
    vae: str = ""
    student: str = ""
    method: str = "flow_map"
    flow_map: FlowMap = field(default_factory=FlowMap)
    dmd: Matching = field(default_factory=Matching)
    guidance_scale: float | None = None
    camera_guidance_scale: float | None = None
    brush_guidance_scale: float | None = None
    reference_guidance_scale: float | None = None
    guidance_reach: float | None = None
    num_inference_steps: int = 4
    beside: bool = False
    steps: int = 1000
    seed: int = 0
    batch: int = 16
    group: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    warmup: int = 20
    schedule: str = "constant"
    floor: float = 0.02
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    ema: float = 0.99
    lora: Lora = field(default_factory=Lora)
    cache: str = "runs/cache"
    encode: str = "cache/world.yaml"
    frames: list[int] = field(default_factory=lambda: [17])
    tasks: dict[str, float] = field(default_factory=lambda: {"text": 1.0})
    text_drop: float = 0.05
    camera_drop: float = 0.4
    brush: float = 0.0
    reference: float = 0.0
    shots: float = 0.0
    long_captions: str = "refuse"
    samples: list[dict[str, Any]] = field(default_factory=list)
    sample_every: int = 0
    save_every: int = 100
    keep_last: int = 2
    log_every: int = 10
    mixed_precision: str = "auto"
    gradient_accumulation: int = 1
    activation_checkpointing: str = "none"
    trackers: list[str] = field(default_factory=list)
    workers: int = 1
    threads: int | None = None

    def check(self) -> None:
        """Raises `UserError` for a value that cannot be used, before anything is made."""
        check_names(self.optimizer, self.schedule, self.betas)
        check_tasks(self.tasks)
        check_lengths(self.frames)
        if self.sample_every and not sample_requests(self.samples):  # raises for what is no request
            raise UserError(f"sample_every {self.sample_every} is set, and there is nothing to draw: give samples, or sample_every=0")
        for name, value, known in (("method", self.method, METHODS), ("long_captions", self.long_captions, LONG_CAPTIONS)):
            if value not in known:
                raise unknown(name, value, known)
        if not 1 <= self.num_inference_steps <= FAST_STEPS:
            raise UserError(f"num_inference_steps {self.num_inference_steps}: few-step weights are sampled with 1 to {FAST_STEPS}")
        if self.lora.merge:
            raise UserError("lora.merge: kling-distill always merges low-rank weights in its export: leave it out")
        for name in ("brush", "reference"):
            if (scale := getattr(self, f"{name}_guidance_scale")) is not None and not getattr(self, name):
                line = f"{name}_guidance_scale {scale:g} is set, and {name} is 0: the student sees none; set {name}, or leave it out"
                raise UserError(line)
        getattr(self, self.method).check()
        for name, settings in METHODS.items():
            if name != self.method and (given := getattr(self, name)) != settings():
                other = next(key for key, value in vars(settings()).items() if getattr(given, key) != value)
                raise UserError(f"{name}.{other} belongs to method {name}, and this run's is {self.method}: leave it out")


class Guide:
    """The guidance to build in: the teacher's own, or the one in the run's settings. None is on tracks or references if the student is not
    to see any. sharded: whether the teacher is, so that every process needs each pass that another makes."""

    def __init__(self, cfg: DistillConfig, start: Start, sharded: bool = False) -> None:
        pipe = KlingPipeline.from_pretrained(start.folder, weights=False, checkpoint=cfg.checkpoint)
        self.scale = pipe.setting("guidance_scale", cfg.guidance_scale)[0]
        self.camera_scale = pipe.setting("camera_guidance_scale", cfg.camera_guidance_scale)
        self.brush = pipe.setting("brush_guidance_scale", cfg.brush_guidance_scale) if cfg.brush else 1.0
        self.reference = pipe.setting("reference_guidance_scale", cfg.reference_guidance_scale) if cfg.reference else 1.0
        self.sharded = sharded
        self.reach = pipe.setting("guidance_reach", cfg.guidance_reach)
        self.negative = pipe.setting("negative_prompt")

    def without(self, state: State) -> dict[str, float]:
        """Scales of what else can be left out, where there is any. Only some batches have references, and all have a map of tracks."""
        pictured = state.references or self.sharded
        return {"no tracks": 1.0 if state.tracks is None else self.brush, "no references": self.reference if pictured else 1.0}

    def passes(self, example: Example) -> int:
        """The number of passes for the guided velocity of a batch, with that of the unguided one."""
        camera_scale = 1.0 if example.cameras is None else self.camera_scale
        return 1 + sum(scale != 1 for scale in (self.scale, camera_scale, *self.without(example.state).values()))

    def __call__(
        self, net: Callable[..., Tensor], example: Example, z: Tensor, words: Tensor, nothing: Tensor, v: Tensor | None = None
    ) -> Tensor:
        """The guided velocity (b, c, G, h, w) of `net` at z, or `v` guided by it."""

        def predict(which: str, camera: bool) -> Tensor:
            if v is not None and which == "prompt" and camera == (example.cameras is not None):
                return v
            shown = example if camera else replace(example, has_camera=torch.zeros_like(example.has_camera))
            shown = replace(shown, state=state.without_tracks()) if which == "no tracks" else shown
            seen = state.without_references(z) if which == "no references" else z
            return net(shown, z=seen, words=(nothing if which == "negative" else words,)).float()

        state = example.state
        share = given_share(*state.host, self.reach)
        share = None if share is None else upload(share, state.mask.device)
        return guided_velocity(predict, self.scale, self.camera_scale, example.cameras is not None, share, self.without(state))


@dataclass
class Parts:
    """What a method's loop works with. All modules are on the run's device; the VAE and text encoder and the teacher are frozen."""

    start: Start
    vae: AutoencoderKLKling
    text: ByteTextEncoder | UMT5TextEncoder
    teacher: Trained
    student: Trained
    guide: Guide
    negative: Tensor  # (1, l, e) the negative prompt, embedded
    data: LatentSteps
    drawing: Drawing
    density: str  # of the teacher's noise levels, and their shift
    shift: float
    asked: list[Request]

    def words(self, example: Example) -> tuple[Tensor, Tensor]:
        """Embeddings (b · S, l, e) of the prompts and of the negative prompt, for every shot of every clip."""
        n, device = len(example.prompts), self.negative.device
        return self.text.encode(example.prompts).to(device).float(), self.negative.expand(n, -1, -1)


def prepare(cfg: DistillConfig, loop: Loop) -> Parts:
    """Open the teacher, fill the cache, and make the student. Raises `UserError` for what does not fit together."""
    accelerator, device = loop.accelerator, loop.accelerator.device
    if loop.layout.split > 1:
        raise UserError("kling-distill does not share a clip between processes: take a layout without context parallelism, such as fsdp2")
    start = open_start(cfg.teacher, cfg.checkpoint, expert=None)
    vae = load_vae(cfg.vae or ("" if cfg.teacher == SHIPPED else cfg.teacher)).to(device)
    complete_cache(cfg.cache, cfg.encode, vae, loop.stop, accelerator)
    cache = LatentCache(cfg.cache)
    cache.check_vae(vae)
    if keyframe_share(cfg.tasks):
        cache.check_lengths(cfg.frames)
    guide, text = Guide(cfg, start, loop.layout.sharded), start.text({}, cfg.cache)
    asked = sample_requests(cfg.samples) if cfg.sample_every else []
    if start.published and accelerator.is_main_process:
        complete_text(text, cfg.cache, [guide.negative, *start.prompts(asked)], device, loop.stop)
    accelerator.wait_for_everyone()

    torch.manual_seed(cfg.seed)  # of low-rank weights; every later draw is counter-based
    check_half(cfg.lora, accelerator.mixed_precision)
    half = accelerator.mixed_precision == "bf16" and (cfg.lora.half or not cfg.lora.rank)  # else low-rank networks share fp32 weights
    teacher = Trained(start.transformer({}, torch.bfloat16 if half else torch.float32), None).to(device).eval().requires_grad_(False)
    shard_frozen(accelerator, teacher.transformer, teacher.transformer.blocks)
    student = build(cfg, start, None if loop.layout.sharded else teacher)
    if isinstance(text, ByteTextEncoder):
        text = text.to(device).eval().requires_grad_(False)
    max_bytes = check_captions(text, cache, cfg.long_captions)
    with torch.no_grad():
        negative = text.encode([guide.negative]).to(device).float()
    check_fit(vae, student.transformer, cfg.tasks, cache)
    check_brush(cfg.brush, student.transformer, cache)
    check_reference(cfg.reference, student.transformer, cache)
    check_shots(cfg.shots, student.transformer, cache)
    if asked:
        check_samples(pipeline(replace(cfg, beside=False), student, vae, text, start), asked)
    own = start.settings["scheduler"]
    return Parts(
        start, vae, text, teacher, student, guide, negative,
        LatentSteps(cache, cfg.batch, cfg.frames, cfg.seed, cfg.group, cfg.shots),
        Drawing(cfg.seed, cfg.tasks, cfg.text_drop, cfg.camera_drop, cfg.group, max_bytes, cfg.brush, cfg.reference),
        own.config.get("density", "logit_normal"), own.config[shift_key(own)], asked,
    )  # fmt: skip


def build(cfg: DistillConfig, start: Start, teacher: Trained | None = None) -> Trained:
    """The student: the teacher's weights, of a flow map with an embedding of the end of the step; or those of an earlier student, as far as
    it has them.

    teacher: with low-rank training, its storage is used for the weights that both have.
    """
    gate, earlier = cfg.flow_map.gate if cfg.method == "flow_map" else None, None
    if cfg.student:
        earlier = earlier_student(Path(cfg.student))
        if cfg.method == "flow_map" and earlier.config.gate_value != gate:
            raise UserError(
                f"student {cfg.student} has gate_value {earlier.config.gate_value}, and flow_map.gate is {gate:g}: give a flow map with it"
            )
        gate = earlier.config.gate_value
    if cfg.beside and gate is None:
        raise UserError("beside: mode fast takes a flow map, and dmd alone makes none: set beside=false, or student=FOLDER of a flow map")
    transformer = start.transformer({} if gate is None else {"gate_value": gate}, frozen_dtype(cfg))
    if earlier is not None:
        own = transformer.state_dict()
        for name, tensor in earlier.state_dict().items():
            if name not in own or own[name].shape != tensor.shape:
                raise UserError(f"student {cfg.student} was not made from a model like {cfg.teacher}: {name} differs")
            own[name].copy_(tensor)
    return adapted(cfg, Trained(transformer, None), teacher)


def earlier_student(folder: Path) -> KlingTransformer3DModel:
    """The few-step weights of an export of this program."""
    part = next((part for part in ("transformer_fast", "transformer") if (folder / part / "config.json").is_file()), None)
    if part is None:
        raise UserError(f"student {folder} holds no transformer: give the export of a kling-distill run")
    return loaded(folder, part, KlingTransformer3DModel, torch_dtype=torch.float32)


def frozen_dtype(cfg: DistillConfig) -> torch.dtype:
    """The dtype of a student's or critic's weights: low-rank training may hold the frozen ones in bf16."""
    return torch.bfloat16 if cfg.lora.rank and cfg.lora.half else torch.float32


def adapted(cfg: DistillConfig, model: Trained, teacher: Trained | None) -> Trained:
    """The model in training, with low-rank weights if the run has them. teacher: as in `build`."""
    if cfg.lora.rank:
        theirs = {} if teacher is None else dict(teacher.named_parameters())
        for name, parameter in model.named_parameters():
            if name in theirs and same(parameter, theirs[name]):
                parameter.data = theirs[name].data
        add_lora(model, cfg.lora)
        if model.transformer.config.gate_value is not None:
            model.transformer.condition_embedder.delta_embedder.float().requires_grad_(True)
    return model.train()


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two weights are equal, values and dtype."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.to(b.device), b)


def sample(cfg: DistillConfig, loop: Loop, parts: Parts, ema: EMA) -> None:
    """Draw the run's samples with the averaged weights."""
    main, device = loop.accelerator.is_main_process, loop.accelerator.device
    if main or loop.layout.sharded:  # sharded weights need all processes
        picture = loop.out / "samples" / f"{loop.done:08d}.png" if main else None
        alone = replace(cfg, beside=False)  # beside the teacher, only requests of mode fast would show the student
        with ema.swap(parts.student), same_rng(device), loop.accelerator.autocast():
            draw_samples(pipeline(alone, parts.student, parts.vae, parts.text, parts.start), parts.asked, picture)


def pipeline(cfg: DistillConfig, model: Trained, vae: nn.Module, text: ByteTextEncoder | UMT5TextEncoder, start: Start) -> KlingPipeline:
    """The student as a user gets it; or, with `beside`, the teacher with the student for mode fast. It takes the controls of this run."""
    settings, own = dict(start.settings), start.settings["scheduler"]
    learned = {name: bool(getattr(cfg, name)) for name in CONTROLS}
    shift, extra = own.config[shift_key(own)], {}
    if cfg.beside:
        teacher = start.transformer({}, model.transformer.dtype).to(model.transformer.device)
        models = start.other_models(teacher) | {"transformer_fast": model.transformer}
        extra = {"fast": {"num_inference_steps": cfg.num_inference_steps, "shift": shift} | learned}
    else:
        models = start.other_models(model.transformer)
        solver = "renoise" if model.transformer.config.gate_value is None else "flow_map"
        settings["scheduler"] = KlingFlowScheduler(shift, solver, cfg.num_inference_steps, guidance_scale=1.0)
        settings.pop("defaults", None)
        settings["capabilities"] = [name for name in settings["capabilities"] if learned.get(name, True)]
    return KlingPipeline(vae, text_encoder=text, **models, **settings, **extra)


def publish(cfg: DistillConfig, loop: Loop, parts: Parts) -> None:
    """Export the averaged weights of the last checkpoint, from the main process, and end the run."""
    if loop.accelerator.is_main_process:
        model = build(cfg, parts.start)
        restore_average(loop.out, model)
        if cfg.lora.rank:
            model.transformer.fuse_lora()
            model.transformer.unload_lora()
        save_pipeline(pipeline(cfg, model, parts.vae, parts.text, parts.start), loop.out / "export")
    loop.finish(loop.out / "export")
