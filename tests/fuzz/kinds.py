"""Every reader of files from elsewhere."""

from fuzz import checkpoint_kinds, lora_kinds, stored_kinds, transformers_kinds

KINDS = (
    *checkpoint_kinds.KINDS,
    *stored_kinds.KINDS,
    *lora_kinds.KINDS,
    *transformers_kinds.KINDS,
)
