"""A reward model from a folder: any that transformers loads, of two kinds.

dual encoders (CLIP, SigLIP, and what was trained from them for preferences, such as PickScore): how near a clip's frames are to its prompt
models that answer questions about pictures (LLaVA, Qwen-VL …): the probability of "Yes" (VQAScore: Lin et al. 2024, arXiv 2404.01291)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kling.errors import UserError
from kling.rewards.reward import Reward
from kling.sampling.request import Request

FRAMES = 4  # of a clip that are shown
QUESTION = 'Does this video show "{prompt}", moving plausibly and without faults? Answer Yes or No.'


def model_reward(folder: str | Path, device: torch.device | str = "cpu") -> Reward:
    """The term "model" of a folder with a model and its processor. Raises `UserError` if there is none, or of another kind."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"reward_model {folder} is not a model's folder (no config.json in it): download one and give its folder")
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        dual = type(config) in AutoModel._model_mapping and hasattr(AutoModel._model_mapping[type(config)], "get_text_features")
        kind = AutoModel if dual else AutoModelForImageTextToText
        model = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(device).eval().requires_grad_(False)
    except (OSError, ValueError, KeyError, ImportError) as error:  # transformers raises any of these for an unknown folder
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"reward_model {folder} is neither a dual encoder nor an image-text-to-text model ({reason})") from None
    one = _similarity if dual else _answer

    @torch.no_grad()
    def score(videos: Tensor, requests: Sequence[Request], truths: Sequence[Any]) -> Tensor:
        rows = [one(model, processor, _frames(video), request.prompt) for video, request in zip(videos, requests, strict=True)]
        return torch.tensor(rows)[:, None]

    return Reward(("model",), score)


def _frames(video: Tensor) -> list[Image.Image]:
    """Evenly spread frames of a clip (T, H, W, 3) uint8."""
    places = ((torch.arange(FRAMES) + 0.5) / FRAMES * len(video)).long().unique()
    return [Image.fromarray(video[t].numpy()) for t in places.tolist()]


def _similarity(model: Any, processor: Any, pictures: list[Image.Image], prompt: str) -> float:
    """Mean cosine between the prompt and the frames, mapped to [0, 1]."""
    longest = model.config.text_config.max_position_embeddings
    filled = model.config.model_type.startswith("siglip")  # it pools the last place, and reads padding like words, as it was trained
    how = {"return_tensors": "pt", "padding": "max_length" if filled else True, "truncation": True, "max_length": longest}
    given = processor(text=[prompt], images=pictures, **how).to(model.device)
    if filled:
        given.pop("attention_mask", None)
    out = model(**given)
    text, seen = (x / x.norm(dim=-1, keepdim=True) for x in (out.text_embeds, out.image_embeds))  # (1, e), (n, e)
    return float((seen @ text.T).mean() + 1) / 2


def _answer(model: Any, processor: Any, pictures: list[Image.Image], prompt: str) -> float:
    """Probability of Yes against No as the first word of the answer."""
    asked = QUESTION.format(prompt=prompt)
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": asked}]
        asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    else:
        asked = getattr(processor, "image_token", "<image>") * len(pictures) + asked
    logits = model(**processor(images=pictures, text=asked, return_tensors="pt").to(model.device)).logits[0, -1].float()
    yes, no = (processor.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("Yes", "No"))
    return float(torch.softmax(logits[[yes, no]], dim=0)[0])
