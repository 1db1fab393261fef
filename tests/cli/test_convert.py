"""`instep models convert`: the DiT authors' .pt becomes a model that serves, or one line says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from app.cards.cards import read_card, read_cards
from app.checkpoints import convert as converting
from app.checkpoints.parts import build_family, build_parts
from app.request import ClassLabel
from tests.families import plain_originals
from tests.families.plain_shapes import dit_state, drawn, vae_shapes
from tests.parts import originals
from tests.parts.close import FORWARD, apart, close
from tests.parts.commands import Run, one_line
from tests.parts.requests import passes
from tests.seeds import plain_dit

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pt(tmp_path: Path) -> Path:
    """What the authors' train.py writes: a DiT of 10 classes, patches of 2, 8x8 latents, with an EMA."""
    state = dit_state()
    worse = {key: value + 1 for key, value in state.items()}
    torch.save({"model": worse, "ema": state, "opt": {}}, tmp_path / "dit.pt")
    return tmp_path / "dit.pt"


def converted(run: Run, pt: Path, tiny: Path, *more: object) -> Path:
    folder = pt.parent / "models" / "mine"
    result = run("models", "convert", pt, folder, "--vae", tiny / "tiny-dit" / "vae", "--heads", 2, *more)
    assert result.exit_code == 0, result.output
    return folder


def test_a_pt_becomes_a_model_that_computes_as_the_original(run: Run, pt: Path, tiny: Path) -> None:
    """By the command of the README, which names no number format."""
    folder = converted(run, pt, tiny)
    card = read_cards(folder.parent)["mine"]
    assert (card.guided_channels, card.time_freq_shift, card.norm_eps) == (3, 0, 1e-6)
    assert (card.schedule.variance, card.schedule.spacing, card.defaults.sampler) == (
        "learned_range",
        "respaced",
        "ddpm",
    )
    assert card.default_size == (32, 32) and len(card.labels) == 10
    assert card.parameters == sum(value.numel() for value in dit_state().values())
    family = build_family(card, build_parts(card, {}, CPU, torch.float32), CPU, torch.float32)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([999.0, 20.0])
    with torch.inference_mode():
        out, _ = family.denoise(x, t, family.encode(passes([ClassLabel(10), ClassLabel(3)]), 0))
    wanted = plain_dit.forward(dit_state(), 2, x, t, torch.tensor([10, 3]))[:, :4]
    close(out, wanted, FORWARD)
    apart(out.roll(1, 0), wanted, FORWARD, of="another row:")


def test_it_is_served_at_once(run: Run, pt: Path, tiny: Path) -> None:
    folder = converted(run, pt, tiny)
    assert "ok" in run("models", "check", "--models", folder.parent).stdout
    words = ("generate", "--class-label", 4, "--model", "mine", "--models", folder.parent, "--steps", 2, "-o", "a.png")
    result = run(*words)
    assert result.exit_code == 0, result.output


def test_diffusers_reads_the_folder(run: Run, pt: Path, tiny: Path) -> None:
    """In its own names, a copy of the embedder in every block."""
    from diffusers import DiTTransformer2DModel

    folder = converted(run, pt, tiny, "--dtype", "bfloat16")
    network = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    state = load_file(folder / "transformer" / WEIGHTS)
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert state.keys() == network.state_dict().keys()
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (folder, *folder.rglob("*"))), "others may read it"
    table = "norm1.emb.class_embedder.embedding_table.weight"
    for block in range(2):
        own = state[f"transformer_blocks.{block}.{table}"]
        assert torch.equal(own, dit_state()["y_embedder.embedding_table.weight"].bfloat16())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_files_own_number_format_is_kept(run: Run, pt: Path, tiny: Path, stored: torch.dtype) -> None:
    """Bit for bit, where none is asked for."""
    state = {key: value.to(stored) for key, value in dit_state().items()}
    torch.save({"ema": state}, pt)
    written = load_file(converted(run, pt, tiny) / "transformer" / WEIGHTS)
    assert {value.dtype for value in written.values()} == {stored}
    qkv = torch.cat([written[f"transformer_blocks.1.attn1.to_{part}.weight"] for part in "qkv"])
    assert torch.equal(qkv, state["blocks.1.attn.qkv.weight"])


def test_the_vae_may_be_one_file_in_ldm_names(run: Run, pt: Path) -> None:
    state = drawn(vae_shapes((32, 64), 4, quant=True))
    file = originals.write(
        {**state, "model_ema.num_updates": torch.ones((), dtype=torch.int64)}, pt.parent / "vae.safetensors"
    )
    folder = pt.parent / "models" / "mine"
    assert run("models", "convert", pt, folder, "--vae", file, "--heads", 2).exit_code == 0
    vae = build_parts(read_cards(folder.parent)["mine"], {}, CPU, torch.float32)["vae"]
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    image = vae.decode(z, return_dict=False)[0]
    close(image, plain_originals.decoded(state, z, 32), FORWARD)
    apart(image, plain_originals.decoded(state, z.flip(1), 32), FORWARD, of="other channels:")
    assert vae.config.scaling_factor == 0.18215


