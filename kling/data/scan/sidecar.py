"""What lies beside a video: captions in .txt or .json, a camera path in .camera.txt or .camera.json.

cats/a.mp4   cats/a.txt           one caption a line
dogs/b.webm  dogs/b.json          {"caption": "..."} or {"captions": ["...", {"text": "...", "language": "zh", "weight": 2}]}
run/c.mp4    run/c.camera.json    {"fps": 8, "intrinsics": [T][4], "c2w": [T][3][4]}, or RealEstate10K text in run/c.camera.txt
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from kling.data.manifest import Caption
from kling.errors import UserError


def read_captions(media: Path) -> tuple[Caption, ...]:
    """The captions beside a file, () if there are none. Raises `UserError` if the caption file is empty, doubled or ill-formed."""
    text, record = media.with_suffix(".txt"), media.with_suffix(".json")
    present = [path for path in (text, record) if path.is_file()]
    if len(present) == 2:
        raise UserError(f"{media} has both {text.name} and {record.name}: keep one")
    if not present:
        return ()
    (path,) = present
    try:
        body = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    return parse_captions(body, path.suffix, path)


def parse_captions(body: bytes, suffix: str, where: object) -> tuple[Caption, ...]:
    """Captions in the bytes of a .txt (one a line) or a .json. Raises `UserError` that names `where`."""
    try:
        text = body.decode("utf-8-sig")
        captions = captions_from(json.loads(text), where) if suffix == ".json" else [caption(line) for line in text.splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8: save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error}): repair it") from None
    captions = tuple(c for c in captions if c.text)
    if not captions:
        raise UserError(f"{where} holds no caption: write one a line, or remove the file and train with unconditional")
    return captions


def captions_from(record: Any, where: object) -> list[Caption]:
    """The captions of {"caption": ..., "captions": [...]}, each a text or {"text", "language", "weight"}; other keys are the user's own."""
    found: list[Any] = []
    for key in ("caption", "captions"):
        value = record.get(key, []) if isinstance(record, dict) else None
        found += value if isinstance(value, list) else [value]
    captions = [caption(c) if isinstance(c, str) else _weighted(c) if isinstance(c, dict) else None for c in found]
    if None in captions:
        raise UserError(
            f'{where}: captions must be text: write {{"caption": "..."}} or {{"captions": ["...", {{"text": "...", "weight": 2}}]}}'
        )
    return captions


def caption(text: str, language: str = "", weight: float = 1.0) -> Caption:
    """A caption, its language told from its script where it is not given."""
    text = text.strip()
    return Caption(text, language or ("zh" if any("\u4e00" <= c <= "\u9fff" for c in text) else "en"), weight)


def _weighted(record: dict[str, Any]) -> Caption | None:
    text, language, weight = record.get("text"), record.get("language", ""), record.get("weight", 1.0)
    good = isinstance(text, str) and isinstance(language, str) and isinstance(weight, int | float) and not isinstance(weight, bool)
    return caption(text, language, float(weight)) if good and math.isfinite(weight) and weight > 0 else None


def find_camera(media: Path) -> Path | None:
    """The camera file beside a video. Raises `UserError` if there are two."""
    present = [path for suffix in (".camera.txt", ".camera.json") if (path := media.with_suffix(suffix)).is_file()]
    if len(present) == 2:
        raise UserError(f"{media} has both {present[0].name} and {present[1].name}: keep one")
    return present[0] if present else None
