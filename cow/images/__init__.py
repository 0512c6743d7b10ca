"""What is read and written: the live devices, and the images of snapshots."""
