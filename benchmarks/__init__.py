"""What is measured, against whom. ``make bench`` runs all of it; results are committed with their environment."""
