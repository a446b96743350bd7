"""The ops under torch.autograd, for gradcheck; and torch's own gradients of a forward written in torch. Needs torch."""

import numpy as np
import statescan
import torch


def leaves(inputs):
    """float64 or complex128 tensors that require gradients, from NumPy arrays."""
    return {name: torch.from_numpy(np.array(value)).requires_grad_() for name, value in inputs.items()}


def differentiable(op, names, results, carried, **options):
    """The op as a function of the tensors called `names`, in this order; its backward is ours.

    `results`: what the op is asked to return beside y; `carried`: the gradients of it that the backward takes. The backward op gives its gradients in the order of
    statescan's signatures; `names` says which of them are wanted by their place in that order.
    """
    forward, backward = getattr(statescan, op), getattr(statescan, f"{op}_backward")

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return forward(**dict(zip(names, tensors)), **dict.fromkeys(results, True), **options)

        @staticmethod
        def backward(ctx, dy, *dfinal_states):
            given = dict(zip(names, ctx.saved_tensors)) | dict(zip(carried, dfinal_states))
            gradients = backward(**given, dy=dy, **options)
            return tuple(gradient for gradient in gradients if gradient is not None)

    return Op.apply


def gradcheck(op, inputs, order, results=(), carried=(), **options):
    """torch.autograd.gradcheck of our backward against differences of our forward. `order`: that of the gradients."""
    names = [name for name in order if name in inputs]
    tensors = tuple(leaves({name: inputs[name] for name in names}).values())
    assert torch.autograd.gradcheck(differentiable(op, names, results, carried, **options), tensors, eps=1e-6, atol=1e-7, rtol=1e-5)


def gradients(forward, inputs, cotangents, **options):
    """d(sum of Re(conj(cotangent) result)) of every input, through a forward in torch; by name, as NumPy arrays."""
    tensors = leaves(inputs)
    results = forward(**tensors, **options)
    loss = sum((torch.from_numpy(g).conj() * r).real.sum() for r, g in zip(results, cotangents, strict=True))
    loss.backward()
    return {name: np.zeros_like(inputs[name]) if t.grad is None else t.grad.resolve_conj().numpy() for name, t in tensors.items()}
