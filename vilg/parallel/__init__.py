"""How one model is spread over ranks: the grid of ranks, collectives with gradients, split layers, one layout table."""
