"""What the pass over a graph does to the code that Inductor writes, and not to the results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.testing import assert_close

import emajit
from emajit._hoist import Hoist
from emajit.fused import FusedOptimizer


def scaled(x: Tensor, step: Tensor, words: Tensor) -> Tensor:
    """With a 0-d result, and with a 0-d view that does not begin where its memory does."""
    return x * (1 - 0.9**step) + words[2] * x + x.sum()


@pytest.mark.inductor
@pytest.mark.parametrize("hoisted", [True, False])
def test_a_power_of_one_number_is_in_no_loop(hoisted: bool) -> None:
    options: Any = {"post_grad_custom_post_pass": Hoist()} if hoisted else {}
    compiled = torch.compile(scaled, fullgraph=True, options=options)
    arguments = torch.randn(5000).double(), torch.tensor(3.0), torch.tensor([1.0, 2.0, 4.0])
    found, (code,) = run_and_get_code(compiled, *arguments)
    assert_close(found, scaled(*arguments), rtol=1e-6, atol=1e-6)
    loops = code.split("for(int64_t")
    # Without the pass it is in the loop: the day when Inductor does better, the pass can go.
    assert ("std::pow" in loops[-1]) != hoisted
    assert code.count("std::pow") >= 1


@pytest.mark.inductor
def test_a_fused_step_has_the_pass() -> None:
    params = {"w": torch.nn.Parameter(torch.randn(5000))}
    optimizer = torch.optim.AdamW(params.values())
    fused = FusedOptimizer(optimizer, emajit.init(params), params, decay=0.9, backend="inductor")
    params["w"].grad = torch.ones(5000)
    fused.step(0)
    _, (code,) = run_and_get_code(fused.step, 1)
    assert "std::sqrt" in code or ".sqrt()" in code
    assert not any("std::pow" in loop for loop in code.split("for(int64_t")[1:])


def test_the_pass_has_a_name_for_caches() -> None:
    assert Hoist().uuid() == Hoist().uuid() != b""
