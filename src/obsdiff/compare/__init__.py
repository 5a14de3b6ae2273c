"""Methods compared at equal cost: the cells of a comparison, how one is run, and the tables they end in."""
