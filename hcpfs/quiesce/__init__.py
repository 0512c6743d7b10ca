"""Who uses the live images, and pausing them for the instant of a snapshot, with the evidence of it."""
