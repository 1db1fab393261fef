"""Contents: parts whose weights are in a file in the authors' own layout, from the card to the network."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.cards.card import Card
from app.cards.cards import read_card, read_cards
from app.cards.folder import Part
from app.checkpoints.parts import build_parts, part_identity, part_outline, part_stamp, part_states, read_parts
from app.errors import CheckpointError
from app.pool import memory
from app.pool.pool import Pool
from tests.families.plain_shapes import drawn, flux_shapes
from tests.parts import originals
from tests.parts.tiny import write_flux, write_sd3
from tests.pool.test_pool import load

CPU = torch.device("cpu")
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """own: an SD3 as diffusers lays it out. one: the same weights in one file, and its configs. two: that file again,
    by its full name, in a card with the configs of another writer."""
    folder = tmp_path_factory.mktemp("models")
    write_sd3(folder / "own", name="own", qk_norm="rms_norm", dual_attention_layers=(0,))
    state = originals.sd3_file(folder / "own", "text_encoder", "text_encoder_2", "text_encoder_3")
    for name in ("one", "two"):
        shutil.copytree(folder / "own", folder / name)
        for file in (folder / name).glob("*/*.safetensors"):
            file.unlink()
    originals.write(state, folder / "one" / "sd3.safetensors")
    for part in PARTS:
        config = folder / "two" / part / "config.json"
        config.write_text(
            json.dumps({**json.loads(config.read_text()), "_diffusers_version": "9", "dtype": "bfloat16"})
        )
    name_files(folder / "one", "one", "sd3.safetensors")
    name_files(folder / "two", "two", str(folder / "one" / "sd3.safetensors"))
    return folder


def name_files(folder: Path, name: str, file: str, parts: tuple[str, ...] = PARTS) -> Card:
    card = (folder / "card.toml").read_text().replace('id = "own"', f'id = "{name}"')
    table = "".join(f'{part} = "{file}"\n' for part in parts)
    (folder / "card.toml").write_text(f"{card}\n[files]\n{table}")
    return read_card(folder / "card.toml")


def test_one_file_gives_the_weights_of_the_diffusers_layout(models: Path) -> None:
    cards = read_cards(models)
    own, one = (build_parts(cards[name], cards, CPU, torch.float32) for name in ("own", "one"))
    assert own.keys() == one.keys()
    for part in PARTS:
        theirs, ours = own[part].state_dict(), one[part].state_dict()
        assert theirs.keys() == ours.keys()
        if part == "text_encoder":
            assert torch.equal(ours.pop("text_projection.weight"), torch.eye(16)), "as the authors' code takes it"
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_cards_that_name_one_file_share_its_parts(models: Path) -> None:
    cards = read_cards(models)
    pool = Pool(cards, "cpu", torch.float32)
    one, two, own = load(pool, "one", "two", "own")
    assert one.network is two.network and one.vae is two.vae and one.t5[0] is two.t5[0]  # type: ignore[attr-defined]
    assert one.network is not own.network  # type: ignore[attr-defined]
    pool.close()


def test_the_identity_is_the_file_what_of_it_and_its_config(models: Path) -> None:
    found = {part.name: part for part in read_parts(read_card(models / "one" / "card.toml"), {}) if part.file}
    encoders = [part_identity(found[name]) for name in ("text_encoder", "text_encoder_2")]
    assert encoders[0] != encoders[1]
    other = Part(
        "text_encoder", "CLIPTextModelWithProjection", found["text_encoder_2"].folder, found["text_encoder"].file
    )
    assert part_identity(other) not in encoders, "another config is another network"


def test_a_part_shared_from_a_card_comes_from_that_cards_file(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "models")
    card = tmp_path / "models" / "own" / "card.toml"
    card.write_text(
        card.read_text().replace("components = {  }", 'components = { text_encoder_3 = "one/text_encoder_3" }')
    )
    cards = read_cards(tmp_path / "models")
    shared = {part.name: part for part in read_parts(cards["own"], cards)}["text_encoder_3"]
    assert shared.file == tmp_path / "models" / "one" / "sd3.safetensors"
    assert "shared.weight" in part_outline(shared)


@pytest.mark.parametrize("dev", [False, True], ids=["schnell", "dev"])
def test_flux_in_its_authors_file(dev: bool, tmp_path: Path) -> None:
    write_flux(
        tmp_path / "flux", dev=dev, num_layers=2, num_single_layers=1, attention_head_dim=16, axes_dims_rope=(4, 6, 6)
    )
    state = drawn(flux_shapes(32, 2, 1, guided=dev))
    save_file(state, tmp_path / "flux" / "flux1.safetensors")
    (tmp_path / "flux" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    card = name_files(tmp_path / "flux", "flux", "flux1.safetensors", ("transformer",))
    network = build_parts(card, {}, CPU, torch.float32)["transformer"]
    block = network.single_transformer_blocks[0]
    fused = torch.cat((block.attn.to_q.weight, block.attn.to_k.weight, block.attn.to_v.weight, block.proj_mlp.weight))
    assert torch.equal(fused, state["single_blocks.0.linear1.weight"])


def test_shards_whose_names_of_one_weight_differ_are_refused(tmp_path: Path) -> None:
    """T5's table stands under two names, here in two files, each of which is right alone."""
    write_sd3(tmp_path / "sd3")
    folder = tmp_path / "sd3" / "text_encoder_3"
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()

    def write(second: torch.Tensor) -> Part:
        save_file(whole, folder / "model-1.safetensors")
        save_file({"encoder.embed_tokens.weight": second}, folder / "model-2.safetensors")
        files = dict.fromkeys(whole, "model-1.safetensors") | {"encoder.embed_tokens.weight": "model-2.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        return Part("text_encoder_3", "T5EncoderModel", folder)

    def arrive(part: Part) -> Any:
        made = memory.Component(part, CPU, torch.float32)
        made.arrive()
        return made.value

    same = arrive(write(whole["shared.weight"].clone()))
    assert same.shared is same.encoder.embed_tokens and torch.equal(same.shared.weight, whole["shared.weight"])
    part = write(whole["shared.weight"] + 1)
    assert len(list(part_states(part))) == 2
    with pytest.raises(CheckpointError, match=r"second name of weights, and differs from the first"):
        arrive(part)


LIES: list[tuple[dict[str, str], str]] = [
    (
        {"transformer": "absent.safetensors"},
        r"absent\.safetensors: missing, though the card's files\.transformer names",
    ),
    ({"transformer": "sd3.pt"}, r"sd3\.pt: only safetensors are loaded \(.instep models convert. makes them"),
    ({"transformer": "sd3.ckpt"}, "only safetensors are loaded"),
    (
        {"image_encoder": "sd3.safetensors"},
        r"model_index\.json: image_encoder: missing, though the card's files name it",
    ),
]


@pytest.mark.parametrize(("files", "told"), LIES, ids=[next(iter(case[0].values())) for case in LIES])
def test_a_card_that_names_no_such_file(models: Path, files: dict[str, str], told: str) -> None:
    card = read_card(models / "one" / "card.toml").model_copy(update={"files": files})
    with pytest.raises(CheckpointError, match=told):
        read_parts(card, {})


@pytest.mark.parametrize("name", ["own", "one"])
def test_changed_files_have_another_stamp(models: Path, tmp_path: Path, name: str) -> None:
    """In a folder or in one file; also where a file of the same size and date takes another's place."""
    shutil.copytree(models / name, tmp_path / name)
    card = read_card(tmp_path / name / "card.toml")
    (part,) = [part for part in read_parts(card, {}) if part.name == "text_encoder_3"]
    (file,) = [part.weights] if part.weights.is_file() else part.weights.glob("*.safetensors")
    first, stat = part_stamp(part), file.stat()
    assert first and part_stamp(part) == first
    shutil.copy(file, tmp_path / "other")
    os.utime(tmp_path / "other", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(tmp_path / "other", file)
    assert part_stamp(part) != first and file.stat().st_mtime_ns == stat.st_mtime_ns
    file.unlink()
    assert part_stamp(part) != first


def test_what_came_from_files_that_changed_is_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when they change while they are read: what was kept of the weights before is not theirs."""
    write_sd3(tmp_path / "sd3")
    folder = tmp_path / "sd3" / "text_encoder_3"
    made = memory.Component(Part("text_encoder_3", "T5EncoderModel", folder), CPU, torch.float32)

    def arrive() -> int:
        made.arrive()
        made.leave()
        return made.version

    assert (arrive(), arrive()) == (1, 1)
    fill = memory.fill_network

    def filled_meanwhile(*given: Any) -> None:
        fill(*given)
        os.utime(folder / "model.safetensors", ns=(1, 1))

    with monkeypatch.context() as patch:
        patch.setattr(memory, "fill_network", filled_meanwhile)
        assert arrive() == 2
    assert arrive() == 2
