"""Export the student of a finished run: ONNX, safetensors, a Hugging Face folder with a model card.

python export.py RUN_DIR [--onnx FILE] [--safetensors FILE] [--hub DIR]

All formats map pixels in [0, 1] to logits in eval mode. The ONNX file takes any batch size. It is written only if
onnxruntime reproduces the student's logits on clean and on attacked test images.
"""

import json
import logging
import shlex
import warnings
from pathlib import Path

import torch

import attacks
from experiment import UserError, cli, data, files, records, teachers

HUB_DATASETS = {"cifar100": "uoft-cs/cifar100", "cifar10": "uoft-cs/cifar10", "svhn": "ufldl-stanford/svhn"}
PRIVATE_SETTINGS = cli.settings_with(cli.Role.PRIVATE)
EXAMPLES = 64  # test images for the check of an ONNX file
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
    """Parse the flags."""
    parser = cli.Parser(
        "export.py",
        description="Export the student of a finished run.",
        examples=("runs/NAME --onnx student.onnx", "runs/NAME --hub student_hub"),
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="write an ONNX file, checked with onnxruntime")
    parser.add_argument("--safetensors", type=Path, metavar="FILE", help="write the weights alone")
    parser.add_argument("--hub", type=Path, metavar="DIR", help="write weights, config.json and a model card")
    parser.add_argument("--license", default="mit", help="licence of the weights, as the model card states it")
    parser.add_argument("--data_dir", help="data directory for the check of --onnx (default: the run's)")
    args = parser.parse_args(argv)
    if not (args.onnx or args.safetensors or args.hub):
        parser.error("nothing to write: give --onnx FILE, --safetensors FILE or --hub DIR")
    # An export may replace an earlier one, but not a run's student.pt or config.json, nor another README.md.
    for name in ("onnx", "safetensors"):
        path = getattr(args, name)
        if path and path.suffix != f".{name}":
            parser.error(f"argument --{name}: '{path}' must end in .{name}")
    if args.hub and args.hub.is_dir():
        names = {path.name for path in args.hub.iterdir()}
        if names and ("result.json" in names or "model.safetensors" not in names):
            parser.error(f"argument --hub: '{args.hub}' is not empty and not an earlier export. Use another folder")
    return args


def main():
    """Read the run, check it, and write the exports."""
    args = parse_args()
    result, config = records.read_result(args.run), records.read_config(args.run)
    student = teachers.load_network(args.run, unfinished=False)
    records.check_student(args.run, result, files.state_sha256(student.model))
    if args.hub and ".py:" in student.architecture:
        own = f"{student.architecture}, a network from your own file"
        raise UserError(f"--hub: others cannot build {own}. Use --safetensors or --onnx")
    folders = [path.parent for path in (args.onnx, args.safetensors) if path]
    for folder in [*folders, *filter(None, [args.hub])]:
        files.make_folder(folder)
    if args.onnx:
        write_onnx(args.onnx, student.model, check_images(config.settings, args.data_dir, student.model))
    if args.safetensors:
        write_safetensors(args.safetensors, student)
    if args.hub:
        write_hub(args.hub, student, config, result, args.license)


def check_images(settings, data_dir, student):
    """Return the first test images, (N, C, H, W) float32, and the same images attacked by PGD."""
    images = data.load_data(settings["dataset"], data_dir or settings["data_dir"], side=settings.get("side", 0))
    x, y = data.as_float(images.x_test[:EXAMPLES]), images.y_test[:EXAMPLES]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x_adv = attacks.pgd(student, x, y, settings["epsilon"], settings["step_size"], settings["steps"])
    return torch.cat([x, x_adv])


