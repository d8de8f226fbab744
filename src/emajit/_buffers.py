"""Which of a model's buffers are held beside the averages of its parameters."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

Policy = Literal["ignore", "copy", "average"]


def check(policy: str) -> None:
    """Raise ValueError for a policy that there is not."""
    if policy not in ("ignore", "copy", "average"):
        raise ValueError(f"buffers: expected ignore or copy or average, found {policy!r}")


def held(model: nn.Module, policy: Policy) -> dict[str, Tensor]:
    """The buffers that a `state_dict` of `model` has, by name; none of them to "ignore".

    Raises ValueError for another policy.
    """
    check(policy)
    if policy == "ignore":
        return {}
    lasting = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name in lasting}
