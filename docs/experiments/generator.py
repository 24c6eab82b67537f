"""How near generated distances come to those of models: the calibration table.

Run once, about half an hour on one core: `python docs/experiments/generator.py`. Every row is
written when it is done, so an interrupted run goes on where it stopped. For every pair of types
that the stored characterisations at rank RANK call power-law, and for planted normal targets, four
ways to choose the parameters:

closed form   `counts_for`, arrays as large as a LoRA matrix, redraws as wide as the template
method        searched: shape and scale of the counts, columns of the arrays
ratio, fixed  searched: shape and scale of the counts, ratio; arrays as large as a LoRA matrix
ratio         searched: all of them

The stored characterisations hold one normal pair, at rank 256; others are planted, as a class and a
scale. Normal targets are searched by `method` alone.
"""

from functools import cache

from csv_tables import read, write
from tqdm.auto import tqdm

from wdlib import characterize, generator, paths, spectra
from wdlib.generator import Calibration, Candidate, Target

MODELS = ("smollm2-135m-instruct", "gemma-3-270m", "qwen2.5-coder-0.5b-instruct")
RANK = 16
LORA = ((RANK, 576),)
SEARCHED = {
    "method": {"shapes": tuple((RANK, n) for n in generator.COLUMNS)},
    "ratio, fixed": {"shapes": LORA, "ratios": generator.RATIOS[1:]},
    "ratio": {
        "shapes": tuple((RANK, n) for n in generator.COLUMNS[2:5]),
        "ratios": generator.RATIOS[1:],
    },
}
NORMAL_PAIR = ("gemma-3-270m", 256, ("k", "down"))
PLANTED = {
    f"normal, rank {rank}, median {median:g}": Target(
        characterize.NORMAL, None, None, None, None, median, (30, 30), rank
    )
    for rank in (16, 64)
    for median in (1e-4, 1e-2)
}


def targets() -> dict[tuple[str, str], Target]:
    """(model, pair) -> target: every power-law pair at RANK, the normal pair, the planted ones."""
    found = {}
    for model in MODELS:
        values = spectra.load(model).truncate(RANK).values
        path = paths.RESULTS / "characterisation" / f"{model}-r{RANK}.json"
        for pair in characterize.load(path).pairs:
            if pair.verdict.label == characterize.POWER_LAW:
                found[model, "-".join(pair.types)] = generator.target(values, pair)
    model, rank, types = NORMAL_PAIR
    character = characterize.load(paths.RESULTS / "characterisation" / f"{model}-r{rank}.json")
    goal = generator.target(spectra.load(model).truncate(rank).values, character.pair(*types))
    found[model, f"{'-'.join(types)}, rank {rank}"] = goal
    return found | {("planted", name): goal for name, goal in PLANTED.items()}


@cache
def surveyed(label: str, choice: str, vectors: tuple[int, int | None], rank: int):
    """The survey that all targets of one size share."""
    grid = SEARCHED[choice]
    shapes = tuple((rank, max(rank, n)) for _, n in grid["shapes"])
    grid = generator.candidates(label, **(grid | {"shapes": tuple(dict.fromkeys(shapes))}))
    return generator.survey(grid, vectors, rank=rank)


def calibration(goal: Target, choice: str) -> Calibration:
    """The calibration of one target in one of the four ways."""
    if choice == "closed form":
        counts = generator.counts_for(goal.alpha, goal.xmin, LORA[0], rank=RANK)
        return generator.measure(goal, Candidate(LORA[0], counts))
    return generator.calibrate(goal, surveyed(goal.label, choice, goal.vectors, goal.rank))


def row(model: str, pair: str, choice: str, found: Calibration) -> dict[str, str]:
    """A line of the table: the target, the parameters, what they reach, what they miss."""
    goal, chosen = found.target, found.candidate
    numbers = {
        "alpha": goal.alpha,
        "alpha low": goal.low,
        "alpha high": goal.high,
        "median": goal.median,
        "ratio": chosen.ratio,
        **dict(zip(("counts 1", "counts 2"), vars(chosen.counts).values(), strict=True)),
        "class rate": found.label_rate,
        "alpha reached": found.alpha,
        "alpha rate": found.alpha_rate,
        "scale": found.scale,
        "scale low": found.scale_low,
        "scale high": found.scale_high,
        **{f"{name} missed by": value for name, value in found.misses().items()},
    }
    return {
        "model": model,
        "pair": pair,
        "label": goal.label,
        "choice": choice,
        "columns": str(chosen.shape[1]),
        "templates": str(chosen.templates),
        **{k: "" if v is None else f"{v:.4g}" for k, v in numbers.items()},
        "reached": str(found.reached),
    }


def main() -> None:
    """Fill data/results/generator_calibration.csv, row by row."""
    path = paths.RESULTS / "generator_calibration.csv"
    rows = read(path)
    done = {(r["model"], r["pair"], r["choice"]) for r in rows}
    for choice in ("closed form", *SEARCHED):
        for (model, pair), goal in tqdm(targets().items(), desc=choice):
            normal = goal.label == characterize.NORMAL
            if (model, pair, choice) in done or (normal and choice != "method"):
                continue
            rows.append(row(model, pair, choice, calibration(goal, choice)))
            write(rows, path)


if __name__ == "__main__":
    main()
