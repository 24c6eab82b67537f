"""How often the two goodness-of-fit tests of `wdlib.fits` reject, at 5 %, a law that is known.

`python workflow/scripts/goodness_of_fit_size.py` writes data/results/goodness_of_fit_size.csv, a
row per case. Finished rows are kept, so an interrupted run goes on where it stopped.
The test of `fits.goodness_of_fit_vectors` was chosen on these families and seeds. With --held-out,
other seeds and two more families are measured, fewer times, and written to
goodness_of_fit_size_held_out.csv (four minutes on one core).

All tables but those of the templates have exact marginal laws. With F the Pareto law of density
exponent 2.5 from 1 on:

ultrametric  d = max(g_k, g_l) with P(g <= x) = sqrt(F(x))
product      ln d = u_k + u_l with u ~ Gamma(1/2), scale 2/3
cauchy       distances between vectors from the Cauchy law in three dimensions, normal vectors with
             a heavy-tailed factor, moved to F by their own law
walk         distances between the steps of a normal random walk in three dimensions, as of layers
             that drift, moved to F by the mean of their laws over all pairs: F is the law of a
             pair drawn at random, near steps are near, and the vectors are dependent, which the
             bootstrap of vectors takes them not to be
independent  every distance drawn on its own; nothing is shared
template     distances of vectors that are one template with a Pareto number of entries replaced
             (docs/method.md, section 6): a power law in the tail only

Truth `power law` is that law; `power law, body` keeps the upper 40 % and gives the rest the shape
of a lognormal law; `lognormal` and `exponential` replace all distances by quantiles of that law at
the same F, so that what vectors share stays. sigma of the lognormal law does not matter: ln d is
only scaled by it.
"""

import argparse
from functools import partial
from itertools import islice
from math import sqrt

import numpy as np
from scipy import stats

from wdlib import fits, paths, provenance
from wdlib.distances import cosine_distances
from wdlib.fits import goodness

SIZES = ((24, None), (30, None), (60, None), (30, 30))
TRUTHS = {
    "power law": ("ultrametric", "product", "template", "independent"),
    "power law, body": ("ultrametric", "product"),
    "lognormal": ("ultrametric", "product"),
    "exponential": ("ultrametric", "product"),
}
HELD_OUT_SIZES = ((24, None), (30, None))
HELD_OUT = {
    "power law": ("ultrametric", "product", "template", "cauchy", "walk"),
    "power law, body": ("ultrametric", "product", "cauchy", "walk"),
}
HELD_OUT_SEED = 20261122
DIMENSIONS = 3  # of the vectors of cauchy and walk
SHAPE = 1.5  # of the Pareto law, whose density exponent is one more
LEVEL = 0.05
REPETITIONS, HELD_OUT_REPETITIONS = 500, 400
REPLICATES = 199
IID_REPLICATES = 39  # few, for time: a Monte Carlo test has its level for any 20 k - 1
COLUMNS = (
    "truth", "dependence", "vectors", "distances", "repetitions", "replicates",
    "rejected_iid", "error_iid", "rejected_vectors", "error_vectors", "tail_share",
)  # fmt: skip


def table(truth: str, dependence: str, n: int, m: int | None, rng: np.random.Generator):
    """Distances within n vectors, (n, n), or between n and m, (n, m)."""
    if dependence == "template":
        rows = templates(n + (m or 0), rng)
        return cosine_distances(rows[:n], rows[n:] if m else rows)
    tail = pareto(dependence, n, m, rng) ** -SHAPE  # 1 - F
    if truth == "lognormal":
        return np.exp(-stats.norm.ppf(tail))
    if truth == "exponential":
        return -np.log1p(-tail)
    law = tail ** (-1 / SHAPE)
    if truth == "power law":
        return law
    start = 0.4 ** (-1 / SHAPE)
    body = stats.norm.ppf((1 - np.maximum(tail, 0.4)) / 0.6 * stats.norm.cdf(0.6))
    return np.where(tail < 0.4, law / start, np.exp((body - 0.6) / 2))


