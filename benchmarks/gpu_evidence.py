"""Does IGDM help on real images? A robust teacher of one's own, ARD and ARD+IGDM at equal settings, AutoAttack.

    python -m benchmarks.gpu_evidence --data cifar10.npz --state DIR --out $OUT --minutes 9

Made for a GPU that is lent for minutes: when its time is over it stops in order and packs what there is into files of
at most 15 MiB in --out; carried back and given as --state (both may be one folder), the next call goes on from there.
AutoAttack runs where pyautoattack is installed; the students wait for it otherwise. `evidence.json` has the figures,
for ``python -m benchmarks.report``.
"""

import argparse
import importlib.util
import io
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from experiment import UserError, cli, evaluation
from experiment.data import load_data
from experiment.files import load_student, read_json, write_atomically, write_json

ROOT = Path(__file__).parent.parent
EPSILON = 8 / 255
STUDENTS = ("ard", "ard_IGDM")
PIECE, MOST = 15 * 2**20, 44 * 2**20
"""Bytes of one file of the state, and of all of them: what fits beside the images into what travels."""
GRACE = 30.0
"""Seconds for a run to save itself, and for the state to be packed."""


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each run, by the name of its folder; ARD's and ARD+IGDM's differ by what is IGDM's."""
    shared = ["--dataset", args.data.name, "--run_dir", ".", "--aa_examples", "0", "--device", args.device]
    shared += ["--precision", args.precision, "--batch", str(args.batch), "--steps", str(args.steps)]
    student = [*shared, "--teacher", "teacher", "--student", args.student, "--epochs", str(args.epochs)]
    igdm = ["--alpha", str(args.alpha), "--ramp_epochs", str(args.epochs)]
    teacher = [*shared, "--model", args.teacher, "--epochs", str(args.teacher_epochs)]
    return {
        "teacher": ["train_teacher.py", *teacher, "--run_name", "teacher"],
        "ard": ["ard_cifar100.py", *student, "--run_name", "ard"],
        "ard_IGDM": ["ard_IGDM_cifar100.py", *student, *igdm, "--run_name", "ard_IGDM"],
    }


def run_until(command: list[str], folder: Path, end: float) -> bool:
    """Run a command in a folder; whether it ended by itself. At `end` it is asked to stop, and saves what it has.

    Raises:
        UserError: it failed.
    """
    if time.monotonic() > end:
        return False
    with subprocess.Popen([sys.executable, *command], cwd=folder) as process:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except (subprocess.TimeoutExpired, SystemExit) as over:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            if isinstance(over, SystemExit):  # this process was told to stop
                raise
            return False
    if process.returncode:
        raise UserError(f"status {process.returncode} from: {shlex.join(command)}")
    return True


def attack(run: Path, args: argparse.Namespace) -> None:
    """AutoAttack on a run's student, in chunks that resume; the result beside them."""
    device = torch.device(args.device)
    images = load_data(args.data.name, device=device)
    student = load_student(run).to(device)
    x, y = images.x_test[: args.aa_examples], images.y_test[: args.aa_examples]
    folder = run / "autoattack"
    found = evaluation.autoattack(student, x, y, EPSILON, folder=folder, batch=args.aa_batch)
    write_json(run / "autoattack.json", found)


def pack(folder: Path, out: Path) -> None:
    """Write what a later call needs to go on: all small files, and checkpoints of runs that are not finished."""

    def wanted(path: Path) -> bool:
        finished = (folder / path.relative_to(folder).parts[0] / "result.json").exists()
        return (
            path.is_file()
            and path.suffix != ".npz"
            and path.name != "previous.pt"
            and not (finished and path.name == "last.pt")
        )

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for path in sorted(folder.rglob("*")):
            if wanted(path):
                archive.add(path, path.relative_to(folder).as_posix())
    content = stream.getvalue()
    names = set()
    for i, first in enumerate(range(0, len(content), PIECE)):
        names.add(f"state.{i:02d}")
        write_atomically(out / f"state.{i:02d}", lambda file, first=first: file.write(content[first : first + PIECE]))
    for old in out.glob("state.[0-9]*"):
        if old.name not in names:
            old.unlink()
    if len(content) > MOST:
        print(f"warning: the state is {len(content) / 2**20:.0f} MiB, more than {MOST // 2**20}: a smaller --teacher")


def unpack(state: Path, folder: Path) -> bool:
    """Put the packed files back; whether there were any.

    Raises:
        UserError: the pieces are not those of one state.
    """
    pieces = sorted(state.glob("state.[0-9]*"))
    content = b"".join(path.read_bytes() for path in pieces)
    if pieces:
        try:
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                archive.extractall(folder, filter="data")
        except tarfile.TarError as error:
            raise UserError(f"the state in {state} is not complete ({error}); carry all of its pieces") from error
    return bool(pieces)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What there is of each run: its accuracies and its AutoAttack, where they are known."""
    rows = []
    for name in ("teacher", *STUDENTS):
        run = folder / name
        if not (run / "config.json").exists():
            continue
        settings = read_json(run / "config.json")["settings"]
        row = {"name": name, "network": settings["student"], "epochs": settings["epochs"], "finished": False}
        if (run / "result.json").exists():
            result = read_json(run / "result.json")
            row |= {"finished": True, "clean": result["clean"], "pgd20": result["pgd20"]}
            row["gradients"], row["seconds"] = result.get("gradients"), result["seconds"]["train"]
        if (run / "autoattack.json").exists():
            found = read_json(run / "autoattack.json")
            row["autoattack"] = {
                key: found.get(key) for key in ("accuracy", "examples", "attacks", "flags", "interval")
            }
        rows.append(row)
    return rows


def make_toy(path: Path) -> None:
    """Ten classes of noise around a colour of their own: enough to train on, and small."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, images in (("train", 40), ("test", 20)):
        y = np.arange(images) % 10
        x = generator.integers(0, 60, (images, 8, 8, 3)) + 19 * y[:, None, None, None]
        arrays |= {f"x_{split}": x.astype(np.uint8), f"y_{split}": y}
    np.savez(path, **arrays)


