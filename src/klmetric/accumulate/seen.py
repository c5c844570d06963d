"""What a metric has seen of its batches, so that what looks wrong about them is said once."""

from collections.abc import Callable
from typing import TypeAlias

from klmetric.arithmetic.tracing import may_look
from klmetric.rows.looks import Doubt, say_other_classes
from klmetric.rows.rows import Rows

# What p and q are, and how many classes they have: None where that may vary.
Kind: TypeAlias = tuple[type, type, int | None]


class Seen:
    """What one metric has seen.

    Attributes:
        kind: of the last batch.
        doubt: of the first batch, where an accelerator would have to be waited for to know if it is right.
    """

    def __init__(self) -> None:
        self.kind: Kind | None = None
        self.doubt: Doubt | None = None
        self._has_looked = self._has_said_classes = False

    def take(self, kind: Kind, rows: Rows, doubt_of: Callable[[], Doubt | None]) -> None:
        """Take a batch of another kind than the last one, or the first one, and say what looks wrong.

        Args:
            kind: of the batch.
            rows: of the batch.
            doubt_of: what may be wrong with it, which is asked of the first one that has rows.
        """
        if not may_look(rows.kl) or not rows.kl.numel():
            return
        before, self.kind = self.kind, kind
        if not self._has_looked:
            self._has_looked, self.doubt = True, doubt_of()
            if self.doubt is not None and self.doubt.are_true.is_cpu:
                self.say()
        if before is None or before[2] is None or kind[2] is None or before[2] == kind[2] or self._has_said_classes:
            return
        self._has_said_classes = True
        say_other_classes(before[2], kind[2])

    def say(self) -> None:
        """Say what was wrong with the first batch, if it has not been said. It waits for the device."""
        doubt, self.doubt = self.doubt, None
        if doubt is not None:
            doubt.say()

    def begin_again(self) -> None:
        """Take whatever comes for the first of its kind; what was said is not said again."""
        self.kind = None
