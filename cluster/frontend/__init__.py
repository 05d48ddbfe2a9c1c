"""The process that owns requests: tokenizes, submits, detokenizes, matches stop strings, hands out chunks."""
