"""Functions that change parts of a finished module, for lessons that replace layers."""

import contextlib

import torch
from torch import nn
from torch.nn.utils import parametrize

from lesson.checks import require


def linear_around(weight):
    """An `nn.Linear` that shares the memory of a weight (out, in)."""
    linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
    return linear


def matrices_apart(model, kind, apart_kind):
    """Turns each module of `kind` into its subclass `apart_kind`; returns the model itself.

    Each parameter (E, out, in) becomes a list of E `nn.Linear`s, which share its memory.
    """
    for module in list(model.modules()):
        if isinstance(module, kind) and not isinstance(module, apart_kind):
            for name, matrices in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                setattr(module, name, nn.ModuleList(map(linear_around, matrices)))
            module.__class__ = apart_kind
    return model


def linears_of(module):
    """{name: layer} of all `nn.Linear` layers in a module."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


@contextlib.contextmanager
def inputs_watched(watchers):
    """Within the block, each of {module: function} passes the module's input to the function."""
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, watch=watch: watch(inputs[0]))
        for module, watch in watchers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def read_matrices_through(function, model, kinds):
    """Lets `function`, a module, change every matrix that is read from modules of these kinds."""
    for module in list(model.modules()):
        if isinstance(module, kinds):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dim() > 1:  # not a bias
                    parametrize.register_parametrization(module, name, function)


def without_parametrizations(model):
    """Puts the original parameters back in place of parametrised ones; returns the model itself."""
    for module in filter(parametrize.is_parametrized, list(model.modules())):
        found = dict(module.parametrizations.items())
        # remove_parametrizations would change the class, which a copy shares with its original.
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, parametrization in found.items():
            module.register_parameter(name, parametrization.original)
    return model


class TypesKept(nn.Module):
    """A module whose buffers move to other devices but keep their types under every cast.

    Its parameters are moved and cast as usual.
    """

    def hold(self, **tensors):
        """Registers a buffer for each tensor; None leaves room for a later tensor."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def _apply(self, function, recurse=True):
        buffers, self._buffers = self._buffers, {}
        try:
            super()._apply(function, recurse)  # parameters alone
        finally:
            self._buffers = buffers
        for name, buffer in self.named_buffers(recurse=False):
            device = function(buffer[:0]).device
            empty = buffer.is_meta and device.type != "meta"  # `to_empty`: there is nothing to copy
            buffers[name] = torch.empty_like(buffer, device=device) if empty else buffer.to(device)
        return self


def changeable_copy(model, kind):
    """Copies a model. ValueError if it is not of this kind, or if a part of it has a `refusal`.

    A class of layers that must not be changed again says why in this attribute, a text.
    """
    got = type(model).__name__
    require(isinstance(model, kind), f"the model must be a {kind.__name__}, got {got}")
    for module in model.modules():
        refusal = getattr(module, "refusal", None)
        require(refusal is None, f"the model is {refusal}")
    return model.copy()
