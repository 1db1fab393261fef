"""The plain loop of edits against diffusers' img2img and inpaint pipelines; no engine takes part."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parts.close import SAME, apart, close
from tests.parts.edits import as_field, half_mask, picture
from tests.seeds.plain_edits import FAULTS, Fault, faulty, plain_latent
from tests.seeds.upstream import Body, final_latent

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

WIDTH, HEIGHT = 56, 40
SD3: Body = {
    "prompt": "a red apple on a blue background", "negative_prompt": "green dog", "guidance_scale": 4.0,
    "sampler": "flow_euler", "size": f"{WIDTH}x{HEIGHT}", "num_inference_steps": 10, "seed": 11, "strength": 0.6,
    "image": as_field(picture(WIDTH, HEIGHT)),
}  # fmt: skip
MASK = {"mask_image": as_field(half_mask(WIDTH, HEIGHT))}


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.6, 0.99, 1.0])
@pytest.mark.parametrize("scale", [0.0, 4.0])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loop_is_the_pipeline(seed_models: Path, masked: bool, scale: float, strength: float) -> None:
    body = {**SD3, **(MASK if masked else {}), "guidance_scale": scale, "strength": strength}
    close(plain_latent(seed_models / "sd3-16", body), final_latent(seed_models / "sd3-16", body), SAME)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_in_both(seed_models: Path, fault: Fault) -> None:
    """Each is far from what is right, and the pipeline makes of it what the loop does."""
    body, folder = {**SD3, **MASK}, seed_models / "sd3-16"
    wrong = plain_latent(folder, body, fault)
    apart(wrong, plain_latent(folder, body), SAME, of=fault)
    with faulty(fault, body) as changed:
        close(wrong, final_latent(folder, changed), SAME)
