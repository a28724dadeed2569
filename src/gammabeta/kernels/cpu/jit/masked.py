"""Tensors of which a mask keeps some values, and contiguous ones: a training step, forward and backward.

The mask (N, S), a byte each, is the same for all channels. What it does not keep is read, whatever it is, and
replaced: it is nothing in a sum, and 0 in the results. Contiguous tensors are worked on as in
``channels_first``, and move as much memory; the mask stays near. One part sees the whole of a channel.
"""

from typing import Any, NamedTuple

from ..arguments import Arguments
from .activations import ACTIVATIONS
from .channels_first import flat_of, no_memory, sum_group_of, train_of
from .channels_first_backward import (
    apply_plane_of,
    backward_of,
    dx_written,
    reduce_group_of,
    sums_added,
    walk_of,
    walk_pieces,
)
from .loads import get_i64, kept_lanes, kept_some
from .pointwise import affine_of, centred_of, dx_of, dz_of, forward_of
from .record import takes
from .reductions import middle_of_five
from .simd import inlined, select, splat

# --- values of a run, replaced where they are not kept -----------------------------------------------------


class MaskedRun(NamedTuple):
    """``pointwise.Run`` and ``BackwardRun``, and where the mask of the run begins: a byte an element."""

    x: Any
    residual: Any
    out: Any
    grad: Any
    dx: Any
    dresidual: Any
    stream: Any
    mask: Any


@inlined
def masked_run(args, here, grad, mask):
    """The run that begins ``here`` bytes from the start of each tensor, with its gradient at ``grad``."""
    dresidual = args.dresidual + here if args.dresidual != 0 else 0
    tensors = args.x + here, args.residual + here, args.out + here, grad, args.dx + here
    x, residual, out, grad, dx = tensors
    return MaskedRun(x, residual, out, grad, dx, dresidual, args.stream, mask)


@inlined
def _kept(run, at, count, value):
    """A vector, 0 where it is not kept."""
    if count == 16:
        return select(kept_lanes(run.mask, at), value, splat(0.0))
    return select(kept_some(run.mask, at, count), value, splat(0.0))


def _kept_of(plain):
    """What makes a whole vector, and what makes some of one, with 0 where the run is not kept."""
    plain_whole, plain_some = plain

    @inlined
    def whole(run, at, terms):
        return _kept(run, at, 16, plain_whole(run, at, terms))

    @inlined
    def some(run, at, count, terms):
        return _kept(run, at, count, plain_some(run, at, count, terms))

    return whole, some


def masked_centred_of(storage):
    """``pointwise.centred_of`` of what is kept."""
    return _kept_of(centred_of(storage))


def masked_forward_of(storage, activation, residual):
    """``pointwise.forward_of`` of what is kept."""
    return _kept_of(forward_of(storage, activation, residual))


def masked_dz_of(storage, activation, residual):
    """``pointwise.dz_of`` of what is kept."""
    plain_whole, plain_some = dz_of(storage, activation, residual)

    @inlined
    def whole(run, at, g, affine):
        centred, dz = plain_whole(run, at, g, affine)
        return _kept(run, at, 16, centred), _kept(run, at, 16, dz)

    @inlined
    def some(run, at, count, g, affine):
        centred, dz = plain_some(run, at, count, g, affine)
        return _kept(run, at, count, centred), _kept(run, at, count, dz)

    return whole, some


@inlined
def masked_dx(run, at, count, centred, dz, affine):
    """``pointwise.dx_of`` of what is kept."""
    return _kept(run, at, count, dx_of(run, at, count, centred, dz, affine))


def masked_shift_of(storage):
    """What a channel's sums are about: the middle one of five kept values."""
    get = storage.get

    @inlined
    def shift(args, c, channel_step, value_step):
        """As ``reductions.shift_of``; a place counts pixels from the first image on."""
        plane = args.height * args.width

        def value(i):
            place = get_i64(args.places, i)
            image, at = place // plane, place % plane
            return get(args.x, image * plane * args.channels + c * channel_step + at * value_step)

        return float(middle_of_five(value(0), value(1), value(2), value(3), value(4)))

    return shift


# --- contiguous tensors -----------------------------------------------------------------------------------


def _run_of(storage):
    """The run of the plane ``p``, whose gradient is in the tensor ``grad``."""
    size = storage.size

    @inlined
    def run_of(args, p, grad, scratch):
        plane = args.height * args.width
        here = p * plane * size
        return masked_run(args, here, grad + here, args.mask + p // args.channels * plane)

    return run_of


@inlined
def _count(args):
    return args.kept


@takes(Arguments)
def channels_first_masked_train(storage, activation, residual, pool):
    """Statistics and forward of one group of channels after the other."""
    run_of, flat = (
        _run_of(storage),
        flat_of(storage, residual, *masked_forward_of(storage, activation, residual)),
    )

    @inlined
    def forward_plane(args, p, c, scratch):
        flat(run_of(args, p, 0, scratch), args.height * args.width, affine_of(args, c))

    sum_group = sum_group_of(storage, masked_shift_of(storage), masked_centred_of(storage))
    return train_of(sum_group, (no_memory, forward_plane), _count)


@takes(Arguments)
def channels_first_masked_backward(storage, activation, residual, pool):
    """Reduce and apply of one group of channels after the other, the statistics differentiated.

    A residual is one that wants its gradient: the second pass takes dz from there.
    """
    run_of, add, put = _run_of(storage), sums_added(storage, residual), dx_written(storage, False, masked_dx)
    first = walk_of(storage, storage, masked_dz_of(storage, activation, residual), residual, add)
    left = dz_of(storage, ACTIVATIONS[None] if residual else activation, False)
    second = walk_of(storage, storage, left, False, put)
    reduce_group = reduce_group_of(storage, False, walk_pieces(first), run_of)
    apply_plane = apply_plane_of(walk_pieces(second), run_of)
    return backward_of(residual, (no_memory, reduce_group), apply_plane, _count)
