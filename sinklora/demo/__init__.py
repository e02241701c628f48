"""`sinklora demo`: extends the context of a tiny model, and compares attentions and caches on it."""
