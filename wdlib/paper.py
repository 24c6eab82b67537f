"""What the two papers report, as data. No other module holds a number of theirs.

Ye, Li, Xu, "Exploring and Reshaping the Weight Distribution in LLM", arXiv 2509.00046, and
Ye, Tian, Gao, Li, "Analysis on distribution and clustering of weight", arXiv 2509.19122.

Taken from docs/method.md, which is all that is known of their texts here.
"""

import re
from dataclasses import dataclass
from pathlib import Path

RESHAPING = "arXiv 2509.00046"
CLUSTERING = "arXiv 2509.19122"

RANKS = (16, 64, 256)
"""Numbers of singular values that both papers use; the first is their default."""

GPQA_ITEMS = 198
"""Questions of GPQA Diamond; one is worth 0.005 of the accuracies below."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of a paper.

    id: unique, stable, for tables and tests.
    paper: arXiv number.
    statement: what the paper says, in our words.
    value: the number, or the pairs of types, that it says it with; None for a statement in words.
    model: the model or family it says it of, None if of all.
    rank: number of singular values, None where there is none or any.
    """

    id: str
    paper: str
    statement: str
    value: float | tuple[tuple[str, str], ...] | None = None
    model: str | None = None
    rank: int | None = None

    def concerns(self, model: str) -> bool:
        """Whether a model, by its name, is one that the claim is about, or was tuned from it.

        "smollm2-135m-instruct" for "SmolLM2-135M", "llama-3.2-1b" for "LLaMA3". A claim about all
        models concerns every one.
        """
        names = (Path(model).name, self.model or "")
        named, known = (re.sub(r"[^a-z0-9]", "", name.lower()) for name in names)
        return named.removeprefix("meta").startswith(known)


_CLAIMS = (
    Claim(
        id="dsv-power-law",
        paper=RESHAPING,
        statement="The distances between all singular value vectors follow a power law.",
    ),
    Claim(
        id="dsv-alpha",
        paper=RESHAPING,
        statement="A Pareto fit of all distances gives this alpha; the estimator is not known.",
        value=1.78,
        model="LLaMA3.2-1B",
        rank=16,
    ),
    Claim(
        id="dsv-ranks",
        paper=RESHAPING,
        statement="The shape of the distribution stays for other numbers of singular values.",
    ),
    Claim(
        id="pairs-normal",
        paper=RESHAPING,
        statement="The distances between these types approach a normal distribution.",
        value=(("v", "gate"),),
        model="LLaMA3",
    ),
    Claim(
        id="pairs-deviating",
        paper=RESHAPING,
        statement="Between most types the distances follow a power law; these are the exceptions.",
        value=(("v", "gate"), ("gate", "up"), ("gate", "down")),
        model="LLaMA3",
    ),
    Claim(
        id="pairs-all-power-law",
        paper=RESHAPING,
        statement="The distances between any two types follow a power law: no exception.",
        value=(),
        model="SmolLM2-135M",
    ),
    Claim(
        id="generator-pareto",
        paper=RESHAPING,
        statement="Arrays that differ from a template in a Pareto number of entries have "
        "distances that follow a power law.",
    ),
    Claim(
        id="generator-gaussian",
        paper=RESHAPING,
        statement="Arrays that differ from a template in a Gaussian number of entries have "
        "distances that approach a normal distribution.",
    ),
    Claim(
        id="gpqa-pretrained",
        paper=RESHAPING,
        statement="GPQA Diamond accuracy, zero-shot, before fine-tuning.",
        value=0.2222,
        model="SmolLM2-135M",
    ),
    Claim(
        id="gpqa-reshaped",
        paper=RESHAPING,
        statement="GPQA Diamond accuracy, zero-shot, after reshaped LoRA with LLaMA3-8B as "
        "reference.",
        value=0.2879,
        model="SmolLM2-135M",
    ),
    Claim(
        id="reference-3b-like-1b",
        paper=RESHAPING,
        statement="LLaMA3-3B as reference does about as well as LLaMA3-1B.",
    ),
    Claim(
        id="reference-size",
        paper=RESHAPING,
        statement="Larger reference models help more.",
    ),
    Claim(
        id="reference-all-power-law",
        paper=RESHAPING,
        statement="A reference whose pairs of types are all power law has nothing to transfer.",
        model="SmolLM2-135M",
    ),
    Claim(
        id="reference-same-family",
        paper=RESHAPING,
        statement="A reference of the same family helps little.",
    ),
    Claim(
        id="fingerprint-families",
        paper=CLUSTERING,
        statement="Standard-Deviation Vector and Clustering Vector tell models apart and show "
        "families.",
    ),
    Claim(
        id="fingerprint-sdv-moves",
        paper=CLUSTERING,
        statement="After LoRA fine-tuning the Standard-Deviation Vector moves with the data set.",
    ),
    Claim(
        id="fingerprint-cv-stays",
        paper=CLUSTERING,
        statement="After LoRA fine-tuning the Clustering Vector stays with the pretrained model.",
    ),
)

CLAIMS: dict[str, Claim] = {claim.id: claim for claim in _CLAIMS}
"""Every claim by its id, in the order of the papers."""
