"""The run folder: one run from its first step to result.json, through any number of kills."""

import argparse
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attacks import frozen
from experiment import RunStopped, UserError, data, files, teachers
from experiment.engine import SYNC_EVERY, Engine
from experiment.evaluation import GRADIENT_DEFINITION, gradient_alignment
from experiment.run import folder
from experiment.run.health import PROBE_IMAGES, SETTLED_STEPS, fault_of
from experiment.run.progress import Progress, epoch_line, header, summary
from experiment.run.provenance import provenance
from experiment.run.trackers import WandbMirror

CHANGES = {"device": "device", "versions": "versions", "commit": "commit", "code_sha256": "code"}
"""Entries of config.json that may differ when a run is resumed, and what they are called: its bits may differ then."""


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
        data.check_dataset(args.dataset)
        if hasattr(args, "teacher"):
            teachers.check_teacher_name(args.teacher, args.teacher_path)
        self.args, self.script, self.recipe = args, Path(script), recipe
        self.folder = Path(args.run_dir) / args.run_name
        main = os.environ.get("RANK", "0") == "0"
        self._lock = folder.lock(self.folder) if main else None
        self._config = folder.admit(self.folder, self.script.name, args) if main else {}
        self.engine = Engine(args)
        self.device = self.engine.device
        self._mirror = WandbMirror(args, self._config.get("id", ""), enabled=main)
        self._epoch, self._step, self._seen = 0, 0, 0  # finished epochs; steps and images of the epoch in work
        self._sums: dict[str, Tensor] = {}
        self._bad_step = torch.full((), torch.inf, device=self.device)
        self._rows: list[dict[str, Any]] = []
        self._seconds = {"train": 0.0, "evaluation": 0.0}
        self._epoch_seconds, self._saved_at = 0.0, time.monotonic()
        self._busy, self._signal = False, None
        self._changed: list[str] = []
        self._attacked_config: dict[str, Any] | None = None
        self._trained: dict[str, Any] | None = None  # generator states of a trained epoch that is being evaluated
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, self._on_signal)

    # -- the start ----------------------------------------------------------------------------------------------------

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
        self._images, self._student, self._optimizer, self._teacher = images, student, optimizer, teacher
        self._check_feasible(teacher)
        self.engine.distribute(student, optimizer)
        config = {
            "format": folder.FORMAT,
            "id": self._config.get("id"),
            "script": self.script.name,
            "method": self.recipe["method"],
            "adds": self.recipe.get("adds"),
            "outer_settings": list(self.recipe.get("outer", {})),
            "added_settings": list(self.recipe.get(self.recipe.get("adds"), {})),
            "settings": vars(self.args),
            **provenance(self.script),
            "device": self.engine.hardware(),
            "num_classes": images.num_classes,
            "dataset_sha256": images.sha256,
            "teacher_sha256": getattr(teacher, "sha256", None),
        }
        if self.engine.main:
            self._write_config(config)
        resumed = self._restore()
        self._check_finished_student()
        if self.engine.main:
            print(header(config, str(self.folder), resumed, images, student, teacher), flush=True)
        steps = images.steps(self.args.batch)
        done = self._epoch * steps + self._step
        self._bar = Progress(self.args.epochs * steps, done, show=self.engine.main)
        self._saved_at = time.monotonic()

    def _write_config(self, config: dict[str, Any]) -> None:
        """Write config.json for a new run; for a resumed one hold what is about to run against it."""
        there = self._config
        if "settings" not in there:
            files.write_json(self.folder / "config.json", config)
        else:
            for name in ("num_classes", "dataset_sha256", "teacher_sha256"):
                if there.get(name) != config[name]:
                    raise UserError(
                        f"{self.folder} began with {name} {there.get(name)!r:.80}, now it is {config[name]}; give it "
                        "back what it began with, or another --run_name"
                    )
            self._changed = [CHANGES[name] for name in CHANGES if name in there and there[name] != config[name]]
            if self._changed:
                changed = " and ".join(self._changed)
                print(f"warning: {changed} changed since the run began: not bit for bit the same run")
            attack = {name: config["settings"][name] for name in folder.ATTACK_SETTINGS}
            if any(there["settings"][name] != value for name, value in attack.items()):
                # A finished run that is attacked now: its config.json says so together with its result.json.
                settings = {**there["settings"], **attack}
                self._attacked_config = {**there, "settings": settings, "command": config["command"]}
            else:
                config["command"] = there["command"]
            config["device"] = there["device"]
        self._config = config

    def _check_finished_student(self) -> None:
        """A finished run that is attacked now: what was restored must be the student of its result.json."""
        path = self.folder / "result.json"
        if not path.exists():
            return
        digest = files.read_json(path).get("student_sha256")
        if self._epoch != self.args.epochs or files.state_sha256(self._student) != digest:
            raise UserError(
                f"{self.folder} is finished, but its last.pt does not hold the student of its result.json; attack its "
                "student.pt with evaluate.py --attacks autoattack"
            )

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
                fault = fault_of(teacher(data.as_float(images.x_test[:64])))
            if fault:
                raise RunStopped(
                    f"teacher {args.teacher}: its logits are {fault} on {images.name}", RunStopped.DIVERGED
                )

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write last.pt; the one before it stays as previous.pt. Only a state with finite losses is saved."""
        self._refuse_divergence(weights=True)
        self._saved_at = time.monotonic()
        if not self.engine.main:
            return
        busy, self._busy = self._busy, True
        content = {
            "format": folder.FORMAT,
            "id": self._config["id"],
            "architecture": self.args.student,
            "num_classes": self._images.num_classes,
            "model": self._student.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            # The rate of an epoch follows from these: the schedule has no further state.
            "schedule": {"lr": self.args.lr, "lr_milestones": self.args.lr_milestones},
            **(self._trained or self._generators()),
            "epoch": self._epoch,
            "step": self._step,
            "seen": self._seen,
            "sums": {name: value.item() for name, value in self._sums.items()},
            "rows": self._rows,
            "seconds": self._seconds,
            "epoch_seconds": self._epoch_seconds,
            "changed": self._changed,
        }
        files.save(self.folder / "last.pt", content, previous=self.folder / "previous.pt")
        self._busy = busy
        if self._signal and not busy:
            self._stop_now()

    def _generators(self) -> dict[str, Tensor | None]:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {"rng": torch.get_rng_state(), "rng_cuda": cuda}

    def _restore(self) -> str:
        """Load last.pt, or previous.pt if that one is damaged; return what to say about it."""
        last = self.folder / "last.pt"
        found = [path for path in (last, self.folder / "previous.pt") if path.exists()]
        faults = []
        for path in found:
            try:
                self._load(files.load(path), path)
                break
            except UserError as error:
                faults.append(str(error))
        else:
            if found:
                raise UserError(f"{'; '.join(faults)}; no other checkpoint is left: delete {self.folder} to begin anew")
            return ""
        self.engine.barrier()  # every rank has read it
        note = ""
        if faults and self.engine.main:
            os.replace(last, self.folder / "last.damaged.pt")
            note = f" of {path.name} ({faults[0]}; put aside as last.damaged.pt)"
        self._write_metrics()
        return f"\n  resumed  after epoch {self._epoch}, step {self._step}{note}"

    def _load(self, content: Any, path: Path) -> None:
        try:
            if self.engine.main and content["id"] != self._config["id"]:
                raise ValueError(f"it belongs to a run with id {content['id']!r:.40}")
            epoch, step, rows = content["epoch"], content["step"], content["rows"]
            if not (0 <= epoch <= self.args.epochs and 0 <= step <= self._images.steps(self.args.batch)):
                raise ValueError(f"there is no epoch {epoch}, step {step}")
            if [row["epoch"] for row in rows] != list(range(1, epoch + 1)):
                raise ValueError("its rows are not those of its epochs")
            self._student.load_state_dict(content["model"])
            self._optimizer.load_state_dict(content["optimizer"])
            torch.set_rng_state(content["rng"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(content["rng_cuda"], self.device)
            self._epoch, self._step, self._seen, self._rows = epoch, step, content["seen"], rows
            # The sums are totals over all ranks: they count once.
            mine = self.engine.main
            self._sums = {name: self._scalar(value if mine else 0.0) for name, value in content["sums"].items()}
            self._seconds, self._epoch_seconds = content["seconds"], content["epoch_seconds"]
            # Kept for result.json: nobody who reads it has seen the warnings.
            before = content.get("changed", [])
            self._changed = [said for said in CHANGES.values() if said in (*before, *self._changed)]
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
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
        self._busy, self._trained, began = True, None, time.monotonic() - self._epoch_seconds
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
        self._refuse_divergence(weights=True)
        self._refuse_collapse()
        self._trained, self._trained_at = self._generators(), time.monotonic()
        if engine.any_rank(self._signal is not None):
            self._save()
            self._stop_now()
        self._busy = False

    def count(self, terms: dict[str, Tensor]) -> None:
        """Add a step's loss terms to the epoch's sums, on the device and without waiting for it."""
        images = self.engine.local_batch
        for name, term in terms.items():
            value = term.detach().double()
            bad = torch.where(value.isfinite(), torch.inf, float(self._step + 1))
            self._bad_step = torch.minimum(self._bad_step, bad)
            self._sums[name] = self._sums[name] + images * value if name in self._sums else images * value

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

    def _refuse_divergence(self, *, weights: bool = False) -> None:
        """Stop the run if a loss term since its start, or with `weights` a weight or statistic, is not finite."""
        if self._bad_step.isfinite():
            self._diverged(f"the loss is not finite in epoch {self._epoch + 1}, step {int(self._bad_step)}")
        if weights:
            floats = [value for value in self._student.state_dict().values() if value.is_floating_point()]
            # Sums hand on what is not finite; one transfer to the host.
            if not torch.stack([value.double().sum() for value in floats]).sum().isfinite():
                self._diverged(f"the student's weights are not finite in epoch {self._epoch + 1}, step {self._step}")

    def _refuse_collapse(self) -> None:
        """Stop the run if the student, as it would be saved, tells no images apart any more."""
        x, y = self._images.x_test, self._images.y_test
        sample = slice(None, None, -(-len(x) // PROBE_IMAGES))  # over the whole set, which may be sorted by class
        with torch.no_grad(), frozen(self._student):
            logits = self._student(data.as_float(x[sample]))
        fault = fault_of(logits)
        settled = (self._epoch + 1) * self._images.steps(self.args.batch) >= SETTLED_STEPS
        if fault:
            self._diverged(f"the student's logits are {fault} after epoch {self._epoch + 1}")
        if settled and len(y[sample].unique()) > 1 and len(logits.argmax(dim=1).unique()) == 1:
            self._diverged(f"the student predicts one class for every image after epoch {self._epoch + 1}")

    def _diverged(self, fact: str) -> None:
        terms = ", ".join(f"{name} {value.item() / max(self._seen, 1):g}" for name, value in self._sums.items())
        good = self.folder / "last.pt"
        back = f"{good} is from before it" if good.exists() else "no checkpoint was written yet"
        raise RunStopped(
            f"{fact} (means so far: {terms}; lr {self._optimizer.param_groups[0]['lr']:g}); nothing after it is saved, "
            f"{back}; a smaller --lr, or --precision fp32, in a new run may help",
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
        self._busy = True  # from here to the checkpoint the state is that of no single moment
        self._rows.append(row)
        self._seconds["train"] += self._epoch_seconds
        self._seconds["evaluation"] += time.monotonic() - self._trained_at
        self._epoch, self._step, self._seen, self._sums, self._epoch_seconds = epoch, 0, 0, {}, 0.0
        self._trained = None
        self._save()
        self._write_metrics()
        self._busy = False
        if self._signal:
            self._stop_now()
        if self.engine.main:
            self._mirror.log(row)
            left = (self.args.epochs - epoch) * sum(r["seconds"] for r in self._rows) / epoch
            self._bar.line(epoch_line(row, self.args.epochs, left))

    def _write_metrics(self) -> None:
        """metrics.jsonl is written whole, from the rows that the checkpoint holds: none can be missing or doubled."""
        if self.engine.main:
            text = "".join(json.dumps(row) + "\n" for row in self._rows)
            files.write_atomically(self.folder / "metrics.jsonl", lambda file: file.write(text.encode()))

    def finish(self, autoattack: Callable[..., dict[str, Any]]) -> None:
        """Save the student, hold its gradients against the teacher's, attack it; write result.json, print the summary.

        Args:
            autoattack: ``evaluation.autoattack``; called on the first --aa_examples test images, unless that is 0.
        """
        self._bar.close()
        args, images, config = self.args, self._images, self._config
        if self.engine.main:
            settings = json.loads(json.dumps(vars(args)))  # plain types only
            info = {"method": self.recipe["method"], "run": self.folder.name, "settings": settings}
            files.save_student(self.folder / "student.pt", self._student, args.student, images.num_classes, info)
        self.engine.barrier()
        began = time.monotonic()
        gradients = self._gradients()
        evaluation_seconds = self._seconds["evaluation"] + time.monotonic() - began
        attack = None
        if args.aa_examples:
            x, y = images.x_test[: args.aa_examples], images.y_test[: args.aa_examples]
            where = {"folder": self.folder / "autoattack", "batch": args.aa_batch}
            attack = autoattack(self._student, x, y, args.epsilon, seed=args.seed, **where)
        if not self.engine.main:
            return
        last = self._rows[-1]
        result = {
            "format": folder.FORMAT,
            **{name: config[name] for name in ("script", "method", "adds")},
            **{name: getattr(args, name, None) for name in ("teacher", "student", "dataset", "seed", "epochs")},
            "clean": last["clean"],
            "pgd20": last["pgd20"],
            "test_examples": len(images.x_test),
            "autoattack": attack,
            "gradients": gradients,
            "seconds": {
                "train": self._seconds["train"],
                "evaluation": evaluation_seconds,
                "autoattack": attack["seconds"] if attack else 0.0,
            },
            "student_sha256": files.state_sha256(self._student),
            "hardware": config["device"],
            "command": config["command"],
            "changed": self._changed,  # between the run's start and its resumptions
        }
        if self._attacked_config:
            files.write_json(self.folder / "config.json", self._attacked_config)
        files.write_json(self.folder / "result.json", result)
        self._mirror.finish(result)
        print(summary(result, str(self.folder)), flush=True)

    def _gradients(self) -> dict[str, Any] | None:
        """GD and GC of the student against its teacher on all test images; None for a run without a teacher."""
        if self._teacher is None:
            return None
        x, y = self._images.x_test, self._images.y_test
        alignment = gradient_alignment(self._student, self._teacher, x, y)
        return {**alignment, "examples": len(x), "definition": GRADIENT_DEFINITION}

    # -- signals ------------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, _frame: object) -> None:
        """SIGTERM, Ctrl-C, hang-up: let the step or the write in work end, and save; a second one does not wait."""
        again, self._signal = self._signal is not None, number
        if self._busy and not again:
            return
        if self._trained and not again:  # evaluation changes nothing that is saved
            self._save()
        self._stop_now()

    def _stop_now(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):  # whatever comes now need not be waited for
            signal.signal(number, signal.SIG_DFL)
        name = signal.Signals(self._signal).name
        where = f"stopped by {name} after epoch {self._epoch}, step {self._step}; the same command "
        saved = (self.folder / "last.pt").exists()
        where += f"goes on from the last checkpoint in {self.folder}" if saved else "begins anew: nothing was saved yet"
        raise RunStopped(where, RunStopped.INTERRUPTED)
