"""The schedule of a user's folder: each fact of scheduler_config.json is in the card, or is refused by its name."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from app.cards.folder import DIFFUSION, FLOW, changes, schedule_of
from app.errors import CheckpointError
from app.samplers.grids import alpha_bar, ddim_path, exploding_path, flow_path
from app.samplers.schedule import Schedule
from app.samplers.table import at_size

SD3 = {"kind": "flow", "spacing": "sd3", "shift": 3.0}
FLUX = {"kind": "flow", "spacing": "flux", "dynamic_shift": {"max": 1.15}}
DIT = {"kind": "diffusion", "betas": "linear", "spacing": "linspace", "variance": "learned_range"}
EULER = "FlowMatchEulerDiscreteScheduler"


def folder(path: Path, name: str, **config: Any) -> Path:
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **config}))
    return path


def saved(path: Path, kind: str, **config: Any) -> tuple[Path, Any]:
    """A folder as diffusers writes it, with every key, and the scheduler that it would walk with."""
    made = getattr(diffusers, kind)(**config)
    made.save_pretrained(path / "scheduler")
    return path, made


@pytest.mark.parametrize(
    ("config", "like", "wanted"),
    [
        ({"shift": 1.0}, SD3, {**SD3, "shift": 1.0}),
        ({}, SD3, {**SD3, "shift": 1.0}),
        ({"shift": 2.5, "num_train_timesteps": 500}, SD3, {**SD3, "shift": 2.5, "train_steps": 500}),
        ({"shift": 1.5}, FLUX, {"kind": "flow", "spacing": "flux", "shift": 1.5}),
        (
            {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.25, "max_image_seq_len": 8192},
            SD3,
            {
                "kind": "flow",
                "spacing": "sd3",
                "dynamic_shift": {"base_tokens": 256, "max_tokens": 8192, "base": 0.25, "max": 1.15},
            },
        ),
    ],
    ids=str,
)
def test_the_facts_of_a_flow(tmp_path: Path, config: Any, like: Any, wanted: Any) -> None:
    found = schedule_of(folder(tmp_path, EULER, **config), like)
    assert Schedule(**found) == Schedule(**wanted)


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ({"prediction_type": "v_prediction"}, {"prediction": "v"}),
        ({"prediction_type": "sample"}, {"prediction": "sample"}),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
         {"betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        ({"timestep_spacing": "trailing"}, {"spacing": "trailing"}),
        ({"num_train_timesteps": 400}, {"train_steps": 400}),
        ({"steps_offset": 1, "set_alpha_to_one": False}, {"steps_offset": 1, "set_alpha_to_one": False}),
        ({}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_the_facts_of_a_diffusion(tmp_path: Path, config: Any, changed: Any) -> None:
    """What is not said is diffusers' default, but for the grid, which stays that of the card."""
    found = schedule_of(folder(tmp_path, "DDIMScheduler", clip_sample=False, **config), DIT)
    assert Schedule(**found) == Schedule(**{**DIT, **changed})


def test_the_variance_is_one_that_ddpm_says(tmp_path: Path) -> None:
    found = schedule_of(folder(tmp_path, "DDPMScheduler", clip_sample=False, variance_type="fixed_large"), DIT)
    assert found["variance"] == "fixed_large"


@pytest.mark.parametrize("shift", [1.0, 2.3, 6.0])
def test_the_flow_grid_is_that_of_the_folders_own_scheduler(tmp_path: Path, shift: float) -> None:
    place, theirs = saved(tmp_path, EULER, shift=shift)
    theirs.set_timesteps(9)
    ours = flow_path(Schedule(**schedule_of(place, SD3)), 9).here.sigma
    np.testing.assert_allclose(ours, theirs.sigmas.numpy()[:-1], rtol=2e-6)
    wrong = flow_path(Schedule(**{**SD3, "shift": shift + 0.5}), 9).here.sigma
    assert np.abs(wrong - theirs.sigmas.numpy()[:-1]).max() > 1e-2


def test_the_dynamic_grid_is_that_of_the_folders_own_scheduler(tmp_path: Path) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    line = {"base_image_seq_len": 128, "max_image_seq_len": 2048, "base_shift": 0.3, "max_shift": 0.9}
    place, theirs = saved(tmp_path, EULER, use_dynamic_shifting=True, **line)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 9, 9), mu=calculate_shift(1024, *line.values()))
    found = Schedule(**schedule_of(place, FLUX))
    np.testing.assert_allclose(flow_path(at_size(found, 1024), 9).here.sigma, theirs.sigmas.numpy()[:-1], rtol=2e-6)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_the_diffusion_grid_is_that_of_the_folders_own_scheduler(tmp_path: Path, spacing: str) -> None:
    facts = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    place, theirs = saved(tmp_path, "EulerDiscreteScheduler", timestep_spacing=spacing, **facts)
    found = Schedule(**schedule_of(place, DIT))
    np.testing.assert_allclose(alpha_bar(found), theirs.alphas_cumprod.numpy(), rtol=2e-5)
    theirs.set_timesteps(9)
    wanted = theirs.sigmas.numpy()[:-1]
    np.testing.assert_allclose(exploding_path(found, 9).here.sigma, wanted, rtol=2e-4)
    wrong = exploding_path(Schedule(**{**DIT, "spacing": spacing}), 9).here.sigma
    assert np.abs(wrong / wanted - 1).max() > 2e-2, "the card's own betas"
    (tmp_path / "ddim").mkdir()
    place, theirs = saved(tmp_path / "ddim", "DDIMScheduler", clip_sample=False, timestep_spacing=spacing, **facts)
    theirs.set_timesteps(9)
    if spacing != "linspace":  # where diffusers' offset has no effect, and ours neither
        assert ddim_path(Schedule(**schedule_of(place, DIT)), 9).here.t.tolist() == theirs.timesteps.tolist()


