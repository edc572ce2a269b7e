"""Run everything with the packages blocked that a bare GPU machine lacks.

    python tests/bare_machine.py

Blocked are the packages that such machines come without. The six scripts train, a run asked for AutoAttack is refused
in one line before it trains, the GPU tests run in their CPU copy, and the benchmarks at toy size. Prints a line each;
exit status 1 if one fails.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ABSENT = (
    *(
        "robustbench",
        "autoattack",
        "pyautoattack",
        "torchattacks",
        "wandb",
        "rich",
        "submitit",
        "tensorboard",
        "pandas",
    ),
    *("onnx", "onnxruntime", "onnxscript", "huggingface_hub", "safetensors", "torchvision"),
)
"""torchvision is there, but nothing on a GPU may need it: images come as .npz."""

BLOCK = """
import importlib.machinery, importlib.metadata, sys

ABSENT = {names!r}


class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)


sys.meta_path = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
version = importlib.metadata.version


def version_of_present(name):
    if name.lower() in ABSENT:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)


importlib.metadata.version = version_of_present
"""
"""A sitecustomize.py: every Python started with its folder on PYTHONPATH finds no package of these names."""

METHODS = ("ard", "ard_IGDM", "rslad", "rslad_IGDM", "adaad", "adaad_IGDM")
SHORT = ["--dataset", "digits", "--epochs", "1", "--batch", "512", "--steps", "1", "--device", "cpu", "--run_dir", "."]


def commands(folder: Path) -> list[tuple[str, list[str], int]]:
    """What is run: what it is called, the command, and the exit status that is expected."""
    teacher = [*SHORT, "--model", "RES-8", "--run_name", "teacher", "--aa_examples", "0"]
    student = [*SHORT, "--teacher", "teacher", "--student", "RES-8", "--aa_examples"]
    listed: list[tuple[str, list[str], int]] = [("train_teacher.py", [str(ROOT / "train_teacher.py"), *teacher], 0)]
    for method in METHODS:
        script = f"{method}_cifar100.py"
        listed.append((script, [str(ROOT / script), *student, "0", "--run_name", method], 0))
    refused = [str(ROOT / "ard_cifar100.py"), *student, "8", "--run_name", "attacked"]
    listed.append(("a run with AutoAttack is refused", refused, 2))
    tests = ["-m", "pytest", "-W", "default", "-m", "gpu", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "-k"]
    from_root = str(ROOT / "tests" / "test_gpu.py")
    listed.append(("the GPU tests, CPU copy", [*tests, "not compiled and not end_to_end", from_root], 0))
    check = ["-m", "benchmarks.gpu_check", "--rehearse", "--out", str(folder / "gpu_check")]
    parts = ["--parts", "machine", "baseline", "fidelity", "launches"]
    listed.append(("benchmarks.gpu_check", [*check, *parts], 0))
    toy = ["--device", "cpu", "--rounds", "1", "--student", "RES-8"]
    step = [*toy, "--teacher", "DM-WRN-10-1", "--batch", "2", "--methods", "ard_IGDM"]
    listed.append(("benchmarks.training_step", ["-m", "benchmarks.training_step", *step], 0))
    size = ["--examples", "2", "--batch", "2", "--product_batch", "2", "--aa_examples", "0"]
    listed.append(("benchmarks.evaluation", ["-m", "benchmarks.evaluation", *toy, *size], 0))
    return listed


def main() -> int:
    """Run all of it; the exit status."""
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sitecustomize.py").write_text(BLOCK.format(names=set(ABSENT)))
        environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "GPU_TESTS_DEVICE": "cpu"}
        for what, command, expected in commands(folder):
            started = time.monotonic()
            done = subprocess.run(
                [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            good = done.returncode == expected
            if expected:  # refused: one line, before a run folder says that anything was trained
                trained = (folder / "attacked" / "last.pt").exists()
                good &= "AutoAttack" in done.stderr and "Traceback" not in done.stderr and not trained
            print(f"{'ok    ' if good else 'FAILED'} {what}, {time.monotonic() - started:.0f} s", flush=True)
            if expected and good:
                print(f"       {done.stderr.strip().splitlines()[-1]}")
            if not good:
                failed += 1
                print(f"       status {done.returncode}; {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
