"""The copy-on-write engine: snapshots of origins, in a store. Knows no FUSE and no command line.

Start at `open_store` (opening.py). DESIGN.md says why it is built so, FORMAT.md what each persisted byte means; both
are beside this file.
"""
