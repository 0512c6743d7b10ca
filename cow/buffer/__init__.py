"""What was acknowledged and waits to be written."""
