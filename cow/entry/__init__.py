"""What is asked before a store is used: whether it can stand there, whose it is, what it would cost."""
