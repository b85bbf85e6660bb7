"""The commands of k8s/RENTED.md, by how their block is marked: `sh` was run, `text` was not."""

import re
from pathlib import Path

_GUIDE = Path(__file__).parents[1] / "k8s" / "RENTED.md"
_BLOCKS = re.findall(r"```(\w+)\n(.*?)```", _GUIDE.read_text(), re.DOTALL)


def get_kinds() -> set[str]:
    return {kind for kind, _ in _BLOCKS}


def find_commands(kind: str) -> list[str]:
    """Return the lines that call `solvent`, without what stands around the call."""
    lines = [line for found, block in _BLOCKS if found == kind for line in block.splitlines()]
    return [f"solvent {line.partition('solvent ')[2].rstrip(chr(39))}" for line in lines if "solvent " in line]
