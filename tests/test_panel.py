"""The panel, read back by its pixels: where pictures and words stand, that none is distorted and none overflows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from app.panel import LARGEST, panel, unreadable

COLOURS = ((200, 30, 40), (20, 160, 60), (30, 60, 210), (240, 190, 20), (150, 20, 160), (20, 170, 190))
LONG = "Three pears and a tall blue bottle on a table, " * 60
Box = tuple[int, int, int, int]


def solid(width: int, height: int, place: int) -> np.ndarray:
    return np.full((height, width, 3), COLOURS[place], np.uint8)


def boxes(sheet: np.ndarray, count: int) -> list[Box]:
    """(left, top, right, below) of each colour, which has to fill its box; right and below are outside of it."""
    found = []
    for colour in COLOURS[:count]:
        rows, columns = np.nonzero((sheet == colour).all(axis=2))
        box = int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
        assert len(rows) == (box[2] - box[0]) * (box[3] - box[1])
        found.append(box)
    return found


def words(sheet: np.ndarray, left: int, top: int, right: int, below: int) -> bool:
    """Whether anything but white is in this box."""
    return bool((sheet[top:below, left:right] != 255).any())


def grid_of(rows: int, columns: int, width: int = 256, height: int = 256) -> list[list[np.ndarray]]:
    return [[solid(width, height, row * columns + column) for column in range(columns)] for row in range(rows)]


def headings(count: int) -> list[list[str]]:
    return [[f"model-{place}", "8.06 B parameters", "steps 28, guidance 7"] for place in range(count)]


def size(box: Box) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (3, 2), (6, 1), (1, 6)])
def test_cells_stand_in_rows_and_columns_with_even_gutters(rows: int, columns: int) -> None:
    sheet = panel(grid_of(rows, columns), [f"row {row}" for row in range(rows)], headings(columns))
    found = boxes(sheet, rows * columns)
    assert {size(box) for box in found} == {(256, 256)}
    lefts, tops = sorted({box[0] for box in found}), sorted({box[1] for box in found})
    assert [(lefts[place % columns], tops[place // columns]) for place in range(rows * columns)] == [
        box[:2] for box in found
    ]
    steps = {right - left for left, right in pairwise(lefts)}
    steps |= {below - top for top, below in pairwise(tops)}
    assert len(steps) <= 1 and all(256 < step < 280 for step in steps)
    height, width, _ = sheet.shape
    assert width - max(box[2] for box in found) == height - max(box[3] for box in found) > 0
    assert (sheet[:, -1] == 255).all() and (sheet[-1] == 255).all()


def test_every_label_stands_beside_its_cells() -> None:
    sheet = panel(grid_of(2, 2), ["a red apple", "a blue car"], headings(2), "seed 7")
    first, second, third, _ = boxes(sheet, 4)
    for top, below in ((first[1], first[3]), (third[1], third[3])):
        assert words(sheet, 0, top, first[0] - 2, below)
        assert not words(sheet, 0, top, first[0] - 2, top + 90) and not words(sheet, 0, below - 90, first[0] - 2, below)
    for box in (first, second):
        assert words(sheet, box[0], 0, box[2], box[1] - 2)
    assert words(sheet, 0, 0, first[0] - 8, first[1] - 2)
    bare = panel(grid_of(2, 2), ["", ""], [[""], [""]])
    left, top = boxes(bare, 1)[0][:2]
    assert not words(bare, 0, 0, left - 1, len(bare)) and not words(bare, 0, 0, bare.shape[1], top - 1)


def test_different_words_are_different_pixels() -> None:
    cells = grid_of(1, 1)
    one = panel(cells, ["pear"], [["a", "6.5 M parameters"]])
    assert (one == panel(cells, ["pear"], [["a", "6.5 M parameters"]])).all()
    for row, title, count in (("bear", "a", "6.5 M"), ("pear", "b", "6.5 M"), ("pear", "a", "6.6 M")):
        other = panel(cells, [row], [[title, f"{count} parameters"]])
        assert one.shape != other.shape or (one != other).any()


@pytest.mark.parametrize("text", [LONG, "x" * 900, "苹果" * 450, "a " * 5000], ids=["words", "one", "boxes", "short"])
@pytest.mark.parametrize(("width", "height"), [(256, 256), (512, 128), (96, 640)])
def test_text_never_leaves_its_cell(text: str, width: int, height: int) -> None:
    sheet = panel(grid_of(2, 1, width, height), [text, text], [["model-" * 10, *["steps 28, guidance 7"] * 2]])
    first, second = boxes(sheet, 2)
    left = max(0, first[0] - 40) if width < 160 else first[0]  # a narrow picture stands in the middle of its cell
    assert words(sheet, 0, first[1], left - 2, first[3]) and words(sheet, 0, second[1], left - 2, second[3])
    assert not words(sheet, 0, first[3], left - 2, second[1])
    assert not words(sheet, 0, second[3], left - 2, len(sheet))
    assert not words(sheet, first[2] + 40, 0, sheet.shape[1], len(sheet))
    gap = max(8, round(0.03 * min(width, height)))
    assert not words(sheet, left - gap, first[1], left - 1, second[3])


def test_a_long_label_is_cut_and_a_short_one_is_not() -> None:
    """The end of a label that fits shows; of one that does not, only its beginning."""
    cells = grid_of(1, 1)
    fits, longer = "pears on a table, " * 4, LONG
    assert (panel(cells, [fits + "A"], headings(1)) != panel(cells, [fits + "B"], headings(1))).any()
    assert (panel(cells, [longer + "A"], headings(1)) == panel(cells, [longer + "B"], headings(1))).all()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (((512, 512), (256, 256)), ((512, 512), (512, 512))),
        (((512, 256), (256, 512)), ((512, 256), (256, 512))),
        (((64, 64), (32, 32)), ((256, 256), (256, 256))),
        (((64, 48), (16, 32)), ((256, 192), (96, 192))),
        (((300, 300), (900, 300)), ((300, 300), (900, 300))),
    ],
)
def test_unequal_sizes_share_one_cell_size_undistorted(
    sizes: tuple[tuple[int, int], ...], expected: tuple[tuple[int, int], ...]
) -> None:
    sheet = panel([[solid(*size, place) for place, size in enumerate(sizes)]], ["a"], headings(2))
    found = boxes(sheet, 2)
    assert tuple(map(size, found)) == expected
    middles = [(box[1] + box[3]) / 2 for box in found]
    assert abs(middles[0] - middles[1]) <= 1


def test_a_picture_of_the_size_of_its_cell_keeps_its_pixels() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)
    noise[0, 0] = COLOURS[0]
    sheet = panel([[noise, solid(400, 300, 1)]], ["noise"], headings(2))
    places = np.argwhere((sheet == COLOURS[0]).all(axis=2))
    assert any((sheet[y : y + 300, x : x + 400] == noise).all() for y, x in places)


def test_a_sheet_has_a_largest_number_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.panel.MOST", 2_000_000)
    sheet = panel([[np.zeros((512, 512, 3), np.uint8)] * 4] * 4, ["a"] * 4, headings(4))
    assert 1_800_000 <= sheet.shape[0] * sheet.shape[1] <= 2_000_000


@pytest.mark.parametrize(("width", "height", "rows", "columns"), [(64, 8192, 3, 1), (8192, 64, 1, 3)])
def test_a_sheet_has_a_longest_side(width: int, height: int, rows: int, columns: int) -> None:
    cell = np.zeros((height, width, 3), np.uint8)
    sheet = panel([[cell] * columns] * rows, ["a"] * rows, headings(columns))
    assert LARGEST * 0.9 <= max(sheet.shape) <= LARGEST


def test_a_letter_that_the_font_lacks_is_told() -> None:
    assert unreadable(["a red apple, café, naïve – “quoted” × 2…", "Straße\n\t", "Łódź, smørrebrød, œuvre"]) == ""
    assert unreadable(["красный", "苹果 a 苹", "한🍎"]) == "красный苹果한🍎"
    cells = grid_of(1, 1)
    assert (panel(cells, ["苹"], headings(1)) == panel(cells, ["果"], headings(1))).all()
    assert (panel(cells, ["café"], headings(1)) == panel(cells, ["cafe"], headings(1))).all()
    assert (panel(cells, ["a\u202eb\0\ud83c"], headings(1)) == panel(cells, ["a b"], headings(1))).all()
