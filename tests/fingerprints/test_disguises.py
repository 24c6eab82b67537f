"""Disguises: the logits stay as they are; what each group moves, and what it leaves."""

import numpy as np
import pytest
import torch
import transformers

from wdlib import TYPES, WdlibError, checkpoints
from wdlib.fingerprints import alterations, decoder, disguises

SHAPE = {
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUNDING = 2e-5
"""Share of the largest logit: transformers' norms work in float32, whatever the weights are."""
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "gemma3_text": "Gemma3Text"}


def built(kind: str, *, tied: bool, seed: int = 0) -> torch.nn.Module:
    """A random model in float64, biases and weights of norms among what is random."""
    options = SHAPE | {"tie_word_embeddings": tied}
    if kind == "gemma3_text":
        options |= {"sliding_window": 8}
        options |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    config = getattr(transformers, f"{CLASSES[kind]}Config")(**options)
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            norm = name.endswith("norm.weight")
            drawn = torch.randn(parameter.shape, dtype=torch.float64)
            is_offset = kind.startswith("gemma")
            around = 1.0 - is_offset
            parameter.copy_(around + 0.3 * drawn if norm else 0.3 * drawn)
            if norm and "input" in name:
                parameter[3] = -float(is_offset)  # Gemma 3 has such, which multiply by zero
    return made


@pytest.fixture(scope="module", params=[*CLASSES], ids=str)
def original(request):
    return decoder.of(built(request.param, tied=request.param != "llama"))


IDS = [1, 7, 3, 44, 9, 30, 2, 2, 18, 25, 11, 49]


def logits(d: decoder.Decoder, ids: list[int] = IDS) -> np.ndarray:
    with torch.no_grad():
        return decoder.model(d)(torch.tensor([ids])).logits.numpy()


def values(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False)


def spectra(d: decoder.Decoder) -> dict[str, np.ndarray]:
    return {t: np.array([values(b.matrices[t]) for b in d.blocks]) for t in TYPES}


def moved(before: decoder.Decoder, after: decoder.Decoder) -> set[str]:
    """The types whose singular values are other ones."""
    a, b = spectra(before), spectra(after)
    return {t for t in TYPES if not (a[t].shape == b[t].shape and np.allclose(a[t], b[t]))}


UNDER_NORMS = {
    # what moves where queries and keys are normalised, and nothing else is different
    "rescale_matrices": {"v", "o", "up", "down"},
    "turn_pairs": set(),
}
MOVES = {
    "permute_neurons": set(),
    "permute_heads": set(),
    "permute_groups": set(),
    "permute_tokens": set(),
    "rescale_matrices": {"q", "k", "v", "o", "up", "down"},
    "rescale_neurons": {"up", "down"},
    "rescale_hidden": {"o", "down"},
    "fold_norms": {"q", "k", "v", "gate", "up"},
    "move_norms": {"q", "k", "v", "gate", "up"},
    "mix_values": {"v", "o"},
    "turn_pairs": {"q", "k"},
    "permute_hidden": set(),
    "rotate_hidden": {"q", "k", "v", "gate", "up"},
    "split_neurons": {"gate", "up", "down"},
    "add_layers": set(TYPES),
    "everything": set(TYPES),
}
REFUSED = {"rescale_hidden", "rotate_hidden"}


def test_every_disguise_is_tested():
    assert disguises.DISGUISES.keys() == MOVES.keys()


@pytest.mark.parametrize("name", sorted(MOVES.keys() - {"permute_tokens"}))
def test_the_function_stays_and_the_spectra_move_as_documented(original, name):
    gemma = original.has_norms_after
    if gemma and name in REFUSED:
        with pytest.raises(WdlibError, match="hidden state of a gemma3_text cannot be"):
            disguises.DISGUISES[name](original)
        return
    few = {"every": 2} if name == "add_layers" else {}
    disguised = disguises.DISGUISES[name](original, **few)
    want, found = logits(original), logits(disguised)
    np.testing.assert_allclose(found, want, rtol=0, atol=ROUNDING * np.abs(want).max())
    assert moved(original, disguised) == (UNDER_NORMS if gemma else MOVES).get(name, MOVES[name])
    pairs = list(zip(original.blocks, disguised.blocks, strict=False))
    same = all(np.array_equal(a.matrices[t], b.matrices[t]) for a, b in pairs for t in TYPES)
    assert not same


