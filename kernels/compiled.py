"""What a kernel becomes on an architecture that need not be present: compiled offline and read back.

Registers, spills and shared memory are in what cuobjdump prints, which comes with Triton; how wide memory is
read and which arithmetic is used, in the PTX.
"""

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.launch import KERNEL_OF, Launch
from kernels.philox import Mask
from kernels.tiles import compiled_for

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Pointers to activations, in a case's dtype; all others are parameters or low-rank values, in fp32.
ACTIVATIONS = {"x_ptr", "dx_ptr", "y_ptr", "dy_ptr", "z_ptr", "dropped_ptr", "merged_ptr", "gained_ptr"}
OPTIONAL = {"lora_merge": {"magnitude_ptr", "norm_ptr", "gain_ptr", "gained_ptr"}}  # of the others the gain
ONLY_OUTER_DOT = {"z_ptr", "norm_ptr"}  # of the kernel of lora_outer


class Compiled(NamedTuple):
    registers: int
    stack: int  # bytes of spilled registers
    local: int
    shared: int
    instructions: int
    widest: int  # bytes that one global load reads, cp.async included
    narrowest: int
    mma: bool
    tf32: bool


def compile_kernel(
    operation: str, architecture: int, rank: int, width: int, dtype: str, launch: Launch, full: bool
) -> Compiled:
    """`dtype` is that of the activations, as Triton writes it (fp16); `full`: with mask and gain."""
    kernel = importlib.import_module(f"kernels.{kernel_name(operation)}").kernel
    mask = Mask(0.1, seed=0, step=0, site=0) if full and operation != "outer_dot" else None
    constants = compiled_for(kernel, width, rank, mask, launch)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    optional = OPTIONAL.get(kernel_name(operation), {"gain_ptr"})
    absent = (set() if full else optional) | (ONLY_OUTER_DOT if operation == "outer" else set())
    constants |= {name: None for name in kernel.arg_names if name in absent}
    signature = {parameter.name: _type(parameter, dtype, constants) for parameter in kernel.params}
    source = _source(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return _read(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared)


def _source(
    kernel: "triton.runtime.JITFunction", signature: dict[str, str], constants: dict[str, object]
) -> ASTSource:
    """With pointers as Triton finds them at run time: PyTorch aligns allocations to 16 bytes and more."""
    aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    if triton.__version__.startswith("3.2."):  # later versions take the same facts in another form
        from triton.backends.compiler import AttrsDescriptor

        attributes = AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16))
        signature = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        return ASTSource(fn=kernel, signature=signature, constants=constants, attrs=attributes)
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def kernel_name(operation: str) -> str:
    return f"lora_{KERNEL_OF.get(operation, operation)}"


def _type(parameter: "triton.runtime.jit.KernelParam", dtype: str, constants: Collection[str]) -> str:
    if parameter.name in constants:
        return "constexpr"
    if not parameter.name.endswith("_ptr"):
        return parameter.annotation_type or "fp32"  # 3.2 names the types of integers alone
    if parameter.name == "arrived_ptr":
        return "*i32"
    return f"*{dtype if parameter.name in ACTIVATIONS else 'fp32'}"


def _read(ptx: str, cubin: bytes, shared: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        command = [CUOBJDUMP, "--dump-resource-usage", "-sass", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9]*)", text)
    loads = re.findall(r"ld\.global(?:\.[a-zA-Z:_0-9]+)*?(?:\.v(\d))?\.[bfsu](\d+) ", ptx)
    sizes = [int(vector or 1) * int(bits) // 8 for vector, bits in loads]
    sizes += [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (\w+)", ptx)]
    return Compiled(
        registers=used["REG"],
        stack=used["STACK"],
        local=used["LOCAL"] + sum(name in ("LDL", "STL") for name in instructions),
        shared=shared,
        instructions=sum(name != "NOP" for name in instructions),
        widest=max(sizes),
        narrowest=min(sizes),
        mma=re.search(r"\b(mma\.sync|wgmma\.mma_async)\b", ptx) is not None,
        tf32="tf32" in ptx,
    )
