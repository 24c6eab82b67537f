"""docs/results.md: every result in a line, taken from the outputs that the notebooks store.

`python docs/results.py` writes the page from what is stored in notebooks/, a second's work.
Verdicts are those of the notebooks' tables of claims, and each number is found in an output of the
section that its row links to. tests/test_results.py compares the page with the notebooks.
"""

import html
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat

from wdlib import WdlibError, paths

PAGE = paths.ROOT / "docs" / "results.md"
WORDS = 12
"""A result has at most so many."""

CLAIMS = "The claims"
VERDICTS = {
    r"reproduced": "reproduced",
    r"not reproduced|against|no gain|worse|the groups arrive, the classes": "not reproduced",
    r"cannot be tested|depends|not shown|weakly against it in \d of \d|not seen": "open",
}
"""How a verdict of a notebook begins, and what the page calls it."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the page.

    says: the claim, or the question where it is ours.
    notebook: its two digits.
    found: a regular expression that occurs in the notebook's outputs, for a claim in those of the
        section "The claims"; cells of a table end with a bar there, rows with a line. Its groups
        are the numbers of `words`.
    words: the result. "{0}" is the first group, "{0.low}" and "{0.high}" the ends of what it
        matches where it matches more than once.
    figure: name without ending.
    """

    says: str
    notebook: str
    found: str
    words: str
    figure: str


