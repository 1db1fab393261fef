"""Facts of the families of networks that can be known without their code, so that no other module asks for a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FamilyFacts:
    """What is common to the models of a family.

    draws: what a picture is drawn from, a class label or a prompt. embedded_guidance: its network may take the scale of
    guidance as an input. skip_layers: it may have skip-layer guidance. torch_files: its authors publish pickled .pt
    files, which have to be converted.
    """

    draws: Literal["class", "prompt"]
    embedded_guidance: bool = False
    skip_layers: bool = False
    torch_files: bool = False


FACTS: dict[str, FamilyFacts] = {
    "dit": FamilyFacts("class", torch_files=True),
    "sd3": FamilyFacts("prompt", skip_layers=True),
    "flux": FamilyFacts("prompt", embedded_guidance=True),
}
