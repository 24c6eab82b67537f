"""The largest eigenvalue of the loss's Hessian with respect to an adapter, as it is now.

Classical theory bounds a stable step of gradient descent by 2 over it, so that a start with the
larger eigenvalue needs the smaller learning rate (arXiv 2602.04998 holds this against LoRA's
starts). All runs here use Adam, whose step has the rate's own length in every parameter. Where one
start is another with all parameters c times as large, and the same function, the eigenvalue is
smaller by c squared, and Adam's best rate larger by c alone: it goes with the inverse root.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wdlib import WdlibError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

_BASIS = 8
"""Lanczos vectors that are kept, of an adapter's size each, before the iteration restarts."""


@dataclass(frozen=True)
class Curvature:
    """The largest eigenvalue of a Hessian, in nats per squared unit of a parameter.

    products: Hessian-vector products that it took. share_b: squared part of the eigenvector that
    lies in the B of the adapter; the rest lies in A. Where B is 0, A has no curvature of its own,
    so that the eigenvalue comes from B and from what B and A share.
    """

    eigenvalue: float
    products: int
    share_b: float


def largest_eigenvalue(
    peft_model: "PeftModel",
    batch: "Mapping[str, torch.Tensor]",
    *,
    tolerance: float = 0.01,
    seed: int = 0,
) -> Curvature:
    """Of the mean loss per token on one batch, with respect to all trainable parameters.

    Lanczos iteration (ARPACK) on Hessian-vector products, each the gradient of a gradient's product
    with a vector. The largest is meant with its sign: a negative eigenvalue does not count, however
    large. Dropout is off, and the model is left as it was.

    Arguments: batch, of integer tensors (sequences, tokens): input_ids, and labels if wanted, which
    are the input_ids by default; tolerance, relative, of the eigenvalue; seed, of the first vector.
    Raises: WdlibError for a model without trainable parameters, and where the iteration does not
    converge.
    Source: arXiv 2602.04998 (docs/method.md, section 8).
    """
    import torch
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    trained = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    if not trained:
        raise WdlibError("the model has no trainable parameter: attach an adapter to it")
    product = _hessian_product(peft_model, batch, list(trained.values()))
    products = 0

    def counted(vector: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        return product(torch.from_numpy(np.ascontiguousarray(vector))).cpu().numpy()

    sizes = [p.numel() for p in trained.values()]
    size = sum(sizes)
    start = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    hessian = LinearOperator((size, size), matvec=counted, dtype=np.float32)
    try:
        values, vectors = eigsh(
            hessian, k=1, which="LA", v0=start, ncv=min(_BASIS, size), tol=tolerance
        )
    except ArpackNoConvergence as error:
        raise WdlibError(
            f"the largest eigenvalue is not found in {products} products: raise the tolerance, "
            f"which is {tolerance}"
        ) from error
    squares = np.add.reduceat(vectors[:, 0] ** 2, np.cumsum([0, *sizes[:-1]]))
    in_b = sum(s for name, s in zip(trained, squares, strict=True) if ".lora_B." in name)
    return Curvature(float(values[0]), products, float(in_b / squares.sum()))


def _hessian_product(
    model: Any, batch: "Mapping[str, torch.Tensor]", trained: "list[torch.nn.Parameter]"
) -> "Callable[[torch.Tensor], torch.Tensor]":
    """vector -> Hessian @ vector, both flat; the first gradient is computed once and kept."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    training = model.training
    model.eval()
    try:
        # The fused kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(**{"labels": batch["input_ids"], **batch}, use_cache=False).loss
            gradients = torch.autograd.grad(loss, trained, create_graph=True)
    finally:
        model.train(training)
    flat = torch.cat([gradient.flatten() for gradient in gradients])

    def product(vector: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(
            flat, trained, vector.to(flat), retain_graph=True, materialize_grads=True
        )
        return torch.cat([part.flatten() for part in found])

    return product
