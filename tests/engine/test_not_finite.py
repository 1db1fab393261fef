"""Numbers that are not finite, wherever they come from: that image is an error, its neighbours are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from app.pool.pool import Pool
from app.report import Preview
from app.request import ImageSpec, Prompt, Request
from tests.families.plain import ask
from tests.parts.engine import Bench
from tests.parts.requests import changed

NAN = float("nan")


def draw(name: str, seed: int = 1, text: str = "red", steps: int = 3, guidance: float = 0.0) -> Request:
    return ask("tiny-sd3", Prompt(text), steps=steps, guidance=guidance, sampler="flow_euler", name=name, seed=seed)


@contextmanager
def spoiled(parameter: torch.Tensor, value: float, place: Any = ...) -> Iterator[None]:
    """A weight that is not finite, for a while."""
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter[place] = value
    yield
    with torch.no_grad():
        parameter.copy_(kept)


@contextmanager
def one_latent_breaks_the_decoder(vae: Any, latent: np.ndarray, value: float) -> Iterator[None]:
    """The decoder gives `value` somewhere in the picture of this latent alone."""
    z = torch.from_numpy(latent) / vae.config.scaling_factor + vae.config.shift_factor

    def spoil(module: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        for place, row in enumerate(vae_inputs[0]):
            if torch.allclose(row, z, atol=1e-3):
                output[place, 0, 3, 3] = value
        return output

    vae_inputs: list[torch.Tensor] = []
    hooks = [
        vae.post_quant_conv.register_forward_pre_hook(lambda module, inputs: vae_inputs.insert(0, inputs[0])),
        vae.decoder.register_forward_hook(spoil),
    ]
    yield
    for hook in hooks:
        hook.remove()


@pytest.fixture
def family(tiny_pool: Pool) -> Any:
    return tiny_pool.family("tiny-sd3")


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_picture_that_decodes_to_no_numbers_fails_alone(
    tiny_pool: Pool, family: Any, value: float, deterministic: bool
) -> None:
    """Five that are decoded together, the third of them bad: the others are the pictures that they are without it."""
    requests = [draw(f"r{seed}", seed) for seed in range(5)]
    right = Bench(tiny_pool, deterministic=deterministic).run(requests).results
    bad = right["r2", 0].latents
    assert bad is not None
    with one_latent_breaks_the_decoder(family.vae, bad, value):
        bench = Bench(tiny_pool, deterministic=deterministic).run(requests)
    assert [(name, each.error.code) for name, each in bench.failures.items()] == [("r2", "non_finite_output")]
    assert {name for name, _ in bench.results} == {"r0", "r1", "r3", "r4"}
    for key, result in bench.results.items():
        assert (np.abs(result.pixels.astype(int) - right[key].pixels).max() <= 1) and result.pixels.std() > 1
        assert not deterministic or (result.pixels == right[key].pixels).all()


def test_a_request_with_one_bad_image_is_one_error(tiny_pool: Pool, family: Any) -> None:
    """A request is answered as a whole; the request beside it is drawn."""
    images = tuple(ImageSpec(Prompt("red"), seed) for seed in range(3))
    three, beside = replace(draw("three"), images=images), draw("beside", 9)
    right = Bench(tiny_pool).run([three, beside]).results
    bad = right["three", 1].latents
    assert bad is not None
    with one_latent_breaks_the_decoder(family.vae, bad, NAN):
        bench = Bench(tiny_pool).run([three, beside])
    assert bench.failures["three"].error.code == "non_finite_output"
    assert ("beside", 0) in bench.results


WEIGHTS: dict[str, Callable[[Any], tuple[torch.Tensor, Any]]] = {
    "decoder": lambda family: (family.vae.decoder.conv_in.bias, 0),
    "network": lambda family: (family.network.proj_out.bias, 0),
    "text encoder": lambda family: (family.t5.network.encoder.final_layer_norm.weight, 0),
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("part", WEIGHTS)
def test_a_weight_that_is_not_finite_is_an_error_never_a_picture(
    tiny_pool: Pool, family: Any, part: str, steps: int
) -> None:
    """Of each part, found also where the first step is the last."""
    parameter, place = WEIGHTS[part](family)
    with spoiled(parameter, NAN, place):
        bench = Bench(tiny_pool).run([draw("bad", steps=steps, guidance=4.0), draw("two", steps=steps)])
    assert not bench.results and {each.error.code for each in bench.failures.values()} == {"non_finite_output"}


@pytest.mark.parametrize("negative", [False, True])
def test_a_word_that_is_not_finite_fails_the_prompts_that_have_it(tiny_pool: Pool, family: Any, negative: bool) -> None:
    """Prompts that are encoded together, one with the bad word, in itself or in what guidance moves away from."""
    (word,) = family.t5.tokenizer("blue", add_special_tokens=False).input_ids[:1]
    bad = Prompt("red", "blue") if negative else Prompt("blue")
    requests = [
        draw("fine", guidance=4.0),
        ask("tiny-sd3", bad, steps=3, guidance=4.0, sampler="flow_euler", name="bad"),
    ]
    with spoiled(family.t5.network.shared.weight, NAN, word):
        bench = Bench(tiny_pool).run(requests)
    assert bench.failures["bad"].error.code == "non_finite_output"
    assert [name for name, _ in bench.results] == ["fine"] and bench.results["fine", 0].pixels.std() > 1


@pytest.mark.parametrize("between", [False, True])
def test_the_last_step_is_watched_too(tiny_pool: Pool, family: Any, between: bool) -> None:
    """Fine until its last forward: a row is found one step late, and there is no later step.

    between: what comes next is the measurement of another size.
    """
    calls = 0

    def spoil(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output * NAN if calls == 3 else output

    hook = family.network.proj_out.register_forward_hook(spoil)
    bench = Bench(tiny_pool)
    bench.engine.submit(draw("late", steps=3))
    while calls < 3:
        bench.engine.tick()
    hook.remove()
    bench.run([changed(draw("large"), width=48)] if between else [])
    error = bench.failures["late"].error
    assert error.code == "non_finite_output" and "the network gave" in error.message, "told before the decoder sees it"
    assert list(bench.results) == [("large", 0)] * between


def test_a_preview_that_is_not_finite_is_left_out(
    tiny_pool: Pool, family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image goes on where it can: a map fitted to a broken encoder says nothing of the decoder."""
    request = changed(draw("seen", steps=4), previews=3)
    assert len(Bench(tiny_pool).run([request]).of(Preview)) == 3
    preview = type(family).preview
    monkeypatch.setattr(type(family), "preview", lambda self, latents: preview(self, latents * NAN))
    bench = Bench(tiny_pool).run([request])
    assert not bench.of(Preview) and ("seen", 0) in bench.results
