"""Export the student of a finished run: ONNX, safetensors, a Hugging Face folder with a model card.

python export.py RUN_DIR [--onnx FILE] [--safetensors FILE] [--hub DIR [--push OWNER/NAME]]

All formats map pixels in [0, 1] to logits in eval mode. The ONNX file takes any batch size. It is written only if
onnxruntime reproduces the student's predictions on clean and on attacked test images.
"""

import json
import logging
import shlex
import warnings
from pathlib import Path

from experiment import UserError, cli

HUB_DATASETS = {"cifar100": "uoft-cs/cifar100", "cifar10": "uoft-cs/cifar10", "svhn": "ufldl-stanford/svhn"}
PRIVATE_SETTINGS = cli.settings_with(cli.Role.PRIVATE)
ROUNDING = 1e-3  # of the largest logit; float32 kernels of other libraries sum in another order

CARD = """\
---
{head}
---

# {name}

{architecture} for {dataset} ({num_classes} classes), made robust in Linf by {method}{source}: {epochs} epochs, seed
{seed}, one run. The weights are the last epoch's.

| measured | | test images |
|---|---:|---:|
{table}

## Use

Input: {input}. With a clone of the code that made it:

```python
import torch

model = torch.hub.load("path/to/the/code", "student", "path/to/this/folder", source="local")  # eval mode
logits = model(x)
```

Without it: the network that `config.json` names, and `safetensors.torch.load_file("model.safetensors")`.

## Origin

Licence of the weights: {licence}. Code: commit {commit}; trained on: {hardware}.
SHA-256 of the state dict: `{student_sha256}`; of the teacher's file: `{teacher_sha256}`.

```
{command}
```

```json
{settings_json}
```
"""
"""README.md of the hub folder."""


def parse_args(argv=None):
    """Parse the flags; --dataset and --data_dir default to those of the run."""
    parser = cli.Parser(
        "export.py",
        description="Export the student of a finished run.",
        examples=("runs/NAME --onnx student.onnx", "runs/NAME --hub student_hub"),
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="write an ONNX file, checked with onnxruntime")
    parser.add_argument("--safetensors", type=Path, metavar="FILE", help="write the weights alone")
    parser.add_argument("--hub", type=Path, metavar="DIR", help="write weights, config.json and a model card")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder of --hub to the Hugging Face hub")
    parser.add_argument("--license", default="mit", help="licence of the weights, as the model card states it")
    parser.add_argument(
        "--examples", type=cli.positive_int, default=64, help="number of test images for the check of --onnx"
    )
    parser.add_argument("--dataset", help="data set of that check (default: the run's)")
    parser.add_argument("--data_dir", help="data directory (default: the run's)")
    args = parser.parse_args(argv)
    if not (args.onnx or args.safetensors or args.hub):
        parser.error("nothing to write: give --onnx FILE, --safetensors FILE or --hub DIR")
    if args.push and not args.hub:
        parser.error("argument --push: needs --hub DIR, the folder to upload")
    # An export may replace an earlier one, but not a run's student.pt or config.json.
    for name in ("onnx", "safetensors"):
        path = getattr(args, name)
        if path and path.suffix != f".{name}":
            parser.error(f"argument --{name}: '{path}' must end in .{name}")
    if args.hub and any((args.hub / file).exists() for file in ("result.json", "last.pt")):
        parser.error(
            f"argument --hub: '{args.hub}' is a run folder, whose config.json would be overwritten. Use another folder"
        )
    if args.hub and not (args.hub / "model.safetensors").exists():
        for file in ("README.md", "config.json"):
            if (args.hub / file).exists():
                parser.error(
                    f"argument --hub: '{args.hub}' has a {file} that is not from an export. Use another folder"
                )
    return args


