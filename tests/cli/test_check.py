"""`instep models check PATH`: which card fits, what is missing, what it takes; from headers alone."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from tests.parts import originals
from tests.parts.commands import Run, one_line
from tests.parts.tiny_parts import Payload
from tests.seeds.plain_dit import original_state

SHIPPED = Path(__file__).parent.parent.parent / "models"


def rows(output: str) -> dict[str, str]:
    """The lines of the table of parts."""
    return {line.split()[0]: " ".join(line.split()) for line in output.splitlines() if line[:1].isalpha()}


@pytest.fixture(scope="module")
def single(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-sd3 as its authors would publish it: network, VAE and the first CLIP in one file."""
    state = originals.sd3_file(tiny / "tiny-sd3", "text_encoder")
    return originals.write(state, tmp_path_factory.mktemp("files") / "sd3.safetensors")


def test_one_file_in_the_authors_layout(run: Run, single: Path) -> None:
    result = run("models", "check", single)
    assert result.exit_code == 0, result.output
    told = rows(result.stdout)
    assert result.stdout.startswith("fits tiny-sd3\n")
    assert told["transformer"].startswith("transformer stored as float32 0.1 M 332.1 kB 332.1 kB")
    assert told["vae"].startswith("vae stored as float32") and told["text_encoder"].startswith("text_encoder stored")
    assert "long prompts and written words are followed less well" in told["text_encoder_3"]
    assert told["tokenizer"] == "tokenizer missing; text_encoder needs it - - -"
    assert "memory on cpu: encode " in result.stdout and "denoise 332.1 kB" in result.stdout
    assert f"next: instep models add {single} --like tiny-sd3 --rest tiny-sd3\n" in result.stdout


def test_a_folder_of_diffusers(run: Run, tiny: Path) -> None:
    result = run("models", "check", tiny / "tiny-dit")
    assert result.exit_code == 0 and result.stdout.startswith("fits tiny-dit\n")
    assert f"next: instep models add {tiny / 'tiny-dit'} --like tiny-dit\n" in result.stdout
    assert "missing" not in result.stdout


def test_what_does_not_fit_here_is_told(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTEP_DEVICE_MEMORY", "300kB")
    assert "weights may take 300.0 kB here: does not fit" in run("models", "check", tiny / "tiny-sd3").stdout
    monkeypatch.setenv("INSTEP_DEVICE_MEMORY", "400kB")
    assert "fits in turns, one phase at a time" in run("models", "check", tiny / "tiny-sd3").stdout


def test_parts_alone(run: Run, tiny: Path, tmp_path: Path) -> None:
    """An autoencoder as its authors write it, a T5 as transformers does, one by diffusers' names."""
    own = originals.write(originals.vae(originals.read(tiny / "tiny-sd3" / "vae")), tmp_path / "ae.safetensors")
    told = run("models", "check", own).stdout
    assert told.startswith("fits tiny-dit, tiny-sd3: the same shapes, so the files cannot tell which\n")
    assert "no network is in it: give it to `instep models add` beside one (--vae)" in told
    (t5,) = (tiny / "tiny-sd3" / "text_encoder_3").glob("*.safetensors")
    assert "(--text-encoder-3)" in run("models", "check", t5).stdout
    told = run("models", "check", tiny / "tiny-sd3" / "vae").stdout  # its config has the scale, the file has not
    assert told.startswith("fits tiny-sd3\n") and "(--vae)" in told


def test_a_file_of_another_kind_that_has_a_part(run: Run, tiny: Path, tmp_path: Path) -> None:
    """As a U-Net's file, whose autoencoder is one that is known."""
    state = originals.vae(originals.read(tiny / "tiny-dit" / "vae"))
    unet = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}
    file = originals.write(
        {**{f"first_stage_model.{k}": v for k, v in state.items()}, **unet}, tmp_path / "xl.safetensors"
    )
    told = run("models", "check", file).stdout
    assert (
        "1 tensors belong to no layout that is known here, the first: model.diffusion_model.input_blocks.0.0.weight"
        in told
    )
    assert "no network is in it" in told and "transformer" not in told