def test_tokens_under_other_numbers(original):
    disguised = disguises.permute_tokens(original)
    rows = {row.tobytes(): i for i, row in enumerate(disguised.embedding)}
    number = np.array([rows[row.tobytes()] for row in original.embedding])
    assert not np.array_equal(number, np.arange(len(number)))
    found = logits(disguised, ids=number[IDS].tolist())[..., number]
    np.testing.assert_allclose(found, logits(original), rtol=0, atol=ROUNDING)


def test_what_the_groups_leave_as_it_is(original):
    """The invariants of docs/method.md: products of matrices, and of lengths, by closed form."""
    norms_at = "q" in original.blocks[0].norms
    turned, mixed, scaled = (
        getattr(disguises, name)(original)
        for name in ("turn_pairs", "mix_values", "rescale_neurons")
    )
    for a, b, c, d in zip(*(x.blocks for x in (original, turned, mixed, scaled)), strict=True):
        size, each = original.head_size, original.heads // original.kv_heads
        for head in range(original.heads):
            q, k = np.s_[head * size : head * size + size], head // each * size
            k = np.s_[k : k + size]
            if not norms_at:
                np.testing.assert_allclose(
                    b.matrices["q"][q].T @ b.matrices["k"][k],
                    a.matrices["q"][q].T @ a.matrices["k"][k],
                    atol=1e-12,
                )
            np.testing.assert_allclose(
                c.matrices["o"][:, q] @ c.matrices["v"][k],
                a.matrices["o"][:, q] @ a.matrices["v"][k],
                atol=1e-12,
            )
        sizes = [
            np.linalg.norm(x.matrices["up"], axis=1) * np.linalg.norm(x.matrices["down"], axis=0)
            for x in (a, d)
        ]
        np.testing.assert_allclose(*sizes)


def test_strength_and_seed():
    original = decoder.of(built("llama", tied=False))
    W = original.blocks[0].matrices
    scaled = disguises.rescale_matrices(original, factor=2.0).blocks[0].matrices
    for t, factor in {"q": 2, "k": 0.5, "v": 2, "o": 0.5, "gate": 1, "up": 2, "down": 0.5}.items():
        np.testing.assert_array_equal(scaled[t], factor * W[t])
    rotated = disguises.mix_values(original, condition=1.0).blocks[0].matrices
    np.testing.assert_allclose(values(rotated["v"]), values(W["v"]))
    mixed = disguises.mix_values(original, condition=9.0).blocks[0].matrices
    solved = np.linalg.lstsq(W["v"][:16].T, mixed["v"][:16].T)[0]
    assert np.linalg.cond(solved) == pytest.approx(9)
    for f in (disguises.permute_neurons, disguises.rotate_hidden, disguises.everything):
        first, again, other = (f(original, seed=s).blocks[1].matrices["up"] for s in (3, 3, 4))
        np.testing.assert_array_equal(first, again)
        assert not np.allclose(first, other)


# Alterations --------------------------------------------------------------------------------------


def zipped(*models: decoder.Decoder) -> list[tuple[np.ndarray, ...]]:
    """The matrices of models of one shape, each with its fellows."""
    return [
        tuple(b.matrices[t] for b in blocks)
        for blocks in zip(*(m.blocks for m in models), strict=True)
        for t in TYPES
    ]


def test_noise_pruning_and_updates_are_of_the_size_that_is_said(original):
    for a, b in zipped(original, alterations.noisy(original, share=0.3)):
        assert (b - a).std() == pytest.approx(0.3 * a.std(), rel=0.2)
    for a, b in zipped(original, alterations.pruned(original, share=0.25)):
        kept = b != 0
        assert np.mean(kept) == pytest.approx(0.75, abs=0.01)
        np.testing.assert_array_equal(b[kept], a[kept])
        assert np.abs(a[~kept]).max() <= np.abs(a[kept]).min()
    for a, b in zipped(original, alterations.updated(original, size=0.1, rank=3)):
        assert np.linalg.norm(b - a) == pytest.approx(0.1 * np.linalg.norm(a))
        assert np.linalg.matrix_rank(b - a) == 3


def test_random_matrices_of_some_types(original):
    found = alterations.random(original, types=("gate", "down"))
    for t in TYPES:
        for a, b in zip(original.blocks, found.blocks, strict=True):
            assert np.array_equal(a.matrices[t], b.matrices[t]) == (t not in ("gate", "down"))
            assert b.matrices[t].std() == pytest.approx(a.matrices[t].std(), rel=0.1)


