"""Prompts written out by a chat model: a real one for transformers, whose weights are set so that its answer is known."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_wan
import torch
from test_generate import QUICK, models, run  # noqa: F401 - fixtures
from tokenizers import decoders
from transformers import LlamaConfig, LlamaForCausalLM

from kling import KlingPipeline
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
    plain = run("big fox.", *QUICK, "--seed", "1", "--output", "c.mp4")
    assert plain[0] == 0 and json.loads(Path("c.mp4.json").read_text())["frames"] == record["frames"]


def test_the_chat_model_is_told_what_the_checkpoint_can_do(chat: Path) -> None:
    """The shipped model's words in both languages, its seconds, and the room of its text encoder."""
    pipe = KlingPipeline.from_pretrained(weights=False)
    told = instructions(pipe, picture=True)
    assert all(part in told for part in ("red (", "红", "grass", "草", "5 seconds", "first frame is given"))
    assert f"at most {min(100, pipe.text_encoder.config.max_bytes // 8)} words" in told
    pipe.register_to_config(vocabulary=None)
    assert "small world" not in instructions(pipe)
    assert Enhancer(chat)("a fox", pipe) == "big fox."


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
        (["--replay", "a.json", "--enhance", str(chat)], "leave out enhance"),
    ):
        code, out, error = run(*words, *(() if "--replay" in words else QUICK))
        assert code == 2 and not out and said in error.splitlines()[-1], error
