"""The parts of the tiny checkpoints: VAE, CLIPs, T5, tokenizers; drawn weights and the files they are written to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

WORDS = (
    "red green blue yellow black white small large round apple car cat dog fish house moon star sun tree "
    "a an and at big in of on the with background face heart flower"
)
TEXT = 24


class Payload:
    """What a pickle may hold: it makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def write_vae(folder: Path, seed: int, **changes: Any) -> None:
    """An AutoencoderKL: 4 latent channels at a quarter of the size."""
    from diffusers import AutoencoderKL

    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 16),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 32,
    }
    write_network(AutoencoderKL(**{**config, **changes}), folder, seed)


def write_first_clip(folder: Path, tokenizer: Path, seed: int) -> None:
    """As SD3's CLIP-L: pads with <|endoftext|>, eos_token_id 2 (which means argmax), vocab.json and merges.txt."""
    vocab, merges = _bpe()
    tokenizer.mkdir(parents=True, exist_ok=True)
    write_json(tokenizer / "vocab.json", vocab)
    pairs = "\n".join(" ".join(pair) for pair in merges)
    (tokenizer / "merges.txt").write_text(f"#version: 0.2\n{pairs}\n", encoding="utf-8")
    write_json(tokenizer / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT})
    _write_clip(folder, seed, len(vocab), hidden_size=16, projection_dim=16, eos_token_id=2, bos_token_id=0)


def write_pooled_clip(folder: Path, tokenizer: Path, seed: int) -> None:
    """As FLUX's CLIP-L: SD3's without its projection, keys with the prefix of files older than transformers 5."""
    from transformers import CLIPTextConfig, CLIPTextModel

    write_first_clip(folder, tokenizer, seed)
    (folder / "model.safetensors").unlink()
    write_network(CLIPTextModel(CLIPTextConfig.from_pretrained(folder)), folder, seed, prefix="text_model.")


def write_second_clip(
    folder: Path, tokenizer: Path, seed: int, *, projection: bool = True, hidden_act: str = "quick_gelu"
) -> None:
    """As SD3's CLIP-G: pads with "!", the true eos_token_id, tokenizer.json. SD 2's has no `projection`."""
    from transformers import CLIPTokenizer

    vocab, merges = _bpe()
    CLIPTokenizer(vocab=vocab, merges=merges, pad_token="!", model_max_length=TEXT).save_pretrained(tokenizer)
    eos = vocab["<|endoftext|>"]
    facts = {"hidden_size": 24, "projection_dim": 24, "eos_token_id": eos, "bos_token_id": eos - 1}
    _write_clip(folder, seed + 1, len(vocab), projection=projection, hidden_act=hidden_act, **facts)


def _write_clip(folder: Path, seed: int, vocab: int, projection: bool = True, **changes: Any) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    facts = {"hidden_act": "quick_gelu", **changes}
    config = CLIPTextConfig(
        vocab_size=vocab,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TEXT,
        pad_token_id=0,
        **facts,
    )
    write_network((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), folder, seed)


def write_t5(folder: Path, tokenizer: Path, seed: int) -> None:
    """As SD3's T5 encoder: gated gelu, shared.weight tied to the encoder's embedding, tokenizer.json."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = sorted(
        {*"abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"} | {letter for word in WORDS.split() for letter in word}
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -8.0)]
    pieces += [(f"\u2581{word}", -3.0) for word in WORDS.split() if len(word) > 1] + [
        (letter, -6.0) for letter in letters
    ]
    T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512).save_pretrained(tokenizer)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=48,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    write_network(T5EncoderModel(config), folder, seed)


def write_network(network: Any, folder: Path, seed: int, prefix: str = "") -> None:
    """Draw the weights of a diffusers or transformers module and write config and safetensors, keys after `prefix`."""
    from safetensors.torch import save_file

    _draw(network, seed)
    _copy_embedders(network)
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(network, "save_config"):
        network.save_config(folder)
        name = "diffusion_pytorch_model.safetensors"
    else:
        network.config.architectures = [type(network).__name__]
        network.config.save_pretrained(folder)
        name = "model.safetensors"
    tied = {"encoder.embed_tokens.weight"}
    state = {prefix + key: value.contiguous() for key, value in network.state_dict().items() if key not in tied}
    save_file(state, folder / name, metadata={"format": "pt"})


def _draw(network: Any, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in sorted(network.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if "embed" in key.split(".")[-2] or "shared" in key or "relative" in key:
                weight.copy_(noise)
            elif weight.ndim > 1:
                weight.copy_(noise * (weight[0].numel() ** -0.5))
            else:
                weight.copy_(0.1 * noise + (1.0 if key.endswith("weight") else 0.0))


def _copy_embedders(network: Any) -> None:
    """A DiT's blocks have copies of one timestep and label embedder, as in every checkpoint of the original's."""
    blocks = [block for block in getattr(network, "transformer_blocks", ()) if getattr(block.norm1, "emb", None)]
    for block in blocks[1:]:
        block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())


def _bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE in which the words above are single tokens; <|endoftext|> has the highest id, as in CLIP."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    vocab = letters + [f"{letter}</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in (word for word in WORDS.split() if len(word) > 1):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for end in range(1, len(pieces)):
            pair = ("".join(pieces[:end]), pieces[end])
            merges += [pair] if pair not in merges else []
    vocab += [a + b for a, b in merges]
    return {token: i for i, token in enumerate(dict.fromkeys([*vocab, "<|startoftext|>", "<|endoftext|>"]))}, merges


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def spoil(file: Path, tensor: str, value: float = float("nan")) -> None:
    """Make the first number of a tensor in a safetensors file not a number."""
    from safetensors.torch import load_file, save_file

    state = load_file(file)
    state[tensor].view(-1)[0] = value
    save_file(state, file, {"format": "pt"})


def read_state(place: Path) -> Any:
    """All tensors of a part's folder or file at once, as the server reads them."""
    from app.checkpoints.tensors import read_states

    return {key: value for shard in read_states(place) for key, value in shard.items()}
