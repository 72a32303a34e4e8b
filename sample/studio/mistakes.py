"""Error messages in the page's words and language, looked up by the error's code. Errors without a code keep their message."""

from __future__ import annotations

from typing import Any

from kling_programs.sample.studio.words import CHINESE_TASKS, LABELS, WORDS

from kling.errors import UserError

# code -> (English, Chinese). An empty English text means the library's own, if that names no option of the command line.
LINES: dict[str, tuple[str, str]] = {
    # the request
    "not_text": ("{field} is not text: write it in words", "{field}不是文字：请用文字填写"),
    "half_character": (
        "{field} holds half a character (a lone surrogate) at place {n}: delete it, or type it again",
        "{field}的第 {n} 个字符不完整：请删除或重新输入",
    ),
    "prompt_too_long": ("", "提示词太长（{n}，该模型最多读 {most}）：请缩短"),
    "not_a_flag": ("{field}: give true or false", "{field}：请填 true 或 false"),
    "unknown_choice": ("{field} “{value}” is unknown: choose from {choices}", "{field}没有“{value}”：请选 {choices}"),
    "not_a_list": ("", "{field}的格式不对：请给列表"),
    "unused": ("", "给了“{field}”，但没有用到它的视频和用法：请一并给出，或去掉它"),
    "text_too_long": ("{field} has {n} characters: give at most {most}", "{field}有 {n} 个字符：最多 {most} 个"),
    "not_whole": ("{field} {value}: give a whole number", "{field} {value}：请填整数"),
    "not_a_number": ("{field} is not a number: give one from {low} to {high}", "{field}不是数字：请填 {low} 到 {high} 之间的数"),
    "out_of_range": ("{field} {value}: give a number from {low} to {high}", "{field} {value}：请填 {low} 到 {high} 之间的数"),
    "not_trained": ("This model was not trained for “{task}”: it can do {able}", "该模型没有训练过“{task}”，它能做：{able}"),
    "file_and_sliders": (
        "Both a trajectory file and {field} were given: remove the file or set the sliders to 0",
        "同时给了轨迹文件和“{field}”：请移除文件，或把滑块归零",
    ),
    "loop_and_last": (
        "Both a loop and a last frame were given: a loop ends where it starts; leave one out",
        "同时选了循环和尾帧：循环会回到起点，请去掉其中一个",
    ),
    "beside_video": (
        "Both a clip and “{field}” were given: the clip begins the video; leave one of them out",
        "同时给了输入视频和“{field}”：视频从输入视频开始，请去掉其中一个",
    ),
    "tracks_on_edit": (
        "Arrows were drawn, and the clip is to be changed: its things move as they do; remove the arrows, or choose another use",
        "画了箭头，又要修改视频：视频里的物体保持原来的运动，请删除箭头，或选其他处理方式",
    ),
    "track_outside": (
        "An arrow starts outside the picture: drag its start onto the thing, or remove it",
        "有一个箭头的起点在画面之外：请把起点拖到物体上，或删除它",
    ),
    "mask_shape": ("", "遮罩是 {size}，首帧是 {other}，形状不同：请在首帧上涂抹"),
    "no_track": ("", "每个箭头需要遮罩，或 1 到 {most} 个点"),
    "nothing_moves": (
        "“{field}” needs a video, and a single picture was asked for: leave it out, or ask for a video",
        "“{field}”需要视频，而这里只生成一张图片：请去掉它，或改为生成视频",
    ),
    "extend_too_short": (
        "Extending to {value} s is less than the clip of {seconds} s: choose more, or 0",
        "延长至 {value} 秒比片段的 {seconds} 秒还短：请填更大的数，或填 0",
    ),
    "no_fast": ("This model has no few-step weights: choose another mode", "该模型没有快速模式的权重：请选其他模式"),
    "not_fast": ("Mode fast cannot be used with “{field}”: choose std", "快速模式不能与“{field}”同时使用：请选标准模式"),
    "fast_guidance": (
        "“{field}” cannot be set in mode fast, where guidance is built in: leave it out, or choose std",
        "快速模式已内置引导，不能设置“{field}”：请去掉它，或选标准模式",
    ),
    "nothing_to_guide": (
        "“{field}” was set without “{other}”: set it to 0, or give some",
        "设置了“{field}”，但没有“{other}”：请填 0，或补上",
    ),
    "fast_steps": (
        "Mode fast takes 1 to {most} steps, not {value}: choose fewer, or std",
        "快速模式只能用 1 到 {most} 步，不能用 {value} 步：请减少步数，或选标准模式",
    ),
    "not_enhanced": ("The chat model wrote nothing that fits: write the prompt out yourself", "聊天模型没有写出合适的提示词：请自己写"),
    "nothing_marked": ("Nothing is marked: paint over the area to regenerate", "还没有涂抹：请涂抹需要重做的部分"),
    "nothing_to_fill": (
        "The clip has the aspect {value} already, so nothing is left to fill: choose another",
        "视频已是 {value} 画幅，没有可扩展的部分：请选其他画幅",
    ),
    "mask_damaged": ("", "涂抹的内容已损坏：请清除后重画"),
    "keyframe_without_picture": ("Keyframe: upload its picture first", "关键帧：请先上传图片"),
    "too_many_keyframes": ("At most {most} keyframes, each with a picture, a frame and a strength", "关键帧最多 {most} 个"),
    "too_many_references": ("At most {most} pictures of things", "参考图最多 {most} 张"),
    "too_many_tracks": ("At most {most} arrows", "箭头最多 {most} 个"),
    "too_many_shots": ("At most {most} shots", "镜头最多 {most} 个"),
    "wordless_shot": ("A shot of the storyboard has no words: say what it shows", "分镜里有一个镜头没有文字：请写出它的内容"),
    "shots_too_long": ("The shots last {seconds} s in all: give at most {most} s", "所有镜头共 {seconds} 秒：最多 {most} 秒"),
    "shots_too_short": (
        "The shots last {seconds} s in all, a single picture: give at least {least} s",
        "所有镜头共 {seconds} 秒，只有一张图片：至少 {least} 秒",
    ),
    "shot_camera": (
        "",
        "第 {number} 个镜头的运镜“{value}”无法使用：请写 pan=5,zoom=2 这样的轴（-10 到 10），或大师运镜的英文名，例如 forward_up",
    ),
    "short_shot": (
        "Shot {number} of {seconds} s is too short: give at least {least} s",
        "第 {number} 个镜头只有 {seconds} 秒，太短：至少 {least} 秒",
    ),
    "beside_shots": (
        "The storyboard has no place for “{field}”: leave it out, or remove the shots",
        "分镜不能与“{field}”同时使用：请去掉它，或删除所有镜头",
    ),
    "keyframe_beyond": (
        "Keyframe at frame {frame} lies beyond the clip's last frame {last}: choose a smaller frame or more seconds",
        "第 {frame} 帧的关键帧超出了片段的最后一帧 {last}：请选更小的帧号，或加长时长",
    ),
    "keyframe_in_video": (
        "Keyframe at frame {frame} lies in the given video: the first generated frame is {first}",
        "第 {frame} 帧的关键帧落在所给的视频里：新生成的第一帧是 {first}",
    ),
    "same_frame": (
        "{field} and {other} both fall on frame {frame}: leave one out, or choose more seconds",
        "“{field}”和“{other}”都落在第 {frame} 帧：请去掉其中一个，或加长时长",
    ),
    "adds_nothing": (
        "The video is {there} s long already: extending it to {value} s adds nothing",
        "视频已有 {there} 秒：延长至 {value} 秒不会增加内容",
    ),
    "scales": (
        "Scales: give one to eight numbers from 0 to 50 with commas between them, such as 1, 3, 6",
        "强度值：请填一到八个 0 到 50 的数，用逗号隔开，例如 1, 3, 6",
    ),
    "checkpoints": ("Checkpoints: choose one to eight of them", "检查点：请选择一到八个"),
    "no_clip": ("Upload a clip first", "请先上传视频"),
    # uploads
    "not_uploaded": ("That file is no longer here: upload it again", "文件不在服务器上：请重新上传"),
    "file_too_large": ("", "{file} 有 {size} MiB：最多 {most} MiB"),
    "image_too_large": ("", "{file} 有 {size} 像素：最多 {most} 百万像素"),
    "video_too_large": ("", "{file} 的尺寸是 {size}：视频最大 {most}"),
    "too_many_frames": ("", "{file} 超过 {most} 帧：请上传更短的视频"),
    "video_too_long": ("{file} lasts {seconds} s: give at most {most} s", "{file} 长 {seconds} 秒：最多 {most} 秒"),
    "empty_file": ("", "{file} 是空文件：请重新下载或导出"),
    "not_a_video": ("", "{file} 不是视频（内容是 {kind}）：请上传 mp4、mov、webm、mkv、avi 或 gif"),
    "damaged_video": ("", "{file} 已损坏或不完整：请重新下载或导出"),
    "cut_short": ("", "{file} 被截断：请重新下载或导出"),
    "no_picture": ("", "{file} 里没有画面，只有声音等：请上传有画面的视频"),
    "time_jumps": ("{file} has a gap of {seconds} s between two frames: export it again", "{file} 的两帧之间相隔 {seconds} 秒：请重新导出"),
    "float_image": ("", "{file} 的像素是浮点数：请导出为 8 位或 16 位 PNG"),
    "no_whole_frame": ("", "{file} 没有一帧是完整的：请重新下载或导出"),
    "not_an_image": ("", "{file} 不是可读取的图片（内容是 {kind}）：请上传 PNG、JPEG 或 WebP"),
    "damaged_image": ("", "{file} 是损坏的图片：请重新导出或下载"),
    "animation": ("", "{file} 是 {n} 帧的动画：请作为视频上传，或导出其中一帧为 PNG"),
    "camera_file": ("", "轨迹文件无法使用（{why}）：请上传 RealEstate10K .txt，或含 fps、intrinsics、c2w 的 .json"),
    "not_a_record": (
        "{file} says nothing about how it was made: give a replay JSON, or a video that this page or kling-sample made",
        "{file} 没有生成信息：请给复现 JSON，或本页面、kling-sample 生成的视频",
    ),
    # the queue, and results
    "queue_full": ("The queue is full ({n} are waiting): try again in a minute", "排队已满（{n} 人在等）：请过一分钟再试"),
    "no_place": (
        "You have {n} videos queued or running already: wait for one, or stop it",
        "你已有 {n} 个作品在生成或排队：请等其中一个完成，或停止它",
    ),
    "no_time": (
        "You have used your {n} minutes of this hour: try again in {wait} minutes",
        "本小时的 {n} 分钟额度已用完：请在 {wait} 分钟后再试",
    ),
    "too_long": (
        "This took longer than one visitor may use the model in an hour: ask for fewer or shorter videos",
        "这个任务超过了一位用户每小时可用的时间：请减少数量或缩短时长",
    ),
    "no_memory": ("The device has no room for this: ask for fewer seconds", "显存不足：请缩短时长"),
    "gone": ("", "这个作品已不在服务器上：请重新生成"),
}


