"""The largest eigenvalue of an adapter's Hessian: closed forms, and the whole Hessian."""

import copy

import numpy as np
import pytest
import tiny
import torch
from tiny_lora import stock

from wdlib import WdlibError
from wdlib.lora.curvature import largest_eigenvalue

# peft 0.21 asks transformers 5 for an attribute that was renamed; `attach` keeps that to itself.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def adapted(*, zero_b: bool):
    """A small model with few enough parameters in its adapter for the whole Hessian."""
    torch.manual_seed(0)
    peft_model = stock(
        tiny.model(layers=1, initializer_range=0.3), r=1, target_modules=["q_proj", "up_proj"]
    )
    if not zero_b:
        for name, parameter in peft_model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return peft_model.double()


def whole_hessian(peft_model, batch) -> np.ndarray:
    """By torch's own way, on the loss as a function of the flat parameters."""
    trained = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in trained.values()]

    def loss(flat):
        parts = zip(trained, flat.split(sizes), strict=True)
        given = {name: part.view_as(trained[name]) for name, part in parts}
        shown = {**batch, "labels": batch["input_ids"], "use_cache": False}
        return torch.func.functional_call(peft_model, given, (), shown).loss

    flat = torch.cat([p.detach().flatten() for p in trained.values()])
    return torch.autograd.functional.hessian(loss, flat).numpy()


@pytest.mark.parametrize("zero_b", [True, False])
def test_it_is_that_of_the_whole_hessian(zero_b, batch):
    peft_model = adapted(zero_b=zero_b)
    peft_model.base_model.model.config._attn_implementation = "eager"
    hessian = whole_hessian(peft_model, batch)
    np.testing.assert_allclose(
        hessian, hessian.T, atol=1e-3
    )  # norms and softmax compute in float32
    values, vectors = np.linalg.eigh(hessian)
    trained = [(n, p.numel()) for n, p in peft_model.named_parameters() if p.requires_grad]
    of_b = np.concatenate([np.full(size, ".lora_B." in name) for name, size in trained])
    peft_model.base_model.model.config._attn_implementation = "sdpa"
    found = largest_eigenvalue(peft_model, batch, tolerance=1e-6)
    assert found.eigenvalue == pytest.approx(values[-1], rel=1e-4)
    assert found.share_b == pytest.approx((vectors[of_b, -1] ** 2).sum(), abs=1e-3)
    assert 0 < found.products < len(hessian)
    if zero_b:
        assert abs(hessian[np.ix_(~of_b, ~of_b)]).max() < 1e-12


def test_labels_say_which_tokens_count(batch):
    peft_model = adapted(zero_b=False)
    labels = batch["input_ids"].clone()
    labels[:, 5:] = -100
    short = {"input_ids": batch["input_ids"][:, :5]}
    counted = largest_eigenvalue(peft_model, {**batch, "labels": labels}, tolerance=1e-6)
    assert counted.eigenvalue == pytest.approx(
        largest_eigenvalue(peft_model, short, tolerance=1e-6).eigenvalue, rel=1e-4
    )


def test_the_model_is_left_as_it_was(batch):
    peft_model = adapted(zero_b=False).train()
    before = copy.deepcopy(peft_model.state_dict())
    first = largest_eigenvalue(peft_model, batch, seed=1)
    assert first.eigenvalue == pytest.approx(
        largest_eigenvalue(peft_model, batch, seed=2).eigenvalue, rel=0.02
    )
    assert peft_model.training
    assert all(p.grad is None for p in peft_model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in peft_model.state_dict().items())


def test_without_an_adapter_there_is_nothing_to_measure(batch):
    model = tiny.model(layers=1)
    for parameter in model.parameters():
        parameter.requires_grad = False
    with pytest.raises(WdlibError, match="no trainable parameter"):
        largest_eigenvalue(model, batch)


def test_adam_takes_one_way_at_rates_that_go_with_the_inverse_root():
    """Parameters c times as large for one function: its Hessian over c^2, Adam's rate times c."""
    curvatures = torch.tensor([1.0, 30.0], dtype=torch.float64)

    def way(c: float) -> list[float]:
        parameters = torch.nn.Parameter(c * torch.ones(2, dtype=torch.float64))
        adam = torch.optim.AdamW([parameters], lr=0.03 * c, weight_decay=0.01 / c, eps=0)
        losses = []
        for _ in range(20):
            loss = (curvatures * (parameters / c) ** 2).sum()
            losses.append(loss.item())
            adam.zero_grad()
            loss.backward()
            adam.step()
        return losses

    np.testing.assert_allclose(way(7.0), way(1.0), rtol=1e-12)
    assert way(1.0)[-1] < way(1.0)[0] / 3
