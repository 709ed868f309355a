"""What clients may know of a tokenizer, so that they can do without its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

# Where the files lie on this machine, and how they were read here.
_OURS: Final = frozenset(
    {
        *("vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file"),
        *("name_or_path", "is_local", "local_files_only", "backend", "_commit_hash", "cache_dir"),
        *("trust_remote_code", "use_auth_token", "token", "chat_template"),
    }
)
_TOKENS: Final = ("bos_token", "eos_token", "pad_token", "unk_token")


def tokenizer_info(loaded: Any, template: str = "") -> dict[str, Any]:
    """The settings of a tokenizer of transformers, in vLLM's form, as JSON can hold them.

    Special tokens are their texts, None for those it does not have. ``template`` is the chat
    template in use, left out where there is none.
    """
    kept = {name: value for name, value in loaded.init_kwargs.items() if name not in _OURS}
    info: dict[str, Any] = _plain(kept)
    info |= {name: getattr(loaded, name) for name in _TOKENS}
    info |= {
        "tokenizer_class": type(loaded).__name__,
        "model_max_length": loaded.model_max_length,
    }
    if template:
        info["chat_template"] = template
    return info


def _plain(value: Any) -> Any:
    """JSON of a value; a token is its text."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(own) for name, own in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(own) for own in value]
    return str(getattr(value, "content", value))
