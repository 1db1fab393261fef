"""Panel: pictures side by side on one white sheet, with labels at the left of its rows and headings above its columns.

The font is Pillow's own (Aileron: ASCII and a few signs). Accents are left out. Letters of other scripts are boxes.
"""

import math
import textwrap
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

SMALLEST, LARGEST = 256, 16_000
"""Pixels: the longer side of a cell is at least the first; no side of the sheet is over the second (WebP: 16,383)."""

MOST = 40_000_000  # pixels of a whole sheet, above which its cells are made smaller

_ROOM = (160, 72)  # least width and height of a cell, so that words have room; narrower pictures stand in white
_DARK, _GREY, _QUIET, _LINE = "#2b2b2b", "#6b6b6b", "#8f8f8f", "#e4e4e4"
_SIGNS = {"\u2013": "-", "\u2014": "-", "\u2212": "-", "\u00d7": "x"}
_SIGNS |= dict(zip("ßøØłŁđĐıæÆœŒ", ("ss", *"oOlLdDi", "ae", "AE", "oe", "OE"), strict=True))
_MISSING = "\uffff"  # no character: the font draws the same box for it and for every letter that it lacks
_Font = ImageFont.FreeTypeFont


def panel(
    cells: Sequence[Sequence[np.ndarray]], rows: Sequence[str], columns: Sequence[Sequence[str]], corner: str = ""
) -> np.ndarray:
    """Draw one labelled sheet. Returns uint8 [height, width, 3].

    cells[row][column]: uint8 [height, width, 3], of any sizes; each is scaled to fit one cell, never distorted. rows:
    the label of each row; a long one is set smaller, then cut. columns: the name above each column, then lines below
    it. corner: a word at the top left.
    """
    heads = [[_plain(text) for text in texts] for texts in columns]
    layout = _fitted(cells, [_plain(text) for text in rows], heads, _plain(corner))
    sheet = Image.new("RGB", layout.size, "white")
    layout.write(ImageDraw.Draw(sheet))
    for row, pictures in enumerate(cells):
        for column, pixels in enumerate(pictures):
            fitting = ImageOps.contain(Image.fromarray(pixels), layout.cell, Image.Resampling.LANCZOS)
            framed = ImageOps.expand(fitting, 1, _LINE)  # a hairline outside of the picture's own pixels
            x, y = layout.corner_of(row, column)
            sheet.paste(framed, (x + (layout.cell[0] - framed.width) // 2, y + (layout.cell[1] - framed.height) // 2))
    # NOTE: in strips, because Pillow holds the interpreter lock, and the event loop with it, while it copies pixels.
    tops = range(0, sheet.height, 256)
    return np.concatenate([np.asarray(sheet.crop((0, top, sheet.width, min(top + 256, sheet.height)))) for top in tops])


def unreadable(texts: Sequence[str]) -> str:
    """The letters of these texts that the font lacks, each once, in order; the sheet shows a box for each."""
    font = _font(20)
    box = _ink(font, _MISSING)
    letters = dict.fromkeys(_plain("".join(dict.fromkeys("".join(texts)))))
    return "".join(one for one in letters if not one.isascii() and not one.isspace() and _ink(font, one) == box)


class _Layout:
    """Where everything stands, in pixels. cell: width and height of one. rows, columns, corner: plain texts."""

    def __init__(self, cell: tuple[int, int], rows: Sequence[str], columns: Sequence[list[str]], corner: str) -> None:
        self.cell, self.rows, self.corner = cell, rows, corner
        self.text = min(44, max(14, round(0.042 * min(cell))))
        self.small = max(12, round(0.82 * self.text))
        self.gutter = max(8, round(0.03 * min(cell)))
        font, small = _font(self.text), _font(self.small)
        self.heads = [
            [(line, font, _DARK) for line in _wrap(title, font, cell[0], 20)]
            + [(line, small, _QUIET) for text in details for line in _wrap(text, small, cell[0], 20)]
            for title, *details in columns
        ]
        most = max(_ROOM[0], round(0.7 * cell[0]))
        lines = [line for text in rows for line in _wrap(text, font, most, 40)]
        self.room = math.ceil(min(most, max(map(font.getlength, [*lines, corner]), default=0)))
        self.left = self.room + 4 * self.gutter
        above = max((sum(_pitch(font) for _, font, _ in head) for head in self.heads), default=0)
        self.top = above + 3 * self.gutter
        right, below = self.corner_of(len(rows), len(columns))
        self.size = right + self.gutter, below + self.gutter

    def corner_of(self, row: int, column: int) -> tuple[int, int]:
        """x and y of the upper left pixel of a cell."""
        return self.left + column * (self.cell[0] + self.gutter), self.top + row * (self.cell[1] + self.gutter)

    def write(self, draw: ImageDraw.ImageDraw) -> None:
        """Draw all words: headings stand on their column, row labels in the middle of their row."""
        small, margin, bottom = _font(self.small), 2 * self.gutter, self.top - self.gutter
        draw.text((margin, bottom - _pitch(small)), self.corner, fill=_QUIET, font=small)
        for column, head in enumerate(self.heads):
            x, y = self.corner_of(0, column)[0], bottom
            for line, font, colour in reversed(head):
                y -= _pitch(font)
                draw.text((x, y), line, fill=colour, font=font)
        for row, text in enumerate(self.rows):
            font, lines = _set(text, self.text, self.room, self.cell[1])
            y = self.corner_of(row, 0)[1] + (self.cell[1] - len(lines) * _pitch(font)) // 2
            for place, line in enumerate(lines):
                draw.text((margin, y + place * _pitch(font)), line, fill=_GREY, font=font)


def _fitted(
    cells: Sequence[Sequence[np.ndarray]], rows: Sequence[str], columns: Sequence[list[str]], corner: str
) -> _Layout:
    """The layout with cells that hold the largest picture as it is, unless that is too small to read or too large."""
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


def _set(text: str, size: int, width: int, height: int) -> tuple[_Font, list[str]]:
    """The font and the lines in which a text fits this box: smaller when it is long, then with its end left out."""
    for factor in (1, 0.86, 0.74):
        font = _font(max(11, round(factor * size)))
        most = max(1, height // _pitch(font))
        if len(lines := _wrap(text, font, width, most + 1)) <= most:
            return font, lines
    return font, _wrap(text, font, width, most)


def _wrap(text: str, font: _Font, width: int, most: int) -> list[str]:
    """A text in lines of at most this width in pixels, at most so many; "…" stands for what is left out."""
    letters = max(1, width)
    while True:
        lines = textwrap.wrap(text[: most * (letters + 1) + 1], letters, max_lines=most, placeholder="\u2026")
        widest = max(map(font.getlength, lines), default=0)
        if widest <= width or letters == 1:
            return lines
        letters = max(1, min(letters - 1, round(letters * width / widest)))


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


def _pitch(font: _Font) -> int:
    """Pixels from one line to the next."""
    return math.ceil(1.32 * font.size)


def _ink(font: _Font, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
