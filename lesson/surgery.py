"""Changing the parts of a finished module: PyTorch's mechanics, for lessons that replace layers."""

import contextlib

from torch import nn
from torch.nn.utils import parametrize


def linear_around(weight):
    """An `nn.Linear` around the very memory of a weight (out, in)."""
    linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    return linear


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
    """A module whose buffers move to other devices but keep their types, whatever the cast."""

    def _apply(self, function, recurse=True):
        for name, buffer in self.named_buffers():
            setattr(self, name, buffer.to(function(buffer[:0]).device))
        return self
