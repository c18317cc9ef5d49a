"""Design: training rows turned into the coordinates in which logistic regression is quick to solve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

ROWS = 4096  # Of one block: 20 MB of a wide matrix, near the processor, and 16 MB of logits for 1,000 classes.
WIDEST = 4096  # Beyond it, eigenvectors cost more than they save.
LEAST_SHARE = 1e-10  # Variance, as a share of the largest, below which a direction is rounding.


@dataclass(frozen=True, eq=False)
class Design:
    """Centred rows in the basis of their principal directions.

    In that basis the curvature of the loss is nearly diagonal, so a solver can scale it away. Where there are fewer
    rows than dimensions the basis has only as many directions as there are rows: a penalty keeps the weights in their
    span, so nothing is lost.

    Parameters
    ----------
    rows : tensor of float32 of shape (n, r)
        ``((x - mean) / scale) @ directions``.
    mean, variance, scale : arrays of float64 of shape (d,)
        Of the embeddings; `scale` is 1 where they are not standardised.
    directions : tensor of float32 of shape (d, r), optional
        Orthonormal columns; None stands for the identity.
    spectrum : tensor of float32 of shape (r,)
        Variance of the rows along each direction.
    """

    rows: torch.Tensor
    mean: Array
    variance: Array
    scale: Array
    directions: torch.Tensor | None
    spectrum: torch.Tensor

    @classmethod
    def of(
        cls,
        x: Array,
        chosen: npt.NDArray[np.int64],
        *,
        standardise: bool,
        device: str,
        directions: torch.Tensor | None = None,
    ) -> Design:
        """Return the design of some rows of a matrix, which is read block by block and never copied as a whole.

        The `directions` of other rows like these, a whole basis, save the search for these rows' own.
        """
        mean, variance = moments(x, chosen)
        scale = np.ones_like(mean)
        if standardise:  # A column without spread is left alone, as scikit-learn's scaler leaves it.
            flat = variance <= len(chosen) * np.finfo(np.float64).eps * np.square(mean)
            scale = np.sqrt(np.where(flat | (variance == 0), 1, variance))
        n, d = len(chosen), x.shape[1]
        if min(n, d) > WIDEST:
            rows = _rows(x, chosen, mean, scale, None, device)
            return cls(rows, mean, variance, scale, None, _tensor(variance / np.square(scale), device))
        if n < d:
            return cls._of_few(x, chosen, mean, variance, scale, device)
        if directions is None or directions.shape != (d, d):
            gram = torch.zeros(d, d, dtype=torch.float64, device=device)
            for block in _standardised(x, chosen, mean, scale, device):
                gram += block.T @ block
            # Any basis is exact. That of float32 is as even as the solver needs, in half the time.
            directions = torch.linalg.eigh((gram / n).float()).eigenvectors.contiguous()
        rows = _rows(x, chosen, mean, scale, directions, device)
        spectrum = torch.linalg.vector_norm(rows, dim=0).square_().div_(n)
        return cls(rows, mean, variance, scale, directions, spectrum)

    @classmethod
    def _of_few(
        cls, x: Array, chosen: npt.NDArray[np.int64], mean: Array, variance: Array, scale: Array, device: str
    ) -> Design:
        """Return the design of fewer rows than dimensions, from the products of the rows with one another."""
        few = torch.cat(list(_standardised(x, chosen, mean, scale, device)))
        products = torch.zeros(len(few), len(few), dtype=torch.float64, device=device)
        for start in range(0, few.shape[1], 1024):
            part = few[:, start : start + 1024].double()
            products += part @ part.T
        values, vectors = torch.linalg.eigh(products)
        kept = values > LEAST_SHARE * values[-1].clamp_min(1e-300)
        lengths = values[kept].sqrt()
        vectors = vectors[:, kept]
        directions = (few.T @ (vectors / lengths).float()).contiguous()
        return cls((vectors * lengths).float(), mean, variance, scale, directions, (values[kept] / len(few)).float())

    @property
    def width(self) -> int:
        """Number of dimensions of the embeddings, d."""
        return len(self.mean)

    def largest(self, gradient: torch.Tensor) -> float:
        """Return the largest entry of a gradient of shape (r + 1, c), the last row the biases', in all d dimensions."""
        by_weights, by_bias = gradient[:-1], gradient[-1]
        wide = by_weights if self.directions is None else by_weights.T @ self.directions.T
        return max(float(wide.abs().max()), float(by_bias.abs().max()))

    def project(self, x: Array, chosen: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return other rows in this design's coordinates, of shape (q, r)."""
        return _rows(x, chosen, self.mean, self.scale, self.directions, str(self.rows.device))

    def expand(self, weights: torch.Tensor) -> Array:
        """Return weights of shape (r, c) as weights of the standardised embeddings, of shape (c, d)."""
        wide = weights if self.directions is None else self.directions @ weights
        expanded: Array = np.ascontiguousarray(wide.T.cpu().numpy())
        return expanded

    def contract(self, weights: Array) -> torch.Tensor:
        """Return weights of shape (c, d) in this design's coordinates, the inverse of `expand`."""
        tensor = _tensor(weights.T, str(self.rows.device))
        return tensor if self.directions is None else self.directions.T @ tensor


def moments(x: Array, chosen: npt.NDArray[np.int64]) -> tuple[Array, Array]:
    """Return mean and variance of every column over some rows, in float64, block by block."""
    origin = x[chosen[0]].astype(np.float64)  # Near the mean, so that the squares lose no digits.
    total, squares = np.zeros_like(origin), np.zeros_like(origin)
    for start in range(0, len(chosen), 1024):
        block = x[chosen[start : start + 1024]] - origin
        total += block.sum(axis=0)
        squares += np.einsum("nd,nd->d", block, block)
    shift = total / len(chosen)
    return origin + shift, np.maximum(squares / len(chosen) - np.square(shift), 0)


def _standardised(
    x: Array, chosen: npt.NDArray[np.int64], mean: Array, scale: Array, device: str
) -> Iterator[torch.Tensor]:
    """Yield blocks of rows on the device, centred and scaled."""
    # A large mean costs no digits: it is taken away in float64, or in two parts from rows of float32.
    high = mean.astype(np.float32)
    low, shrink = (mean - high).astype(np.float32), (1 / scale).astype(np.float32)
    for start in range(0, len(chosen), ROWS // 2):
        block = x[chosen[start : start + ROWS // 2]]
        if block.dtype == np.float32:
            block -= high
            block -= low
            block *= shrink
            yield torch.from_numpy(block).to(device)
        else:
            yield _tensor((block - mean) / scale, device)


def _rows(
    x: Array, chosen: npt.NDArray[np.int64], mean: Array, scale: Array, directions: torch.Tensor | None, device: str
) -> torch.Tensor:
    width = x.shape[1] if directions is None else directions.shape[1]
    rows = torch.empty(len(chosen), width, dtype=torch.float32, device=device)
    start = 0
    for block in _standardised(x, chosen, mean, scale, device):
        part = rows[start : start + len(block)]
        if directions is None:
            part.copy_(block)
        else:
            torch.matmul(block, directions, out=part)
        start += len(block)
    return rows


def _tensor(values: Array, device: str) -> torch.Tensor:
    """Return a float32 tensor of its own memory."""
    return torch.tensor(np.asarray(values, dtype=np.float32), device=device)
