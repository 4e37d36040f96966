"""What makes a run repeatable: deterministic algorithms, and random draws that depend only on their position."""

import hashlib
import os
import platform
from pathlib import Path

import numpy as np
import torch

import topoflow
from topoflow.config import RunConfig


def set_deterministic(config: RunConfig, compiles: bool = False) -> None:
    """Set the number of threads and, if configured, require deterministic algorithms, of compiled kernels too."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if not config.deterministic:
        return
    # cuBLAS needs a fixed workspace for this, and reads the variable when it is first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if compiles:
        torch.use_deterministic_algorithms(True)
    else:  # the same without torch's compiler, whose import takes seconds
        torch.set_deterministic_debug_mode("error")
    # filling costs time, and nothing here reads uninitialized memory; torch sets the attribute through a module class
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False


def set_tf32(enabled: bool) -> None:
    """Set whether CUDA rounds the inputs of float32 matrix products to TF32; other devices ignore it."""
    torch.backends.cuda.matmul.allow_tf32 = enabled


def describe_software(device: torch.device) -> dict[str, str | int]:
    """Return what the bits of a run depend on apart from config, data and seed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _describe_cpu()
    return {
        "topoflow": topoflow.__version__,
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
        "python": platform.python_version(),
        "device": name,
        "threads": torch.get_num_threads(),
    }


def hash_sources(*parts: str) -> str:
    """Return the SHA-256 over names and contents of the package's source files, as hex: whether two run the same code.

    parts: folders or files of the package, such as `model` or `loss.py`; without any, all of it.
    """
    root, digest = Path(topoflow.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not parts or name.parts[0] in parts:
            content = path.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _describe_cpu() -> str:
    """Return the processor's model, and the instruction set that torch's kernels use on it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """Return a 63-bit seed, a pure function of (seed, purpose, position); any two are unrelated."""
    text = ":".join([str(seed), purpose, *map(str, position)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_draws(seed: int, purpose: str, *position: int) -> None:
    """Seed torch's default generators for the draws at `position`.

    Dropout and drop path draw from them. In training the position is (step, micro-batch index in the global batch):
    neither the rank nor what was drawn before matters, and there is no random state to restore.
    """
    derived = derive_seed(seed, purpose, *position)
    torch.default_generator.manual_seed(derived)
    if torch.cuda.is_initialized():  # torch.manual_seed would record a traceback each time if CUDA is not initialized
        torch.cuda.manual_seed(derived)
