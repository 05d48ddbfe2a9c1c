"""Contracts that cross a process boundary. Nothing here imports another kvarto folder."""
