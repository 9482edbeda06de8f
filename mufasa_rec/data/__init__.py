"""From raw events and vectors to finished batches."""
