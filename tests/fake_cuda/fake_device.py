"""A CUDA device without one: tensors on it have shapes, types and a device, but no numbers, and waits are counted.

The real code runs on it. A CPU tensor in a product on the device, `.numpy()` of what is there, or a generator of the
other kind fails as it would on a GPU. Needs the library of device.cpp (LD_PRELOAD), and to be imported before the
pipeline. What is on the CPU is as real as ever; what is copied there is zero.

Not shown: which kernels support which type, NCCL, numbers, memory and time.
"""

import concurrent.futures
import contextlib
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
NUMBERS = {
    True: True,
    False: 0.0,
}  # what is read of bools and of all else: all is well, and nothing has failed
aten = torch.ops.aten


class FakeDevice(TorchDispatchMode):
    """In its block `CUDA` is there. waits: a line for each time that the host waited for it, in order."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits = []

    def __enter__(self):
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(
            True
        )  # `torch.tensor` makes it on the CPU and copies, as everywhere
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made_there = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if not made_there and not any(isinstance(t, FakeTensor) for t in tensors):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.wait("read of a number")
            return NUMBERS[args[0].dtype == torch.bool]
        if func is aten.equal.default:
            self.wait("comparison of two tensors")
            return True
        if func in (aten._to_copy.default, aten.copy_.default):
            self._see_copy(func, args, kwargs)
        with self.fake:
            made = func(*args, **kwargs)
        return tree_map(_on_cpu, made)

    def wait(self, why):
        frame = sys._getframe()
        while frame is not None and "/pipeline/" not in frame.f_code.co_filename:
            frame = frame.f_back
        place = "?"
        if frame is not None:
            place = f"{frame.f_code.co_filename.rpartition('/pipeline/')[2]}:{frame.f_code.co_name}"
        self.waits.append(f"{why}, {place}")

    def _see_copy(self, func, args, kwargs):
        into, source = args[:2] if func is aten.copy_.default else (None, args[0])
        target = into.device if into is not None else torch.device(kwargs.get("device") or source.device)
        blocking = not (kwargs.get("non_blocking") or (into is not None and args[2:3] == (True,)))
        if (source.device.type, target.type) == ("cuda", "cpu"):
            self.wait("copy to the host")
        elif (source.device.type, target.type) == ("cpu", "cuda") and source.ndim + source.numel() > 1:
            pinned = getattr(source, "pinned", False)
            if blocking or not pinned:
                self.wait(f"{'blocking copy' if pinned else 'copy of unpinned memory'} to the device")


def _on_cpu(x):
    """A copy on the host is real."""
    if isinstance(x, FakeTensor) and x.device.type == "cpu":
        return torch.zeros(tuple(x.shape), dtype=x.dtype)
    return x


class InTurn(concurrent.futures.Executor):
    """Does at once what it is given: a mode counts for its own thread."""

    def __init__(self, *arguments, **options):
        pass

    def submit(self, function, *arguments, **options):
        future = concurrent.futures.Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future


class Stream:
    """Of CUDA: nothing ever runs on it. Also its event."""

    def __init__(self, *arguments, **options):
        pass

    def nothing(self, *arguments):
        return self

    wait_event = wait_stream = record_event = record = nothing


def _pinned(tensor, *_):
    copied = tensor.clone()
    copied.pinned = True
    return copied


def _gru_cell(inputs, hidden, before, input_bias=None, hidden_bias=None):
    if not inputs.dtype == hidden.dtype == before.dtype:
        raise RuntimeError(f"GRU of {inputs.dtype}, {hidden.dtype} and {before.dtype}")
    return torch.empty_like(before), before.new_empty(len(before), 5 * before.shape[1])


def _gru_cell_backward(gradient, workspace, has_bias):
    batch, size = gradient.shape
    gates, bias = gradient.new_empty(batch, 3 * size), gradient.new_empty(3 * size)
    return gates, gates.clone(), torch.empty_like(gradient), bias, bias.clone()


def _moved(module, function, recurse=True):
    """`Module._apply`: new parameters in place of the old ones, as those of the CPU can't become fake."""
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                moved = function(parameter)
            if moved is not parameter:
                module._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
    module._buffers.update(
        {name: function(buffer) for name, buffer in module._buffers.items() if buffer is not None}
    )
    return module


def install():
    """Puts in place what asks for a GPU before there is a tensor. Returns what must stay alive."""
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.current_stream = Stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda tensor, stream: None
    torch.Tensor.pin_memory = _pinned
    FakeTensor.tolist = lambda tensor: tensor.cpu().tolist()
    torch.nn.Module._apply = _moved
    concurrent.futures.ThreadPoolExecutor = InTurn
    save = torch.save
    torch.save = lambda saved, *a, **k: save(
        tree_map(lambda x: x.cpu() if isinstance(x, FakeTensor) else x, saved), *a, **k
    )
    import safetensors.torch as files

    save_file = files.save_file

    def save_copies(tensors, *arguments, **options):
        assert all(t.is_contiguous() for t in tensors.values())  # as it asks for itself
        return save_file({name: t.detach().cpu() for name, t in tensors.items()}, *arguments, **options)

    files.save_file = save_copies
    import pipeline.compute

    pipeline.compute.best_device = lambda: CUDA
    library = torch.library.Library("aten", "IMPL")
    library.impl("_thnn_fused_gru_cell", _gru_cell, "Meta")
    library.impl("_thnn_fused_gru_cell_backward", _gru_cell_backward, "Meta")
    return library
