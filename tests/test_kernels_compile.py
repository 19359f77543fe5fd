# SPDX-License-Identifier: Apache-2.0
"""Every kernel that launchers launch, compiled for GPUs that need not be here: it fits, spills nothing, uses the hardware.

The launchers run on the CPU with launching replaced, so what is compiled here is what they would launch there.
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from impl.schedules import schedule
from tests.poison import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="an interpreter does not compile"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),
]
KIB = 1024
SHARED = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}  # bytes for a block
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
NAMES |= {torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAUNCHERS = ("products", "symmetric", "general", "scales", "prepare", "apply", "variance")

Launch = tuple[Any, dict[str, Any], dict[str, Any]]  # kernel, arguments, options


def on_hopper() -> None:
    """Launch the same products by the kernel for Hopper."""
    from impl.kernels.products import HOPPER

    with mock.patch("impl.kernels.iteration.products", return_value=HOPPER):
        of_products()


def of_products() -> None:
    """Launch whatever an orthogonalization may consist of."""
    from impl.kernels import iteration

    for (m, n), name in product([(128, 128), (128, 256)], ["polar_express_s4", "jordan"]):
        sides = [((1, m, n), torch.float32), ((1, n, m), torch.float32), ((1, n, m), torch.bfloat16)]
        outs = [None, *(torch.empty(shape, dtype=dtype) for shape, dtype in sides)]
        for out in outs:
            O = iteration.batch(torch.empty(iteration.batch_numbers(m, n), dtype=torch.float16), 1, m, n)
            memory = torch.empty(iteration.scratch_numbers(m, n), dtype=torch.float16)
            largest = torch.zeros(2, 1, dtype=torch.int32)
            norms = iteration.norms(1, m, torch.device("cpu"))
            iteration.iteration(O, m, schedule(name, 5), 0.0, memory, *norms, *largest, out=out)


def by_entry() -> None:
    """Launch what works entry by entry: all dtypes and orientations, and each option once."""
    from impl.kernels.apply import apply, unpack
    from impl.kernels.prepare import Source, prepare
    from impl.kernels.variance import variance

    table, pointers, code = torch.zeros(1, 5).long(), torch.zeros(16).long(), torch.zeros((), dtype=torch.uint8)
    hyper, found, X = torch.zeros(4).double(), torch.zeros(1).int(), torch.empty(1, 128, 128, dtype=torch.float16)
    one = torch.ones(())
    cases = [(dtype, dtype, True, True, True, None) for dtype in DTYPES]
    cases += [(torch.float32, torch.float32, True, True, False, None), (torch.bfloat16, torch.float32, True, False, True, one)]
    cases += [(torch.float32, torch.float32, False, False, True, None)]
    for (weight, gradient, *options, grad_scale), (rows, columns) in product(cases, [(64, 128), (128, 64)]):
        source = Source(table, pointers, 1, rows, columns, weight, gradient, rows > columns, *options, hyper, grad_scale)
        prepare(source, found, found, X)
        if source.momentum:
            apply(source, X, code, 1.0)
            apply(source, X, code, 1.0, torch.ones(1, rows))
        unpack(X, torch.empty(1, rows, columns if source.aligned else columns - 1, dtype=weight))
        variance(X, rows, columns, table, pointers, 1, code, 0.9, *torch.ones(2, 1, rows))


def launched(run: Any, arch: int) -> Iterator[Launch]:
    """What is launched on such a GPU, each once."""
    from impl.kernels import apply, general, iteration, launch, prepare, scales, symmetric, variance  # noqa: F401

    seen: dict[str, Launch] = {}

    def note(kernel: Any, programs: int, arguments: dict[str, Any], **options: Any) -> None:
        key = repr((kernel.__name__, signature(kernel, arguments), options))
        seen.setdefault(key, (kernel, arguments, options))

    with ExitStack() as stack:
        for name in LAUNCHERS:
            stack.enter_context(mock.patch(f"impl.kernels.{name}.launch", note))
        for name in ("symmetric", "general", "iteration"):
            stack.enter_context(mock.patch(f"impl.kernels.{name}.tiles_for", return_value=launch.TILES[arch // 10]))
        run()
    yield from seen.values()


def signature(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """The types of a kernel's arguments, and the values of those that are compiled in."""
    types, constants = {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            types[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = "*" + NAMES[value.dtype]
        elif hasattr(value, "block_shape"):
            layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
            shape = str(list(value.block_shape)).replace(" ", "")
            types[parameter.name] = f"tensordesc<{NAMES[value.base.dtype]}{shape}{layout}>"
        else:
            types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    return types, constants


def compiled(launch: Launch, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel, arguments, options = launch
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    types, constants = signature(kernel, arguments)
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    return triton.compile(source(kernel, types, constants, attributes), target=GPUTarget("cuda", arch, 32), options=options)


def spilled(kernel: Any, folder: Path) -> list[int]:
    """Bytes of stack and of local memory."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"
    shown = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    return [int(x) for x in re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown.stdout + shown.stderr)[0]]


def faults(launch: Launch, arch: int, folder: Path) -> list[str]:
    """What is wrong with a kernel on such a GPU."""
    kernel = compiled(launch, arch)
    spills, shared = spilled(kernel, folder), kernel.metadata.shared
    function, arguments, options = launch
    what = f"{function.__name__} {signature(function, arguments)} {options}"
    wrong = [f"{what}: {spills} bytes spilled"] if any(spills) else []
    wrong += [f"{what}: {shared} bytes of shared memory"] if shared > SHARED[arch] else []
    multiplies = "a" in arguments and "d" in arguments
    vectors = not arguments.get("ALIGNED") or re.search(r"ld\.global(\.\w+)*\.v4", kernel.asm["ptx"])
    wrong += [] if vectors else [f"{what}: moves less than 16 bytes at a time"]
    # What must come to the same bits in several kernels, and in torch.
    rounds = function.__name__ in ("prepare_kernel", "again_kernel", "apply_kernel")
    wrong += [f"{what}: a product and a sum are rounded as one"] * (rounds and "fma.rn" in kernel.asm["ptx"])
    return wrong + [f"{what}: no wgmma"] * (multiplies and arch == 90 and "wgmma.mma_async" not in kernel.asm["ptx"])


@pytest.mark.parametrize(
    "run, arch",
    [(on_hopper, 90), *product([of_products, by_entry], SHARED)],
    ids=lambda value: getattr(value, "__name__", f"sm_{value}"),
)
def test_kernels_fit_and_do_not_spill(run, arch, tmp_path):
    pytest.importorskip("triton", reason="kernels need Triton")
    wrong = [fault for launch in launched(run, arch) for fault in faults(launch, arch, tmp_path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("run, least", [(on_hopper, 12), (of_products, 12), (by_entry, 35)])
def test_the_launchers_are_seen(run, least):
    pytest.importorskip("triton", reason="kernels need Triton")
    assert len(list(launched(run, 90))) >= least
