"""The captions of the small world in English and Chinese, with several phrasings of everything."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

LANGUAGES = ("en", "zh")

COLOURS = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "cyan": "青色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
}
SOLIDS = {"ball": ("球", "圆球"), "cube": ("方块", "立方体"), "cone": ("圆锥", "锥体")}
SOLIDS_EN = {"ball": ("ball", "sphere"), "cube": ("cube", "box"), "cone": ("cone",)}
GROUNDS = {
    "grass": (("on grass", "on a green lawn"), ("在草地上",)),
    "sand": (("on sand", "in a sandy desert"), ("在沙地上", "在沙漠里")),
    "tiles": (("on a tiled floor", "on grey tiles"), ("在瓷砖地面上", "在灰色地砖上")),
    "snow": (("on snow", "in the snow"), ("在雪地上",)),
    "water": (("on water", "on the water"), ("在水面上",)),
}
MOTIONS = {
    "still": (("stays still", "does not move"), ("静止不动", "保持不动")),
    "left": (("moves left", "{roll} left", "{roll} to the left"), ("向左移动", "向左{滚}")),
    "right": (("moves right", "{roll} right", "{roll} to the right"), ("向右移动", "向右{滚}")),
    "toward": (("comes closer", "moves toward us"), ("向我们靠近", "朝镜头移动")),
    "away": (("moves away", "goes into the distance"), ("向远处移动", "渐渐远去")),
    "bounce": (("bounces up and down", "jumps up and down"), ("上下弹跳", "上下跳动")),
    "circle": (("moves in a circle", "goes round in circles"), ("绕圈移动", "转着圈走")),
}
CAMERA_AXES = {
    ("horizontal", 1): (("the camera moves right", "the camera trucks right"), ("镜头向右平移",)),
    ("horizontal", -1): (("the camera moves left", "the camera trucks left"), ("镜头向左平移",)),
    ("vertical", 1): (("the camera rises", "the camera moves up"), ("镜头上升",)),
    ("vertical", -1): (("the camera sinks", "the camera moves down"), ("镜头下降",)),
    ("pan", 1): (("the camera pans right", "the camera turns right"), ("镜头向右摇", "镜头右转")),
    ("pan", -1): (("the camera pans left", "the camera turns left"), ("镜头向左摇", "镜头左转")),
    ("tilt", 1): (("the camera tilts up", "the camera looks up"), ("镜头向上摇", "镜头仰起")),
    ("tilt", -1): (("the camera tilts down", "the camera looks down"), ("镜头向下摇", "镜头俯下")),
    ("roll", 1): (("the camera rolls clockwise",), ("镜头顺时针旋转",)),
    ("roll", -1): (("the camera rolls counterclockwise",), ("镜头逆时针旋转",)),
    ("zoom", 1): (("the camera zooms out", "the view widens"), ("镜头拉远变焦", "视野变宽")),
    ("zoom", -1): (("the camera zooms in",), ("镜头变焦放大",)),
    ("dolly", 1): (("the camera moves forward", "the camera dollies in"), ("镜头前进", "镜头推进")),
    ("dolly", -1): (("the camera moves back", "the camera dollies out"), ("镜头后退",)),
}
CAMERA_MOVES = {
    "down_back": (("the camera moves down and back",), ("镜头下移并后退",)),
    "forward_up": (("the camera moves forward and up",), ("镜头前进并上升",)),
    "right_turn_forward": (("the camera turns right and moves forward",), ("镜头右转并前进",)),
    "left_turn_forward": (("the camera turns left and moves forward",), ("镜头左转并前进",)),
    "static": (("the camera does not move", "a static shot"), ("镜头不动", "固定镜头")),
}
# How words point at a thing that a reference shows, instead of naming its colour and solid.
ORDINALS = (("first", "一"), ("second", "二"), ("third", "三"), ("fourth", "四"))
POINTERS = (("the {} thing", "the {} object", "the thing in the {} picture"), ("第{}个物体", "第{}个东西", "第{}张图里的物体"))
ROLLS = (("rolls", "slides", "moves"), ("滚动", "滑动", "移动"))  # any of them, since only a ball rolls
SAID = 6.5  # amount of a camera in words: the mean of the clips that they describe
CAMERA_WORDS = ("camera", "shot", "view", "镜头", "视野")  # every camera phrase above contains one of them


def speaks_of_camera(text: str) -> bool:
    """Whether a caption mentions the camera."""
    return any(word in text for word in CAMERA_WORDS)


def camera_said(text: str) -> str:
    """The camera that a prompt asks for in words, as `--camera` takes it, by `SAID`; empty if it asks for none,
    or for both directions of one axis.

    >>> camera_said("a red ball rolls left on grass, the camera pans right and the camera rises")
    'vertical=6.5,pan=6.5'
    """
    text = text.lower()
    for move, phrases in CAMERA_MOVES.items():  # first, since the words of some contain those of an axis
        if any(phrase in text for column in phrases for phrase in column):
            return move
    axes = [axis for axis, phrases in CAMERA_AXES.items() if any(phrase in text for column in phrases for phrase in column)]
    return ",".join(f"{axis}={SAID * sign:g}" for axis, sign in axes) if len(axes) == len(dict(axes)) else ""


def speaks_of_reference(text: str) -> bool:
    """Whether a caption points at a picture that is given with it, such as "the second thing"."""
    return any(map(text.lower().__contains__, _pointers()))


@cache
def _pointers() -> tuple[str, ...]:
    return tuple(phrase.format(ordinal[column]) for column in (0, 1) for phrase in POINTERS[column] for ordinal in ORDINALS)


def _thing(colour: str | int, solid: str, motion: str | None, language: str, rng: random.Random) -> str:
    column = LANGUAGES.index(language)
    verb = "" if motion is None else rng.choice(MOTIONS[motion][column])
    if isinstance(colour, int):
        rolls = rng.choice(ROLLS[column])
        subject = rng.choice(POINTERS[column]).format(ORDINALS[colour][column])
    elif language == "en":
        rolls = "rolls" if solid == "ball" else "slides"
        subject = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {rng.choice(SOLIDS_EN[solid])}"
    else:
        rolls = "滚动" if solid == "ball" else "滑动"
        subject = f"一个{COLOURS[colour]}的{rng.choice(SOLIDS[solid])}"
    verb = verb.format(roll=rolls, 滚=rolls)
    return f"{subject} {verb}".rstrip() if language == "en" else subject + verb


def _camera(axes: Mapping[str, float], move: str, language: str, rng: random.Random) -> str:
    column = LANGUAGES.index(language)
    if move:
        return rng.choice(CAMERA_MOVES[move][column])
    parts = [rng.choice(CAMERA_AXES[name, 1 if value > 0 else -1][column]) for name, value in axes.items()]
    return (" and " if language == "en" else "，").join(parts)


def caption(
    things: Sequence[tuple[str | int, str, str | None]],
    ground: str,
    axes: Mapping[str, float],
    move: str,
    language: str,
    rng: random.Random,
    camera: bool = True,
) -> str:
    """One sentence about things (colour, solid, motion) on a ground, with a camera; `move` names a master shot or `static`. A motion of
    None is not mentioned. A number instead of a colour is that of the reference, from 0, which shows the thing: then neither its colour
    nor its solid is said."""
    place = rng.choice(GROUNDS[ground][LANGUAGES.index(language)])
    phrases = [_thing(*thing, language, rng) for thing in things]
    said = _camera(axes, move, language, rng) if camera else ""
    place_first = rng.random() < 0.4
    if language == "en":
        text = " and ".join(phrases)
        text = f"{place}, {text}" if place_first else f"{text} {place}"
        return f"{text}, {said}" if said else text
    text = "，".join([place, *phrases] if place_first else [*phrases, place])
    return f"{text}，{said}" if said else text


# ------------------------------------------------------------------------------------------------------------- what can be said

# Function words that may occur in a sentence without changing its meaning.
SMALL_WORDS = set(re.findall(r"\w+", "a an the and with is are it its of at by to in on as while then there one two three this that s"))
SMALL_CHARACTERS = set("一二两三个只的了在有和与并且里上下中是着它都这那")


def vocabulary() -> dict[str, list[tuple[str, tuple[str, ...], tuple[str, ...]]]]:
    """All phrases of the captions, by subject: (name, English phrases, Chinese phrases)."""
    axes = {f"{axis} {'+' if sign > 0 else '-'}": phrases for (axis, sign), phrases in CAMERA_AXES.items()}
    return {
        "colours": [(name, (name,), (chinese,)) for name, chinese in COLOURS.items()],
        "solids": [(name, SOLIDS_EN[name], chinese) for name, chinese in SOLIDS.items()],
        "grounds": [(name, *phrases) for name, phrases in GROUNDS.items()],
        "motions": [(name, tuple(_spelled(english)), tuple(_spelled(chinese))) for name, (english, chinese) in MOTIONS.items()],
        "camera": [(name, *phrases) for name, phrases in (axes | CAMERA_MOVES).items()],
    }


def _spelled(phrases: Sequence[str]) -> Iterator[str]:
    """Phrases with each verb that fits their placeholder: balls roll, other things slide."""
    for phrase in phrases:
        yield from dict.fromkeys(phrase.format(**words) for words in ({"roll": "rolls", "滚": "滚动"}, {"roll": "slides", "滚": "滑动"}))


SUBJECTS = {
    "colours": ("colour", "颜色"),
    "solids": ("solid", "物体"),
    "grounds": ("ground", "地面"),
    "motions": ("motion", "运动"),
    "camera": ("camera", "镜头"),
}


def vocabulary_table() -> str:
    """`vocabulary` as a Markdown table, a row for each name."""
    lines = ["| | English | 中文 |", "|---|---|---|"]
    for subject, rows in vocabulary().items():
        lines += [f"| {SUBJECTS[subject][0]} | {' · '.join(english)} | {' · '.join(chinese)} |" for _, english, chinese in rows]
    return "\n".join(lines)


def vocabulary_summary() -> str:
    """`vocabulary` as a table in markdown, a row for each subject: dots between names, commas between phrases for one."""
    lines = ["| | English | 中文 |", "|---|---|---|"]
    for subject, rows in vocabulary().items():
        english, chinese = " · ".join(", ".join(row[1]) for row in rows), " · ".join("、".join(row[2]) for row in rows)
        lines.append(f"| {' '.join(SUBJECTS[subject])} | {english} | {chinese} |")
    return "\n".join(lines)


def unknown_words(text: str, pointing: bool = False) -> list[str]:
    """The words of a prompt that occur in no caption, in order; for Chinese, runs of characters that occur in none. pointing: nor in
    captions that point at references.

    >>> unknown_words("A red cat rolls left at sunset.")
    ['cat', 'sunset']
    >>> unknown_words("一只红色的猫在草地上")
    ['猫']
    """
    words, characters = _known(pointing)
    found = re.findall(r"[\u3400-\u9fff]+|[^\W\d_\u3400-\u9fff]+", text.lower())
    unknown: list[str] = []
    for word in found:
        if re.match(r"[\u3400-\u9fff]", word):
            unknown += "".join(" " if c in characters else c for c in word).split()
        elif word not in words:
            unknown.append(word)
    return list(dict.fromkeys(unknown))


@cache
def _known(pointing: bool) -> tuple[set[str], set[str]]:
    """All English words and Chinese characters of the captions."""
    rows = [row for rows in vocabulary().values() for row in rows]
    rows += [("", _pointers(), _pointers())] if pointing else []
    english = {word for _, phrases, _ in rows for phrase in phrases for word in re.findall(r"[a-z]+", phrase)}
    chinese = {c for _, _, phrases in rows for phrase in phrases for c in phrase}
    return english | SMALL_WORDS, chinese | SMALL_CHARACTERS
