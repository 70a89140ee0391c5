"""The far end of the pipe to a process that measures; `worker.Worker` is the near one.

Needs nothing but Python, so it also runs in environments that have no torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def serve(ask: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
    """Answer every line of stdin, a measure and the fields of a job, until there are no more."""
    # Output of packages goes to stderr, so that only answers go through the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(ask(request["measure"], request["job"])), file=answers, flush=True)
