"""Parity: every contract on every backend, judged against float64, with the holes of the coverage counted."""