PAPERS = (
    Row(
        says="A: distances between all singular value vectors follow a power law",
        notebook="03",
        found=r"follow a power law\.\|.*?(\d+)% of the distances, with KS ([\d.]+)",
        words="the upper {0} % alone; KS {1}",
        figure="03_dsv",
    ),
    Row(
        says="A: the same, in five models",
        notebook="12",
        found=r"follow a power law\.\|p below 0\.05: (.*?);",
        words="a power law is rejected in {0}",
        figure="12_real",
    ),
    Row(
        says="A: α is 1.78 (LLaMA3.2-1B, r = 16)",
        notebook="03",
        found=r"([\d.]+) \(csn\), ([\d.]+) \(full\), ([\d.]+) \(loglog\)",
        words="another model here: {0} (csn), {1} (full), {2} (loglog)",
        figure="03_alpha",
    ),
    Row(
        says="A: the shape stays for other r",
        notebook="03",
        found=r"([\d.]+) \(csn, r = 16\), ([\d.]+) \(csn, r = 64\), ([\d.]+) \(csn, r = 192\)",
        words="the shape does; α (csn) is {0}, {1}, {2}",
        figure="03_dsv",
    ),
    Row(
        says="A: in SmolLM2-135M all pairs of types are power laws",
        notebook="05",
        found=r"(\d+ of \d+) pairs in",
        words="{0} pairs; the others are undecided",
        figure="05_classes",
    ),
    Row(
        says="A: in LLaMA3 three pairs are exceptions",
        notebook="05",
        found=r"(v-gate .*?)\|",
        words="another model here: {0}",
        figure="05_grid",
    ),
    Row(
        says="A: Pareto counts give power-law distances",
        notebook="06",
        found=r"Pareto counts, r = 16: (\d+ of \d+)\|",
        words="{0} generated sets",
        figure="06_exponents",
    ),
    Row(
        says="A: Gaussian counts around one template give normal distances",
        notebook="06",
        found=r"templates: 1, r = 16: ([\d, ]+ of \d+)\|",
        words="{0} sets, by share of new entries",
        figure="06_chi_square",
    ),
    Row(
        says="A: Gaussian counts between two templates give normal distances",
        notebook="06",
        found=r"templates: 2, r = 16: ([\d, ]+ of \d+)\|",
        words="{0} sets, by share of new entries",
        figure="06_chi_square",
    ),
    Row(
        says="A: the adapter follows the reference's characterisation",
        notebook="07",
        found=r"power law in A and B are (\d+)% and (\d+)% of its power-law pairs",
        words="groups arrive; power laws kept: {0} % (A), {1} % (B)",
        figure="07_grids",
    ),
    Row(
        says="A: a reference of power laws alone has nothing to transfer",
        notebook="07",
        found=r"nothing to transfer\.\|.*?(\d+ of \d+) pairs",
        words="no such reference here: {0} pairs",
        figure="07_grids",
    ),
    Row(
        says="A: reshaped LoRA lifts GPQA of SmolLM2-135M from 0.2222 to 0.2879",
        notebook="13",
        found=r"over four orders minus default (\S+) \[(\S+), (\S+)\]",
        words="over four orders {0} against peft's default ({1} to {2})",
        figure="13_orders",
    ),
    Row(
        says="A: reshaped LoRA trains better",
        notebook="08",
        found=r"trains better.*?papers' rate; (\S+) \[(\S+), (\S+)\] each at its best",
        words="each at its best rate, held-out loss {0} nats ({1} to {2})",
        figure="08_rates",
    ),
    Row(
        says="B: the Standard-Deviation Vector tells models apart",
        notebook="09",
        found=r"halves of a model find each other: (\d+ of \d+), p = ([\d.]+)",
        words="{0} halves find their other half, p = {1}",
        figure="09_distances",
    ),
    Row(
        says="B: the Standard-Deviation Vector shows families",
        notebook="09",
        found=r"shows families\|.*?(\d+ of \d+), p = ([\d.]+)",
        words="{0} find their family, p = {1}: too few families",
        figure="09_distances",
    ),
    Row(
        says="B: the Clustering Vector tells models apart",
        notebook="10",
        found=r"tells models apart\|(\d+ of \d+), p = ([\d.]+)",
        words="{0} halves, clusters matched, r = 16, p = {1}",
        figure="10_distances",
    ),
    Row(
        says="B: the Clustering Vector shows families",
        notebook="10",
        found=r"shows families\|(\d+ of \d+), p = ([\d.]+)",
        words="{0} find their family, p = {1}: too few families",
        figure="10_distances",
    ),
    Row(
        says="B: after LoRA the Standard-Deviation Vector moves with the data",
        notebook="11",
        found=r"moves with the data set\.\|at most (\S+) of the way; data / seed: .*?p = ([\d.]+)",
        words="at most {0} of the way to another model; p = {1}",
        figure="11_movement",
    ),
    Row(
        says="B: after LoRA the Clustering Vector stays",
        notebook="11",
        found=r"stays with the pretrained model\.\|(\w+ of \d+) matrices",
        words="{0} matrices change their cluster",
        figure="11_clusters",
    ),
)
"""What the papers say; A is arXiv 2509.00046, B is arXiv 2509.19122."""

