"""kling-data report and caption, run as a user would."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from kling.cameras.axes import axes_trajectory
from kling.cameras.files import save_trajectory
from kling.data import manifest
from kling.data.manifest import Caption, read_manifest
from kling.data.scan.captioner import PROMPTS
from kling.data.scan.listing import COLUMNS
from kling.data.video import write_video
from kling.errors import UserError
from kling.metrics.camera.clips import METHODS

sys.path[:0] = [str(Path(__file__).parents[1] / "train")]
import data as program  # noqa: E402


def test_help_needs_no_torch_and_lists_the_library_s_choices():
    words = "import sys; sys.argv = ['kling-data', 'scan', '--help']; from kling_programs.train.data import main\ntry: main()\n"
    words += "finally: print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=60).stdout
    assert "--allow-bad" in said and said.endswith("False\n")
    assert set(COLUMNS) == set(program.FIELDS) and set(PROMPTS) == set(program.LANGUAGES) and METHODS == program.METHODS


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["report", "m.jsonl", "--out", "m.jsonl"], "end the page's name in .html"),
        (["report", "m.jsonl", "--out", ""], "error: --out is empty"),
        (["report", "m.jsonl", "--sheet", "-1"], "--sheet -1"),
        (["scan", ".", "--seconds-per-minute", "nan"], "must be positive"),
        (["camera", "path.txt", "--png", "path.txt"], "end the picture's name in .png"),
    ],
)
def test_an_output_that_would_be_an_input_and_numbers_that_are_none(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.jsonl").write_text(before := "precious\n")
    save_trajectory(tmp_path / "path.txt", axes_trajectory({"pan": 5.0}, 5, 64, 112))
    with pytest.raises(SystemExit) as stop:
        program.main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1
    assert (tmp_path / "m.jsonl").read_text() == before and (tmp_path / "path.txt").stat().st_size > 100


@pytest.fixture
def scanned(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    wall = cv2.resize(rng.integers(0, 256, (24, 64, 3), dtype=np.uint8), (640, 144), interpolation=cv2.INTER_CUBIC)
    write_video(tmp_path / "pan.mp4", np.stack([wall[:, 8 * t : 8 * t + 256] for t in range(24)]), 12)
    write_video(tmp_path / "still.mp4", np.stack([wall[:, :256]] * 24), 12)
    write_video(tmp_path / "dim.mp4", np.stack([wall[:, t : t + 256] // 16 for t in range(24)]), 12)
    (tmp_path / "pan.txt").write_text("<b>a wall</b> passes by\n一面墙\n", encoding="utf-8")
    (tmp_path / "words.mp4").write_text("words")
    (tmp_path / "filters.yaml").write_text("min_motion: 0.5\nmax_dark: 0.5\n")
    out = tmp_path / "manifest.jsonl"
    program.main(
        ["scan", str(tmp_path), "--out", str(out), "--filters", str(tmp_path / "filters.yaml"), "--allow-bad", "0.5", "--workers", "1"]
    )
    return out


def test_the_report_shows_what_was_kept_and_why_the_rest_was_not(scanned, capsys):
    program.main(["report", str(scanned)])
    assert capsys.readouterr().out.strip() == str(scanned.with_suffix(".html"))
    page = scanned.with_suffix(".html").read_text(encoding="utf-8")
    assert "&lt;b&gt;a wall&lt;/b&gt; passes by" in page and "<b>a wall" not in page
    for said in ("Kept: 1 of 1", "Dropped, frozen: 1 of 1", "Dropped, near black: 1 of 1", "not a video", "words.mp4", "min_motion is 0.5"):
        assert said in page
    sheets = [cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), 1) for data in re.findall(r"base64,([^\"]+)", page)]
    assert len(sheets) == 3 and all(sheet.shape[0] == 84 and sheet.shape[1] > 4 * 140 for sheet in sheets)
    assert "http" not in page  # it opens anywhere, without a network


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny random LLaVA with its processor, as `save_pretrained` leaves a model."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("model")
    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *(f"word{i}" for i in range(60))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 28, "width": 28}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size)
    LlavaProcessor(
        pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1)
    ).save_pretrained(folder)
    return folder


def test_a_local_model_writes_captions_once(scanned, model, capsys):
    words = ["caption", str(scanned), "--model", str(model), "--language", "en", "zh"]
    program.main(
        ["scan", str(scanned.parent), "--out", str(scanned), "--allow-bad", "0.5", "--workers", "1"]
    )  # without filters: three clips
    program.main(words)
    assert "4 captions written" in capsys.readouterr().out  # pan.mp4 has both
    shots = {Path(s.path).stem: s for s in read_manifest(scanned).shots}
    assert [c.text for c in shots["pan"].captions] == ["<b>a wall</b> passes by", "一面墙"]
    assert [c.language for c in shots["still"].captions] == ["en", "zh"] and all("word" in c.text for c in shots["still"].captions)
    program.main(words)
    assert "0 captions written" in capsys.readouterr().out
    program.main(["scan", str(scanned.parent), "--out", str(scanned), "--allow-bad", "0.5", "--workers", "1"])
    assert {Path(s.path).stem: s for s in read_manifest(scanned).shots} == shots  # a second scan keeps them


class Describer:
    """A caption model that cannot describe one clip, and is interrupted at another."""

    def __init__(self, *_: object, **__: object) -> None:
        self.asked: list[str] = []

    def describe(self, manifest, shot, prompt, language):  # noqa: ANN001, ANN201
        self.asked.append(shot.path)
        if len(self.asked) == 1:
            raise UserError("the caption model returned nothing")
        if len(self.asked) == 3:
            raise KeyboardInterrupt
        return Caption(f"a clip {language}", language)


def test_captions_survive_a_clip_without_one_and_an_interrupt(scanned, capsys, monkeypatch):
    program.main(["scan", str(scanned.parent), "--out", str(scanned), "--allow-bad", "0.5", "--workers", "1"])
    monkeypatch.setattr("kling.data.scan.captioner.Captioner", Describer)
    with pytest.raises(SystemExit) as stop:
        program.main(["caption", str(scanned), "--model", "any", "--language", "en", "zh"])
    assert stop.value.code == 130 and "returned nothing" in capsys.readouterr().err
    assert sum(c.text.startswith("a clip") for shot in read_manifest(scanned).shots for c in shot.captions) == 1


@pytest.mark.parametrize("every", [60.0, 0.0])
def test_a_manifest_is_written_every_so_often_and_not_for_every_clip(scanned, monkeypatch, every):
    """Each time as a whole, so that the cost would grow with the square of the number of clips."""
    program.main(["scan", str(scanned.parent), "--out", str(scanned), "--allow-bad", "0.5", "--workers", "1"])  # three clips
    tracked = {"tracks": "t.safetensors", "measures": {"tracks": {"count": 3, "seconds": 1.0}}}
    moving = {"camera": "c.txt", "measures": {"camera": {"method": "rotation", "error": 0.1, "registered": 1.0}}}
    monkeypatch.setattr("kling.metrics.tracks.estimated_tracks", lambda manifest, shot: replace(shot, **tracked))
    monkeypatch.setattr("kling.metrics.camera.clips.estimated", lambda manifest, shot, method: replace(shot, **moving))
    monkeypatch.setattr(program, "SAVE_EVERY", every, raising=False)
    write, writes = manifest.write_manifest, []
    monkeypatch.setattr(manifest, "write_manifest", lambda *args: writes.append(1) or write(*args))
    for command, field in (("tracks", "tracks"), ("camera", "camera")):
        program.main([command, str(scanned)])
        assert len(writes) == (1 if every else 3) and all(getattr(shot, field) for shot in read_manifest(scanned).shots)
        writes.clear()


def test_two_commands_do_not_change_one_manifest_at_once(scanned, capsys):
    """Each reads it at the start and writes it as a whole, so that the work of the first to end would be lost."""
    words = "import sys; from pathlib import Path; from kling.runtime.lock import locked\nf = Path(sys.argv[1])\n"
    words += "with locked(f.parent, 'manifest', file=f.name): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", words, str(scanned)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        for command in (
            ["tracks", scanned],
            ["camera", scanned],
            ["caption", scanned, "--model", "x"],
            ["scan", scanned.parent, "--out", scanned],
        ):
            with pytest.raises(SystemExit) as stop:
                program.main([str(word) for word in command])
            assert stop.value.code == 2 and f"manifest {scanned} is in use by process {other.pid}" in capsys.readouterr().err
    finally:
        other.communicate("")


def test_a_folder_without_a_model_is_refused(scanned, capsys):
    for folder in (scanned.parent, scanned.parent / "none"):
        with pytest.raises(SystemExit) as stop:
            program.main(["caption", str(scanned), "--model", str(folder)])
        assert stop.value.code == 2 and "caption model" in capsys.readouterr().err