def pareto(dependence: str, n: int, m: int | None, rng: np.random.Generator) -> np.ndarray:
    if dependence == "independent":
        values = 1 + rng.pareto(SHAPE, (n, m or n))
        return values if m else np.triu(values) + np.triu(values, 1).T
    if dependence in ("cauchy", "walk"):
        return vectors(dependence, n, rng) ** (-1 / SHAPE)
    if dependence == "ultrametric":
        g = (1 - rng.random(n + (m or 0)) ** 2) ** (-1 / SHAPE)
        return np.maximum(g[:n, None], g[n:] if m else g)
    u = rng.gamma(0.5, 1 / SHAPE, n + (m or 0))
    return np.exp(u[:n, None] + (u[n:] if m else u))


def vectors(dependence: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Share of all distances that are as large at least, under their law: (n, n), for n vectors."""
    x = rng.standard_normal((n, DIMENSIONS))
    if dependence == "cauchy":
        x /= np.sqrt(rng.chisquare(1, (n, 1)))
        law = stats.f(DIMENSIONS, 1, scale=4 * DIMENSIONS)  # the difference has twice the width
        return law.sf(squares(x))
    lags = np.arange(1, n)
    within = stats.chi2.sf(squares(x.cumsum(axis=0))[..., None] / lags, DIMENSIONS)
    return within @ (n - lags) / (n - lags).sum()


def squares(x: np.ndarray) -> np.ndarray:
    return ((x[:, None] - x) ** 2).sum(axis=2)


def templates(n: int, rng: np.random.Generator, entries: int = 3000) -> np.ndarray:
    template = rng.normal(size=entries)
    rows = np.tile(template, (n, 1))
    counts = np.clip(0.004 * entries * (1 + rng.pareto(SHAPE, n)), 1, entries).astype(int)
    for row, count in zip(rows, counts, strict=True):
        row[rng.choice(entries, count, replace=False)] = rng.normal(size=count)
    return rows


def rejects(ks: float, null, replicates: int) -> bool:
    """Whether p <= LEVEL; replicates are drawn until that is decided."""
    room = LEVEL * (1 + replicates) - 1
    for draw in islice(null, replicates):
        room -= draw >= ks
        if room < 0:
            return False
    return True


def measure(
    truth: str, dependence: str, n: int, m: int | None, *, held_out: bool
) -> list[dict[str, str]]:
    """The row of a case."""
    repetitions = HELD_OUT_REPETITIONS if held_out else REPETITIONS
    symmetric = m is None
    rejected, tail_share = np.zeros((repetitions, 2)), np.zeros(repetitions)
    for i in range(repetitions):
        rng = np.random.default_rng([HELD_OUT_SEED] * held_out + [i, n, m or 0])
        distances = table(truth, dependence, n, m, rng)
        flat = fits.table_distances(distances, symmetric)
        fit = fits.power_law(flat)
        tail_share[i] = fit.n_tail / fit.n
        nulls = (
            (goodness.independent_null(fit, flat, rng), IID_REPLICATES),
            (goodness.vector_null(fit, distances, symmetric, rng), REPLICATES),
        )
        rejected[i] = [rejects(fit.ks, *null) for null in nulls]
    iid, vectors = rejected.mean(axis=0)
    values = (
        truth, dependence, f"{n} x {m}" if m else str(n), flat.size, repetitions, REPLICATES,
        *(f"{v:.4f}" for share in (iid, vectors) for v in (share, error(share, repetitions))),
        f"{tail_share.mean():.2f}",
    )  # fmt: skip
    return [dict(zip(COLUMNS, values, strict=True))]


def error(share: float, repetitions: int) -> float:
    return sqrt(share * (1 - share) / repetitions)


def main(arguments: list[str] | None = None) -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--held-out", action="store_true")
    held_out = parser.parse_args(arguments).held_out
    cells = [
        (truth, dependence, n, m)
        for truth, dependences in (HELD_OUT if held_out else TRUTHS).items()
        for dependence in dependences
        for n, m in (HELD_OUT_SIZES if held_out else SIZES)
    ]
    parameters = {
        "repetitions": HELD_OUT_REPETITIONS if held_out else REPETITIONS,
        "replicates": REPLICATES,
        "iid replicates": IID_REPLICATES,
        "level": LEVEL,
        "shape": SHAPE,
        "seed": HELD_OUT_SEED if held_out else None,
    }
    name = "goodness_of_fit_size_held_out.csv" if held_out else "goodness_of_fit_size.csv"
    made = provenance.of(__file__, parameters)
    rows_of = partial(measure, held_out=held_out)
    provenance.write_by_cell(cells, rows_of, paths.RESULTS / name, made)


if __name__ == "__main__":
    main()
