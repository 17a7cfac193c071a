"""A second device without a GPU: tensors that are said to lie on "elsewhere", computed on the CPU.

Within `Elsewhere()` whatever is created on that device or moved to it meets the rules of a real one: an operation on
tensors of both devices raises (but copies, indices and a single number that is read), as do `numpy()` and a generator
of the CPU. It shows that a program puts everything where it belongs; memory, kernels, their rounding and autocast it
does not show, and shapes changed in place it does not know. Importing this registers the device with torch for good,
so that tests do it in a process of their own.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_aten = torch.ops.aten
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_COPIES = {_aten.copy_, _aten._to_copy}


class _Backend:
    """torch.elsewhere. Whatever is drawn there comes from the CPU's generator, so that both devices draw alike."""

    def is_available(self):
        return True

    is_initialized = is_available

    def _is_in_bad_fork(self):
        return False

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def get_amp_supported_dtype(self):  # asked for by autocast(enabled=False) too
        return []

    def manual_seed_all(self, seed):
        """Nothing to do."""

    def get_rng_state(self, device):
        return torch.get_rng_state()

    def set_rng_state(self, state, device):
        torch.set_rng_state(state)


_setup_privateuseone_for_python_backend("elsewhere", _Backend())


class There(torch.Tensor):
    """A tensor said to lie elsewhere.

    Args:
        here: its values.
    """

    @staticmethod
    def __new__(cls, here: torch.Tensor):
        strides, offset = here.stride(), here.storage_offset()
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=strides, storage_offset=offset, dtype=here.dtype, device="elsewhere:0"
        )

    def __init__(self, here: torch.Tensor):
        self.here = here

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        self.here.data = value.here.data

    def __repr__(self):
        return f"There({self.here!r})"

    def tolist(self):
        return self.here.tolist()

    def numpy(self, *args, **options):
        raise TypeError("can't convert a tensor from elsewhere to numpy; use Tensor.cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), options=None):
        return _computed(operation, args, options or {})


class Elsewhere(TorchDispatchMode):
    """Within it, tensors asked for on "elsewhere" can be had."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(data, device=...) is built here and then moved
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), options=None):
        return _computed(operation, args, options or {})


def _computed(operation, args, options):
    """The result of an operation, on the device where a real one would have it.

    Raises:
        RuntimeError: tensors, or a generator, of the other device.
    """
    flat, form = tree_flatten((args, options))
    there = [each for each in flat if isinstance(each, There)]
    here = [each for each in flat if isinstance(each, torch.Tensor) and not isinstance(each, There)]
    asked = options.get("device")
    if asked is not None:
        lands_there = torch.device(asked).type == "elsewhere"
    elif operation.overloadpacket in _COPIES:
        lands_there = isinstance(args[0], There)
    else:
        lands_there = bool(there)
        _check_devices(operation, args, there, here)
    if lands_there and options.get("generator") is not None:
        raise RuntimeError(f"{operation}: expected a generator from elsewhere, got one of the CPU")
    args, options = tree_unflatten([each.here if isinstance(each, There) else each for each in flat], form)
    result = operation(*args, **(options if asked is None else options | {"device": torch.device("cpu")}))
    if not lands_there:
        return result
    given = {id(each.here): each for each in there}  # an operation in place gives back the very tensor it was given
    return tree_map_only(torch.Tensor, lambda each: given[id(each)] if id(each) in given else There(each), result)


def _check_devices(operation, args, there, here):
    """Raise a RuntimeError where tensors of both devices meet that CUDA would not let meet."""
    if not (there and here):
        return
    if operation.overloadpacket in _INDEXED:  # indices may lie on the CPU, what is indexed and its new values may not
        values = args[2] if len(args) > 2 else args[0]
        allowed = isinstance(args[0], There) and (isinstance(values, There) or not values.dim())
    else:  # one number of the CPU may be read, not written
        written = operation._schema.is_mutable and not isinstance(args[0], There)
        allowed = torch.Tag.pointwise in operation.tags and len(here) == 1 and not here[0].dim() and not written
    if not allowed:
        shapes = [tuple(each.shape) for each in here]
        raise RuntimeError(f"{operation}: expected all tensors elsewhere, got {shapes} on the CPU")
