"""Compose: from files that were recognised to what the card of them is made of, or why there can be none.

Knows nothing of how files are compared (app/checkpoints/identify.py), nor of how a card is written (makings.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from app.cards.catalog import SHIPPED, Registry
from app.cards.files import INDEX
from app.cards.noise import changes
from app.cli.makings import Makings
from app.errors import CheckpointError, LoadError

if TYPE_CHECKING:
    from app.checkpoints.identify import Piece, Report, Shipped

LOST = {
    ("sd3", "text_encoder"): "it is zeros without: prompts are followed less well",
    ("sd3", "text_encoder_2"): "it is zeros without: prompts are followed less well",
    ("sd3", "text_encoder_3"): "it is zeros without: long prompts and written words are followed less well",
    ("flux", "text_encoder"): "it is zeros without: pictures keep less to the prompt's style",
    ("flux", "text_encoder_2"): "it is zeros without: prompts are hardly followed",
}
"""What a model loses with a part that it can do without."""


def start(report: Report, registry: Registry, like: str | None) -> Makings:
    """The card that these files are like, and what of it they are. Raises CheckpointError, LoadError."""
    if report.pickled:
        raise LoadError(f"{report.path}: a server does not load torch files; first: instep models convert")
    refuse_odd(report)
    fits = {one.card.id: (one, pieces) for one, pieces in (report.fits if like else bases(report))}
    wanted = registry.find(like).id if like else None
    if not fits:
        raise CheckpointError(no_card(report))
    if wanted and wanted not in fits:
        raise CheckpointError(f"{report.path}: is not like {wanted}; it fits {', '.join(fits)}")
    if not all("transformer" in pieces for _, pieces in fits.values()):
        raise LoadError(f"{report.path}: the network is not in it; this goes beside one (--vae, --text-encoder ...)")
    if wanted is None and len(fits) > 1:
        raise LoadError(f"{report.path}: fits {', '.join(fits)}, and the files cannot tell which: say it with --like")
    one, pieces = fits[wanted or next(iter(fits))]
    makings = Makings(one)
    good = {part: piece for part, piece in pieces.items() if part not in report.odd}
    if report.path.is_dir():
        makings.source, makings.inside = report.path, {*good, *report.tokenizers}
        return makings
    for part, piece in good.items():
        (makings.files if piece.held else makings.plain)[part] = report.path
    return makings


def bases(report: Report) -> list[tuple[Shipped, dict[str, Piece]]]:
    """The cards that fit, without those that were made of another of them; the shipped ones, where there are some."""
    known = {one.card.id for one, _ in report.fits}
    own = [(one, pieces) for one, pieces in report.fits if one.card.like not in known - {one.card.id}]
    return [fit for fit in own if fit[0].card.id in SHIPPED] or own


def refuse_odd(report: Report) -> None:
    """Raises CheckpointError where the network is there, in a form that this server does not read."""
    if "transformer" in report.odd and "transformer" not in report.pieces:
        raise CheckpointError(f"{report.path}: {report.odd['transformer']}")


def take(makings: Makings, part: str, place: Path) -> None:
    """A part from a place of its own, instead of the one that is there. Raises CheckpointError."""
    from app.checkpoints.identify import look

    if part not in makings.like.classes:
        raise LoadError(f"--{part.replace('_', '-')}: {makings.like.card.id} has no such part")
    place = place / part if (place / INDEX).is_file() else place
    for piece in look(place).pieces.values():
        if makings.like.differences(part, piece) == []:
            break
    else:
        raise CheckpointError(f"{place}: is not the {part} of {makings.like.card.id}")
    _forget(makings, part)
    (makings.links if place.is_dir() else makings.files if piece.held else makings.plain)[part] = place


def take_tokenizers(makings: Makings, place: Path) -> None:
    """Those of the folder that the model has a use for. Raises LoadError: there are none."""
    named = [part for part in makings.like.classes if part.startswith("tokenizer") and (place / part).is_dir()]
    if not named:
        raise LoadError(f"{place}: there is no folder tokenizer, tokenizer_2 or tokenizer_3 in it")
    for part in named:
        _forget(makings, part)
        makings.links[part] = place / part


def take_rest(makings: Makings, owner: str, registry: Registry) -> None:
    """What is still missing, from another card. Raises LoadError: it is of another kind."""
    from app.checkpoints.identify import shipped_of

    other = shipped_of(registry.cards[owner])
    if other is None or other.card.family != makings.like.card.family:
        raise LoadError(f"--rest {owner}: it is no {makings.like.card.family}, as {makings.like.card.id} is")
    for part in makings.like.missing(makings.parts):
        if makings.like.classes[part] == other.classes.get(part):
            makings.rest[part] = other.card.components.get(part, f"{owner}/{part}")


def lacking(makings: Makings) -> list[str]:
    """The parts that the model cannot do without, and that are not there: the tokenizers of its encoders too."""
    from app.families import FAMILIES

    encoders = sorted(part for part in makings.parts if part.startswith("text_encoder"))
    needed = [*FAMILIES[makings.like.card.family].required, *(f"tokenizer{one[12:]}" for one in encoders)]
    return [part for part in needed if part not in makings.parts]


def refuse_gaps(makings: Makings, path: Path) -> None:
    """Raises LoadError when a part is missing that the model cannot do without, with what to do."""

    def flag(part: str) -> str:
        return "--tokenizers FOLDER" if part.startswith("tokenizer") else f"--{part.replace('_', '-')} PATH"

    if gaps := lacking(makings):
        flags = "" if makings.source else f"{' '.join(dict.fromkeys(map(flag, gaps)))}, or "
        rest = f"--rest {makings.like.card.id} to take what is missing from that card"
        raise LoadError(f"{path}: {', '.join(gaps)} missing: give {flags}{rest}")


def left_out(report: Report, makings: Makings) -> list[str]:
    """A line for each encoder that the model will be without, and for each part of the file that is not usable."""
    card = makings.like.card
    absent = [part for part in makings.like.missing(makings.parts) if (card.family, part) in LOST]
    odd = {part: f": {short(reason)}" for part, reason in report.odd.items()}
    return [f"without {part}{odd.get(part, '')} ({LOST[card.family, part]})" for part in absent]


def own_schedule(makings: Makings) -> list[str]:
    """A line for what the folder's own scheduler_config.json says otherwise than the card that it is like."""
    found = changes(makings.like.card.schedule, makings.schedule)
    return [f"the schedule is the folder's own: {', '.join(found)}"] if found else []


def no_card(report: Report) -> str:
    """What is said when nothing fits: the nearest card and the first difference."""
    if report.nearest is None:
        names = next((list(piece.state) for piece in report.pieces.values() if piece.state), ["none"])
        return f"{report.path}: in no layout that is known here; its tensors: {', '.join(map(short, names[:3]))} ..."
    card, part, found = report.nearest
    more = f", and {len(found) - 1} more differences" if len(found) > 1 else ""
    return f"{report.path}: fits no card; the nearest is {card.id}, whose {part} is another: {short(found[0])}{more}"


def short(text: str) -> str:
    """What a file says, fit for a line."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def _forget(makings: Makings, part: str) -> None:
    if makings.source is not None:
        raise LoadError(f"{makings.source}: is a whole model; parts of it cannot be given beside it")
    for places in (makings.files, makings.plain, makings.links):
        places.pop(part, None)
