"""Words that tell averages from trained weights, in the keys of a file and in names of modules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

# Words in a path, between dots, underscores, digits and changes of case.
_AVERAGED = {"ave", "average", "averaged", "averages", "avg", "ema", "emas", "polyak", "swa"}
_ROLES = {
    **dict.fromkeys([*_AVERAGED, "shadow", "shadows", "target", "teacher"], "averaged"),
    **dict.fromkeys(["online", "student"], "trained"),
    **dict.fromkeys(["backup", "collected"], "aside"),  # trained weights in a state of averages
}
# Scalars of a module that keeps an average.
CONTROLS = {"decay", "initted", "n_averaged", "num_updates", "step", "steps", "updates"}
_NEITHER = {"opt", "optim", "optimizer", "optimizers", "optims", "scaler", "sched", "scheduler"}
_NEITHER |= {"exp", "grad", "gradient", "gradients", "grads", "sq"}  # as in Adam's `exp_avg`
# Before a word for an average: "model_non_ema" holds the trained weights.
_NEGATIONS = {"before", "no", "non", "not", "pre", "without", "wo"}
# For each word of an averaged module's name, the word in the trained module's name.
_TRAINED_WORDS: dict[str, tuple[str, ...]] = {
    **{word: ("",) for word, role in _ROLES.items() if role == "averaged"},
    "target": ("online", ""),
    "teacher": ("student", ""),
}


def role(path: Sequence[str]) -> tuple[str, str]:
    """The role of the tensors at a path, "averaged" or another; and the first word that says so.

    The last key with such a word decides.

    >>> role(["student", "ema_weights"]), role(["ema", "online_model"]), role(["model"])
    (('averaged', 'ema'), ('trained', 'online'), ('', ''))
    """
    said = [{_ROLES[word]: word for word in words(key) if word in _ROLES} for key in path]
    last = next((each for each in reversed(said) if each), {})
    role = next((role for role in ("aside", "averaged", "trained") if role in last), "")
    return role, next((each[role] for each in said if role in each), "")


def is_of_neither(path: Sequence[str]) -> bool:
    """Whether a path leads to an optimizer's state, or to gradients."""
    return any(word in _NEITHER for key in path for word in words(key))


@lru_cache(maxsize=10_000)  # keys repeat
def words(key: str) -> tuple[str, ...]:
    """The words of a key, in lower case; without a word for an average that is negated.

    >>> words("emaModel2_fp32.avgpool"), words("model_non_ema")
    (('ema', 'model', 'fp', 'avgpool'), ('model', 'non'))
    """
    found = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", key)
    spelled = ["", *(word.lower() for word in found)]
    return tuple(word for i, word in enumerate(spelled[1:]) if not _is_negated(spelled[i], word))


def _is_negated(before: str, word: str) -> bool:
    return before in _NEGATIONS and word in _AVERAGED


def mark_of_file(name: str) -> str:
    """The word in a file's name which says that the whole file is an average, or "".

    "teacher" and "target" do not count: they are averages only beside a trained model.
    """
    return next((word for word in words(name) if word in _AVERAGED), "")


@lru_cache(maxsize=10_000)  # keys repeat
def trained_names(key: str) -> tuple[str, ...]:
    """The keys that the trained partner of an average may have.

    >>> trained_names("encoder_k"), trained_names("ema_model"), trained_names("teacher")
    (('encoder_q',), ('model',), ('student',))
    """
    if key == "encoder_k":  # a "k" alone is a key projection of attention
        return ("encoder_q",)
    spelled = re.split(r"([._])", key)
    found = []
    for i in range(0, len(spelled), 2):
        if i and _is_negated(spelled[i - 2].lower(), spelled[i].lower()):
            continue
        for word in _TRAINED_WORDS.get(spelled[i].lower(), ()):
            other = "".join([*spelled[:i], word, *spelled[i + 1 :]]).strip("._")
            found.append(re.sub(r"([._])[._]+", r"\1", other))
    return tuple(other for other in found if other)
