"""Data sets: finding, ordering, decoding, encoding and naming their images."""
