"""A run's curves in other trackers than MLflow, copied from its files."""
