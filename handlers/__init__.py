"""What runs inside a TorchServe worker. This package travels in every archive and imports no other of torchport's."""
