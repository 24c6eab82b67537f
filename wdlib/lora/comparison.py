"""Finished runs -> the rows of the tables and figures that compare starts.

Rows are dictionaries with the names of columns. A variant is compared with a base, which is peft's
default unless another is named; differences are the variant's minus the base's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from wdlib import stats, sweeps
from wdlib.lora.results import CellResult, Sweep, by_rate, paired
from wdlib.lora.runs import UNTRAINED, Hyperparameters, Run

Row = dict[str, Any]
Found = Mapping[Run, CellResult]

BASE = "default"
TEMPLATE, OWN = "both at the papers' rate", "each at its best rate"
"""How two starts are compared in `leads`."""

LAWS = {"inverse": 1.0, "inverse root": 0.5}
"""How a best rate may go with the Hessian's largest eigenvalue: the power of its inverse.

An eigenvalue is in nats per squared parameter. The rate of gradient descent is in squared
parameters per nat, as the inverse is; Adam's is a length in parameters, as the root of the inverse.
"""


def as_by_default(found: Found) -> dict[Run, CellResult]:
    """The runs that differ from a default one in start, reference, seed, model and data alone."""
    return {run: stored for run, stored in found.items() if run.is_plain}


def curves(found: Found, *, base: str = BASE, window: int = 5) -> list[Row]:
    """Training curves beside the base's of the same seed: a row per variant, seed and step.

    Columns: variant, seed, what a curve has (`training.train`), and gap, the loss less the base's,
    a centred running mean over `window` steps. Runs of seeds that the base lacks are left out.
    """
    losses = {r.seed: _losses(s) for r, s in found.items() if r.variant == base}
    rows = []
    for run, stored in found.items():
        if run.seed in losses and stored.report["curve"]:
            gaps = _running_mean(_losses(stored) - losses[run.seed], window)
            about = {"variant": run.variant, "seed": run.seed}
            steps = zip(stored.report["curve"], gaps, strict=True)
            rows += [about | step | {"gap": float(gap)} for step, gap in steps]
    return rows


def _losses(stored: CellResult) -> np.ndarray:
    return np.array([step["loss"] for step in stored.report["curve"]])


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Means over a centred window, which is cut off at the ends."""
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def held_out(found: Found, *, base: str = BASE) -> list[Row]:
    """Held-out losses of every run, nats per token.

    Columns: variant, seed, before and after training, shift (before, less the untrained model's;
    nan without one) and lead (after, less the base's of the same seed; nan without one).
    """
    losses = {(r.variant, r.seed): s.report["held_out"] for r, s in found.items()}
    untrained = [part["after"]["loss"] for (v, _), part in losses.items() if v == UNTRAINED]
    rows = []
    for (variant, seed), part in losses.items():
        before, after = part["before"]["loss"], part["after"]["loss"]
        beside = losses.get((base, seed))
        shift = before - untrained[0] if untrained else np.nan
        lead = after - beside["after"]["loss"] if beside else np.nan
        named = {"variant": variant, "seed": seed, "before": before, "after": after}
        rows.append(named | {"shift": shift, "lead": lead})
    return rows


def against(
    found: Found, variants: Iterable[str], measures: Sequence[str], *, base: str = BASE
) -> list[Row]:
    """Differences of variants to the base on the seeds and items that both have.

    Columns: measure, variant, minus (the base), those of `stats.Difference`, and holm, p by Holm's
    correction for all rows. A variant that was not measured has no row.
    """
    rows = []
    for measure in measures:
        for variant in variants:
            both = paired(found, variant, base, measure) if variant != base else None
            if both is not None:
                named = {"measure": measure, "variant": variant, "minus": base}
                rows.append(named | asdict(stats.paired_bootstrap(*both)))
    return _corrected(rows)


def _corrected(rows: list[Row]) -> list[Row]:
    adjusted = stats.holm([row["p"] for row in rows])
    return [row | {"holm": float(p)} for row, p in zip(rows, adjusted, strict=True)]


