"""Sampling in bfloat16: allowed by the checkpoint, used if faster, printed first, recorded, and repeated by a replay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from kling_programs.sample import export, generate

from kling import KlingPipeline
from kling.sampling import agreement
from kling.sampling.record import read_record
from tests.test_generate import save_tiny

QUICK = ("--num-frames", "5", "--aspect", "1:1", "--seed", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder, ["text", "camera"])
    return folder


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch):
    """fast(True): pretend that bfloat16 is the faster type on this machine."""

    def fast(answer: bool) -> None:
        monkeypatch.setattr("kling.hub.load.bf16_is_fast", lambda device_type: answer)

    return fast


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, list[str], list[str]]:
    code = 0
    try:
        generate.main(list(argv))
    except SystemExit as stop:
        code = stop.code
    text = capsys.readouterr()
    return code, text.out.splitlines(), text.err.splitlines()


def test_bf16_is_used_if_allowed_and_faster(model: Path, tmp_path: Path, fast, capsys) -> None:
    allowed = Path(shutil.copytree(model, tmp_path / "allowed"))
    assert agreement.write_sampling_dtype(allowed, 45.0) and not agreement.write_sampling_dtype(model, 44.9)
    found = {}
    for folder in (model, allowed):
        for answer in (False, True):
            fast(answer)
            pipe = generate.load_pipeline(str(folder), "cpu")[1]
            found[folder.name, answer] = generate.precision_of(pipe)
            assert pipe.config.get("sampling_dtype") == ("bf16" if folder == allowed else None)
    assert found == {("tiny", False): "fp32", ("tiny", True): "fp32", ("allowed", False): "fp32", ("allowed", True): "bf16"}
    fast(True)
    assert generate.load_pipeline(str(allowed), "cpu", (("torch_dtype", torch.float32),))[1].transformer.dtype == torch.float32

    assert agreement.write_sampling_dtype(allowed, 20.0) is False
    assert "sampling_dtype" not in json.loads((allowed / "model_index.json").read_text())


def test_the_precision_is_printed_recorded_and_replayed(model: Path, tmp_path: Path, fast, capsys) -> None:
    allowed = Path(shutil.copytree(model, tmp_path / "allowed"))
    agreement.write_sampling_dtype(allowed, 50.0)
    fast(True)
    output = str(tmp_path / "a.mp4")
    code, _, said = run(capsys, "ball", *QUICK, "--model", str(allowed), "--output", output)
    assert code == 0 and said[0].startswith("precision bf16 (") and said[0].endswith(" GFLOP/s)")
    record = read_record(f"{output}.json")
    assert record["machine"]["dtype"] == "bf16"

    fast(False)  # as on another machine, whose default would be fp32
    code, lines, said = run(capsys, "--replay", f"{output}.json")
    assert code == 0 and said[0].startswith("precision bf16 (") and lines[-1].startswith("identical")

    record["machine"] |= {"device": "cpu AVX9", "torch": "1.0"}
    Path(f"{output}.json").write_text(json.dumps(record))
    _, _, said = run(capsys, "--replay", f"{output}.json", "--dtype", "fp32", "--overwrite")
    assert "may not come out identical here: torch 1.0 -> " in said[1]
    assert "device cpu AVX9 -> " in said[1] and "dtype bf16 -> fp32" in said[1]


def test_a_record_without_a_precision_uses_the_folder_s_default(model: Path, tmp_path: Path, fast, capsys) -> None:
    """Earlier versions did not record it: fp32 for ours, even if the folder is now allowed to be sampled in bf16."""
    fast(True)
    output = str(tmp_path / "a.mp4")
    run(capsys, "ball", *QUICK, "--model", str(model), "--output", output)
    record = read_record(f"{output}.json")
    del record["machine"]["dtype"]
    Path(f"{output}.json").write_text(json.dumps(record))
    code, _, said = run(capsys, "--replay", f"{output}.json")
    assert code == 0 and said[0].startswith("precision fp32")


def test_permission_for_bf16_is_measured_on_clips(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """PSNR of the mean squared error; the program writes the result into the folder."""
    assert agreement.psnr([1e-4, 1e-4]) == pytest.approx(40) and agreement.psnr([2e-4, 0.0]) == pytest.approx(40)
    pipe = KlingPipeline.from_pretrained(model)
    asked = list(agreement.requests(pipe))
    assert len(asked) == 8 and len({request.prompt for request in asked}) == 8 and any(request.camera for request in asked)
    assert any(not request.prompt.isascii() for request in asked)

    few = [request.replace(prompt="a ball", num_frames=5, size="32x32", camera=None) for request in asked[:2]]
    monkeypatch.setattr(agreement, "requests", lambda pipe, clips: few)
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    export.main([str(folder), "--measure-bf16"])
    said = capsys.readouterr()
    *clips, verdict = said.out.splitlines()
    assert said.err.startswith("precision fp32 and bf16 (")
    measured = float(verdict.split(": ")[1].split(" dB")[0])
    exact, rough = (KlingPipeline.from_pretrained(folder, torch_dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    apart = [np.square(exact(r).frames / 255 - rough(r).frames / 255).mean() for r in agreement.requests(exact, 2)]
    assert len(clips) == 2 and measured == pytest.approx(-10 * np.log10(np.mean(apart)), abs=0.06)
    assert (json.loads((folder / "model_index.json").read_text()).get("sampling_dtype") == "bf16") == (measured >= 45)

    with pytest.raises(SystemExit):
        export.main([str(folder), "out", "--measure-bf16"])
    assert "leave out out" in capsys.readouterr().err
