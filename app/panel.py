"""Panel: pictures side by side with their labels: one sheet on white, rows named at the left, columns above.

The font is the one in Pillow (Aileron, ASCII and a few signs): accents are left out, and a letter of another script is
a box. `unreadable` lists such letters.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST, LARGEST = 256, 16_000
"""Pixels: what the longer side of a cell is brought up to; what no side of the sheet is over (WebP ends at 16,383)."""

MOST = 40_000_000  # pixels of a whole sheet, above which its cells are made smaller

_ROOM = (160, 72)  # width and height of a cell at least, so that words have room: narrower pictures stand in white
_DARK, _GREY, _QUIET, _LINE = "#2b2b2b", "#6b6b6b", "#8f8f8f", "#e4e4e4"
_SIGNS = {"\u2013": "-", "\u2014": "-", "\u2212": "-", "\u00d7": "x"}
_SIGNS |= dict(zip("ßøØłŁđĐıæÆœŒ", ("ss", *"oOlLdDi", "ae", "AE", "oe", "OE"), strict=True))
_MISSING = "\uffff"  # no character: what the font draws for it, it draws for every letter that it lacks
_Font = ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Heading:
    """What stands above a column: its name, and quiet lines below that."""

    title: str
    details: tuple[str, ...] = ()


def panel(
    cells: Sequence[Sequence[np.ndarray]], rows: Sequence[str], columns: Sequence[Heading], corner: str = ""
) -> np.ndarray:
    """Draw one labelled sheet. Returns uint8 [height, width, 3].

    cells[row][column]: uint8 [height, width, 3], of any sizes: each is scaled to fit one cell, never distorted. rows:
    the label of each; one that is too long for its cell is set smaller, then cut. corner: a word at the top left.
    """
    layout = _fitted(cells, [_plain(text) for text in rows], columns, _plain(corner))
    sheet = Image.new("RGB", layout.size, "white")
    _write(draw := ImageDraw.Draw(sheet), layout)
    for row, pictures in enumerate(cells):
        for column, pixels in enumerate(pictures):
            _place(sheet, draw, pixels, layout, row, column)
    # NOTE: in strips, because Pillow holds the interpreter lock, and the event loop with it, while it copies pixels.
    tops = range(0, sheet.height, 256)
    return np.concatenate([np.asarray(sheet.crop((0, top, sheet.width, min(top + 256, sheet.height)))) for top in tops])


def unreadable(texts: Sequence[str]) -> str:
    """The letters of these texts that the font does not have, each once, in order; the sheet shows a box for each."""
    font = _font(20)
    box = _ink(font, _MISSING)
    letters = dict.fromkeys(_plain("".join(dict.fromkeys("".join(texts)))))
    return "".join(one for one in letters if not one.isascii() and not one.isspace() and _ink(font, one) == box)


class _Layout:
    """Where everything is, in pixels. cell: width and height of one. rows, corner: in letters of the font."""

    def __init__(self, cell: tuple[int, int], rows: Sequence[str], columns: Sequence[Heading], corner: str) -> None:
        self.cell, self.rows, self.corner = cell, rows, corner
        self.text = min(44, max(14, round(0.042 * min(cell))))
        self.small = max(12, round(0.82 * self.text))
        self.gutter = max(8, round(0.03 * min(cell)))
        self.margin = 2 * self.gutter
        font, small = _font(self.text), _font(self.small)
        self.heads = [  # the lines above each column, and whether a line belongs to the title
            [(line, True) for line in _wrap(_plain(one.title), font, cell[0], 20)]
            + [(line, False) for text in one.details for line in _wrap(_plain(text), small, cell[0], 20)]
            for one in columns
        ]
        most = max(_ROOM[0], round(0.7 * cell[0]))
        lines = (line for text in rows for line in _wrap(text, font, most, 40))
        widest = min(most, max(0.0, small.getlength(corner), *map(font.getlength, lines)))
        heights = [sum(_pitch(self.text if title else self.small) for _, title in lines) for lines in self.heads]
        self.left = self.margin + math.ceil(widest) + 2 * self.gutter
        self.top = self.margin + max(heights, default=0) + self.gutter
        right, below = self.corner_of(len(rows), len(columns))
        self.size = right - self.gutter + self.margin, below - self.gutter + self.margin

    def corner_of(self, row: int, column: int) -> tuple[int, int]:
        """x and y of the upper left pixel of a cell."""
        return self.left + column * (self.cell[0] + self.gutter), self.top + row * (self.cell[1] + self.gutter)


def _fitted(
    cells: Sequence[Sequence[np.ndarray]], rows: Sequence[str], columns: Sequence[Heading], corner: str
) -> _Layout:
    """The layout whose cells hold the largest picture as it is, unless that is too small to read or too large."""
    heights, widths = zip(*(pixels.shape[:2] for row in cells for pixels in row), strict=True)
    width, height = max(widths), max(heights)
    scale = max(1.0, SMALLEST / max(width, height))
    while True:
        cell = max(_ROOM[0], round(width * scale)), max(_ROOM[1], round(height * scale))
        layout = _Layout(cell, rows, columns, corner)
        across, down = layout.size
        over = max(across / LARGEST, down / LARGEST, math.sqrt(across * down / MOST))
        if over <= 1 or cell == _ROOM:
            return layout
        scale *= 0.99 / over


def _place(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, pixels: np.ndarray, at: _Layout, row: int, column: int
) -> None:
    """Paste one picture into the middle of its cell, with a hairline around it, outside of its own pixels."""
    (width, height), (x, y) = at.cell, at.corner_of(row, column)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    scale = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    x, y = x + (width - size[0]) // 2, y + (height - size[1]) // 2
    draw.rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline=_LINE)
    sheet.paste(picture, (x, y))


def _write(draw: ImageDraw.ImageDraw, at: _Layout) -> None:
    """All labels: headings stand on their column, row labels in the middle of their row."""
    font, small = _font(at.text), _font(at.small)
    for column, lines in enumerate(at.heads):
        x, y = at.corner_of(0, column)[0], at.top - at.gutter
        for line, title in reversed(lines):
            y -= _pitch(at.text if title else at.small)
            draw.text((x, y), line, fill=_DARK if title else _QUIET, font=font if title else small)
    draw.text((at.margin, at.top - at.gutter - _pitch(at.small)), at.corner, fill=_QUIET, font=small)
    room = at.left - 2 * at.gutter - at.margin
    for row, text in enumerate(at.rows):
        size, words = _set(text, at.text, room, at.cell[1])
        y = at.corner_of(row, 0)[1] + (at.cell[1] - len(words) * _pitch(size)) // 2
        for place, line in enumerate(words):
            draw.text((at.margin, y + place * _pitch(size)), line, fill=_GREY, font=_font(size))


def _set(text: str, size: int, width: int, height: int) -> tuple[int, list[str]]:
    """The size and the lines in which a text fits this box: smaller when it is long, then with its end left out."""
    for smaller in (size, round(0.86 * size), round(0.74 * size)):
        size = max(11, smaller)
        most = max(1, height // _pitch(size))
        lines = _wrap(text, _font(size), width, most + 1)
        if len(lines) <= most:
            return size, lines
    last = lines[most - 1]
    while last and _font(size).getlength(last + "\u2026") > width:
        last = last[:-1]
    return size, [*lines[: most - 1], last.rstrip() + "\u2026"]


def _wrap(text: str, font: _Font, width: int, most: int) -> list[str]:
    """A plain text in lines of at most this width, at most so many. A word that is wider than a line is broken."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        if line and font.getlength(f"{line} {word[:width]}") <= width:
            line = f"{line} {word}"
            continue
        if line:
            lines.append(line)
        while font.getlength(word[:width]) > width and len(word) > 1 and len(lines) < most:
            end = _breaks(word, font, width)
            lines.append(word[:end])
            word = word[end:]
        line = word
        if len(lines) >= most:
            return lines[:most]
    return [*lines, line] if line else lines


def _breaks(word: str, font: _Font, width: int) -> int:
    """How many letters of a word fit a line, up to a hyphen or a dot if one is near the end; at least one."""
    end = 1
    while end < len(word) and font.getlength(word[: end + 1]) <= width:
        end += 1
    hyphen = max(word.rfind(sign, 0, end) for sign in "-._/") + 1
    return hyphen if hyphen > end // 2 else end


def _plain(text: str) -> str:
    """The text in letters of the font where it has like ones; what is not shown is a space."""
    return "".join(map(_alike, text))


def _alike(letter: str) -> str:
    if letter.isascii() or not letter.isprintable():
        return letter if letter.isprintable() else " "
    bare = "".join(part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part))
    return _SIGNS.get(letter) or (bare if bare.isascii() else letter)


def _font(size: int) -> _Font:
    """NOTE: made anew each time (0.1 ms): a FreeType face is not for several threads at once."""
    font = ImageFont.load_default(size)
    assert isinstance(font, _Font), "this Pillow was built without FreeType"
    return font


def _pitch(size: int) -> int:
    """From one line to the next."""
    return math.ceil(1.32 * size)


def _ink(font: _Font, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
