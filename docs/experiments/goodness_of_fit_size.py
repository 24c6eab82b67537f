"""How often the two goodness-of-fit tests of `wdlib.fits` reject, at 5 %, a law that is known.

`python docs/experiments/goodness_of_fit_size.py` writes data/results/goodness_of_fit_size.csv, a
row per case, each as soon as it is known; run again, it goes on after the rows that are there.
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
from itertools import islice
from math import sqrt
from pathlib import Path

import numpy as np
from csv_tables import read, write
from scipy import stats

from wdlib import fits, paths
from wdlib.distances import cosine_distances

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
    truth: str, dependence: str, size: tuple, repetitions: int, replicates: int, *, held_out: bool
) -> dict:
    n, m = size
    symmetric = m is None
    rejected, tail_share = np.zeros((repetitions, 2)), np.zeros(repetitions)
    for i in range(repetitions):
        rng = np.random.default_rng([HELD_OUT_SEED] * held_out + [i, n, m or 0])
        distances = table(truth, dependence, n, m, rng)
        flat = fits.table_distances(distances, symmetric)
        fit = fits.fit_power_law(flat)
        tail_share[i] = fit.n_tail / fit.n
        nulls = (
            (fits._independent_null(fit, flat, rng), IID_REPLICATES),
            (fits._vector_null(fit, distances, symmetric, rng), replicates),
        )
        rejected[i] = [rejects(fit.ks, *null) for null in nulls]
    iid, vectors = rejected.mean(axis=0)
    values = (
        truth, dependence, f"{n} x {m}" if m else str(n), flat.size, repetitions, replicates,
        *(f"{v:.4f}" for share in (iid, vectors) for v in (share, error(share, repetitions))),
        f"{tail_share.mean():.2f}",
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def error(share: float, repetitions: int) -> float:
    return sqrt(share * (1 - share) / repetitions)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--repetitions", type=int, help="500, or 400 held out")
    parser.add_argument("--replicates", type=int, default=199)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    held_out = options.held_out
    settings = options.repetitions or (400 if held_out else 500), options.replicates
    name = "goodness_of_fit_size_held_out.csv" if held_out else "goodness_of_fit_size.csv"
    out = options.out or paths.RESULTS / name
    rows = [
        row for row in read(out) if (int(row["repetitions"]), int(row["replicates"])) == settings
    ]
    known = {(row["truth"], row["dependence"], row["vectors"]) for row in rows}
    for truth, dependences in (HELD_OUT if held_out else TRUTHS).items():
        for dependence in dependences:
            for n, m in HELD_OUT_SIZES if held_out else SIZES:
                if (truth, dependence, f"{n} x {m}" if m else str(n)) not in known:
                    rows.append(measure(truth, dependence, (n, m), *settings, held_out=held_out))
                    write(rows, out)


if __name__ == "__main__":
    main()
