"""The networks that must pass, end to end: each trained for real, exported, loaded and compared."""
