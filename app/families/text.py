"""Text: prompts to embeddings, padded as diffusers pads them, each different text once; and the cache of them.

How a network joins the encoders' outputs is in sd3.py, flux.py and unet.py.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from app.errors import InvalidValue
from app.families.adapters import Adapted, Used, spans_of_all
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

Cut = Callable[[Any, str, int], str]
"""How a family finds the end of a text that an encoder does not see: `cut_text`, or a cache in front of it."""

CUTS = 1024
"""Texts whose cut ends are kept, counted for each tokenizer."""


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


def prompt_text(condition: Condition | None) -> str:
    """The text of a prompt, "" for none. Raises InvalidValue for a class label."""
    if condition is None:
        return ""
    if not isinstance(condition, Prompt):
        raise InvalidValue("this model takes a prompt, not a class label", param="class_label")
    return condition.text


class TextCache:
    """Outputs by (encoder, text, length, batch, adapters) in at most `budget` bytes of the device.

    The least recently used leaves first. Models that share an encoder share its outputs. The empty prompt of each
    encoder stays at the length last asked for, whatever the budget. version: of a network's weights, which may have
    changed while away. cut: `cut_text`, cached.
    """

    def __init__(self, budget: int, version: Callable[[object], int]) -> None:
        self.bytes = self._hits = self._misses = 0
        self._budget, self._version = budget, version
        self.kept: OrderedDict[tuple[Encoder, str, int, int | None, tuple[object, ...]], States] = OrderedDict()
        self._versions: dict[Encoder, int] = {}
        self._models: dict[Encoder, set[str]] = {}  # that asked for it
        self._empty: dict[Encoder, int] = {}  # the length at which its empty prompt was last asked for
        self.cut = lru_cache(CUTS)(cut_text)

    def read(
        self, model: str, used: Used, encoder: Encoder, texts: Sequence[str], length: int, batch: int | None
    ) -> States:
        """As `read_texts`, but encodes only the texts that are not cached. model: the id of the one that asks.

        used: the adapters of all these texts, of which those count that change the encoder.
        """
        version = self._version(encoder.network)
        if self._versions.setdefault(encoder, version) != version:
            self._drop(encoder)
            self._versions[encoder] = version
        self._models.setdefault(encoder, set()).add(model)
        used = tuple((lora, weight) for lora, weight in used if encoder.network in lora.places)
        own = tuple((lora, self._version(lora), weight) for lora, weight in used)
        unique = {text: (encoder, text, length, batch, own) for text in texts}
        fresh = [text for text, name in unique.items() if name not in self.kept]
        if fresh:
            with Adapted(encoder.network, spans_of_all(used, encoder.network.device)) if used else nullcontext():
                outputs = read_texts(encoder, fresh, length, batch)
            for text, *states in zip(fresh, *(output.chunk(len(fresh)) for output in outputs), strict=True):
                kept = self.kept[unique[text]] = tuple(state.clone() for state in states)
                self.bytes += _bytes(kept)
        self._hits += len(unique) - len(fresh)
        self._misses += len(fresh)
        for name in unique.values():
            self.kept.move_to_end(name)
        if "" in unique and not own:
            self._empty[encoder] = length
        found = [self.kept[unique[text]] for text in texts]
        self._trim()
        return tuple(torch.cat(states) for states in zip(*found, strict=True))

    def forget(self, model: str) -> None:
        """Drop what is kept of a model; outputs of its encoders stay where other models asked for them too."""
        self.cut.cache_clear()
        for encoder, models in list(self._models.items()):
            models.discard(model)
            if not models:
                del self._models[encoder]
                self._drop(encoder)

    def count(self) -> tuple[int, int]:
        """(hits, misses) since the last call, counted for each encoder and each text of a batch."""
        counted, self._hits, self._misses = (self._hits, self._misses), 0, 0
        return counted

    def _trim(self) -> None:
        for name in list(self.kept) if self.bytes > self._budget else ():
            encoder, text, length, _, own = name
            if self.bytes > self._budget and (text or own or self._empty.get(encoder) != length):
                self.bytes -= _bytes(self.kept.pop(name))

    def _drop(self, encoder: Encoder) -> None:
        self._versions.pop(encoder, None)
        self._empty.pop(encoder, None)
        for name in [name for name in self.kept if name[0] == encoder]:
            self.bytes -= _bytes(self.kept.pop(name))


def _bytes(states: States) -> int:
    return sum(state.nbytes for state in states)
