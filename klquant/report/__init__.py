"""Results of `klquant eval` → one page that a person can decide from."""
