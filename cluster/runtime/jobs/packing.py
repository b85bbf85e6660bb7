"""A working directory as one small zip file: code and configuration, never data, runs or secrets. No Ray here.

What git ignores is left out (where there is git), and so is what everybody has lying around. The same files make the
same bytes, so that a cluster that has the package already is not sent it again.
"""

import fnmatch
import io
import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from elastic.errors import ConfigError

MOST_BYTES = 32 << 20
MOST_FILES = 5000
_FOLDERS_AT_THE_TOP = ("data", "runs", "wandb", "checkpoints", "models")
_FOLDERS = (
    *(".git", ".hg", ".svn", ".venv", "venv", ".tox", "node_modules", "__pycache__", "*.egg-info"),
    *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".ssh", ".aws", ".azure", ".kube", ".ray"),
)
_DATA = ("*.pyc", "*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.arrow", "*.parquet", "*.zip", "*.tar", "*.tar.*")
_SECRETS = (
    *(".env", ".env.*", ".netrc", "_netrc", "*.pem", "*.key", "*.p12", "id_rsa*", "id_ecdsa*", "id_ed25519*"),
    *("kubeconfig*", "auth_token", "credentials", "credentials.*", ".npmrc", ".pypirc"),
)
_EPOCH = (1980, 1, 1, 0, 0, 0)


def pack(folder: Path, *, added: Mapping[str, bytes], excludes: Sequence[str] = ()) -> bytes:
    """Return the zip file of a folder.

    Args:
        added: files that are not in the folder, by path; they win over files of the folder.
        excludes: more to leave out: names or paths with wildcards.

    Raises:
        ConfigError: there is no such folder, or it is too large to travel with every attempt.
    """
    if not folder.is_dir():
        raise ConfigError(f"--working-dir={folder} is not a folder. Name the one with your configuration.")
    sizes: dict[str, int] = {}
    total_bytes = 0
    for path in _list_files(folder, excludes):
        sizes[path] = (folder / path).stat().st_size
        total_bytes += sizes[path]
        if total_bytes > MOST_BYTES or len(sizes) > MOST_FILES:
            raise _refuse(folder, sizes)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted({*sizes, *added}):
            entry = zipfile.ZipInfo(path, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, added[path] if path in added else (folder / path).read_bytes())
    return packed.getvalue()


def _list_files(folder: Path, excludes: Sequence[str]) -> Iterator[str]:
    """Yield the relative paths of the regular files to pack; a link is followed to a file inside the folder only."""
    root = folder.resolve()
    known = _ask_git(folder)
    for path in known if known is not None else _walk(folder):
        full = folder / path
        if _is_left_out(path, excludes) or not full.is_file():  # git also names what was just deleted
            continue
        if full.resolve().is_relative_to(root):
            yield path


def _ask_git(folder: Path) -> list[str] | None:
    """Return what git tracks or would track; None if this is no work tree of git."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "."]
    done = subprocess.run(command, capture_output=True, check=False)
    return os.fsdecode(done.stdout).split("\0")[:-1] if done.returncode == 0 else None


def _walk(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        here = Path(parent).relative_to(folder)
        folders[:] = sorted(name for name in folders if not _is_left_out((here / name / "x").as_posix(), ()))
        yield from ((here / name).as_posix() for name in sorted(files))


def _is_left_out(path: str, excludes: Sequence[str]) -> bool:
    *folders, name = PurePosixPath(path).parts
    if folders and folders[0] in _FOLDERS_AT_THE_TOP:
        return True
    if any(fnmatch.fnmatch(folder, pattern) for folder in folders for pattern in _FOLDERS):
        return True
    if any(fnmatch.fnmatch(name, pattern) for pattern in (*_DATA, *_SECRETS)):
        return True
    parents = [path, *(str(parent) for parent in PurePosixPath(path).parents)]
    return any(
        fnmatch.fnmatch(part, pattern.rstrip("/")) for pattern in excludes for part in (*parents, *folders, name)
    )


def _refuse(folder: Path, sizes: Mapping[str, int]) -> ConfigError:
    largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
    named = ", ".join(f"{path} ({sizes[path] / 2**20:.1f} MiB)" for path in largest)
    return ConfigError(
        f"--working-dir={folder} has more than {MOST_BYTES >> 20} MiB or {MOST_FILES} files to send, and they would "
        f"travel with every attempt; the largest so far: {named}. Leave out what the run does not need (.gitignore, "
        "--exclude PATTERN), or name a smaller folder; data and runs belong on a path that the nodes see."
    )
