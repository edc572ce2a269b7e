"""The progress bar of AutoAttack."""

import sys
from collections.abc import Iterable
from typing import Any

from experiment.evaluation.chunks import AUTOATTACK


class Display:
    """The progress bar: images done, the attack at work, and the share of them that is robust so far.

    Where stderr is no terminal there is no bar, only a line per chunk.
    """

    def __init__(self, done: Iterable[dict[str, Any]], todo: Iterable[int], show: bool) -> None:
        from tqdm import tqdm

        self._show, self._images, self._robust = show, 0, 0
        self._total = sum(record["images"] for record in done) + sum(todo)
        shown = show and sys.stderr.isatty()
        self._bar = tqdm(total=self._total, unit="image", desc="AutoAttack", disable=not shown, dynamic_ncols=True)
        for record in done:
            self._count(record)

    def say(self, line: str) -> None:
        """Print a line on stderr, above the bar."""
        if self._show:
            self._bar.write(line, file=sys.stderr)

    def begin(self, attack: str, record: dict[str, Any]) -> None:
        """Show the attack that starts now, and the robust share with the chunk at hand."""
        *_, latest = record["flags"].values()
        share = (self._robust + latest.count("1")) / (self._images + record["images"])
        self._bar.set_postfix_str(f"{attack}, robust {100 * share:.2f} %")

    def finish(self, record: dict[str, Any]) -> None:
        """Count a chunk that is done now."""
        self._count(record)
        if self._bar.disable:
            share = self._robust / self._images
            self.say(f"AutoAttack: {self._images} of {self._total} images, robust {100 * share:.2f} %")

    def _count(self, record: dict[str, Any]) -> None:
        self._images += record["images"]
        self._robust += record["flags"][AUTOATTACK[-1]].count("1")
        self._bar.update(record["images"])

    def close(self) -> None:
        """End the bar."""
        self._bar.close()
