"""compare.py --html: a page that is complete in itself, escaped, and readable without a script."""

from html.parser import HTMLParser

import pytest
from test_compare import flags_of, make_run

from experiment import evaluation
from experiment.compare import main


class Outline(HTMLParser):
    """Tags by name with their attributes, and text outside of style."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self._open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        if "style" not in self._open:
            self.text.append(data)


RECORD = {"measured": ["pgd"], "student_sha256": "f" * 64, "dataset_sha256": "d" * 64}
"""A record of evaluate.py: figures beside it are shown."""


@pytest.fixture(scope="module")
def outline(tmp_path_factory):
    """The page of two seeds of a pair, with everything that can be measured."""
    folder = tmp_path_factory.mktemp("runs")
    gradients = {"gd": 0.1, "gc": 0.7, "definition": "g = something"}
    for seed in (0, 1):
        for adds, flags in zip((None, "IGDM"), flags_of(20, 3), strict=True):
            steps = {"attacks": dict.fromkeys(("apgd-ce", "apgd-t", "fab-t", "square"), 0.4)}
            run = make_run(
                folder / f"{adds}{seed}", adds, method="<b>A&B</b>", seed=seed, flags=flags, attack=steps,
                result={"gradients": gradients, "seconds": {"train": 10.0}, "student_sha256": "f" * 64},
            )  # fmt: skip
            evaluation.write_record(run, RECORD)
            (run / "evaluations/gradients.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
            (run / "evaluations/gradients.png").write_bytes(b"\x89PNG")
    path = folder / "page.html"
    main([str(folder), "--html", str(path), "--out", str(folder / "out")])
    outline = Outline()
    outline.feed(path.read_text())
    return outline


def test_the_page_needs_nothing_else(outline):
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in outline.tags}
    for tag, attributes in outline.tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, value)


def test_the_page_shows_all_that_was_measured(outline):
    pictures = [attributes for tag, attributes in outline.tags if tag == "img"]
    units = ["per cent", "percentage points", "per cent"]
    assert all(unit in attributes["alt"] for unit, attributes in zip(units, pictures[:3], strict=True))
    assert all(attributes["alt"] for attributes in pictures)
    kinds = [attributes["src"].partition(";")[0] for attributes in pictures]
    figures, of_evaluate = ["data:image/svg+xml"] * 3, ["data:image/png", "data:image/svg+xml"] * 4
    assert kinds == [*figures, *of_evaluate]
    text = " ".join(" ".join(outline.text).split())
    verdict = "<b>A&B</b>+IGDM minus <b>A&B</b> (BDM, RES-18, digits): "
    verdict += "+4.25 points, 95 % interval +2.00 to +6.75, seeds: 2."
    assert text.index(verdict) < text.index("n seeds"), "the gain comes first"
    for part in ("<b>A&B</b>+IGDM", "g = something", "bootstrap over seeds and images"):
        assert part in text, part
    assert "python <b>a&b</b>_cifar100.py --seed 1" in text


def test_names_are_text_and_ids_are_unique(outline):
    assert "b" not in [tag for tag, _ in outline.tags], "a method's name is no markup"
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_everything_that_scrolls_is_reached_by_keyboard(outline):
    wide = [attributes for _, attributes in outline.tags if attributes.get("class") == "wide"]
    assert wide
    assert all(attributes.get("tabindex") == "0" and attributes.get("aria-label") for attributes in wide)
