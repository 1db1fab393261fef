"""`instep models pull` of U-Nets: one variant of the weights, no other copies; repositories that are a U-Net alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from app.cards.files import weight_names
from app.checkpoints.tensors import read_outline
from app.errors import CheckpointError
from tests.parts.commands import Run, call, one_line
from tests.parts.hub import COMMIT, Hub
from tests.parts.tiny_unets import write_unet

COPIES = (
    *("unet/diffusion_flax_model.msgpack", "unet/model.onnx", "unet/openvino_model.bin", "unet/openvino_model.xml"),
    *("unet/diffusion_pytorch_model.bin", "vae_1_0/diffusion_pytorch_model.safetensors", "sd_xl_base_1.0.safetensors"),
    *("vae_decoder/model.onnx", "text_encoder/flax_model.msgpack", "text_encoder/openvino_model.bin"),
)
"""What the repository of SDXL has besides, in other formats."""

UNET, CLIP = "unet/diffusion_pytorch_model{}.safetensors", "text_encoder/model{}.safetensors"
PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def write_half(file: Path, shards: int = 1) -> None:
    """The float16 copy beside a file of weights, in one file or with an index of several, named as diffusers names."""
    state = {name: value.half().contiguous() for name, value in load_file(file).items()}
    if shards == 1:
        save_file(state, file.with_suffix(".fp16.safetensors"))
        return
    listed = {}
    for shard in range(shards):
        name = f"{file.stem}.fp16-{shard + 1:05}-of-{shards:05}.safetensors"
        own = dict(list(state.items())[shard::shards])
        save_file(own, file.parent / name)
        listed |= dict.fromkeys(own, name)
    index = {"metadata": {}, "weight_map": listed}
    (file.parent / f"{file.name}.index.fp16.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("unet")
    repo, folder = work / "hub" / "lab" / "xl", work / "models"
    write_unet(repo, "sdxl")
    for file in sorted(repo.rglob("*.safetensors")):
        write_half(file, shards=2 if file.parent.name == "text_encoder_2" else 1)
    for copy in COPIES:
        (repo / copy).parent.mkdir(exist_ok=True)
        (repo / copy).write_bytes(b"copy")
    write_unet(folder / "xl", "sdxl")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    (repo / "card.toml").unlink()
    card = folder / "xl" / "card.toml"
    card.write_text(card.read_text().replace('path = "."', 'repo = "lab/xl"') + 'variant = "fp16"\n')
    return work


@pytest.fixture
def models(written: Path, tmp_path: Path) -> Path:
    """A card of SDXL, of which the Hub has the files in both number formats and copies in others."""
    return Path(shutil.copytree(written, tmp_path, dirs_exist_ok=True)) / "models"


@pytest.fixture
def run(models: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line on these cards."""
    monkeypatch.setenv("INSTEP_MODELS", str(models))
    return call


def snapshot(models: Path, repo: str) -> Path:
    return models.parent / "home" / "hub" / f"models--lab--{repo}" / "snapshots" / COMMIT


def here(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix == ".safetensors"}


