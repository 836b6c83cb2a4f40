"""How a survey asks, and how it says that it cannot go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: Gets the option, the question and the possible answers (empty: any), and returns the answer. Raises HostError when no
#: person can be asked.
Ask = Callable[[str, str, Sequence[str]], str]


class HostError(Exception):
    """The project's tables cannot be used, or an option is missing or wrong. The message says what to do."""
