"""The fenced blocks of the repository's Markdown files, each with what is to be done with it.

A comment in the line before a block says so: `<!-- run -->`, which is also what a block without a comment means;
`<!-- run: FILE -->` where the block is the content of a file; `<!-- parsed -->` where it needs what a test lacks, as
Docker, a GPU or an hour; `<!-- shown -->` for what nobody types.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
MARKS = ("run", "parsed", "shown")
_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>\w+)(?:: (?P<file>\S+))? -->\n)?"
    r"```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block. document: its file, from the root. line: of its text. file: where its text is to be put."""

    document: str
    line: int
    heading: str
    mark: str
    file: str | None
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def documents() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(listed.split(), key=lambda path: (path.count("/"), path))


def blocks_of(document: str, text: str) -> list[Block]:
    """The blocks of a Markdown text, in order."""
    found = []
    for match in _BLOCK.finditer(text):
        before = text[: match.start("text")]
        headings = re.findall(r"^#+ (.*)$", before, re.MULTILINE)
        found.append(
            Block(
                document,
                before.count("\n") + 1,
                headings[-1] if headings else "",
                match["mark"] or "run",
                match["file"],
                match["language"],
                match["text"],
            )
        )
    return found


BLOCKS = [block for name in documents() for block in blocks_of(name, (ROOT / name).read_text(encoding="utf-8"))]
