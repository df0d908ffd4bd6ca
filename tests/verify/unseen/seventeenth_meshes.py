"""Meshes, groups of points, textures, rays."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.seventeenth import add, rows
from tests.verify.unseen.sixteenth import expect
from tests.verify.unseen.sixteenth_indices import below


def corners(faces, vertices):
    expect(faces.dim() == 2 and faces.shape[1] == 3, "faces (F, 3)", tuple(faces.shape))
    below(faces, vertices)


class VertexNormals(Function):
    @staticmethod
    def sides(x, faces):
        a, b, c = (x[..., i, :] for i in faces.T)
        return b - a, c - a

    @staticmethod
    def forward(ctx, x, faces):
        ctx.save_for_backward(x, faces)
        normals = torch.linalg.cross(*VertexNormals.sides(x, faces))
        return rows(*((i, normals) for i in faces.T), size=x.shape[-2])

    @staticmethod
    def gradients(ctx, read):
        x, faces = ctx.saved_tensors
        d = sum(read(i) for i in faces.T)
        u, v = VertexNormals.sides(x, faces)
        du, dv = torch.linalg.cross(v, d.expand_as(v)), torch.linalg.cross(d.expand_as(u), u)
        i, j, k = faces.T
        return rows((i, -du - dv), (j, du), (k, dv), size=x.shape[-2]), None

    @staticmethod
    def backward(ctx, g):
        return VertexNormals.gradients(ctx, lambda i: g[..., i, :])


class VertexNormalsFlat(VertexNormals):
    @staticmethod
    def backward(ctx, g):
        return VertexNormals.gradients(ctx, lambda i: g.reshape(-1, 3)[i])


def _vertex_normals(function):
    def vertex_normals(x, faces):
        """Normals at vertices x (*, V, 3): sums of (b - a) × (c - a) over their faces (F, 3), indices of corners."""
        expect(x.dim() > 1 and x.shape[-1] == 3, "x (*, V, 3)", tuple(x.shape))
        corners(faces, x.shape[-2])
        return function.apply(x, faces)

    return vertex_normals


TETRAHEDRON = [[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]]


add(
    "vertex_normals_flat",
    _vertex_normals,
    VertexNormalsFlat,
    VertexNormals,
    lambda: (real(4, 3), torch.tensor(TETRAHEDRON)),
    bug="backward reads grad_output of all meshes as one list of rows: always the first mesh's",
    shows="batches of meshes",
)


class Interpolate(Function):
    @staticmethod
    def forward(ctx, values, faces, ids, weights):
        ctx.save_for_backward(values, faces, ids, weights)
        return (values[faces[ids]] * weights[..., None]).sum(1) * (ids >= 0)[:, None]

    @staticmethod
    def gradients(ctx, g, covered):
        values, faces, ids, weights = ctx.saved_tensors
        index = faces[ids]
        g = g * covered(ids)
        d = (weights[..., None] * g[:, None]).flatten(0, 1)
        return (
            rows((index.flatten(), d), size=len(values)),
            None,
            None,
            (values[index] * g[:, None]).sum(-1),
        )

    @staticmethod
    def backward(ctx, g):
        return Interpolate.gradients(ctx, g, lambda ids: (ids >= 0)[:, None])


class InterpolateBackground(Interpolate):
    @staticmethod
    def backward(ctx, g):
        return Interpolate.gradients(ctx, g, lambda ids: 1)


def _interpolate(function):
    def interpolate(values, faces, ids, weights):
        """Sums by weights (N, 3) of the values (V, D) at the corners of the face ids (N,) of faces (F, 3), F > 0.

        An id of -1 is background: zeros.
        """
        expect(values.dim() == 2 and len(faces), "values (V, D), F > 0", tuple(values.shape))
        corners(faces, len(values))
        expect(weights.shape == (*ids.shape, 3) and ids.dim() == 1, "(N, 3)", tuple(weights.shape))
        expect(((ids >= -1) & (ids < len(faces))).all(), "ids of faces, or -1", ids)
        return function.apply(values, faces, ids, weights)

    return interpolate


add(
    "interpolate_background",
    _interpolate,
    InterpolateBackground,
    Interpolate,
    lambda: (
        real(4, 2),
        torch.tensor(TETRAHEDRON),
        torch.tensor([0, 2, 3, 0, 1]),
        real(5, 3, seed=1, grad=False).softmax(-1).requires_grad_(),
    ),
    bug="the background's gradient goes to the last face: index -1",
    shows="background pixels",
)


class GroupPoints(Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.size = x.shape[2]
        n = torch.arange(len(x), device=x.device)[:, None, None]
        return (x.mT[n, index] * (index >= 0)[..., None]).movedim(3, 1)

    @staticmethod
    def gradients(ctx, g, present):
        (index,) = ctx.saved_tensors
        d = g * present(index)
        place = index.clamp(min=0).flatten(1)[:, None].expand(-1, g.shape[1], -1)
        return g.new_zeros(*g.shape[:2], ctx.size).scatter_add(2, place, d.flatten(2)), None

    @staticmethod
    def backward(ctx, g):
        return GroupPoints.gradients(ctx, g, lambda index: (index >= 0)[:, None])


class GroupPointsPadding(GroupPoints):
    @staticmethod
    def backward(ctx, g):
        return GroupPoints.gradients(ctx, g, lambda index: 1)


def _group_points(function):
    def group_points(x, index):
        """Features of x (N, C, M), M > 0, at index (N, K, S), to (N, C, K, S); zeros where the index is -1."""
        expect(
            x.dim() == index.dim() == 3 and len(x) == len(index) and x.shape[2],
            "x (N, C, M), index (N, K, S)",
            tuple(index.shape),
        )
        expect(((index >= -1) & (index < x.shape[2])).all(), "indices below M, or -1", index)
        return function.apply(x, index)

    return group_points


add(
    "group_points_padding",
    _group_points,
    GroupPointsPadding,
    GroupPoints,
    lambda: (real(1, 2, 4), torch.tensor([[[0, 1, 0], [2, 3, 3]]])),
    bug="the gradient of places without a point, -1, goes to point 0",
    shows="index -1",
)


class Texture(Function):
    @staticmethod
    def places(shape, uv, wrap):
        out = []
        for part, n in zip(uv.unbind(1), (shape[1], shape[0]), strict=True):
            x = part * n - 0.5
            low = x.detach().floor().long()
            pair = [i.remainder(n) if wrap else i.clamp(0, n - 1) for i in (low, low + 1)]
            out.append((x - low, pair))
        return out

    @staticmethod
    def texels(shape, uv, wrap):
        (s, columns), (t, lines) = Texture.places(shape, uv, wrap)
        index = [y * shape[1] + x for y in lines for x in columns]
        return s[:, None], t[:, None], index

    @staticmethod
    def forward(ctx, texture, uv, wrap):
        ctx.save_for_backward(texture, uv)
        ctx.wrap = wrap
        s, t, index = Texture.texels(texture.shape, uv, wrap)
        a, b, c, d = (texture.flatten(0, 1)[i] for i in index)
        return (1 - t) * (a + s * (b - a)) + t * (c + s * (d - c))

    @staticmethod
    def gradients(ctx, g, wrap):
        texture, uv = ctx.saved_tensors
        s, t, index = Texture.texels(texture.shape, uv, ctx.wrap)
        a, b, c, d = (texture.flatten(0, 1)[i] for i in index)
        of_s = (g * ((1 - t) * (b - a) + t * (d - c))).sum(1) * texture.shape[1]
        of_t = (g * (c + s * (d - c) - a - s * (b - a))).sum(1) * texture.shape[0]
        *_, index = Texture.texels(texture.shape, uv, wrap)
        shares = ((1 - t) * (1 - s), (1 - t) * s, t * (1 - s), t * s)
        pieces = [(i, g * share) for i, share in zip(index, shares, strict=True)]
        grad = rows(*pieces, size=texture[..., 0].numel())
        return grad.view(texture.shape), torch.stack((of_s, of_t), 1), None

    @staticmethod
    def backward(ctx, g):
        return Texture.gradients(ctx, g, ctx.wrap)


class TextureClamp(Texture):
    @staticmethod
    def backward(ctx, g):
        return Texture.gradients(ctx, g, False)


def _texture(function):
    def texture_sample(texture, uv, wrap=False):
        """Linear reading of texture (H, W, C), not empty, at uv (N, 2), x and y, from -4 to 4; 0 and 1 are its borders.

        Beyond them are the outmost texels, or, if wrap, the texture again; at a texel the slope is that above it.
        """
        expect(texture.dim() == 3 and texture.numel(), "(H, W, C)", tuple(texture.shape))
        expect(uv.dim() == 2 and uv.shape[1] == 2, "uv (N, 2)", tuple(uv.shape))
        expect((uv.abs() <= 4).all(), "uv from -4 to 4", uv)
        return function.apply(texture, uv, wrap)

    return texture_sample


add(
    "texture_wrap",
    _texture,
    TextureClamp,
    Texture,
    lambda: (real(3, 4, 2), real(5, 2, seed=1, grad=False).sigmoid().requires_grad_()),
    bug="backward adds to the outmost texels, as without wrap",
    shows="wrap=True, at the borders",
)