def main():
    """Read the run, check it, and write the exports."""
    args = parse_args()
    if args.push:
        check_push(args.push)
    from experiment import files

    config, result = (read_record(args.run, name) for name in ("config.json", "result.json"))
    student, entry = files.load_student(args.run), files.read_student(args.run)
    if args.hub and ".py:" in entry["architecture"]:
        raise UserError(
            f"--hub: others cannot build {entry['architecture']}, a network from your own file. Use --safetensors or "
            "--onnx"
        )
    digest = files.state_sha256(student)
    if result.get("student_sha256") != digest:
        raise UserError(f"{args.run}/result.json was measured on another student than student.pt (SHA-256 {digest})")
    for path in (args.onnx, args.safetensors, args.hub):
        if path:
            make_folder(path if path is args.hub else path.parent)
    if args.onnx:
        write_onnx(args.onnx, student, *check_images(args, config, student))
    if args.safetensors:
        write_safetensors(args.safetensors, student, entry)
    if args.hub:
        write_hub(args.hub, student, entry, config, result, args.license)
    if args.push:
        push(args.hub, args.push)


def read_record(run, name):
    """Read a JSON file of a finished run."""
    from experiment import files

    if not (run / name).is_file():
        raise UserError(f"{run} is not the folder of a finished run: it has no {name}. {files.advice(run)}")
    return files.read_json(run / name)


def make_folder(folder):
    """Create a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder}: {error.strerror}") from error


def check_images(args, config, student):
    """Return the first test images, (N, C, H, W) float32, clean and attacked by PGD with the run's settings."""
    import torch

    import attacks
    from experiment.data import as_float, load_data

    settings = config["settings"]
    side = {"side": settings["side"]} if settings.get("side") else {}
    data = load_data(args.dataset or settings["dataset"], args.data_dir or settings["data_dir"], "cpu", **side)
    if data.num_classes != config["num_classes"]:
        raise UserError(f"--dataset {data.name} has {data.num_classes} classes, the student {config['num_classes']}")
    x, y = as_float(data.x_test[: args.examples]), data.y_test[: args.examples]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return x, attacks.pgd(student, x, y, settings["epsilon"], settings["step_size"], settings["steps"])


def write_onnx(path, student, x, x_adv):
    """Export with a dynamic batch, compare with the student on both sets of images, and write the file.

    Raises:
        UserError: onnxruntime's predictions or logits differ by more than rounding.
    """
    import torch

    from experiment import files

    with warnings.catch_warnings():  # deprecations inside the exporter
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        import onnxruntime

        batch = ({0: torch.export.Dim("batch")},)
        names = {"input_names": ["x"], "output_names": ["logits"]}
        # Two images: a batch of one would be traced as a constant.
        program = torch.onnx.export(student, (x[:2],), dynamo=True, dynamic_shapes=batch, verbose=False, **names)
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = 0.0
    for kind, images in (("clean", x), ("adversarial", x_adv)):
        with torch.no_grad():
            expected = student(images)
        logits = torch.from_numpy(session.run(None, {"x": images.numpy()})[0])
        tolerance = ROUNDING * expected.abs().max()
        difference = (logits - expected).abs().max()
        best = expected.topk(2, dim=1).values
        differing = (logits.argmax(1) != expected.argmax(1)) & (best[:, 0] - best[:, 1] > tolerance)
        if not difference <= tolerance or differing.any():
            raise UserError(
                f"onnxruntime disagrees with the student on {int(differing.sum())} of {len(images)} {kind} images "
                f"(logits differ by up to {float(difference):.2g}); {path} is not written"
            )
        largest = max(largest, float(difference))
    files.write_atomically(path, lambda file: file.write(content))
    print(
        f"{path}: ONNX, x (batch, {', '.join(map(str, x.shape[1:]))}) in [0, 1] -> logits; onnxruntime gives "
        f"the same predictions on {len(x)} clean and {len(x)} adversarial images (logits differ by up to {largest:.1e})"
    )


def write_safetensors(path, student, entry):
    """Write the state dict, with architecture and number of classes as metadata."""
    from safetensors.torch import save

    from experiment import files

    metadata = {"architecture": entry["architecture"], "num_classes": str(entry["num_classes"]), "format": "pt"}
    tensors = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    content = save(tensors, metadata=metadata)
    files.write_atomically(path, lambda file: file.write(content))
    print(f"{path}: safetensors, {len(tensors)} tensors of {entry['architecture']}, {entry['num_classes']} classes")


