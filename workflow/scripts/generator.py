"""How near generated distances come to those of models: the calibration table.

Run once, about half an hour on one core: `python workflow/scripts/generator.py`. Finished rows are
kept, so an interrupted run goes on where it stopped; data/results/generator_calibration.csv is
written at the end. For every pair of types that the stored characterisations at rank RANK call
power-law, and for planted normal targets, four ways to choose the parameters:

closed form   `counts_for`, arrays as large as a LoRA matrix, redraws as wide as the template
method        searched: shape and scale of the counts, columns of the arrays
ratio, fixed  searched: shape and scale of the counts, ratio; arrays as large as a LoRA matrix
ratio         searched: all of them

The stored characterisations hold one normal pair, at rank 256; others are planted, as a class and a
scale. Normal targets are searched by `method` alone.
"""

from functools import cache

from wdlib import calibration, characterise, generator, paths, provenance, spectra
from wdlib.calibration import Calibration, Candidate, Target

MODELS = ("smollm2-135m-instruct", "gemma-3-270m", "qwen2.5-coder-0.5b-instruct")
RANK = 16
LORA = ((RANK, 576),)
SEARCHED = {
    "method": {"shapes": tuple((RANK, n) for n in calibration.COLUMNS)},
    "ratio, fixed": {"shapes": LORA, "ratios": calibration.RATIOS[1:]},
    "ratio": {
        "shapes": tuple((RANK, n) for n in calibration.COLUMNS[2:5]),
        "ratios": calibration.RATIOS[1:],
    },
}
NORMAL_PAIR = ("gemma-3-270m", 256, ("k", "down"))
PLANTED = {
    f"normal, rank {rank}, median {median:g}": Target(
        characterise.NORMAL, None, None, None, None, median, (30, 30), rank
    )
    for rank in (16, 64)
    for median in (1e-4, 1e-2)
}


@cache
def targets() -> dict[tuple[str, str], Target]:
    """(model, pair) -> target: every power-law pair at RANK, the normal pair, the planted ones."""
    found = {}
    for model in MODELS:
        values = spectra.load(model, rank=RANK).values
        for pair in characterise.load(characterise.stored_file(model, RANK)).pairs:
            if pair.verdict.label == characterise.POWER_LAW:
                found[model, "-".join(pair.types)] = calibration.target(values, pair)
    model, rank, types = NORMAL_PAIR
    character = characterise.load(characterise.stored_file(model, rank))
    goal = calibration.target(spectra.load(model, rank=rank).values, character.pair(*types))
    found[model, f"{'-'.join(types)}, rank {rank}"] = goal
    return found | {("planted", name): goal for name, goal in PLANTED.items()}


@cache
def surveyed(label: str, choice: str, vectors: tuple[int, int | None], rank: int):
    """The survey that all targets of one size share."""
    grid = SEARCHED[choice]
    shapes = tuple((rank, max(rank, n)) for _, n in grid["shapes"])
    grid = calibration.candidates(label, **(grid | {"shapes": tuple(dict.fromkeys(shapes))}))
    return calibration.survey(grid, vectors, rank=rank)


def calibrated(goal: Target, choice: str) -> Calibration:
    """The calibration of one target in one of the four ways."""
    if choice == "closed form":
        counts = generator.counts_for(goal.alpha, goal.xmin, LORA[0], rank=RANK)
        return calibration.measure(goal, Candidate(LORA[0], counts))
    return calibration.calibrate(goal, surveyed(goal.label, choice, goal.vectors, goal.rank))


def rows_of(model: str, pair: str, choice: str) -> list[dict[str, str]]:
    """The row of a cell: the target, the parameters, what they reach, what they miss."""
    found = calibrated(targets()[model, pair], choice)
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
    row = {
        "model": model,
        "pair": pair,
        "label": goal.label,
        "choice": choice,
        "columns": str(chosen.shape[1]),
        "templates": str(chosen.templates),
        **{k: "" if v is None else f"{v:.4g}" for k, v in numbers.items()},
        "reached": str(found.reached),
    }
    return [row]


def main() -> None:
    """Write the table."""
    used = [(model, RANK) for model in MODELS] + [NORMAL_PAIR[:2]]
    made = provenance.of(
        __file__,
        {"rank": RANK, "LoRA shape": LORA[0], "searched": SEARCHED, "normal pair": NORMAL_PAIR},
        inputs=[
            *map(spectra.stored_file, MODELS),
            *(characterise.stored_file(model, rank) for model, rank in used),
        ],
    )
    cells = [
        (model, pair, choice)
        for choice in ("closed form", *SEARCHED)
        for (model, pair), goal in targets().items()
        if choice == "method" or goal.label != characterise.NORMAL
    ]
    path = paths.RESULTS / "generator_calibration.csv"
    provenance.write_by_cell(cells, rows_of, path, made)


if __name__ == "__main__":
    main()
