"""A contact sheet: every candidate of a request with its reward, best first, the chosen ones framed."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from accord.images import Pixels

_CELL = 192
_GAP = 18
_MARGIN = 28
_LABEL = 34
_BAR = 5
_TITLE_LINES = 3
_SUBTITLE_LINES = 3
_ELLIPSIS = "…"
_PAPER = (255, 255, 255)
_INK = (32, 33, 36)
_FAINT = (120, 124, 130)
_TRACK = (228, 230, 234)
_CHOSEN = (21, 128, 61)
_OTHER = (148, 163, 184)

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True, slots=True)
class Cell:
    """One candidate: its uint8 RGB pixels (H, W, 3), its reward in [0, 1], and whether it was chosen."""

    pixels: Pixels
    reward: float
    chosen: bool


def contact_sheet(cells: Sequence[Cell], title: str, subtitle: str) -> Image.Image:
    """The sheet. Cells are in the order given; images smaller than a cell are enlarged without blur."""
    columns = _columns(len(cells))
    rows = -(-len(cells) // columns)
    width = 2 * _MARGIN + columns * _CELL + (columns - 1) * _GAP
    lines = wrapped(title, _font(20), width - 2 * _MARGIN, _TITLE_LINES)
    notes = wrapped(subtitle, _font(12), width - 2 * _MARGIN, _SUBTITLE_LINES)
    top = _MARGIN + 26 * len(lines) + 15 * len(notes) + 10
    height = top + rows * (_CELL + _LABEL + _GAP) + _MARGIN - _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN - 6 + 26 * number), line, _INK, _font(20))
    below = _MARGIN + 26 * len(lines)
    for number, line in enumerate(notes):
        draw.text((_MARGIN, below - 4 + 15 * number), line, _FAINT, _font(12))
    for place, cell in enumerate(cells):
        row, column = divmod(place, columns)
        x = _MARGIN + column * (_CELL + _GAP)
        y = top + row * (_CELL + _LABEL + _GAP)
        _draw_cell(sheet, draw, cell, place + 1, x, y)
    return sheet


def wrapped(text: str, font: Font, width: float, most: int) -> list[str]:
    """`text` in at most so many lines of `width` pixels; an ellipsis stands for what is left out."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        if len(lines) > most:
            break
        longer = f"{line} {word}".lstrip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while len(lines) <= most and font.getlength(word) > width:  # a word that no line holds
            whole = 1
            while font.getlength(word[: whole + 1]) <= width:
                whole += 1
            lines.append(word[:whole])
            word = word[whole:]
        line = word
    lines.append(line)
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + _ELLIPSIS) > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip() + _ELLIPSIS]
    return lines


def _draw_cell(sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, place: int, x: int, y: int) -> None:
    picture = _fitted(cell.pixels)
    left, upper = x + (_CELL - picture.width) // 2, y + (_CELL - picture.height) // 2
    sheet.paste(picture, (left, upper))
    if cell.chosen:
        frame = (left - 4, upper - 4, left + picture.width + 3, upper + picture.height + 3)
        draw.rectangle(frame, outline=_CHOSEN, width=3)
    colour = _CHOSEN if cell.chosen else _OTHER
    bar_y = y + _CELL + 8
    draw.rectangle((x, bar_y, x + _CELL - 1, bar_y + _BAR - 1), fill=_TRACK)
    filled = round(min(1.0, max(0.0, cell.reward)) * (_CELL - 1))
    draw.rectangle((x, bar_y, x + filled, bar_y + _BAR - 1), fill=colour)
    draw.text((x, bar_y + 8), f"{place}", _FAINT, _font(13))
    draw.text((x + _CELL - 1, bar_y + 8), f"{cell.reward:.3f}", _INK, _font(13), anchor="ra")


def _fitted(pixels: Pixels) -> Image.Image:
    picture = Image.fromarray(pixels)
    longest = max(picture.size)
    if longest <= _CELL:
        times = _CELL // longest
        return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    picture.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
    return picture


def _columns(count: int) -> int:
    """As many as rows, more or less, with few places empty; from 4 to 8 where there are as many."""
    if count <= 4:
        return max(1, count)
    return min(range(4, 9), key=lambda columns: -count % columns + abs(columns - count**0.5))


def _font(size: int) -> Font:
    return ImageFont.load_default(size)
