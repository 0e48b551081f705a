"""Low-rank adapters: layers, the methods they make up, and their files."""
