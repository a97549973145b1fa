"""Matrix products and attention for a few tokens at a time, compiled where they are first used.

Libraries for matrix products are made for large ones: with 8 tokens they reach a fraction of what the processor can
do, because weights are not read as one stream. These kernels are made for 1 to 32 tokens. Their sums run in one fixed
order, so a token's result is the same to the last bit whatever it is computed with (see ``narrow.cpp``).
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from restpoint.errors import RestpointError

DTYPES = (torch.float32, torch.bfloat16)
_SOURCE = Path(__file__).with_name("narrow.cpp")
_PANEL = 32


@functools.cache
def load() -> None:
    """Compile the kernels, or find them compiled, and register them with torch.

    Raises:
        RestpointError: there is no C++ compiler, or it fails.
    """
    command = _command()
    library = _folder() / f"narrow-{_fingerprint(command)}.so"
    if not library.exists():
        _build(command, library)
    torch.ops.load_library(library)
    _register_shapes()


def compiler() -> str:
    """The C++ compiler that kernels are compiled with.

    Raises:
        RestpointError: there is none.
    """
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise RestpointError(f"compile: no C++ compiler ({', '.join(names)}): install one, or leave compile out")
    return found


def pack(weight: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "..."]:
    """Weights of a linear map in the order in which the kernel reads them: panels of 32 outputs."""
    outputs, inputs = weight.shape
    panels = -(-outputs // _PANEL)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, panels * _PANEL - outputs))
    if weight.dtype == torch.bfloat16 and torch.ops.restpoint.narrow_paired():
        padded = torch.nn.functional.pad(padded, (0, inputs % 2))
        return padded.view(panels, _PANEL, -1, 2).transpose(1, 2).contiguous()
    return padded.view(panels, _PANEL, inputs).transpose(1, 2).contiguous()


def packs(weight: Tensor) -> bool:
    """Whether the kernel takes this weight."""
    paired = weight.dtype == torch.bfloat16 and torch.ops.restpoint.narrow_paired()
    return weight.ndim == 2 and weight.dtype in DTYPES and not (paired and weight.shape[1] % 2)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """``x @ weight.T + bias`` for a packed weight, in the dtype of ``x``, summed in float32."""
    return torch.ops.restpoint.narrow_linear(x, packed, bias, outputs)


def attention(
    q: Float[Tensor, "batch heads tokens size"],
    keys: Float[Tensor, "batch key_heads slots size"],
    values: Float[Tensor, "batch key_heads slots value_size"],
    visible: Bool[Tensor, "batch tokens slots"],
    scale: float,
    softcap: float = 0.0,
) -> Float[Tensor, "batch tokens heads value_size"]:
    """Softmax attention over the visible slots; time goes with the last visible slot, not with the capacity."""
    return torch.ops.restpoint.narrow_attention(q, keys, values, visible, scale, softcap)


def set_threads(count: int) -> int:
    """Let the kernels use this many threads; returns how many they used before."""
    return torch.ops.restpoint.narrow_threads(count)


def _register_shapes() -> None:
    """Tell the compiler what the kernels return."""

    @torch.library.register_fake("restpoint::narrow_linear")
    def _(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        return x.new_empty(*x.shape[:-1], outputs)

    @torch.library.register_fake("restpoint::narrow_attention")
    def _(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, softcap: float) -> Tensor:
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], values.shape[3])


def _command() -> list[str]:
    """The compiler's command line, without input and output."""
    from torch.utils import cpp_extension

    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    openmp = ["-fopenmp"] if platform.system() == "Linux" else ["-undefined", "dynamic_lookup"]
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    flags = ["-O3", native, "-std=c++20", "-fPIC", "-shared", "-w", "-fno-strict-aliasing", *openmp]
    return [compiler(), *flags, f"-L{cpp_extension.TORCH_LIB_PATH}", *include]


def _fingerprint(command: list[str]) -> str:
    """Changes with the source, the compiler's command, torch and the processor."""
    processor = platform.processor() + platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    parts = [_SOURCE.read_text(), *command, torch.__version__, processor]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache) / "restpoint" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RestpointError(f"compile: cannot write to {folder}: set XDG_CACHE_HOME, or leave compile out") from error
    return folder


def _build(command: list[str], library: Path) -> None:
    """Compile beside the final place, then move there, so that no other process sees half a library."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        link = ["-o", str(made), str(_SOURCE), "-ltorch_cpu", "-lc10"]
        done = subprocess.run([*command, *link], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise RestpointError(
                f"compile: {command[0]} fails ({reason}): install another in $CXX, or leave compile out"
            )
        made.replace(library)
