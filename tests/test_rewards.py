"""Rewards on clips whose worth is known: truth above spoiled truth, motion above stills, and any local model by its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kling_programs.eval.cases import exchanged, other_camera, spoiled

from kling.data.world.scene import World, render_scene
from kling.errors import UserError
from kling.metrics.camera.errors import CLASSES
from kling.metrics.controls import frozen, taken_over
from kling.metrics.pixel import diversity
from kling.metrics.world import camera_scene, with_camera
from kling.rewards.local import model_reward
from kling.rewards.pixels import magnitude, speed
from kling.rewards.reward import Judge, Reward
from kling.rewards.world import ASKS, TERMS, Truth, WorldRequests, world_reward
from kling.sampling.request import Request

FRAMES = 17


@pytest.fixture(scope="module")
def obeys() -> Reward:
    return world_reward(0, FRAMES, "16:9", 120)


@pytest.mark.parametrize("ask", ASKS)
def test_truth_earns_more_than_what_was_not_asked_for(obeys: Reward, ask: str) -> None:
    requests = WorldRequests(3, FRAMES, "16:9", {ask: 1}, camera=True)
    truths = [requests(i)[1] for i in range(4)]
    scenes = [truth.scene for truth in truths]
    asked = [Request(**requests(i)[0]) for i in range(4)]
    true = obeys.score(torch.stack([render_scene(scene) for scene in scenes]), asked, truths)
    wrong = [spoiled(exchanged(other_camera(scene)), i) for i, scene in enumerate(scenes)]
    half = torch.stack([taken_over(render_scene(exchanged(scene)), render_scene(bad)) for scene, bad in zip(scenes, wrong, strict=True)])
    false = obeys.score(half, asked, truths)
    assert true.shape == (4, len(TERMS)) and bool((true.isnan() == false.isnan()).all())
    assert float(true.nan_to_num(0).min()) >= 0 and float(true.nan_to_num(0).max()) <= 1
    assert float(true.nanmean()) > 0.85 and float(true.nanmean()) > float(false.nanmean()) + 0.15
    applies = dict(zip(TERMS, (~true.isnan()).all(0).tolist(), strict=True))
    assert applies["colour"] and applies["camera"] == (ask in ("plain", "camera", "words"))


@pytest.mark.parametrize("name", ["dolly+", "zoom-", "horizontal+", "down_back"])
def test_a_camera_that_stands_still_earns_half_of_one_that_goes_as_asked(obeys: Reward, name: str) -> None:
    """Its rotation is right where none was asked for; its way and its class are not."""
    world = World(3, FRAMES, "16:9", max_things=1)
    asked = camera_scene(world, CLASSES.index(name), CLASSES)
    scenes = (asked, with_camera(world, asked, {}, "static"))
    rows = obeys.score(torch.stack([render_scene(scene) for scene in scenes]), [Request()] * 2, [Truth("camera", asked)] * 2)
    true, still = rows[:, TERMS.index("camera")].tolist()
    assert true > 0.8 and still < 0.55 and true > still + 0.35


def test_requests_are_a_function_of_their_index() -> None:
    asks = {"text": 1, "camera": 1, "words": 1}
    a, b, held = (WorldRequests(5, FRAMES, "16:9", asks, camera=True, split=split) for split in ("train", "train", "heldout"))
    assert [a(i)[0] for i in range(5)] == [b(i)[0] for i in range(5)] != [held(i)[0] for i in range(5)]
    assert {a(i)[1].ask for i in range(30)} == set(asks)
    without = WorldRequests(5, FRAMES, "16:9", asks, camera=False)
    assert not any("camera" in without(i)[0] for i in range(30)) and not any(without(i)[1].ask == "camera" for i in range(30))
    for wrong, said in (({"walk": 1}, "unknown ask"), ({"text": -1}, "0 or more"), ({"text": 0}, "at least one")):
        with pytest.raises(UserError, match=said):
            WorldRequests(5, FRAMES, "16:9", wrong, camera=True)


def moving(pixels: int) -> torch.Tensor:
    """A textured picture that moves right by so many pixels a frame."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 16, 40, generator=g)
    picture = (torch.nn.functional.interpolate(coarse, (64, 160), mode="bicubic").clamp(0, 1)[0] * 255).to(torch.uint8)
    return torch.stack([picture[:, :, 40 - t * pixels : 136 - t * pixels].permute(1, 2, 0) for t in range(5)])


