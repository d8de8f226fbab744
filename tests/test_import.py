"""`import emajit` takes little more time than `import torch`."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Each takes tens of milliseconds to seconds.
HEAVY = {
    "numpy",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.export",
    "torch.fx.experimental.symbolic_shapes",
    "torch.testing",
}
# What only these need is imported with them.
ROOMS = {"checkpoint", "cli", "fused", "integrations", "merging", "offload", "posthoc"}


def test_imports_nothing_beside_torch_and_nothing_heavy() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import emajit;"
        "print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = set(done.stdout.split())
    assert "emajit.functional" in found
    tops = {name.partition(".")[0] for name in found}
    assert tops - sys.stdlib_module_names <= {"emajit", "torch"}
    assert not found & HEAVY
    assert not found & {f"emajit.{room}" for room in ROOMS}


@pytest.mark.parametrize("module", ["checkpoint", "merging", "posthoc"])
def test_without_safetensors_a_module_says_what_to_install(module: str) -> None:
    code = f"import sys; sys.modules['safetensors'] = None; from emajit import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: emajit.checkpoint needs safetensors; pip install safetensors"
    )
