"""The MMDiT's text side: tokenizers trained on captions, two small CLIP encoders and one small T5 encoder.

Embeddings are composed exactly as diffusers' StableDiffusion3Pipeline composes them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from data import Subject, caption, draw_scene
from folder import save_bf16
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CLIP_LENGTH, T5_LENGTH = 16, 14  # of 20,000 captions 0.2 % and 0.6 % are longer, and are cut
CLIP_WIDTHS, T5_WIDTH = (128, 128), 256
FOLDERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
SPACE = {"replacement": "▁", "prepend_scheme": "always", "split": True}
T5_SPECIAL = ["<pad>", "</s>", "<unk>"]
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
OTHER_WORDS = "a an and the of in with at on picture photo drawing icon emoji image big large tiny little colour color"


def corpus(subjects: list[Subject], each: int = 12) -> list[str]:
    """Captions over every subject: what the tokenizers are trained on."""
    rng = np.random.default_rng(0)
    lines = [caption(rng, draw_scene(rng, [subject]), subject) for subject in subjects for _ in range(each)]
    return lines + [name for s in subjects for name in s.names] * 4 + [OTHER_WORDS] * 50


def train_clip_tokenizer(lines: list[str], folder: Path, pad: str, size: int = 4096) -> None:
    """Byte-level BPE in CLIP's form: vocab.json, merges.txt and tokenizer_config.json."""
    like_clip = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=EOS))
    tokenizer.normalizer, tokenizer.pre_tokenizer = like_clip.normalizer, like_clip.pre_tokenizer
    letters = [chr(code) for code in range(33, 127)]
    letters += sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(letters))
    trainer = trainers.BpeTrainer(
        vocab_size=size, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    words = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges] + [BOS, EOS]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_LENGTH, "do_lower_case": True}
    config |= {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def t5_pieces(lines: list[str], size: int) -> list[tuple[str, float]]:
    """Unigram pieces: every word whole, in both letter cases, and the trainer's smaller pieces for all other text.

    NOTE: transformers rebuilds a T5 tokenizer from its pieces and drops any normalizer, so nothing folds letter case.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**SPACE)]
    )
    letters = [chr(code) for code in range(33, 127)] + ["▁"]
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=T5_SPECIAL, unk_token="<unk>", initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    small = dict(json.loads(tokenizer.to_str())["model"]["vocab"])
    words = sorted(set(re.findall(r"[0-9]*[a-z]+|[0-9]+", " ".join(lines).lower())))
    whole = dict.fromkeys(f"▁{form}" for word in words for form in (word, word.title()))
    pieces = [(word, -6.0) for word in whole] + [(",", -4.0)]
    pieces += [(piece, min(score, -7.0) - 2) for piece, score in small.items() if len(piece) < 5]
    unique = dict(reversed(pieces))
    return [(word, 0.0) for word in T5_SPECIAL] + [(p, s) for p, s in unique.items() if p not in T5_SPECIAL]


def train_t5_tokenizer(lines: list[str], folder: Path, size: int = 800) -> None:
    """Unigram in T5's form: tokenizer.json and tokenizer_config.json."""
    tokenizer = Tokenizer(models.Unigram(t5_pieces(lines, size), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**SPACE)]
    )
    tokenizer.decoder = decoders.Metaspace(**SPACE)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(T5_SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5TokenizerFast", "model_max_length": T5_LENGTH, "extra_ids": 0}
    config |= {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "additional_special_tokens": []}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def train_tokenizers(subjects: list[Subject], out: Path) -> None:
    """All three, unless `out` has them: later runs go on with the tokenizers they find."""
    if all((out / folder / "tokenizer_config.json").exists() for folder in FOLDERS):
        return
    lines = corpus(subjects)
    train_clip_tokenizer(lines, out / FOLDERS[0], pad=EOS)
    train_clip_tokenizer(lines, out / FOLDERS[1], pad="!")  # SD3's second tokenizer pads with "!" too
    train_t5_tokenizer(lines, out / FOLDERS[2])


def build_clip(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModelWithProjection(config)
    with torch.no_grad():  # NOTE: the class's own start, 0.02, is too faint for a network without a norm before it
        for name, p in model.named_parameters():
            if "embedding" in name:
                p.normal_(std=0.3 if "token" in name else 0.1)
    return model


def build_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=32,
        d_ff=2 * T5_WIDTH,
        num_layers=1,
        num_heads=T5_WIDTH // 32,
        feed_forward_proj="relu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config)


class Text(nn.Module):
    """The three encoders and their tokenizers: captions -> (prompt embeddings, pooled embeddings)."""

    def __init__(self, folder: Path, trained: Path | None = None) -> None:
        super().__init__()
        self.tokenizers = [CLIPTokenizer.from_pretrained(folder / name) for name in FOLDERS[:2]]
        self.tokenizers.append(T5TokenizerFast.from_pretrained(folder / FOLDERS[2]))
        if trained:
            kinds = (CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel)
            loaded = [k.from_pretrained(trained / n, dtype=torch.float32) for k, n in zip(kinds, ENCODERS, strict=True)]
        else:
            pairs = zip(self.tokenizers[:2], CLIP_WIDTHS, strict=True)
            loaded = [*(build_clip(t, width) for t, width in pairs), build_t5(self.tokenizers[2])]
        self.encoders = nn.ModuleList(loaded).train()

    def save(self, folder: Path) -> None:
        """The encoders' weights, in bf16; the tokenizers are there already."""
        for name, encoder in zip(ENCODERS, self.encoders, strict=True):
            save_bf16(encoder, folder / name)

    def ids(self, captions: list[str], device: torch.device) -> list[Tensor]:
        """Padded to the length that each tokenizer names and never masked, as diffusers does."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return [tokenizer(captions, **options).input_ids.to(device) for tokenizer in self.tokenizers]

    def forward(self, captions: list[str], kept: Tensor) -> tuple[Tensor, Tensor]:
        """[n, tokens, T5's width] and [n, both CLIPs' widths]; `kept` [n, 3] is 0 where an encoder is absent: zeros."""
        first, second, third = self.ids(captions, kept.device)
        one = self.encoders[0](first, output_hidden_states=True)
        two = self.encoders[1](second, output_hidden_states=True)
        t5 = self.encoders[2](third)[0] * kept[:, 2, None, None]
        outs = ((one, kept[:, 0]), (two, kept[:, 1]))
        hidden = torch.cat([out.hidden_states[-2] * k[:, None, None] for out, k in outs], dim=-1)
        pooled = torch.cat([out.text_embeds * k[:, None] for out, k in outs], dim=-1)
        return torch.cat([F.pad(hidden, (0, t5.shape[-1] - hidden.shape[-1])), t5], dim=1), pooled
