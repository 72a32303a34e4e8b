"""Files beside a video: captions in .txt or .json, a camera path in .camera.txt or .camera.json.

    cats/a.mp4   cats/a.txt           one caption a line
    dogs/b.webm  dogs/b.json          {"caption": "..."} or {"captions": ["...", {"text": "...", "language": "zh", "weight": 2}]}
    made/c.mp4   made/c.mp4.json      what kling-sample writes beside its videos: the prompt is the caption
    run/d.mp4    run/d.camera.json    {"fps": 8, "intrinsics": [T][4], "c2w": [T][3][4]}, or RealEstate10K text in run/d.camera.txt

If there are both a text and a JSON, as video2dataset writes them, the text is used. A JSON without a caption is the user's own metadata.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kling.config import is_a
from kling.data.manifest import Caption
from kling.errors import UserError
from kling.runtime.files import Source, parse_json, read_bytes

# Control characters, and characters that `str.splitlines` takes for line ends but that occur within sentences.
STRAY = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x85\u2028\u2029]+")
NONE = ("", "nan", "NaN", "NAN")


def caption_suffixes(media: str) -> tuple[str, str, str]:
    """The suffixes of caption files for a file whose name ends in `media`, in order of priority."""
    return ".txt", ".json", f"{media}.json"


def read_captions(media: Path) -> tuple[Caption, ...]:
    """The captions beside a file, () if there are none. Raises `UserError` if the caption file is empty or invalid."""
    beside = (media.with_suffix(suffix) for suffix in caption_suffixes(media.suffix))
    return captions_in([path for path in beside if path.is_file()])


def captions_in(sources: Sequence[Source]) -> tuple[Caption, ...]:
    """The captions of the first caption file that has any. Raises `UserError` for an invalid one, and for a lone text that is empty."""
    for source in sources:
        try:
            body = read_bytes(source)
        except OSError as error:
            raise UserError(f"{source} cannot be read ({error.strerror}): check its permissions") from None
        if captions := parse_captions(body, is_text(source), source):
            return captions
    if sources and is_text(sources[0]):
        raise UserError(f"{sources[0]} holds no caption: write one a line, or remove the file and train with unconditional")
    return ()


def is_text(source: Source) -> bool:
    return source.name.endswith(".txt")


def parse_captions(body: bytes, text: bool, where: object) -> tuple[Caption, ...]:
    """The captions in the bytes of a text file (one a line) or of a JSON file. Raises `UserError` that names `where`."""
    try:
        words = body.decode("utf-8-sig")
        lines = re.split("\r\n|\r|\n", words)
        captions = [caption(line, where=where) for line in lines] if text else captions_from(parse_json(words), where)
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8: save it as UTF-8") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): repair it") from None
    return tuple(c for c in captions if c.text)


def captions_from(record: Any, where: object) -> list[Caption]:
    """The captions of {"caption": ..., "captions": [...]} (or "text", or "prompt"), each a text or {"text", "language", "weight"}.

    Also accepts the record of a video made by kling-sample, and a plain list of texts. Other keys are ignored.
    """
    if isinstance(record, list):
        record = {"captions": record} if any(isinstance(x, str) for x in record) else {}
    if not isinstance(record, dict):
        return []
    request = record["request"] if isinstance(record.get("request"), dict) and "frames" in record else {}
    names = ("caption", "captions") if {"caption", "captions"} & record.keys() else ("text",) if "text" in record else ("prompt",)
    found: list[Any] = []
    for value in (record.get(name) for name in names) if not request else (request.get("prompt"),):
        found += value if isinstance(value, list) else [] if nothing(value) else [value]
    captions = [caption(c, where=where) if isinstance(c, str) else _weighted(c, where) if isinstance(c, dict) else None for c in found]
    if None in captions:
        raise UserError(
            f'{where}: captions must be text: write {{"caption": "..."}} or {{"captions": ["...", {{"text": "...", "weight": 2}}]}}'
        )
    return captions


def nothing(value: Any) -> bool:
    """True for an empty cell: None, an empty text, or the ways pandas writes a missing value."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and value.strip() in NONE)


def caption(text: str, language: str = "", weight: float = 1.0, where: object = "") -> Caption:
    """A caption. If no language is given, it is detected from the script. Control characters and unusual line ends become spaces.

    Raises `UserError` that names `where` for half a surrogate pair, which UTF-8 cannot encode.
    """
    text = STRAY.sub(" ", text).strip()
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{where}: the caption {text[:60]!r} holds half of a character, cut in the middle: write it again".lstrip(": "))
    return Caption(text, language or ("zh" if any("\u4e00" <= c <= "\u9fff" for c in text) else "en"), weight)


def _weighted(record: dict[str, Any], where: object) -> Caption | None:
    text, language, weight = record.get("text"), record.get("language", ""), record.get("weight", 1.0)
    good = isinstance(text, str) and isinstance(language, str) and is_a(weight, float)
    return caption(text, language, float(weight), where) if good and weight > 0 else None


def find_camera(media: Path) -> Path | None:
    """The camera file beside a video. Raises `UserError` if there are two."""
    present = [path for suffix in (".camera.txt", ".camera.json") if (path := media.with_suffix(suffix)).is_file()]
    if len(present) == 2:
        raise UserError(f"{media} has both {present[0].name} and {present[1].name}: keep one")
    return present[0] if present else None
