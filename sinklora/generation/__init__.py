"""What `sinklora generate` and `sinklora chat` do, apart from their command lines."""
