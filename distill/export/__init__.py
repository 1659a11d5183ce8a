"""From a PyTorch model to the folder that ships: graph, quantisation, proofs, bundle, runtime."""
