"""Numeric settings of every process that computes: threads, kernels, and how products are summed.

torch is imported inside the functions, because its environment variables must be set before it is imported.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf_lite.errors import ConfigError, OutOfMemory, UserError

if TYPE_CHECKING:
    import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")
"""The values with which cuBLAS is deterministic; torch's strict mode accepts no others."""

_ALLOCATOR = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1073741824"
"""Memory in pages of 2 MB where Linux has them (``madvise``), kept for the next update instead of returned and faulted
in again. The second number is the largest that glibc chooses by itself; without it, it could not keep the third."""

_SPINS = "10000"
"""How often a thread without work looks for some before it sleeps, a fraction of a millisecond: to wake it for each of
the thousands of operations of a step takes longer than they do. Without effect with one thread per process."""

_MKL_MODE, _MKL_KERNELS = "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"
_STRICT = "AUTO,STRICT"
_STRICT_MODES = (_STRICT, "AVX2,STRICT", "AVX512,STRICT", "AVX512_E1,STRICT")
"""In these MKL was found to add up an element of a product in the same order whatever the number of rows, from 4 on. By
itself it takes other kernels: with AVX-512 for up to 15 rows if a sum has some 90 terms or more (of ``x @ y.T``), with
AVX2 for the last rows of any product. On processors other than Intel's these modes were not tried."""
_LONGEST_SUM_ELSEWHERE = 72
"""Terms of a sum up to which MKL was found to keep the order on a processor of AMD."""

KERNEL_VARIABLES = (
    _MKL_MODE,
    _MKL_KERNELS,
    "ONEDNN_MAX_CPU_ISA",
    "NVIDIA_TF32_OVERRIDE",
    "CUBLASLT_WORKSPACE_SIZE",
    "NCCL_ALGO",
    "NCCL_PROTO",
)
"""Environment variables by which libraries choose kernels or orders of sums. A checkpoint names those that are set."""

OPTED_OUT = "cluster.deterministic=false: kernels may sum in another order from run to run; a resume may differ"

_is_fixed = False
_mkl_mode_is_ours = False
_default_blas: Any = None
"""torch's own choice of a BLAS library, before `fix` changed it."""

_REFUSALS = (
    (re.compile(r"(\S+) does not have a deterministic implementation"), r"\1"),
    (re.compile(r"not deterministic because it uses CuBLAS"), f"a matrix product without {WORKSPACE}"),
    (re.compile(r"allow_splitk=False\) requires the cuBLASLt"), "a matrix product that cuBLASLt cannot do unsplit"),
)
"""Patterns of the errors of torch's strict mode, and the name of the operation."""


class NotDeterministic(UserError, RuntimeError):
    """An operation has no deterministic form on this device, and ``cluster.deterministic`` asks for one."""

    def __init__(self, operation: str) -> None:
        super().__init__(
            f"{operation}: this operation has no deterministic form on this device, and cluster.deterministic=true "
            "allows no other. Use a model or setting that does without it, or set cluster.deterministic=false: then "
            "two equal runs, and a resumed one, may differ"
        )
        self.operation = operation


def refusal(error: BaseException) -> NotDeterministic | None:
    """The operation that torch's strict mode refused; None if ``error`` is not such a refusal."""
    if isinstance(error, RuntimeError):
        for pattern, operation in _REFUSALS:
            if match := pattern.search(str(error)):
                return NotDeterministic(match.expand(operation))
    return None


