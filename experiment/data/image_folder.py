"""A folder of images as a data set: train/ and test/ or val/ with a folder per class, or Tiny-ImageNet's layout."""

import os
from pathlib import Path

import numpy as np

from experiment import UserError
from experiment.data.arrays import SMALLEST_SIDE, Arrays

SUFFIXES = (".png", ".jpg", ".jpeg")
ANNOTATIONS = "val_annotations.txt"


def read_image_folder(folder: Path) -> Arrays:
    """All images, grey ones repeated to three channels; classes are train's folders in alphabetical order.

    Raises:
        UserError: the layout is another; an image that cannot be read or is of another size; too few of them.
    """
    check_image_folder(folder)
    parts = [folder / name for name in ("test", "val") if (folder / name).is_dir()]
    # Tiny-ImageNet has a test/ too, without labels.
    test = next((part for part in parts if (part / ANNOTATIONS).is_file()), parts[0])
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    if len(classes) < 2:
        raise UserError(f"{folder / 'train'} holds {len(classes)} folders; at least 2 are needed, one per class")
    label_of = {name: label for label, name in enumerate(classes)}
    splits, shape = [], None
    for part in (folder / "train", test):
        annotated = part / ANNOTATIONS
        files = _annotated(annotated) if annotated.is_file() else _by_folder(part)
        unknown = sorted({name for _, name in files} - set(classes))
        if unknown:
            raise UserError(f"{part} has the class {unknown[0]!r}, which {folder / 'train'} has not")
        if len(files) < 2:
            raise UserError(f"{part} holds {len(files)} images ({', '.join(SUFFIXES)}); at least 2 are needed")
        images = []
        for file, _ in files:
            images.append(_read(file))
            shape = shape or images[0].shape
            if images[-1].shape != shape:
                raise UserError(f"{file} is {images[-1].shape[:2]}, others are {shape[:2]}; equal sizes are needed")
        splits += [np.stack(images), np.array([label_of[name] for _, name in files])]
    if min(shape[:2]) < SMALLEST_SIDE:
        raise UserError(f"{folder}: images are {shape[:2]}; at least {SMALLEST_SIDE} pixels a side are needed")
    empty = set(range(len(classes))) - set(splits[1].tolist())
    if empty:
        raise UserError(f"{folder / 'train' / classes[min(empty)]} holds no image; each class needs one")
    return Arrays(*splits, len(classes), tuple(classes))


def check_image_folder(folder: Path) -> None:
    """Refuse a folder that is no data set, without reading it."""
    if not (folder / "train").is_dir() or not any((folder / name).is_dir() for name in ("test", "val")):
        raise UserError(
            f"--dataset {folder}: the folder needs train/ and test/ or val/, with a folder per class in each"
        )


def _by_folder(part: Path) -> list[tuple[Path, str]]:
    """Every image under part/<class>/, at any depth, and its class."""
    found = [
        (Path(root) / name, top.name)
        for top in part.iterdir()
        if top.is_dir()
        for root, _, names in os.walk(top)
        for name in names
        if name.lower().endswith(SUFFIXES)
    ]
    return sorted(found)  # the order of a directory is the file system's


def _annotated(table: Path) -> list[tuple[Path, str]]:
    """Tiny-ImageNet's val/: images/<file>, and a table of file name, class and box."""
    rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(len(row) < 2 for row in rows):
        raise UserError(f"{table} is not a table of file names and classes, separated by tabs")
    return [(table.parent / "images" / row[0], row[1]) for row in rows]


def _read(file: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError  # only this kind of data set needs it

    try:
        with Image.open(file) as image:
            mode, pixels = image.mode, np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{file} cannot be read as an image ({reason})") from error
    if mode.startswith(("I", "F")):  # which the conversion cuts off at 255
        raise UserError(f"{file} has pixels of more than 8 bits (mode {mode}); 8 bits a channel are needed")
    return pixels
