"""From level to edge: of a cancellation that comes from around the work, let through one.

AnyIO's cancellation is level-triggered: each further ``await`` in a cancelled scope is cancelled again,
so a cleanup ends at its first one. An :class:`Edge` is a scope inside the cancelled one that raises its
shield at the moment of the first delivery. What the work cancels inside itself (its own
``move_on_after``) is left alone.
"""

from __future__ import annotations

import math

import anyio


class Edge:
    """The scope around the work.

    :param cleanup_timeout: seconds until the shield gives way
    """

    __slots__ = ("scope", "_cleanup_timeout")

    def __init__(self, cleanup_timeout: float) -> None:
        self.scope = anyio.CancelScope()
        self._cleanup_timeout = cleanup_timeout

    def thrown(self, exc: BaseException) -> bool:
        """The work is about to see ``exc``: shield it if that is a cancellation from around the scope.

        :return: whether it is
        """
        if self.scope.shield or not isinstance(exc, anyio.get_cancelled_exc_class()):
            return False
        if anyio.current_effective_deadline() != -math.inf:
            return False
        self.scope.shield = True
        if anyio.current_effective_deadline() == -math.inf:  # a scope of the work's own
            self.scope.shield = False
            return False
        self.scope.deadline = anyio.current_time() + self._cleanup_timeout
        return True

    def sent(self, value: object) -> bool:
        """As :meth:`thrown`, for Trio: it sends an ``outcome.Error`` and unwraps it at the wait."""
        error = getattr(value, "error", None)
        return isinstance(error, BaseException) and self.thrown(error)