def over_rates(found: Found) -> list[Row]:
    """Held-out losses of the starts that were run at several learning rates: a row per run.

    Columns: variant, rate, seed, loss, whole (whether all rates of the start were run with the
    seed), and lead (the loss less the base's of the same rate and seed; nan without one).
    """
    swept = by_rate(found)
    rows: list[Row] = [
        {"variant": variant, "rate": rate, "seed": seed, "loss": float(loss), "whole": bool(whole)}
        for variant, sweep in swept.items()
        for rate, means in zip(sweep.rates, sweep.losses.mean(2), strict=True)
        for seed, loss, whole in zip(sweep.seeds, means, sweep.whole, strict=True)
        if not np.isnan(loss)
    ]
    base = {(row["rate"], row["seed"]): row["loss"] for row in rows if row["variant"] == BASE}
    return [
        row | {"lead": row["loss"] - base.get((row["rate"], row["seed"]), np.nan)} for row in rows
    ]


def optima(found: Found) -> list[Row]:
    """Where the held-out loss of each start is lowest over learning rates.

    Columns: variant, tried (the lowest of the rates that were run), rate (fitted; nan at an edge),
    low, high (its interval), loss (fitted), and seeds, with which all rates were run.
    """
    rows = []
    for variant, sweep in by_rate(found).items():
        common = sweep.common
        best = sweeps.optimum(sweep.rates, common)
        seeds = int(sweep.whole.sum())
        named = {"variant": variant, "tried": sweep.rates[int(common.mean(1).argmin())]}
        fitted = {"rate": best.setting, "low": best.low, "high": best.high, "loss": best.loss}
        rows.append(named | fitted | {"seeds": seeds})
    return rows


def leads(found: Found, *, base: str = BASE) -> list[Row]:
    """What sets each start apart from the base, at the papers' rate and at the best rates.

    Columns: variant, how (TEMPLATE or OWN), those of `stats.Difference`, holm as in `against`, and,
    at the best rates, rate and base_rate, the ones that were chosen most often.
    """
    swept = by_rate(found)
    rows: list[Row] = []
    if base not in swept:
        return rows
    template, beside = Hyperparameters().learning_rate, swept[base]
    for variant, sweep in swept.items():
        if variant == base:
            continue
        if template in sweep.rates and template in beside.rates:
            first, second = _with_both(_at(sweep, template), _at(beside, template))
            known = stats.paired_bootstrap(first, second)
            rows.append({"variant": variant, "how": TEMPLATE} | asdict(known))
        best = sweeps.difference_at_best(sweep.losses, beside.losses)
        chosen = {
            "rate": sweep.rates[int(np.argmax(best.first))],
            "base_rate": beside.rates[int(np.argmax(best.second))],
        }
        rows.append({"variant": variant, "how": OWN} | asdict(best.difference) | chosen)
    return _corrected(rows)


def _at(sweep: Sweep, rate: float) -> np.ndarray:
    """(seeds, items) losses at one rate."""
    return sweep.losses[sweep.rates.index(rate)]


def _with_both(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The seeds that both have."""
    kept = ~(np.isnan(first) | np.isnan(second)).any(1)
    return first[kept], second[kept]


def sharpness(table: Iterable[Mapping[str, Any]], found: Found, *, base: str = BASE) -> list[Row]:
    """What the curvature at step 0 foretells of each start's best rate, and what was found.

    The base's own best rate is given, and the others follow by each of LAWS.

    Arguments: table, rows of data/results/curvature.csv.
    Returns: those rows with variant, a rate for each of LAWS by its name, and tried, rate, low,
    high as of `optima`, which are nan where the start was not run at several rates.
    """
    known = {row["variant"]: row for row in optima(found)}
    rows = [dict(row) for row in table]
    for row in rows:
        row["variant"] = Run(init=row["init"], reference=row["reference"] or None).variant
    of_base = [float(row["eigenvalue"]) for row in rows if row["variant"] == base]
    absent = dict.fromkeys(("tried", "rate", "low", "high"), np.nan)
    anchor = known.get(base, absent)["rate"]
    for row in rows:
        best = known.get(row["variant"], absent)
        flatter = of_base[0] / float(row["eigenvalue"]) if of_base else np.nan
        row |= {law: anchor * flatter**power for law, power in LAWS.items()}
        row |= {name: best[name] for name in absent}
    return rows
