"""What the papers report, as data: well-formed."""

import pytest

from wdlib import TYPES, paper


@pytest.mark.parametrize(
    ("claim", "model", "concerned"),
    [
        ("pairs-all-power-law", "smollm2-135m-instruct", True),
        ("pairs-all-power-law", "HuggingFaceTB/SmolLM2-135M", True),
        ("pairs-all-power-law", "smollm2-1.7b", False),
        ("pairs-all-power-law", "gemma-3-270m", False),
        ("dsv-alpha", "llama-3.2-1b", True),
        ("dsv-alpha", "llama-3.2-3b", False),
        ("pairs-deviating", "meta-llama/Meta-Llama-3-8B", True),
        ("pairs-deviating", "smollm2-135m", False),
        ("dsv-power-law", "gemma-3-270m", True),
    ],
)
def test_a_claim_concerns_its_model_and_what_was_tuned_from_it(claim, model, concerned):
    assert paper.CLAIMS[claim].concerns(model) is concerned


def test_claims_of_the_papers_are_well_formed():
    assert all(key == claim.id for key, claim in paper.CLAIMS.items())
    assert len(paper.CLAIMS) == len(paper._CLAIMS)
    assert {claim.paper for claim in paper.CLAIMS.values()} == {paper.RESHAPING, paper.CLUSTERING}
    for claim in paper.CLAIMS.values():
        if isinstance(claim.value, tuple):
            assert all(p in TYPES and q in TYPES for p, q in claim.value)
    for id, right in (("gpqa-pretrained", 44), ("gpqa-reshaped", 57)):
        assert round(right / paper.GPQA_ITEMS, 4) == paper.CLAIMS[id].value
