"""What other servers call our fields, and what to write here for fields of theirs that have no counterpart.

Read from the request schemas of A1111 and Forge, diffusers, ComfyUI, InvokeAI, Replicate, fal, Stability AI, Black
Forest Labs, OpenAI, vLLM-Omni and SGLang Diffusion. Names count without case, hyphens and underscores, so `cfgScale`
is `cfg_scale`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

ALIKE = 0.75
"""Likeness, by difflib, from which a name counts as a slip of ours: "promt" and "szie" do, "image" and "stream" not."""

RENAMED = {
    "prompt": "positive positive_prompt text text_prompts caption",
    "negative_prompt": "negative neg_prompt negative_text",
    "model": "model_id model_name model_path checkpoint ckpt ckpt_name sd_model_checkpoint engine engine_id",
    "n": "num_images num_images_per_prompt images_per_prompt num_outputs num_outputs_per_prompt num_samples n_samples "
    "samples sample_count number_of_images image_count num_return batch_size batch_count n_iter iterations count",
    "num_inference_steps": "steps num_steps inference_steps sampling_steps sample_steps diffusion_steps ddim_steps "
    "denoising_steps",
    "guidance_scale": "cfg cfg_scale cfg_strength guidance guidance_strength distilled_cfg_scale "
    "classifier_free_guidance_scale",
    "true_cfg_scale": "true_cfg",
    "skip_layer_guidance_scale": "slg slg_scale",
    "skip_layer_guidance_start": "slg_start",
    "skip_layer_guidance_stop": "slg_stop slg_end skip_layer_guidance_end",
    "seed": "noise_seed random_seed manual_seed rng_seed generator",
    "sampler": "scheduler scheduler_name sampler_name sampler_index sample_method sampling_method solver",
    "class_label": "label labels class class_id class_labels class_name class_index",
    "max_sequence_length": "max_length text_length t5_length",
    "output_format": "format image_format file_format file_type mime_type output_type output_mime_type",
    "output_compression": "output_quality image_quality jpeg_quality webp_quality quality_level compression",
    "partial_images": "previews num_previews",
    "stream": "streaming",
    "deadline": "timeout time_limit",
    "grid": "columns return_grid",
}
"""Our field: the names that mean the same elsewhere."""

OTHERWISE = {
    'size has both, "WxH" in pixels': "width height w h image_width image_height image_size resolution dimensions "
    "aspect_ratio ratio megapixels",
    "pictures are drawn from a text or a class alone; none is taken as an input": "image images image_url image_urls "
    "image_prompt image_prompt_url init_image init_images input_image input_images input_reference reference_image "
    "reference_images reference_url mask mask_image mask_url mask_blur strength denoise denoising_strength "
    "prompt_strength image_strength image_prompt_strength input_fidelity resize_mode inpainting_fill latent_image "
    "controlnet control_image control_net ip_adapter ip_adapter_image redux_image",
    "no LoRA is served": "lora loras lora_name lora_path lora_url lora_scale lora_scales lora_weight lora_weights "
    "hf_lora hf_loras extra_lora adapter adapters joint_attention_kwargs cross_attention_kwargs",
    "prompt goes to every text encoder of a model": "prompt_2 prompt_3 clip_l clip_g t5xxl",
    "negative_prompt goes to every text encoder of a model": "negative_prompt_2 negative_prompt_3",
    "write the style into the prompt": "styles style_preset style_id",
    "a prompt is drawn as it is written": "prompt_upsampling prompt_extend enhance_prompt prompt_enhancement "
    "enable_prompt_expansion expand_prompt magic_prompt magic_prompt_option system_prompt use_system_prompt",
    "the card sets the noise schedule; sampler and num_inference_steps choose the points of it": "sigmas timesteps "
    "shift flow_shift mu eta s_churn s_noise s_tmin s_tmax s_min_uncond karras use_karras_sigmas schedule_type",
    "nothing is filtered here; leave it out": "safety_checker enable_safety_checker disable_safety_checker "
    "safety_tolerance safety_filter safe apply_watermark nsfw",
    "how it is computed is for the server to choose; leave it out": "go_fast acceleration speed_mode quality_mode "
    "enable_teacache use_teacache generator_device device dtype vae_use_slicing vae_use_tiling num_gpus",
    "the answer to this request has the pictures; leave it out": "sync_mode webhook webhook_url webhook_secret "
    "send_images save_images do_not_save_samples do_not_save_grid return_dict",
    "its fields belong into the body itself, beside prompt": "extra_body extra_args extra_params diffusers_kwargs "
    "override_settings parameters params input inputs options instances config",
    "this route takes one prompt, not a conversation": "messages",
    "nothing here does that; leave it out": "clip_skip tiling restore_faces enable_hr hr_scale hr_upscaler "
    "hr_second_pass_steps hires_fix upscale upscaler subseed subseed_strength guidance_rescale pag_scale refine "
    "refiner refiner_checkpoint refiner_switch_at high_noise_frac script_name script_args alwayson_scripts latents "
    "prompt_embeds negative_prompt_embeds pooled_prompt_embeds layers raw",
}
"""A sentence: the names of which it says what to do instead."""


def hint(name: str, known: Iterable[str]) -> str:
    """The end of a message about a field that does not exist: the one of `known` that does the same or is nearly
    spelled so, or what to do instead; empty where there is neither."""
    wanted, fields = _plain(name), {_plain(field): field for field in known}
    found = _FIELDS.get(wanted)
    if found not in fields.values():
        if wanted in _SENTENCES:
            return f"; {_SENTENCES[wanted]}"
        found = next((fields[slip] for slip in difflib.get_close_matches(wanted, fields, 1, ALIKE)), None)
    return f'; did you mean "{found}"?' if found else ""


def _plain(name: str) -> str:
    return name[:64].casefold().replace("_", "").replace("-", "")


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {_plain(name): meant for meant, names in table.items() for name in names.split()}


_FIELDS, _SENTENCES = _by_name(RENAMED), _by_name(OTHERWISE)
