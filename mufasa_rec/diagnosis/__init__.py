"""Finding out what is wrong with a model before it trains for days: where, and what to do about it."""
