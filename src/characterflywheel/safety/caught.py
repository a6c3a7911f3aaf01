"""What a fail-closed boundary caught: counted for metrics and logged, without a word of what a user wrote (PAPER
section 9)."""

import logging
import time
import traceback
from collections import Counter

LOG_SECONDS = 10.0
_log = logging.getLogger(__name__)


class Caught:
    """Failures of classifiers. `counts[classifier, reason]` is how often; a reason is an error's type, such as
    `TimeoutError`. The log has each pair at most once in ten seconds, with the number since it was last there.

    Only the error's type and place are logged: its message may quote the text that was being judged.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._logged: dict[tuple[str, str], tuple[float, int]] = {}

    def note(self, classifier: str, error: BaseException) -> None:
        """Count and log that `classifier` failed with `error`."""
        key = (classifier, type(error).__name__)
        self.counts[key] += 1
        last, count = self._logged.get(key, (-LOG_SECONDS, 0))
        if (now := time.monotonic()) - last >= LOG_SECONDS:
            new = self.counts[key] - count
            _log.error("safety classifier %s failed, text refused: %s at %s (%d new)", *key, _place(error), new)
            self._logged[key] = (now, self.counts[key])


def _place(error: BaseException) -> str:
    """Where an error was raised: module file and line."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "unknown place"
