"""How often `wdlib.characterise` is right: the confusion table, and planted groupings.

Run once, about fifteen minutes on one core: `python workflow/scripts/confusion.py`. Finished cells
are kept, so an interrupted run goes on where it stopped. Writes data/results/confusion.csv and
grouping.csv. Each set holds distances between generated vectors, dependent as those of a model are,
in three ways:

template    vectors are a template with a random number of entries replaced (docs/method.md,
            section 6); distances are near the sum of two counts
ultrametric d(k, l) = max(g_k, g_l), with the law of g chosen such that every distance follows the
            named law exactly; a few vectors make the whole tail
noise       vectors are a template plus normal noise in 256 dimensions

A planted model has one template per group, the templates at right angles, and vectors of a type
that differ from it as in the first way, with alpha GROUP_ALPHA. Were the templates not at right
angles, distances between groups would have the same Pareto tail on a shifted origin.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np
from scipy import stats

from wdlib import paths, provenance
from wdlib.characterise import LABELS, NORMAL, POWER_LAW, REPLICATES, characterise, classify
from wdlib.distances import cosine_distances
from wdlib.spectra import Spectra

DRAWS = 500
SEED = 20250900
ENTRIES = 4096
SHAPES = {100: (10, 10), 276: (24, None), 576: (24, 24), 1024: (32, 32)}
"""Distances -> vectors on both sides; None for distances within one set."""

GROUPINGS = {
    "gate apart": (("q", "k", "v", "o", "up", "down"), ("gate",)),
    "two groups": (("q", "k", "v", "o"), ("gate", "up", "down")),
}
GROUP_DRAWS = 100
GROUP_ALPHA = 1.9
LAYERS = 32

Vectors = tuple[int, int | None]
Plant = Callable[[np.random.Generator, Vectors], np.ndarray]


def template_vectors(
    rng: np.random.Generator, template: np.ndarray, shares: np.ndarray
) -> np.ndarray:
    """A vector per share: the template with that share of its entries drawn anew, at least one."""
    vectors = np.tile(template, (len(shares), 1))
    counts = np.clip(np.rint(shares * template.size), 1, template.size).astype(int)
    for row, count in zip(vectors, counts, strict=True):
        row[rng.permutation(template.size)[:count]] = rng.standard_normal(count)
    return vectors


def template(shares: Callable[[np.random.Generator, int], np.ndarray]) -> Plant:
    """Cosine distances between vectors of one template."""

    def table(rng: np.random.Generator, vectors: Vectors) -> np.ndarray:
        base = rng.standard_normal(ENTRIES)
        rows, columns = (
            None if n is None else template_vectors(rng, base, shares(rng, n)) for n in vectors
        )
        return cosine_distances(rows, rows if columns is None else columns)

    return table


def ultrametric(law: stats.distributions.rv_frozen) -> Plant:
    """max(g_k, g_l) with g from the square root of the law's distribution function."""

    def table(rng: np.random.Generator, vectors: Vectors) -> np.ndarray:
        rows, columns = (None if n is None else law.ppf(rng.random(n) ** 2) for n in vectors)
        return np.maximum.outer(rows, rows if columns is None else columns)

    return table


def noise(rng: np.random.Generator, vectors: Vectors, *, size: float = 0.05) -> np.ndarray:
    """Cosine distances between a template and normal noise: nearly normal in high dimension."""
    base = rng.standard_normal(256)
    rows, columns = (
        None if n is None else base + size * rng.standard_normal((n, 256)) for n in vectors
    )
    return cosine_distances(rows, rows if columns is None else columns)


def pareto_template(alpha: float, scale: float = 0.01) -> Plant:
    """The template whose distances have a tail of density exponent `alpha`."""
    return template(lambda rng, n: scale * (1 + rng.pareto(alpha - 1, n)))


