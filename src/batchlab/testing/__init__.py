"""Contracts that batchlab's own parts keep, for your own to be held against."""