def test_requantised_is_what_comes_back_from_the_file():
    options = SHAPE | {"hidden_size": 96, "tie_word_embeddings": False}
    config = transformers.LlamaConfig(**options)
    original = decoder.of(transformers.AutoModelForCausalLM.from_config(config))
    found = alterations.requantised(original, "Q8_0")
    for p, (_, after) in zip(original.projections(), zipped(original, found), strict=True):
        np.testing.assert_array_equal(checkpoints.requantise(p, "Q8_0").matrix, after)
    narrow = decoder.of(built("llama", tied=False))
    with pytest.raises(WdlibError, match="rows of a multiple of 32"):
        alterations.requantised(narrow, "Q8_0")


def test_layers_and_neurons(original):
    def first(d: decoder.Decoder) -> list[float]:
        return [b.matrices["up"][0, 0] for b in d.blocks]

    a, b, c = first(original)
    assert first(alterations.with_layers(original, [2, 0, 0])) == [c, a, a]
    assert first(alterations.stacked(original, overlap=1 / 3)) == [a, b, b, c]
    assert first(disguises.add_layers(original, every=2)) == [a, b, b, c]
    small = alterations.with_layers(original, [1])
    assert logits(small).shape == logits(original).shape
    with pytest.raises(WdlibError, match="layers are 0 to 2"):
        alterations.with_layers(original, [3])
    cut = alterations.without_neurons(original, share=0.25)
    for x, y in zip(original.blocks, cut.blocks, strict=True):
        sizes = np.linalg.norm(x.matrices["up"], axis=1) * np.linalg.norm(
            x.matrices["down"], axis=0
        )
        kept = np.flatnonzero(sizes >= np.sort(sizes)[16])
        np.testing.assert_array_equal(y.matrices["gate"], x.matrices["gate"][kept])
        np.testing.assert_array_equal(y.matrices["down"], x.matrices["down"][:, kept])
    assert np.isfinite(logits(cut)).all()


def test_merged():
    a, b = (decoder.of(built("qwen2", tied=False, seed=s)) for s in (1, 2))
    found = alterations.merged(a, b, weight=0.25)
    for x, y, z in zipped(a, b, found):
        np.testing.assert_allclose(z, 0.75 * x + 0.25 * y)
    np.testing.assert_allclose(found.embedding, 0.75 * a.embedding + 0.25 * b.embedding)
    bias = 0.75 * a.blocks[0].biases["q"] + 0.25 * b.blocks[0].biases["q"]
    np.testing.assert_allclose(found.blocks[0].biases["q"], bias)
    with pytest.raises(WdlibError, match="have no mean"):
        alterations.merged(a, alterations.with_layers(b, [0]))
    with pytest.raises(WdlibError, match="have no mean"):
        alterations.merged(a, alterations.without_neurons(b, share=0.5))


# In and out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rotate_hidden", "add_layers", "split_neurons", "permute_hidden"])
def test_a_checkpoint_is_written_that_both_libraries_read(original, name, tmp_path):
    if original.has_norms_after and name in REFUSED:
        return
    made = disguises.DISGUISES[name](original)
    folder = decoder.write(original, tmp_path / "made")
    assert decoder.write(made, folder) == folder
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        found = loaded(torch.tensor([IDS])).logits.numpy()
    np.testing.assert_allclose(found, logits(made), rtol=0, atol=ROUNDING)
    for read, kept in zip(checkpoints.projections(folder), made.projections(), strict=True):
        assert (read.layer, read.type, read.name) == (kept.layer, kept.type, kept.name)
        np.testing.assert_array_equal(read.matrix, kept.matrix)


def test_what_cannot_be_taken_apart():
    small = {k: v for k, v in SHAPE.items() if k != "head_dim"}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, mlp_bias=True))
    with pytest.raises(WdlibError, match=r"model\.layers\.0\.mlp\.down_proj\.bias of a llama"):
        decoder.of(made)
    with pytest.raises(WdlibError, match=r"torch\.bfloat16 cannot be taken apart"):
        decoder.of(made.to(torch.bfloat16))
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**small))
    with pytest.raises(WdlibError, match="a mistral cannot be taken apart"):
        decoder.of(mistral)


def test_nothing_is_written_to(original):
    kept = [W.copy() for b in original.blocks for W in b.matrices.values()]
    for name, f in disguises.DISGUISES.items():
        if not (original.has_norms_after and name in REFUSED):
            f(original)
    for before, W in zip(
        kept, (W for b in original.blocks for W in b.matrices.values()), strict=True
    ):
        np.testing.assert_array_equal(W, before)