PLANTS: dict[str, dict[str, Plant]] = {
    POWER_LAW: {
        f"{kind}, alpha {alpha}": plant
        for alpha in (1.8, 2.5, 3.5)
        for kind, plant in (
            ("template", pareto_template(alpha)),
            ("ultrametric", ultrametric(stats.pareto(alpha - 1))),
        )
    },
    NORMAL: {
        "template, share 0.30 +- 0.06": template(lambda rng, n: rng.normal(0.3, 0.06, n)),
        "template, share 0.10 +- 0.03": template(lambda rng, n: rng.normal(0.1, 0.03, n)),
        "ultrametric, 1.0 +- 0.2": ultrametric(stats.norm(1, 0.2)),
        "noise": noise,
    },
    "neither": {
        "ultrametric, exponential": ultrametric(stats.expon()),
        "template, exponential": template(lambda rng, n: 0.01 + rng.exponential(0.05, n)),
        "ultrametric, lognormal 0.5": ultrametric(stats.lognorm(0.5)),
        "ultrametric, lognormal 1": ultrametric(stats.lognorm(1)),
        "ultrametric, lognormal 2": ultrametric(stats.lognorm(2)),
    },
}
"""True class -> name -> generator of tables."""


def count(plant: Plant, vectors: Vectors, draws: int, seed: int) -> Counter:
    """Classify `draws` generated sets: how often each label comes out."""
    labels = Counter()
    for i in range(draws):
        table = plant(np.random.default_rng([seed, i]), vectors)
        verdict = classify(table, symmetric=vectors[1] is None, replicates=REPLICATES, seed=i)
        labels[verdict.label] += 1
    return labels


def planted_model(
    rng: np.random.Generator, grouping: tuple[tuple[str, ...], ...], *, alpha: float = GROUP_ALPHA
) -> Spectra:
    """Spectra in which the distances within each group, and only those, have a power-law tail."""
    noise = rng.standard_normal((ENTRIES, len(grouping)))
    bases = np.linalg.qr(noise)[0].T * np.sqrt(ENTRIES)
    values = {}
    for types, base in zip(grouping, bases, strict=True):
        for type in types:
            shares = 0.01 * (1 + rng.pareto(alpha - 1, LAYERS))
            values[type] = template_vectors(rng, base, shares)
    return Spectra("planted", values, {}, {}, {})


def grouping(model: Spectra) -> set[frozenset[str]]:
    """The groups that `characterise` finds, as sets of types."""
    return {frozenset((g.referenced, *g.members)) for g in characterise(model).groups}


def grouping_rows() -> list[dict[str, str]]:
    """For each planted grouping, how often it came back as it was."""
    rows = []
    for name, types in GROUPINGS.items():
        planted = {frozenset(t) for t in types}
        models = (
            planted_model(np.random.default_rng([SEED, i]), types) for i in range(GROUP_DRAWS)
        )
        right = sum(grouping(model) == planted for model in models)
        interval = stats.binomtest(right, GROUP_DRAWS).proportion_ci(0.95, method="exact")
        rows.append(
            {
                "grouping": name,
                "alpha": str(GROUP_ALPHA),
                "layers": str(LAYERS),
                "right": str(right),
                "draws": str(GROUP_DRAWS),
                "low": f"{interval.low:.4f}",
                "high": f"{interval.high:.4f}",
            }
        )
    return rows


def rows_of(truth: str, name: str, n: int) -> list[dict[str, str]]:
    """A row for each label: count, share and its Clopper-Pearson 95 % interval."""
    labels = count(PLANTS[truth][name], SHAPES[n], DRAWS, SEED)
    rows = []
    for label in LABELS:
        interval = stats.binomtest(labels[label], DRAWS).proportion_ci(0.95, method="exact")
        rows.append(
            {
                "truth": truth,
                "plant": name,
                "n": str(n),
                "label": label,
                "count": str(labels[label]),
                "draws": str(DRAWS),
                "share": f"{labels[label] / DRAWS:.3f}",
                "low": f"{interval.low:.4f}",
                "high": f"{interval.high:.4f}",
            }
        )
    return rows


def main() -> None:
    """Write both tables."""
    parameters = {"draws": DRAWS, "seed": SEED, "entries": ENTRIES, "replicates": REPLICATES}
    cells = [(t, name, n) for t, plants in PLANTS.items() for name in plants for n in SHAPES]
    made = provenance.of(__file__, parameters)
    provenance.write_by_cell(cells, rows_of, paths.RESULTS / "confusion.csv", made)
    parameters |= {"draws": GROUP_DRAWS, "layers": LAYERS, "alpha": GROUP_ALPHA}
    made = provenance.of(__file__, parameters)
    provenance.write(grouping_rows(), paths.RESULTS / "grouping.csv", made)


if __name__ == "__main__":
    main()
