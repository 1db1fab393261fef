"""An unknown field is answered with the one that does the same here, or with what to do instead."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from app.errors import RequestError
from app.jobs.body import ImageBody
from app.jobs.edit import EditBody, read_edit
from app.jobs.other_names import OTHERWISE, RENAMED, hint
from app.source import PICTURES
from tests.parts.servers import generate

FIELDS = list(ImageBody.model_fields)

MEANT = {
    # A1111 and Forge
    "steps": "num_inference_steps", "cfg_scale": "guidance_scale", "sampler_name": "sampler",
    "sampler_index": "sampler", "batch_size": "n", "n_iter": "n", "distilled_cfg_scale": "guidance_scale",
    "sd_model_checkpoint": "model", "schedule_type": "schedule",
    # diffusers
    "num_images_per_prompt": "n", "generator": "seed", "output_type": "output_format", "class_labels": "class_label",
    # ComfyUI, InvokeAI
    "cfg": "guidance_scale", "noise_seed": "seed", "ckpt_name": "model", "positive_prompt": "prompt",
    "negative": "negative_prompt", "iterations": "n",
    # Replicate, fal, Stability AI, Black Forest Labs
    "num_outputs": "n", "guidance": "guidance_scale", "output_quality": "output_compression", "num_images": "n",
    "samples": "n", "text_prompts": "prompt", "format": "output_format",
    "refine": "refiner", "crops_coords_top_left": "crop",
    # vLLM-Omni, SGLang Diffusion
    "num_outputs_per_prompt": "n", "true_cfg": "true_cfg_scale",
    # other ways to write ours
    "cfgScale": "guidance_scale", "numInferenceSteps": "num_inference_steps", "negative-prompt": "negative_prompt",
    "Seed": "seed", "timeout": "deadline",
    # slips
    "promt": "prompt", "negative_promt": "negative_prompt", "guidence_scale": "guidance_scale", "szie": "size",
    "inference_step": "num_inference_steps", "seeds": "seed", "modle": "model", "gird": "grid",
}  # fmt: skip

INSTEAD = {
    "width": '"WxH"', "height": '"WxH"', "aspect_ratio": '"WxH"', "image_size": '"WxH"', "megapixels": '"WxH"',
    "image": "images/edits", "init_images": "images/edits", "image_url": "images/edits", "strength": "images/edits",
    "mask_image": "images/edits", "denoising_strength": "images/edits", "resize_mode": "images/edits",
    "prompt_strength": "images/edits", "input_fidelity": "images/edits", "overlay": "images/edits",
    "inpaint_full_res": "the whole picture", "inpainting_mask_invert": "mask_image", "ip_adapter": "no such network",
    "lora": "GET /v1/loras", "lora_scale": "GET /v1/loras", "prompt_2": "every text encoder",
    "styles": "into the prompt", "style_preset": "into the prompt", "prompt_upsampling": "as it is written",
    "sigmas": "noise schedule", "flow_shift": "noise schedule", "eta": "noise schedule",
    "disable_safety_checker": "nothing is filtered",
    "safety_tolerance": "nothing is filtered", "go_fast": "leave it out", "enable_teacache": "leave it out",
    "generator_device": "leave it out", "sync_mode": "leave it out", "webhook_url": "leave it out",
    "extra_body": "beside prompt", "override_settings": "beside prompt", "diffusers_kwargs": "beside prompt",
    "input": "beside prompt", "messages": "not a conversation", "clip_stop_at_last_layers": "how many layers",
    "scheduler": '"dpmpp_2m"', "use_karras_sigmas": '"karras"', "karras": "schedule its noise levels",
    "enable_hr": "leave it out", "restore_faces": "leave it out",
    "refiner_switch_at": "refiner has both", "high_noise_frac": "refiner has both", "denoising_end": "refiner has both",
    "refiner_checkpoint": "refiner has both", "aesthetic_score": "scores of a refiner", "crop_w": "original_size, crop",
}  # fmt: skip


def refused(http: httpx.Client, body: dict[str, Any], path: str = "/v1/images/generations") -> str:
    reply = http.post(path, json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "unknown_parameter")
    message: str = error["message"]
    return message


@pytest.mark.parametrize(("name", "ours"), MEANT.items())
def test_the_field_that_does_the_same(http: httpx.Client, name: str, ours: str) -> None:
    assert refused(http, {"prompt": "a", name: 1}) == f'Unknown field "{name}"; did you mean "{ours}"?'


@pytest.mark.parametrize(("name", "words"), INSTEAD.items())
def test_what_to_do_instead(http: httpx.Client, name: str, words: str) -> None:
    message = refused(http, {"prompt": "a", name: 1})
    assert message.startswith(f'Unknown field "{name}"; ') and words in message and "did you mean" not in message


@pytest.mark.parametrize("name", ["qqqqqq", "image_thing", "output", "quality_of_life", "s", "", "x" * 99_999])
def test_nothing_is_offered_that_is_not_alike(http: httpx.Client, name: str) -> None:
    assert refused(http, {"prompt": "a", name: 1}) == f'Unknown field "{name[:64]}"'


def test_a_comparison_offers_its_own_fields(http: httpx.Client) -> None:
    body = {"models": ["tiny-text"], "prompt": "a"}
    told = {name: refused(http, {**body, name: 1}, "/v1/images/compare") for name in ("model", "steps", "width", "n")}
    assert told["model"].endswith('did you mean "models"?') and told["steps"].endswith('"num_inference_steps"?')
    assert '"WxH"' in told["width"] and told["n"] == 'Unknown field "n"'


def test_every_name_is_told_once_and_is_none_of_ours() -> None:
    assert RENAMED.keys() <= {*EditBody.model_fields, *PICTURES}
    names = [name for table in (RENAMED, OTHERWISE) for text in table.values() for name in text.split()]
    assert len(names) == len(set(names)) and not set(names) & set(FIELDS)
    assert all(hint(name, FIELDS) for name in names)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("denoising_strength", 'did you mean "strength"?'),
        ("denoise", 'did you mean "strength"?'),
        ("init_images", 'did you mean "image"?'),
        ("mask_url", 'did you mean "mask"?'),
        ("resize_mode", 'did you mean "resize"?'),
        ("steps", 'did you mean "num_inference_steps"?'),
        ("strenght", 'did you mean "strength"?'),
        ("inpainting_fill", "strength says how much of each"),
        ("width", '"WxH" in pixels'),
    ],
)
def test_the_fields_of_an_edit_are_offered_to_an_edit(name: str, end: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_edit({"prompt": "a", name: 1})
    assert caught.value.message.startswith(f'Unknown field "{name}"; ') and caught.value.message.endswith(end)


def test_what_is_offered_is_taken(http: httpx.Client) -> None:
    assert generate(http, {"prompt": "a", "num_inference_steps": 2, "n": 1, "size": "32x32"}).status_code == 200
