"""A training run for the page: its checkpoints, a pipeline for each, its curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from kling_programs.train.train_dit import TrainDiTConfig, build, pipeline

from kling.config import load_config
from kling.errors import UserError, unknown
from kling.runtime import checkpoint
from kling.runtime.log import METRICS, read_metrics
from kling.sampling.pipeline import KlingPipeline, load_vae
from kling.training.ema import load_average
from kling.training.start import open_start

POINTS = 300  # of a curve
MOST = 8  # checkpoints compared at once


def checkpoints(run: Path) -> list[str]:
    """Names of the finished checkpoint folders, the oldest first."""
    return sorted(path.name for path in run.glob("step-*") if (path / "manifest.json").is_file())


def choice(names: Any) -> list[str]:
    """The checkpoints that a visitor selected. Raises `UserError` for none, or more than `MOST`."""
    if not isinstance(names, list) or not 1 <= len(names) <= MOST:
        raise UserError("checkpoints: choose one to eight of them", code="checkpoints")
    return names


def pipeline_of(run: Path, name: str, device: Any) -> KlingPipeline:
    """A pipeline with a checkpoint's averaged weights. Raises `UserError` for an unknown name, or damaged files."""
    if name not in checkpoints(run):
        raise unknown("checkpoint", name, checkpoints(run))
    cfg = load_config(TrainDiTConfig, run / "config.yaml")
    saved = checkpoint.load(run / name, ["ema"])
    start = open_start(cfg.init_from, cfg.checkpoint, cfg.expert) if cfg.init_from else None
    model = build(cfg, start)
    load_average(saved.tensors["ema"], model)  # what is frozen is as `build` makes it
    pipe = pipeline(cfg, model.eval(), load_vae(cfg.vae), start).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def curves(run: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(step, value, curve) of the loss and the gradient's norm, and of the loss by σ; each value the mean over a stretch of steps."""
    table = pd.DataFrame(read_metrics(run / METRICS))
    if table.empty:
        raise UserError(f"run {run.name} has logged nothing yet: wait for its first steps")
    stretch = max(1, round(len(table) / POINTS))
    table = table.groupby((table["step"] - 1) // stretch * stretch + stretch).mean(numeric_only=True).drop(columns="step")
    table = table.rename(columns=lambda name: name.replace("loss/sigma_", "σ "))  # short, for the legend

    def long(columns: list[str]) -> pd.DataFrame:
        return table[columns].rename_axis("step").reset_index().melt("step", var_name="curve").dropna()

    plain = [name for name in ("loss", "grad_norm") if name in table]
    return long(plain), long([name for name in table if name.startswith("σ ")])
