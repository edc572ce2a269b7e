"""Training-loop state: progress, checkpoints, resume and the final result."""

import argparse
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from experiment import RunStopped, data, files
from experiment.engine import Engine
from experiment.run import checks, folder
from experiment.run.progress import Progress, epoch_line, header, remaining, summary
from experiment.run.result import Measurement
from experiment.run.state import Checkpoints, Networks, State, generators
from experiment.run.stopping import Stopping
from experiment.run.trackers import open_trackers


class Run:
    """State of one run. The training loop itself is in the script.

    Order of calls: ``Run(...)``, ``start``; for each epoch of ``epochs``: the batches of ``batches`` with ``count``
    after each step, then ``end_epoch``; at the end ``finish``.

    Attributes:
        engine: device, precision and ranks.
        device: the training device.
        folder: the run folder.
    """

    def __init__(self, args: argparse.Namespace, script: str, recipe: dict[str, Any]) -> None:
        """Open the run folder and check the settings before training starts.

        Args:
            args: what ``cli.parse_args`` returned.
            script: the script's ``__file__``.
            recipe: the script's RECIPE.

        Raises:
            UserError: the data set does not exist; the folder cannot be written, contains another run, or is in use;
                AutoAttack cannot run; W&B does not answer.
            SystemExit: status 0, after printing the summary, if the run is finished.
        """
        checks.check_names(args)
        self.args, self.script, self.recipe = args, Path(script), recipe
        self.folder = Path(args.run_dir) / args.run_name
        main = os.environ.get("RANK", "0") == "0"
        self._lock = folder.lock(self.folder) if main else None
        # Check on every rank before the first collective, so that no rank waits for one that has exited.
        self._stored, result = folder.find_run(self.folder, self.script.name, args)
        if result is not None:
            if main:
                print(f"{self.folder} is a finished run. For a new run, change --run_name or --seed:")
                print(summary(result, str(self.folder)), flush=True)
            raise SystemExit(0)
        if main:
            folder.remove_leftovers(self.folder)
        self.engine = Engine(args)
        self.device = self.engine.device
        self._id = self.engine.from_main(self._stored.get("id") or uuid.uuid4().hex[:12])
        self._trackers = open_trackers(args, self._id, self.folder) if main else []
        self._state, self._steps = State(), 0
        self._saved_at, self._saved = time.monotonic(), (0, 0)
        self._pass_seconds = math.inf  # of the student's forward pass per image
        self._trained: dict[str, Any] | None = None  # generator states after an epoch, during its evaluation
        self._stopping = Stopping(self.engine, self._save_trained, self._stop_line)

    # -- the start ----------------------------------------------------------------------------------------------------

    def start(
        self,
        images: data.Data,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        teacher: nn.Module | None = None,
    ) -> None:
        """Write config.json, or restore the run from the folder; print the header.

        Raises:
            UserError: data or teacher differ from those at the start of the run; a network does not fit the data; no
                checkpoint is readable; the disk is full; AutoAttack cannot run with this number of classes. If one
                rank raises, all do.
            RunStopped: the teacher's logits are not finite, or the same for every image.
        """
        args = self.args
        self._images, self._steps = images, images.steps(args.batch)
        self._networks = Networks(student, optimizer, teacher, AveragedModel(student) if args.swa_after else None)
        self._checkpoints = Checkpoints(self.folder, self._id, args, self.engine)
        current = folder.describe(args, self.script, self.recipe, self._id, self.engine, images, teacher)

        def check() -> None:
            checks.check_feasible(args, images, student, teacher, self.folder, self.engine.world)
            folder.check_same_inputs(self.folder, self._stored, current)

        self.engine.on_all_ranks(check)
        tried = "" if teacher is None else checks.check_teacher(args.teacher, teacher, images)
        before = {**current, **self._stored}
        changed = [text for name, text in folder.CHANGES.items() if before[name] != current[name]]
        if changed and self.engine.main:
            print(f"warning: {' and '.join(changed)} changed since the run began: results may not be bit-identical")
        self.engine.distribute(student, optimizer)
        resumed = self._restore(changed)
        self._config = folder.merged_config(self._stored, current)
        if self.engine.main:
            if self._config != self._stored:
                files.write_json(self.folder / "config.json", self._config)
            rows = [tracker.start(self._config, self._state.rows) for tracker in self._trackers]
            print(header(self._config, str(self.folder), resumed, images, student, teacher, tried, rows), flush=True)
        done = self._state.epoch * self._steps + self._state.step
        self._bar = Progress(args.epochs * self._steps, done, show=self.engine.main)
        self._saved_at = time.monotonic()

    def _restore(self, changed: list[str]) -> str:
        """Restore the last checkpoint, if any; return its position for the header."""
        state, note = self._checkpoints.restore(self._networks)
        if state is None:
            self._state.changed = changed
            return ""
        # Recorded in result.json, whose readers have not seen the warnings.
        state.changed = [text for text in folder.CHANGES.values() if text in (*state.changed, *changed)]
        self._state, self._saved = state, (state.epoch, state.step)
        self._write_metrics()
        return f"{state.position(self.args.epochs, self._steps)}{note}"

    def _save(self) -> None:
        """Write last.pt."""
        self._saved_at, self._saved = time.monotonic(), (self._state.epoch, self._state.step)
        random = self._trained or generators(self.device)
        self._checkpoints.save(self._state, self._networks, self._images.num_classes, random)

    def _save_trained(self) -> None:
        """Save the state after an epoch while it is being evaluated; evaluation does not change it."""
        if self._trained and self._saved != (self._state.epoch, self._state.step):
            self._save()

    # -- the loop -----------------------------------------------------------------------------------------------------

    def epochs(self) -> Iterator[int]:
        """Yield the remaining epochs, counted from 1.

        Raises:
            UserError: a compiled network does not compute what the eager one does.
        """
        todo = range(self._state.epoch + 1, self.args.epochs + 1)
        if todo and self.args.compile:
            engine, args = self.engine, self.args
            x, *_ = next(self._images.batches(args.batch, args.seed, todo[0], 0, engine.rank, engine.world))
            engine.on_all_ranks(lambda: engine.check_compiled(x))
        yield from todo

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the remaining batches of an epoch; between two batches, save checkpoints and handle signals.

        Yields:
            x (n, 3, H, W) float32 in [0, 1] and y (n,) on the device: this rank's share of the global batch.
        """
        args, engine, state = self.args, self.engine, self._state
        self._stopping.busy, self._trained, began = True, None, time.monotonic() - state.epoch_seconds
        stream = self._images.batches(args.batch, args.seed, epoch, state.step, engine.rank, engine.world)
        for x, y, first, total in stream:
            engine.begin_batch(first, len(x), total)
            yield x, y
            state.step, state.seen = state.step + 1, state.seen + total
            state.epoch_seconds = time.monotonic() - began
            self._show_step(epoch)
            stop = self._stopping.agreed()
            if stop or engine.highest(time.monotonic() - self._saved_at > 60 * args.checkpoint_minutes):
                self._gather()
                self._save()
            if stop:
                self._stopping.leave_together()
        self._gather()  # synchronises, so that the time below includes all work
        state.epoch_seconds = time.monotonic() - began
        self._row = state.means()
        self._stop_if_collapsed()
        self._trained, self._trained_at = generators(self.device), time.monotonic()
        if engine.world > 1:  # during evaluation, a rank may have to exit without the others
            self._save_trained()
            if self._stopping.agreed():
                self._stopping.leave_together()
        self._may_stop_anywhere()

    def _show_step(self, epoch: int) -> None:
        if self._bar.step():
            means = self._state.means()
            if self.engine.world == 1:
                self._stop_if_diverged()
            else:  # the sums are over this rank's share
                means = {"images_per_second": means["images_per_second"]}
            self._bar.figures(epoch, self.args.epochs, means)

    def _may_stop_anywhere(self) -> None:
        """From here on, handle signals at once, beginning with a pending one."""
        self._stopping.busy = False
        if self._stopping.number:
            self._stopping.leave()

    def count(self, terms: dict[str, Tensor]) -> None:
        """Add a step's loss terms to the epoch's sums, on the device and without synchronising."""
        sums, images = self._state.sums, self.engine.local_batch
        for name, term in terms.items():
            value = images * term.detach().double()
            sums[name] = sums[name] + value if name in sums else value

    def _gather(self) -> None:
        """Replace the sums of each rank by their total on rank 0 (and 0 elsewhere); stop a run that has diverged."""
        if self.engine.world > 1:
            for name, value in self._state.sums.items():
                total = self.engine.total(value)
                self._state.sums[name] = total if self.engine.main else torch.zeros_like(total)
        self._stop_if_diverged()

    def _stop_if_diverged(self) -> None:
        """Stop the run if a loss since the start of the epoch, or a weight or statistic, is not finite."""
        state = self._state
        at = f"in epoch {state.epoch + 1}, step {state.step}"
        if self.engine.highest(not math.isfinite(state.means()["loss"])):
            self._diverged(f"the loss is not finite {at} or before")
        if not checks.is_finite(self._networks.student):
            self._diverged(f"the student's weights are not finite {at}")

    def _stop_if_collapsed(self) -> None:
        """Stop the run if the student's output no longer depends on the image."""
        epoch = self._state.epoch + 1
        settled = epoch * self._steps >= checks.SETTLED_STEPS
        one_class = bool(self.args.stop_on_collapse and settled)
        x, y = checks.sample_of(self._images, checks.PROBE_IMAGES)
        began = time.monotonic()
        fact = checks.collapse_of(self._networks.student, x, y, one_class=one_class)
        seconds = (time.monotonic() - began) / len(x) / self.engine.world
        self._pass_seconds = min(self._pass_seconds, seconds)  # the first pass may choose kernels
        if fact:
            self._diverged(f"after epoch {epoch} {fact}")

    def _diverged(self, fact: str) -> NoReturn:
        means, lr = self._state.means(), self._networks.optimizer.param_groups[0]["lr"]
        terms = ", ".join(f"{name.removeprefix('loss_')} {means[name]:g}" for name in means if "loss_" in name)
        last = self.folder / "last.pt"
        back = f"{last} is the state before" if last.exists() else "no checkpoint was written yet"
        raise RunStopped(
            f"{fact} (means so far: {terms}; lr {lr:g}). The diverged state is not saved; {back}. Try a new run with a "
            "smaller --lr or with --precision fp32",
            RunStopped.DIVERGED,
        )

    def end_epoch(self, accuracies: dict[str, float]) -> None:
        """End an epoch: write its row in metrics.jsonl and its checkpoint, and print its line.

        Args:
            accuracies: fractions by name (``clean``, ``pgd20``, with --holdout also ``holdout_pgd10``); empty if the
                epoch was not evaluated.
        """
        # Until the checkpoint is written, the state is inconsistent.
        self._stopping.busy, self._trained = True, None
        state, args = self._state, self.args
        epoch, seconds = state.epoch + 1, state.epoch_seconds
        lr = self._networks.optimizer.param_groups[0]["lr"]
        row = {"epoch": epoch, "lr": lr, **self._row, **accuracies, "seconds": seconds}
        state.rows.append(row)
        state.seconds["train"] += seconds
        state.seconds["evaluation"] += time.monotonic() - self._trained_at
        if self._networks.averaged is not None and epoch > args.swa_after:
            self._networks.averaged.update_parameters(self._networks.student)
        self._keep_if_best(epoch, accuracies)
        state.begin_epoch()
        self._save()
        self._write_metrics()
        if self._stopping.agreed():
            self._stopping.leave_together()
        for tracker in self._trackers:
            tracker.log(row)
        self._bar.line(epoch_line(row, args.epochs, *remaining(args, self._images, state, self._pass_seconds)))

    def _keep_if_best(self, epoch: int, accuracies: dict[str, float]) -> None:
        """Keep the weights of the epoch that is the best on the held-out images (first of equals)."""
        accuracy, state = accuracies.get("holdout_pgd10", -1), self._state
        if accuracy > (state.best["holdout_pgd10"] if state.best else -1):
            state.best = {"epoch": epoch, "holdout_pgd10": accuracy}
            state.best_weights = {name: value.clone() for name, value in self._networks.student.state_dict().items()}

    def _write_metrics(self) -> None:
        """Write metrics.jsonl from the rows of the checkpoint, so that no row is missing or repeated."""
        if self.engine.main:
            text = "".join(json.dumps(row) + "\n" for row in self._state.rows)
            files.write_atomically(self.folder / "metrics.jsonl", lambda file: file.write(text.encode()))

    # -- the end ------------------------------------------------------------------------------------------------------

    def finish(self, autoattack: Callable[..., dict[str, Any]]) -> None:
        """Save and evaluate the networks, write result.json and print the summary.

        Args:
            autoattack: ``evaluation.autoattack``; called on the first --aa_examples test images, unless that is 0.
        """
        self._bar.close()
        self._may_stop_anywhere()  # all state is saved
        parts = (self.args, self._config, self._images, self._networks, self._state, self.engine, self.folder)
        result = Measurement(*parts, autoattack).result()
        if not self.engine.main:
            return
        files.write_json(self.folder / "result.json", result)
        for tracker in self._trackers:
            tracker.finish(result, self.folder / "student.pt")
        print(summary(result, str(self.folder)), flush=True)

    def _stop_line(self, signal_name: str) -> str:
        """Return the line that a stopped run prints."""
        saved = (self.folder / "last.pt").exists()
        resumes = f"resumes from the last checkpoint in {self.folder}"
        ahead = resumes if saved else "starts from the beginning: no checkpoint was written yet"
        position = self._state.position(self.args.epochs, self._steps)
        return f"stopped by {signal_name} {position}; the same command {ahead}"