def test_shards_are_of_a_limited_size(run: Run, pt: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting, "SHARD", 60_000)
    folder = converted(run, pt, tiny)
    files = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(files) > 2 and not (folder / "transformer" / WEIGHTS).exists()
    index = json.loads((folder / "transformer" / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    for file in files:
        with safe_open(file, "pt") as opened:
            assert {key for key, name in index.items() if name == file.name} == set(opened.keys())
    assert build_parts(read_cards(folder.parent)["mine"], {}, CPU, torch.float32)


def test_a_thousand_classes_get_their_names(run: Run, tmp_path: Path, tiny: Path) -> None:
    state = dit_state()
    state["y_embedder.embedding_table.weight"] = torch.randn(1001, 32)
    torch.save(state, tmp_path / "dit.pt")
    shipped = Path(__file__).parent.parent.parent / "models"
    folder = converted(run, tmp_path / "dit.pt", tiny, "--models", shipped)
    assert read_cards(folder.parent)["mine"].labels[162] == "beagle"


def edited(edit: Any) -> Any:
    def spoil(pt: Path) -> None:
        state = dit_state()
        edit(state)
        torch.save(state, pt)

    return spoil


REFUSED: dict[str, tuple[Any, str]] = {
    "no pt": (lambda pt: pt.write_bytes(b"x" * 99), "not a whole torch zip"),
    "absent": (lambda pt: pt.unlink(), "dit.pt"),
    "no dit": (lambda pt: torch.save({"a": torch.ones(2)}, pt), "no part of a known layout is in it"),
    "a VAE": (
        lambda pt: torch.save({"state_dict": {"decoder.mid.block_1.conv1.weight": torch.ones(2)}}, pt),
        "it holds vae (VAE)",
    ),
    "no patches": (edited(lambda s: s.pop("x_embedder.proj.weight")), "missing weights: x_embedder.proj.weight"),
    "no positions": (edited(lambda s: s.pop("pos_embed")), "missing weights: pos_embed"),
    "no last": (edited(lambda s: s.pop("final_layer.linear.bias")), "missing weights: proj_out_2.bias"),
    "flat": (edited(lambda s: s.update({"x_embedder.proj.weight": torch.ones(32)})), "has shape [32], not [width"),
    "empty": (edited(lambda s: s.update({"x_embedder.proj.weight": torch.ones(32, 4, 0, 0)})), "not [width"),
    "oblong": (edited(lambda s: s.update({"x_embedder.proj.weight": torch.ones(32, 4, 2, 1)})), "not [width"),
    "no class": (edited(lambda s: s.update({"y_embedder.embedding_table.weight": torch.ones(1, 32)})), "no class"),
    "no third": (edited(lambda s: s.update({"blocks.1.attn.qkv.bias": torch.ones(97)})), "does not split into q, k"),
    "other positions": (edited(lambda s: s.update({"pos_embed": s["pos_embed"] + 0.1})), "pos_embed is not the sines"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_leaves_nothing_behind(run: Run, pt: Path, tiny: Path, case: str) -> None:
    spoil, told = REFUSED[case]
    spoil(pt)
    folder = pt.parent / "models" / "mine"
    line = one_line(run("models", "convert", pt, folder, "--vae", tiny / "tiny-dit" / "vae", "--heads", 2))
    assert told in line and "dit.pt" in line
    assert not list(folder.parent.glob("*")) and not list(folder.parent.glob(".*"))


def test_a_width_that_does_not_say_its_heads(run: Run, pt: Path, tiny: Path) -> None:
    folder = pt.parent / "models" / "mine"
    line = one_line(run("models", "convert", pt, folder, "--vae", tiny / "tiny-dit" / "vae"))
    assert "a width of 32 is none of the authors' sizes" in line and "--heads" in line
    assert converting.dit_config(dit_state(384))["num_attention_heads"] == 6


def test_a_folder_that_exists_is_left_as_it_is(run: Run, pt: Path, tiny: Path) -> None:
    folder = converted(run, pt, tiny)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    again = run("models", "convert", pt, folder, "--vae", tiny / "tiny-dit" / "vae", "--heads", 2)
    assert "exists: name a folder that does not" in one_line(again)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_only_a_card_without_weights_is_replaced(run: Run, pt: Path, tiny: Path) -> None:
    folder, vae = converted(run, pt, tiny), tiny / "tiny-dit" / "vae"
    words = ("models", "convert", pt, folder, "--vae", vae, "--heads", 2, "--replace")
    assert "exists and has no card without weights" in one_line(run(*words))
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    card = folder / "card.toml"
    card.write_text(card.read_text() + 'license = "kept"\n')
    again = run(*words)
    assert again.exit_code == 0, again.output
    assert read_card(card).license == "kept" and list(folder.rglob("*.safetensors"))
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    text = card.read_text().replace("32", "64")
    card.write_text(text)
    assert "another network than these files, a DiT of 32 px" in one_line(run(*words))
    assert card.read_text() == text and [one.name for one in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["a b", ".hidden", "x" * 65])
def test_a_folder_whose_name_is_no_id(run: Run, pt: Path, tiny: Path, name: str) -> None:
    refused = run(
        "models", "convert", pt, pt.parent / "models" / name, "--vae", tiny / "tiny-dit" / "vae", "--heads", 2
    )
    assert "cannot be the id of a model" in one_line(refused)
    assert not (pt.parent / "models").exists()


@pytest.mark.parametrize("what", ["absent", "a pickle", "another network"])
def test_a_vae_that_is_none(run: Run, pt: Path, tiny: Path, what: str) -> None:
    vae = {
        "absent": pt.parent / "vae",
        "a pickle": pt.parent / "vae.pt",
        "another network": tiny / "tiny-sd3" / "transformer",
    }
    (pt.parent / "vae.pt").write_bytes(b"x" * 99)
    folder = pt.parent / "models" / "mine"
    line = one_line(run("models", "convert", pt, folder, "--vae", vae[what], "--heads", 2))
    assert str(vae[what]) in line
    assert not list(folder.parent.glob("*"))
