"""What the ops of statescan.torch share: their registration with torch's dispatcher, and the way that a call takes.

A call takes one of three ways. Where torch must see an operator (torch.compile, torch.export, fake tensors, dispatch modes,
functorch transforms, tensor subclasses) it goes through the dispatcher as ``torch.ops.statescan.<op>``. Elsewhere the dispatcher
would cost 9 us for nothing: a call whose gradient is wanted goes through an autograd.Function, any other straight to the library.
The library decides (torch_call.cpp), as long as no mode, transform or autocast is on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library, register_autograd, register_fake

from .. import _C

Results = dict[str, tuple[Sequence[int], torch.dtype]]
"""Shape and dtype of each result of an op."""

_library = Library("statescan", "DEF")  # the registrations last as long as this object

_DEVICES = ("CPU", "CUDA")
# What calls ask, found once. torch.export's other tracers run in a dispatch mode, so that Dynamo alone must be asked for.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_count_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_are_active = torch._C._are_functorch_transforms_active
_autocast_is_active = torch._C._is_any_autocast_enabled
_torch_call = _C.torch_call
_torch_call_by_arguments = _C.torch_call_by_arguments


def state_dtype(main: Tensor) -> torch.dtype:
    """The dtype of the states that an op makes for the activations `main`."""
    return torch.float64 if main.dtype == torch.float64 else torch.float32


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd watches a call with these arguments."""
    return _is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """operator.itemgetter, which gives a tuple of one as well."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda sequence: tuple(sequence[position] for position in positions)


def _on_exportable(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` for calls that autograd does not watch.

    Without the DLPack exchange API (torch before 2.10) a tensor exports itself, and refuses when it requires grad.
    """
    if hasattr(Tensor, "__dlpack_c_exchange_api__"):
        return kernel
    return lambda *args: kernel(*(arg.detach() if isinstance(arg, Tensor) and arg.requires_grad else arg for arg in args))


def _empty_as_laid_out(like: Tensor) -> Tensor:
    """What the kernels that answer channels first with channels first make of a [batch, seqlen, dim] tensor."""
    if like.shape[1] > 1 and like.stride(1) == 1 and like.stride(2) >= like.shape[1]:
        return like.new_empty((like.shape[0], like.shape[2], like.shape[1])).transpose(1, 2)
    return like.new_empty(like.shape)


