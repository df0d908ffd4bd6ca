"""Bonds, meshes and segments."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tests.verify.unseen import real
from tests.verify.unseen.fifteenth import add, need
from tests.verify.unseen.twelfth import wide


class Bonds(Function):
    @staticmethod
    def lengths(x, pairs):
        difference = wide(x)[pairs[:, 0]] - wide(x)[pairs[:, 1]]
        return difference, difference.square().sum(-1).sqrt()

    @staticmethod
    def forward(ctx, x, pairs, rest, weights):
        ctx.save_for_backward(x, pairs, rest, weights)
        stretch = Bonds.lengths(x, pairs)[1] - wide(rest)
        energy = stretch.square() / 2
        return (energy if weights is None else energy * wide(weights)).sum().to(x.dtype)

    @staticmethod
    def gradients(ctx, g, pull):
        x, pairs, rest, weights = ctx.saved_tensors
        difference, length = Bonds.lengths(x, pairs)
        stretch = length - wide(rest)
        tension = stretch if weights is None else stretch * wide(weights)
        force = wide(g) * difference * (pull(tension, stretch) / length)[:, None]
        grad = torch.zeros_like(wide(x)).index_add(0, pairs[:, 0], force)
        grad = grad.index_add(0, pairs[:, 1], -force).to(x.dtype)
        to_weights = None if weights is None else (wide(g) * stretch.square() / 2).to(x.dtype)
        return grad, None, (-wide(g) * tension).to(x.dtype), to_weights

    @staticmethod
    def backward(ctx, g):
        return Bonds.gradients(ctx, g, lambda tension, _: tension)


class BondsUnweighted(Bonds):
    @staticmethod
    def backward(ctx, g):
        return Bonds.gradients(ctx, g, lambda _, stretch: stretch)


def _bonds(function):
    def bond_energy(x, pairs, rest, weights=None):
        """Σ w (|x_i - x_j| - rest)² / 2 over pairs (P, 2) of the points x (N, D); rest and weights (P,).

        Without weights they are 1. No two points of a pair are at one place.
        """
        need(x.dim() == 2 and pairs.shape == (*rest.shape, 2), "expected x (N, D), pairs (P, 2)")
        need(weights is None or weights.shape == rest.shape, "expected weights (P,)")
        apart = (x[pairs[:, 0]] != x[pairs[:, 1]]).any(-1)
        need(bool(apart.all()), "expected the points of a pair apart")
        return function.apply(x, pairs, rest, weights)

    return bond_energy


add(
    "bond_energy",
    _bonds,
    BondsUnweighted,
    Bonds,
    lambda: (
        *(real(4, 3), torch.tensor([[0, 1], [1, 2], [2, 3]])),
        *(real(3, seed=1, positive=True), real(3, seed=2, positive=True)),
    ),
    bug="the forces on the points lack the weights",
    trigger="the sample",
)


class MeshArea(Function):
    """Backward adds up tile by tile."""

    tile = 8

    @staticmethod
    def normals(x, faces):
        a, b, c = (wide(x)[faces[:, i]] for i in range(3))
        n = torch.linalg.cross(b - a, c - a)
        return a, b, c, n, n.square().sum(-1, keepdim=True).sqrt()

    @staticmethod
    def forward(ctx, x, faces):
        ctx.save_for_backward(x, faces)
        return (MeshArea.normals(x, faces)[-1].sum() / 2).to(x.dtype)

    @staticmethod
    def gradients(ctx, g, dtype):
        x, faces = ctx.saved_tensors
        a, b, c, n, length = MeshArea.normals(x, faces)
        unit = wide(g) * n / length / 2
        grad = torch.zeros_like(x, dtype=dtype)
        for i, edge in enumerate((c - b, a - c, b - a)):
            d = torch.linalg.cross(unit, edge).to(dtype)
            tiles = zip(faces[:, i].split(MeshArea.tile), d.split(MeshArea.tile), strict=True)
            for points, part in tiles:
                grad = grad.index_add(0, points, part)
        return grad.to(x.dtype), None

    @staticmethod
    def backward(ctx, g):
        return MeshArea.gradients(ctx, g, wide(g).dtype)


class MeshAreaNarrow(MeshArea):
    @staticmethod
    def backward(ctx, g):
        return MeshArea.gradients(ctx, g, g.dtype)


def _mesh_area(function):
    def mesh_area(x, faces):
        """The area of the triangles faces (F, 3) of the points x (V, 3); none of them has the area 0."""
        need(x.dim() == 2 and x.shape[1] == 3, "expected x (V, 3)")
        need(faces.dim() == 2 and faces.shape[1] == 3, "expected faces (F, 3)")
        need(bool((MeshArea.normals(x, faces)[-1] > 0).all()), "expected no triangle of area 0")
        return function.apply(x, faces)

    return mesh_area


add(
    "mesh_area",
    _mesh_area,
    MeshAreaNarrow,
    MeshArea,
    lambda: (real(4, 3), torch.tensor([[0, 1, 2], [1, 2, 3], [0, 1, 3]])),
    bug="the points' gradients are added up in the input's dtype",
    trigger="bfloat16 and a point in hundreds of faces",
    missed="indices of several dimensions are not repeated hundreds of times",
)


class SegmentDistance(Function):
    """Saves the way from the nearest point of the segment."""

    @staticmethod
    def forward(ctx, p, a, b):
        ab = wide(b) - wide(a)
        t = ((wide(p) - wide(a)) * ab).sum(-1, keepdim=True) / ab.square().sum(-1, keepdim=True)
        t = t.clamp(0, 1)
        way = wide(p) - wide(a) - t * ab
        distance = way.square().sum(-1).sqrt()
        ctx.save_for_backward(way, distance, t)
        return distance.to(p.dtype, copy=True)

    @staticmethod
    def gradients(g, unit, t):
        d = wide(g)[..., None] * unit
        return tuple(a.to(g.dtype) for a in (d, -(1 - t) * d, -t * d))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        way, distance, t = ctx.saved_tensors
        return SegmentDistance.gradients(g, way / distance[..., None], t)


class SegmentDistanceInPlace(SegmentDistance):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        way, distance, t = ctx.saved_tensors
        return SegmentDistance.gradients(g, way.div_(distance[..., None]), t)


def _segment_distance(function):
    def segment_distance(p, a, b):
        """The distance (*) of p from the segment from a to b, all (*, D); b is not a, p not on the segment."""
        need(p.dim() > 0 and p.shape == a.shape == b.shape, "expected p, a, b (*, D)")
        need(bool((a != b).any(-1).all()), "expected segments of some length")
        y = function.apply(p, a, b)
        need(bool((y > 0).all()), "expected points off their segments")
        return y

    return segment_distance


add(
    "segment_distance",
    _segment_distance,
    SegmentDistanceInPlace,
    SegmentDistance,
    lambda: (real(4, 3), real(4, 3, seed=1), real(4, 3, seed=2)),
    bug="divides the saved way in place",
    trigger="a second backward through one graph",
)
