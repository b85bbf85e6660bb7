"""The commands that the guides (all .md files) show.

A block marked `sh` is run by a test as it is written, and so is one marked `python`; a block marked `text` is not, as
it needs a second machine, an account or many minutes. Of every command shown, in a block or within a line, tests check
that it is one that we take.
"""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
RENTED = "k8s/RENTED.md"
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def list_guides() -> list[str]:
    found = {*ROOT.glob("*.md"), *ROOT.glob(".github/*.md"), *ROOT.glob("[a-z]*/**/*.md")}
    kept = [str(path.relative_to(ROOT)) for path in sorted(found)]
    return [path for path in kept if not path.startswith(("build/", "runs/", "data/", "models/"))]


def read_blocks(guide: str) -> list[tuple[str, str]]:
    """Return each block with its mark."""
    return _FENCED.findall((ROOT / guide).read_text())


def find_lines(guide: str, *kinds: str) -> list[str]:
    """Return the commands of a guide's blocks, a line each, without comments."""
    text = "\n".join(block for kind, block in read_blocks(guide) if kind in kinds)
    lines = [re.sub(r"\s+# .*", "", line).strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def find_commands(guide: str, *kinds: str) -> list[str]:
    """Return the calls of `solvent` in a guide's blocks, without what stands around them."""
    lines = [line for line in find_lines(guide, *kinds) if re.match(r"(bash -c 'exec |[A-Z_]+=\S+ )?solvent ", line)]
    return [f"solvent {line.partition('solvent ')[2].rstrip(chr(39)).partition(' > ')[0]}" for line in lines]


def find_inline(guide: str) -> list[str]:
    """Return what stands between backticks outside of blocks, each in one line."""
    text = _FENCED.sub("", (ROOT / guide).read_text())
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def split(command: str) -> list[str]:
    """Return the words of a command, even of one that is only a part of a shell's."""
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()
