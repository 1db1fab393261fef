"""Text: prompts to embeddings, padded as diffusers pads them, each different text once.

How a network joins the encoders' outputs is in sd3.py and flux.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from app.errors import InvalidValue
from app.request import Condition, Prompt

State = dict[str, torch.Tensor]
States = tuple[torch.Tensor, ...]
"""The outputs of an encoder for B texts: tensors [B, ...]."""


class Encoder(NamedTuple):
    """A text encoder, its tokenizer, and the function that picks its outputs for a network.

    Two are equal if all three are the same objects: then their outputs for a text are equal, in whichever model.
    """

    network: Any
    tokenizer: Any
    states: Callable[[Any, torch.Tensor], States]


Read = Callable[[Encoder, Sequence[str], int, int | None], States]
"""How a family gets an encoder's outputs: `read_texts`, or a cache in front of it."""


def clip_keys(state: State, expected: Mapping[str, object]) -> State:
    """CLIP files with or without the `text_model.` prefix, and with the position_ids that old ones hold.

    A projection is left out for a CLIPTextModel, which has none: the one file of a CLIP-L serves SD3 and FLUX.
    """
    prefix, projection = "text_model.", "text_projection."
    prefixed = any(key.startswith(prefix) for key in expected)
    unused = {"embeddings.position_ids"} | ({f"{projection}weight"} - expected.keys())
    found: State = {}
    for key, value in state.items():
        bare = key.removeprefix(prefix)
        if bare not in unused:
            found[prefix + bare if prefixed and not bare.startswith(projection) else bare] = value
    return found


def read_texts(encoder: Encoder, texts: Sequence[str], length: int, batch: int | None) -> States:
    """The encoder's outputs for each of `texts`, padded to `length` tokens; each different text is encoded once.

    batch: run forwards of exactly this many texts (the last filled up by repeating), or None for one forward of all.
    """
    unique = list(dict.fromkeys(texts))
    size = batch or len(unique)
    chunks = [unique[start : start + size] for start in range(0, len(unique), size)]
    outputs = []
    for chunk in chunks:
        ids = token_ids(encoder.tokenizer, chunk + chunk[-1:] * (size - len(chunk)), length)
        outputs.append(encoder.states(encoder.network, ids.to(encoder.network.device)))
    rows = torch.tensor([unique.index(text) for text in texts])
    return tuple(torch.cat(part)[rows.to(part[0].device)] for part in zip(*outputs, strict=True))


def clip_states(network: Any, ids: torch.Tensor) -> States:
    """(last hidden states but one [B, length, width], projected pooled state [B, projection])."""
    output = network(ids, output_hidden_states=True)
    return output.hidden_states[-2], output.text_embeds


def clip_pooled(network: Any, ids: torch.Tensor) -> States:
    """Pooled state before any projection [B, width], which FLUX takes, of a CLIP with or without a projection."""
    return (getattr(network, "text_model", network)(ids).pooler_output,)


def t5_states(network: Any, ids: torch.Tensor) -> States:
    """Final hidden states [B, length, width]. NOTE: no attention mask, as in SD3's and FLUX's pipelines."""
    return (network(ids)[0],)


def token_ids(tokenizer: Any, texts: list[str], length: int) -> torch.Tensor:
    """int64 [B, length]: cut or padded with the tokenizer's own padding token, special tokens included."""
    ids: torch.Tensor = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def cut_text(tokenizer: Any, text: str, length: int) -> str:
    """The end of `text` that does not fit in `length` tokens, as the user wrote it; empty when all fits."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False).offset_mapping
    room = max(length - tokenizer.num_special_tokens_to_add(), 0)
    return text[offsets[room][0] :] if len(offsets) > room else ""


def prompt_text(condition: Condition) -> str:
    """The text of a prompt. Raises InvalidValue for a class label."""
    if not isinstance(condition, Prompt):
        raise InvalidValue("this model takes a prompt, not a class label", param="class_label")
    return condition.text
