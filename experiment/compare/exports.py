"""Tables as Markdown, CSV and LaTeX (booktabs)."""

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence

from experiment.compare.groups import Gain, SeedGroup
from experiment.compare.tables import HEADS, labels_of
from experiment.text import TEXT_COLUMNS, Table

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "α": r"$\alpha$",
    "−": "$-$",
}


def as_markdown(table: Table) -> str:
    """A Markdown table."""
    ruler = ["---" if head in TEXT_COLUMNS else "---:" for head in table[0]]
    return "\n".join(_markdown_row(cells) for cells in (table[0], ruler, *table[1:]))


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{character}" if character in r"\`*_<>|[]" else character for character in " ".join(text.split()))


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell if set(cell) <= set('-:') else markdown_text(cell) for cell in cells)} |"


def commands(groups: Sequence[SeedGroup]) -> str:
    """The command and hardware of every run, as a Markdown code block."""
    lines = ["```sh"]
    for group, label in zip(groups, labels_of(groups), strict=True):
        for run in group.runs:
            # One line each: a line break in a quoted argument could end the code block.
            what = f"# {label}, {run.teacher}, {run.student}, seed {run.seed}: {run.environment['hardware']}"
            lines += [" ".join(what.split()), " ".join(run.command.split())]
    return "\n".join([*lines, "```"])


def as_csv(groups: Sequence[SeedGroup], gains: Sequence[Gain]) -> str:
    """One line per run, accuracies as fractions: for other programs."""
    gain_of = {(id(gain.group), seed): value for gain in gains for seed, value in gain.by_seed.items()}
    names = ("clean", "pgd20", "autoattack", "gd", "gc", "logit_gd", "logit_gc", "best_minus_last")
    head = ["method", "base_method", "teacher", "student", "dataset", "seed", *names]
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow([*head, "gain", "test_examples", "autoattack_examples", "run"])
    for group, label in zip(groups, labels_of(groups), strict=True):
        for run in group.runs:
            figures = [getattr(run, name) for name in names]
            what = [label, run.method, run.teacher, run.student, run.dataset, run.seed]
            rest = [gain_of.get((id(group), run.seed)), run.test_examples, run.attack.get("examples"), run.folder]
            writer.writerow([*what, *figures, *rest])
    return output.getvalue()


def as_latex(groups: Sequence[SeedGroup], table: Table) -> str:
    r"""A booktabs tabular: the results, bold where the mean is the best of its teacher, student and dataset.

    To be set with ``\usepackage{booktabs}``.
    """
    bold = _best(groups)
    head = table[0]
    columns = "".join("l" if name in TEXT_COLUMNS else "r" for name in head)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _latex_row(head, []), r"\midrule"]
    previous = None
    for group, cells in zip(groups, table[1:], strict=True):
        if previous is not None and previous != group.pair:
            lines.append(r"\addlinespace")
        previous = group.pair
        lines.append(_latex_row(cells, [column for column, name in enumerate(head) if (id(group), name) in bold]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _best(groups: Sequence[SeedGroup]) -> set[tuple[int, str]]:
    """(group, column) of the highest mean accuracy among two or more of one teacher, student and dataset."""
    rivals = Counter((group.first.teacher, group.first.student, group.first.dataset) for group in groups)
    best: dict[tuple[str, ...], tuple[float, int]] = {}
    for group in groups:
        run = group.first
        if rivals[run.teacher, run.student, run.dataset] < 2:
            continue
        for figure, head in HEADS.items():
            values = group.values(figure)
            key = (run.teacher, run.student, run.dataset, head)
            if values and (key not in best or sum(values) / len(values) > best[key][0]):
                best[key] = (sum(values) / len(values), id(group))
    return {(group, key[-1]) for key, (_, group) in best.items()}


def _latex_row(cells: Sequence[str], bold: Sequence[int]) -> str:
    texts = [re.sub(r"^\+?(-)(?=\d)", "$-$", _latex(cell)) for cell in cells]
    return " & ".join(rf"\textbf{{{text}}}" if at in bold else text for at, text in enumerate(texts)) + r" \\"


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
