"""Changing the parts of a finished module: PyTorch's mechanics, for lessons that replace layers."""

import contextlib

import torch
from torch import nn
from torch.nn.utils import parametrize

from lesson.checks import require


def linear_around(weight):
    """An `nn.Linear` around the very memory of a weight (out, in)."""
    linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    return linear


def matrices_apart(model, kind, apart_kind):
    """The model itself: each module of `kind` becomes one of its subclass `apart_kind`.

    Each of its parameters (E, out, in) is then a list of E `nn.Linear`s, its views.
    """
    for module in list(model.modules()):
        if isinstance(module, kind) and not isinstance(module, apart_kind):
            for name, matrices in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                setattr(module, name, nn.ModuleList(map(linear_around, matrices)))
            module.__class__ = apart_kind
    return model


def linears_of(module):
    """{name: `nn.Linear`} of all its parts that are one."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


@contextlib.contextmanager
def inputs_watched(watchers):
    """Within the block, each module of {module: function} hands its function the inputs it gets."""
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
    """The model's modules of these kinds: whoever reads a matrix gets what a module makes of it."""
    for module in list(model.modules()):
        if isinstance(module, kinds):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dim() > 1:  # not a bias
                    parametrize.register_parametrization(module, name, function)


def without_parametrizations(model):
    """The model itself with its original parameters in the place of parametrised ones."""
    for module in filter(parametrize.is_parametrized, list(model.modules())):
        found = dict(module.parametrizations.items())
        # remove_parametrizations would change the class, which a copy shares with its original.
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, parametrization in found.items():
            module.register_parameter(name, parametrization.original)
    return model


class TypesKept(nn.Module):
    """A module whose buffers move to other devices but keep their types, whatever the cast.

    Its parameters are moved and cast as always.
    """

    def hold(self, **tensors):
        """A buffer for each tensor; None may become one later."""
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
    """A copy of a model that is of this kind, and that has no part with a `refusal`: a text.

    A class of layers that must not be changed once more says so in this attribute.
    """
    got = type(model).__name__
    require(isinstance(model, kind), f"the model must be a {kind.__name__}, got {got}")
    for module in model.modules():
        refusal = getattr(module, "refusal", None)
        require(refusal is None, f"the model is {refusal}")
    return model.copy()
