"""A running server: starting, finding and stopping TorchServe, and the configuration that it runs with."""
