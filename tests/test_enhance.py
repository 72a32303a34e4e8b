"""Prompts written out by a chat model: a real one for transformers, whose weights are set so that its answer is known."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny_wan
import torch
from PIL import Image
from test_generate import QUICK, models, run  # noqa: F401 - fixtures
from tokenizers import decoders
from transformers import LlamaConfig, LlamaForCausalLM

from kling import KlingPipeline, Request, Track
from kling.data.video import write_video
from kling.errors import UserError
from kling.sampling.enhance import Enhancer, instructions

# ruff: noqa: F811 - arguments are fixtures
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}~{% endif %}"


def chat_model(folder: Path, answer: str, template: str | None = TEMPLATE) -> Path:
    """A Llama of one layer that says `answer`, whose characters all differ: after each token comes the one that follows it there."""
    tokens = tiny_wan.tokenizer()
    tokens.backend_tokenizer.decoder = decoders.Fuse()  # no spaces between characters
    tokens.chat_template = template
    tokens.save_pretrained(folder)
    V = 160
    config = LlamaConfig(
        vocab_size=V, hidden_size=V, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, tie_word_embeddings=False,
        eos_token_id=tokens.eos_token_id, bos_token_id=None, pad_token_id=tokens.pad_token_id, max_position_embeddings=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = [*tokens("~" + answer, add_special_tokens=False)["input_ids"], tokens.eos_token_id]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                p.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(V))
        for now, then in pairwise(ids):
            model.lm_head.weight[then, now] = 1.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat"), "big fox.")


def test_the_written_prompt_is_shown_used_recorded_and_replayed_without_the_model(run, tmp_path: Path) -> None:
    model = chat_model(tmp_path / "chat", "'big fox.")  # the quote is no part of the prompt
    code, out, error = run("fox", *QUICK, "--seed", "1", "--output", "a.mp4", "--enhance", str(model))
    assert code == 0, error
    assert "prompt: big fox." in out
    record = json.loads(Path("a.mp4.json").read_text())
    assert record["request"]["prompt"] == "big fox." and record["enhanced"] == {"prompt": "fox", "by": str(model)}
    shutil.rmtree(model)
    code, out, _ = run("--replay", "a.mp4.json", "--output", "b.mp4")
    assert code == 0 and out[-1].startswith("identical to a.mp4.json")
    assert json.loads(Path("b.mp4.json").read_text())["enhanced"] == record["enhanced"]
    plain = run("big fox.", *QUICK, "--seed", "1", "--output", "c.mp4")
    assert plain[0] == 0 and json.loads(Path("c.mp4.json").read_text())["frames"] == record["frames"]


def test_the_chat_model_is_told_what_the_checkpoint_can_do(chat: Path) -> None:
    """The shipped model's words in both languages, its seconds, and the room of its text encoder."""
    pipe = KlingPipeline.from_pretrained(weights=False)
    told = instructions(pipe, Request("a fox"))
    assert all(part in told for part in ("red (", "红", "grass", "草", "one shot of 5 seconds")) and "you do not see" not in told
    assert f"at most {min(100, pipe.text_encoder.config.max_bytes // 8)} words" in told
    pipe.register_to_config(vocabulary=None)
    assert "small world" not in instructions(pipe, Request("a fox"))
    assert Enhancer(chat)("a fox", pipe) == "big fox."


def test_the_chat_model_is_told_how_long_the_clip_is_and_what_is_given(models: Path, tmp_path: Path) -> None:
    """Whatever the model's longest clip: the length of the request. Each given thing once, and nothing that is not given."""
    pipe = KlingPipeline.from_pretrained(models / "able", weights=False)
    pipe.register_to_config(capabilities=[*pipe.config.capabilities, "reference", "brush"])
    picture, movie, mask = tmp_path / "a.png", tmp_path / "a.mp4", tmp_path / "m.png"
    Image.new("RGB", (112, 64)).save(picture)
    Image.new("RGB", (112, 64), "white").save(mask)
    write_video(movie, np.zeros((17, 64, 112, 3), np.uint8), 8)
    for fields, said in (
        ({"duration": 2.0}, "one shot of 2 seconds"),
        ({"num_frames": 5}, "one shot of 0.5 seconds"),
        ({"extend_to": 30.0}, "one shot of 30 seconds"),
        ({"video": movie, "duration": 3.0}, "one shot of 3 seconds"),  # of what is new
        ({"video": movie, "extend_to": 12.0}, "one shot of 10 seconds"),
        ({"num_frames": 1}, "a single picture"),
    ):
        told = instructions(pipe, Request("a fox", **fields))
        assert said in told and (said == "a single picture" or "single picture" not in told), told
    signs = {  # what is given -> what alone of it the chat model is told
        "first frame": {"image": picture},
        "last frame": {"last_image": picture},
        "Frames between": {"keyframes": [(picture, 20, 1.0)]},
        "leads back": {"loop": True},
        "goes on from a video": {"video": movie},
        "made anew": {"video": movie, "strength": 0.5},
        "a part of": {"video": movie, "mask": mask},
        "around it": {"video": movie, "outpaint": "1:1"},
        "the first thing": {"references": [picture]},
        "drawn": {"tracks": [Track(None, ((5.0, 5.0), (9.0, 9.0)))]},
        "camera's path is given": {"camera": "pan=5"},
    }
    for sign, fields in signs.items():
        told = instructions(pipe, Request("a fox", **fields))
        assert [other for other in signs if other in told] == [sign], told
    both = instructions(pipe, Request("a fox", image=picture, last_image=picture, references=[picture, picture]))
    assert "first frame" in both and "last frame" in both and "the second thing" in both


