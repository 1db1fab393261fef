"""Nearest drawing: which emoji a picture shows, how large and where, by squared error over all drawings there are.

Pictures and the colours they were asked on come in, matches go out.

With F and A a drawing's premultiplied colour and alpha, the picture X is compared with F + (1 - A) c. On Y = X - c the
squared error is |Y|^2 - 2 Y.(F - A c) + |F - A c|^2, so one matrix product of (F, A) with patches of (Y, -Y.c) gives it
at every place at once. That is done for every drawing at 32 pixels; the best are measured again in full.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from data import COLOURS, Scene, Subject, render
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

ROUGH, REFINED = 32, 10
SIDES = (13, 15, 17, 21, 23, 25, 27, 29, 32)  # of drawings in pictures of 32 pixels: those of scenes are near


@dataclass(frozen=True)
class Match:
    """One drawing laid into a picture: upper left corner and side in pixels, root mean squared error of 255 levels."""

    subject: int
    drawing: int
    mirrored: bool
    side: int
    x: int
    y: int
    error: float


def sprite(subject: Subject, drawing: int, side: int) -> Tensor:
    """float [4, side, side] in 0 to 1: premultiplied colour, and alpha."""
    pixels = subject.drawings[drawing].resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(pixels, dtype=np.float32) / 255).permute(2, 0, 1)


def features(pictures: Tensor, colours: Tensor) -> Tensor:
    """float [n, 3, h, w] and [n, 3] in 0 to 1 -> (Y, -Y.c), float [n, 4, h, w]."""
    y = pictures - colours[:, :, None, None]
    return torch.cat([y, -(y * colours[:, :, None, None]).sum(1, keepdim=True)], dim=1)


def energy(sprites: Tensor, colours: Tensor) -> Tensor:
    """|F - A c|^2 of each drawing [m, 4, s, s] on each colour [n, 3]: float [n, m]."""
    colour, alpha = sprites[:, :3].flatten(2), sprites[:, 3:].flatten(2)
    mixed = colours @ (colour * alpha).sum(2).T
    return colour.pow(2).sum((1, 2)) - 2 * mixed + colours.pow(2).sum(1)[:, None] * alpha.pow(2).sum((1, 2))


def twins(subjects: list[Subject]) -> list[set[int]]:
    """For each subject those that have a drawing in common with it, mirrored or not, and itself.

    No picture can tell them apart: a drawing may be mirrored, so the first and the last quarter of the moon are one.
    """
    drawings = [(index, d) for index, s in enumerate(subjects) for d in range(len(s.drawings))]
    small = torch.stack([sprite(subjects[s], d, ROUGH) for s, d in drawings])
    on_gray = small[:, :3] + (1 - small[:, 3:]) * 0.5
    flat, owner = on_gray.flatten(1), [s for s, _ in drawings]
    same = [{index} for index in range(len(subjects))]
    for other in (flat, on_gray.flip(3).flatten(1)):
        gap = torch.cdist(flat, other) * 255 / flat.shape[1] ** 0.5
        for one, two in (gap < 3).nonzero().tolist():
            same[owner[one]].add(owner[two])
    return same


class Nearest:
    """All drawings of subjects, ready to be looked for."""

    def __init__(
        self,
        subjects: list[Subject],
        device: str = "cpu",
        among: Iterable[int] | None = None,
        sides: tuple[int, ...] = SIDES,
    ) -> None:
        """among: the places in `subjects` that are looked for; else all. sides: those tried at 32 pixels."""
        self.subjects, self.device, self.sides = subjects, device, sides
        places = range(len(subjects)) if among is None else among
        self.drawings = [(index, d) for index in places for d in range(len(subjects[index].drawings))]
        self.small = [torch.stack([sprite(subjects[s], d, side) for s, d in self.drawings]) for side in sides]

    @torch.inference_mode()
    def find(self, pictures: np.ndarray, colours: list[str], batch: int = 8) -> list[list[Match]]:
        """For each picture, uint8 [n, side, side, 3], the nearest drawing of each near subject, best first."""
        full = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2).float() / 255
        asked = torch.tensor([COLOURS[c] for c in colours], device=self.device) / 255
        rough = self._rough(F.avg_pool2d(full, full.shape[2] // ROUGH), asked, batch)
        return [self._refine(*each) for each in zip(pictures, full, asked, colours, rough, strict=True)]

    def _rough(self, pictures: Tensor, asked: Tensor, batch: int) -> list[Tensor]:
        """For each picture, the REFINED best as rows (drawing, mirrored, side, x, y) in pixels of 32."""
        count, device = len(pictures), pictures.device
        best = torch.full((count, 2, len(self.drawings)), torch.inf, device=device)
        where = torch.zeros(count, 2, len(self.drawings), 3, dtype=torch.long, device=device)
        seen = torch.stack([features(p, asked) for p in (pictures, pictures.flip(3))], dim=1)
        for side, sprites in zip(self.sides, (each.to(device) for each in self.small), strict=True):
            stride = 2 if ROUGH - side > 3 else 1  # to the half of it, within the reach of `_local`
            columns = (ROUGH - side) // stride + 1
            base = energy(sprites, asked)
            for start in range(0, count, batch):
                some = slice(start, start + batch)
                patches = F.unfold(seen[some].flatten(0, 1), side, stride=stride)
                least, place = (sprites.flatten(1) @ patches).max(dim=2)
                score = base[some, None] - 2 * least.unflatten(0, (-1, 2))
                place = place.unflatten(0, (-1, 2))
                x, y = place % columns * stride, place // columns * stride
                x[:, 1] = ROUGH - side - x[:, 1]
                better = score < best[some]
                best[some] = torch.where(better, score, best[some])
                spot = torch.stack([torch.full_like(x, side), x, y], dim=-1)
                where[some] = torch.where(better[..., None], spot, where[some])
        order = best.flatten(1).topk(min(REFINED, best[0].numel()), largest=False).indices
        spots = where.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, 3))
        which = torch.stack([order % len(self.drawings), order // len(self.drawings)], dim=-1)
        return list(torch.cat([which, spots], dim=-1).cpu())

    def _refine(self, picture: np.ndarray, full: Tensor, asked: Tensor, colour: str, rough: Tensor) -> list[Match]:
        """Each rough match at the best of the sides and places around it; the best match of each subject."""
        found: dict[int, Match] = {}
        down = full.shape[1] // ROUGH
        for which, mirrored, *spot in rough.tolist():
            subject, drawing = self.drawings[which]
            best = (float("inf"), *(down * each for each in spot))
            for steps in ((-6, 0, 6), (-4, 4), (-2, 2), (-1, 1)):
                _, s, x, y = best
                best = min(best, *(self._local(full, asked, which, bool(mirrored), s + step, x, y) for step in steps))
            _, s, x, y = best
            scene = Scene(subject, colour, True, False, None, drawing, bool(mirrored), s, x, y)
            gap = render(scene, self.subjects[subject], len(picture)).astype(np.float32) - picture
            match = Match(subject, drawing, bool(mirrored), s, x, y, float(np.sqrt(np.square(gap).mean())))
            if subject not in found or match.error < found[subject].error:
                found[subject] = match
        return sorted(found.values(), key=lambda match: match.error)

    def _local(
        self, full: Tensor, asked: Tensor, which: int, mirrored: bool, side: int, x: int, y: int
    ) -> tuple[float, int, int, int]:
        """(squared error but for a constant, side, x, y) of the best place within 5 pixels of (x, y)."""
        size = full.shape[1]
        side = min(side, size)
        subject, drawing = self.drawings[which]
        small = sprite(self.subjects[subject], drawing, side).to(full.device)
        small = small.flip(2) if mirrored else small
        left, top = (max(0, min(place - 5, size - side)) for place in (x, y))
        window = full[:, top : min(y + 5, size - side) + side, left : min(x + 5, size - side) + side]
        errors = energy(small[None], asked[None]) - 2 * F.conv2d(features(window[None], asked[None]), small[None])[0, 0]
        at = int(errors.argmin())
        return float(errors.min()), side, left + at % errors.shape[1], top + at // errors.shape[1]
