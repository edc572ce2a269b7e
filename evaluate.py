"""Measure a network: accuracy (clean, FGSM, PGD, C&W, AutoAttack), and gradient alignment with a teacher.

python evaluate.py WHAT [--attacks clean pgd ...]; WHAT is a run folder, a checkpoint, a RobustBench name, or a file of
bare weights with --arch. The defaults are the settings of the network's run, so that its measurements are repeated.
For an unfinished run, last.pt is measured. Every call writes a record next to the network,
evaluations/<time>_<attacks>.json; result.json is not changed.
"""

import time
from pathlib import Path

from experiment import cli, data, evaluation, files, records, teachers
from experiment.engine import Engine
from experiment.run import provenance
from experiment.text import short_name

WHITE_BOX = ("fgsm", "pgd", "cw")
ATTACKS = ("clean", *WHITE_BOX, "autoattack", "gradients")
FROM_RUN = ("dataset", "data_dir", "side", "teacher", "teacher_path", "epsilon", "aa_examples", "aa_batch")
FIGURES = (".png", ".pdf", ".svg")


def build_parser():
    """Return the parser, before the settings of a run become its defaults."""
    parser = cli.Parser(
        "evaluate.py",
        description="Measure any network.",
        examples=("runs/NAME --attacks clean pgd autoattack", "BDM --attacks clean pgd --examples 1000"),
    )
    add, count, switch = parser.add_argument, {"type": cli.positive_int}, cli.options("deterministic")
    add("what", metavar="WHAT", help="run folder, checkpoint, RobustBench name, or weights file with --arch")
    add("--arch", help="architecture of bare weights: RES-18, ..., or FILE.py:function")
    add("--weights", help="weights file of a RobustBench name or of --arch")
    add("--attacks", nargs="+", choices=ATTACKS, help="measurements (default: all that apply, AutoAttack included)")
    add("--epsilon", **cli.options("epsilon"), default=8 / 255)
    add("--epsilons", type=cli.fraction, nargs="+", help="several epsilons, for a curve per attack")
    add("--steps", **count, help="steps of PGD (default 20) and C&W (default 30), of size epsilon / 4")
    add("--restarts", **count, default=1, help="random starts of PGD and C&W; all must leave an image correct")
    add("--examples", **count, help="number of test images, the first N (default: all)")
    add("--teacher_path", help="weights file of --teacher: RobustBench's .pt, or bare weights")
    add("--per_class", **switch | {"help": "1 prints the accuracy of every class"})
    add("--torchattacks", **switch | {"help": "1 compares FGSM and PGD with torchattacks"})
    add("--save_adversarial", type=Path, metavar="FILE.npz", help="save x, x_adv, y and predictions of one attack")
    add("--figure", type=Path, metavar="FILE", help="input gradients as a .png, .pdf or .svg")
    add("--beside", nargs="+", metavar="WHAT", default=[], help="further students in --figure")
    add("--curve_figure", type=Path, metavar="FILE", help="plot accuracy over --epsilons")
    add("--out", type=Path, metavar="FILE.json", help="file of the record (default: evaluations/<time>_<attacks>.json)")
    for name in ("teacher", "dataset", "data_dir", "side", "aa_examples", "aa_batch", "device", "deterministic"):
        add(f"--{name}", **cli.options(name))
    seeds = "seed of random starts (default 0, as in every run) and of AutoAttack (default: the run's)"
    add("--seed", type=cli.options("seed")["type"], help=seeds)
    add("--precision", choices=("fp32", "tf32"), help="precision of float32 products (default: the run's, or tf32)")
    return parser


