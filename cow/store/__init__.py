"""The store as a whole: its snapshots, and what becomes of them and of their layers."""
