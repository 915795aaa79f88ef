"""What a pass does with an exception that nothing in it foresees: say so, and leave the attention as it is.

    except Exception as error:
        return replace(call, refusal=internal_error(error, "the proof of its mask"))

A compilation must not fail because a pass does; neither may the failure pass for a property of the user's graph.
"""

from __future__ import annotations

import logging
import os

from ..attention_call import Refusal

_log = logging.getLogger("lighthouse_fx")
_REMEDY = "please report it, with the traceback that was logged"


def internal_error(error: Exception, where: str) -> Refusal:
    """Log an exception with its traceback, and give the reason for which a call then stays dense.

    Args:
        error: What was raised.
        where: The part of the passes that failed, as a person would call it.

    Raises:
        Exception: The exception itself in a run of pytest, so that no test passes because of it.
    """
    if "PYTEST_CURRENT_TEST" in os.environ:
        raise error
    _log.error("internal error in %s; the attention is left as it is: %s", where, _REMEDY, exc_info=error)
    return Refusal(reason=f"internal error in {where}, {type(error).__name__}: {error}", remedy=_REMEDY)
