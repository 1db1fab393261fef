"""Schedule: the noise process that a network was trained on, and the grid that its samplers walk, as a card says it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A table of a card: frozen, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DynamicShift(Section):
    """FLUX's resolution-dependent shift: exp of a line through (base_tokens, base) and (max_tokens, max)."""

    base_tokens: int = 256
    max_tokens: int = 4096
    base: float = 0.5
    max: float = 1.15

    @model_validator(mode="after")
    def _is_a_line(self) -> DynamicShift:
        if self.max_tokens <= self.base_tokens:
            raise ValueError("max_tokens must be over base_tokens")
        return self


class Schedule(Section):
    """The noise process the network was trained on, and the grid its samplers walk.

    kind "diffusion": alpha-bar from betas; "flow": x_t = (1 - s) x0 + s noise. `spacing` names the grid:
    leading, linspace, trailing or respaced (the original DiT's) for diffusion, sd3 or flux for flow. `variance` is
    what ddpm adds back. `clip_sample` and `thresholding` are there to be refused: they are not affine.
    """

    kind: Literal["diffusion", "flow"]
    prediction: Literal["epsilon", "v", "sample", "flow"] = "epsilon"
    spacing: Literal["leading", "linspace", "trailing", "respaced", "sd3", "flux"] = "leading"
    train_steps: Annotated[int, Field(ge=1, le=10_000)] = 1000
    betas: Literal["linear", "scaled_linear"] = "linear"
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 2e-2
    steps_offset: Annotated[int, Field(ge=0, le=10)] = 0
    set_alpha_to_one: bool = True
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"
    shift: Annotated[float, Field(gt=0)] = 1.0
    dynamic_shift: DynamicShift | None = None
    clip_sample: Literal[False] = False
    thresholding: Literal[False] = False

    @model_validator(mode="before")
    @classmethod
    def _flow_defaults(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("kind") == "flow":
            raw = {"prediction": "flow", "spacing": "sd3", **raw}
        return raw

    @model_validator(mode="after")
    def _agrees(self) -> Schedule:
        flow = self.kind == "flow"
        if flow != (self.prediction == "flow") or flow != (self.spacing in ("sd3", "flux")):
            raise ValueError(f"kind {self.kind}, prediction {self.prediction}, spacing {self.spacing} do not agree")
        return self
