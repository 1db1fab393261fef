"""The DiT's embedders, shared by all blocks, against diffusers' network with a copy in each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from app.cards.cards import read_card
from app.cards.folder import Part
from app.checkpoints.tensors import read_outline
from app.errors import CheckpointError
from app.families import DiT
from app.families.components import blank_network, fill_network
from app.families.dit import SharedEmbedder, predict
from app.pool.memory import Component
from tests.families.plain import CPU, build_component, load
from tests.parts.close import EXACT, FORWARD, apart, close
from tests.parts.tiny import write_dit

LABELS = torch.tensor([0, 999, 1000, 17])
TIMES = torch.tensor([999.0, 0.0, 441.5, 857.14])
EMBEDDER = ".norm1.emb."


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn((4, 4, 8, 8), generator=torch.Generator().manual_seed(seed))


def weights(folder: Path) -> Path:
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dit(tmp_path, classes=10, num_layers=3)
    return tmp_path


def test_a_forward_is_that_of_the_network_with_copies(checkpoints: Path, dit: DiT) -> None:
    theirs = DiTTransformer2DModel.from_pretrained(checkpoints / "dit" / "transformer").eval()
    assert len({id(block.norm1.emb) for block in theirs.transformer_blocks}) == len(theirs.transformer_blocks) > 1
    for seed in range(2):  # the second of the same shapes finds nothing of the first
        x, t, labels = latents(seed), TIMES.roll(seed), LABELS.roll(seed)
        with torch.inference_mode():
            out, frac = dit.denoise(x, t, {"label": labels})
            whole = theirs(x, timestep=t, class_labels=labels).sample
        close(out, whole[:, :4], FORWARD)
        apart(out, whole[:, :4].roll(1, 0), FORWARD, of="another row:")
        assert frac is not None
        close(frac, (whole[:, 4:] + 1) / 2, FORWARD)


def test_it_embeds_once_a_forward(dit: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    embedder = dit.network.transformer_blocks[0].norm1.emb
    first = embedder.timestep_embedder.register_forward_hook(lambda *_: asked.append(1))
    with torch.inference_mode():
        dit.denoise(latents(), TIMES, {"label": LABELS})
    first.remove()
    assert len(asked) == 1
    assert all(block.norm1.emb is embedder for block in dit.network.transformer_blocks)
    assert isinstance(embedder, SharedEmbedder)


def test_its_memory_and_parameters_are_the_shared_ones(folder: Path) -> None:
    part = Part("transformer", "DiTTransformer2DModel", folder / "transformer")
    one = Component(part, CPU, torch.float32)
    theirs = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    copied = sum(p.numel() for p in theirs.transformer_blocks[0].norm1.emb.parameters()) * 2
    shared = 4 * (sum(p.numel() for p in theirs.parameters()) - copied)
    assert one.bytes == shared + 4 * theirs.pos_embed.pos_embed.numel()
    one.arrive()
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in one.value.state_dict().values()}
    assert sum(kept.values()) == shared
    assert set(one.value.state_dict()) == set(theirs.state_dict())
    one.leave()
    assert all(tensor.is_meta for tensor in one.value.parameters())


def rewritten(folder: Path, change: Any) -> dict[str, torch.Tensor]:
    """The network's file with `change` made to its tensors by name."""
    state = load_file(weights(folder))
    change(state)
    save_file(state, weights(folder))
    return state


def build(folder: Path) -> Any:
    return build_component("DiTTransformer2DModel", folder / "transformer", load_file(weights(folder)), torch.float32)


@pytest.mark.parametrize("name", ["timestep_embedder.linear_1.bias", "class_embedder.embedding_table.weight"])
def test_copies_that_differ_are_refused_by_the_name_of_the_first(folder: Path, name: str) -> None:
    def differ(state: dict[str, torch.Tensor]) -> None:
        for block in (1, 2):
            state[f"transformer_blocks.{block}{EMBEDDER}{name}"][-1] += 1e-6

    rewritten(folder, differ)
    with pytest.raises(CheckpointError, match=rf"transformer_blocks\.1\.norm1\.emb\.{name} is not equal to"):
        build(folder)


