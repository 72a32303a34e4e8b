"""Prompts for the published Wan weights: umT5 embeddings, cleaned and padded as the Wan pipelines do it.

The encoder is larger than most transformers it serves, and is needed for a moment only. So it is loaded when a prompt comes that has not
been seen, and freed at once: the embeddings, a few megabytes each, are kept instead, in memory and, if a folder is given, on disk.
"""

from __future__ import annotations

import hashlib
import html
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kling.data.files import written
from kling.errors import UserError

PARTS = ("tokenizer", "text_encoder")
MAX_TOKENS = 512


def clean_prompt(prompt: str) -> str:
    """Broken encodings mended, HTML entities resolved (twice, as in the data), white space collapsed. Chinese punctuation becomes ASCII's.

    Raises `UserError` if ftfy, which the weights were trained with, is not installed.
    """
    try:
        import ftfy
    except ImportError:
        raise UserError("prompts of Wan weights are cleaned with ftfy, which is not installed: pip install 'kling[wan]'") from None
    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", text).strip()


class UMT5TextEncoder:
    """Prompts -> (b, max_tokens, e), exactly 0 past a prompt's end.

    folder: holds `tokenizer/` and `text_encoder/`, as in a Wan folder. dtype: of the weights while they run.
    cache: a folder of embeddings that outlives the process. keep: do not free the encoder between prompts.
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.bfloat16,
        max_tokens: int = MAX_TOKENS,
        cache: str | Path | None = None,
        keep: bool = False,
    ) -> None:
        self.folder, self.dtype, self.max_tokens, self.keep = Path(folder), dtype, max_tokens, keep
        self.cache = None if cache is None else Path(cache)
        for part in PARTS:
            if not (self.folder / part).is_dir():
                raise UserError(f"model {folder} is incomplete: it has no folder '{part}'")
        self._known: dict[str, Tensor] = {}  # on the CPU, unpadded
        self._loaded: tuple | None = None

    @property
    def loaded(self) -> bool:
        """Whether the encoder is in memory."""
        return self._loaded is not None

    def encode(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Prompts -> (b, max_tokens, e) on `device`. Longer prompts are cut off, as in the Wan pipelines."""
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        unknown = [prompt for prompt in dict.fromkeys(cleaned) if self._recall(prompt) is None]
        for prompt in unknown:
            self._remember(prompt, self._run(prompt, device))
        if unknown and not self.keep:
            self.free()
        rows = [self._known[prompt] for prompt in cleaned]
        return torch.stack([torch.cat([row, row.new_zeros(self.max_tokens - len(row), row.shape[1])]) for row in rows]).to(device)

    def free(self) -> None:
        """Give the encoder's memory back."""
        self._loaded = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy `tokenizer/` and `text_encoder/` as they are."""
        for part in PARTS:
            if (self.folder / part).resolve() != (Path(folder) / part).resolve():
                shutil.copytree(self.folder / part, Path(folder) / part, dirs_exist_ok=True)

    def _run(self, prompt: str, device: torch.device | str) -> Tensor:
        tokenizer, encoder = self._load(device)
        ids = tokenizer([prompt], padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt")  # (1, l)
        with torch.no_grad():
            out = encoder(ids.input_ids.to(device), ids.attention_mask.to(device)).last_hidden_state  # (1, l, e)
        return out[0, : int(ids.attention_mask.sum())].cpu()

    def _load(self, device: torch.device | str) -> tuple:
        if self._loaded is None:
            from transformers import AutoTokenizer, UMT5EncoderModel

            try:
                tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer")
                encoder = UMT5EncoderModel.from_pretrained(self.folder / "text_encoder", dtype=self.dtype, use_safetensors=True)
            except (OSError, ValueError, ImportError, SafetensorError) as error:
                raise UserError(f"text encoder of {self.folder} cannot be loaded ({str(error).strip().splitlines()[0]})") from None
            self._loaded = tokenizer, encoder.to(device).eval()
        return self._loaded

    # ---- the embeddings that are known ----

    def _file(self, prompt: str) -> Path:
        """Named by all that decides the embedding: the encoder's files, its dtype and the prompt."""
        weights = sorted((path.name, path.stat().st_size) for part in PARTS for path in (self.folder / part).iterdir())
        key = hashlib.sha256(repr((weights, str(self.dtype), self.max_tokens, prompt)).encode()).hexdigest()
        return self.cache / f"{key[:32]}.safetensors"

    def _recall(self, prompt: str) -> Tensor | None:
        if prompt not in self._known and self.cache is not None and (path := self._file(prompt)).is_file():
            self._known[prompt] = load_file(path)["text"]
        return self._known.get(prompt)

    def _remember(self, prompt: str, text: Tensor) -> None:
        self._known[prompt] = text
        if self.cache is not None:
            self.cache.mkdir(parents=True, exist_ok=True)
            with written(self._file(prompt)) as temporary:
                save_file({"text": text.contiguous()}, temporary)
