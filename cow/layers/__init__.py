"""Old bytes, kept in layers of exceptions, and how a chain of them is read."""
