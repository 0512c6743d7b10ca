"""Recovery after the death of a daemon: what sat on its mount is taken down, and put back once it is served again."""
