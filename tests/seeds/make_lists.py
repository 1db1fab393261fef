"""The committed lists of names and shapes, made from the authors' own model code at true size, without weights.

    python tests/seeds/make_lists.py dit CHECKOUT COMMIT > tests/seeds/lists/dit.txt   (also: sd3, flux, unet, clip)

CHECKOUT is a clone of the repository that the head of the list names, at COMMIT; its code wants einops, and timm for
DiT, torchvision for CLIP. Networks are built on the meta device, so this takes seconds and no memory. Tests read the
lists (read_lists) and need none of this.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

Shapes = dict[str, tuple[int, ...]]

LISTS = Path(__file__).parent / "lists"
HEADS = {
    "dit": ("facebookresearch/DiT", "models.py", "CC BY-NC 4.0"),
    "sd3": ("Stability-AI/sd3.5", "mmditx.py and sd3_impls.py", "MIT"),
    "flux": ("black-forest-labs/flux", "src/flux/model.py and src/flux/modules/autoencoder.py", "Apache-2.0"),
    "unet": ("Stability-AI/generative-models", "sgm/modules/diffusionmodules/openaimodel.py", "MIT"),
    "clip": ("mlfoundations/open_clip", "src/open_clip/transformer.py", "MIT"),
}
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")
_RANGE = re.compile(r"\{(\d+)-(\d+)\}")


def dit() -> Iterator[tuple[str, Any]]:
    """All twelve at 256 px, and the XL/2 at 512."""
    models = importlib.import_module("models").DiT_models
    for name, build in models.items():
        yield f"{name} 256", build(input_size=32)
    yield "DiT-XL/2 512", models["DiT-XL/2"](input_size=64)


def sd3() -> Iterator[tuple[str, Any]]:
    """What BaseModel of sd3_impls.py builds for files of these sizes, which it reads off the file itself."""
    mmdit, vae = importlib.import_module("mmditx").MMDiTX, importlib.import_module("sd3_impls").SDVAE
    sizes = (("sd3-medium", 24, 192, None), ("sd3.5-large", 38, 192, 0), ("sd3.5-medium", 24, 384, 13))
    for name, depth, side, dual in sizes:
        context = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * depth}}
        yield (
            name,
            mmdit(
                input_size=None,
                pos_embed_max_size=side,
                patch_size=2,
                in_channels=16,
                depth=depth,
                num_patches=side**2,
                adm_in_channels=2048,
                context_embedder_config=context,
                qk_norm=None if dual is None else "rms",
                x_block_self_attn_layers=list(range(dual or 0)),
            ),
        )
    yield "autoencoder", vae()


def flux() -> Iterator[tuple[str, Any]]:
    """The two open models with their parameters in `configs` of src/flux/util.py, and the autoencoder of both."""
    model, autoencoder = importlib.import_module("flux.model"), importlib.import_module("flux.modules.autoencoder")
    sizes = {"in_channels": 64, "out_channels": 64, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072}
    sizes |= {"mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56]}
    for name, guided in (("flux-schnell", False), ("flux-dev", True)):
        yield name, model.Flux(model.FluxParams(**sizes, theta=10_000, qkv_bias=True, guidance_embed=guided))
    sizes = {"resolution": 256, "in_channels": 3, "ch": 128, "out_ch": 3, "ch_mult": [1, 2, 4, 4]}
    sizes |= {"num_res_blocks": 2, "z_channels": 16, "scale_factor": 0.3611, "shift_factor": 0.1159}
    yield "autoencoder", autoencoder.AutoEncoder(autoencoder.AutoEncoderParams(**sizes))


def unet() -> Iterator[tuple[str, Any]]:
    """With the parameters of configs/inference/, and of CompVis/stable-diffusion v1-inference.yaml for sd1."""
    _bare("sgm", "sgm.modules", "sgm.modules.diffusionmodules")
    model = importlib.import_module("sgm.modules.diffusionmodules.openaimodel").UNetModel
    all_ = {"in_channels": 4, "out_channels": 4, "num_res_blocks": 2, "model_channels": 320}
    early = {**all_, "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4], "transformer_depth": 1}
    late = {"num_head_channels": 64, "use_linear_in_transformer": True}
    xl = {**all_, **late, "attention_resolutions": [4, 2], "num_classes": "sequential"}
    yield "sd1", model(**early, num_heads=8, context_dim=768)
    yield "sd2", model(**early, **late, context_dim=1024)
    depth = {"channel_mult": [1, 2, 4], "transformer_depth": [1, 2, 10]}
    yield "sdxl", model(**xl, **depth, context_dim=2048, adm_in_channels=2816)
    xl |= {"model_channels": 384, "channel_mult": [1, 2, 4, 4], "transformer_depth": 4}
    yield "sdxl-refiner", model(**xl, context_dim=[1280] * 4, adm_in_channels=2560)


def clip() -> Iterator[tuple[str, Any]]:
    """The text towers with their parameters in model_configs/; that of ViT-L-14 is OpenAI's."""
    _bare("open_clip")
    model = importlib.import_module("open_clip.transformer").TextTransformer
    for name, width, heads, layers in (
        ("ViT-L-14", 768, 12, 12),
        ("ViT-H-14", 1024, 16, 24),
        ("ViT-bigG-14", 1280, 20, 32),
    ):
        yield name, model(width=width, heads=heads, layers=layers, output_dim=width)