def test_motion_is_measured_in_pixels() -> None:
    assert speed(moving(2)) == pytest.approx(2 / 64, rel=0.15) and speed(frozen(moving(2))) == pytest.approx(0, abs=1e-3)
    terms = magnitude(torch.stack([frozen(moving(1)), moving(1), moving(4)]), [Request()] * 3, [None] * 3)
    assert terms.shape == (3, 1) and 0 <= terms[0, 0] < 0.2 < terms[1, 0] < terms[2, 0] < 1


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    clips = torch.zeros(3, 2, 4, 4, 3, dtype=torch.uint8)
    clips[1] += 51
    assert diversity(clips) == pytest.approx(0.2 * 2 / 3) and diversity(clips[:1]) == 0


def test_the_judge_sums_what_counts_and_measures_the_rest() -> None:
    half = Reward(("a", "b"), lambda videos, requests, truths: torch.tensor([[0.5, torch.nan], [1.0, torch.nan]]))
    other = Reward(("c",), lambda videos, requests, truths: torch.tensor([[0.1], [0.2]]))
    judge = Judge([half, other], {"a": 2.0, "b": 1.0}, beside=["c"])
    terms = judge(torch.zeros(2, 1, 1, 1, 3, dtype=torch.uint8), [Request()] * 2, [None] * 2)
    assert judge.terms == ("a", "b", "c") and judge.total(terms).tolist() == [1, 2] and terms[:, 2].tolist() == pytest.approx([0.1, 0.2])
    for weights, beside, said in (
        ({"z": 1}, [], "unknown reward"),
        ({}, [], "empty"),
        ({"a": 0}, [], "above 0"),
        ({"a": 1}, ["a"], "both|leave"),
    ):
        with pytest.raises(UserError, match=said):
            Judge([half, other], weights, beside)


# ------------------------------------------------------------------------------------------------------------ local models


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "Yes", "No", "red", "ball", *(f"word{i}" for i in range(40))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


def save_llava(folder: Path) -> None:
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        pictures, tokenizer(), patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=28, patch_size=14)
    text = LlamaConfig(**small, vocab_size=49, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)


def save_clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    CLIPProcessor(pictures, tokenizer()).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 49, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "max_position_embeddings": 20}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config={**small, "image_size": 28, "patch_size": 14}, projection_dim=8)).save_pretrained(
        folder
    )


def save_siglip(folder: Path) -> None:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipProcessor

    SiglipProcessor(SiglipImageProcessor(size={"height": 28, "width": 28}), tokenizer()).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 49, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "max_position_embeddings": 12}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**small, "image_size": 28, "patch_size": 14}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)


def test_siglip_reads_its_prompt_at_the_length_it_was_trained_at(tmp_path: Path) -> None:
    """It pools the last of 12 places here, which is padding, and no mask hides padding. Written out here, from token numbers."""
    from transformers import SiglipModel

    save_siglip(tmp_path)
    clip = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 28, 28, 3), np.uint8))
    model = SiglipModel.from_pretrained(tmp_path)
    with torch.no_grad():
        rows = torch.tensor([[7, 8] + [3] * 10])  # red ball, padding
        out = model(input_ids=rows, pixel_values=clip.permute(0, 3, 1, 2).float() / 127.5 - 1)
    want = float((out.image_embeds @ out.text_embeds.T).mean() + 1) / 2
    assert float(model_reward(tmp_path).score(clip[None], [Request("red ball")], [None])) == pytest.approx(want, abs=1e-5)
    assert float(model_reward(tmp_path).score(clip[None], [Request("red ball " * 20)], [None])) > 0, "a longer prompt is cut"


@pytest.mark.parametrize("save", [save_llava, save_clip])
def test_a_local_model_scores_clips_by_their_prompt(tmp_path: Path, save: Any) -> None:
    save(tmp_path)
    reward = model_reward(tmp_path)
    clips = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 9, 32, 48, 3), np.uint8))
    both = reward.score(clips, [Request("red ball"), Request("word1 word2")], [None, None])
    assert reward.terms == ("model",) and both.shape == (2, 1) and bool(((both > 0) & (both < 1)).all())
    assert both[0] != both[1] and torch.equal(both[:1], reward.score(clips[:1], [Request("red ball")], [None]))


def test_a_folder_without_such_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a model's folder"):
        model_reward(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="neither a dual encoder nor"):
        model_reward(tmp_path)
