"""Adapters are added at run time, and that equals weights into which they were merged."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from app.cards.cards import read_cards
from app.checkpoints.parts import build_family, build_parts
from app.families.adapters import Adapted, LoRA, Pairs, Used, lay_out, spans_of, spans_of_all
from app.families.base import Family
from app.families.compiling import compile_blocks

CPU, PASSES = torch.device("cpu"), 6


@pytest.fixture(scope="module", params=["tiny-sd3", "tiny-dit", "dev"])
def family(tiny: Path, fluxes: Path, request: pytest.FixtureRequest) -> Family:
    cards = read_cards(fluxes if request.param == "dev" else tiny)
    card = next(card for card in cards.values() if card.folder.name == request.param)
    return build_family(card, build_parts(card, cards, CPU, torch.float32), CPU, torch.float32)


def pairs_of(network: nn.Module, seed: int, rank: int) -> Pairs:
    """For every linear layer of the blocks; some of q, k and v have one `down`."""
    dice, found = torch.Generator().manual_seed(seed), {}
    for number, (name, one) in enumerate(network.named_modules()):
        if isinstance(one, nn.Linear) and "blocks" in name:
            last = list(found.values())[-1:]
            down = torch.randn(rank, one.in_features, generator=dice) * 0.1
            if last and number % 2 and name.endswith(("to_k", "to_v")):
                down = last[0][0]
            found["transformer", name] = down, torch.randn(one.out_features, rank, generator=dice) * 0.1
    return found


def lora_of(network: nn.Module, pairs: Pairs) -> LoRA:
    made = LoRA(pairs, {"transformer": network})
    made.load_state_dict(lay_out(pairs)[0], assign=True)
    return made


def out(family: Family, passes: slice = slice(None)) -> torch.Tensor:
    dice = torch.Generator().manual_seed(5)
    x = torch.randn(PASSES, *family.latent_shape(*family.card.default_size), generator=dice)
    conditions = {
        name: torch.randn(PASSES, *one.shape[1:], generator=dice) if one.is_floating_point() else one.repeat(PASSES)
        for name, one in family.blank(24).items()
    }
    own = {name: one[passes] for name, one in conditions.items()}
    with torch.inference_mode():
        return family.denoise(x[passes], torch.linspace(100, 900, PASSES)[passes], own)[0]


def merged(family: Family, pairs: Mapping[float, Pairs], passes: slice) -> torch.Tensor:
    """The output of a network whose weights have grown by weight * up @ down."""
    network = deepcopy(family.network)
    for weight, one in pairs.items():
        for (_, name), (down, up) in one.items():
            network.get_submodule(name).weight.data += weight * up @ down
    other = deepcopy(family)
    other.network = network
    return out(other, passes)


@pytest.mark.parametrize("apart", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_passes_with_different_adapters_equal_merged_weights(family: Family, apart: bool) -> None:
    first, second = (pairs_of(family.network, seed, rank) for seed, rank in ((1, 4), (2, 7)))
    one, two = lora_of(family.network, first), lora_of(family.network, second)
    used: list[Used] = [(), ((one, 0.8),), ((one, -1.5),), ((one, 0.8), (two, 0.5)), ((two, 0.5),), ()]
    plain = out(family)
    with Adapted(family.network, spans_of(used, CPU, apart)):
        mixed = out(family)
    assert torch.equal(out(family), plain), "nothing of it stays"
    every = {one: first, two: second}
    for index, adapters in enumerate(used):
        alone = slice(index, index + 1)
        expected = merged(family, {weight: every[lora] for lora, weight in adapters}, alone)
        assert (mixed[alone] - expected).abs().max() < 1e-4, index
        assert not adapters or (mixed[alone] - plain[alone]).abs().max() > 0.02, index


def test_all_passes_may_have_the_same_adapters(family: Family) -> None:
    pairs = pairs_of(family.network, 3, 5)
    with Adapted(family.network, spans_of_all(((lora_of(family.network, pairs), 0.7),), CPU)):
        found = out(family)
    assert (found - merged(family, {0.7: pairs}, slice(None))).abs().max() < 1e-4
    assert (found - merged(family, {0.75: pairs}, slice(None))).abs().max() > 1e-3


def test_modules_with_one_input_share_a_product(family: Family) -> None:
    pairs = pairs_of(family.network, 4, 3)
    tensors, places = lay_out(pairs)
    shared = [place for (_, name), place in places.items() if name.endswith(("to_q", "to_k", "to_v"))]
    assert len({place.down for place in shared}) * 3 == len(shared) > 0
    for key, place in places.items():
        assert torch.equal(tensors[place.down][place.columns], pairs[key][0]), key
    rows = sum(len(tensors[name]) for name in {place.down for place in shared})
    assert rows < 3 * len(shared), "those with one `down` have it once"


@pytest.mark.slow
def test_compiled_blocks_run_as_written_with_adapters(tiny: Path) -> None:
    cards = read_cards(tiny)
    card = cards["tiny-sd3"]
    family = build_family(card, build_parts(card, cards, CPU, torch.float32), CPU, torch.float32)
    pairs = pairs_of(family.network, 6, 4)
    expected = merged(family, {1.0: pairs}, slice(None))
    compile_blocks(family.network, backend="eager")
    out(family)
    with Adapted(family.network, spans_of_all(((lora_of(family.network, pairs), 1.0),), CPU)):
        assert (out(family) - expected).abs().max() < 1e-4
