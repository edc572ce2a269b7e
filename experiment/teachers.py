"""Teachers: RobustBench's CIFAR-100 Linf models from a local file or a download, and networks of our own.

``python -m experiment.teachers verify BDM`` checks a teacher's file against RobustBench's clean accuracy.
"""

import argparse
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from experiment import UserError, checkpoint, compat

ALIASES = {
    "BDM": "Wang2023Better_WRN-28-10",
    "DEC": "Cui2023Decoupled_WRN-28-10",
    "LTD": "Chen2021LTD_WRN34_10",
}
"""The papers' short names of RobustBench models."""

CLEAN_ACCURACY = {
    "Wang2023Better_WRN-28-10": 0.7258,
    "Cui2023Decoupled_WRN-28-10": 0.7385,
    "Chen2021LTD_WRN34_10": 0.6407,
}
"""Clean accuracy on CIFAR-100's 10,000 test images. Source: RobustBench's leaderboard."""

ROBUSTBENCH_CLASSES = 100
VERIFY_IMAGES = 1_000
VERIFY_TOLERANCE = 0.03  # two standard errors of an accuracy near 0.7 measured on 1,000 images

# usercontent with confirm=t: Google Drive's answer without its page about files too large for a virus scan.
DOWNLOAD_URL = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"
BROWSER_URL = "https://drive.google.com/file/d/{}/view"
SECONDS_OF_SILENCE = 30

_ROBUSTBENCH_NAME = re.compile(r"[A-Z][A-Za-z]+20\d\d[\w-]+")

# Entries of a state dict that a file may lack: normalisation constants that the architecture sets itself (files older
# than RobustBench's conversion), and counters that eval mode does not use.
_OPTIONAL = ("mu", "sigma", "mean", "std", "num_batches_tracked")


class FrozenTeacher(nn.Module):
    """A network that stays as it is: eval mode whatever ``train()`` is told, no parameter requires a gradient.

    Attributes:
        model: the network; maps (N, 3, H, W) in [0, 1] to logits (N, num_classes), normalising inside if it must.
        num_classes: number of classes.
        name: what the user called it.
        path: the file it was read from.
        sha256: SHA-256 of that file. A single flipped byte in a file of torch's old format loads without a complaint;
            the hash tells such files apart.
    """

    def __init__(self, model: nn.Module, num_classes: int, name: str, path: Path) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.num_classes = num_classes
        self.name = name
        self.path = path
        self.sha256 = checkpoint.file_sha256(path)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class _Source(NamedTuple):
    """How to build a RobustBench architecture, and where its weights are."""

    build: Callable[[], nn.Module]
    url: str
    browser_url: str


def check_teacher_name(name_or_path: str | Path, teacher_path: str | Path | None = None) -> str | None:
    """Refuse what cannot be a teacher, without importing anything heavy; cheap enough for the flag parser.

    Returns:
        The RobustBench name that is meant, or None if name_or_path is the path of a network of our own.

    Raises:
        UserError: neither a possible name nor an existing path; or teacher_path does not go with it or does not exist.
    """
    name_or_path = os.fspath(name_or_path)
    name = ALIASES.get(name_or_path, name_or_path)
    is_name = _ROBUSTBENCH_NAME.fullmatch(name) is not None
    if not is_name and not os.path.lexists(name_or_path):
        if os.sep in name_or_path or name_or_path.endswith((".pt", ".pth")):
            raise UserError(f"teacher {name_or_path!r}: no such file or folder")
        raise _unknown(name_or_path)
    if teacher_path is not None:
        if not is_name:
            raise UserError(
                f"--teacher_path {teacher_path} needs the name of its architecture, such as --teacher BDM; "
                f"--teacher is the path {name_or_path!r}"
            )
        if not os.path.isfile(teacher_path):
            raise UserError(f"--teacher_path {teacher_path}: no such file")
    return name if is_name else None


def load_teacher(
    name_or_path: str | Path,
    num_classes: int | None = None,
    *,
    teacher_path: str | Path | None = None,
    model_dir: str | Path = "models",
    device: str | torch.device = "cpu",
) -> FrozenTeacher:
    """Load a teacher, frozen and in eval mode, in float32. The global random generators are left as they were.

    Args:
        name_or_path: BDM, DEC, LTD, any RobustBench CIFAR-100 Linf name (read from
            ``<model_dir>/cifar100/Linf/<name>.pt``, downloaded if that is absent), or the path of a checkpoint or run
            folder of this project, which carries its own architecture and number of classes.
        num_classes: that of the data; None accepts any.
        teacher_path: a file that was downloaded by hand, for a RobustBench name.

    Raises:
        UserError: unknown name; another number of classes; a file that is missing and cannot be downloaded, is an HTML
            page, damaged, unsafe, or does not fit the architecture. One line; says what to download from where, and
            where to put it. Files that this call did not download itself are never changed or deleted.
    """
    name_or_path = os.fspath(name_or_path)
    name = check_teacher_name(name_or_path, teacher_path)
    # Building draws initial weights that are thrown away: the run's own random stream must not depend on the teacher.
    with torch.random.fork_rng(devices=[]):
        if name is None:
            teacher = _own(Path(name_or_path), num_classes)
        else:
            _check_classes(name_or_path, ROBUSTBENCH_CLASSES, num_classes)
            teacher = _robustbench(name_or_path, name, teacher_path, Path(model_dir))
    return teacher.to(device)


