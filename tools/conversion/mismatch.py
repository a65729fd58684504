"""What to say of weights that are not those that a configuration asks for."""

import re
from collections.abc import Mapping, Sequence

# Names that tell in which form the weights are, where it is not that of save_pretrained of a causal
# language model, and how to get that.
KNOWN_FORMS: Mapping[str, str] = {
    r"\.experts\.(gate_up_proj|down_proj)$": "the experts of a layer are fused into one tensor; "
    "load the model with transformers and save it again with save_original_format=True",
    r"lora_|^base_model\.": "this is an adapter, or a model that carries one; merge it into the "
    "model (peft's merge_and_unload) and save that",
    r"\.(qweight|qzeros|g_idx|scales|weight_scale(_inv)?|weight_packed|absmax|SCB)$": "the weights "
    "are quantised; dequantise the model and save it again",
    r"(^|\.)_orig_mod\.": "torch.compile's wrapper was saved; save the model that it wraps, "
    "model._orig_mod",
    r"(^|\.)_fsdp_wrapped_module\.|^module\.": "a wrapper for parallel training was saved; save "
    "the model that it wraps",
    r"(^|\.)language_model\.|(^|\.)(visual|vision_tower|vision_model)\.": "this is a model for "
    "images and text; save its language model alone",
    r"^(layers\.\d+|embed_tokens|norm)\.": "the names lack 'model.', because the model was saved "
    "without its head; load it with AutoModelForCausalLM and save that",
}


def mismatch(missing: Sequence[str], unexpected: Sequence[str], others: Sequence[str]) -> str:
    """What weights lack, what they have beyond it and what else is wrong, three of each.

    It ends with the form that the unexpected names point to, if it is known.

    Args:
        missing: Names of tensors.
        unexpected: Names of tensors.
        others: Half-sentences.
    """
    kinds = (
        summary([f"{name} is missing" for name in missing], 3, "more are missing"),
        summary([f"{name} is unexpected" for name in unexpected], 3, "more are unexpected"),
        summary(others, 3),
    )
    forms = (
        f"it seems that {remedy}"
        for form, remedy in KNOWN_FORMS.items()
        if any(re.search(form, name) for name in unexpected)
    )
    return "; ".join(filter(None, (*kinds, next(forms, ""))))


def summary(problems: Sequence[str], limit: int = 6, more: str = "more") -> str:
    """The first problems in one line, and how many more there are."""
    problems = list(dict.fromkeys(problems))
    rest = f"; and {len(problems) - limit} {more}" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + rest


def first_line(error: BaseException) -> str:
    """What an exception says, or else its name, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
