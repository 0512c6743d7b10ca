"""What a service manager is told: that the mount is usable, what is going on, that it stops (sd_notify(3)).

The address of its socket is removed from the environment at the start, so that no child speaks in the daemon's name.
"""

import logging
import os

import sdnotify

_VARIABLE = "NOTIFY_SOCKET"

log = logging.getLogger("hcpfs")


class Supervisor:
    """The service manager, if one started us. Never blocks; a failure is logged, and nothing is told from then on."""

    def __init__(self) -> None:
        """Take its address from the environment, for this process alone."""
        self._notifier: sdnotify.SystemdNotifier | None = None
        if _VARIABLE not in os.environ:
            return
        try:
            notifier = sdnotify.SystemdNotifier(debug=True)
            notifier.socket.setblocking(False)
            self._notifier = notifier
        except (OSError, IndexError) as error:
            self._give_up(error)
        finally:
            del os.environ[_VARIABLE]

    def tell(self, status: str | None = None, **values: object) -> bool:
        """Send assignments such as READY=1, and a status line for people. False when it has to be sent again."""
        if self._notifier is None:
            return True
        lines = [f"{name}={value}" for name, value in values.items()]
        if status is not None:
            plain = status.encode("ascii", "backslashreplace").decode().replace("\n", " ")
            lines.append(f"STATUS={plain}")
        try:
            self._notifier.notify("\n".join(lines))
        except BlockingIOError:
            return False  # its queue is full
        except OSError as error:
            self._give_up(error)
        return True

    def _give_up(self, error: Exception) -> None:
        self._notifier = None
        log.warning("the service manager cannot be told of the state (%s): %s", _VARIABLE, error)
