"""Run everything with the packages blocked that a bare GPU machine lacks: python tests/bare_machine.py.

The six scripts train, a run with AutoAttack ends with one line before it trains, the GPU tests run on the CPU, and the
benchmarks at toy size. Prints a line each; exit status 1 if one fails.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
ABSENT = [
    *("robustbench", "autoattack", "pyautoattack", "torchattacks", "wandb", "tensorboard", "pandas", "pydantic"),
    *("rich", "submitit", "onnx", "onnxruntime", "onnxscript", "huggingface_hub", "safetensors", "torchvision"),
]
"""torchvision is present there, but nothing on a GPU may need it: images come as .npz."""

BLOCK = f"""
import importlib.machinery, importlib.metadata, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT} else super().find_spec(name, path, target)

sys.meta_path = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
version = importlib.metadata.version

def version_of_present(name):
    if name.lower() in {ABSENT}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = version_of_present
"""
"""A sitecustomize.py: every Python started with its folder on PYTHONPATH finds no package of these names."""

METHODS = ("ard", "ard_IGDM", "rslad", "rslad_IGDM", "adaad", "adaad_IGDM")
SHORT = "--dataset digits --epochs 1 --batch 512 --steps 1 --device cpu --run_dir ."
STUDENT = f"{SHORT} --teacher teacher --student RES-8"
TOY = "--device cpu --rounds 1 --student RES-8"
GPU_TESTS = ROOT / "tests" / "test_gpu.py"
COMMANDS = [
    f"{ROOT}/train_teacher.py {SHORT} --model RES-8 --run_name teacher --aa_examples 0",
    *(f"{ROOT}/{method}_cifar100.py {STUDENT} --aa_examples 0 --run_name {method}" for method in METHODS),
    f"{ROOT}/ard_cifar100.py {STUDENT} --aa_examples 0 --run_name ard",  # finished: shows its summary
    f"{ROOT}/ard_cifar100.py {STUDENT} --aa_examples 8 --run_name attacked",
    f"-m pytest -W default -o addopts= -q -p no:cacheprovider -k 'not compiled and not end_to_end' {GPU_TESTS}",
    "-m benchmarks.gpu_check --rehearse --out gpu_check --parts baseline fidelity launches",
    f"-m benchmarks.training_step {TOY} --teacher DM-WRN-10-1 --batch 2 --methods ard_IGDM",
    f"-m benchmarks.evaluation {TOY} --examples 2 --batch 2 --product_batch 2 --aa_examples 0",
]


def main() -> int:
    """Run all of it; the exit status."""
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sitecustomize.py").write_text(BLOCK)
        environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "GPU_TESTS_DEVICE": "cpu"}
        for command in COMMANDS:
            words = [sys.executable, *shlex.split(command)]
            done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            good = done.returncode == 0
            if "attacked" in command:
                trained = (folder / "attacked" / "last.pt").exists()
                good = done.returncode == 2 and "AutoAttack" in done.stderr.splitlines()[-1] and not trained
            failed += not good
            print(f"{'ok    ' if good else 'FAILED'} {command}", flush=True)
            if not good:
                print(f"       status {done.returncode}; {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
