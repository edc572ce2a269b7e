"""Draw the terminal of a demo run as docs/figures/terminal.svg.

script -q -c "stty rows 40 columns 120; make demo" demo.log     # records the terminal of a real run
python docs/figures/terminal.py demo.log [FILE.svg]
"""

import io
import re
import sys
from pathlib import Path

WIDTH = 120
EPOCHS = ("epoch 1/10 ", "epoch 9/10 ", "epoch 10/10 ")
"""Epochs whose lines are shown; before the second one, the progress bar."""


def excerpt(log: str) -> list[str]:
    """The start of the run with IGDM, some epochs, a progress bar, and the comparison's table."""
    lines = [line.rstrip("\r").split("\r") for line in log[log.index("AdaAD+IGDM: ") :].split("\n")]
    last = [frames[-1].rstrip() for frames in lines]
    shown = ["$ make demo", *last[: last.index("")], ""]
    for epoch in EPOCHS:
        if epoch == EPOCHS[1]:
            bars = [frame for frames in lines for frame in frames if re.match(r"epoch 8/10 .*step", frame)]
            shown += [bars[-1].rstrip(), ""]
        shown += [line for line in last if line.startswith(epoch) and "left" in line and "step" not in line]
    table = next(i for i, line in enumerate(last) if "AutoAttack" in line and "clean" in line and "method" in line)
    gain = next(i for i, line in enumerate(last) if line.startswith("AdaAD+IGDM minus AdaAD"))
    return [*shown, "", *last[table : last.index("", table)], "", last[gain].partition(" By seed")[0]]


def draw(log: Path, file: Path) -> None:
    """Write the picture, without rich's fonts from the network."""
    from rich.console import CONSOLE_SVG_FORMAT, Console
    from rich.text import Text

    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    for line in excerpt(log.read_text(encoding="utf-8", errors="replace")):
        console.print(Text.from_ansi(line))
    fontless = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    console.save_svg(str(file), title="make demo", code_format=fontless)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_suffix(".svg"))