def _bare(*packages: str) -> None:
    """Import modules of these packages without what the packages import beside them."""
    for name in packages:
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = [str(Path(base, *name.split("."))) for base in sys.path[:2]]


def folded(shapes: Shapes) -> list[str]:
    """Lines of `name [shape]`, in which runs of blocks with the same tensors stand as one: blocks.{0-27}.x [3, 4]."""
    lines = list(shapes.items())
    for place in reversed(range(max(len(_NUMBER.findall(name)) for name in shapes))):
        runs: dict[tuple[Any, ...], list[int]] = {}
        for name, shape in lines:
            found = list(_NUMBER.finditer(name))[place : place + 1]
            before, number, after = (name, None, "") if not found else _cut(name, found[0])
            key = (before, number is None, after, shape)
            runs.setdefault(key, []).append(-1 if number is None else number)
        lines = [(name, key[3]) for key, numbers in runs.items() for name in _names(key, numbers)]
    return [f"{name} {list(shape)}" for name, shape in lines]


def _cut(name: str, found: re.Match[str]) -> tuple[str, int, str]:
    return name[: found.start()], int(found[0]), name[found.end() :]


def _names(key: tuple[Any, ...], numbers: list[int]) -> list[str]:
    before, plain, after, _ = key
    if plain:
        return [before]
    whole = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1))
    names = [f"{{{numbers[0]}-{numbers[-1]}}}"] if whole else [str(number) for number in numbers]
    return [f"{before}{name}{after}" for name in names]


def unfolded(line: str) -> Shapes:
    """The tensors of one line."""
    name, _, shape = line.partition(" ")
    sizes = tuple(int(size) for size in re.findall(r"\d+", shape))
    ranges = [range(int(first), int(last) + 1) for first, last in _RANGE.findall(name)]
    pattern = _RANGE.sub("{}", name)
    return {pattern.format(*numbers): sizes for numbers in product(*ranges)}


def read_lists(name: str) -> dict[str, Shapes]:
    """Every network of a committed list, by its name there."""
    found: dict[str, Shapes] = {}
    for line in (LISTS / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            current = found[line.strip("[]")] = {}
        elif line and not line.startswith("#"):
            current.update(unfolded(line))
    return found


def main() -> None:
    import torch

    name, checkout, commit = sys.argv[1:]
    repository, file, license = HEADS[name]
    sys.path[:0] = [checkout, f"{checkout}/src"]
    print(f"# Names and shapes of tensors, from {file} of github.com/{repository}")
    print(f"# at commit {commit} ({license}), by make_lists.py {name}.")
    with torch.device("meta"):
        for title, network in globals()[name]():
            shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
            assert {k: v for line in folded(shapes) for k, v in unfolded(line).items()} == shapes
            print(f"\n[{title}]\n# {len(shapes)} tensors, {sum(map(prod, shapes.values())):,} numbers")
            print("\n".join(folded(shapes)))


if __name__ == "__main__":
    main()