def user_error(error: BaseException) -> UserError | None:
    """Our error for one of torch's that the user can act on: full GPU memory, or a refusal of strict mode."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemory(str(error))
    return refusal(error)


def environment(threads: int = 1) -> dict[str, str]:
    """Environment variables of a process that computes, to be set before it imports torch.

    The allocator's is read when a process starts, so only those that this one starts obey it; a user's own stays.
    """
    allocator = os.environ.get(_ALLOCATOR) or _HUGE_PAGES
    waiting = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": _SPINS}
    return {**_thread_variables(threads), **waiting, WORKSPACE: _WORKSPACES[0], _ALLOCATOR: allocator}


def _thread_variables(threads: int) -> dict[str, str]:
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))


def fix(device: str, *, threads: int = 1, deterministic: bool = True) -> torch.device:
    """Fix threads and kernels of this process, before anything is computed in it.

    Always: no TF32, no cuDNN attention (torch calls it nondeterministic, and it makes a plan per shape), and MKL's
    strict mode on a processor of Intel.
    Deterministic, on every device: torch's strict deterministic algorithms, without filling uninitialized memory. On a
    GPU also: matrix products by cuBLASLt, never split along the summed dimension, accumulated in float32.

    Args:
        device: ``cpu``, or ``cuda``: the first GPU that this process sees.
        threads: of torch's operations on the CPU; another number changes rounding.
        deterministic: False: torch may choose faster kernels, whose results can differ from run to run.

    Returns:
        The device.

    Raises:
        ConfigError: cuBLAS is, or may already be, set up to sum differently from run to run.
    """
    import torch

    global _is_fixed
    os.environ.update(_thread_variables(threads))  # for the processes that this one starts
    torch.set_num_threads(threads)
    if device == "cuda" and deterministic:
        _check_workspace(torch.cuda.is_initialized())
    os.environ.setdefault(WORKSPACE, _WORKSPACES[0])
    make_mkl_strict()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    _choose_kernels(device, deterministic)
    _is_fixed = True
    return torch.device(device, 0) if device == "cuda" else torch.device(device)


def make_mkl_strict() -> None:
    """Let MKL sum a row in the same way whatever the number of rows. It asks once, at its first product.

    On a processor of Intel; a user's own mode stays.
    """
    global _mkl_mode_is_ours
    if _is_intel() and _MKL_MODE not in os.environ:
        os.environ[_MKL_MODE], _mkl_mode_is_ours = _STRICT, True


def rows_are_independent(longest_sum: int) -> bool:
    """Whether a row of an MKL product of 4 rows or more is bitwise identical whatever their number; after `fix`.

    For the processor and the environment of this process.

    Args:
        longest_sum: terms of the longest sum.
    """
    if not _is_intel():
        return longest_sum <= _LONGEST_SUM_ELSEWHERE
    kernels = os.environ.get(_MKL_KERNELS, "AVX2")
    return os.environ.get(_MKL_MODE, _STRICT) in _STRICT_MODES and kernels.startswith(("AVX2", "AVX512"))


def kernel_settings() -> dict[str, str]:
    """The `KERNEL_VARIABLES` that are set, other than by `fix`."""
    found = {name: os.environ[name] for name in KERNEL_VARIABLES if name in os.environ}
    if found.get(_MKL_MODE) == _STRICT:
        del found[_MKL_MODE]
    return found


@cache
def _is_intel() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()


def require_fixed(device: torch.device) -> None:
    """Check that `fix` was called, if ``device`` is a GPU. For library code that computes in a user's process.

    Raises:
        ConfigError: it was not called.
    """
    if device.type == "cuda" and not _is_fixed:
        raise ConfigError(
            "this process computes on a GPU with kernels that are not fixed: call rlinf_lite.numerics.fix('cuda') "
            "before anything runs on the GPU (deterministic=False leaves the choice of kernels to torch)"
        )


def hand_over(device: str) -> None:
    """Restore torch's defaults, except the threads, for an engine with its own kernels (vLLM)."""
    import torch

    _choose_kernels(device, deterministic=False)
    if _mkl_mode_is_ours:
        os.environ.pop(_MKL_MODE, None)
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(True)


@contextlib.contextmanager
def distinct_places() -> Iterator[None]:
    """Inside, indexed writes are not sorted first, which strict mode does for places that are written twice."""
    import torch

    strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)


def _choose_kernels(device: str, deterministic: bool) -> None:
    import torch
    from torch.utils import deterministic as settings

    torch.use_deterministic_algorithms(deterministic)
    settings.fill_uninitialized_memory = not deterministic  # type: ignore[attr-defined]
    if device == "cuda":
        global _default_blas
        library = torch.backends.cuda.preferred_blas_library
        _default_blas = library() if _default_blas is None else _default_blas
        # Only cuBLASLt can be told not to split; with cuBLAS torch raises. So both settings or none.
        library("cublaslt" if deterministic else _default_blas)
        _allow_reduced_sums(not deterministic)


def _allow_reduced_sums(allowed: bool) -> None:
    """Allow or forbid to split bf16 and fp16 products along the summed dimension and to sum the parts in 16 bits."""
    import torch

    both = allowed, allowed
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = both


def _check_workspace(cuda_is_in_use: bool) -> None:
    found = os.environ.get(WORKSPACE)
    if found is None and cuda_is_in_use:
        raise ConfigError(
            f"{WORKSPACE} is not set, and this process uses the GPU already: call rlinf_lite.numerics.fix before "
            f"anything runs on the GPU, or set {WORKSPACE}={_WORKSPACES[0]} in the environment"
        )
    if found is not None and found not in _WORKSPACES:
        raise ConfigError(
            f"{WORKSPACE}={found}: cuBLAS may then sum differently from run to run; leave it out, or use "
            f"{' or '.join(_WORKSPACES)} (cluster.deterministic=false allows any)"
        )
