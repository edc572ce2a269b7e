"""Evaluate any run folder or checkpoint again: clean, FGSM, PGD-20, C&W, AutoAttack, and gradient alignment (GD, GC).

python evaluate.py RUN_DIR_OR_CHECKPOINT [--attacks clean pgd ...]; the settings of its run are the defaults. An
unfinished run is evaluated as it is in its last.pt. Writes evaluation.json beside the checkpoint; result.json stays as
the run left it.
"""

import shlex
import sys
import time
from pathlib import Path

from experiment import UserError, cli

ATTACKS = ("clean", "fgsm", "pgd", "cw", "autoattack", "gradients")
FROM_RUN = ("dataset", "data_dir", "teacher", "teacher_path", "epsilon", "aa_examples", "aa_batch", "seed")


def parse_args(argv=None):
    """The flags; those of FROM_RUN have the run's own settings as defaults (the teacher's only for a run folder)."""
    parser = cli.Parser(prog="evaluate.py", description="Evaluate a run folder or a checkpoint.")
    parser.add_argument("checkpoint", type=Path, metavar="RUN_DIR_OR_CHECKPOINT", help="run folder or .pt file")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=None, help="what to measure; all")
    parser.add_argument("--examples", type=cli.positive_int, default=None, help="test images, the first ones; all")
    parser.add_argument("--teacher", **cli.METHOD_FLAGS["teacher"], default=None)
    parser.add_argument("--teacher_path", default=None, help="the downloaded RobustBench .pt file of --teacher")
    parser.add_argument("--epsilon", **cli.METHOD_FLAGS["epsilon"], default=8 / 255)
    for name in ("dataset", "data_dir", "aa_examples", "aa_batch", "seed", "device", "precision", "deterministic"):
        parser.add_argument(f"--{name}", **cli.RUN_FLAGS[name])
    args = parser.parse_args(argv)
    settings = settings_of(args.checkpoint)
    # A file may have been moved away from its teacher: that is asked for, or not compared with.
    names = [name for name in FROM_RUN if args.checkpoint.is_dir() or not name.startswith("teacher")]
    # As text: argparse then checks a hand-edited value as it checks a flag.
    parser.set_defaults(**{name: str(settings[name]) for name in names if settings.get(name) is not None})
    args = parser.parse_args(argv)
    if args.attacks is None:
        args.attacks = [name for name in ATTACKS if name != "gradients" or args.teacher]
    elif "gradients" in args.attacks and not args.teacher:
        parser.error("argument --attacks: gradients are compared with a teacher's: give --teacher")
    args.device = cli.resolve_device(parser, args.device)
    args.precision = args.precision or ("tf32" if args.device.startswith("cuda") else "fp32")
    args.compile, args.batch = 0, 1  # Engine's, for training
    return args


def settings_of(path):
    """The settings of the run that a folder or checkpoint comes from, {} if it does not tell: a student.pt holds them
    itself, wherever it was put; a last.pt lies beside its run's config.json.
    """
    from experiment.files import read_json, read_student

    if path.is_file():
        entry = read_student(path, unfinished=True)
        info = entry["info"] if isinstance(entry["info"], dict) else {}
        if isinstance(info.get("settings"), dict):
            return info["settings"]
        if entry["epoch"] is None:
            return {}
    config = (path if path.is_dir() else path.parent) / "config.json"
    return read_json(config).get("settings", {}) if config.is_file() else {}


def main():
    """Measure, print a table in per cent, write evaluation.json."""
    args = parse_args()
    from experiment import evaluation, files
    from experiment.data import load_data
    from experiment.engine import Engine
    from experiment.teachers import load_teacher

    student = files.load_student(args.checkpoint, unfinished=True)
    entry = files.read_student(args.checkpoint, unfinished=True)
    engine = Engine(args)
    student = student.to(engine.device)
    data = load_data(args.dataset, args.data_dir, engine.device)
    if entry["num_classes"] != data.num_classes:
        raise UserError(
            f"{args.checkpoint} has {entry['num_classes']} classes but {args.dataset} has {data.num_classes}"
        )
    digest = files.state_sha256(student)
    claim = args.checkpoint / "result.json"
    if claim.is_file() and (claimed := files.read_json(claim).get("student_sha256")) != digest:
        raise UserError(f"{claim} was measured on another student (SHA-256 {claimed}, student.pt has {digest})")
    teacher = None
    if "gradients" in args.attacks:
        teacher = load_teacher(args.teacher, data.num_classes, teacher_path=args.teacher_path, device=engine.device)
    x, y = data.x_test[: args.examples], data.y_test[: args.examples]
    folder = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    result = {
        "format": 1,
        "checkpoint": str(args.checkpoint),
        "student": entry["architecture"],
        **{name: entry[name] for name in ("epoch", "step") if entry[name] is not None},  # of a last.pt
        "student_sha256": digest,
        "settings": {name: getattr(args, name) for name in (*FROM_RUN, "precision")},
        "dataset_sha256": data.sha256,
        "test_examples": len(x),
        "hardware": engine.hardware(),
        "command": shlex.join(["python", *sys.argv]),
    }
    started = time.perf_counter()
    budget = {"epsilon": args.epsilon, "seed": args.seed}
    measures = {
        "clean": ("clean", lambda: evaluation.accuracy(student, x, y)),
        "fgsm": ("FGSM", lambda: evaluation.fgsm_accuracy(student, x, y, **budget)),
        "pgd": ("PGD-20", lambda: evaluation.pgd_accuracy(student, x, y, **budget)),
        "cw": ("C&W-30", lambda: evaluation.cw_accuracy(student, x, y, **budget)),
    }
    rows = []
    for key in (key for key in measures if key in args.attacks):
        label, measure = measures[key]
        result[{"pgd": "pgd20", "cw": "cw30"}.get(key, key)] = accuracy = measure()
        rows.append((label, f"{100 * accuracy:.2f} %"))
    if "autoattack" in args.attacks and args.aa_examples:
        x_aa, y_aa = x[: args.aa_examples], y[: args.aa_examples]
        # Chunks of their own: a run's AutoAttack is measured again, not read.
        chunks = folder / "evaluation" / f"epsilon{args.epsilon:.6f}_seed{args.seed}_batch{args.aa_batch}_of{len(x_aa)}"
        attacked = evaluation.autoattack(student, x_aa, y_aa, folder=chunks, batch=args.aa_batch, **budget)
        result["autoattack"] = attacked
        rows.append(("AutoAttack", f"{100 * attacked['accuracy']:.2f} % of {len(x_aa)} images"))
    if teacher is not None:
        aligned = evaluation.gradient_alignment(student, teacher, x, y)
        result["gradients"] = {**aligned, "definition": evaluation.GRADIENT_DEFINITION}
        rows += [("GD", f"{aligned['gd']:.4f}"), ("GC", f"{aligned['gc']:.4f}")]
        rows.append(("", evaluation.GRADIENT_DEFINITION))
    result["seconds"] = time.perf_counter() - started
    if engine.main:
        files.write_json(folder / "evaluation.json", result)
        state = "" if entry["epoch"] is None else f" (last.pt: epoch {entry['epoch']}, step {entry['step']})"
        print(f"{args.checkpoint}{state}: {len(x)} test images of {args.dataset}, epsilon {args.epsilon:.6f}")
        print("\n".join(f"  {label:<12}{value}" for label, value in rows))
        print(f"written to {folder / 'evaluation.json'}")


if __name__ == "__main__":
    cli.guard(main)
