"""What every reader owes its user: an answer, or a sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from sfumato.data.entries import Damaged
from sfumato.data.images import Unreadable
from sfumato.errors import UserError


def survives(read: Callable[[], object]) -> None:
    """Errors: whatever is neither an answer nor a sentence, which is a fault of the reader."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged files
        try:
            read()
        except UserError as error:
            assert error.messages, "a UserError without a message"
            for message in error.messages:
                assert message.strip(), "an empty message"
                message.encode()  # can be printed
        except (Unreadable, Damaged) as error:
            assert str(error).strip(), "an empty message"
