"""Prompts that a chat model writes out on the page: what it is asked, what is refused before, and what the record then says."""

# ruff: noqa: F811 - arguments are fixtures

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from kling_programs.sample.studio import studio as behind
from kling_programs.sample.studio.events import Events
from kling_programs.sample.studio.form import FIELDS
from kling_programs.sample.studio.shelf import Shelf
from kling_programs.sample.studio.studio import Studio
from test_demo import H, W, drain, pipe, uploads  # noqa: F401 - fixtures

from kling import KlingPipeline, Request

VISITOR = SimpleNamespace(headers={}, username="me", session_hash="tab")
OTHER = SimpleNamespace(headers={}, username="you", session_hash="other")


class Chat:
    """A chat model that says how often it was asked."""

    folder = Path("/srv/models/chat")

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def __call__(self, request: Request, pipe: KlingPipeline) -> str:
        self.asked.append(request)
        return f"{request.prompt} {len(self.asked)}"


@pytest.fixture
def page(pipe, uploads, tmp_path, monkeypatch) -> SimpleNamespace:
    """What the events of a page use, with a sampler that gives black frames."""
    black = np.zeros((5, H, W, 3), np.uint8)
    monkeypatch.setattr(behind, "sample", lambda pipe, request, tell, **_: (black, pipe.plan(request)))
    monkeypatch.setattr("gradio.Info", lambda *_, **__: None)
    monkeypatch.setattr("gradio.Warning", lambda *_, **__: None)
    model = {"path": "", "sha256": {}}
    studio = Studio(pipe, model, Shelf(tmp_path / "out", model), uploads, enhancer=Chat())
    return SimpleNamespace(studio=studio, filled=[], _able=lambda name: True, _fill=lambda fields: [fields])


def written(page: SimpleNamespace, visitor: SimpleNamespace = VISITOR, **fields: object) -> str:
    *_, prompt = Events.enhance.__wrapped__(page, visitor, *(fields.get(name) for name in FIELDS))
    return prompt


def made(page: SimpleNamespace, prompt: str, visitor: str = "me") -> dict:
    return drain(page.studio.make(visitor, Request(prompt, num_frames=5)))[1][0].record


def test_the_record_says_that_a_model_wrote_the_prompt_while_it_is_unchanged(page) -> None:
    said = written(page, prompt="fox")
    assert said == "fox 1"
    assert made(page, said)["enhanced"] == {"prompt": "fox", "by": "chat"}, "the operator's folders are not told"
    assert made(page, said)["enhanced"] == {"prompt": "fox", "by": "chat"}, "of every video"
    assert "enhanced" not in made(page, said + "!") and "enhanced" not in made(page, "fox"), "changed by hand"
    assert "enhanced" not in made(page, said, "you"), "what another visitor wrote is not told"


def test_it_says_so_of_a_form_restored_from_a_record_too(page) -> None:
    record = made(page, written(page, prompt="fox"))
    for name, enhanced in (
        ("good", record["enhanced"]),
        ("odd", {"prompt": 5, "by": "x"}),
        ("long", {"prompt": "x" * 9999, "by": "x"}),
        ("no", 5),
    ):
        file = page.studio.uploads.arrivals / f"{name}.json"
        file.write_text(json.dumps(record | {"enhanced": enhanced}))
        visitor = SimpleNamespace(headers={}, username=name)
        Events.restore.__wrapped__(page, visitor, {"path": str(file)})
        assert made(page, "fox 1", name).get("enhanced") == (enhanced if name == "good" else None)


def test_a_server_s_record_says_so_too(page) -> None:
    frames = {"output": {"format": "mp4", "fps": 8, "seconds": 1.0, "path": "x"}}
    page.studio.remote = SimpleNamespace(make=lambda request, tell: ("mp4", b"video", {"settings": {}} | frames))
    assert made(page, written(page, prompt="fox"))["enhanced"] == {"prompt": "fox", "by": "chat"}


def test_what_is_remembered_is_bounded(page, monkeypatch) -> None:
    monkeypatch.setattr(behind, "WRITTEN", 2)
    first, second, third = (written(page, prompt=word) for word in "abc")
    assert ["enhanced" in made(page, prompt) for prompt in (first, second, third)] == [False, True, True]


@pytest.mark.parametrize(
    ("fields", "english", "chinese"),
    [
        ({}, "few words first", "先写几个字"),
        ({"shots": [{"prompt": "a", "seconds": 1}]}, "each shot has its own words", "每个镜头"),
        ({"prompt": "a", "num_inference_steps": 5.5}, "whole number", "整数"),
        ({"prompt": "a", "mode": "fast"}, "no few-step weights", "没有快速模式的权重"),
    ],
)
def test_what_is_wrong_is_told_before_the_chat_model_is_asked(page, fields, english, chinese) -> None:
    for lang, said in (("en", english), ("zh", chinese)):
        visitor = SimpleNamespace(headers={"accept-language": lang}, username="me", session_hash="tab")
        with pytest.raises(Exception) as error:
            written(page, visitor, **fields)
        assert said in behind.told(error.value, visitor) and not page.studio.enhancer.asked


def test_an_idea_may_be_longer_than_a_prompt(page) -> None:
    written(page, prompt="fox " * 50)
    assert len(page.studio.enhancer.asked) == 1