def draw(run: Run, model: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A picture, where nobody answers."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    drawn = run("generate", "red", "--model", model, "--steps", 2, "--seed", 1, "--out", models / f"{model}.png")
    assert drawn.exit_code == 0, drawn.output
    return np.asarray(Image.open(models / f"{model}.png"))


def test_the_variant_of_the_card_is_pulled_and_no_other_copy(models: Path, hub: Hub, pull: Run) -> None:
    result = pull("xl")
    assert result.exit_code == 0, result.output
    asked = {path for path, _, _ in hub.asked}
    assert not asked & set(COPIES) and not {UNET.format(""), CLIP.format("")} & asked
    clips = {f"text_encoder_2/model.fp16-0000{shard}-of-00002.safetensors" for shard in (1, 2)}
    vae = "vae/diffusion_pytorch_model.fp16.safetensors"
    assert here(snapshot(models, "xl")) == {UNET.format(".fp16"), CLIP.format(".fp16"), vae, *clips}
    assert "text_encoder_2/model.safetensors.index.fp16.json" in asked
    outline = read_outline(snapshot(models, "xl") / "text_encoder_2")
    whole = load_file(hub.root / "lab" / "xl" / "text_encoder_2" / "model.safetensors")
    assert {name: value.shape for name, value in outline.items()} == {k: v.shape for k, v in whole.items()}
    assert {value.dtype for value in outline.values()} == {torch.float16}


def test_without_a_variant_the_plain_files_are_pulled(models: Path, hub: Hub, pull: Run) -> None:
    card = models / "xl" / "card.toml"
    card.write_text(card.read_text().replace('variant = "fp16"\n', ""))
    assert pull("xl").exit_code == 0
    assert {path for path, _, _ in hub.stored} == here(snapshot(models, "xl"))
    assert not any(".fp16" in path for path in here(snapshot(models, "xl")))
    assert len(here(snapshot(models, "xl"))) == 4


@pytest.mark.parametrize(("card", "left"), [("fp16", ""), ("", ".fp16")], ids=["only plain", "only half"])
def test_the_variant_that_is_there_is_pulled(models: Path, hub: Hub, pull: Run, card: str, left: str) -> None:
    """As a community's copy may have, and whatever the card says first."""
    file = models / "xl" / "card.toml"
    file.write_text(file.read_text().replace('variant = "fp16"', f'variant = "{card}"'))
    (hub.root / "lab" / "xl" / UNET.format(".fp16" if not left else "")).unlink()
    assert pull("xl").exit_code == 0
    assert UNET.format(left) in here(snapshot(models, "xl"))


def test_plain_files_are_read_before_half_ones(tmp_path: Path) -> None:
    """Where another program has brought both: the order is one for reading and for downloads."""
    names = [name for pair in weight_names() for name in pair]
    assert names[0] == "diffusion_pytorch_model.safetensors.index.json" and len(names) == 8
    for name in ("model.fp16.safetensors", "model.safetensors"):
        save_file({"a": torch.ones(1, dtype=torch.float16 if "fp16" in name else torch.float32)}, tmp_path / name)
        assert read_outline(tmp_path)["a"].dtype == (torch.float16 if "fp16" in name else torch.float32)


@pytest.mark.parametrize("spoil", [b"{}", None])
def test_an_index_of_half_files_is_checked_like_others(models: Path, hub: Hub, pull: Run, spoil: bytes | None) -> None:
    part = hub.root / "lab" / "xl" / "text_encoder_2"
    if spoil is None:
        (part / "model.fp16-00002-of-00002.safetensors").unlink()
    else:
        (part / "model.safetensors.index.fp16.json").write_bytes(spoil)
    pull("xl")
    with pytest.raises(CheckpointError, match=r"missing, though the index names it|weight_map is not a table"):
        read_outline(snapshot(models, "xl") / "text_encoder_2")


@pytest.fixture
def tuned(models: Path) -> Path:
    """A repository with a U-Net alone, as mhdang/dpo-sdxl-text2image-v1 is, and its card: the rest is another's."""
    repo, folder = models.parent / "hub" / "lab" / "dpo", models / "dpo"
    write_unet(models.parent / "made", "sdxl", seed=90)
    shutil.copytree(models.parent / "made" / "unet", repo / "unet")
    (repo / "README.md").write_text("a U-Net")
    folder.mkdir()
    shutil.copyfile(models / "xl" / "model_index.json", folder / "model_index.json")
    shared = ", ".join(f'{part} = "xl/{part}"' for part in PARTS)
    text = (models / "xl" / "card.toml").read_text().replace('id = "xl"', 'id = "dpo"').replace("lab/xl", "lab/dpo")
    (folder / "card.toml").write_text(text.replace("components = {  }", f"components = {{ {shared} }}"))
    return folder


def test_a_repository_that_is_a_unet_alone(models: Path, hub: Hub, pull: Run, run: Run, tuned: Path) -> None:
    assert "dpo: not downloaded: run `instep models pull dpo`" in one_line(run("generate", "red", "--model", "dpo"))
    result = pull("dpo")
    assert result.exit_code == 0, result.output
    assert f"dpo: here, lab/dpo at {COMMIT}\n" in result.stdout and f"dpo: here, lab/xl at {COMMIT}\n" in result.stdout
    assert here(snapshot(models, "dpo")) == {UNET.format("")}
    assert not any(path.startswith("unet/") for path in here(snapshot(models, "xl"))), "which has another card's"
    states = {line.split()[0]: line.split()[1] for line in run("models", "check").stdout.splitlines()[1:]}
    assert states == {"dpo": "ok", "xl": "absent"}


@pytest.mark.slow
def test_it_draws_with_its_own_network_and_the_others_parts(
    models: Path, hub: Hub, pull: Run, run: Run, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as a card that takes `unet` from it, and as a folder with these parts in one place."""
    text = (models / "xl" / "card.toml").read_text().replace('id = "xl"', 'id = "other"')
    shutil.copytree(models / "xl", models / "other")
    (models / "other" / "card.toml").write_text(text.replace("components = {  }", 'components = { unet = "dpo/unet" }'))
    assert pull("dpo", "other", "xl").exit_code == 0
    whole = models / "whole"
    shutil.copytree(models.parent / "made", whole)
    for part in PARTS:
        shutil.rmtree(whole / part)
        shutil.copytree(snapshot(models, "xl") / part, whole / part)
    found = {name: draw(run, name, models, monkeypatch) for name in ("dpo", "other", "xl")}
    (whole / "card.toml").write_text((whole / "card.toml").read_text().replace('"made"', '"whole"'))
    found["whole"] = draw(run, "whole", models, monkeypatch)
    assert (found["dpo"] == found["whole"]).all() and (found["dpo"] == found["other"]).all()
    assert (found["dpo"] != found["xl"]).any()


def test_a_repository_without_the_parts_is_refused(models: Path, hub: Hub, pull: Run, tuned: Path) -> None:
    """A card that forgets to say where the VAE comes from, and a repository in another layout."""
    card = tuned / "card.toml"
    text = card.read_text()
    card.write_text(text.replace('vae = "xl/vae", ', ""))
    assert one_line(pull("dpo")) == "dpo: lab/dpo has no model_index.json: it is not in the diffusers layout"
    card.write_text(text)
    (tuned / "model_index.json").unlink()
    assert one_line(pull("dpo")) == "dpo: lab/dpo has no model_index.json: it is not in the diffusers layout"
