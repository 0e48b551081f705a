"""Paired measurements: ratios of what is measured side by side in one run, never bare seconds."""
