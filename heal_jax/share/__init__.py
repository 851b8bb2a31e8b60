"""What a run gives to others: cards, the curriculum as Parquet, and pushing both to a hub."""
