"""The run folder: one run from its first step to result.json, through any number of kills."""

import argparse
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiment import RunStopped, UserError, checkpoint, data, teachers
from experiment.engine import SYNC_EVERY, Engine
from experiment.tracking import Mirror, Progress, epoch_line, summary

FORMAT = 1
FREE_SETTINGS = (
    "nowand", "wandb_project", "wandb_entity", "wandb_name", "wandb_tags",
    "checkpoint_minutes", "data_dir", "run_dir", "teacher_path",
)  # fmt: skip
"""Settings that may change between a run and its resumption: they move no bit of the result."""
PACKAGES = ("torch", "torchvision", "numpy", "robustbench", "pyautoattack")


class Run:
    """One run: its folder, its state, its clock. The training loop itself stays in the script.

    In order of use: ``Run(...)``, ``start``, then per epoch of ``epochs`` the batches of ``batches`` with ``count``
    after each step and ``end_epoch``, last ``finish``.

    Attributes:
        engine: device, precision and ranks.
        device: the training device.
        folder: the run folder.
    """

    def __init__(self, args: argparse.Namespace, script: str, recipe: dict[str, Any]) -> None:
        """Open the run folder and refuse, before any work, what cannot end well.

        Args:
            args: what ``cli.parse_args`` returned.
            script: the script's ``__file__``.
            recipe: the script's RECIPE.

        Raises:
            UserError: the data set does not exist, the folder cannot be written, holds a finished or differing run,
                or is in use; W&B was asked for and does not answer.
        """
        data.check_name(args.dataset)
        if hasattr(args, "teacher"):
            teachers.check_teacher_name(args.teacher, args.teacher_path)
        self.args, self.script, self.recipe = args, Path(script), recipe
        self.folder = Path(args.run_dir) / args.run_name
        main = os.environ.get("RANK", "0") == "0"
        self._config = self._open_folder() if main else {}
        self.engine = Engine(args)
        self.device = self.engine.device
        self._mirror = Mirror(args, self._config.get("id", ""), enabled=main)
        self._epoch, self._step, self._seen = 0, 0, 0  # finished epochs; steps and images of the epoch in work
        self._sums: dict[str, Tensor] = {}
        self._bad_step = torch.full((), torch.inf, device=self.device)
        self._rows: list[dict[str, Any]] = []
        self._seconds = {"train": 0.0, "evaluation": 0.0}
        self._epoch_seconds, self._saved_at = 0.0, time.monotonic()
        self._busy, self._signal = False, None
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    # -- the folder ---------------------------------------------------------------------------------------------------

    def _open_folder(self) -> dict[str, Any]:
        """Lock the folder; return the config.json in it, or the beginnings of a new one."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR)  # locked for the life of the process
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{self.folder} is in use by another process; wait for it, or give another --run_name"
            ) from error
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; choose another --run_dir") from error
        for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed while writing
            leftover.unlink()
        path = self.folder / "config.json"
        if path.exists():
            config = checkpoint.read_json(path)
            self._refuse_other_settings(config)
            if (self.folder / "result.json").exists():
                raise UserError(
                    f"{self.folder} holds a finished run; see its result.json, evaluate it again with evaluate.py, or "
                    "train another with another --run_name or --seed"
                )
            return config
        others = sorted(entry.name for entry in self.folder.iterdir() if entry.name != ".lock")
        if others:
            raise UserError(f"{self.folder} is not a run folder (it holds {others[0]}); give another --run_name")
        return {"id": uuid.uuid4().hex[:12]}

    def _refuse_other_settings(self, config: dict[str, Any]) -> None:
        there, here = config.get("settings"), {"script": self.script.name, **vars(self.args)}
        if config.get("format") != FORMAT or not isinstance(there, dict):
            raise UserError(f"{self.folder}/config.json is not of this version of the project; give another --run_name")
        there = {"script": config.get("script"), **there}
        names = [name for name in {**there, **here} if name not in FREE_SETTINGS]
        differing = [
            f"{name} {there.get(name)!r} there, {here.get(name)!r} now"
            for name in names
            if (name in there) != (name in here) or not _same(name, there[name], here[name])
        ]
        if differing:
            raise UserError(
                f"{self.folder} holds a run with other settings ({'; '.join(differing[:4])}); give its settings to "
                "resume it, or another --run_name for a new run"
            )

    def start(
        self,
        images: data.Data,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        teacher: nn.Module | None = None,
    ) -> None:
        """Write config.json, or restore the state of the run that the folder holds; print what is about to run.

        Raises:
            UserError: the data or the teacher are not those that the run began with; no checkpoint is readable; no
                room on the disk; AutoAttack is impossible with these classes.
            RunStopped: the teacher's logits are not finite, or the same for every image.
        """
        self._images, self._student, self._optimizer = images, student, optimizer
        self._check_feasible(teacher)
        self.engine.distribute(student, optimizer)
        config = {
            "format": FORMAT,
            "id": self._config.get("id"),
            "script": self.script.name,
            "method": self.recipe["method"],
            "adds": self.recipe.get("adds"),
            "added_settings": list(self.recipe.get("added", {})),
            "settings": vars(self.args),
            "command": shlex.join(["python", *sys.argv]),
            "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
            "device": self.engine.hardware(),
            "commit": _commit(self.script.resolve().parent),
            "num_classes": images.num_classes,
            "dataset_sha256": images.sha256,
            "teacher_sha256": getattr(teacher, "sha256", None),
        }
        if self.engine.main:
            if "settings" in self._config:
                for name in ("num_classes", "dataset_sha256", "teacher_sha256"):
                    if self._config.get(name) != config[name]:
                        raise UserError(
                            f"{self.folder} began with {name} {self._config.get(name)}, now it is {config[name]}; give "
                            "it back what it began with, or another --run_name"
                        )
                self._config = {**config, **self._config}
            else:
                self._config = config
                checkpoint.write_json(self.folder / "config.json", config)
        resumed = self._restore()
        if self.engine.main:
            print(f"{config['method']}{'+' + config['adds'] if config['adds'] else ''}: {self.folder}{resumed}")
            if teacher is not None:
                print(f"  teacher  {self.args.teacher}, {_size(teacher)}, SHA-256 {str(config['teacher_sha256'])[:12]}")
            print(f"  student  {self.args.student}, {_size(student)}, {images.num_classes} classes")
            print(f"  data     {images.name}: {len(images.x_train)} training and {len(images.x_test)} test images")
            print(f"  device   {config['device']}, {self.args.precision}, torch {torch.__version__}", flush=True)
            if self.device.type == "cpu" and images.name != "digits":
                print("  warning  no CUDA device: with a WRN-28-10 teacher an epoch takes a day here, minutes on a GPU")
        steps = images.steps(self.args.batch)
        done = self._epoch * steps + self._step
        self._bar = Progress(self.args.epochs * steps, done, show=self.engine.main)
        self._saved_at = time.monotonic()

    def _check_feasible(self, teacher: nn.Module | None) -> None:
        images, args = self._images, self.args
        if args.aa_examples and images.num_classes < 10:
            raise UserError(
                f"AutoAttack needs 10 classes, {images.name} has {images.num_classes}; give --aa_examples 0"
            )
        rest = len(images.x_train) % args.batch
        if images.steps(args.batch) < 1 or min(args.batch, rest if rest > 1 else args.batch) < 2 * self.engine.world:
            raise UserError(
                f"--batch {args.batch} leaves fewer than 2 of {len(images.x_train)} images to a process in some step; "
                "choose another --batch"
            )
        need = 6 * sum(p.numel() * p.element_size() for p in self._student.parameters())
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise UserError(
                f"{self.folder} needs {need / 2**20:.0f} MiB for checkpoints, the disk has {free / 2**20:.0f} MiB left"
            )
        if teacher is not None:
            with torch.no_grad():
                logits = teacher(data.as_float(images.x_test[:64]))
            if not logits.isfinite().all() or (logits.std(dim=0).max() == 0 and len(logits) > 1):
                kind = "the same for every image" if logits.isfinite().all() else "not finite"
                raise RunStopped(f"teacher {args.teacher}: its logits are {kind} on {images.name}", RunStopped.DIVERGED)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write last.pt; the one before it stays as previous.pt. Only a state with finite losses is saved."""
        self._refuse_divergence()
        self._saved_at = time.monotonic()
        if not self.engine.main:
            return
        busy, self._busy = self._busy, True
        last, aside = self.folder / "last.pt", self.folder / ".previous.pt.tmp"
        if last.exists():
            aside.unlink(missing_ok=True)
            _link(last, aside)
            os.replace(aside, self.folder / "previous.pt")
        content = {
            "format": FORMAT,
            "model": self._student.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "epoch": self._epoch,
            "step": self._step,
            "seen": self._seen,
            "sums": {name: value.item() for name, value in self._sums.items()},
            "rows": self._rows,
            "seconds": self._seconds,
            "epoch_seconds": self._epoch_seconds,
        }
        checkpoint.save(last, content)
        self._busy = busy
        if self._signal and not busy:
            self._stop_now()

    def _restore(self) -> str:
        """Load last.pt, or previous.pt if that one is damaged; return what to say about it."""
        last, previous = self.folder / "last.pt", self.folder / "previous.pt"
        found = [path for path in (last, previous) if path.exists()]
        if not found:
            return ""
        note = ""
        for path in found:
            try:
                self._load(checkpoint.load(path), path)
                break
            except UserError as error:
                if path == found[-1]:
                    raise UserError(
                        f"{error}; no other checkpoint is left: delete {self.folder} to begin anew"
                    ) from error
                note = f" ({error}; put aside as last.damaged.pt)"
        if note and self.engine.main:
            os.replace(last, self.folder / "last.damaged.pt")
        self._write_metrics()
        return f"\n  resumed  after epoch {self._epoch}, step {self._step}{note}"

    def _load(self, content: Any, path: Path) -> None:
        try:
            self._student.load_state_dict(content["model"])
            self._optimizer.load_state_dict(content["optimizer"])
            torch.set_rng_state(content["rng"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(content["rng_cuda"], self.device)
            self._epoch, self._step, self._seen = content["epoch"], content["step"], content["seen"]
            # The sums are totals over all ranks: they count once.
            mine = self.engine.main
            self._sums = {name: self._scalar(value if mine else 0.0) for name, value in content["sums"].items()}
            self._rows, self._seconds = content["rows"], content["seconds"]
            self._epoch_seconds = content["epoch_seconds"]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{path} does not fit this run: {reason}") from error

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def epochs(self) -> Iterator[int]:
        """The epochs still to do, counted from 1."""
        yield from range(self._epoch + 1, self.args.epochs + 1)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch still to do; between two of them the run saves itself and heeds signals.

        Yields:
            x (n, 3, H, W) float32 in [0, 1] and y (n,) on the device: this rank's share of the global batch.
        """
        args, engine = self.args, self.engine
        self._busy, began = True, time.monotonic() - self._epoch_seconds
        stream = self._images.batches(args.batch, args.seed, epoch, self._step, engine.rank, engine.world)
        for x, y, first, total in stream:
            engine.begin_batch(first, len(x), total)
            yield x, y
            self._step, self._seen = self._step + 1, self._seen + total
            self._epoch_seconds = time.monotonic() - began
            self._bar.step()
            if engine.world == 1 and self._bar.due():
                self._bar.figures(epoch, args.epochs, self._means())
                self._refuse_divergence()
            if engine.world == 1 or self._step % SYNC_EVERY == 0:
                stop = engine.any_rank(self._signal is not None)
                if stop or engine.any_rank(time.monotonic() - self._saved_at > 60 * args.checkpoint_minutes):
                    self._gather()
                    self._save()
                if stop:
                    self._stop_now()
        self._gather()
        self._row = self._means()  # waits for the device, so the time is that of the work
        self._epoch_seconds = time.monotonic() - began
        self._busy, self._trained_at = False, time.monotonic()
        if self._signal:
            self._save()
            self._stop_now()

    def count(self, terms: dict[str, Tensor]) -> None:
        """Add a step's loss terms to the epoch's sums, on the device and without waiting for it."""
        held = self.engine.held
        for name, term in terms.items():
            value = term.detach().double()
            bad = torch.where(value.isfinite(), torch.inf, float(self._step + 1))
            self._bad_step = torch.minimum(self._bad_step, bad)
            self._sums[name] = self._sums[name] + held * value if name in self._sums else held * value

    def _gather(self) -> None:
        """Replace the sums of each rank by their total on rank 0 (and 0 elsewhere)."""
        if self.engine.world > 1:
            for name in self._sums:
                total = self.engine.total(self._sums[name])
                self._sums[name] = total if self.engine.main else torch.zeros_like(total)
            self._bad_step = -self.engine.highest(-self._bad_step)

    def _means(self) -> dict[str, Any]:
        means = {f"loss_{name}": value.item() / max(self._seen, 1) for name, value in self._sums.items()}
        speed = self._seen / max(self._epoch_seconds, 1e-9)
        return {"loss": sum(means.values()), **means, "images_per_second": speed}

    def _refuse_divergence(self) -> None:
        if self._bad_step.isfinite():
            terms = ", ".join(f"{name} {value.item():g}" for name, value in self._sums.items())
            good = self.folder / "last.pt"
            back = f"{good} is from before it" if good.exists() else "no checkpoint was written yet"
            raise RunStopped(
                f"the loss is not finite in epoch {self._epoch + 1}, step {int(self._bad_step)} (sums so far: {terms}; "
                f"lr {self._optimizer.param_groups[0]['lr']:g}); nothing after it is saved, {back}; a smaller --lr, "
                "or --precision fp32, may help",
                RunStopped.DIVERGED,
            )

    def end_epoch(self, accuracies: dict[str, float]) -> None:
        """Close an epoch: its row in metrics.jsonl, its checkpoint, its line on the terminal.

        Args:
            accuracies: fractions by name (``clean``, ``pgd20``); empty if the epoch was not evaluated.
        """
        epoch = self._epoch + 1
        lr = self._optimizer.param_groups[0]["lr"]
        row = {"epoch": epoch, "lr": lr, **self._row, **accuracies, "seconds": self._epoch_seconds}
        self._refuse_divergence()
        self._rows.append(row)
        self._seconds["train"] += self._epoch_seconds
        self._seconds["evaluation"] += time.monotonic() - self._trained_at
        self._epoch, self._step, self._seen, self._sums, self._epoch_seconds = epoch, 0, 0, {}, 0.0
        self._save()
        self._write_metrics()
        if self.engine.main:
            self._mirror.log(row)
            left = (self.args.epochs - epoch) * sum(r["seconds"] for r in self._rows) / epoch
            self._bar.line(epoch_line(row, self.args.epochs, left))

    def _write_metrics(self) -> None:
        """metrics.jsonl is written whole, from the rows that the checkpoint holds: none can be missing or doubled."""
        if self.engine.main:
            text = "".join(json.dumps(row) + "\n" for row in self._rows)
            checkpoint.write_atomically(self.folder / "metrics.jsonl", lambda file: file.write(text.encode()))

    def finish(self, autoattack: Callable[..., dict[str, Any]]) -> None:
        """Save the student, attack it, write result.json and print the summary.

        Args:
            autoattack: ``evaluation.autoattack``; called on the first --aa_examples test images, unless that is 0.
        """
        self._bar.close()
        args, images, config = self.args, self._images, self._config
        if self.engine.main:
            info = {"method": self.recipe["method"], "run": self.folder.name, "settings": _plain(vars(args))}
            checkpoint.save_student(self.folder / "student.pt", self._student, args.student, images.num_classes, info)
        self.engine.barrier()
        attack = None
        if args.aa_examples:
            x, y = images.x_test[: args.aa_examples], images.y_test[: args.aa_examples]
            where = {"folder": self.folder / "autoattack", "batch": args.aa_batch}
            attack = autoattack(self._student, x, y, args.epsilon, seed=args.seed, **where)
        if not self.engine.main:
            return
        last = self._rows[-1]
        result = {
            "format": FORMAT,
            **{name: config[name] for name in ("script", "method", "adds")},
            **{name: getattr(args, name, None) for name in ("teacher", "student", "dataset", "seed", "epochs")},
            "clean": last["clean"],
            "pgd20": last["pgd20"],
            "test_examples": len(images.x_test),
            "autoattack": attack,
            "seconds": {**self._seconds, "autoattack": attack["seconds"] if attack else 0.0},
            "student_sha256": checkpoint.state_sha256(self._student),
            "hardware": config["device"],
            "command": config["command"],
        }
        checkpoint.write_json(self.folder / "result.json", result)
        self._mirror.finish(result)
        print(summary(result, str(self.folder)), flush=True)

    # -- signals ------------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, _frame: object) -> None:
        """SIGTERM or Ctrl-C: let the step or the write in work end; a second one does not wait."""
        again, self._signal = self._signal is not None, number
        if again or not self._busy:
            self._stop_now()

    def _stop_now(self) -> None:
        name = signal.Signals(self._signal).name
        raise RunStopped(
            f"stopped by {name} after epoch {self._epoch}, step {self._step}; the same command goes on from the last "
            f"checkpoint in {self.folder}",
            RunStopped.INTERRUPTED,
        )


def _same(name: str, there: Any, here: Any) -> bool:
    if name == "device":  # cuda:0 and cuda:1 are one kind of machine
        return str(there).partition(":")[0] == str(here).partition(":")[0]
    return there == here


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings))


def _size(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()):,} parameters"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """The commit of the code, marked where the tree has changes on top; None outside a git checkout."""
    git = shutil.which("git")
    if not git:
        return None
    answer = subprocess.run(
        [git, "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None