def test_the_chat_model_is_told_what_the_checkpoint_cannot_do(models: Path) -> None:
    able, unable = (KlingPipeline.from_pretrained(models / name, weights=False) for name in ("able", "unable"))
    moves = "how the camera moves if the idea says so"
    assert moves in instructions(able, Request("a fox")) and "add no camera move" not in instructions(able, Request("a fox"))
    assert "add no camera move" in instructions(unable, Request("a fox"))
    with pytest.raises(UserError, match="not trained for 'camera'"):
        instructions(unable, Request("a fox", camera="pan=5"))


def test_what_is_wrong_with_a_request_is_told_before_the_chat_model_is_loaded(run, models: Path, tmp_path: Path) -> None:
    """The folder is no chat model, so its error would come first if it were opened first."""
    nowhere = str(tmp_path / "nowhere")
    story = tmp_path / "story.yaml"
    story.write_text("shots: [{prompt: a ball, seconds: 1}]")
    for words, said in (
        (["fox", "--size", "100x60", "--num-frames", "5"], "100x60"),
        (["fox", *QUICK, "--camera", "pan=5", "--model", str(models / "unable")], "not trained for 'camera'"),
        (["fox", *QUICK, "--mode", "fast", "--dry-run"], "mode fast"),
        (["--shots", str(story)], "--shots"),
    ):
        code, out, error = run(*words, "--enhance", nowhere)
        assert code == 2 and not out and said in error.splitlines()[-1] and "config.json" not in error, error


def test_an_idea_may_be_longer_than_a_prompt(run, chat: Path) -> None:
    code, out, error = run("fox " * 30, *QUICK, "--enhance", str(chat), "--dry-run")
    assert code == 0 and "prompt: big fox." in out, error


def test_an_answer_that_does_not_fit_ends_at_a_sentence_or_is_refused(models: Path, tmp_path: Path) -> None:
    pipe = KlingPipeline.from_pretrained(models / "able", weights=False)
    most = pipe.text_encoder.config.max_bytes
    long = "".join(chr(c) for c in range(33, 127) if chr(c) not in ".!?~\"'")
    assert len(long) > most
    with pytest.raises(UserError, match=rf"wrote {len(long)} bytes, and the text encoder reads {most}"):
        Enhancer(chat_model(tmp_path / "long", long))("x", pipe)
    short = Enhancer(chat_model(tmp_path / "both", f"Bigfox. {long.translate({ord(c): None for c in 'Bigfox'})}"))
    assert short("x", pipe) == "Bigfox."
    with pytest.raises(UserError, match="wrote nothing"):
        Enhancer(chat_model(tmp_path / "none", ""))("x", pipe)


def test_mistakes_are_one_line(run, chat: Path, tmp_path: Path) -> None:
    silent = chat_model(tmp_path / "silent", "a", template=None)
    (tmp_path / "empty").mkdir()
    for words, said in (
        (["fox", "--enhance", str(tmp_path / "empty")], "holds no config.json"),
        (["fox", "--enhance", str(silent)], "has no chat template"),
        (["fox", "--enhance", str(tmp_path / "nowhere")], "holds no config.json"),
        (["", "--enhance", str(chat)], "there is none"),
        (["--replay", "a.json", "--enhance", str(chat)], "leave out --enhance"),
    ):
        code, out, error = run(*words, *(() if "--replay" in words else QUICK))
        assert code == 2 and not out and said in error.splitlines()[-1], error
