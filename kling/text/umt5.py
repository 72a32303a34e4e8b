"""Prompts for the published Wan weights: umT5 embeddings, with the same cleaning and padding as in the Wan pipelines.

The encoder is larger than most transformers that use it, and is needed only briefly. So it is loaded for a new prompt and freed at once;
the embeddings, a few megabytes each, are kept in memory or, if a folder is given, on disk.
"""

from __future__ import annotations

import hashlib
import html
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kling.errors import UserError
from kling.runtime.files import ends_hash, written

log = logging.getLogger(__name__)
FOLDERS = ("tokenizer", "text_encoder")
MAX_TOKENS = 512


def clean_prompt(prompt: str) -> str:
    """Repair broken encodings, resolve HTML entities (twice, as in the data), collapse white space, make Chinese punctuation ASCII.

    Raises `UserError` if ftfy, which cleaned the training data, is not installed.
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
    cache: a folder for embeddings, one file per prompt, kept between runs; without it they are kept in memory.
    cut: a prompt of more than `max_tokens` is cut, with a line in the log, instead of refused (for training captions).
    """

    def __init__(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.bfloat16,
        max_tokens: int = MAX_TOKENS,
        cache: str | Path | None = None,
        cut: bool = False,
    ) -> None:
        self.folder, self.dtype, self.max_tokens, self.cut = Path(folder), dtype, max_tokens, cut
        self.cache = None if cache is None else Path(cache)
        for part in FOLDERS:
            if not (self.folder / part).is_dir():
                raise UserError(f"model {folder} is incomplete: it has no folder '{part}'")
        self._known: dict[str, Tensor] = {}  # on the CPU, unpadded
        self._loaded: Any = None

    @property
    def loaded(self) -> bool:
        """Whether the encoder is in memory."""
        return self._loaded is not None

    @property
    def num_tokens(self) -> int:
        """Number of text tokens that the transformer receives for every prompt."""
        return self.max_tokens

    @property
    def identity(self) -> str:
        """The encoder's identity: its source, its dtype and its maximum length."""
        return hashlib.sha256(self._identity + repr((str(self.dtype), self.max_tokens)).encode()).hexdigest()

    def encode(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Prompts -> (b, max_tokens, e) on `device`. Raises `UserError` for a longer prompt (the Wan pipelines cut it silently)."""
        for _ in self.learn(prompts, device):
            pass
        rows = [self._recall(clean_prompt(prompt)) for prompt in prompts]
        return torch.stack([torch.cat([row, row.new_zeros(self.max_tokens - len(row), row.shape[1])]) for row in rows]).to(device)

    def learn(self, prompts: Iterable[str], device: torch.device | str = "cpu") -> Iterator[tuple[int, int]]:
        """Encode the prompts not encoded yet, then free the encoder. Yields (done, total) before the first one and after each."""
        unknown = [prompt for prompt in dict.fromkeys(map(clean_prompt, prompts)) if not self._knows(prompt)]
        for prompt in unknown:  # before the encoder is loaded
            self._check_length(prompt)
        yield 0, len(unknown)
        try:
            for done, prompt in enumerate(unknown, start=1):
                self._remember(prompt, self._run(prompt, device))
                yield done, len(unknown)
        finally:
            self.free()

    def free(self) -> None:
        """Free the encoder's memory."""
        self._loaded = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy `tokenizer/` and `text_encoder/` unchanged."""
        for part in FOLDERS:
            if (self.folder / part).resolve() != (Path(folder) / part).resolve():
                shutil.copytree(self.folder / part, Path(folder) / part, dirs_exist_ok=True)

    def _run(self, prompt: str, device: torch.device | str) -> Tensor:
        encoder = self._load(device)
        ids = self._tokenizer([prompt], padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt")  # (1, l)
        with torch.no_grad():
            out = encoder(ids.input_ids.to(device), ids.attention_mask.to(device)).last_hidden_state  # (1, l, e)
        return out[0, : int(ids.attention_mask.sum())].cpu()

    def _check_length(self, prompt: str) -> None:
        ids = self._tokenizer(prompt, verbose=False).input_ids  # of the whole prompt and its end token
        if len(ids) <= self.max_tokens:
            return
        lost = self._tokenizer.decode(ids[self.max_tokens - 1 : self.max_tokens + 24], skip_special_tokens=True)[:60].strip()
        line = f"prompt '{prompt[:40]}…' has {len(ids)} tokens, and umT5 reads {self.max_tokens}"
        if not self.cut:
            line += f": shorten it; from '{lost}…' on it would be lost"
            raise UserError(line, code="prompt_too_long", n=len(ids), most=self.max_tokens)
        log.warning("%s: cut before '%s…'", line, lost)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with self._loading():
            return AutoTokenizer.from_pretrained(self.folder / "tokenizer")

    def _load(self, device: torch.device | str) -> Any:
        if self._loaded is None:
            from transformers import UMT5EncoderModel

            with self._loading():
                encoder = UMT5EncoderModel.from_pretrained(self.folder / "text_encoder", dtype=self.dtype, use_safetensors=True)
            self._loaded = encoder.to(device).eval()
        return self._loaded

    @contextmanager
    def _loading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise UserError(f"text encoder of {self.folder} cannot be loaded ({str(error).strip().splitlines()[0]})") from None

    # ---- stored embeddings ----

    @cached_property
    def _identity(self) -> bytes:
        return ends_hash(sorted(path for part in FOLDERS for path in (self.folder / part).iterdir() if path.is_file()))

    def _file(self, prompt: str) -> Path:
        """A file name from all that determines the embedding: the encoder, its dtype, the length and the prompt."""
        key = hashlib.sha256(self._identity + repr((str(self.dtype), self.max_tokens, prompt)).encode()).hexdigest()
        return self.cache / key[:2] / f"{key[2:32]}.safetensors"

    def _knows(self, prompt: str) -> bool:
        return prompt in self._known if self.cache is None else self._file(prompt).is_file()

    def _recall(self, prompt: str) -> Tensor:
        """(l, e)"""
        if self.cache is None:
            return self._known[prompt]
        file = self._file(prompt)
        try:
            return load_file(file)["text"]
        except (OSError, SafetensorError) as error:
            raise UserError(f"embedding {file} is damaged ({error}): delete it, and it will be made again") from None

    def _remember(self, prompt: str, text: Tensor) -> None:
        if self.cache is None:
            self._known[prompt] = text
            return
        file = self._file(prompt)
        with written(file) as temporary:
            save_file({"text": text.contiguous()}, temporary)
