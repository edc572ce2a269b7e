"""Entry point of torch.hub: torch.hub.load(REPOSITORY, "student", PATH, source="local")."""

from pathlib import Path

dependencies = ["torch"]


def student(path):
    """Load a student in eval mode, which maps pixels (N, C, H, W) in [0, 1] to logits.

    Args:
        path: a run folder, a student.pt, or a folder of ``export.py --hub``.
    """
    from cifar100_models import build_model
    from experiment import files

    folder = Path(path)
    if not (folder / "model.safetensors").is_file():
        return files.load_student(folder)
    from safetensors.torch import load_file

    config = files.read_json(folder / "config.json")
    if ".py:" in config["architecture"]:  # a downloaded folder must not run local files
        raise ValueError(f"{folder}: architecture {config['architecture']} is not one of this repository")
    model = build_model(config["architecture"], config["num_classes"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
