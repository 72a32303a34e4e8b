"""References through every door: the command line and its replay, a file of prompts, the page, a server's wires."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kling_programs.sample import generate
from test_generate import save_tiny

from kling import Request
from kling.data.image import write_png
from kling.errors import UserError
from kling.runtime.files import sha256
from tests.test_pipeline import picture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder, ["text", "image", "camera", "reference"])
    return folder


def files(folder: Path) -> list[str]:
    for i, name in enumerate(("a.png", "b.png")):
        write_png(folder / name, picture(i))
    return [str(folder / name) for name in ("a.png", "b.png")]


# --------------------------------------------------------------------------------------------------------------- command line


def test_the_command_line_records_and_replays_them(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = files(tmp_path)
    out = tmp_path / "x.mp4"
    words = ["the first thing and the second one", "--reference", a, "--reference", b, "--model", str(model), "--device", "cpu"]
    generate.main([*words, "--num-frames", "5", "--seed", "1", "--output", str(out)])
    assert "text to video with 2 references" in capsys.readouterr().out
    record = json.loads((tmp_path / "x.mp4.json").read_text())
    assert record["inputs"] == {a: sha256(Path(a)), b: sha256(Path(b))} and record["request"]["references"] == [a, b]
    generate.main(["--replay", str(out) + ".json", "--output", str(tmp_path / "again.mp4"), "--device", "cpu"])
    assert "identical" in capsys.readouterr().out
    for bad, words in ((["--reference", ""], "--reference"), (["--reference", str(tmp_path / "c.png")], "c.png does not exist")):
        with pytest.raises(SystemExit) as stop:
            generate.main(["a ball", "--model", str(model), *bad])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and words in said and "Traceback" not in said


def test_the_shipped_model_refuses_them_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        generate.main(["the first thing", "--reference", files(tmp_path)[0], "--dry-run"])
    assert stop.value.code == 2 and "not trained for 'reference'" in capsys.readouterr().err


def test_a_file_of_prompts_names_pictures_beside_it(tmp_path: Path) -> None:
    from kling_programs.sample.batch import read_lines

    files(tmp_path)
    (tmp_path / "many.jsonl").write_text('{"prompt": "the first thing", "references": ["a.png", "b.png"]}\n')
    args = generate.parse(["--prompts", str(tmp_path / "many.jsonl")])
    (line,) = read_lines(args, tmp_path, ".mp4")
    assert line.request.references == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


# ------------------------------------------------------------------------------------------------------------------- the page


def test_the_page_s_tray_is_the_request_s_and_a_record_fills_it_again(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from kling_programs.sample.studio.form import FIELDS, missing, request_of
    from kling_programs.sample.studio.restore import fields_of
    from kling_programs.sample.studio.uploads import Uploads

    (tmp_path / "arrivals").mkdir()
    uploads = Uploads(tmp_path / "arrivals", tmp_path / "store")
    a, b = ({"path": file} for file in files(uploads.arrivals))
    request = request_of({"prompt": "the first thing", "references": [{"image": a, "caption": None}, b]}, uploads)
    kept = request.references
    assert [np.array_equal(picture(i), _pixels(file)) for i, file in enumerate(kept)] == [True, True]
    assert all(Path(file).parent == uploads.store for file in kept) and request_of({"references": None}, uploads).references == []
    for bad, refused in (("x", "list of pictures"), ([3], "list of pictures"), ([{"image": {"path": "/etc/passwd"}}], "not uploaded here"),
                         ([a] * 5, "give at most 4")):  # fmt: skip
        with pytest.raises(UserError, match=refused):
            request_of({"prompt": "x", "references": bad}, uploads)
    studio = SimpleNamespace(uploads=uploads, pipe=SimpleNamespace(config=SimpleNamespace(fps=8.0)), weights_from=lambda record: None)
    record = {"request": {"prompt": "x", "keyframes": [], "references": [kept[0], "/elsewhere/c.png"]}, "inputs": {}}
    fields, remarks = fields_of(record, studio)
    assert fields["references"] == kept[:1] and ("again", {"names": "c.png"}) in remarks
    assert request_of({name: value for name, value in fields.items() if name in FIELDS}, uploads).references == kept[:1]
    able = SimpleNamespace(config=SimpleNamespace(capabilities=["text"]))
    assert missing(able, "references") == "reference"


def _pixels(file: str) -> np.ndarray:
    from kling.data.image import read_image

    return read_image(file).numpy()


def test_the_page_sends_them_to_a_server_and_the_server_takes_them(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from kling_programs.sample.server import own
    from kling_programs.sample.server.desk import Desk, Rules
    from kling_programs.sample.server.store import Store, names_of
    from kling_programs.sample.studio.remote import body_of

    from kling.sampling.rows import located

    desk = Desk(Store(tmp_path / "store"), str(model), Rules())
    sent = body_of(Request("the first thing", references=files(tmp_path), num_frames=5))
    task, _ = desk.take("anna", own.read(own.Body(**json.loads(json.dumps(sent))), ""))
    assert names_of(task.request) == task.request["references"] and len(task.request["references"]) == 2
    again = Request(**located(task.request, desk.store.folder))
    assert [np.array_equal(_pixels(file), picture(i)) for i, file in enumerate(again.references)] == [True, True]
    for bad in ("a.png", ["/etc/passwd"], [{"a": 1}]):  # a name might lead to a file of the server
        with pytest.raises(UserError, match="references"):
            own.read(own.Body(request={"prompt": "x", "references": bad}), "")


# -------------------------------------------------------------------------------------------------------------------- the wire


def test_kling_s_lists_of_pictures_are_references(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from kling_programs.sample.server import classic
    from kling_programs.sample.server.desk import Desk, Rules
    from kling_programs.sample.server.store import Store
    from kling_programs.sample.server.wire import WireError

    desk = Desk(Store(tmp_path / "store"), str(model), Rules())
    pictures = [{"image": base64.b64encode(Path(file).read_bytes()).decode()} for file in files(tmp_path)]

    def take(**body: Any) -> Any:
        body = {"prompt": "the first thing", "duration": "2", "image_list": pictures} | body
        return desk.take("anna", classic.read(desk, "multi-image2video", classic.MultiImage2Video(**body), ""))[0]

    task = take(camera_control={"type": "forward_up"}, aspect_ratio="1:1")
    kept = task.request["references"]
    assert [(desk.store.folder / name).read_bytes() for name in kept] == [base64.b64decode(one["image"]) for one in pictures]
    assert task.request["aspect"] == "1:1" and desk.capabilities()["endpoints"]["multi-image2video"]
    for body, refused in (
        ({"image_list": []}, "image_list: give a list"),
        ({"image_list": [{"url": "x"}]}, "image_list: give a list"),
        ({"image_list": pictures * 3}, "image_list has 6 pictures: give at most 4"),
        ({"image_list": [{"image": "???"}]}, "image_list"),
        ({"prompt": ""}, "prompt is empty"),
    ):
        with pytest.raises((WireError, UserError), match=refused):
            take(**body)
