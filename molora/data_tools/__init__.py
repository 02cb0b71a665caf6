"""A recipe's data before anything trains: checked, shown and converted."""