def _unknown(name: str) -> UserError:
    return UserError(
        f"teacher {name!r} is not known; choose BDM, DEC, LTD, another CIFAR-100 Linf name of RobustBench such as "
        "Wang2023Better_WRN-70-16 or Rebuffi2021Fixing_28_10_cutmix_ddpm, or a path to a checkpoint or run folder"
    )


def _check_classes(teacher: str, teacher_classes: int, num_classes: int | None) -> None:
    if num_classes is not None and num_classes != teacher_classes:
        raise UserError(f"teacher {teacher!r} has {teacher_classes} classes but the data has {num_classes}")


def _own(path: Path, num_classes: int | None) -> FrozenTeacher:
    """A student checkpoint, or the student.pt of a run folder."""
    file = path / "student.pt" if path.is_dir() else path
    try:
        model, entries = checkpoint.load_student(path)
    except UserError as error:
        hint = f"; a file from RobustBench goes with its name: --teacher BDM --teacher_path {path}"
        raise UserError(f"{error}{hint if path.is_file() else ''}") from error
    _check_finite(model, file)
    _check_classes(str(path), entries["num_classes"], num_classes)
    return FrozenTeacher(model, entries["num_classes"], str(path), file)


def _robustbench(called: str, name: str, teacher_path: str | Path | None, model_dir: Path) -> FrozenTeacher:
    """A RobustBench model, from teacher_path, from model_dir, or downloaded to model_dir."""
    source = _source(called, name)
    target = model_dir / "cifar100" / "Linf" / f"{name}.pt"
    get = f"get {name} with a browser from {source.browser_url} and save it as {target} or pass it with --teacher_path"
    path = target if teacher_path is None else Path(teacher_path)
    if os.path.lexists(path):
        try:
            model = _read(path, name, source.build)
        except UserError as error:
            raise UserError(f"{error}; {get}") from error
    else:
        try:
            model = _download(source, name, target)
        except UserError as error:
            raise UserError(f"cannot download {name} to {target}: {error}; {get}") from error
    return FrozenTeacher(model, ROBUSTBENCH_CLASSES, called, path)


def _source(called: str, name: str) -> _Source:
    registry = compat.cifar100_linf(compat.import_robustbench())
    if name not in registry:
        raise _unknown(called)
    entry = registry[name]
    if isinstance(entry["gdrive_id"], str):
        return _Source(entry["model"], DOWNLOAD_URL.format(entry["gdrive_id"]), BROWSER_URL.format(entry["gdrive_id"]))
    if isinstance(entry["gdrive_id"], list):
        raise UserError(
            f"teacher {called!r} is a mixture of several networks, which cannot be a teacher; choose another"
        )
    # The transformers: RobustBench registers them with timm, under a name that its own registry misspells.
    import timm  # seconds; robustbench has just imported it

    variant = f"{name.lower().replace('-', '_')}_cifar100_linf"
    url = timm.get_pretrained_cfg(variant).url
    return _Source(lambda: timm.create_model(variant, num_classes=ROBUSTBENCH_CLASSES), url, url)