OURS = (
    Row(
        says="How many matrices make the tail?",
        notebook="03",
        found=r"\n10\|.*\|([\d.]+)\|\n20\|.*\|([\d.]+)\|",
        words="ten: without them α (csn) is {0}, without twenty {1}",
        figure="03_without_remote",
    ),
    Row(
        says="Which laws describe that tail better?",
        notebook="04",
        found=r"rivals ahead in 95 % of resamples\|(.*?)\|",
        words="three that bend: {0}",
        figure="04_rivals",
    ),
    Row(
        says="Does the usual test suit distances?",
        notebook="04",
        found=r"\|([\d.]+)\|([\d.]+)\|\n",
        words="no: it rejects {0.low} to {0.high} % of true power laws",
        figure="04_size",
    ),
    Row(
        says="How often does ours reject them, at 5 %?",
        notebook="04",
        found=r"\|([\d.]+)\|([\d.]+)\|\n",
        words="{1.low} to {1.high} %, by family",
        figure="04_size",
    ),
    Row(
        says="Is it training, or the shapes of the matrices?",
        notebook="04",
        found=r"trained\|([\d.e-]+)\|(?s:.*?)gaussian\|([\d.e-]+)\|",
        words="training: median distance {0}, of Gaussian matrices {1}",
        figure="04_nulls",
    ),
    Row(
        says="Can the generator imitate a trained model?",
        notebook="06",
        found=r"power-law\|method\|(\d+)\|(?:[^|]*\|){4}(\d+)\|(?s:.*?)power-law\|ratio\|"
        r"(?:[^|]*\|){5}(\d+)\|",
        words="{1} of {0} pairs; with one parameter more, {2}",
        figure="06_calibration",
    ),
    Row(
        says="What does reshaping do before training?",
        notebook="07",
        found=r"literal\|1\.0\|[\d.]+\|([\d.]+)\|",
        words="`literal` moves the loss by {0} nats, `a_only` by none",
        figure="07_step0",
    ),
    Row(
        says="Is it the weight distribution that makes the curve?",
        notebook="08",
        found=r"vary by ([\d.]+)\s+nats,\s+by luck alone they\s+would by\s+([\d.]+)",
        words="no sign: five starts vary by {0} nats, luck gives {1}",
        figure="08_causes",
    ),
    Row(
        says="Is it the start, or the size of the steps?",
        notebook="08",
        found=r"\npissa\|both at the papers' rate\|(\S+?)\|(?s:.*?)"
        r"each at its best rate\|(\S+?)\|",
        words="the size: PiSSA's {0} nats become {1}, each at its best rate",
        figure="08_leads",
    ),
    Row(
        says="Does the curvature foretell a start's best rate?",
        notebook="08",
        found=r"\neva\|[\d.e+]+\|\S+?\|\S+?\|\S+?\|([\d.]+)\|([\d.]+)",
        words="by its inverse root, EVA's to {1} times; by its inverse, {0}",
        figure="08_curvature",
    ),
    Row(
        says="How much does GPQA move with the order of its letters?",
        notebook="13",
        found=r"one model in two orders\|\d+\|([\d.]+)%",
        words="by the paper's 13 questions or more in {0} % of cases",
        figure="13_orders",
    ),
    Row(
        says="Is a copy in disguise recognised?",
        notebook="14",
        found=r"\ninvariants\|(\d+)%\|(\d+)%\|",
        words="{1} % where the function is unchanged, {0} % of all relatives",
        figure="14_recognised",
    ),
    Row(
        says="Do characterisations agree between models?",
        notebook="12",
        found=r"labels correlate by ([\d.]+) within a family, (\S+ to \S+) between families",
        words="by {0} within a family, by {1} between families",
        figure="12_agreement",
    ),
    Row(
        says="What do 4-bit weights change?",
        notebook="01",
        found=r"singular values, median change\|([\d.]+)%(?s:.*?)distances, median change\|"
        r"([\d.]+)%",
        words="singular values by {0} %, distances by {1} % (medians)",
        figure="01_four_bits",
    ),
    Row(
        says="Are sketches of flat spectra right?",
        notebook="02",
        found=r"top_singular_values\|(\S+?)\|(?s:.*?)svd_lowrank\|(\S+?)\|",
        words="no: `svd_lowrank` errs by {1}, ours by {0}",
        figure="02_accuracy",
    ),
)
"""What the papers do not ask."""

HEAD = """# Every result in a line

Made by `docs/results.py` from the outputs that the notebooks store. Paper A is
[arXiv 2509.00046](https://arxiv.org/abs/2509.00046), paper B is
[arXiv 2509.19122](https://arxiv.org/abs/2509.19122). Where no model is named, it is
SmolLM2-135M-Instruct in 4 bits. A claim is *open* where it speaks of a model that is not at hand,
or where the data are too few to say.

- **MSV**: the r largest singular values of a matrix as a vector; r is 16 where nothing is said.
- **DSV**: the cosine distances between these vectors, of all matrices or of two types of them.
- **csn**, **full**, **loglog**: three estimators of the exponent α. The first also chooses where
  the tail begins.
- **KS**: the largest gap between two cumulative distributions. 0 is a perfect fit.
- **`literal`**, **`a_only`**: reshaped starts of LoRA. `literal` adds the product of A and B to the
  model; `a_only` begins with B = 0, as usual, and leaves the model as it is.
- **Standard-Deviation Vector**, **Clustering Vector**: the two fingerprints of paper B.

[method.md](method.md) defines all of them.
"""


