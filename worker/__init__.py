"""The ranks of a worker group: model, KV pool and sampler. Only `cluster/launcher.py` names this folder."""