def _read(path: Path, name: str, build: Callable[[], nn.Module]) -> nn.Module:
    """Build the architecture and fill it from the file.

    Takes a bare state dict or {"state_dict": ...}, keys with or without "module." and "model." in front, any float
    type.

    Raises:
        UserError: as checkpoint.load; no state dict; keys or shapes that do not fit; values that are not finite.
    """
    content = checkpoint.load(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict")
    model = build()
    expected = model.state_dict()
    state = {_bare(str(key), expected): value for key, value in state.items()}
    faults = {
        "missing": [key for key in expected if key not in state and key.rpartition(".")[2] not in _OPTIONAL],
        "unexpected": [key for key in state if key not in expected],
        "of another shape": [key for key in expected if key in state and state[key].shape != expected[key].shape],
    }
    if any(faults.values()):
        told = (
            f"{len(keys)} {fault} ({', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''})"
            for fault, keys in faults.items()
            if keys
        )
        raise UserError(f"{path} does not fit {name}: entries {', '.join(told)}")
    model.load_state_dict(state, strict=False)  # copies into float32 parameters, whatever the file's type
    _check_finite(model, path)
    return model


def _bare(key: str, expected: dict[str, Tensor]) -> str:
    """The architecture's name of a key: without wrappers' prefixes, or with the one of a normalising wrapper."""
    bare = key
    while bare not in expected and bare.startswith(("module.", "model.")):
        bare = bare.partition(".")[2]
    return f"model.{bare}" if bare not in expected and f"model.{bare}" in expected else bare


def _check_finite(model: nn.Module, path: Path) -> None:
    broken = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{path} holds values that are not finite, in {broken[0]} and {len(broken) - 1} other entries")


def _download(source: _Source, name: str, target: Path) -> nn.Module:
    """Download the weights aside, read them, and only then give the file its name. One attempt.

    Raises:
        UserError: anything went wrong; no part of the file is left.
    """
    from tqdm import tqdm  # only downloads need it

    print(
        f"downloading {name} from {source.url} to {target} (gives up after {SECONDS_OF_SILENCE} s of silence)",
        flush=True,
    )
    # Some hosts turn urllib's own name away.
    request = urllib.request.Request(source.url, headers={"User-Agent": "Mozilla/5.0"})
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # The file first: a folder that cannot be written to shows before the network is waited for.
            with open(aside, "wb") as file, urllib.request.urlopen(request, timeout=SECONDS_OF_SILENCE) as response:
                if response.headers.get_content_type() == "text/html":
                    raise UserError("the answer is a web page (HTML), often about a download quota")
                total = int(response.headers.get("Content-Length") or 0)
                with tqdm(total=total or None, unit="B", unit_scale=True, desc=name, disable=None) as bar:
                    while block := response.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
                file.flush()
                os.fsync(file.fileno())
                if total and file.tell() != total:
                    raise UserError(f"the connection ended after {file.tell():,} of {total:,} bytes")
            try:
                model = _read(aside, name, source.build)
            except UserError as error:
                raise UserError(str(error).replace(str(aside), "what came")) from error
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
    except UserError:
        raise
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise UserError(str(error)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a malformed answer
        wrapped = getattr(error, "reason", None)  # URLError wraps the OSError that says what happened
        cause = wrapped if isinstance(wrapped, OSError) else error
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise UserError(" ".join(reason.split())) from error
    return model


def verify(name_or_path: str, teacher_path: str | None, model_dir: str, data_dir: str, device: str) -> None:
    """Print a teacher's hash, size and clean accuracy on the first 1,000 test images of CIFAR-100.

    Raises:
        UserError: as load_teacher and load_data; or the accuracy is more than 3 points off RobustBench's.
    """
    from experiment.data import as_float, load_data  # this command alone needs data

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; use cpu")
    teacher = load_teacher(
        name_or_path, ROBUSTBENCH_CLASSES, teacher_path=teacher_path, model_dir=model_dir, device=device
    )
    name = ALIASES.get(name_or_path, name_or_path)
    print(f"teacher         {name}")
    print(f"file            {teacher.path}")
    print(f"sha256          {teacher.sha256}")
    print(f"parameters      {sum(parameter.numel() for parameter in teacher.parameters()):,}", flush=True)
    data = load_data("cifar100", data_dir, device)
    images, labels = data.x_test[:VERIFY_IMAGES], data.y_test[:VERIFY_IMAGES]
    with torch.no_grad():
        batches = zip(images.split(100), labels.split(100), strict=True)
        correct = sum((teacher(as_float(x)).argmax(dim=1) == y).sum().item() for x, y in batches)
    clean = correct / len(images)
    print(f"clean accuracy  {clean:.2%} on the first {len(images):,} test images of CIFAR-100")
    claimed = CLEAN_ACCURACY.get(name)
    if claimed is None:
        print("claimed         no figure known to compare with")
        return
    print(f"claimed         {claimed:.2%} by RobustBench, on all 10,000")
    if abs(clean - claimed) > VERIFY_TOLERANCE:
        raise UserError(
            f"clean accuracy {clean:.2%} is more than {100 * VERIFY_TOLERANCE:g} points off RobustBench's "
            f"{claimed:.2%}: {teacher.path} is not {name} as published"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this module: ``verify NAME_OR_PATH``."""
    parser = argparse.ArgumentParser(prog="python -m experiment.teachers", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="verify")
    command = commands.add_parser("verify", help="check a teacher's file against RobustBench", allow_abbrev=False)
    command.add_argument("teacher", help="BDM, DEC, LTD, another RobustBench name, or a path")
    command.add_argument("--teacher_path", help="a file downloaded by hand")
    command.add_argument("--model_dir", default="models", help="where RobustBench files lie or are downloaded to")
    command.add_argument("--data_dir", default="data", help="where CIFAR-100 lies or is downloaded to")
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args(argv)
    verify(args.teacher, args.teacher_path, args.model_dir, args.data_dir, args.device)


if __name__ == "__main__":
    from experiment.cli import guard

    guard(main)
