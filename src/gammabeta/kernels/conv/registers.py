"""How large a tile of sums the 32 vector registers of AVX-512 hold."""

#: Rows of a tile whose rows are 1, 2, 3 and 4 vectors.
ROWS = (9, 9, 5, 5)