def test_a_multistep_of_flow(tmp_path: Path) -> None:
    config = {"use_flow_sigmas": True, "flow_shift": 2.0, "prediction_type": "flow_prediction"}
    found = schedule_of(folder(tmp_path, "DPMSolverMultistepScheduler", **config), SD3)
    assert Schedule(**found) == Schedule(**{**SD3, "shift": 2.0})


REFUSED = [
    ("EulerDiscreteScheduler", DIT, {"use_karras_sigmas": True}, "use_karras_sigmas is true"),
    ("EulerDiscreteScheduler", DIT, {"use_exponential_sigmas": True}, "use_exponential_sigmas is true"),
    ("EulerDiscreteScheduler", DIT, {"use_beta_sigmas": True}, "use_beta_sigmas is true"),
    ("EulerDiscreteScheduler", DIT, {"final_sigmas_type": "sigma_min"}, 'final_sigmas_type is "sigma_min"'),
    ("EulerDiscreteScheduler", DIT, {"sigma_max": 80.0}, "sigma_max is 80.0"),
    ("EulerDiscreteScheduler", DIT, {"timestep_type": "continuous"}, 'timestep_type is "continuous"'),
    ("EulerDiscreteScheduler", DIT, {"interpolation_type": "log_linear"}, 'interpolation_type is "log_linear"'),
    ("EulerDiscreteScheduler", DIT, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is true"),
    ("EulerDiscreteScheduler", DIT, {"trained_betas": [0.1, 0.2]}, "trained_betas is"),
    ("EulerDiscreteScheduler", DIT, {"beta_schedule": "squaredcos_cap_v2"}, 'beta_schedule is "squaredcos_cap_v2"'),
    ("EulerDiscreteScheduler", DIT, {"prediction_type": "trigflow"}, 'prediction_type is "trigflow"'),
    ("DDPMScheduler", DIT, {"clip_sample": False, "variance_type": "learned"}, 'variance_type is "learned"'),
    ("DDIMScheduler", DIT, {}, "clip_sample is true"),
    ("DPMSolverMultistepScheduler", DIT, {"use_lu_lambdas": True}, "use_lu_lambdas is true"),
    ("DPMSolverMultistepScheduler", DIT, {"lambda_min_clipped": -5.1}, "lambda_min_clipped is -5.1"),
    (EULER, SD3, {"use_karras_sigmas": True}, "use_karras_sigmas is true"),
    (EULER, SD3, {"shift_terminal": 0.02}, "shift_terminal is 0.02"),
    (EULER, SD3, {"invert_sigmas": True}, "invert_sigmas is true"),
    (EULER, SD3, {"stochastic_sampling": True}, "stochastic_sampling is true"),
    (EULER, SD3, {"use_dynamic_shifting": True, "time_shift_type": "linear"}, 'time_shift_type is "linear"'),
    (EULER, SD3, {"of_tomorrow": 3}, "of_tomorrow is 3"),
    (EULER, DIT, {"shift": 1.0}, "is for a flow model"),
    ("DPMSolverMultistepScheduler", SD3, {"use_flow_sigmas": True}, 'prediction_type is "epsilon", which no flow has'),
    ("DDIMScheduler", SD3, {"clip_sample": False}, "is for a diffusion model"),
    ("LCMScheduler", DIT, {}, "LCMScheduler is a scheduler that no card"),
]


@pytest.mark.parametrize(("name", "like", "config", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_no_table_holds_is_refused_by_its_name(
    tmp_path: Path, name: str, like: Any, config: Any, reason: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        schedule_of(folder(tmp_path, name, **config), like)
    assert reason in caught.value.message
    assert caught.value.message.startswith(f"{tmp_path / 'scheduler' / 'scheduler_config.json'}: ")


@pytest.mark.parametrize("name", [*FLOW, *DIFFUSION])
def test_every_key_of_diffusers_schedulers_is_known(tmp_path: Path, name: str) -> None:
    """As diffusers writes them with nothing changed, they are taken: no key of theirs is a stranger."""
    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "from_config"):
        pytest.fail(f"diffusers has no {name}")
    asked = inspect.signature(kind.__init__).parameters
    config = {key: value.default for key, value in asked.items() if value.default is not inspect.Parameter.empty}
    config |= {"clip_sample": False} if "clip_sample" in config else {}
    assert Schedule(**schedule_of(folder(tmp_path, name, **config), SD3 if name in FLOW else DIT))


def test_a_folder_that_says_nothing_is_like_its_card(tmp_path: Path) -> None:
    assert schedule_of(tmp_path, SD3) == SD3


def test_what_changed_in_words() -> None:
    assert changes(Schedule(**SD3), {**SD3, "shift": 1.0}) == ["shift is 1.0, not 3.0"]
    assert changes(Schedule(**SD3), SD3) == []
