"""The progress bar of work that goes image by image."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from experiment.evaluation.ranks import ranks

if TYPE_CHECKING:
    from tqdm import tqdm


@contextmanager
def progress_bar(name: str | None, images: int) -> Iterator["tqdm"]:
    """A bar of so many images on rank 0's terminal; nothing is shown without a name, or where stderr is no terminal."""
    from tqdm import tqdm

    shown = name is not None and ranks()[0] == 0 and sys.stderr.isatty()
    with tqdm(total=images, unit="image", desc=name, disable=not shown, dynamic_ncols=True, leave=False) as bar:
        yield bar
