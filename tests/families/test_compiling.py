"""Compiled blocks against the blocks as they are written: the same outputs at every width, with skip layers or without.

The compiler itself runs for one network, because it takes half a minute; for the others, all that comes before it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.cards.card import SkipLayers
from app.cards.cards import read_card
from app.engine.costs import Costs
from app.engine.row import default_key
from app.errors import SettingsError
from app.families import DiT
from app.families.base import Family
from app.families.compiling import allow_compiling, compile_blocks
from app.pool.pool import Pool
from app.request import ClassLabel
from app.samplers.schedule import Schedule
from app.settings import Settings
from tests.families.plain import ask, load, serve
from tests.parts.close import FORWARD, SAME, apart, close, furthest
from tests.parts.engine import load_all

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is compiled goes here, and nothing compiled is left for other tests."""
    folder, before = tmp_path_factory.mktemp("cache"), torch._dynamo.config.recompile_limit
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "as torch has set it"))
        allow_compiling(folder)
        yield folder
    torch._dynamo.config.recompile_limit = before
    torch.compiler.reset()


def twin(family: Family, backend: str = "eager") -> Family:
    """The same weights, compiled."""
    compiled = copy.copy(family)
    compiled.network = copy.deepcopy(family.network)
    compile_blocks(compiled.network, backend)
    return compiled


def outputs(family: Family, passes: int, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
    dice = torch.Generator().manual_seed(passes)
    x = torch.randn(passes, *family.latent_shape(*family.card.default_size), generator=dice)
    with torch.inference_mode():
        return family.denoise(x, torch.linspace(10, 990, passes), conditions)[0]


def held_equal(plain: Family, compiled: Family, passes: int, **more: torch.Tensor) -> None:
    dice = torch.Generator().manual_seed(0)
    conditions = {
        name: value.expand(passes, *value.shape[1:])
        if value.dtype == torch.int64
        else torch.randn(passes, *value.shape[1:], generator=dice)
        for name, value in plain.blank(plain.card.text_length).items()
    } | more
    wanted, got = (outputs(family, passes, conditions) for family in (plain, compiled))
    assert not torch.equal(wanted, torch.zeros_like(wanted))
    close(got, wanted, FORWARD, furthest)
    if passes > 1:
        apart(got.roll(1, 0), wanted, FORWARD, furthest, of="another row:")


def test_sd3_at_every_width_and_with_skip_layers(checkpoints: Path) -> None:
    plain = load(checkpoints / "sd35", skip_layer_guidance=SkipLayers(layers=(1,)))
    compiled = twin(plain)
    for passes in (2, 1, 3):
        held_equal(plain, compiled, passes)
    assert all(block._compiled_call_impl is not None for block in compiled.network.transformer_blocks)
    assert all(block._compiled_call_impl is None for block in plain.network.transformer_blocks)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    held_equal(plain, compiled, 3, skip=torch.tensor([False, True, False]))
    assert graphs["unique_graphs"] == before > 0, "skip layers were compiled in the midst of serving"


def test_flux_at_every_width(fluxes: Path) -> None:
    dev = load(fluxes / "dev")
    compiled = twin(dev)
    for passes in (2, 3):
        held_equal(dev, compiled, passes, guidance=torch.linspace(1, 5, passes))
    assert all(block._compiled_call_impl is not None for block in compiled.network.single_transformer_blocks)


def test_a_unet_at_every_width(unets: Path) -> None:
    plain = load(unets / "tiny-sd15")
    compiled = twin(plain)
    for passes in (2, 3):
        held_equal(plain, compiled, passes)
    blocks = [*compiled.network.down_blocks, *compiled.network.up_blocks]
    assert len(blocks) == 6 and all(block._compiled_call_impl is not None for block in blocks)


def test_served_pictures_of_cards_that_share_a_compiled_network(checkpoints: Path, cache: Path) -> None:
    card = read_card(checkpoints / "dit" / "card.toml").model_copy(update={"id": "dit"})
    other = card.model_copy(update={"id": "other", "schedule": Schedule(kind="diffusion", betas="scaled_linear")})
    requests = [ask(name, ClassLabel(3), steps=2, guidance=4.0, sampler="ddim", name=name) for name in ("dit", "other")]
    results = []
    for compiled in (False, True):
        pool = load_all(Pool({"dit": card, "other": other}, "cpu", torch.float32, compiled=compiled))
        results.append(serve(pool, *requests))
        pool.close()
    for wanted, got in zip(*results, strict=True):
        assert wanted.latents is not None and got.latents is not None
        close(got.latents, wanted.latents, SAME, furthest)
    apart(results[1][1].latents, results[0][0].latents, SAME, furthest, of="the other card:")
    assert any((cache / "compiled").rglob("*.so")), "nothing was compiled into the cache folder"


def test_a_compiled_key_is_measured_anew_and_not_kept(dit: DiT, tmp_path: Path) -> None:
    key = default_key(dit.card)
    for _ in range(2):
        costs = Costs(tmp_path, budget=0.01, compiled=True)
        assert costs.stored(dit, key) is None
        with torch.inference_mode():
            while key not in costs.caps:
                costs.measure(dit, key)
        assert costs.stored(dit, key)
    assert not list(tmp_path.rglob("*.json"))


def test_no_compiler_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SettingsError, match="no C\\+\\+ compiler") as raised:
        allow_compiling(tmp_path)
    assert raised.value.param == "compile"


def test_a_folder_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    (tmp_path / "compiled").touch()
    allow_compiling(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
    (line,) = caplog.messages
    assert f"{tmp_path}/compiled cannot be written (File exists)" in line


def test_the_setting_is_off_unless_asked() -> None:
    assert Settings().compile is False
