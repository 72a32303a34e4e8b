"""Write a short idea out as a prompt, with a local chat model that is told what the checkpoint can do.

    enhance = Enhancer("models/Qwen2.5-1.5B-Instruct")
    pipe(enhance("a red ball", pipe))

The answer is greedy, so the same idea gives the same prompt on the same machine. There is no rule that takes a model's place.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kling.data.world.captions import vocabulary
from kling.errors import UserError
from kling.text import ByteTextEncoder
from kling.text.encoder import prompt_bytes

if TYPE_CHECKING:
    from kling.sampling.pipeline import KlingPipeline

NEW_TOKENS = 320
WORDS = 100  # asked for; an encoder of bytes may have room for fewer
BYTES_A_WORD = 8  # with the space, rounded up: Chinese characters take three
ASKED = (
    "You write prompts for a text-to-video model. From the user's idea, write one prompt that says what a viewer sees: the subject, how it "
    "looks, how it moves, where it is, and how the camera moves if the idea says so. Keep everything that the idea says and contradict "
    "nothing. A clip is one shot of {seconds:.0f} seconds. Answer in the language of the idea, Chinese or English, with the prompt alone: "
    "one paragraph of at most {words} words, without quotes, lists, headings or remarks."
)
PICTURE = " Its first frame is given as a picture that you do not see: say only what happens in it."
KNOWN = (
    " This model was trained on a small world and knows no other words than these; use them and simple grammar only: {known}. "
    "An example: a red ball rolls left on grass."
)


class Enhancer:
    """A chat model from a local folder, in the layout of transformers. Raises `UserError` if it cannot be read or is no chat model."""

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise UserError(f"--enhance {folder} holds no config.json: give the folder of a chat model for transformers")
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            self.model = AutoModelForCausalLM.from_pretrained(self.folder, local_files_only=True, dtype=dtype).to(device).eval()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise UserError(
                f"--enhance {folder} cannot be read ({str(error).splitlines()[0]}): give a chat model for transformers"
            ) from None
        if not self.tokenizer.chat_template:
            raise UserError(f"--enhance {folder} has no chat template: give a model that was trained to follow instructions")

    @torch.no_grad()
    def __call__(self, idea: str, pipe: KlingPipeline, picture: bool = False) -> str:
        """The prompt written from an idea. picture: the first frame is given. Raises `UserError` if the model writes nothing that fits."""
        chat = [{"role": "system", "content": instructions(pipe, picture)}, {"role": "user", "content": idea}]
        given = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True, enable_thinking=False
        ).to(self.model.device)
        end = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        how = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": end}
        answer = self.model.generate(**given, **how)[0, given["input_ids"].shape[1] :]
        text = tidied(self.tokenizer.decode(answer, skip_special_tokens=True))
        fits = whole_sentences(text, room(pipe))
        if not fits:
            what = f"wrote {len(prompt_bytes(text))} bytes, and the text encoder reads {room(pipe)}" if text else "wrote nothing"
            line = f"--enhance {self.folder} {what}: write the prompt out yourself, or give another model"
            raise UserError(line, code="not_enhanced")
        return fits


def instructions(pipe: KlingPipeline, picture: bool = False) -> str:
    """What the chat model is told: what to write, how long, and what this checkpoint can do."""
    most = room(pipe)
    words = WORDS if most is None else min(WORDS, most // BYTES_A_WORD)
    said = ASKED.format(seconds=(pipe.config.max_frames - 1) / pipe.config.fps, words=words)
    if picture:
        said += PICTURE
    if pipe.config.get("vocabulary") == "world":
        rows = [f"{subject}: {', '.join(f'{en[0]} ({zh[0]})' for _, en, zh in named)}" for subject, named in vocabulary().items()]
        said += KNOWN.format(known="; ".join(rows))
    return said


def room(pipe: KlingPipeline) -> int | None:
    """Bytes of a prompt that the text encoder reads; None for umT5, whose 512 tokens are more than is asked for."""
    return pipe.text_encoder.config.max_bytes if isinstance(pipe.text_encoder, ByteTextEncoder) else None


def tidied(answer: str) -> str:
    """The prompt in an answer: without what a model thought aloud, quotes around it, and line breaks.

    >>> tidied('<think>short?</think> "A red ball\\n rolls."')
    'A red ball rolls.'
    """
    text = re.sub(r"<think>.*?(</think>|$)", "", answer, flags=re.DOTALL)
    return " ".join(text.split()).strip("\"'“”「」 ")


def whole_sentences(text: str, most: int | None) -> str:
    """The whole text if it has at most `most` bytes, else as many of its first sentences as fit.

    >>> whole_sentences("A ball. It rolls far away.", 10)
    'A ball.'
    """
    if most is None or len(prompt_bytes(text)) <= most:
        return text
    kept = ""
    for sentence in re.findall(r".+?(?:[.!?](?=\s|$)|[。！？]|$)\s*", text):
        if len(prompt_bytes(kept + sentence)) > most:
            break
        kept += sentence
    return kept.strip()
