"""The library speaks English. What a visitor of the page commonly meets is said here in Chinese; any other line stays as it is."""

from __future__ import annotations

import re

from kling_programs.sample.studio.words import CHINESE_TASKS, WORDS

LINES = {
    # what is asked for
    "{field} of {n} characters: give at most {most}": "{field}有 {n} 个字符：最多 {most} 个",
    "{field} {value}: give a whole number": "{field} {value}：请填整数",
    "{field} is not a number: give one from {low} to {high}": "{field}不是数字：请填 {low} 到 {high} 之间的数",
    "{field} {value}: give a number from {low} to {high}": "{field} {value}：请填 {low} 到 {high} 之间的数",
    "this model was not trained for '{task}': it can do {able}": "该模型没有训练过“{task}”，它能做：{able}",
    "both a trajectory file and {field} were given: remove the file or set the sliders to 0": (
        "同时给了轨迹文件和“{field}”：请移除文件，或把滑块归零"
    ),
    "both loop and last_image were given: a loop ends where it starts; leave one out": "同时选了循环和尾帧：循环会回到起点，请去掉其中一个",
    "nothing is marked: paint over what is to be made anew": "还没有涂抹：请涂抹需要重做的部分",
    "the mask is damaged: clear it and draw it again": "涂抹的内容已损坏：请清除后重画",
    "keyframe: upload its picture first": "关键帧：请先上传图片",
    "keyframes: give a list of at most {most}, each with file, frame and strength": "关键帧最多 {most} 个",
    "keyframe at frame {frame} lies beyond the clip's last frame {last}: give a smaller frame or a longer duration": (
        "第 {frame} 帧的关键帧超出了片段的最后一帧 {last}：请选更小的帧号，或加长时长"
    ),
    "keyframe at frame {frame} lies in the given video: the first frame that is made is {first}": (
        "第 {frame} 帧的关键帧落在所给的视频里：新生成的第一帧是 {first}"
    ),
    "{one} and {other} both fall on frame {frame}: leave one out, or give a longer duration": (
        "{one} 和 {other} 都落在第 {frame} 帧：请去掉其中一个，或加长时长"
    ),
    "the video is {there} s long already: extend_to {value} s adds nothing": "视频已有 {there} 秒：延长至 {value} 秒不会增加内容",
    "scales: give one to eight numbers from 0 to 50 with commas between them, such as 1, 3, 6": (
        "强度值：请填一到八个 0 到 50 的数，用逗号隔开，例如 1, 3, 6"
    ),
    "checkpoints: choose one to eight of them": "检查点：请选择一到八个",
    "upload a clip first": "请先上传视频",
    # what is handed in
    "a file was named that was not uploaded here: upload it first": "文件不在服务器上：请重新上传",
    "{file} has {size} MiB: give at most {most} MiB": "{file} 有 {size} MiB：最多 {most} MiB",
    "{file} has {size} pixels: give at most {most} megapixels": "{file} 有 {size} 像素：最多 {most} 百万像素",
    "{file} is {size}: give a video of at most {most}": "{file} 的尺寸是 {size}：视频最大 {most}",
    "{file} has {n} frames of {size}: give at most {most}, and at most 1 GiB of pixels": (
        "{file} 有 {n} 帧（{size}）：最多 {most} 帧，且解码后不超过 1 GiB"
    ),
    "{file} is empty (0 bytes): download or export it again": "{file} 是空文件：请重新下载或导出",
    "{file} is not a video: it holds {kind} ({remedy})": "{file} 不是视频（内容是 {kind}）：请上传 mp4、mov、webm、mkv、avi 或 gif",
    "{file} is damaged or incomplete ({why}): download or export it again": "{file} 已损坏或不完整：请重新下载或导出",
    "{file} is cut short ({why}): download or export it again": "{file} 被截断：请重新下载或导出",
    "{file} is not an image that can be read ({kind}): {remedy}": "{file} 不是可读取的图片（内容是 {kind}）：请上传 PNG、JPEG 或 WebP",
    "{file} is a damaged image ({why}): export or download it again": "{file} 是损坏的图片：请重新导出或下载",
    "{file} is an animation of {n} frames: give it as a video, or export one frame as PNG": (
        "{file} 是 {n} 帧的动画：请作为视频上传，或导出其中一帧为 PNG"
    ),
    "{file} holds no whole frame: download or export it again": "{file} 没有一帧是完整的：请重新下载或导出",
    "camera file {why}": "轨迹文件无法使用（{why}）：请上传 RealEstate10K .txt，或含 fps、intrinsics、c2w 的 .json",
    # the model's door, and what was made
    "the queue is full ({n} are waiting): try again in a minute": "排队已满（{n} 人在等）：请过一分钟再试",
    "the device has no room for this: ask for fewer seconds": "显存不足：请缩短时长",
    "that video is no longer here: make it again": "这个作品已不在服务器上：请重新生成",
}


def _pattern(line: str) -> re.Pattern[str]:
    """ "{n} frames (of {m})" -> (?P<n>.+?)\\ frames\\ \\(of\\ (?P<m>.+?)\\)"""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+?)", re.escape(line)))


_PATTERNS = [(_pattern(english), chinese) for english, chinese in LINES.items()]


def in_chinese(line: str) -> str:
    """A line of the library in Chinese, or itself.

    >>> in_chinese("prompt of 9999 characters: give at most 2000")
    '提示词有 9999 个字符：最多 2000 个'
    """
    for pattern, chinese in _PATTERNS:
        if found := pattern.fullmatch(line):
            values = found.groupdict()
            return chinese.format(**values | {name: _words(values[name]) for name in ("field", "task", "able") if name in values})
    return line


def _words(names: str) -> str:
    """ "text, camera" -> "文生视频、镜头" """
    return "、".join(CHINESE_TASKS.get(name) or WORDS.get(name, ("", name))[1] for name in names.split(", "))
