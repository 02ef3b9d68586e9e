"""What looks like a secret, and so must not be in a config, on a command line or in a job's environment.

All of these are stored with the run and shown to whoever may see its job. Findings are named, never repeated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from trainers.errors import ConfigError

INSTEAD = (
    "take it out, and set it on the nodes of the cluster instead (environment, Kubernetes Secret, IAM role, ~/.aws,"
    " ~/.netrc): the run finds it there"
)

_NAME = re.compile(
    r"(?:secret|token|password|passwd|passphrase|credentials?|(?:api|secret|private|account)[_-]?key"
    r"|access[_-]?key(?:[_-]?id)?)$",
    re.IGNORECASE,
)
_TOKENS_OF_TEXT = re.compile(r"(?:pad|eos|bos|unk|mask|cls|sep|null|class|start|end)_token", re.IGNORECASE)
"""Words of a vocabulary, as tokenizers call them."""
_VALUE = re.compile(
    r"://[^/\s:@]*:[^/\s@]+@"  # user:password@host
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\bhf_[A-Za-z0-9]{20,}|\bwandb_v\d_[A-Za-z0-9_]{20,}|\bsk-[A-Za-z0-9_-]{20,}"  # Hugging Face, W&B, OpenAI
    r"|\bgh[opsu]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{20,}|\bglpat-[A-Za-z0-9_-]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|[?&;](?:X-Amz-Signature|AccountKey|sig)="
)
_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*([^},\s]+)")


def refuse_secrets(tree: Any, where: str) -> None:
    """Return if nothing in `tree` looks like a secret.

    Args:
        tree: mappings, lists and values.
        where: what `tree` is, for the message.

    Raises:
        ConfigError: something does; it is named by its key.
    """
    if found := list(secret_keys(tree)):
        raise ConfigError(
            f"{where}: {', '.join(found)} holds what looks like a secret; it would be stored with the run: {INSTEAD}"
        )


def secret_keys(tree: Any, where: str = "") -> Iterator[str]:
    """The dotted keys of all that looks like a secret, by its name or by its value."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from secret_keys(value, f"{where}.{key}" if where else str(key))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from secret_keys(value, f"{where}[{index}]")
    elif isinstance(tree, str | int) and not isinstance(tree, bool) and _is_secret(where.rpartition(".")[2], str(tree)):
        yield where if not _VALUE.search(where) else "a key"


def _is_secret(name: str, value: str) -> bool:
    named = _NAME.search(name) and not _TOKENS_OF_TEXT.fullmatch(name)
    asked = any(_NAME.search(variable) for variable in _ENVIRONMENT.findall(value))
    return bool(value) and bool(named or asked or _VALUE.search(value))
