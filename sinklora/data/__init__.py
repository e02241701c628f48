"""From files to rows of tokens: sources, tokenised shards, packing, formats of instruction data."""
