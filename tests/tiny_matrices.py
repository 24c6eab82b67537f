"""Singular values and matrices that are hard on algorithms, for `tiny.planted` and as they are."""

import numpy as np
from tiny import gaussian

N, M = 333, 501  # above dense_dimension, and no multiple of the block size

i = np.arange(1, N + 1)
falling = np.linspace(0.9, 0.1, N)
SPECTRA = {
    "geometric 0.8": 0.8**i,
    "geometric 0.3": 0.3**i,
    "geometric 0.99": 0.99**i,
    "power 0.3": i**-0.3,
    "power 1": 1.0 / i,
    "power 3": i**-3.0,
    "uniform": np.linspace(1, 0, N),
    "nearly constant": np.linspace(1, 1 - 1e-6, N),
    "equal at the cut": np.r_[np.linspace(2, 1.2, 15), 1, 1, falling[17:]],
    "top 20 equal": np.r_[np.ones(20), falling[20:]],
    "top 20 nearly equal": np.r_[1 + 1e-9 * np.arange(20), falling[20:]],
    "all in eights": np.repeat(np.linspace(1, 0.1, 42), 8)[:N],
    "outlier 30": np.r_[30, falling[1:]],
    "outlier 1e3": np.r_[1e3, falling[1:]],
    "outlier 1e6": np.r_[1e6, falling[1:]],
    "outlier 1e9": np.r_[1e9, falling[1:]],
    "three outliers": np.r_[1e7, 1e4, 1e2, falling[3:]],
    "step": np.r_[np.linspace(2, 1, 20), np.full(N - 20, 1e-5)],
    **{f"rank {k}": np.linspace(2, 1, k) for k in (1, 3, 4, 10, 15, 16, 17)},
}


def block_diagonal(block: np.ndarray, times: int) -> np.ndarray:
    return np.kron(np.eye(times), block)


INTEGERS = np.random.default_rng(3).integers(-3, 4, (N, 10))
STRUCTURED = {
    "zeros": np.zeros((N, M)),
    "one entry": np.pad([[7.0]], ((3, N - 4), (5, M - 6))),
    "ones": np.ones((N, M)),
    "identity": np.eye(N, M),
    "permutation with signs": np.eye(N)[np.random.default_rng(4).permutation(N)] * (-1) ** i,
    "repeated block": block_diagonal(gaussian(45, 60), 8),
    "repeated flat block": block_diagonal(np.linalg.qr(gaussian(45, 45))[0], 8),
    "exact rank 10": INTEGERS @ np.random.default_rng(5).integers(-3, 4, (10, M)),
    "two-valued diagonal": np.diag(np.r_[np.full(12, 2.0), np.ones(N - 12)]),
    "outlier row": gaussian(N, M) * np.r_[100, np.ones(N - 1)][:, None],
    "outlier column": gaussian(N, M) * np.r_[100, np.ones(M - 1)],
    "hilbert": 1 / (np.arange(N)[:, None] + np.arange(M) + 1.0),
    "zero rows": gaussian(N, M) * (i % 3 == 0)[:, None],
}
