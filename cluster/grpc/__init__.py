"""The gRPC front: `kvarto.v1.Inference`, health and reflection."""