def parse_args(argv=None):
    """Parse the flags; those of FROM_RUN default to the run's settings (the teacher only for a run folder).

    Returns:
        The flags, and config.json and result.json of a run folder (None where there is none).
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    path, (network, run, config, result) = Path(args.what), read_run(args)
    # A file may have been moved away from its teacher, so --teacher has no default then.
    names = [name for name in FROM_RUN if path.is_dir() or not name.startswith("teacher")]
    # As text, so that argparse checks a hand-edited value like a flag.
    own = {name: str(run[name]) for name in names if run.get(name) is not None}
    if own.get("aa_examples") == "0":  # the run skipped AutoAttack; the evaluation does not
        del own["aa_examples"]
    parser.set_defaults(**own)
    args = parser.parse_args(argv)
    args.network = network
    args.folder = path if path.is_dir() else path.parent if path.exists() else Path()  # of the records
    needs = {"gradients": "teacher", "autoattack": "aa_examples"}
    lacking = {name: flag for name, flag in needs.items() if not getattr(args, flag)}
    for name in args.attacks or ():
        if name in lacking:
            parser.error(f"argument --attacks: {name} cannot be measured without --{lacking[name]}")
    args.attacks = [name for name in args.attacks or ATTACKS if name not in lacking]
    if args.save_adversarial and len(set(args.attacks) & set(WHITE_BOX)) != 1:
        parser.error(f"argument --save_adversarial: saves one attack's images; give --attacks one of {WHITE_BOX}")
    if args.figure and args.teacher is None:
        parser.error("argument --figure: shows gradients beside a teacher's: give --teacher")
    if args.curve_figure and not set(args.attacks) & {*WHITE_BOX, "autoattack"}:
        parser.error("argument --curve_figure: shows attacks over --epsilons: name some in --attacks")
    if args.beside and not args.figure:
        parser.error("argument --beside: needs --figure, which shows the students")
    for figure in filter(None, (args.figure, args.curve_figure)):
        if figure.suffix not in FIGURES:
            parser.error(f"{figure}: unknown figure format (expected {', '.join(FIGURES)})")
    args.epsilons = sorted(set(args.epsilons or [args.epsilon]))
    args.device = cli.resolve_device(parser, args.device)
    cuda = args.device.startswith("cuda")
    if args.precision == "tf32" and not cuda:
        parser.error("argument --precision: 'tf32' is not allowed on the CPU; expected fp32")
    # Networks are measured in float32, those of a bf16 run in TF32.
    args.precision = args.precision or ("tf32" if cuda and run.get("precision") != "fp32" else "fp32")
    for name in ("train_examples", "holdout"):  # not flags of evaluate.py, but the data's hash depends on them
        setattr(args, name, run.get(name, 0) if args.dataset == run.get("dataset") else 0)
    args.compile, args.batch, args.start_seed = run.get("compile", 0), run.get("batch", 1), args.seed or 0
    args.seed = run.get("seed", 0) if args.seed is None else args.seed
    return args, config, result


def read_run(args):
    """Load an own checkpoint or run (None for others); its settings ({}), config.json and result.json (or None)."""
    path = Path(args.what)
    if args.weights or not path.exists():
        teachers.check_teacher_name(args.what, args.weights, "--weights")
    if args.arch or not path.exists():
        return None, {}, None, None
    network = teachers.load_network(path)
    folder, config, result, info = path if path.is_dir() else path.parent, None, None, network.info["info"]
    if path.is_dir() or info is None:  # a last.pt has no settings of its own
        config = records.read_config(folder) if (folder / "config.json").is_file() else None
        result = records.read_result(folder) if (folder / "result.json").is_file() else None
    settings = config.settings if config else (info or {}).get("settings", {})
    if settings:
        records.checked(records.Settings, settings, folder / "config.json" if config else path)
    return network, settings, config, result


def load_networks(args, images, device):
    """Return the network, those of --beside, and the teacher (None if not needed)."""
    options = {"num_classes": images.num_classes, "dataset": args.dataset, "device": device}
    network = args.network or teachers.load_network(args.what, arch=args.arch, weights=args.weights, **options)
    network.model.to(device)
    teacher = None
    if "gradients" in args.attacks or args.figure:
        teacher = teachers.load_teacher(args.teacher, teacher_path=args.teacher_path, **options)
    beside = [teachers.load_network(name, **options) for name in args.beside]
    for each in (network, *beside, *([teacher] if teacher else [])):
        evaluation.check_network(each.name, each.model, images.x_test, images.num_classes)
    return network, beside, teacher


def measure(args, x, y, class_names, student, fast, teacher):
    """Run the measurements; return entries of the record, and predictions and x_adv of the last white-box attack.

    Args:
        fast: the accelerated network, for all but AutoAttack.
    """
    accuracies, kept, seed = {}, (), {"seed": args.start_seed}
    for name in (name for name in ("clean", *WHITE_BOX) if name in args.attacks):
        epsilons = [0.0] if name == "clean" else args.epsilons
        options = {"steps": args.steps, "restarts": args.restarts, "keep": bool(args.save_adversarial), **seed}
        accuracies[name], *kept = evaluation.accuracy_curve(fast, x, y, name, epsilons, **options)
    if "autoattack" in args.attacks:
        x_aa, y_aa = x[: args.aa_examples], y[: args.aa_examples]
        # Separate chunk files, so that a run's AutoAttack is measured again.
        options = {"folder": args.folder / "evaluations" / "autoattack", "batch": args.aa_batch, "seed": args.seed}
        accuracies["autoattack"] = evaluation.autoattack_curve(student, x_aa, y_aa, args.epsilons, **options)
    found = {"accuracies": accuracies}
    if args.per_class and accuracies:
        rows = {}
        for name, (*_, point) in accuracies.items():  # at the largest epsilon
            rows[name] = evaluation.per_class(point["flags"], y[: point["examples"]], class_names)
        found["per_class"] = {"epsilon": args.epsilons[-1], "attacks": rows}
    if args.torchattacks:
        found["torchattacks"] = evaluation.beside_torchattacks(student, x, y, args.epsilon, steps=args.steps, **seed)
    if "gradients" in args.attacks:
        found["gradients"] = evaluation.gradient_report(student, teacher, x, y, args.epsilon, **seed)
    return found, kept


def main():
    """Measure, write the record and print it."""
    args, config, result = parse_args()
    others = [path for path in (args.save_adversarial, args.curve_figure, args.figure) if path]
    evaluation.check_outputs(args.folder, args.out, *others)
    engine = Engine(args)
    images = data.load_data(args.dataset, args.data_dir, engine.device, **data.selection(args))
    network, beside, teacher = load_networks(args, images, engine.device)
    digest = files.state_sha256(network.model)
    if result:
        records.check_student(args.folder, result, digest)
    x, y = images.x_test[: args.examples], images.y_test[: args.examples]
    class_names = images.class_names or tuple(map(str, range(images.num_classes)))
    started, fast = time.perf_counter(), engine.accelerate(network.model)
    found, kept = measure(args, x, y, class_names, network.model, fast, teacher)
    settings = (*FROM_RUN, "epsilons", "steps", "restarts", "seed", "start_seed", "deterministic")
    position = {name: network.info[name] for name in ("epoch", "step") if network.info.get(name) is not None}
    record = {
        "network": args.what,
        "weights": str(network.path),
        "weights_sha256": network.sha256,
        "architecture": network.architecture,
        **position,  # of a last.pt
        "measured": [*found["accuracies"], *(name for name in ("torchattacks", "gradients") if name in found)],
        "student_sha256": digest,
        "dataset_sha256": images.sha256,
        "teacher_sha256": getattr(teacher, "sha256", None),
        "settings": {name: getattr(args, name) for name in settings},
        "precision": args.precision,
        "test_examples": len(x),
        **found,
        "seconds": time.perf_counter() - started,
        "hardware": engine.hardware(),
        **provenance(Path(__file__)),
    }
    record["differences"] = evaluation.differences(record, config, result) if config else []
    if not engine.main:
        return
    path = evaluation.write_record(args.folder, record, args.out)
    if args.save_adversarial:
        evaluation.save_adversarial(args.save_adversarial, x, y, *kept)
    if args.curve_figure:
        curves = {name: points for name, points in found["accuracies"].items() if name != "clean"}
        evaluation.curve_figure(args.curve_figure, curves, args.restarts, f"{args.what} on {args.dataset}")
    if args.figure:
        students = [(short_name(each.name), each.model) for each in (network, *beside)]
        evaluation.alignment_figure(args.figure, teacher, students, x[:6], y[:6], args.epsilon, class_names)
    state = f" (last.pt: epoch {record['epoch']}, step {record['step']})" if position else ""
    print(f"{args.what}{state}, {network.architecture}: {len(x)} images of {args.dataset}, {args.precision}")
    print(evaluation.record_text(record))
    if published := teachers.published_accuracy(args.what, args.dataset):
        clean, robust = (f"{100 * accuracy:.2f} %" for accuracy in published)
        print(f"published by RobustBench: clean {clean}, AutoAttack {robust} (10,000 images, epsilon 8/255)")
    for line in record["differences"]:
        print(f"note: {line}")
    print(f"written to {', '.join(map(str, (path, *others)))}")


if __name__ == "__main__":
    cli.guard(main)