def test_a_folder_of_cards(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INSTEP_MODELS", str(tmp_path))
    assert rows(run("models", "check", tiny).stdout)["tiny-dit"] == "tiny-dit ok 2 parts"


def test_nothing_fits(run: Run, tiny: Path, single: Path, tmp_path: Path) -> None:
    state = originals.read(single.parent)
    key = "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.bias"
    file = originals.write({**state, key: torch.zeros(7)}, tmp_path / "odd.safetensors")
    assert one_line(run("models", "check", file)) == (
        f"{file}: fits no card; the nearest is tiny-sd3, but its transformer is another: "
        "transformer_blocks.0.ff.net.0.proj.bias has shape [7], not [128]"
    )
    file = originals.write({"a\x1b[31m": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert one_line(run("models", "check", file)) == (
        f"{file}: in no layout that is known here; its tensors: a?[31m ..."
    )


def test_a_part_that_is_stored_in_eighths_is_named(run: Run, tiny: Path, tmp_path: Path) -> None:
    state = originals.sd3_file(tiny / "tiny-sd3", "text_encoder_3")
    eighth = {k: v.to(torch.float8_e4m3fn) if k.startswith("text_encoders.t5") else v for k, v in state.items()}
    told = run("models", "check", originals.write(eighth, tmp_path / "fp8.safetensors")).stdout
    assert "number format F8_E4M3 (8-bit floats), which this server does not load" in rows(told)["text_encoder_3"]
    assert rows(told)["transformer"].startswith("transformer stored as float32")


def test_the_two_dits_are_told_apart(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the places in a file of their authors: the networks have the same shapes."""
    from app.families.components import outline_of

    monkeypatch.setenv("INSTEP_MODELS", str(SHIPPED))
    own = outline_of("DiTTransformer2DModel", SHIPPED / "dit-xl-2-256" / "transformer")
    for side, size in ((16, 256), (32, 512)):
        state = {**original_state(dict(own), 2), "pos_embed": torch.empty(1, side**2, 1152, device="meta")}
        told = run("models", "check", originals.write_sparse(state, tmp_path / "dit.safetensors", "F32")).stdout
        assert told.startswith(f"fits dit-xl-2-{size}\n")


@pytest.mark.slow
def test_the_shipped_models_one_of_which_shares_its_vae(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """emoji-dit and emoji-mmdit-turbo take their VAE from emoji-mmdit: its config is there and not beside them."""
    monkeypatch.setenv("INSTEP_MODELS", str(SHIPPED))
    dit, mmdit = SHIPPED / "emoji-dit", SHIPPED / "emoji-mmdit"
    (vae,) = (mmdit / "vae").glob("*.safetensors")
    (network,) = (mmdit / "transformer").glob("*.safetensors")
    for place, part in ((mmdit / "vae", "vae"), (vae, "vae"), (network, "transformer")):
        result = run("models", "check", place)
        assert result.exit_code == 0 and rows(result.stdout)[part].startswith(f"{part} stored as bfloat16")
    told = run("models", "check", dit)
    assert rows(told.stdout)["vae"].startswith("vae missing, and needed 2.6 M")
    assert one_line(told) == f"{dit}: vae missing: give --rest emoji-dit to take what is missing from that card"
    monkeypatch.setenv("INSTEP_MODELS", str(tmp_path))
    for name in ("emoji-dit", "emoji-mmdit"):
        (tmp_path / name).symlink_to(SHIPPED / name)
    assert one_line(run("models", "add", mmdit / "vae")).endswith("(--vae, --text-encoder ...)")
    (network,) = (dit / "transformer").glob("*.safetensors")
    ways = ((dit, "--rest", "emoji-dit"), (network, "--vae", vae), (dit / "transformer", "--rest", "emoji-dit"))
    for number, words in enumerate(ways):
        made = run("models", "add", *words, "--id", f"mine{number}", "--like", "emoji-dit")
        assert made.exit_code == 0 and made.stdout.endswith("next: instep serve\n"), made.output
    states = {name: row.split()[1] for name, row in rows(run("models", "check").stdout).items()}
    assert states["mine0"] == states["mine1"] == states["mine2"] == "ok"
    assert "red apple" in (tmp_path / "mine1" / "model_index.json").read_text(), "the names of classes come along"


def test_true_sizes_by_their_headers(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file of SD3.5-large's true size, of which only the header is read."""
    from app.families.components import outline_of

    monkeypatch.setenv("INSTEP_MODELS", str(SHIPPED))
    own = outline_of("SD3Transformer2DModel", SHIPPED / "sd3.5-large" / "transformer")
    state = {f"model.diffusion_model.{k}": v for k, v in originals.sd3(dict(own)).items()}
    file = originals.write_sparse(state, tmp_path / "sd3.5_large.safetensors")
    assert file.stat().st_size > 16e9 > 1e6 > file.stat().st_blocks * 512
    told = run("models", "check", file).stdout
    assert told.startswith("fits sd3.5-large, sd3.5-large-turbo: the same shapes, so the files cannot tell which\n")
    assert rows(told)["transformer"].startswith("transformer stored as bfloat16 8.06 B 16.3 GB 32.6 GB")
    assert rows(told)["vae"].startswith("vae missing, and needed 83.8 M - 335.3 MB")


def hostile(kind: str, folder: Path, single: Path) -> Path:
    file, whole = folder / "bad.safetensors", single.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    many = b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[],"data_offsets":[0,0]}' % n for n in range(30_000)) + b"}"
    content = {
        "empty": b"",
        "cut": whole[:-8],
        "header": (2**40).to_bytes(8, "little") + whole[8:],
        "crowd": len(many).to_bytes(8, "little") + many,
        "text": b"<!DOCTYPE html>" * 100,
        "shape": whole[:8]
        + whole[8 : 8 + length].replace(b'"shape":[', b'"shape":[-', 1)[:length]
        + whole[8 + length :],
    }
    file.write_bytes(content[kind])
    return file


@pytest.mark.parametrize("kind", ["empty", "cut", "header", "crowd", "text", "shape"])
def test_files_that_lie_are_one_line(run: Run, single: Path, tmp_path: Path, kind: str) -> None:
    file = hostile(kind, tmp_path, single)
    assert one_line(run("models", "check", file)).startswith(f"{file}: ")


def test_a_torch_file_of_the_dit_authors(run: Run, tiny: Path, tmp_path: Path) -> None:
    state = original_state(originals.read(tiny / "tiny-dit" / "transformer"), 4)
    file = tmp_path / "DiT.pt"
    torch.save({"ema": state, "model": state}, file)
    told = run("models", "check", file).stdout
    assert told.startswith("DiT.pt is a torch file, which a server does not load\nfits tiny-dit\n")
    assert f"next: instep models convert {file} {tiny / 'my-tiny-dit'} --vae SD-VAE-FT-EMA\n" in told
    assert "first: instep models convert" in one_line(run("models", "add", file))


@pytest.mark.parametrize("kind", ["code", "bomb", "text"])
def test_torch_files_that_lie_are_one_line(run: Run, tmp_path: Path, kind: str) -> None:
    """Code in the pickle, entries that are compressed, no zip at all."""
    file, whole = tmp_path / "bad.pt", tmp_path / "whole.pt"
    torch.save({"x": torch.zeros(2**20)} if kind == "bomb" else Payload(tmp_path / "ran"), whole)
    if kind == "bomb":
        with zipfile.ZipFile(whole) as theirs, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as ours:
            for name in theirs.namelist():
                ours.writestr(name, theirs.read(name))
        assert file.stat().st_size < 2**16
    else:
        file.write_bytes(whole.read_bytes() if kind == "code" else b"text" * 100)
    assert one_line(run("models", "check", file)).startswith(f"{file}: ")
    assert not (tmp_path / "ran").exists()


def test_folders_that_lie_are_one_line(run: Run, tiny: Path, tmp_path: Path) -> None:
    assert "there is no such file or folder" in one_line(run("models", "check", tmp_path / "none"))
    assert "neither a safetensors file nor a folder with model_index.json" in one_line(run("models", "check", tmp_path))
    shutil.copytree(tiny / "tiny-sd3", tmp_path / "copy")
    (tmp_path / "copy" / "model_index.json").write_text("[]")
    assert "not a JSON object" in one_line(run("models", "check", tmp_path / "copy"))
    (tmp_path / "copy" / "model_index.json").write_text('{"../..": ["diffusers", "AutoencoderKL"]}')
    assert '"../.." is not the name of a part' in one_line(run("models", "check", tmp_path / "copy"))
