"""A server (`kling-serve`) as the studio's engine: the page plans here, and the videos are made there."""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from kling_programs.sample.studio.jobs import Stopped, Tell

from kling.cameras.axes import parse_axes
from kling.errors import UserError
from kling.sampling.pipeline import KlingPipeline
from kling.sampling.request import Request
from kling.sampling.rows import FILES

LOOK = 0.5  # seconds between looks at how far a video is
AWAY = (502, 503, 504)  # what a proxy says while the server behind it starts again
SILENT = 60.0  # seconds without the server after which a video is given up


class Remote:
    """url: of the server, such as http://cluster:8000. key: a secret of its --keys, if it has some."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        if key and not (key.isascii() and key.isprintable()):
            raise UserError("KLING_SERVER_KEY holds characters that no header can: set it to a secret of the server's --keys")
        head = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, headers=head, timeout=30, follow_redirects=False)

    def check(self, pipe: KlingPipeline) -> None:
        """Raises `UserError` if the server cannot be used, or serves another model than the one that the page is drawn for."""
        there = self._ask("GET", "/v1/capabilities")
        for name in ("capabilities", "fps"):
            here = pipe.config[name]
            with self._as_known():
                served = there[name]
            if served != (list(here) if isinstance(here, list | tuple) else here):
                raise UserError(f"--server {self.url} serves a model with {name} {served}, this one has {here}: give the same --model")

    def make(self, request: Request, tell: Tell) -> tuple[str, bytes, dict[str, Any]]:
        """One video: its kind ("mp4", or "png" for a picture), the file and its record. tell((step, of)) after every step.

        Raises `UserError` for what the server refuses, `Stopped` if nobody listens any more.
        """
        with self._as_known():
            return self._made(self._ask("POST", "/v1/requests", json=body_of(request)), tell)

    def _made(self, task: dict[str, Any], tell: Tell) -> tuple[str, bytes, dict[str, Any]]:
        name, seen = task["task_id"], time.monotonic()
        try:
            while task["task_status"] in ("submitted", "processing"):
                tell((task["step"], task["steps"]))
                time.sleep(LOOK)
                try:
                    task, seen = self._ask("GET", f"/v1/requests/{name}"), time.monotonic()
                except Unreachable:  # it may be starting again: its tasks outlive that
                    if time.monotonic() - seen > SILENT:
                        raise
        except Stopped:
            self._ask("DELETE", f"/v1/requests/{name}")
            raise
        if task["task_status"] == "failed":
            raise UserError(task["task_status_msg"])
        video = task["task_result"]["videos"][0]
        return video["url"].rpartition(".")[2], self._get(video["url"]).content, self._get(video["record"]).json()

    @contextmanager
    def _as_known(self) -> Iterator[None]:
        """Turn the errors of code that reads an answer into a `UserError`: the server is of another version, or something else."""
        try:
            yield
        except (KeyError, TypeError, IndexError, AttributeError, json.JSONDecodeError) as error:
            line = f"the server {self.url} answers otherwise than kling-serve of this version ({type(error).__name__}: {error})"
            raise UserError(f"{line}: give the address of one, and update it with this program") from None

    def _ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        reply = self._call(method, path, **more)
        try:
            said = reply.json()
            if reply.status_code == 200:
                return said["data"]
            line = said["message"]
        except (ValueError, KeyError, TypeError):
            line = f"status {reply.status_code}, as no kling-serve does: check the address"
        if reply.status_code == 401:
            line = f"{line} (here: set KLING_SERVER_KEY to a secret of its --keys)"
        raise UserError(f"the server {self.url} says: {line}" if method == "GET" else str(line))

    def _get(self, url: str) -> httpx.Response:
        """A file of a result, from the server as it is known here: it may know itself by another name."""
        reply = self._call("GET", "/files/" + url.rpartition("/")[2])
        if reply.status_code != 200:
            raise UserError(f"the server {self.url} does not give the video that it made (status {reply.status_code}): make it again")
        return reply

    def _call(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            reply = self.http.request(method, path, **more)
            if reply.status_code in AWAY and "json" not in reply.headers.get("content-type", ""):
                raise httpx.HTTPError(f"status {reply.status_code}")
            if reply.has_redirect_location:
                raise UserError(f"the server {self.url} leads to {reply.headers['location'][:200]}: give that address")
            return reply
        except httpx.HTTPError as error:
            if "CERTIFICATE_VERIFY" in str(error):
                raise UserError(f"the server {self.url} has a certificate that is not trusted here: set SSL_CERT_FILE to it") from None
            raise Unreachable(f"the server {self.url} does not answer ({error}): is kling-serve running there?") from None


class Unreachable(UserError):
    """The server does not answer."""


def body_of(request: Request) -> dict[str, Any]:
    """A request as `POST /v1/requests` takes it: fields that are not at their defaults, and files as base64."""
    own = {field.name: field for field in dataclasses.fields(Request)}
    plain = Request()
    fields = {name: value for name in own if name != "num_videos" and (value := getattr(request, name)) != getattr(plain, name)}
    files: dict[str, str] = {}

    def file(value: Any, name: str) -> str:
        if not isinstance(value, str | Path):
            raise UserError(f"{name} is no file, and a server needs one: save it first")
        short = f"{len(files)}{Path(value).suffix}"
        files[short] = base64.b64encode(Path(value).read_bytes()).decode()
        return short

    for name in FILES:
        if name in fields:
            fields[name] = file(fields[name], name)
    if "keyframes" in fields:
        fields["keyframes"] = [[file(picture, "keyframes"), frame, strength] for picture, frame, strength in fields["keyframes"]]
    if "references" in fields:
        fields["references"] = [file(picture, "references") for picture in fields["references"]]
    if isinstance(fields.get("tracks"), str):
        raise UserError("a file of tracks cannot be sent to a server yet: draw them")
    if "tracks" in fields:
        fields["tracks"] = [{"mask": t.mask and file(t.mask, "tracks"), "points": [list(p) for p in t.points]} for t in fields["tracks"]]
    if "shots" in fields:
        shots = [{"prompt": s.prompt, "seconds": s.seconds, "camera": _axes(s.camera)} for s in request.storyboard]
        fields["shots"] = [{name: value for name, value in shot.items() if value is not None} for shot in shots]
    if "camera" in fields:
        fields["camera"] = _axes(fields["camera"])
    return {"request": fields | {"seed": request.seed}, "files": files}


def _axes(camera: Any) -> dict[str, float] | None:
    """A camera as axes by name. Raises `UserError` for a path in a file, or for one of poses."""
    if isinstance(camera, str) and not Path(camera).is_file():
        return parse_axes(camera)
    if camera is not None and not isinstance(camera, dict):
        raise UserError("a trajectory cannot be sent to a server yet: give axes or a shot")
    return camera
