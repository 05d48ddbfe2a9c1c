"""The engine loop: requests in, plans out, results in, deltas out. No Ray and no socket is named outside `zmq_hub`."""
