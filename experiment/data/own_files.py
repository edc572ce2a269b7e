"""Data sets of the user's own: an .npz file, or a folder of images in folders of their classes."""

from pathlib import Path

import numpy as np

from experiment import UserError
from experiment.data.arrays import Arrays, check_arrays

KEYS = ("x_train", "y_train", "x_test", "y_test")
SUFFIXES = (".png", ".jpg", ".jpeg")
ANNOTATIONS = "val_annotations.txt"


def read_npz(path: Path) -> Arrays:
    """The four arrays of an .npz, and its class_names if it has any."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
            missing = [key for key in KEYS if key not in content]
            if missing:
                raise UserError(f"{path} has no {', '.join(missing)}; expected the arrays {', '.join(KEYS)}")
            found = {key: content[key] for key in (*KEYS, "class_names") if key in content}
        if not all(isinstance(array, np.ndarray) for array in found.values()):
            raise ValueError("a member is not an array")  # numpy returns its bytes
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and numpy's header parser each raise types of their own
        raise UserError(
            f"{path} is not a readable .npz of plain arrays: {' '.join(str(error).split())[:120]}"
        ) from error
    names = found.pop("class_names", None)
    if names is not None:
        if names.ndim != 1:
            raise UserError(f"{path}: class_names has shape {names.shape}; expected a name per class")
        names = tuple(names.astype(str).tolist())
    return check_arrays(Arrays(**found, class_names=names), path)


def check_image_folder(folder: Path) -> None:
    """Raise UserError if the folder has no training or no test images; nothing is read."""
    if not (folder / "train").is_dir() or not any((folder / name).is_dir() for name in ("test", "val")):
        raise UserError(f"--dataset {folder}: expected train/ and test/ or val/, with a folder per class in each")


def read_image_folder(folder: Path) -> Arrays:
    """All images, grey ones repeated to three channels; classes are the folders of train/ in alphabetical order.

    The test images are in test/ or val/: a folder per class, or a table in val/ as in Tiny-ImageNet.
    """
    splits = [folder / name for name in ("test", "val") if (folder / name).is_dir()]
    # Tiny-ImageNet has a test/ too, without labels.
    test = next((split for split in splits if (split / ANNOTATIONS).is_file()), splits[0])
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    arrays, shape = [], None
    for split in (folder / "train", test):
        files = _annotated(split / ANNOTATIONS) if (split / ANNOTATIONS).is_file() else _by_folder(split)
        if not files:
            raise UserError(f"{split} has no image ({', '.join(SUFFIXES)}) in a folder of its class")
        unknown = sorted({name for _, name in files} - set(classes))
        if unknown:
            raise UserError(f"{split} has the class {unknown[0]!r}, which {folder / 'train'} does not have")
        empty = sorted(set(classes) - {name for _, name in files}) if split != test else []
        if empty:
            raise UserError(f"{split / empty[0]} has no image; each class needs one")
        images = []
        for file, _ in files:
            images.append(_read(file))
            shape = shape or images[0].shape
            if images[-1].shape != shape:
                raise UserError(f"{file} is {images[-1].shape[:2]}, others are {shape[:2]}; expected equal sizes")
        arrays += [np.stack(images), np.array([classes.index(name) for _, name in files])]
    return check_arrays(Arrays(*arrays, tuple(classes)), folder)


def _by_folder(split: Path) -> list[tuple[Path, str]]:
    """Every image under split/<class>/, at any depth, and its class; sorted, as file systems list in any order."""
    tops = [top for top in split.iterdir() if top.is_dir()]
    return sorted((file, top.name) for top in tops for file in top.rglob("*") if file.suffix.lower() in SUFFIXES)


def _annotated(table: Path) -> list[tuple[Path, str]]:
    """Tiny-ImageNet's val/: images/<file>, and a table of file name, class and box."""
    rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(len(row) < 2 for row in rows):
        raise UserError(f"{table}: expected file names and classes, separated by tabs")
    return [(table.parent / "images" / row[0], row[1]) for row in rows]


def _read(file: Path) -> np.ndarray:
    from PIL import Image  # only this kind of data set needs it

    try:
        with Image.open(file) as image:
            mode, pixels = image.mode, np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{file} cannot be read as an image ({reason})") from error
    if mode.startswith(("I", "F")):  # the conversion would clip them at 255
        raise UserError(f"{file} has pixels of more than 8 bits (mode {mode}); expected 8 bits per channel")
    return pixels
