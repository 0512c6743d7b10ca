"""What is written down: the catalog, the journal, the record in the second place, fingerprints."""