def text_of(output: dict) -> str:
    """What an output shows: cells of tables end with a bar, rows with a line."""
    data = output.get("data", {})
    shown = data.get("text/html") or data.get("text/plain") or output.get("text", "")
    if "text/html" not in data:
        return shown + "\n"
    shown = re.sub(r"<style.*?</style>|\n\s*", "", shown, flags=re.S)
    shown = re.sub(r"</tr>", "\n", re.sub(r"</t[hd]>", "|", shown))
    return html.unescape(re.sub(r"</?[a-z][^>]*>", "", shown))


def sections(notebook: Path) -> dict[str, str]:
    """What the outputs under each second-level heading of a stored notebook show."""
    found, heading = {}, ""
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^## (.*)", cell.source, re.M) or [heading])[-1]
        shown = "".join(map(text_of, cell.get("outputs", [])))
        found[heading] = found.get(heading, "\n") + shown
    return found


@dataclass(frozen=True)
class Numbers:
    """What one group matched, once or more: prints as the first, and knows the ends."""

    all: tuple[str, ...]

    def __str__(self) -> str:
        return self.all[0]

    @property
    def low(self) -> str:
        """The smallest, without decimals."""
        return f"{min(map(float, self.all)):.0f}"

    @property
    def high(self) -> str:
        """The largest, without decimals."""
        return f"{max(map(float, self.all)):.0f}"


def line(row: Row, notebook: Path, *, judged: bool) -> str:
    """A row of the page, with a link to the section whose outputs show it.

    judged: with the verdict, which is the last cell of the row of claims that `found` is in.

    Raises WdlibError if the notebook does not show what the row says it does.
    """
    shown = {h: t for h, t in sections(notebook).items() if h == CLAIMS or not judged}
    heading = next((h for h, text in shown.items() if re.search(row.found, text)), None)
    if heading is None:
        raise WdlibError(f"{notebook.name} shows no {row.found!r}: mend docs/results.py")
    text = shown[heading]
    matches = list(re.finditer(row.found, text))
    groups = [Numbers(g) for g in zip(*(m.groups() for m in matches), strict=True)]
    words = row.words.format(*groups)
    if len(words.split()) > WORDS:
        raise WdlibError(f"{words!r} has more than {WORDS} words: shorten it in docs/results.py")
    anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
    where = f"[{row.notebook}](../notebooks/{notebook.name}#{anchor})"
    figure = f"[figure](../figures/{row.figure}.png)"
    cells = [row.says, words, where, figure]
    if judged:
        start = text.rfind("\n", 0, matches[0].start()) + 1
        cells.insert(1, verdict(text[start : text.index("\n", matches[0].end())]))
    return "| " + " | ".join(cells) + " |"


def verdict(row: str) -> str:
    """What the page calls the verdict at the end of a row; raises WdlibError if nothing."""
    said = row.rstrip("|").rpartition("|")[2]
    for begins, name in VERDICTS.items():
        if re.match(begins, said):
            return name
    raise WdlibError(f"the verdict {said!r} is not among those of docs/results.py: add it there")


def page(folder: Path = paths.NOTEBOOKS) -> str:
    """docs/results.md, from the notebooks of a folder."""
    stored = {path.name[:2]: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    lines = [HEAD, "## What the papers say", ""]
    lines += ["| claim | verdict | result | section | figure |", "|---|---|---|---|---|"]
    lines += [line(row, stored[row.notebook], judged=True) for row in PAPERS]
    lines += ["", "## What we asked besides", ""]
    lines += ["| question | result | section | figure |", "|---|---|---|---|"]
    lines += [line(row, stored[row.notebook], judged=False) for row in OURS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
