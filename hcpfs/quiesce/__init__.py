"""Who uses the images, and quiescing what uses them for the instant of a snapshot, with the evidence of it."""
