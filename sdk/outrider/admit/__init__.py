"""A bundle's first run, in a child under limits: what it showed, what was measured, and what was chosen."""