def write_onnx(path, student, x):
    """Export with a dynamic batch, compare with the student on x (N, C, H, W), and write the file.

    Raises:
        UserError: torch cannot export the network; onnxruntime's logits differ by more than rounding.
    """
    with warnings.catch_warnings():  # deprecations inside the exporter
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        import onnxruntime

        batch = ({0: torch.export.Dim("batch")},)
        names = {"input_names": ["x"], "output_names": ["logits"]}
        # Two images: a batch of one would be traced as a constant.
        try:
            program = torch.onnx.export(student, (x[:2],), dynamo=True, dynamic_shapes=batch, verbose=False, **names)
        except RuntimeError as error:  # such as a forward that branches on data
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"--onnx: torch cannot export this network: {reason}") from error
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = student(x)
    logits = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    difference = float((logits - expected).abs().max())
    about = f"{len(x)} clean and adversarial images: logits differ by up to {difference:.1e}"
    if not difference <= ROUNDING * float(expected.abs().max()):
        raise UserError(f"onnxruntime disagrees with the student on {about}; {path} is not written")
    files.write_atomically(path, lambda file: file.write(content))
    shape = ", ".join(map(str, x.shape[1:]))
    print(f"{path}: ONNX, x (batch, {shape}) in [0, 1] -> logits; onnxruntime agrees on {about}")


def write_safetensors(path, student):
    """Write the state dict, with architecture and number of classes as metadata."""
    from safetensors.torch import save

    metadata = {"architecture": student.architecture, "num_classes": str(student.num_classes), "format": "pt"}
    # Copies, because safetensors cannot store tensors that share memory, such as tied weights.
    tensors = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    content = save(tensors, metadata=metadata)
    files.write_atomically(path, lambda file: file.write(content))
    print(f"{path}: safetensors, {len(tensors)} tensors of {student.architecture}, {student.num_classes} classes")


def write_hub(folder, student, config, result, licence):
    """Write a Hugging Face repository: model.safetensors, config.json, README.md (the model card)."""
    write_safetensors(folder / "model.safetensors", student)
    settings = {name: value for name, value in config.settings.items() if name not in PRIVATE_SETTINGS}
    described = {
        "architecture": student.architecture,
        "num_classes": student.num_classes,
        "input": "float32 pixels in [0, 1], (N, C, H, W); no normalisation outside the network",
        "student_sha256": result.student_sha256,
        **{name: getattr(config, name) for name in ("method", "adds", "commit", "versions", "teacher_sha256")},
        "settings": settings,
    }
    files.write_json(folder / "config.json", described)
    card = model_card(folder.resolve().name, described, result, licence)
    files.write_atomically(folder / "README.md", lambda file: file.write(card.encode()))
    print(f"{folder}: model.safetensors, config.json, README.md (model card); upload: hf upload OWNER/NAME {folder}")


def model_card(name, described, result, licence):
    """Return the text of README.md: metadata for the hub, then the card."""
    from huggingface_hub import EvalResult, ModelCardData

    settings = described["settings"]
    method = "+".join(filter(None, (described["method"], described["adds"])))
    dataset, teacher = settings["dataset"], settings.get("teacher")
    rows = [
        ("Clean accuracy", 100 * result.clean, result.test_examples),
        ("PGD-20 accuracy", 100 * result.pgd20, result.test_examples),
    ]
    if attack := result.autoattack:
        label = f"AutoAttack accuracy ({attack.version}, epsilon {attack.epsilon:.6f})"
        rows.append((label, 100 * attack.accuracy, attack.examples))
    head = ModelCardData(
        license=licence,
        library_name="pytorch",
        pipeline_tag="image-classification",
        tags=["adversarial-robustness", "knowledge-distillation", method],
        datasets=[HUB_DATASETS[dataset]] if dataset in HUB_DATASETS else None,
        model_name=name,
        eval_results=[
            EvalResult("image-classification", dataset, dataset, "accuracy", round(value, 2), metric_name=label)
            for label, value, _ in rows
        ],
    )
    table = [f"| {label} | {value:.2f} % | {count} |" for label, value, count in rows]
    if aligned := result.gradients:
        table += [f"| GD | {aligned.gd:.4f} | |", f"| GC | {aligned.gc:.4f} | |", "", aligned.definition]
    return CARD.format(
        head=head.to_yaml(),
        name=name,
        method=method,
        source=f" from the teacher {teacher}" if teacher else "",
        table="\n".join(table),
        licence=licence,
        hardware=result.hardware,
        command=public_command(result.command),
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


if __name__ == "__main__":
    cli.guard(main)
