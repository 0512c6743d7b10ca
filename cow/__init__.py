"""The copy-on-write engine: snapshots of origins, in a store. Knows no FUSE and no command line.

Start at `open_store` (opening.py). Why it is built so stands in DESIGN.md, what each persisted byte means in FORMAT.md,
both beside this file.
"""
