"""LoRA files of every trainer grow the weights that their authors meant: compared with whole merged weights.

The authors' layouts are those of `tests/parts/originals.py`, written without the app's rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders import lora_conversion_utils as theirs
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from app.families.components import network_of
from app.families.lora import Matched, Pair, match
from tests.parts import originals
from tests.parts.originals import State, swap

EXACT = 1e-6
WRONG = 10 * EXACT
ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Format:
    """How files name their tensors. ours: diffusers' names of modules, else the authors'."""

    prefix: str
    ours: bool = False
    flat: bool = False
    ends: tuple[str, str] = (".lora_A.weight", ".lora_B.weight")
    alpha: float | None = None

    def file(self, pairs: Mapping[str, Pair]) -> State:
        """The tensors of these pairs by their modules' names."""
        found: State = {}
        for name, halves in pairs.items():
            module = self.prefix + (name.replace(".", "_") if self.flat else name)
            found |= {f"{module}{end}": half for end, half in zip(self.ends, halves, strict=True)}
            if self.alpha is not None:
                found[f"{module}.alpha"] = torch.tensor(self.alpha)
        return found

    def scale(self, rank: int) -> float:
        return 1.0 if self.alpha is None else self.alpha / rank


DOWN_UP = (".lora_down.weight", ".lora_up.weight")
FORMATS = {
    "sd-scripts": Format("lora_unet_", flat=True, ends=DOWN_UP, alpha=1.5),
    "ComfyUI": Format("diffusion_model.", ends=DOWN_UP, alpha=2.0),
    "fal": Format("base_model.model."),
    "the authors' names": Format(""),
    "peft": Format("transformer.", ours=True),
    "peft, named": Format("transformer.", ours=True, ends=(".lora_A.default.weight", ".lora_B.default.weight")),
    "peft, bare": Format("base_model.model.", ours=True),
    "old diffusers": Format("transformer.", ours=True, ends=(".lora.down.weight", ".lora.up.weight")),
    "diffusers' encoders": Format(
        "transformer.", ours=True, ends=(".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
    ),
    "OneTrainer": Format("lora_transformer_", ours=True, flat=True, ends=DOWN_UP, alpha=0.5),
}
KOHYA = FORMATS["sd-scripts"]


def network(folder: Path, part: str = "transformer", kind: str = "SD3Transformer2DModel") -> nn.Module:
    return network_of(kind, folder / part)


@pytest.fixture(params=["sd3", "sd35", "schnell", "dev"])
def model(request: pytest.FixtureRequest, checkpoints: Path, fluxes: Path) -> tuple[nn.Module, State, Any]:
    """A network without weights, its weights, and how its authors write them."""
    sd3 = request.param.startswith("sd3")
    folder = (checkpoints if sd3 else fluxes) / request.param
    kind, layout = ("SD3", originals.sd3) if sd3 else ("Flux", originals.flux)
    return network(folder, kind=f"{kind}Transformer2DModel"), originals.read(folder / "transformer"), layout


def drawn(shapes: Mapping[str, torch.Tensor], rank: int = 3, seed: int = 1) -> dict[str, Pair]:
    """A pair for each matrix among these weights, without what `.weight` ends."""
    chance = torch.Generator().manual_seed(seed)
    return {
        name.removesuffix(".weight"): (
            torch.randn(rank, value.shape[1], generator=chance) / value.shape[1] ** 0.5,
            torch.randn(value.shape[0], rank, generator=chance) / 3,
        )
        for name, value in shapes.items()
        if value.ndim == 2 and name.endswith(".weight")
    }


def grown(weights: State, pairs: Mapping[Any, Pair], scale: float = 1.0) -> State:
    """The weights with every pair merged into them."""
    found = dict(weights)
    for name, (down, up) in pairs.items():
        key = f"{name[1] if isinstance(name, tuple) else name}.weight"
        found[key] = weights[key] + scale * (up @ down)
    return found


def apart(one: State, other: State) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_grows_the_authors_weights(model: tuple[nn.Module, State, Any], name: str) -> None:
    blank, own, layout = model
    form = FORMATS[name]
    pairs = drawn(own if form.ours else layout(own))
    found = match(form.file(pairs), {"transformer": blank})
    meant = layout(grown(own, pairs, form.scale(3))) if form.ours else grown(layout(own), pairs, form.scale(3))
    assert found.unmatched == ()
    assert len(found.pairs) == len(drawn(own)), "every linear module"
    assert all(up.dtype == torch.float32 for _, up in found.pairs.values())
    assert apart(layout(grown(own, found.pairs)), meant) < EXACT


def change(found: Matched, edit: Callable[[str, Pair], Pair]) -> dict[tuple[str, str], Pair]:
    return {key: edit(key[1], pair) for key, pair in found.pairs.items()}


def test_the_comparison_sees_what_is_wrong(model: tuple[nn.Module, State, Any]) -> None:
    blank, own, layout = model
    pairs = drawn(layout(own))
    found = match(KOHYA.file(pairs), {"transformer": blank})
    meant = grown(layout(own), pairs, KOHYA.scale(3))

    def error(pairs: Mapping[Any, Pair]) -> float:
        return apart(layout(grown(own, pairs)), meant)

    others = {"to_q": "to_k", "to_k": "to_q", "add_q_proj": "add_k_proj", "add_k_proj": "add_q_proj"}

    def exchanged(name: str, pair: Pair) -> Pair:
        head, _, last = name.rpartition(".")
        return found.pairs["transformer", f"{head}.{others[last]}"] if last in others else pair

    assert error(change(found, lambda name, pair: (pair[0], pair[1] / KOHYA.scale(3)))) > WRONG, "alpha ignored"
    assert error(change(found, exchanged)) > WRONG, "q and k exchanged"
    turned = change(found, lambda name, pair: (pair[0], swap(pair[1])) if name == "norm_out.linear" else pair)
    assert error(turned) > WRONG, "the halves of the last modulation"
    assert error({key: pair for key, pair in found.pairs.items() if key[1] != "proj_out"}) > WRONG, "a module left out"


def test_the_last_modulation_of_the_text_is_turned_and_no_other(checkpoints: Path) -> None:
    blank, own = network(checkpoints / "sd3"), originals.read(checkpoints / "sd3" / "transformer")
    name = "joint_blocks.{}.context_block.adaLN_modulation.1"
    pairs = {key: pair for key, pair in drawn(originals.sd3(own)).items() if "context_block.adaLN" in key}
    found = match(KOHYA.file(pairs), {"transformer": blank}).pairs
    first, last = (found["transformer", f"transformer_blocks.{index}.norm1_context.linear"][1] for index in (0, 1))
    assert torch.equal(first, pairs[name.format(0)][1] * KOHYA.scale(3))
    assert torch.equal(last, swap(pairs[name.format(1)][1] * KOHYA.scale(3)))


def test_the_last_block_is_the_networks_not_the_files(checkpoints: Path) -> None:
    """A file that has the first block alone: its modulation is not the last one."""
    blank = network(checkpoints / "sd3")
    down, up = torch.randn(2, 32), torch.randn(192, 2)
    file = KOHYA.file({"joint_blocks.0.context_block.adaLN_modulation.1": (down, up)})
    ((_, found),) = match(file, {"transformer": blank}).pairs.values()
    assert torch.equal(found, up * (KOHYA.alpha or 0) / 2)


def test_fused_modules_share_their_down(model: tuple[nn.Module, State, Any]) -> None:
    blank, own, layout = model
    found = match(KOHYA.file(drawn(layout(own))), {"transformer": blank}).pairs
    for (part, name), (down, _) in found.items():
        fused = [name.replace("to_q", "to_k"), name.replace("to_q", "to_v")] if name.endswith("attn.to_q") else []
        assert all(found[part, other][0] is down for other in fused)


def test_modules_that_were_trained_alone_get_their_own_part(model: tuple[nn.Module, State, Any]) -> None:
    """sd-scripts' split_qkv writes q, k and v of a small rank as one of three times that, mostly zeros."""
    blank, own, layout = model
    fused = {key: pair for key, pair in drawn(layout(own)).items() if key.endswith((".qkv", ".linear1"))}
    sparse: dict[str, Pair] = {}
    for name, (_, up) in fused.items():
        width = 32 if "joint" in name else own["x_embedder.weight"].shape[0]
        sides = [width] * 3 + ([len(up) - 3 * width] if name.endswith("linear1") else [])
        blocks = [torch.randn(side, 2) for side in sides]
        down = torch.randn(2 * len(sides), layout(own)[f"{name}.weight"].shape[1]) / 6
        sparse[name] = down, torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    found = match(KOHYA.file(sparse), {"transformer": blank}).pairs
    ranks = {2 * len(sparse[name][0]) // len(sparse[name][0]) for name in sparse}
    assert {len(down) for down, _ in found.values()} == ranks == {2}
    assert {up.shape[1] for _, up in found.values()} == {2}
    scaled = {name: (down, up * (KOHYA.alpha or 0) / len(down)) for name, (down, up) in sparse.items()}
    assert apart(layout(grown(own, found)), grown(layout(own), scaled)) < EXACT
    # One number outside the blocks, and all of it counts.
    name, (down, up) = next(iter(sparse.items()))
    up = up.clone()
    up[0, -1] = 1.0
    found = match(KOHYA.file({name: (down, up)}), {"transformer": blank}).pairs
    assert {len(down) for down, _ in found.values()} == {len(down)}
    meant = grown(layout(own), {name: (down, up)}, (KOHYA.alpha or 0) / len(down))
    assert apart(layout(grown(own, found)), meant) < EXACT


def test_xlabs_names(fluxes: Path) -> None:
    folder = fluxes / "dev"
    blank = network(folder, kind="FluxTransformer2DModel")
    own = originals.read(folder / "transformer")
    named = {"img_attn.qkv": "qkv_lora1", "txt_attn.qkv": "qkv_lora2", "img_attn.proj": "proj_lora1"}
    named |= {"txt_attn.proj": "proj_lora2", "linear1": "qkv_lora", "linear2": "proj_lora"}
    pairs, file = {}, {}
    for name, (down, up) in drawn(originals.flux(own)).items():
        block, _, rest = name.partition("_blocks.")
        index, _, rest = rest.partition(".")
        if new := named.get(rest):
            up = up[: 3 * 48] if new == "qkv_lora" else up
            pairs[name] = down, torch.cat([up, torch.zeros(4 * 48, 3)]) if new == "qkv_lora" else up
            file[f"{block}_blocks.{index}.processor.{new}.down.weight"] = down
            file[f"{block}_blocks.{index}.processor.{new}.up.weight"] = up
    found = match(file, {"transformer": blank})
    assert found.unmatched == ()
    meant = grown(originals.flux(own), pairs)
    assert apart(originals.flux(grown(own, found.pairs)), meant) < EXACT
    others = str.maketrans({"1": "2", "2": "1"})
    exchanged = {re.sub("lora[12]", lambda word: word[0].translate(others), key): value for key, value in file.items()}
    wrong = match(exchanged, {"transformer": blank}).pairs
    assert apart(originals.flux(grown(own, wrong)), meant) > WRONG, "image and text exchanged"


BLOCKS = ("double_blocks.0.", "double_blocks.18.", "single_blocks.0.", "single_blocks.37.", "final_layer.", "txt_in")


def applied(pairs: Mapping[str, Pair], inputs: Mapping[int, torch.Tensor]) -> State:
    """What each module adds to its output for these inputs, by their widths."""
    return {name: up @ (down @ inputs[down.shape[1]]) for name, (down, up) in pairs.items()}


def converted(state: State) -> dict[str, Pair]:
    """diffusers' result as pairs."""
    names = {key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")}
    return {
        name.removeprefix("transformer."): (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"])
        for name in names
    }


@pytest.mark.parametrize("form", ["sd-scripts", "XLabs"])
def test_flux_as_diffusers_converts_it(form: str) -> None:
    """With FLUX.1-dev's own sides, which diffusers' converters are written for."""
    blank = network(ROOT / "models" / "flux.1-dev", kind="FluxTransformer2DModel")
    with torch.device("meta"):
        shapes = originals.flux(dict(blank.state_dict()))
    if form == "XLabs":
        sides = {"qkv_lora1": (3072, 9216), "qkv_lora2": (3072, 9216), "proj_lora1": (3072, 3072)}
        single = {"qkv_lora": (3072, 9216), "proj_lora": (15360, 3072)}
        chance, file = torch.Generator().manual_seed(3), {}
        for block, parts in (("double_blocks.18", sides), ("single_blocks.37", single)):
            for name, (width, rows) in parts.items():
                file[f"{block}.processor.{name}.down.weight"] = torch.randn(2, width, generator=chance) / 60
                file[f"{block}.processor.{name}.up.weight"] = torch.randn(rows, 2, generator=chance)
        convert = theirs._convert_xlabs_flux_lora_to_diffusers
    else:
        # diffusers drops the alphas of the last layer.
        last = Format("lora_unet_", flat=True, ends=DOWN_UP)
        pairs = drawn({name: value for name, value in shapes.items() if name.startswith(BLOCKS)})
        file = KOHYA.file({name: pair for name, pair in pairs.items() if not name.startswith("final_layer")})
        file |= last.file({name: pair for name, pair in pairs.items() if name.startswith("final_layer")})
        convert = theirs._convert_kohya_flux_lora_to_diffusers
    found = match(file, {"transformer": blank})
    assert found.unmatched == ()
    expected = converted(convert(dict(file)))  # type: ignore[no-untyped-call]
    chance = torch.Generator().manual_seed(9)
    inputs = {down.shape[1]: torch.randn(down.shape[1], generator=chance) for down, _ in expected.values()}
    ours = applied({name: pair for (_, name), pair in found.pairs.items()}, inputs)
    assert apart(ours, applied(expected, inputs)) < 1e-5
    name = next(name for name in expected if name.endswith("to_q"))
    wrong = expected | {name: expected[name.replace("to_q", "to_k")]}
    assert apart(ours, applied(wrong, inputs)) > 1e-2, "q and k exchanged"


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("clip", ["text_model.", ""])
def test_text_encoders(checkpoints: Path, fluxes: Path, family: str, clip: str) -> None:
    """By the names of sd-scripts, ComfyUI, diffusers and OneTrainer; a T5 is sd-scripts' third encoder in FLUX too."""
    folder = checkpoints / "sd3" if family == "sd3" else fluxes / "dev"
    classes = {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}
    spelled = {"text_encoder": ("lora_te1_", "text_encoders.clip_l.transformer.", "text_encoder.")}
    spelled["text_encoder_2"] = ("lora_te3_", "text_encoders.t5xxl.transformer.", "text_encoder_2.")
    if family == "sd3":
        classes = dict.fromkeys(("text_encoder", "text_encoder_2"), "CLIPTextModelWithProjection")
        classes["text_encoder_3"] = "T5EncoderModel"
        spelled["text_encoder_3"] = (*spelled["text_encoder_2"][:2], "text_encoder_3.")
        spelled["text_encoder_2"] = ("lora_te2_", "text_encoders.clip_g.transformer.", "text_encoder_2.")
    networks = {part: network(folder, part, kind) for part, kind in classes.items()}
    networks["transformer"] = network(folder, kind=f"{'SD3' if family == 'sd3' else 'Flux'}Transformer2DModel")
    starts = {part: (*names, f"lora_te{part[13:] or 1}_") for part, names in spelled.items()}
    for form in range(4):
        file: State = {}
        meant = {}
        for seed, part in enumerate(classes):
            linears = {
                f"{name}.weight": one.weight
                for name, one in networks[part].named_modules()
                if isinstance(one, nn.Linear)
            }
            for name, pair in drawn(linears, seed=seed).items():
                meant[part, name] = pair
                bare = name.removeprefix("text_model.")
                start = "" if classes[part].startswith("T5") or "projection" in name else clip
                file |= Format(starts[part][form], flat=form in (0, 3)).file({start + bare: pair})
        found = match(file, networks)
        assert found.unmatched == ()
        assert found.pairs.keys() == meant.keys()
        for key, (down, up) in found.pairs.items():
            assert torch.equal(down, meant[key][0]) and torch.equal(up, meant[key][1]), key


def test_an_adapter_of_text_encoders_alone(checkpoints: Path) -> None:
    networks = {
        "transformer": network(checkpoints / "sd3"),
        "text_encoder": network(checkpoints / "sd3", "text_encoder", "CLIPTextModelWithProjection"),
    }
    pair = torch.randn(2, 16), torch.randn(16, 2)
    found = match(Format("text_encoder.").file({"text_projection": pair}), networks)
    assert [*found.pairs] == [("text_encoder", "text_projection")]


def test_dit(checkpoints: Path) -> None:
    blank = network(checkpoints / "dit", kind="DiTTransformer2DModel")
    own = {
        name: value for name, value in originals.read(checkpoints / "dit" / "transformer").items() if "attn1" in name
    }
    pairs = drawn(own)
    found = match(FORMATS["peft"].file(pairs), {"transformer": blank})
    assert apart(grown(own, found.pairs), grown(own, pairs)) < EXACT
    fused = {"blocks.1.attn.qkv": (torch.randn(2, 32), torch.randn(96, 2))}
    ups = [up for _, up in match(Format("").file(fused), {"transformer": blank}).pairs.values()]
    assert torch.equal(torch.cat(ups), fused["blocks.1.attn.qkv"][1])


def test_alpha_as_peft_applies_what_diffusers_writes(checkpoints: Path) -> None:
    """alpha, ranks and alphas of single modules, and rank-stabilised scales come from the header."""
    real: Any = SD3Transformer2DModel.from_pretrained(  # type: ignore[no-untyped-call]
        checkpoints / "sd3" / "transformer"
    )
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["to_q", "to_k", "net.2"],
        alpha_pattern={"attn.to_k": 3, "transformer_blocks.1.attn.to_q": 20, "attn.to_q": 5},
        rank_pattern={"attn.to_k": 2},
        init_lora_weights=False,
    )
    real.add_adapter(config)
    state = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(real).items()}
    settings = {f"transformer.{key}": value for key, value in real.peft_config["default"].to_dict().items()}
    metadata = {"lora_adapter_metadata": json.dumps(settings, default=list)}
    blank = network(checkpoints / "sd3")
    found = match(state, {"transformer": blank}, metadata)
    deltas = {
        name: module.get_delta_weight("default").detach()
        for name, module in real.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert {name for _, name in found.pairs} == deltas.keys()
    assert apart({name: up @ down for (_, name), (down, up) in found.pairs.items()}, deltas) < EXACT
    bare = match(state, {"transformer": blank}).pairs
    assert apart({name: up @ down for (_, name), (down, up) in bare.items()}, deltas) > WRONG, "without the header"


def test_an_alpha_of_zero_is_the_rank(checkpoints: Path) -> None:
    """As sd-scripts loads it (networks/lora_flux.py, LoRAModule)."""
    pair = torch.randn(2, 32), torch.randn(32, 2)
    file = Format("lora_unet_", flat=True, alpha=0.0).file({"joint_blocks.0.x_block.attn.proj": pair})
    ((_, up),) = match(file, {"transformer": network(checkpoints / "sd3")}).pairs.values()
    assert torch.equal(up, pair[1])


def test_what_has_no_place_is_reported(checkpoints: Path) -> None:
    pair = torch.randn(2, 32), torch.randn(32, 2)
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.7.attn.to_q", "transformer_blocks.0.norm.to_q"]
    file = FORMATS["peft"].file(dict.fromkeys(names, pair)) | {
        "emb.weight": torch.ones(1),
        "text_encoder_3.a.alpha": torch.ones(1),
    }
    found = match(file, {"transformer": network(checkpoints / "sd3")})
    assert [*found.pairs] == [("transformer", names[0])]
    assert {*found.unmatched} == {key for key in file if names[0] not in key}


def test_tensors_are_copies(checkpoints: Path) -> None:
    """What was read may be a map of the file."""
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    file = FORMATS["peft"].file({"transformer_blocks.0.attn.to_q": (down, up)})
    ((one, two),) = match(file, {"transformer": network(checkpoints / "sd3")}).pairs.values()
    assert not {one.data_ptr(), two.data_ptr()} & {down.data_ptr(), up.data_ptr()}


def test_on_the_meta_device(model: tuple[nn.Module, State, Any]) -> None:
    blank, own, layout = model
    file = {key: value.to("meta") for key, value in KOHYA.file(drawn(layout(own))).items()}
    found = match(file, {"transformer": blank})
    assert found.unmatched == () and len(found.pairs) == len(drawn(own))
    assert all(down.is_meta and up.is_meta for down, up in found.pairs.values())


GOOD = "transformer.transformer_blocks.0.attn.to_q"
BARE = {f"{GOOD}.lora_A.weight": torch.ones(2, 32), f"{GOOD}.lora_B.weight": torch.ones(32, 2)}
FAR = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_{}_attn2_to_k.lora_down.weight"
REFUSED: dict[str, tuple[State, str]] = {
    "DoRA of kohya": ({f"{GOOD}.dora_scale": torch.ones(32)}, "is a DoRA"),
    "DoRA of peft": ({f"{GOOD}.lora_magnitude_vector": torch.ones(32)}, "is a DoRA"),
    "LoKr": ({f"{GOOD}.lokr_w1": torch.ones(2, 2)}, r"is a LyCORIS of another kind.*lokr"),
    "LoHa": ({f"{GOOD}.hada_w1_a": torch.ones(2, 2)}, r"is a LyCORIS of another kind.*hada"),
    "CP": ({f"{GOOD}.lora_mid.weight": torch.ones(2, 2)}, r"is a LyCORIS of another kind.*lora_mid"),
    "OFT": ({f"{GOOD}.oft_blocks": torch.ones(2, 2)}, "is an OFT"),
    "OFT of kohya": ({"lora_unet_joint_blocks_0.oft_diag": torch.ones(2, 2)}, "is an OFT"),
    "BOFT": ({f"{GOOD}.boft_R.weight": torch.ones(2, 2)}, "is an OFT"),
    "deltas": ({f"{GOOD}.diff": torch.ones(2, 2)}, "whole weights"),
    "deltas of biases": ({f"{GOOD}.diff_b": torch.ones(2)}, "whole weights"),
    "biases": ({f"{GOOD}.lora_B.bias": torch.ones(2)}, "biases of its own"),
    "BFL control": ({"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(2)}, "is a control LoRA of BFL"),
    "SDXL": ({FAR.format(1): torch.ones(2, 2048)}, "is a LoRA of SDXL"),
    "a terminal's": ({"down_blocks_1\x1b[31m_transformer_blocks_1": torch.ones(2)}, "is a LoRA of SDXL"),
    "SD1": ({FAR.format(0): torch.ones(2, 768)}, "is a LoRA of Stable Diffusion 1 or 2"),
    "FLUX": (
        {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 2)},
        "is a LoRA of FLUX.1",
    ),
    "FLUX.2": (
        {"transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.x": torch.ones(2)},
        "is a LoRA of FLUX.2",
    ),
    "Qwen": ({"transformer_blocks.0.img_mlp.net.2.lora_A.weight": torch.ones(2, 2)}, "is a LoRA of Qwen-Image"),
    "Wan": ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 2)}, "is a LoRA of Wan"),
    "another width": ({f"{GOOD}.lora_A.weight": torch.ones(2, 48)}, "is for a width of 48, this network has 32"),
    "another output": ({f"{GOOD}.lora_B.weight": torch.ones(64, 2)}, "is for a width of 64, this network has 32"),
    "ranks": ({f"{GOOD}.lora_B.weight": torch.ones(32, 3)}, r"\[2, 32\] and \[32, 3\], which do not agree"),
    "no matrix": ({f"{GOOD}.lora_A.weight": torch.ones(2, 32, 1, 1)}, r"\[2, 32, 1, 1\].*do not agree"),
    "a number": ({f"{GOOD}.lora_A.weight": torch.tensor(1.0)}, "do not agree"),
    "no rank": ({f"{GOOD}.lora_A.weight": torch.ones(0, 32), f"{GOOD}.lora_B.weight": torch.ones(32, 0)}, "rank of 0"),
    "a huge rank": (
        {f"{GOOD}.lora_A.weight": torch.ones(1025, 32), f"{GOOD}.lora_B.weight": torch.ones(32, 1025)},
        "has a rank of 1025, which is not 1 to 1024",
    ),
    "alpha of a shape": ({f"{GOOD}.alpha": torch.ones(2)}, "alpha that is not a number"),
    "alpha not finite": (
        {f"{GOOD}.alpha": torch.tensor(float("nan"))},
        "alpha that is not a number under 1000000: nan",
    ),
    "alpha infinite": ({f"{GOOD}.alpha": torch.tensor(float("inf"))}, "alpha that is not a number"),
    "not finite": ({f"{GOOD}.lora_A.weight": torch.full((2, 32), float("nan"))}, "not finite"),
    "up not finite": ({f"{GOOD}.lora_B.weight": torch.full((32, 2), float("-inf"))}, "not finite"),
    "too large with alpha": (
        {f"{GOOD}.lora_B.weight": torch.full((32, 2), 3e38), f"{GOOD}.alpha": torch.tensor(9.0)},
        "not finite",
    ),
    "whole numbers": ({f"{GOOD}.lora_A.weight": torch.ones(2, 32, dtype=torch.int8)}, "torch.int8 and torch.float32"),
    "whole numbers in up": ({f"{GOOD}.lora_B.weight": torch.ones(32, 2, dtype=torch.int32)}, "not floating point"),
    "twice": (
        {f"lora_transformer_{GOOD[12:].replace('.', '_')}.lora_down.weight": torch.ones(2, 32)},
        "for the same place",
    ),
    "twice by fusion": (
        KOHYA.file({"joint_blocks.0.x_block.attn.qkv": (torch.ones(2, 32), torch.ones(96, 2))}),
        "transformer_blocks.0.attn.to_q stands in the file twice",
    ),
    "a long name": ({"x" * 257: torch.ones(1)}, "names of over 256 characters"),
    "much without a place": (
        {f"a{number}.alpha": torch.ones(1) for number in range(1001)},
        "1001 tensors have no place",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_lora_of_this_model_is_named(checkpoints: Path, case: str) -> None:
    added, words = REFUSED[case]
    with pytest.raises(ValueError, match=words) as caught:
        match(BARE | added, {"transformer": network(checkpoints / "sd3")})
    assert len(str(caught.value)) < 700 and str(caught.value).isprintable()


ALONE: dict[str, tuple[State, str]] = {
    "empty": ({}, "is no LoRA of this model"),
    "no other half": ({f"{GOOD}.lora_A.weight": torch.ones(2, 32)}, "is there without its other half"),
    "no first half": ({f"{GOOD}.lora_B.weight": torch.ones(32, 2)}, "is there without its other half"),
    "alpha alone": ({f"{GOOD}.alpha": torch.ones(1)}, "is there without its other half"),
    "nothing has a place": ({f"{GOOD}_x.lora_A.weight": torch.ones(2, 32)}, "1 tensors have no place, as 'trans"),
    "a checkpoint": ({"transformer_blocks.0.attn.to_q.weight": torch.ones(2)}, "is no LoRA of this model"),
    "FLUX's by width": (
        KOHYA.file({"joint_blocks.0.x_block.attn.proj": (torch.ones(2, 96), torch.ones(96, 2))}),
        "96, this network has 32",
    ),
}


@pytest.mark.parametrize("case", ALONE)
def test_what_lacks_something_is_named(checkpoints: Path, case: str) -> None:
    state, words = ALONE[case]
    with pytest.raises(ValueError, match=words):
        match(state, {"transformer": network(checkpoints / "sd3")})


def test_an_encoder_that_fits_does_not_make_another_networks_lora_fit(checkpoints: Path) -> None:
    networks = {
        "transformer": network(checkpoints / "sd3"),
        "text_encoder": network(checkpoints / "sd3", "text_encoder", "CLIPTextModelWithProjection"),
    }
    pair = torch.ones(2, 16), torch.ones(16, 2)
    text = Format("lora_te1_", flat=True).file({"text_model.encoder.layers.0.self_attn.q_proj": pair})
    assert len(match(text, networks).pairs) == 1
    with pytest.raises(ValueError, match="is no LoRA of this model"):
        match(text | FORMATS["peft"].file({"layers.0.qkv": pair}), networks)


@pytest.mark.parametrize(
    "settings",
    [
        "{",
        "[]",
        "1",
        '{"alpha_pattern": 3}',
        "[" * 10_000,
        '{"lora_alpha": "x"}',
        '{"lora_alpha": NaN}',
        '{"lora_alpha": null}',
        '{"alpha_pattern": {"to_q": []}}',
        '{"transformer.lora_alpha": ' + "9" * 400 + "}",
    ],
)
def test_settings_that_are_not_pefts(checkpoints: Path, settings: str) -> None:
    with pytest.raises(ValueError, match=r"not peft's settings|alpha that is not a number"):
        match(BARE, {"transformer": network(checkpoints / "sd3")}, {"lora_adapter_metadata": settings})


def test_a_network_of_fewer_blocks(fluxes: Path) -> None:
    """As pruned FLUX variants are: what the network has is matched, what it lacks is reported."""
    blank = network(fluxes / "dev", kind="FluxTransformer2DModel")
    pair = torch.ones(2, 48), torch.ones(48, 2)
    found = match(
        KOHYA.file({f"double_blocks.{index}.img_attn.proj": pair for index in range(19)}), {"transformer": blank}
    )
    assert len(found.pairs) == 2 and len(found.unmatched) == 17 * 3
