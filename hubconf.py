"""What torch.hub finds here: torch.hub.load(REPOSITORY, "student", PATH, source="local")."""

from pathlib import Path

dependencies = ["torch"]


def student(path):
    """A student in eval mode: pixels (N, C, H, W) in [0, 1] in, logits out.

    Args:
        path: a run folder, a student.pt, or a folder of ``export.py --hub`` (downloaded or not).
    """
    from cifar100_models import build_model
    from experiment import files

    folder = Path(path)
    if not (folder / "model.safetensors").is_file():
        return files.load_student(folder)
    from safetensors.torch import load_file

    config = files.read_json(folder / "config.json")
    if ".py:" in config["architecture"]:  # a folder from the net is not to run files that lie here
        raise ValueError(
            f"{folder} names the architecture {config['architecture']}; one of this repository's is needed"
        )
    model = build_model(config["architecture"], config["num_classes"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
