"""Folders for `from_pretrained`, of transformers and of PEFT, inside of a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def export(
    model: nn.Module,
    folder: Path,
    processing_class: Any = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write the weights that a model has now, its configuration and its `processing_class`.

    A `PreTrainedModel` is written into `folder`, each adapter of a `PeftModel` into a folder of
    its name below: the Trainer takes adapter files directly below a checkpoint for another adapter
    of the model (`Trainer._load_from_checkpoint`). Other models have no such folder. Where the
    model has shards, `weights` is its whole state.
    """
    state = {} if weights is None else {"state_dict": weights}
    if _is("transformers", "PreTrainedModel", model):
        pretrained: Any = model
        pretrained.save_pretrained(folder, **state)
        folders = [folder]
    elif _is("peft", "PeftModel", model):
        adapters: Any = model
        for name in adapters.peft_config:
            # PEFT itself puts every adapter but "default" into a folder of its name.
            into = folder / name if name == "default" else folder
            adapters.save_pretrained(str(into), selected_adapters=[name], **state)
        folders = [folder / name for name in adapters.peft_config]
    else:
        return
    if processing_class is not None:
        for each in folders:
            processing_class.save_pretrained(each)


def _is(library: str, kind: str, model: nn.Module) -> bool:
    """Whether a model is of a library's class; the library is not imported for this."""
    module = sys.modules.get(library)
    return module is not None and isinstance(model, getattr(module, kind))