def told_to(lang: int, error: UserError) -> str:
    """lang: 0 English, 1 Chinese."""
    line = LINES.get(error.code, ("", ""))[lang]
    values = {name: label(lang, name, value) for name, value in error.values.items()}
    try:
        return line.format(**values) if line else without_folders(str(error))
    except (KeyError, IndexError):  # raised without a value that the text needs
        return without_folders(str(error))


def label(lang: int, name: str, value: Any) -> str:
    """A value in the page's words: fields and tasks by their labels, files by their name without folders."""
    text = str(value)
    if name in ("field", "other"):
        return WORDS.get(LABELS.get(text, text), (text, text))[lang]
    if name in ("task", "able"):
        return ("、" if lang else ", ").join(_task(lang, task) for task in text.split(", "))
    return text.rsplit("/", 1)[-1] if name == "file" else text


def _task(lang: int, name: str) -> str:
    if lang and name in CHINESE_TASKS:
        return CHINESE_TASKS[name]
    return WORDS.get(f"task_{name}") and WORDS[f"task_{name}"][lang] or WORDS.get(name, (name, name))[lang]


def without_folders(message: str) -> str:
    """Replace absolute paths by their last part.

    >>> without_folders("/tmp/gradio/ab12/clip.mp4 is damaged (use 16:9 or 4/3)")
    'clip.mp4 is damaged (use 16:9 or 4/3)'
    """
    return " ".join(word.rsplit("/", 1)[1] if word.lstrip("'\"(").startswith("/") else word for word in message.split(" "))