TOY = {
    **{"device": "cpu", "precision": "fp32", "teacher": "RES-8", "student": "RES-8", "teacher_epochs": 1, "epochs": 1},
    **{"batch": 20, "steps": 1, "aa_examples": 2, "aa_batch": 2},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags."""
    parser = cli.Parser(prog="python -m benchmarks.gpu_evidence", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help=".npz of x_train, y_train, x_test, y_test, as --dataset takes it")
    add("--state", type=Path, metavar="DIR", help="folder of an earlier call's --out, to go on from")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of evidence.json and of the packed state")
    add("--minutes", type=cli.number(above=True), default=9.0, help="after which it stops in order")
    add("--commit", help="the commit, where git cannot tell it")
    add("--rehearse", action="store_true", help="all of it at toy size on the CPU")
    add("--device", default="cuda", help="cuda or cpu")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="bf16", help="of training; evaluation is in float32")
    add("--teacher", default="WRN-16-4", help="architecture of the teacher")
    add("--student", default="MN-V2", help="architecture of the students")
    add("--teacher_epochs", type=cli.positive_int, default=20, help="epochs of the teacher (TRADES)")
    add("--epochs", type=cli.positive_int, default=15, help="epochs of each student")
    add("--alpha", type=cli.number(), default=20.0, help="IGDM's weight, whole from the last epoch on")
    add("--batch", type=cli.whole(2), default=128, help="images per step")
    add("--steps", type=cli.positive_int, default=10, help="attack steps in training")
    add("--aa_examples", type=cli.positive_int, default=1000, help="test images under AutoAttack, the first ones")
    add("--aa_batch", type=cli.positive_int, default=250, help="images per chunk of AutoAttack")
    add("--attack", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rehearse:
        vars(args).update(TOY)
    args.device = cli.resolve_device(parser, args.device)
    if not args.rehearse and (args.data is None or not args.data.is_file()):
        parser.error(f"argument --data: {args.data} is not allowed; an .npz of images")
    for folder in (args.out, args.state):
        if folder == args.out:
            folder.mkdir(parents=True, exist_ok=True)
        elif folder is not None and not folder.is_dir():
            parser.error(f"argument --state: {folder} is no folder")
    return args


def main() -> None:
    """Go on from the state as far as the time reaches; pack; print what there is."""
    args = parse_args()
    if args.attack:
        attack(args.attack, args)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception: what there is gets packed
    end = time.monotonic() + 60 * args.minutes - GRACE * (not args.rehearse)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.state and unpack(args.state, folder):
            print(f"going on from {args.state}", flush=True)
        # By paths relative to the run folders: a run resumes only under the settings that it began with.
        images = folder / "images.npz"
        if args.rehearse:
            make_toy(images)
        else:
            images.symlink_to(args.data.resolve())
        args.data = images
        complete = False
        try:
            complete = stages(folder, args, end)
        finally:  # whatever failed, what there is can be carried on
            about = report.about("gpu_evidence", args, torch.device(args.device))
            line = f"{args.teacher} → {args.student}; {'complete' if complete else 'not complete: again with --state'}:"
            figures = {**about, "line": line, "complete": complete, "evidence": rows_of(folder)}
            write_json(args.out / "evidence.json", figures)
            pack(folder, args.out)
    print(f"\n{report.text_of(figures)}", flush=True)


def stages(folder: Path, args: argparse.Namespace, end: float) -> bool:
    """Teacher, students, AutoAttack, one after another until `end`; whether all of it is done."""
    for name, (script, *flags) in commands(args).items():
        if not (folder / name / "result.json").exists() and not run_until([str(ROOT / script), *flags], folder, end):
            return False
    if importlib.util.find_spec("pyautoattack") is None:
        print("AutoAttack waits for a machine with pyautoattack", flush=True)
        return False
    for name in STUDENTS:
        # Its own process: it is killed when its time is over, and its chunks are files.
        flags = ["--out", ".", "--data", args.data.name, "--attack", name, "--device", args.device]
        flags += ["--aa_examples", str(args.aa_examples), "--aa_batch", str(args.aa_batch)]
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); from benchmarks import gpu_evidence; gpu_evidence.main()"
        )
        there = (folder / name / "autoattack.json").exists()
        if not there and not run_until(["-c", code, *flags], folder, end):
            return False
    return True


if __name__ == "__main__":
    cli.guard(main)
