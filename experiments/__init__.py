"""Everything above a single run."""
