"""Captions from a local image-text-to-text model: any model that transformers can load, with its processor in the same folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kling.data.image import read_image
from kling.data.manifest import Caption, Manifest, Shot
from kling.data.reader import open_reader
from kling.data.scan.sidecar import caption
from kling.data.transforms import cover_size, fit
from kling.errors import UserError

SIDE = 448  # short side in pixels of the frames shown to the model
PROMPTS = {"en": "Describe this video in one sentence.", "zh": "用一句话描述这个视频。"}


class Captioner:
    """Describes a clip in one sentence from a few of its frames. Greedy decoding: the same clip gets the same caption."""

    def __init__(self, folder: str | Path, frames: int = 4, tokens: int = 96, device: str = "cpu") -> None:
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"caption model {folder} is not a model's folder (no config.json in it): download one and give its folder")
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            self.model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True).to(device).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:  # transformers raises any of these for an unknown folder
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"caption model {folder} is not an image-text-to-text model with its processor ({reason})") from None
        self.frames, self.tokens = frames, tokens

    @torch.no_grad()
    def describe(self, manifest: Manifest, shot: Shot, prompt: str, language: str) -> Caption:
        """One caption of a clip. Raises `UserError` if the clip cannot be read or the model returns nothing."""
        pictures = [Image.fromarray(picture) for picture in self._frames(manifest, shot)]
        if getattr(self.processor, "chat_template", None):
            content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
            text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        else:
            text = getattr(self.processor, "image_token", "<image>") * len(pictures) + prompt
        inputs = self.processor(images=pictures, text=text, return_tensors="pt").to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=self.tokens, do_sample=False)
        words = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        if not (line := " ".join(words.split())):
            raise UserError(f"{shot.name}: the caption model returned nothing: try another --prompt, or another model")
        return caption(line, language)

    def _frames(self, manifest: Manifest, shot: Shot) -> np.ndarray:
        """uint8 (n, H, W, 3), evenly spread over the clip, with a short side of at most `SIDE`."""
        source = manifest.check(shot)
        side = min(SIDE, shot.video.width, shot.video.height)
        size = cover_size(shot.video.height, shot.video.width, side, side)
        if shot.is_image:
            return fit(read_image(source), *size)[None].numpy()
        step = max(0.0, shot.seconds - 1 / shot.video.fps) / self.frames
        return open_reader(source, info=shot.video).at([shot.start + (i + 0.5) * step for i in range(self.frames)], size).numpy()
