"""Building blocks of models; they know no rank and no data set."""
