"""Layers of a CLIP that a U-Net's request leaves out: those that it has, and no others."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from app.families.unet import layer
from tests.parts.requests import refused


@pytest.mark.parametrize(("normed", "most"), [(True, 3), (False, 2)])
def test_more_layers_than_it_has_are_refused(normed: bool, most: int) -> None:
    """Of an SDXL's CLIPs, which read the last layer but one, a request can leave out one less."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 1}
    network, ids = CLIPTextModel(CLIPTextConfig(vocab_size=16, eos_token_id=15, **sizes)), torch.tensor([[1, 2, 15]])
    with torch.inference_mode():
        assert layer(most if normed else most + 1, normed)(network, ids)[0].shape == (1, 3, 8)
        with refused("invalid_value", f"^clip_skip: this model can leave out 0 to {most} layers$") as error:
            layer(most + 1 if normed else most + 2, normed)(network, ids)
    assert error.value.param == "clip_skip"
