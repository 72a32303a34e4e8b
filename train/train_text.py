"""Train the small text encoder to give captions of the same clip similar features, across phrasings and languages.

kling-train-text configs/text/world.yaml out=runs/text            # run again, the same command continues where it stopped

If transformer and text encoder start to learn together, the text is noise to the transformer, which learns to ignore it. Minutes of this
training give the text encoder features that distinguish prompts. It uses captions only, no pictures.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from kling_programs.train.command import helped

from kling.config import built, load_config
from kling.data.source import ClipSource, DataConfig, check_data
from kling.errors import UserError, program, unknown
from kling.runtime.files import written_folder
from kling.text import ByteTextEncoder
from kling.text.agree import agreement_loss, pool
from kling.text.encoder import cut_prompt
from kling.training.ema import EMA
from kling.training.health import Guard
from kling.training.loop import Loop
from kling.training.optim import check_names, make_optimizer, set_lr
from kling.training.start import LONG_CAPTIONS, refuse_long


@dataclass
class TrainTextConfig:
    """All settings of a run.

    out: folder of the run: checkpoints, metrics.jsonl, and the encoder in export/. steps: updates of the weights, in all.
    seed: of the initial weights and of all random draws. batch: clips, two captions of each. optimizer: adamw or muon, with the same lr.
    lr: highest learning rate. warmup: updates in which lr rises from 0. schedule: constant or cosine, after the warmup.
    floor: fraction of lr at the end of cosine. weight_decay: of matrices, relative to lr. clip_grad: largest norm of the gradients.
    ema: decay of the averaged weights, per update. temperature: of the softmax over the batch; lower values separate similar captions more.
    text: keys of ByteTextEncoder. save_every: updates between checkpoints. keep_last: checkpoints to keep.
    long_captions: what to do with a caption that is too long for the encoder: refuse (before the first step), or cut it.
    log_every: updates between lines of the log. mixed_precision: auto (measured), bf16 or fp32.
    trackers: tensorboard, wandb or both, in addition to metrics.jsonl. workers: processes that read captions.
    threads: CPU threads per operation, null is all cores.
    """

    out: str = "runs/text"
    steps: int = 500
    seed: int = 0
    batch: int = 96
    optimizer: str = "adamw"
    lr: float = 1e-3
    warmup: int = 50
    schedule: str = "cosine"
    floor: float = 0.05
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    ema: float = 0.99
    temperature: float = 0.1
    long_captions: str = "refuse"
    text: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    save_every: int = 200
    keep_last: int = 2
    log_every: int = 10
    mixed_precision: str = "auto"
    trackers: list[str] = field(default_factory=list)
    workers: int = 1
    threads: int | None = None


class CaptionPairs(torch.utils.data.Dataset):
    """The batch of a step: two captions of each of `batch` clips, in two lists; a function of (seed, step) only. max_bytes: cut to it."""

    def __init__(self, source: ClipSource, batch: int, max_bytes: int | None = None) -> None:
        self.source, self.batch, self.max_bytes = source, batch, max_bytes

    def __getitem__(self, step: int) -> tuple[list[str], list[str]]:
        rng = random.Random(f"pairs/{self.source.seed}/{step}")
        pairs = []
        for index in range(step * self.batch, (step + 1) * self.batch):
            captions = self.source.captions(index)
            captions = captions if self.max_bytes is None else [cut_prompt(caption, self.max_bytes) for caption in captions]
            pairs.append(rng.sample(captions, 2) if len(captions) > 1 else captions * 2)
        return [a for a, _ in pairs], [b for _, b in pairs]

    def names(self, step: int) -> list[str]:
        return [f"clip {index}" for index in range(step * self.batch, (step + 1) * self.batch)]


@program
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if helped("kling-train-text", argv):
        return
    cfg = load_config(TrainTextConfig, argv[0], argv[1:])
    check_names(cfg.optimizer, cfg.schedule)
    check_data(cfg.data)
    if cfg.long_captions not in LONG_CAPTIONS:
        raise unknown("long_captions", cfg.long_captions, LONG_CAPTIONS)
    with Loop(cfg) as loop:
        train(cfg, loop)


def train(cfg: TrainTextConfig, loop: Loop) -> None:
    """The training, with the run's folder locked."""
    accelerator = loop.accelerator
    if accelerator.num_processes > 1:
        raise UserError(f"kling-train-text on {accelerator.num_processes} processes: it takes minutes on one; start one")
    source = ClipSource(cfg.data, cfg.seed)
    torch.manual_seed(cfg.seed)  # the initial weights; every later draw is counter-based
    model = built(ByteTextEncoder, cfg.text, "text").train()
    exact = accelerator.mixed_precision == "no"
    optimizer = make_optimizer(cfg.optimizer, model, cfg.lr, weight_decay=cfg.weight_decay, exact=exact)
    cut = model.config.max_bytes if cfg.long_captions == "cut" else None
    if cut is None and source.manifest:
        found = [(shot.name, [c.text for c in shot.captions]) for shot in source.manifest.manifest.shots]
        refuse_long(found, model.config.max_bytes, f"data.source {cfg.data.source}")
    net, optimizer = accelerator.prepare(model, optimizer)
    ema, guard = EMA(model, cfg.ema), Guard()
    loop.resume(model, optimizer, ema)

    for _, (first, second) in loop.batches(CaptionPairs(source, cfg.batch, cut), guard):
        vectors = pool(net(*model.tokenize([*first, *second])))  # (2 b, e)
        loss, found = agreement_loss(*vectors.chunk(2), cfg.temperature)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), cfg.clip_grad)
        set_lr(optimizer, loop.lr(cfg.lr))
        if guard.sound(float(loss.detach()), float(norm)):
            optimizer.step()
            ema.update(model, loop.done)
        optimizer.zero_grad()
        loop.update({"loss": loss.detach(), "grad_norm": norm, "found": found, "skipped": guard.skipped}, clips=cfg.batch)

    with ema.swap(model), written_folder(loop.out / "export") as folder:
        model.save_pretrained(folder)
    loop.finish(loop.out / "export")


if __name__ == "__main__":
    main()
