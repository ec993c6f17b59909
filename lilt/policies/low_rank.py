"""The modules of low-rank updates: inside a weight or beside its layer, with or without learned row magnitudes."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilt.policies.attach import Child
from lilt.policies.edits import parametrizations
from lilt.policies.weights import Matrix


class LowRank(Child):
    """The factors of an update scale * B A of a weight read as a matrix (total, columns), or of some of its rows."""

    def __init__(self, matrix: Matrix, r: int, scale: float):
        super().__init__()
        self.scale = scale
        self.transposed = matrix.transposed
        self.start, self.rows = matrix.start, matrix.rows
        self.pad = (matrix.start, matrix.total - matrix.start - matrix.rows)
        self.a = nn.Parameter(torch.empty(r, matrix.columns))
        self.b = nn.Parameter(torch.zeros(matrix.rows, r))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def spread(self, b: Tensor) -> Tensor:
        """Put a factor B (rows, r) among zeros, (total, r): cheaper than to do so with the full-size product."""
        return F.pad(b, (0, 0, *self.pad)) if any(self.pad) else b

    def changed(self, matrix: Tensor) -> Tensor:
        """Return the matrix (total, columns) with the update in it."""
        return matrix + self.spread(self.b * self.scale) @ self.a

    def fold(self, weight: Tensor) -> Tensor:
        return self.changed(weight.T).T if self.transposed else self.changed(weight.flatten(1)).view_as(weight)

    def rescale(self, factor: float) -> None:
        self.b.data.mul_(factor)


class Magnitudes(LowRank):
    """W -> m * (W + scale * B A) / |W + scale * B A|, row by row; the norm gets no gradient (DoRA, section 4.3)."""

    def __init__(self, matrix: Matrix, r: int, scale: float):
        super().__init__(matrix, r, scale)
        self.host = (matrix.leaf.module, matrix.tensor)  # in a tuple a module is a reference, not a child
        self.m = nn.Parameter(self.norms(self.frozen()).clone())

    def frozen(self) -> Tensor:
        """Return the weight that is updated, as a matrix (total, columns), without the update."""
        module, tensor = self.host
        inside = parametrize.is_parametrized(module, tensor)
        weight = parametrizations(module)[tensor].original if inside else getattr(module, tensor)
        assert isinstance(weight, Tensor)
        return weight.detach().T if self.transposed else weight.detach().flatten(1)

    @torch.no_grad()
    def norms(self, matrix: Tensor) -> Tensor:
        """Return the norm of each updated row, (rows,), in fp32 or wider whatever autocast says."""
        wide = torch.promote_types(matrix.dtype, torch.float32)
        kind = "cpu" if matrix.is_meta else matrix.device.type  # budgets run on meta, which has no autocast
        with torch.autocast(kind, enabled=False):
            rows = matrix[self.start : self.start + self.rows].to(wide)
            rows = torch.addmm(rows, self.b.to(wide), self.a.to(wide), alpha=self.scale)
            norms = torch.linalg.vector_norm(rows, dim=1)
        return norms.clamp_min(torch.finfo(norms.dtype).eps)

    def gain(self, matrix: Tensor) -> Tensor:
        """Return what each updated row is multiplied with, (rows,)."""
        return self.m / self.norms(matrix)

    def both(self, gain: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gain of all rows, (total,), and the factor B with gain and scale in it, (total, r)."""
        return F.pad(gain, self.pad, value=1.0), self.spread(self.b * (gain * self.scale)[:, None])

    def changed(self, matrix: Tensor) -> Tensor:
        gain, b = self.both(self.gain(matrix))
        return matrix * gain[:, None] + b @ self.a

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        # each row is c (w + b A), and w + factor * (c (w + b A) - w) is of that form again: the line is kept exactly
        matrix = self.frozen()
        gain = self.gain(matrix)
        kept = 1 + factor * (gain - 1)
        self.b.mul_((factor * gain / kept)[:, None])
        self.m.copy_(kept * self.norms(matrix))


class InWeight(LowRank):
    """W -> W + scale * B A, for a weight that nobody's forward reads; backward forms the full dW."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight if self.off else self.fold(weight)


class DoraInWeight(Magnitudes):
    """The same with magnitudes."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight if self.off else self.fold(weight)


class Branch(LowRank):
    """y -> y + scale * x A^T B^T beside a layer that is called, the cheap form: no full-size weight gradient."""

    def __init__(self, matrix: Matrix, r: int, scale: float):
        super().__init__(matrix, r, scale)
        self.down = _Down(matrix)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h, b = self.down(x, self.a), self.spread(self.b)
        if self.down.kernel:
            return y + F.conv2d(h, (b * self.scale)[:, :, None, None])
        # product, scale and sum in one pass over y
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), b.T, alpha=self.scale).view(y.shape)


class DoraBranch(Magnitudes):
    """y -> bias + g (y - bias) + g * scale * x A^T B^T with g = m / norm; y comes with the layer's bias in it."""

    def __init__(self, matrix: Matrix, r: int, scale: float):
        super().__init__(matrix, r, scale)
        self.down = _Down(matrix)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gain, b = self.both(self.gain(self.frozen()))
        bias = self.host[0].bias
        rest = None if bias is None else (1 - gain) * bias  # type: ignore[operator]
        h = self.down(x, self.a)
        if self.down.kernel:
            changed = torch.addcmul(F.conv2d(h, b[:, :, None, None], rest), y, gain[:, None, None])
        else:
            changed = torch.addcmul(F.linear(h, b, rest), y, gain)
        return changed.to(y.dtype)  # under autocast y is bf16, and q must not differ from k


class _Down:
    """The product with A as its layer would do it: a Linear map, or a convolution with r output channels."""

    def __init__(self, matrix: Matrix):
        module = matrix.leaf.module
        self.kernel: tuple[int, ...] = ()
        if isinstance(module, nn.Conv2d):
            self.kernel = tuple(module.weight.shape[1:])
            self.conv = partial(F.conv2d, stride=module.stride, padding=module.padding, dilation=module.dilation)  # type: ignore[arg-type]

    def __call__(self, x: Tensor, a: Tensor) -> Tensor:
        return self.conv(x, a.view(-1, *self.kernel)) if self.kernel else F.linear(x, a)
