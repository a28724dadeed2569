"""What our layers add to PyTorch's: the epilogue, and running statistics that stay finite."""

import inspect
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from ..epilogue import NOTHING, Epilogue, Pool, epilogue_of
from ..errors import UsageError
from ..functional import learned, masked, step
from ..functional import recompute as recomputing
from ..kernels.backend import Call, Running

_TAKES_BIAS = "bias" in inspect.signature(torch.nn.BatchNorm2d.__init__).parameters
_SETTINGS = ("activation", "pool", "skip_nonfinite", "initialize", "recompute", "single")
_SINGLE = (
    "a batch with one value per channel was normalised with the running statistics, and not counted; "
    'single="error" restores PyTorch\'s error'
)
_SKIPPED = (
    "a batch with non-finite statistics was left out of the running mean and variance of a batch norm; "
    "skip_nonfinite=False restores PyTorch's behaviour"
)


class Fused(torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalization, and what follows it, as a ``torch.nn`` layer.

    A subclass is also PyTorch's class of the same name: same arguments, state dict, errors and ``repr``.
    Checkpoints load in both directions. The *biased* variance normalises, the running variance is *unbiased*,
    and ``momentum`` is the weight of the *new* value.

    Args:
        num_features: ``C``; this and all up to ``bias`` as for PyTorch's class.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; None for the cumulative average.
        affine: whether there are a weight and a bias.
        track_running_stats: whether running statistics are kept.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: whether there is a bias, if ``affine``.
        activation: what follows in the same pass: a name in the table ``functional.ACTIVATIONS``, or None.
        pool: after the activation (4D input only): 2 for the mean over 2x2 windows, ``MaxPool(kernel, stride,
            padding)`` for the greatest of each window as ``torch.nn.MaxPool2d`` has it, or None.
        skip_nonfinite: leave a batch whose statistics hold an infinity or NaN out of the running ones and
            out of ``num_batches_tracked``. It warns in eager calls on the CPU. On a GPU and in a compiled
            graph there is no warning, because the CPU would have to wait for the device.
        initialize: None: running statistics start at 0 and 1, as PyTorch's. "first_batch": the statistics of
            the first batch replace these; later batches enter with ``momentum``.
        recompute: do not keep the output for the backward pass of the next convolution or linear layer, but
            compute it again there (eager, on the CPU, where the next batch norm is one of ours). Same
            gradients to the last bit, less memory, one more pass over the tensor.
        single: what a batch with one value per channel is in training, which has no variance: "error", as for
            PyTorch, or "running": it is normalised with the running statistics, not counted, and the layer
            warns once. (Over several processes the error stays: a rank does not know the others' sizes.)

    Activation checkpointing repeats a forward pass inside a backward pass. The repetition does not enter the
    running statistics a second time.

    Raises:
        UsageError: an activation, pool, initialisation or ``single`` that does not exist.

    Ioffe and Szegedy 2015, Algorithms 1 and 2.
    """

    # Class defaults too: a layer that `convert` adopts from PyTorch has not been through `__init__`.
    activation: str | None = None
    pool: Pool = None
    skip_nonfinite: bool = True
    initialize: str | None = None
    recompute: bool = False
    single: str = "error"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        pool: Pool = None,
        skip_nonfinite: bool = True,
        initialize: str | None = None,
        recompute: bool = False,
        single: str = "error",
    ) -> None:
        extra = {"bias": bias} if _TAKES_BIAS else {}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **extra)
        if not bias:
            self.register_parameter("bias", None)
        self._set(
            activation=activation,
            pool=pool,
            skip_nonfinite=skip_nonfinite,
            initialize=initialize,
            recompute=recompute,
            single=single,
        )

    def _set(self, **settings: Any) -> None:
        """Check and keep what our layers add to PyTorch's."""
        for name, value in settings.items():
            if name not in _SETTINGS:
                raise TypeError(
                    f"{type(self).__name__}.__init__() got an unexpected keyword argument {name!r}"
                )
            setattr(self, name, value)
        epilogue_of(self.activation, self.pool)
        if self.initialize not in (None, "first_batch"):
            raise UsageError(f"initialize must be None or 'first_batch', got {self.initialize!r}")
        if self.single not in ("error", "running"):
            raise UsageError(f"single must be 'error' or 'running', got {self.single!r}")
        if self.single == "running" and not self.track_running_stats:
            raise UsageError("single='running' normalises with the running statistics: keep track of them")

    def extra_repr(self) -> str:
        """Return PyTorch's text, and after it each setting that is not the default."""
        inherited: Any = super().extra_repr
        text = str(inherited())
        for name in _SETTINGS:
            value = getattr(self, name)
            if value != getattr(Fused, name):
                text += f", {name}={value!r}"
        return text

    def _batch_statistics(self, running_mean: Tensor | None, running_var: Tensor | None) -> bool:
        """Whether to normalise with the batch's statistics rather than the running ones."""
        return self.training or (running_mean is None and running_var is None)

    def _tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """``(weight, bias, running_mean, running_var)``, past ``Module.__getattr__`` where possible."""
        if not torch.compiler.is_compiling():
            parameters, buffers = self._parameters, self._buffers
            try:
                return (
                    parameters["weight"],
                    parameters["bias"],
                    buffers["running_mean"],
                    buffers["running_var"],
                )
            except KeyError:  # a parametrisation, or other code, put an attribute in its place
                pass
        return self.weight, self.bias, self.running_mean, self.running_var

    def _running(self, mean: Tensor | None, var: Tensor | None) -> tuple[Running, bool]:
        """The running statistics that this forward pass may update, and whether it counts.

        It does not count when activation checkpointing repeats it inside a backward pass. Then the statistics
        are copies, because checkpointing compares the saved tensors with those of the first time.
        """
        if not self.training or not self.track_running_stats:
            return Running(None, None, 0.0, self.skip_nonfinite), False
        counts = torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1
        if mean is None or var is None:  # PyTorch counts all the same
            return Running(None, None, 0.0, self.skip_nonfinite), counts
        if counts:
            return Running(mean, var, self._factor(), self.skip_nonfinite), True
        return Running(mean.clone(), var.clone(), 0.0, self.skip_nonfinite), False

    def _factor(self) -> float | Tensor:
        """The weight of this batch in the running statistics."""
        if self.momentum is not None and self.initialize is None:
            return self.momentum
        seen = self.num_batches_tracked
        if seen is None:
            return 0.0 if self.momentum is None else self.momentum
        if seen.is_cpu and not torch.compiler.is_compiling() and step.traced(seen) is None:
            count = int(seen)
            if self.momentum is None:
                return 1.0 / (count + 1)
            return self.momentum if count else 1.0
        # On a device, and in a graph, the count is not read back.
        if self.momentum is None:
            return 1.0 / (seen + 1)
        return torch.where(seen == 0, 1.0, self.momentum)

    def _count(self, accepted: bool | Tensor, x: Tensor) -> None:
        """Count the batch, or warn that it was left out."""
        if isinstance(accepted, Tensor):
            if torch.compiler.is_compiling() or not accepted.is_cpu or step.traced(x) is not None:
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(accepted)
                return
            accepted = bool(accepted)
        if not accepted:
            warnings.warn(_SKIPPED, RuntimeWarning, stacklevel=2)
            return
        # Past `Module.__getattr__`, as in `_tensors`.
        seen = (
            self.num_batches_tracked
            if torch.compiler.is_compiling()
            else self._buffers["num_batches_tracked"]
        )
        if seen is not None:
            seen.add_(1)

    def _warn_of_single(self) -> None:
        if "_warned" not in self.__dict__:
            self.__dict__["_warned"] = True
            warnings.warn(_SINGLE, RuntimeWarning, stacklevel=2)

    def _normalise(self, x: Tensor, residual: Any, epilogue: Epilogue) -> Tensor:
        weight, bias, running_mean, running_var = self._tensors()
        call = Call(x, weight, bias, residual, epilogue, self.eps)
        if not self._batch_statistics(running_mean, running_var):
            return step.evaluate(call, running_mean, running_var)
        if self.single != "error" and x.numel() == x.shape[1] and running_mean is not None:
            self._warn_of_single()
            return step.evaluate(call, running_mean, running_var)
        running, counts = self._running(running_mean, running_var)
        out, accepted = step.train(call, running)
        if counts:
            self._count(accepted, x)
        return out

    def _normalise_kept(self, x: Tensor, residual: Any, epilogue: Epilogue, mask: Tensor) -> Tensor:
        """The same of what a mask keeps."""
        weight, bias, running_mean, running_var = self._tensors()
        call = Call(x, weight, bias, residual, epilogue, self.eps)
        if not self._batch_statistics(running_mean, running_var):
            return masked.evaluate(call, running_mean, running_var, mask)
        if self.single != "error" and running_mean is not None and int(mask.sum()) == 1:
            self._warn_of_single()
            return masked.evaluate(call, running_mean, running_var, mask)
        running, counts = self._running(running_mean, running_var)
        out, accepted = masked.train(call, running, mask)
        if counts and accepted is not None:
            self._count(accepted, x)
        return out

    def _run_held(self) -> None:
        """A call of a converted model that waits for what follows it comes first."""
        held = self.__dict__.get("_held")
        if held is not None and (earlier := held()) is not None:
            earlier.run()

    def with_prelu(self, input: Tensor, slope: Tensor) -> Tensor:
        """``prelu(self(input), slope)``, in one pass where the layer is a plain one and kernels take it.

        Args:
            input: as ``forward`` takes it.
            slope: ``(1,)`` or ``(C,)``, the factor of what is below zero; it gets a gradient.
        """
        weight, bias, mean, var = self._tensors()
        call = Call(input, weight, bias, None, NOTHING, self.eps)
        batch = self._batch_statistics(mean, var)
        plain = type(self)._normalise is Fused._normalise and self.activation is None and self.pool is None
        if not plain or self.recompute or not learned.takes(call, slope, batch):
            return F.prelu(self(input), slope)
        self._run_held()
        check: Any = self._check_input_dim
        check(input)
        if batch:
            running, counts = self._running(mean, var)
            out, accepted = learned.train(call, running, slope)
            if counts:
                self._count(accepted, input)
        else:
            out = learned.evaluate(call, mean, var, slope)
        recomputing.spare(out, input, None, False)
        return out

    def forward(
        self,
        input: Tensor,
        residual: Any = None,
        *,
        activation: str | None = None,
        pool: Pool = None,
        mask: Tensor | None = None,
        lengths: Any = None,
    ) -> Tensor:
        """Return ``pool(activation(bn(input) + residual))``.

        Args:
            input: ``(N, C, ...)`` as PyTorch's class of the same name takes it.
            residual: added before the activation; None for nothing.
            activation: for this call, if the layer itself has none. The rewritten ``forward`` of a converted
                model passes it, so that the layer does the same as before for other callers.
            pool: likewise.
            mask: bool ``(N, *spatial)``, True where there is a value: nothing else enters the statistics,
                gradients and running values, and all else is 0 in the output.
            lengths: the same for sequences ``(N, C, L)``: how many values come first in each.
        """
        self._run_held()
        if isinstance(input, Proxy) or isinstance(residual, Proxy):
            given = {"activation": activation, "pool": pool, "mask": mask, "lengths": lengths}
            recorded: Tensor = self._record(input, residual, given)
            return recorded
        check: Any = self._check_input_dim
        check(input)
        activation = self.activation if activation is None else activation
        pool = self.pool if pool is None else pool
        epilogue = NOTHING
        if activation is not None or pool is not None:
            epilogue = epilogue_of(activation, pool)
            step.check_call(input, pool)
        if mask is None and lengths is None:
            out = self._normalise(input, residual, epilogue)
        else:
            kept = masked.mask_of(input, mask, lengths, pool)
            out = self._normalise_kept(input, residual, epilogue, kept)
        recomputing.spare(out, input, residual, self.recompute)
        return out

    def __prepare_scriptable__(self) -> Any:
        """What ``torch.jit.script`` calls first: its language has no operators of ours."""
        raise UsageError(
            f"torch.jit.script cannot compile gammabeta's {type(self).__name__}: script "
            'gammabeta.convert(model, to="torch"), or use torch.jit.trace, torch.export or torch.compile'
        )

    def _record(self, x: Any, residual: Any, settings: dict[str, Any]) -> Any:
        """While ``torch.fx`` traces symbolically: one node, as for PyTorch's own layers."""
        tracer: Any = (x if isinstance(x, Proxy) else residual).tracer
        given = {"residual": residual, **settings}
        kwargs = {name: value for name, value in given.items() if value is not None}
        recorded: Any = tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), kwargs)
        return recorded


class FusedLazy(Fused):
    """The same with ``num_features`` taken from the first input."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        **settings: Any,
    ) -> None:
        extra = {"bias": bias} if _TAKES_BIAS else {}
        # Past Fused, whose first argument PyTorch's lazy classes do not have.
        start: Any = super(Fused, self).__init__
        start(eps, momentum, affine, track_running_stats, device, dtype, **extra)
        if not bias:
            self.register_parameter("bias", None)
        self._set(**settings)

    def initialize_parameters(self, input: Tensor, residual: Any = None, **settings: Any) -> None:
        """Take ``num_features`` from the input; what else ``forward`` was given does not matter."""
        super().initialize_parameters(input)  # type: ignore[misc]
