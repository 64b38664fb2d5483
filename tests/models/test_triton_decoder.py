"""The MLP decoder's kernels against plain operations: on a GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from places import ROOT
from tiny_models import decoded

from pipeline.models import decoders
from pipeline.models.decoders import MLPDecoder, untiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = "Triton comes with PyTorch for GPUs; before 3.7 its interpreter doesn't run with NumPy 2.4"


@pytest.fixture
def kernels(monkeypatch):
    """Decoders take them on a CPU too, in pieces so small that tiny models have several."""
    pytest.importorskip("triton", "3.7", reason=REASON)
    from pipeline.models import triton_decoder

    for name, size in {"PROGRAMS": 5, "POSITIONS": 2, "UNITS": 16, "SPLITS": 2}.items():
        monkeypatch.setattr(triton_decoder, name, size)
    monkeypatch.setattr(decoders, "tiled_decoder", triton_decoder)


def make(M=2, N=2, P=3, hidden_sizes=(20, 33, 12), dtype=torch.float32):
    """A decoder, slots and a target, of sizes that no piece divides."""
    torch.manual_seed(0)
    decoder = MLPDecoder(P, slot_size=6, feature_size=7, hidden_sizes=hidden_sizes).to(DEVICE, dtype)
    slots = torch.randn(M, N, 6, device=DEVICE, dtype=dtype, requires_grad=True)
    return decoder, slots, torch.randn(M, P, 7, device=DEVICE, dtype=dtype)


def assert_same(results, others, rtol=1e-5):
    """Of each tensor, to a part of its largest number."""
    for one, other in zip(results, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=rtol * max(other.abs().max().item(), 1e-3))


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"M": 3, "N": 1, "P": 7},
        {"M": 1, "N": 24, "P": 2, "hidden_sizes": (16,)},
        {"M": 1, "N": 2, "P": 2, "hidden_sizes": (8, 2048)},
        {"dtype": torch.float64},
    ],
    ids=str,
)
@pytest.mark.usefixtures("kernels")
def test_values_and_all_gradients(sizes):
    decoder, slots, target = make(**sizes)
    found = decoded(decoder, slots, target)
    with torch.no_grad():
        assert_same(decoder(slots), found[:2], rtol=0)
    with untiled(decoder):
        assert_same(found, decoded(decoder, slots, target))
    decoder.fast = False
    exact = sizes.get("dtype") == torch.float64
    assert_same(found, decoded(decoder, slots, target), rtol=1e-12 if exact else 1e-5)


@pytest.mark.usefixtures("kernels")
def test_autocast():
    """Results and gradients as near to float32's as those of plain operations; masks in float32."""
    decoder, slots, target = make()
    exact = decoded(decoder, slots, target)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = decoded(decoder, slots, target)
        with untiled(decoder):
            plain = decoded(decoder, slots, target)
    assert (found[0].dtype, found[1].dtype) == (torch.bfloat16, torch.float32)
    for one, two, three in zip(exact, found, plain, strict=True):
        assert (one - two).norm() <= 1.5 * (one - three).norm() + 1e-3 * one.norm()


@pytest.mark.usefixtures("kernels")
def test_frozen_weights_strided_slots_and_a_second_backward_pass():
    """As reconstruction KD has the first."""
    decoder, slots, target = make()
    decoder.requires_grad_(False)
    strided = slots.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    reconstruction, _ = decoder(strided)
    loss = (reconstruction - target).square().sum()
    first, second = (torch.autograd.grad(loss, strided, retain_graph=True)[0] for _ in range(2))
    with untiled(decoder):
        plain = torch.autograd.grad((decoder(slots)[0] - target).square().sum(), slots)[0]
    assert_same([first, second], [plain, plain])


@pytest.mark.usefixtures("kernels")
def test_no_second_derivative_rather_than_a_wrong_one():
    decoder, slots, _ = make()
    (gradient,) = torch.autograd.grad(decoder(slots)[0].square().sum(), slots, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.usefixtures("kernels")
def test_logits_of_any_size_and_numbers_that_are_none():
    decoder, slots, _ = make(M=3)
    with torch.no_grad():
        decoder.mlp.layers[-1].weight[-1] *= 1e5
        slots[1, 1, 0] = float("nan")
        reconstruction, masks = decoder(slots)
        with untiled(decoder):
            plain = decoder(slots)
    assert masks[[0, 2]].isfinite().all()
    assert masks[1].isnan().all()
    assert reconstruction[1].isnan().all()
    assert_same((reconstruction[[0, 2]], masks[[0, 2]]), [part[[0, 2]] for part in plain], rtol=1e-3)


COMPILE = """
import inspect, sys, torch, triton
from triton.backends.compiler import GPUTarget
from pipeline.models import triton_decoder
from pipeline.models.decoders import MLPDecoder

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}

def compiled(kernel, grid, *arguments, exact, **sizes):
    names = kernel.arg_names
    types = [TYPES[a.dtype] if isinstance(a, torch.Tensor) else "i32" for a in arguments]
    warps = sizes.pop("num_warps", 4)
    constants = {"EXACT": triton_decoder.tl.float32, **sizes}
    signature = dict(zip(names, types)) | dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(kernel, {name: signature[name] for name in names}, constants)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert result.asm["cubin"]
    print(kernel.fn.__name__)

triton_decoder._launch = compiled
decoder = MLPDecoder(5, 6, 7, (1024, 1024, 1024))
slots = torch.randn(1, 3, 6, requires_grad=True)
with torch.autocast("cpu", dtype=torch.bfloat16):
    outputs, masks = triton_decoder.decode(slots, decoder.pos_emb[0, 0], decoder._linears)
(outputs.sum() + masks.sum()).backward()
"""


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    """Which needs none, and shows what the interpreter lets pass."""
    pytest.importorskip("triton", reason=REASON)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    source = (ROOT / "pipeline/models/triton_decoder.py").read_text()
    assert len(set(done.stdout.split())) == source.count("@triton.jit")


def test_slots_on_a_gpu_take_the_kernels_where_they_run(monkeypatch):
    there = iter([SimpleNamespace(decode=lambda *_: "in kernels"), None])
    monkeypatch.setattr(decoders, "_kernels", lambda device: next(there))
    monkeypatch.setattr(MLPDecoder, "_fast", lambda *_: "in plain operations")
    decoder, slots = MLPDecoder(5, 6, 7), SimpleNamespace(device=torch.device("cuda"))
    assert [decoder(slots), decoder(slots)] == ["in kernels", "in plain operations"]
    with untiled(decoder):
        assert decoder(slots) == "in plain operations"


@pytest.mark.skipif(DEVICE == "cuda", reason="they run")
def test_a_line_says_why_kernels_do_not_run(capsys):
    decoders._kernels.cache_clear()
    assert decoders._kernels(torch.device("cuda")) is None
    assert decoders._kernels(torch.device("cuda")) is None
    said = capsys.readouterr().err
    assert (
        said.count("\n") == said.count("in plain operations, since Triton's kernels don't run on cuda: ") == 1
    )
