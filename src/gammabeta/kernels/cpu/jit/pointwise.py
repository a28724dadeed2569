"""What happens to one value, sixteen at a time: the same in both layouts.

Forward ``z = (x - mean) * scale + bias + residual`` and ``activation(z)``. Backward, with g the gradient of
the activated value and z computed again from x, ``dz = g * activation'(z)`` and
``dx = scale * dz - constant - (x - mean) * slope``.
"""

from typing import Any, NamedTuple

from .loads import get_f32
from .simd import first_lanes, fma, inlined, select, splat


class Affine(NamedTuple):
    """What a forward pass multiplies and adds, as Vectors."""

    mean: Any
    scale: Any  # weight * invstd
    bias: Any
    leak: Any  # the learned slope below zero; read where the activation has one


class AffineBackward(NamedTuple):
    """The same, and what ``dx`` needs besides."""

    mean: Any
    scale: Any
    bias: Any
    leak: Any
    constant: Any  # scale * mean_dz
    slope: Any  # scale * invstd * mean_dz_xhat


class Run(NamedTuple):
    """A run of elements in a forward pass: where it begins in each tensor."""

    x: int
    residual: int
    out: int
    below: int  # elements from a value to the one below it, for the mean of 2x2
    stream: int  # 1: write ``out`` past the caches


class Values(NamedTuple):
    """A run of elements that are summed up: where it begins, and its mask if it has one."""

    x: int
    mask: int


class BackwardRun(NamedTuple):
    """A run of elements in a backward pass: where it begins in each tensor."""

    x: int
    residual: int
    grad: int
    dx: int
    dresidual: int  # 0 if it is not wanted
    stream: int  # 1: write ``dx`` past the caches


# --- parameters of a channel ------------------------------------------------------------------------------


@inlined
def scale_and_bias(args, c):
    """``weight * invstd`` and ``bias`` of a channel."""
    scale = get_f32(args.invstd, c)
    if args.weight != 0:
        scale *= get_f32(args.weight, c)
    return scale, (get_f32(args.bias, c) if args.bias != 0 else 0.0)


@inlined
def affine_of(args, c):
    """The parameters of a channel in every lane."""
    scale, bias = scale_and_bias(args, c)
    return Affine(splat(get_f32(args.mean, c)), splat(scale), splat(bias), splat(leak_of(args, c)))


@inlined
def leak_of(args, c):
    """The learned slope of a channel; 0 where there is none."""
    return get_f32(args.leak, c) if args.leak != 0 else 0.0


@inlined
def affine_backward_of(args, c, mean_dz, mean_dz_xhat):
    """The same for ``dx``, with the means of dz and of dz * xhat."""
    mean, scale, bias, leak = affine_of(args, c)
    factor, _ = scale_and_bias(args, c)
    slope = factor * get_f32(args.invstd, c) * mean_dz_xhat
    return AffineBackward(mean, scale, bias, leak, splat(factor * mean_dz), splat(slope))


def with_leak(activation):
    """``forward(z, affine)`` and ``backward(z, g, affine)`` of an activation, its slope learned or not."""
    forward, backward, learned = activation
    if learned:

        @inlined
        def activate(z, affine):
            return forward(z, affine.leak)

        @inlined
        def differentiate(z, g, affine):
            return backward(z, g, affine.leak)

    else:

        @inlined
        def activate(z, affine):
            return forward(z)

        @inlined
        def differentiate(z, g, affine):
            return backward(z, g)

    return activate, differentiate


# --- forward ----------------------------------------------------------------------------------------------


def centred_of(storage):
    """``x - k`` of sixteen values from ``at`` on, and of ``count``: zero beyond them."""
    load, load_some = storage.load, storage.load_some

    @inlined
    def whole(values, at, k):
        return load(values.x, at) - k

    @inlined
    def some(values, at, count, k):
        return select(first_lanes(count), load_some(values.x, at, count) - k, splat(0.0))

    return whole, some


def forward_of(storage, activation, residual):
    """``activation(z)`` of sixteen values from ``at`` on, and of ``count``."""
    load, load_some, (activate, _) = storage.load, storage.load_some, with_leak(activation)

    @inlined
    def whole(run, at, affine):
        z = fma(load(run.x, at) - affine.mean, affine.scale, affine.bias)
        if residual:
            z = z + load(run.residual, at)
        return activate(z, affine)

    @inlined
    def some(run, at, count, affine):
        z = fma(load_some(run.x, at, count) - affine.mean, affine.scale, affine.bias)
        if residual:
            z = z + load_some(run.residual, at, count)
        return activate(z, affine)

    return whole, some


# --- backward ---------------------------------------------------------------------------------------------


@inlined
def backward_run(args, here, grad):
    """The run that begins ``here`` bytes from the start of each tensor, with its gradient at ``grad``."""
    dresidual = args.dresidual + here if args.dresidual != 0 else 0
    return BackwardRun(args.x + here, args.residual + here, grad, args.dx + here, dresidual, args.stream)


def dz_of(storage, activation, residual):
    """``(x - mean, dz)`` of sixteen values from ``at`` on, and of ``count``: zero beyond them."""
    load, load_some, (_, differentiate) = storage.load, storage.load_some, with_leak(activation)

    @inlined
    def whole(run, at, g, affine):
        centred = load(run.x, at) - affine.mean
        z = fma(centred, affine.scale, affine.bias)
        if residual:
            z = z + load(run.residual, at)
        return centred, differentiate(z, g, affine)

    @inlined
    def some(run, at, count, g, affine):
        centred = select(first_lanes(count), load_some(run.x, at, count) - affine.mean, splat(0.0))
        z = fma(centred, affine.scale, affine.bias)
        if residual:
            z = z + load_some(run.residual, at, count)
        return centred, select(first_lanes(count), differentiate(z, g, affine), splat(0.0))

    return whole, some


@inlined
def dx_of(run, at, count, centred, dz, affine):
    """``dx`` of the ``count`` values from ``at`` on; ``affine`` is an ``AffineBackward``."""
    return fma(dz, affine.scale, splat(0.0) - fma(centred, affine.slope, affine.constant))
