"""`vilg serve`: a page and an HTTP API over one export folder. Bytes and JSON here; the model's work is elsewhere."""