class _Operator:
    """An op of the library as an operator of torch: its schema, its fake and what autocast does to its arguments."""

    def __init__(
        self,
        name: str,
        arguments: str,
        results: Callable[[SimpleNamespace], Results],
        asked: dict[str, str | None],
        narrow: str,
        wide: str,
        constant: str,
        laid_out: str = "",
    ) -> None:
        self.name = name
        declared = [argument.split() for argument in arguments.split(", ")]
        self.types = {argument: kind for kind, argument in declared}
        self.names = list(self.types)
        self._results = results
        self._asked = [(result, option and self.names.index(option)) for result, option in asked.items()]
        self._shown = len(asked)  # results that callers see
        self._narrow, self._wide, self._constant = (
            [self.names.index(n) for n in group.split()] for group in (narrow, wide, constant)
        )
        self._laid_out = laid_out.split()
        self._kernel = _on_exportable(getattr(_C, name))
        returned = ", ".join(["Tensor"] * len(asked))
        _library.define(f"{name}({arguments}) -> ({returned})", tags=(torch.Tag.pt2_compliant_tag,))
        self.overload = getattr(torch.ops.statescan, name).default
        register_fake(f"statescan::{name}", self._fake, lib=_library)
        for device in _DEVICES:
            _library.impl(name, self._run, device)
            _library.impl(name, self._autocast_kernel(device), f"Autocast{device}")

    def _choose_ways(self, watched: Callable[..., Any], positions: Sequence[int]) -> None:
        """`watched` takes calls with a gradient, as the arguments at `positions` and the tuple of all."""
        self._ways = (self._kernel, watched, tuple(positions), self._dispatched, self._carefully)

    def call(self, args: tuple[Any, ...]) -> Any:
        """The op on the arguments of the schema, in its order: one result alone, several as a tuple."""
        if _is_dynamo_compiling():
            return self._dispatched(*args)
        return _torch_call(self._ways, args)

    def _carefully(self, *args: Any) -> Any:
        """A call under a dispatch mode, a transform, forward-mode AD or autocast."""
        if forward_ad._current_level >= 0:
            self._refuse_tangents(args)
        if _count_dispatch_modes() or _transforms_are_active():
            return self._dispatched(*args)
        if _autocast_is_active():
            args = tuple(self._autocast(args))
        return _torch_call_by_arguments(self._ways, args)

    def _refuse_tangents(self, args: Sequence[Any]) -> None:
        """Forward-mode AD would take an op that has no rule for it as a constant, and say nothing."""
        for name, arg in zip(self.names, args):
            if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
                raise NotImplementedError(f"{self.name}: {name} has a tangent, and forward-mode derivatives are not available")

    def _dispatched(self, *args: Any) -> Any:
        """The call through the dispatcher, less the empty tensors that stand for results nobody asked for."""
        results = self.overload(*args)
        if len(self._asked) == 1:
            return results
        asked = tuple(result for result, wanted in zip(results[: self._shown], self._results_asked(args)) if wanted)
        return asked[0] if len(asked) == 1 else asked

    def _results_asked(self, args: Sequence[Any]) -> list[bool]:
        return [option is None or not (args[option] is None or args[option] is False) for _, option in self._asked]

    def _run(self, *args: Any) -> Any:
        """The kernel as the dispatcher wants it: every result there, an empty tensor for one that nobody asked for."""
        results = self._kernel(*args)
        if len(self._asked) == 1:
            return results
        made = iter(results if isinstance(results, tuple) else (results,))
        kinds = self._kinds(args)
        return tuple(
            next(made) if wanted else args[self._narrow[0]].new_empty(0, dtype=dtype)
            for wanted, (_, dtype) in zip(self._results_asked(args), kinds)
        )

    def _kinds(self, args: Sequence[Any]) -> list[tuple[Sequence[int], torch.dtype]]:
        kinds = self._results(SimpleNamespace(**dict(zip(self.names, args))))
        return [kinds[result] for result, _ in self._asked]

    def _fake(self, *args: Any) -> Any:
        main, kinds = args[self._narrow[0]], self._kinds(args)
        results = tuple(
            main.new_empty(shape if wanted else 0, dtype=dtype)
            for wanted, (shape, dtype) in zip(self._results_asked(args), kinds)
        )
        if self._laid_out:
            results = (_empty_as_laid_out(main), *results[1:])
        return results if len(results) > 1 else results[0]

    def _autocast(self, args: Sequence[Any]) -> Sequence[Any]:
        """Activations in autocast's dtype, parameters in float32, where autocast is on for the device of the call."""
        main = args[self._narrow[0]]
        device = main.device.type
        if not torch.is_autocast_enabled(device) or main.dtype == torch.float64:  # which autocast leaves alone everywhere
            return args
        constant = [position for position in self._constant if args[position].ndim == 2]
        wide = [*self._wide, *constant]
        narrow = [position for position in self._narrow if position not in constant]
        args = list(args)
        for positions, dtype in ((narrow, torch.get_autocast_dtype(device)), (wide, torch.float32)):
            for position in positions:
                if args[position] is not None and args[position].is_floating_point():
                    args[position] = args[position].to(dtype)
        return args

    def _autocast_kernel(self, device: str) -> Callable[..., Any]:
        key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

        def autocast(*args: Any) -> Any:
            args = self._autocast(args)
            with torch._C._ExcludeDispatchKeyGuard(key):
                return self.overload(*args)

        return autocast


