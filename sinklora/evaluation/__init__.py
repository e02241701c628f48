"""What a model can do with a long text: perplexity, retrieval, and the tables and pictures of both."""
