"""Write a short idea out as a prompt, with a local chat model that is told what the checkpoint can do and what else is given.

    enhance = Enhancer("models/Qwen2.5-1.5B-Instruct")
    pipe(enhance("a red ball", pipe))
    request = Request("it falls over", image="first.png")
    pipe(request.replace(prompt=enhance(request, pipe)))

The answer is greedy, so the same request gives the same prompt on the same machine. There is no rule that takes a model's place.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kling.data.world.captions import vocabulary
from kling.errors import UserError
from kling.sampling.request import Request
from kling.text import ByteTextEncoder
from kling.text.encoder import prompt_bytes

if TYPE_CHECKING:
    from kling.sampling.pipeline import KlingPipeline

NEW_TOKENS = 320
WORDS = 100  # asked for; an encoder of bytes may have room for fewer
BYTES_A_WORD = 8  # with the space, rounded up: Chinese characters take three
ASKED = (
    "You write prompts for a text-to-video model. From the user's idea, write one prompt that says what a viewer sees: the subject, how it "
    "looks, how it moves, where it is{camera}. Keep everything that the idea says and contradict nothing. {length} Answer in the language "
    "of the idea, Chinese or English, with the prompt alone: one paragraph of at most {words} words, without quotes, lists, headings or "
    "remarks."
)
MOVES = ", and how the camera moves if the idea says so"
STILL = " This model was not trained to move the camera: add no camera move that the idea does not ask for."
GIVEN = {  # field of a request -> what is said if it is given
    "image": " Its first frame is given as a picture that you do not see: say only what happens in it.",
    "last_image": " Its last frame is given as a picture that you do not see.",
    "keyframes": " Frames between are given as pictures that you do not see.",
    "loop": " Its end leads back to its beginning.",
    "video": " It goes on from a video that you do not see: say only what happens next.",
    "strength": " It is a video that you do not see, made anew: its motion stays, and the prompt says how it looks.",
    "mask": " You do not see the picture or video a part of which is replaced: say what the whole shows.",
    "outpaint": " You do not see the picture or video that is given, and what lies around it is added: say what the whole shows.",
    "control": " It follows the edges, depths or poses of a video that you do not see.",
    "tracks": " Where things move is drawn by hand: do not say where to.",
    "camera": " The camera's path is given: do not say how the camera moves.",
}
POINTERS = ("first", "第一个"), ("second", "第二个"), ("third", "第三个"), ("fourth", "第四个")
REFERENCES = " It shows things of which pictures are given. Call them {english} (in Chinese {chinese}), and do not say how they look."
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
    def __call__(self, asked: Request | str, pipe: KlingPipeline) -> str:
        """The prompt written from that of a request, or from words alone.

        Raises `UserError` for a request that the pipeline cannot answer, and if the model writes nothing that fits.
        """
        request = asked if isinstance(asked, Request) else Request(asked)
        chat = [{"role": "system", "content": instructions(pipe, request)}, {"role": "user", "content": request.prompt}]
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


def instructions(pipe: KlingPipeline, request: Request) -> str:
    """What the chat model is told: what to write, how long, what this checkpoint can do, and what is given beside words.

    Raises `UserError` for a request that the pipeline cannot answer.
    """
    # An idea may be longer than a prompt, so it is left out of the plan.
    plan, most, able = pipe.plan(request.replace(prompt="")), room(pipe), pipe.config.capabilities
    there = plan.hops[0].start + plan.hops[0].overlap  # frames of a video that goes on
    seconds = (plan.frames - (there or 1)) / plan.fps
    length = f"The clip is one shot of {round(seconds, 1):g} seconds." if plan.frames > 1 else "It is a single picture: nothing moves."
    words = WORDS if most is None else min(WORDS, most // BYTES_A_WORD)
    moves = "camera" in able and request.camera is None
    said = ASKED.format(camera=MOVES if moves else "", length=length, words=words)
    said += "" if "camera" in able else STILL
    values = {name: getattr(request, name) for name in GIVEN}
    if request.edited:  # what is given is changed: it does not go on, nor is it the first frame
        values |= {"image": None, "video": None}
    said += "".join(GIVEN[name] for name, value in values.items() if (value if isinstance(value, bool | list) else value is not None))
    if count := len(request.references):
        english, chinese = (", ".join(names) for names in zip(*((f"the {e} thing", f"{c}物体") for e, c in POINTERS[:count]), strict=True))
        said += REFERENCES.format(english=english, chinese=chinese)
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
