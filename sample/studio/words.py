"""All texts of the page in English and Chinese. Fixed ones are chosen in the browser, others by the language that it requests."""

from __future__ import annotations

import gradio as gr

from kling.sampling.plan import TASK_TITLES

WORDS: dict[str, tuple[str, str]] = {
    "title": ("kling studio", "可灵工作室"),
    "create": ("Create", "创作"),
    "inspect": ("Inspect", "研究"),
    "training": ("Training", "训练"),
    "prompt": ("Prompt", "提示词"),
    "prompt_hint": ("What the video should show, in English or Chinese", "想看到什么？中文、英文都可以"),
    "negative_prompt": ("Negative prompt", "反向提示词"),
    "negative_hint": ("What to avoid", "不希望出现的内容"),
    "enhance": ("Write it out", "扩写提示词"),
    "nothing_to_enhance": ("write a few words first, which the chat model then writes out", "请先写几个字，再由聊天模型扩写"),
    "shots_have_words": ("each shot has its own words: write them out there", "每个镜头有自己的文字：请在分镜里写"),
    "live": ("Live preview", "实时预览"),
    "live_is": ("a rough clip in 2 steps, soon after the prompt or the camera changes", "提示词或镜头改变后，用 2 步生成草稿"),
    "examples": ("Examples", "示例"),
    "world_examples": (
        "Examples (the first is held out: no training clip shows a red ball that rolls left)",
        "示例（第一句是留出的：训练视频里没有向左滚动的红球）",
    ),
    "understands": ("What this small model understands", "这个小模型认识的词"),
    "pictures": ("Pictures", "图片"),
    "first": ("First frame", "首帧"),
    "last": ("Last frame", "尾帧"),
    "loop": ("Loop: the end leads back to the beginning", "循环：结尾回到开头"),
    "keyframe": ("Keyframe", "关键帧"),
    "at": ("At frame", "所在帧"),
    "holds": ("Strength", "强度"),
    "add_keyframe": ("Add keyframe", "添加关键帧"),
    "clear_keyframes": ("Clear", "清空"),
    "references": ("Things: the prompt says “the first thing”, “the second thing” …", "参考图：提示词里写“第一个物体”“第二个物体”……"),
    "video": ("Video", "视频"),
    "clip": ("Your clip", "输入视频"),
    "use": ("What to do with it", "如何处理"),
    "continue": ("continue", "续写"),
    "restyle": ("restyle", "重绘风格"),
    "fill": ("repaint a part", "局部重绘"),
    "outpaint": ("show more around it", "扩展画面"),
    "strength": ("How much of the clip to keep (1 keeps it, 0 ignores it)", "保留原视频的程度（1 完全保留，0 完全重做）"),
    "paint": ("Paint over the area to regenerate", "涂抹需要重做的部分"),
    "outpaint_to": ("New aspect", "新画幅"),
    "camera": ("Camera", "镜头"),
    "shot": ("Master shot", "大师运镜"),
    "static": ("none", "无"),
    "down_back": ("down and back", "下移拉远"),
    "forward_up": ("forward and up", "推进上移"),
    "right_turn_forward": ("right turn forward", "右旋推进"),
    "left_turn_forward": ("left turn forward", "左旋推进"),
    "horizontal": ("Horizontal", "水平运镜"),
    "vertical": ("Vertical", "垂直运镜"),
    "pan": ("Pan", "水平摇镜"),
    "tilt": ("Tilt", "垂直摇镜"),
    "roll": ("Roll", "旋转运镜"),
    "zoom": ("Zoom", "变焦"),
    "dolly": ("Dolly", "推拉"),
    "horizontal_is": ("10 = 2.5 m to the right", "10 = 向右 2.5 米"),
    "vertical_is": ("10 = 1 m up", "10 = 向上 1 米"),
    "pan_is": ("10 = 45° to the right", "10 = 向右 45°"),
    "tilt_is": ("10 = 20° up", "10 = 向上 20°"),
    "roll_is": ("10 = 30° clockwise", "10 = 顺时针 30°"),
    "zoom_is": ("10 = twice as wide a view", "10 = 视野扩大一倍"),
    "dolly_is": ("10 = 3 m forward", "10 = 前进 3 米"),
    "path": ("The camera's path", "镜头轨迹"),
    "motion": ("The first frame's motion over one second, 4 m away", "首帧画面在一秒内的运动（距离 4 米）"),
    "trajectory": ("Trajectory file (RealEstate10K .txt, or .json)", "轨迹文件（RealEstate10K .txt 或 .json）"),
    "save_trajectory": ("download it", "下载"),
    "camera_scale": ("Travel × ", "位移倍数"),
    "camera_guidance_scale": ("Camera guidance", "镜头引导强度"),
    "brush_guidance_scale": ("Guidance of the arrows", "箭头引导强度"),
    "reference_guidance_scale": ("Guidance of the things", "参考图引导强度"),
    "tracks": ("Motion", "运动笔刷"),
    "draw_tracks": (
        "Drag from a thing to where it shall go. A click holds it in place. Drag an arrow's ends to change it; × removes it.",
        "从物体拖到目的地；只点一下则保持不动。拖动箭头两端可修改，按 × 删除。",
    ),
    "shots": ("Storyboard", "分镜"),
    "write_shots": (
        "Shots of one video, instead of the prompt and the length: each with its own words, seconds and camera. "
        "Drag a row, or press ↑ or ↓, to move it.",
        "一段视频的多个镜头，代替提示词和时长：每个镜头有自己的文字、秒数和运镜。拖动一行，或按 ↑ ↓，可调整顺序。",
    ),
    "shot_words": ("What this shot shows", "这个镜头的内容"),
    "shot_seconds": ("Seconds", "秒数"),
    "shot_unit": ("s", "秒"),
    "shot_camera": ("Camera, as in pan=5,zoom=2 or forward_up", "运镜，例如 pan=5,zoom=2 或 forward_up"),
    "shot_up": ("Move up", "上移"),
    "shot_down": ("Move down", "下移"),
    "shot_remove": ("Remove", "删除"),
    "shot_drag": ("Drag to move", "拖动排序"),
    "shot_add": ("Add a shot", "添加镜头"),
    "camera_read": ("camera {camera}, as the prompt says", "镜头 {camera}（按提示词）"),
    "task_of_shots": ("{count} shots: {seconds} s", "{count} 个镜头：{seconds} 秒"),
    "size": ("Size", "尺寸"),
    "aspect": ("Aspect", "画幅"),
    "auto": ("auto", "自动"),
    "duration": ("Seconds", "时长（秒）"),
    "duration_is": ("longer than one clip: made in hops", "超过单段长度时分段生成"),
    "extend_to": ("Extend to (seconds in all, 0 = off)", "延长至（总秒数，0 为关闭）"),
    "still": ("A picture instead of a video", "只生成一张图片"),
    "mode": ("Mode", "模式"),
    "std": ("std", "标准"),
    "pro": ("pro", "高品质"),
    "fast": ("fast", "快速"),
    "advanced": ("Advanced", "高级"),
    "own": ("0 = the model's own", "0 为模型默认值"),
    "num_inference_steps": ("Steps", "步数"),
    "guidance_scale": ("Guidance", "提示词引导强度"),
    "shift": ("Shift", "噪声偏移"),
    "sigma_c": ("σ_c", "σ_c"),
    "sigma_c_is": ("noise added to given frames", "加在给定内容上的噪声"),
    "seed": ("Seed", "种子"),
    "dice": ("⚄ random", "⚄ 随机"),
    "reuse": ("↺ last", "↺ 上次"),
    "num_videos": ("Videos", "数量"),
    "model": ("Model", "模型"),
    "lora": ("LoRA", "LoRA"),
    "lora_scale": ("LoRA strength", "LoRA 强度"),
    "none": ("none", "无"),
    "own_model": ("the one it was started with", "默认模型"),
    "restore": ("Settings from a file…", "从文件读取参数…"),
    "restored": ("Settings of {name} are in the form", "已载入 {name} 的参数"),
    "again": ("upload these files again: {names}", "以下文件需重新上传：{names}"),
    "elsewhere": ("not on this page: {names}", "本页没有的参数：{names}"),
    "untrained": ("this model was not trained for: {names}", "该模型没有训练过：{names}"),
    "other_model": ("it was made with another model", "原作品使用了其他模型"),
    "brought": (
        "{name}: {seconds} of {of} s are used, at {size}",
        "{name}：使用 {of} 秒中的 {seconds} 秒，尺寸 {size}",
    ),
    "copied": ("{name} is used as a PNG copy", "{name} 已转为 PNG 使用"),
    "first_part": ("the first {seconds} of {of} s", "取前 {seconds} 秒（共 {of} 秒）"),
    "needs": ("about {seconds}, {memory} of memory", "约需 {seconds}，内存 {memory}"),
    "needs_memory": ("about {memory} of memory", "约需内存 {memory}"),
    "came_back": (
        "The page was closed, so this video was stopped; its settings are in the form",
        "页面已离开太久，任务已停止；参数已恢复",
    ),
    "watched_elsewhere": ("This video continues in the tab that was opened last", "该任务已在最后打开的标签页中继续"),
    "eraser": ("Eraser", "橡皮"),
    "undo": ("Undo", "撤销"),
    "clear": ("Clear", "清除"),
    "brush_size": ("Size", "粗细"),
    "gif": ("gif", "gif"),
    "webm": ("webm", "webm"),
    "nothing_inside": (
        "Nothing yet. Press the button above: results appear here.",
        "还没有内容。按上面的按钮，结果会显示在这里。",
    ),
    "generate": ("Generate", "生成"),
    "stop": ("Stop", "停止"),
    "results": ("Your videos", "我的作品"),
    "use_last": ("Use last frame", "以尾帧为首帧"),
    "extend": ("Extend", "延长"),
    "vary": ("Vary seed", "换种子重做"),
    "compare": ("Compare", "对比"),
    "remove": ("Remove", "移除"),
    "settings": ("Exact settings", "完整参数"),
    "empty": ("Your video will appear here", "视频将显示在这里"),
    "empty_hint": ("Write a sentence or take an example, then press Generate", "写一句话或点一个示例，然后按“生成”"),
    "then": ("then {count} more", "再续写 {count} 段"),
    "with_loop": ("loop", "循环"),
    "facts": (
        "{frames} frames · {seconds} s · {size} · {fps} fps · {steps} steps",
        "{frames} 帧 · {seconds} 秒 · {size} · {fps} fps · {steps} 步",
    ),
    "camera_from_file": ("camera from a file", "镜头取自文件"),
    "no_results": ("Nothing yet", "还没有作品"),
    "waiting": ("Waiting: {place} before you", "排队中：前面还有 {place} 个"),
    "starting": ("Starting", "准备中"),
    "step": ("Step {step} of {total}", "第 {step} / {total} 步"),
    "left": ("{left} left", "剩余 {left}"),
    "finishing": ("Decoding", "解码中"),
    "done": ("Done in {seconds}", "完成，用时 {seconds}"),
    "stopped": ("Stopped", "已停止"),
    "mp4": ("Download", "下载"),
    "replay": ("Replay JSON", "复现 JSON"),
    "pick_two": ("Choose two videos to compare: click the first, press Compare, click the second", "先选一个作品，点“对比”，再选另一个"),
    "choose_first": ("Choose a video below first", "请先在下方选择一个作品"),
    "failed": ("Something went wrong on the server; its log says what", "服务器出错，详见其日志"),
    "inspect_hint": (
        "What happens inside the request of the Create tab: its noise levels, x̂₀ step by step, its latents, and where each token looks.",
        "“创作”页当前请求的内部过程：噪声水平、逐步的 x̂₀、潜变量，以及每个 token 的注意力。",
    ),
    "look": ("Look inside", "查看内部过程"),
    "schedule": ("σ schedule", "σ 日程"),
    "channels": ("Latents by channel", "各通道的潜变量"),
    "attention": ("Attention", "注意力"),
    "attention_hint": ("Click a point: where does its token look, in every frame?", "点击画面一点：它的 token 在各帧关注哪里？"),
    "look_again": ("Press Look inside first", "请先按“查看内部过程”"),
    "layer": ("Layer", "层"),
    "noise_level": ("σ", "σ"),
    "latent_frame": ("Frame of the token", "token 所在帧"),
    "sweep": ("Guidance sweep", "引导强度扫描"),
    "scales": ("Scales", "强度值"),
    "run_sweep": ("Sweep", "扫描"),
    "vae": ("VAE", "VAE"),
    "reconstruct": ("Reconstruct", "重建"),
    "step_axis": ("step", "步"),
    "frame_axis": ("frame", "帧"),
    "original": ("original", "原视频"),
    "reconstruction": ("reconstruction", "重建"),
    "error_map": ("error × 4", "误差 × 4"),
    "checkpoints": ("Checkpoints", "检查点"),
    "compare_checkpoints": ("Same seed, each checkpoint", "同一种子，逐个检查点"),
    "curves": ("Training curves", "训练曲线"),
    "refresh": ("Refresh", "刷新"),
}

