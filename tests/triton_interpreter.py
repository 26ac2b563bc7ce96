"""Triton's interpreter runs kernels on a CPU. It is chosen before Triton is imported, so it gets its own process."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

has_triton = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not has_triton, reason="triton is not installed (extra `gpu`)")
# Whether this process interprets kernels, because `run_interpreted` started it or the caller set the variable.
interpreting = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file: str, *arguments: str) -> None:
    """Run the tests of another file, which skip themselves unless `interpreting`, in a process that interprets."""
    if _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 needs numpy before 2.4")
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(x) for x in version(package).split(".")[:2])


def teach_bf16_products() -> None:
    """Let the interpreter's `dot` read BF16 operands; it multiplies the integers that it keeps their bits in."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot
    if plain.__name__ == "create_dot_widened":
        return

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot_widened(self, a, b, *rest):
        return plain(self, widen(a), widen(b), *rest)

    InterpreterBuilder.create_dot = create_dot_widened


def teach_bf16_rounding() -> None:
    """Let the interpreter round FP32 to BF16 to nearest, ties to even, as a GPU does; it truncates."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.cast_impl
    if plain.__name__ == "cast_rounded":
        return

    def cast_rounded(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return plain(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(src.data), 0x7FC0, rounded)
        return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_rounded
