"""Where the cluster meets the worker: nothing else under `cluster/` names that folder."""
