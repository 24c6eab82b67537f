"""What the papers report, as data: well-formed."""

from wdlib import TYPES, paper


def test_claims_of_the_papers_are_well_formed():
    assert all(key == claim.id for key, claim in paper.CLAIMS.items())
    assert len(paper.CLAIMS) == len(paper._CLAIMS)
    assert {claim.paper for claim in paper.CLAIMS.values()} == {paper.RESHAPING, paper.CLUSTERING}
    for claim in paper.CLAIMS.values():
        if isinstance(claim.value, tuple):
            assert all(p in TYPES and q in TYPES for p, q in claim.value)
    for id, right in (("gpqa-pretrained", 44), ("gpqa-reshaped", 57)):
        assert round(right / paper.GPQA_ITEMS, 4) == paper.CLAIMS[id].value
