"""Our own wire, `POST /v1/requests`: every field of a `Request`, with its files in the body. The studio uses it (`kling-demo --server`)."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from typing import Any

from kling_programs.sample.server.classic import task_data as classic_data
from kling_programs.sample.server.desk import Ask
from kling_programs.sample.server.store import Task
from kling_programs.sample.server.wire import Shape
from pydantic import Field

from kling.errors import UserError, unknown
from kling.sampling.request import Request
from kling.sampling.rows import FILES

KIND = "request"
MOVIES = ("video", "control")
FIELDS = [field.name for field in dataclasses.fields(Request) if field.name != "num_videos"]


class Body(Shape):
    request: dict[str, Any] = Field(description="fields of a Request, in which pictures, masks and videos are names of files")
    files: dict[str, str] = Field({}, description="name -> base64")
    external_task_id: str | None = None
    callback_url: str | None = None


def read(body: Body, base: str) -> Ask:
    """What a body asks for. Raises `UserError`."""
    fields, used = dict(body.request), set()
    for name in fields:
        if name not in FIELDS:
            raise unknown("field", name, FIELDS)

    def file(name: Any, field: str) -> bytes:
        if not isinstance(name, str) or name not in body.files:
            raise UserError(f"{field} names '{str(name)[:60]}', which is not in files: {', '.join(body.files) or 'there are none'}")
        used.add(name)
        try:
            return base64.b64decode(body.files[name], validate=True)
        except (binascii.Error, ValueError):
            raise UserError(f"files: '{name[:60]}' is no base64") from None

    if isinstance(fields.get("camera"), str):
        raise UserError('camera: give axes, such as {"pan": 5}')  # a text might name a file of the server
    if not isinstance(fields.get("keyframes") or [], list):
        raise UserError("keyframes: give a list of [file, frame, strength]")
    rows = fields.pop("keyframes", None) or []
    if not all(isinstance(row, list) and 2 <= len(row) <= 3 for row in rows):
        raise UserError("keyframes: give a list of [file, frame, strength]")
    keyframes = [(file(row[0], "keyframes"), *row[1:]) for row in rows]
    shots = fields.get("shots") or []
    if not isinstance(shots, list) or any(not isinstance(row, dict) or isinstance(row.get("camera"), str) for row in shots):
        raise UserError('shots: give a list of {prompt, seconds, camera}, with the camera as axes, such as {"pan": 5}')  # never a file here
    things = fields.pop("references", None) or []
    if not isinstance(things, list):
        raise UserError("references: give a list of files")
    references = [file(name, "references") for name in things]
    strokes = fields.pop("tracks", None) or []
    if not isinstance(strokes, list) or not all(isinstance(row, dict) and row.keys() <= {"mask", "points"} for row in strokes):
        raise UserError("tracks: give a list of {mask, points}")
    tracks = [{"points": row.get("points", []), "mask": row.get("mask") and file(row["mask"], "tracks")} for row in strokes]
    given = {name: file(value, name) for name in FILES if (value := fields.pop(name, None)) is not None}
    if unused := sorted(set(body.files) - used):
        raise UserError(f"files has '{unused[0][:60]}', which nothing in the request names: leave it out")
    movies = {name: data for name, data in given.items() if name in MOVIES}
    pictures = {name: data for name, data in given.items() if name not in MOVIES}
    sent = body.model_dump(exclude_unset=True)
    return Ask(
        KIND, fields, pictures, movies, keyframes, references, tracks=tracks, external=body.external_task_id, callback=body.callback_url,
        base=base, body=sent,
    )  # fmt: skip


def task_data(task: Task, url: str) -> dict[str, Any]:
    """As the classic wire, with how far it is."""
    return classic_data(task, url) | {"step": task.step, "steps": task.steps, "seed": task.seed}