def write_hub(folder, student, entry, config, result, licence):
    """Write a Hugging Face repository: model.safetensors, config.json, README.md (the model card)."""
    from experiment import files

    write_safetensors(folder / "model.safetensors", student, entry)
    settings = {name: value for name, value in config["settings"].items() if name not in PRIVATE_SETTINGS}
    origin = {name: config.get(name) for name in ("method", "adds", "commit", "versions", "teacher_sha256")}
    described = {
        "architecture": entry["architecture"],
        "num_classes": entry["num_classes"],
        "input": "float32 pixels in [0, 1], (N, C, H, W); no normalisation outside the network",
        "student_sha256": result["student_sha256"],
        **origin,
        "settings": settings,
    }
    files.write_json(folder / "config.json", described)
    card = model_card(folder.resolve().name, described, result, licence)
    files.write_atomically(folder / "README.md", lambda file: file.write(card.encode()))
    print(f"{folder}: model.safetensors, config.json, README.md (model card)")


def measured(result):
    """Return (name, per cent as text, number of images) of each accuracy in result.json."""
    n = result["test_examples"]
    rows = [("Clean accuracy", 100 * result["clean"], n), ("PGD-20 accuracy", 100 * result["pgd20"], n)]
    if attack := result.get("autoattack"):
        name = f"AutoAttack accuracy ({attack['version']}, epsilon {attack['epsilon']:.6f})"
        if attack["version"] != "standard":
            name = name.removeprefix("AutoAttack ")  # the version names its attacks
        rows.append((name, 100 * attack["accuracy"], attack["examples"]))
    return [(name, f"{value:.2f} %", count) for name, value, count in rows]


def model_card(name, described, result, licence):
    """Return the text of README.md: metadata for the hub, then the card."""
    from huggingface_hub import EvalResult, ModelCardData

    settings = described["settings"]
    method = "+".join(filter(None, (described["method"], described["adds"])))
    dataset, teacher = settings["dataset"], settings.get("teacher")
    rows = measured(result)
    head = ModelCardData(
        license=licence,
        library_name="pytorch",
        pipeline_tag="image-classification",
        tags=["adversarial-robustness", "knowledge-distillation", method],
        datasets=[HUB_DATASETS[dataset]] if dataset in HUB_DATASETS else None,
        model_name=name,
        eval_results=[
            EvalResult("image-classification", dataset, dataset, "accuracy", float(value.split()[0]), metric_name=label)
            for label, value, _ in rows
        ],
    )
    table = [f"| {label} | {value} | {count} |" for label, value, count in rows]
    if aligned := result.get("gradients"):
        table += [f"| GD | {aligned['gd']:.4f} | |", f"| GC | {aligned['gc']:.4f} | |", "", aligned["definition"]]
    return CARD.format(
        head=head.to_yaml(),
        name=name,
        method=method,
        source=f" from the teacher {teacher}" if teacher else "",
        table="\n".join(table),
        licence=licence,
        hardware=result["hardware"],
        command=public_command(result["command"]),
        settings_json=json.dumps(settings, indent=2),
        **{key: value for key, value in described.items() if key != "method"},
        **{key: settings[key] for key in ("dataset", "seed", "epochs")},
    )


def public_command(command):
    """Remove the flags of file locations and trackers from a command."""
    kept, private = [], False
    for part in shlex.split(command):
        if part.startswith("--"):
            private = part[2:].partition("=")[0] in PRIVATE_SETTINGS
        if not private:
            kept.append(part)
    return shlex.join(kept)


def check_push(repo):
    """Check the name of the repository and the login before any work."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        huggingface_hub.utils.validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo!r}: expected OWNER/NAME of a repository on the Hugging Face hub") from error
    if not huggingface_hub.get_token():
        raise UserError(f"--push {repo}: not logged in to the Hugging Face hub. Run `hf auth login` or set HF_TOKEN")


def push(folder, repo):
    """Upload the three files; create the repository if necessary."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repo, exist_ok=True)
        names = ["model.safetensors", "config.json", "README.md"]
        url = hub.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=names)
    except (HTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--push {repo}: the upload failed ({reason}). {folder} is complete; push it again") from error
    print(f"uploaded to {url}")


if __name__ == "__main__":
    cli.guard(main)