def test_a_network_that_learned_with_an_embedder_in_each_block_is_built_so(folder: Path) -> None:
    def differ(state: dict[str, torch.Tensor]) -> None:
        for key in state:
            if EMBEDDER in key:
                state[key] += 0.1 * torch.randn(state[key].shape, generator=torch.Generator().manual_seed(len(key)))
                state[key] *= int(key.split(".")[1]) + 1

    rewritten(folder, differ)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shared_embedders": False}))
    theirs = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval().double()
    ours = build(folder).double()
    x, labels = latents().double(), torch.tensor([0, 9, 10, 3])
    with torch.inference_mode():
        whole = theirs(x, timestep=TIMES, class_labels=labels).sample
        close(predict(ours, x, TIMES, labels), whole, EXACT)
        apart(predict(ours, x, TIMES, labels.roll(1)), whole, FORWARD, of="other classes:")
    part = Component(Part("transformer", "DiTTransformer2DModel", folder / "transformer"), CPU, torch.float32)
    assert part.bytes == 4 * (sum(p.numel() for p in theirs.parameters()) + theirs.pos_embed.pos_embed.numel())
    later = [key for key in load_file(weights(folder)) if EMBEDDER in key and ".0." not in key[:21]]
    rewritten(folder, lambda state: [state.pop(key) for key in later])
    with pytest.raises(CheckpointError, match="missing weights"):
        build(folder)


def test_copies_of_another_shape_or_format_are_refused(folder: Path) -> None:
    key = f"transformer_blocks.2{EMBEDDER}timestep_embedder.linear_2.bias"
    whole = load_file(weights(folder))
    for wrong in (whole[key][:-1].clone(), whole[key].half()):
        rewritten(folder, lambda state, wrong=wrong: state.update({key: wrong}))
        with pytest.raises(CheckpointError, match=r"transformer_blocks\.2.*is not equal to"):
            blank_network("DiTTransformer2DModel", folder / "transformer", read_outline(folder / "transformer"))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_copies_in_two_shards_are_compared(folder: Path, order: tuple[int, int]) -> None:
    state = load_file(weights(folder))
    late = [key for key in state if key.startswith(("transformer_blocks.1.", "transformer_blocks.2."))]
    shards = [{key: value for key, value in state.items() if (key in late) == bool(number)} for number in (0, 1)]

    def fill() -> Any:
        network = blank_network("DiTTransformer2DModel", folder / "transformer", state)
        split = (shards[number] for number in order)
        fill_network(network, folder, split, CPU, torch.float32)
        return network

    whole = build(folder).state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in fill().state_dict().items())
    for block in (1, 2):
        shards[1][f"transformer_blocks.{block}{EMBEDDER}class_embedder.embedding_table.weight"] += 1.0
    with pytest.raises(CheckpointError, match=r"class_embedder\.embedding_table\.weight"):
        fill()


def test_a_file_with_the_first_copy_alone_is_the_same_network(folder: Path) -> None:
    whole = build(folder)
    later = [key for key in load_file(weights(folder)) if EMBEDDER in key and ".0." not in key[:21]]

    def drop(state: dict[str, torch.Tensor]) -> None:
        for key in later:
            del state[key]

    state = rewritten(folder, drop)
    assert len(later) == 10 and sum(EMBEDDER in key for key in state) == 5
    alone = build(folder)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(alone.state_dict()[key], tensor)
    rewritten(folder, lambda state: state.pop(f"transformer_blocks.0{EMBEDDER}timestep_embedder.linear_1.bias"))
    with pytest.raises(CheckpointError, match=r"missing weights: transformer_blocks\.0\.norm1\.emb\.timestep"):
        build(folder)


def test_a_copy_of_a_block_that_is_not_there_is_unexpected(folder: Path) -> None:
    def add(state: dict[str, torch.Tensor]) -> None:
        key = f"{EMBEDDER}timestep_embedder.linear_1.bias"
        state[f"transformer_blocks.3{key}"] = state[f"transformer_blocks.0{key}"].clone()

    rewritten(folder, add)
    with pytest.raises(CheckpointError, match=r"unexpected weights: transformer_blocks\.3"):
        build(folder)


def test_in_half_precision_too(checkpoints: Path) -> None:
    ours = load(checkpoints / "dit", torch.bfloat16)
    theirs = DiTTransformer2DModel.from_pretrained(checkpoints / "dit" / "transformer", torch_dtype=torch.bfloat16)
    with torch.inference_mode():
        out, _ = ours.denoise(latents(), TIMES, {"label": LABELS})
        whole = theirs.eval()(latents().bfloat16(), timestep=TIMES, class_labels=LABELS).sample.float()
    assert torch.equal(out, whole[:, :4]) and read_card(checkpoints / "dit" / "card.toml").id