class Op(_Operator):
    """A differentiable op.

    Args:
        name: of the op in the library; its backward is ``<name>_backward`` there.
        arguments: types and names for torch's schema, in the order in which ``_C.<name>`` takes them.
        results: given the arguments, shape and dtype of each result.
        asked: the results by name, and the argument that asks for each; None for one that is always made.
        backward: the arguments of ``_C.<name>_backward`` in its order: arguments of the op, ``d<result>``, and a result. A result
            whose ``d<result>`` is missing has no gradient, and is refused where one is wanted; if it is an argument itself, the
            last of all, it is made for the backward alone, and callers do not see it.
        gradients: the arguments that its results differentiate, in its order.
        like: of a gradient whose argument the backward does not take, an argument of the same shape and dtype that it takes.
        narrow, wide: what autocast turns into its dtype, and what into float32; the first of `narrow` decides the device.
        constant: of `narrow`, what is a parameter, and wide, when it has two axes.
        laid_out: arguments whose gradients have their layout; the first result has that of the first of them.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        *,
        results: Callable[[SimpleNamespace], Results],
        asked: dict[str, str | None],
        backward: str,
        gradients: str,
        like: dict[str, str] | None = None,
        narrow: str,
        wide: str = "",
        constant: str = "",
        laid_out: str = "",
    ) -> None:
        super().__init__(name, arguments, results, asked, narrow, wide, constant, laid_out)
        self._plan_backward(backward.split(), gradients.split(), like or {})
        self._define_backward()
        register_autograd(f"statescan::{name}", self._backward_dispatched, setup_context=self._setup_context, lib=_library)
        self._choose_ways(self._function(), self._differentiated)

    # ---- backward ------------------------------------------------------------------------------------------------------
    def _plan_backward(self, arguments: list[str], gradients: list[str], like: dict[str, str]) -> None:
        """Decides what is saved, and from where each argument of the backward comes."""
        self._cotangents = [f"d{result}" for result, _ in self._asked]
        names = [result for result, _ in self._asked]
        self._kept = next((position for position, result in enumerate(names) if result in arguments), None)
        if self._kept is not None and self._cotangents[self._kept] not in arguments:
            self._shown = self._kept
        self._without_gradient = [
            (result, option) for result, option in self._asked[: self._shown] if f"d{result}" not in arguments
        ]
        saved = [n for n in arguments if self.types.get(n, "").startswith("Tensor")]
        options = [n for n in arguments if n in self.types and n not in saved]
        self._saved_at, self._options_at = (tuple(self.names.index(n) for n in some) for some in (saved, options))
        self._saved, self._options = _picker(self._saved_at), _picker(self._options_at)
        sources = [*saved, *(names[p] for p in (self._kept,) if p is not None), *options, *self._cotangents]
        self._assembled = _picker([sources.index(n) for n in arguments])
        self._wanted: dict[tuple[bool, ...], int] = {}  # which gradients are needed -> the bits that ask for them
        self._gradients = gradients
        self._differentiated = [self.names.index(n) for n in gradients]
        self._like = [arguments.index(like.get(n, n)) for n in gradients]
        self._main = arguments.index(like.get(gradients[0], gradients[0]))
        kinds = {**self.types, **{n: "Tensor?" for n in (*names, *self._cotangents)}}
        kinds[self._cotangents[0]] = kinds[names[0]] = "Tensor"
        self._backward_arguments = ", ".join(f"{kinds[n]} {n}" for n in arguments)

    def reads_kept(self, args: Sequence[Any]) -> bool:
        """Whether the backward of a call with these arguments would read what the forward can keep for it. While a call is traced
        nobody knows the kernel, and it is taken to."""
        if _is_compiling() or _count_dispatch_modes() or _transforms_are_active():
            return True
        if _autocast_is_active():
            args = self._autocast(args)
        cotangents = (args[self._narrow[0]], *[None] * (len(self._cotangents) - 1))  # shaped as the first result
        arguments = self._assembled((*self._saved(args), None, *self._options(args), *cotangents))
        try:
            with torch.no_grad():
                return self._backward_kernel(*arguments, None, True)[-1]
        except (ValueError, TypeError, NotImplementedError):  # the call itself says what is wrong with its arguments
            return True

    def _define_backward(self) -> None:
        name = f"{self.name}_backward"
        kernel = getattr(_C, name)
        self._backward_kernel = _on_exportable(kernel)
        _library.define(f"{name}({self._backward_arguments}, int wanted) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
        self._backward_overload = getattr(torch.ops.statescan, name).default

        laid_out = [position for position, n in zip(self._like, self._gradients) if n in self._laid_out]

        def run(*args: Any) -> list[Tensor]:
            made = zip(self._backward_kernel(*args[:-1], None, False, args[-1]), self._like)
            return [gradient.to(args[like].dtype) for gradient, like in made if gradient is not None]  # state_scan's is wide

        def fake(*args: Any) -> list[Tensor]:
            return [
                _empty_as_laid_out(args[position]) if position in laid_out else args[position].new_empty(args[position].shape)
                for bit, position in enumerate(self._like)
                if args[-1] >> bit & 1
            ]

        def backward(ctx: Any, *_: Any) -> None:
            raise NotImplementedError(f"{self.name}: second derivatives are not available; its gradient has no gradient")

        for device in _DEVICES:
            _library.impl(name, run, device)
        register_fake(f"statescan::{name}", fake, lib=_library)
        register_autograd(f"statescan::{name}", backward, lib=_library)

    def _refuse_without_gradient(self, args: Sequence[Any]) -> None:
        for result, option in self._without_gradient:
            if args[option] is not None and args[option] is not False:
                raise NotImplementedError(
                    f"{self.name}: {result} have no gradient; ask for {self.names[option]} under torch.no_grad(), or not at all"
                )

    def _differentiate(
        self, ctx: Any, needed: tuple[bool, ...], cotangents: Sequence[Tensor | None], dispatched: bool
    ) -> Sequence[Tensor | None]:
        """The gradients of the arguments that have one, in the order of the backward; None where none is needed. `cotangents`:
        one a result."""
        saved = ctx.saved_tensors
        # Autograd may hand over lazy conjugates and negatives, whose memory holds other values.
        cotangents = [
            c if c is None or not (c.is_neg() or c.is_conj()) else c.resolve_conj().resolve_neg() for c in cotangents
        ]
        if cotangents[0] is None:
            if all(cotangent is None for cotangent in cotangents):
                return [None] * len(needed)
            cotangents[0] = saved[0].new_zeros(ctx.result_shape)
        wanted = self._wanted.get(needed)
        if wanted is None:
            wanted = self._wanted[needed] = sum(1 << bit for bit, need in enumerate(needed) if need)
        arguments = self._assembled((*saved, *ctx.options, *cotangents))
        if not dispatched:
            return self._backward_kernel(*arguments, None, False, wanted)
        made = iter(self._backward_overload(*arguments, wanted))
        return [next(made) if need else None for need in needed]

    def _setup_context(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        if any(ctx.needs_input_grad):  # torch 2.4 calls this always
            self._refuse_without_gradient(inputs)
        results = output if isinstance(output, (tuple, list)) else (output,)
        asked = self._results_asked(inputs)
        saved = self._saved(inputs)
        if self._kept is not None:
            saved += (results[self._kept] if asked[self._kept] else None,)
        ctx.save_for_backward(*saved)
        ctx.options = self._options(inputs)
        ctx.result_shape = results[0].shape
        ctx.set_materialize_grads(False)
        without = (r for k, (r, wanted) in enumerate(zip(results, asked)) if not wanted or k >= self._shown)
        ctx.mark_non_differentiable(*without)

    def _backward_dispatched(self, ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        needed = tuple(ctx.needs_input_grad[position] for position in self._differentiated)
        gradients: list[Any] = [None] * len(self.names)
        for position, gradient in zip(self._differentiated, self._differentiate(ctx, needed, cotangents, dispatched=True)):
            gradients[position] = gradient
        return tuple(gradients)

    def _function(self) -> Callable[..., Any]:
        """`apply` of the autograd.Function that eager calls go through: on the arguments that have a gradient, and all of them."""

        may_refuse, shown, kept_at = bool(self._without_gradient), self._shown, self._kept
        keep_option = None if kept_at is None else self._asked[kept_at][1]

        def several(ctx: Any, args: Sequence[Any], results: tuple[Any, ...]) -> tuple[Any, Tensor | None]:
            """What a call of more than one result tells its backward: the results to hand on, and the one to keep."""
            if may_refuse:
                self._refuse_without_gradient(args)
            kept = None
            if kept_at is not None and (keep_option is None or args[keep_option]):
                kept = results[0 if kept_at == 0 else -1]
                if kept_at == shown:
                    results = results[:-1]
            ctx.result_shape = results[0].shape
            if len(results) == 1:
                return results[0], kept
            if len(results) < shown:
                ctx.asked = self._results_asked(args)[:shown]
            ctx.set_materialize_grads(False)
            return results, kept

        absent = (None,) * len(self._cotangents)

        def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
            if len(cotangents) < shown and len(cotangents) > 1:
                given = iter(cotangents)
                cotangents = tuple(next(given) if wanted else None for wanted in ctx.asked)
            # With create_graph the result must refuse a second derivative, and compiled autograd must see an operator.
            dispatched = _is_grad_enabled() or _is_compiling() or _count_dispatch_modes() > 0
            cotangents += absent[len(cotangents) :]
            return (*self._differentiate(ctx, ctx.needs_input_grad[:-1], cotangents, dispatched), None)

        name = "".join(part.capitalize() for part in self.name.split("_"))
        forward = _C.torch_forward((self._kernel, self._saved_at, self._options_at, several, self._kept is not None))
        function = type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})
        # Function.apply first looks for functorch transforms, which cannot be active here: 2.5 us.
        return torch._C._FunctionBase.__dict__["apply"].__get__(None, function)


class Update(_Operator):
    """A decode op, which updates its states in place and has no backward.

    Args:
        name, arguments, results, narrow, wide, constant: as for Op; what is updated is ``Tensor(a!)`` in `arguments`.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        *,
        results: Callable[[SimpleNamespace], Results],
        narrow: str,
        wide: str = "",
        constant: str = "",
    ) -> None:
        super().__init__(name, arguments, results, {"y": None}, narrow, wide, constant)
        _library.impl(name, self._below_autograd, "Autograd")
        self._choose_ways(self._refuse_gradient, ())

    def _refuse_gradient(self, args: Sequence[Any]) -> None:
        if not _is_grad_enabled():
            return
        first = next((n for n, arg in zip(self.names, args) if isinstance(arg, Tensor) and arg.requires_grad), None)
        if first is None:
            return
        raise TypeError(
            f"{self.name}: {first} requires grad, and a decode step has no backward; pass {first}.detach(), or call it under "
            "torch.no_grad()"
        )

    def _below_autograd(self, *args: Any) -> Tensor:
        self._refuse_gradient(args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)
