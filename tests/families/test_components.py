"""Components: what is built is what upstream loads; what does not fit, or lies, is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, SD3Transformer2DModel
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from app.errors import CheckpointError
from app.families.text import Encoder, cut_text, read_texts, token_ids
from tests.families.plain import build_component
from tests.parts.tiny_parts import read_state

UPSTREAM: dict[str, tuple[str, Any]] = {
    "DiTTransformer2DModel": ("dit/transformer", DiTTransformer2DModel),
    "SD3Transformer2DModel": ("sd35/transformer", SD3Transformer2DModel),
    "AutoencoderKL": ("sd3/vae", AutoencoderKL),
    "CLIPTextModelWithProjection": ("sd3/text_encoder_2", CLIPTextModelWithProjection),
    "T5EncoderModel": ("sd3/text_encoder_3", T5EncoderModel),
}
CLIP = ("CLIPTextModelWithProjection", "sd3/text_encoder")


def build(checkpoints: Path, class_name: str, part: str, edit: Callable[[Any], Any] = lambda state: state) -> Any:
    return build_component(class_name, checkpoints / part, edit(read_state(checkpoints / part)), torch.float32)


@pytest.mark.parametrize("class_name", UPSTREAM)
def test_every_tensor_is_upstreams(checkpoints: Path, class_name: str) -> None:
    part, kind = UPSTREAM[class_name]
    before = torch.get_rng_state()
    ours = build(checkpoints, class_name, part)
    assert torch.equal(before, torch.get_rng_state()), "no random number is drawn for weights that are then replaced"
    theirs = kind.from_pretrained(checkpoints / part)
    for kind_of in ("named_parameters", "named_buffers"):
        # Every name of a tensor that several modules share, as diffusers' DiT has it in each.
        mine, wanted = (dict(getattr(one, kind_of)(remove_duplicate=False)) for one in (ours, theirs))
        assert mine.keys() == wanted.keys() and all(torch.equal(mine[key], wanted[key]) for key in wanted)


def test_the_files_may_change_under_a_built_network(checkpoints: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints / "sd3/vae", tmp_path / "vae")
    network = build_component("AutoencoderKL", folder, read_state(folder), torch.float32)
    before = [weight.clone() for weight in network.parameters()]
    (file,) = folder.glob("*.safetensors")
    with file.open("r+b") as stream:
        stream.seek(-4096, 2)
        stream.write(bytes(4096))
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_bfloat16_is_the_rounded_float32(checkpoints: Path) -> None:
    part, _ = UPSTREAM["T5EncoderModel"]
    wide = build(checkpoints, "T5EncoderModel", part).state_dict()
    narrow = build_component("T5EncoderModel", checkpoints / part, read_state(checkpoints / part), torch.bfloat16)
    assert all(torch.equal(value, wide[key].bfloat16()) for key, value in narrow.state_dict().items())


def test_the_t5s_embedding_is_one_tensor_under_either_name(checkpoints: Path) -> None:
    def under(*names: str) -> Callable[[Any], Any]:
        return lambda state: {**state, **dict.fromkeys(names, state.pop("shared.weight"))}

    part = UPSTREAM["T5EncoderModel"][0]
    for names in (
        ("shared.weight",),
        ("encoder.embed_tokens.weight",),
        ("shared.weight", "encoder.embed_tokens.weight"),
    ):
        network = build(checkpoints, "T5EncoderModel", part, under(*names))
        assert network.encoder.embed_tokens.weight is network.shared.weight
    with pytest.raises(
        CheckpointError, match=r"text_encoder_3: encoder.embed_tokens.weight is not equal to shared.weight"
    ):
        build(
            checkpoints, "T5EncoderModel", part, lambda state: {**state, "encoder.embed_tokens.weight": torch.zeros(1)}
        )


def test_older_names_of_keys(checkpoints: Path) -> None:
    def unprefixed(state: Any) -> Any:
        ids = torch.arange(24).expand(1, -1)
        return {"embeddings.position_ids": ids, **{key.removeprefix("text_model."): state[key] for key in state}}

    def old_vae(state: Any) -> Any:
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        return {swap(key, names): value for key, value in state.items()}

    def swap(key: str, names: dict[str, str]) -> str:
        for new, old in names.items():
            key = key.replace(f".{new}.", f".{old}.")
        return key

    for class_name, part, older in ((*CLIP, unprefixed), ("AutoencoderKL", "sd3/vae", old_vae)):
        assert older(read_state(checkpoints / part)).keys() != read_state(checkpoints / part).keys()
        mine = build(checkpoints, class_name, part, older).state_dict()
        wanted = build(checkpoints, class_name, part).state_dict()
        assert all(torch.equal(mine[key], value) for key, value in wanted.items())


def missing(state: Any) -> Any:
    del state["text_projection.weight"]
    return state


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (missing, "missing weights: text_projection.weight"),
        (lambda state: {**state, "text_projection.bias": torch.zeros(16)}, "unexpected weights: text_projection.bias"),
        (lambda state: {**state, "text_projection.weight": torch.zeros(16, 8)}, r"text_projection.weight.*\[16, 8\]"),
        (
            lambda state: {**state, "text_projection.weight": torch.zeros(16, 16, dtype=torch.int8)},
            "text_projection.*int8",
        ),
    ],
)
def test_keys_and_shapes_are_exactly_the_networks(checkpoints: Path, edit: Callable[[Any], Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"text_encoder: {reason}"):
        build(checkpoints, *CLIP, edit)


@pytest.mark.parametrize("class_name", ["os.system", "UNet2DModel", "PreTrainedModel", "", "../CLIPTokenizer"])
def test_classes_outside_the_allowlist(tmp_path: Path, class_name: str) -> None:
    with pytest.raises(CheckpointError, match="is not one that this server loads"):
        build_component(class_name, tmp_path, {}, torch.float32)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": "wide"},
        {"hidden_size": -16},
        {"num_attention_heads": 0},
        {"hidden_act": "__import__('os')"},
    ],
    ids=str,
)
def test_a_config_that_lies(checkpoints: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    config = json.loads((checkpoints / CLIP[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        build_component(CLIP[0], tmp_path, read_state(checkpoints / CLIP[1]), torch.float32)


@pytest.mark.parametrize(
    "change", [{"transformer_layers_per_block": [1, 1, 10**9]}, {"layers_per_block": [1, [10**9]]}], ids=str
)
def test_a_config_that_lies_in_a_list(unets: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    config = json.loads((unets / "tiny-sdxl" / "unet" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=r"config\.json: \w+ = 1000000000, but"):
        build_component("UNet2DConditionModel", tmp_path, read_state(unets / "tiny-sdxl" / "unet"), torch.float32)


def test_a_config_names_no_code_and_no_number_format(checkpoints: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoints / CLIP[1] / "config.json").read_text())
    lies = {
        "_attn_implementation": "hub/kernel",
        "attn_implementation": "hub/kernel",
        "auto_map": {},
        "dtype": "float64",
    }
    (tmp_path / "config.json").write_text(
        json.dumps({**config, **lies, "is_decoder": True, "gradient_checkpointing": 1})
    )
    network = build_component(CLIP[0], tmp_path, read_state(checkpoints / CLIP[1]), torch.float32)
    assert network.config._attn_implementation == "sdpa" and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100_000, '{"a": 1' + " " * 17 * 2**20], ids=range(5))
def test_corrupt_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        build_component("AutoencoderKL", tmp_path, {}, torch.float32)


def test_a_huge_position_table_is_refused_before_it_is_computed(checkpoints: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoints / "dit/transformer/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sample_size": 100_000}))
    with pytest.raises(CheckpointError, match="buffer pos_embed would have"):
        build_component("DiTTransformer2DModel", tmp_path, read_state(checkpoints / "dit/transformer"), torch.float32)


def test_tokenizers_whose_files_lie(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        build_component("T5TokenizerFast", tmp_path, None, torch.float32)
    content = json.loads((checkpoints / "sd3/tokenizer_2/tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False}
    for broken in (json.dumps(content), "{", json.dumps({"model": 3})):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(CheckpointError, match="tokenizer's files are not readable"):
            build_component("CLIPTokenizer", tmp_path, None, torch.float32)


def test_padding_is_the_tokenizers_own(checkpoints: Path) -> None:
    for part, class_name, pad in (
        ("tokenizer", "CLIPTokenizer", "<|endoftext|>"),
        ("tokenizer_2", "CLIPTokenizerFast", "!"),
        ("tokenizer_3", "T5TokenizerFast", "<pad>"),
    ):
        tokenizer = build_component(class_name, checkpoints / "sd3" / part, None, torch.float32)
        ids = token_ids(tokenizer, ["red apple", "red " * 40], 24)
        assert ids.shape == (2, 24) and tokenizer.convert_ids_to_tokens(int(ids[0, -1])) == pad
        assert cut_text(tokenizer, "red apple", 24) == ""


def test_each_different_text_is_encoded_once() -> None:
    calls: list[list[str]] = []

    def ids(texts: list[str], max_length: int, **_: object) -> SimpleNamespace:
        calls.append(texts)
        assert max_length == 7
        return SimpleNamespace(input_ids=torch.tensor([[float(len(text))] for text in texts]))

    network = SimpleNamespace(device=torch.device("cpu"))
    encoder = Encoder(network, ids, lambda network, ids: (ids, torch.zeros(len(ids), 2)))
    lengths, zeros = read_texts(encoder, ["aa", "b", "aa", "", "cccc"], 7, 3)
    assert lengths.flatten().tolist() == [2, 1, 2, 0, 4] and zeros.shape == (5, 2)
    assert calls == [["aa", "b", ""], ["cccc", "cccc", "cccc"]]
