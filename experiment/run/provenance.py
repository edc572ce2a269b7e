"""Provenance of a run: command, versions, commit, and a hash of the code."""

import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiment import files
from experiment.text import started_as

PACKAGES = ("torch", "torchvision", "numpy", "robustbench", "pyautoattack")


def provenance(script: Path) -> dict[str, Any]:
    """Return command, number of processes, versions, commit and a hash of the code, for config.json."""
    return {
        "command": _command(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        "commit": _commit(script),
        "code_sha256": _code_sha256(script),
    }


def _command() -> str:
    """Return the command line, with torchrun and its number of processes if torchrun started it."""
    words = [*started_as(sys.argv[0]), *sys.argv[1:]]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join(["python", *words])
    processes, of_node = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = [f"--nnodes={processes // of_node}"] if processes > of_node else []
    return shlex.join(["torchrun", *nodes, f"--nproc_per_node={of_node}", *words])


def _code_sha256(script: Path) -> str:
    """SHA-256 over the script and every module of the project that a run imports."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    names = [name for name in ("cifar100_models", "experiment", "examples") if name in sys.modules]
    packages = (path for name in names for path in (root / name).rglob("*.py"))
    for path in (script, root / "attacks.py", root / "rslad_loss.py", *sorted(packages)):
        digest.update(f"{path.name} {files.file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(script: Path) -> str | None:
    """Return the commit, with -dirty if the code differs from it; None outside a git checkout."""
    git, script = shutil.which("git"), script.resolve()
    if not git:
        return None

    def ask(*arguments: str) -> str:
        command = [git, "-C", str(script.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = ask("describe", "--always", "--abbrev=40")
    if not commit:
        return None
    # Only code counts: an edited README does not change a run, but a script that is not in git does.
    edited = ask("status", "--porcelain", "--untracked-files=no", "--", ":(top)*.py")
    return f"{commit}-dirty" if edited or not ask("ls-files", "--", script.name) else commit
