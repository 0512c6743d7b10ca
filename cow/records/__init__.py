"""The store's records: the catalog, the journal, the record in the second place, fingerprints."""
