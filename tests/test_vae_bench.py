"""kling-eval vae on VAEs with known errors: one that changes nothing, and one that adds a tenth."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kling_programs.eval import vae as program
from kling_programs.eval.evaluate import main
from torch import Tensor, nn


class Shifted(nn.Module):
    """The latents are the video; decoding adds `by`."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def encode(self, video: Tensor) -> Any:
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: video * 0.8))  # room for the shift before the clamp

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=latents / 0.8 + self.by)


def test_two_vaes_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "open_vae", lambda folder, device: Shifted(0.0 if folder == "same" else 0.1))
    main(["vae", "same", "shifted", "--out", str(tmp_path), "--frames", "5", "--n", "2"])
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["models"]["same"] == {"class": "Shifted", "parameters": 1}
    same, shifted = report["scores"]["same 5"], report["scores"]["shifted 5"]
    assert same["psnr"]["value"] > 100 and same["ssim"]["value"] == pytest.approx(1) and same["psnr"]["n"] == 2
    assert 26 <= shifted["psnr"]["value"] < 27  # 20 log10(2 / 0.1) = 26.02; where white is clamped it is nearer
    assert shifted["flicker"]["value"] <= 0.01
    difference = report["scores"]["shifted 5 less the first"]["psnr"]["value"]
    assert difference == pytest.approx(shifted["psnr"]["value"] - same["psnr"]["value"], abs=1e-4)
    assert report["columns"]["noise"]["same 5"]["psnr"]["value"] < 12 < report["columns"]["truth"]["same 5"]["psnr"]["value"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "holds no config.json"),
        (["a", "a"], "given twice"),
        (["a", "--frames", "6"], "use 5 or 9"),
        (["a", "--size", "64"], "size '64': write it as WIDTHxHEIGHT"),
        (["a", "--frames", "x"], "whole numbers"),
    ],
)
def test_mistakes(argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["vae", *argv, "--out", "out", *([] if "--frames" in argv else ["--frames", "5"])])
    assert stop.value.code == 2 and message in capsys.readouterr().err
