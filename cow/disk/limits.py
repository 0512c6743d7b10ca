"""The resource limits of this process (getrlimit(2)), raised as far as it may."""

import resource


def raise_limit(kind: int) -> bool:
    """Raise the soft limit to the hard one. Returns whether that changed anything."""
    soft, hard = resource.getrlimit(kind)
    if soft == hard:
        return False
    resource.setrlimit(kind, (hard, hard))
    return True
