"""The families by the name that a card gives. Importing this imports diffusers and transformers (seconds)."""

from app.families.base import Family
from app.families.dit import DiT
from app.families.flux import Flux
from app.families.sd3 import SD3
from app.families.unet import UNet

FAMILIES: dict[str, type[Family]] = {"dit": DiT, "sd3": SD3, "flux": Flux, "unet": UNet}

__all__ = ["FAMILIES", "SD3", "DiT", "Flux", "UNet"]
