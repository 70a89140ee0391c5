"""Which requests belong to the same of several servers: those about one prefix, which it has read."""

from __future__ import annotations

import hashlib
import json


def session_of(path: str, body: bytes, prefix: int) -> str | None:
    """What a request shares with those that the same server should answer; None where that is nothing.

    A digest, so that no text of a prompt is where requests are routed and logged. It is of `prompt_cache_key` where a
    request has one, and otherwise of its prefix, policy and budget. prefix: of requests to chats that say none.
    """
    try:
        asked = json.loads(body)
        if asked.get("prompt_cache_key") is not None:
            shared = [str(asked["prompt_cache_key"])]
        else:
            text = asked["prompt"] if path.endswith("/v1/completions") else asked["messages"]
            length = asked.get("prefix")
            if length is None:
                length = 0 if isinstance(text, str) else min(prefix, len(text) - 1)
            if length < 1:
                return None
            shared = [asked.get("policy"), asked.get("budget"), text[:length]]
        return hashlib.sha256(json.dumps(shared).encode()).hexdigest()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # any server can say what is wrong with it
