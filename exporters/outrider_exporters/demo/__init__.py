"""``outrider demo``: the whole way on one machine, on real input."""