CHINESE_TASKS = {
    "text_to_image": "文生图",
    "text": "文生视频",
    "image": "图生视频",
    "last": "尾帧生视频",
    "first_last": "首尾帧生视频",
    "keyframes": "关键帧生视频",
    "continuation": "视频续写",
    "inpaint": "视频局部重绘",
    "restyle": "视频风格重绘",
}
WORDS |= {f"task_{name}": (TASK_TITLES[name], chinese) for name, chinese in CHINESE_TASKS.items()} | {
    "task_camera": ("camera", "镜头"),
    "task_brush": ("motion brush", "运动笔刷"),
    "task_shots": ("shots", "分镜"),
    "task_reference": ("references", "参考图"),
}

# Gradio translates a label as a whole, so combined texts are combined here: why a control is greyed out.
NOT_TRAINED = ("not trained into this model", "该模型未训练此功能")
WORDS |= {
    f"unable_{name}": (f"{NOT_TRAINED[0]}: {WORDS[f'task_{name}'][0]}", NOT_TRAINED[1])
    for name in (*CHINESE_TASKS, "camera", "brush", "reference", "shots")
}
WORDS |= {
    f"{name}_unable": (f"{WORDS[name][0]} ({NOT_TRAINED[0]})", f"{WORDS[name][1]}（{NOT_TRAINED[1]}）")
    for name in ("first", "last", "keyframe", "continue", "restyle", "fill", "outpaint")
}
WORDS["references_unable"] = (f"Things ({NOT_TRAINED[0]})", f"参考图（{NOT_TRAINED[1]}）")


def t(key: str) -> gr.I18n:
    """A fixed text of the page, which the browser shows in its language."""
    return I18N(OURS + key)


def language(request: gr.Request | None) -> int:
    """0 English, 1 Chinese: the first of the two in the browser's languages."""
    read = (request.headers.get("accept-language", "") if request is not None else "").lower()
    return int(read.startswith("zh"))


def say(lang: int, key: str, **values: object) -> str:
    """A text with values, in a language chosen by `language`."""
    return WORDS[key][lang].format(**values)


# A field's name in an error -> its label.
LABELS = {
    "image": "first",
    "last_image": "last",
    "video": "clip",
    "keyframes": "keyframe",
    "keyframe's frame": "at",
    "keyframe's strength": "holds",
    "camera_file": "trajectory",
    "a track's point": "tracks",
    "a shot's seconds": "shot_seconds",
    "references": "task_reference",
    "sigma": "noise_level",
    "loop": "with_loop",
    "the loop's first frame": "with_loop",
}

OURS = "studio_"  # prefix that separates our texts from Gradio's own
I18N = gr.I18n(en={OURS + k: v[0] for k, v in WORDS.items()}, zh={OURS + k: v[1] for k, v in WORDS.items()})
